"""Hidden states and a vocabulary's table to cross-entropy, without the logits: `linear_cross_entropy`."""

from pallas_kernels.linear_cross_entropy.api import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
