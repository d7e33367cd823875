"""Weights, tokenizers and training loops of other stacks. Leaves: they may import anything, and nobody imports them."""
