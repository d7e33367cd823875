"""Language models as compositions of small configured parts (Flax Linen, a strict subset)."""
