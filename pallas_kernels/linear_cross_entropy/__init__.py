"""Hidden states and a vocabulary's table to cross-entropy, without the logits: `linear_cross_entropy` by token,
`linear_cross_entropy_total` with a gradient in three products.
"""

from pallas_kernels.linear_cross_entropy.api import explain_total, linear_cross_entropy, linear_cross_entropy_total

__all__ = ["explain_total", "linear_cross_entropy", "linear_cross_entropy_total"]
