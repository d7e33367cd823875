"""Attention over whole sequences: `attention`, its masks, and what it would run."""

from pallas_kernels.attention.api import attention, explain
from pallas_kernels.attention.case import Case
from pallas_kernels.attention.choice import check_name
from pallas_kernels.attention.masks import Mask
from pallas_kernels.attention.merge import KEPT
from pallas_kernels.attention.ring import ring_attention

__all__ = ["KEPT", "Case", "Mask", "attention", "check_name", "explain", "ring_attention"]
