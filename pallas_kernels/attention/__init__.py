"""Attention over whole sequences: `attention` and its masks."""

from pallas_kernels.attention.api import attention, explain
from pallas_kernels.attention.masks import Mask

__all__ = ["Mask", "attention", "explain"]
