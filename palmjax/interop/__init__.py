"""Weights, tokenizers and training loops of other stacks. Leaves of the house: may import anything, nobody does them."""
