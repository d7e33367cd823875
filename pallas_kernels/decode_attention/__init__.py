"""Attention of a few new tokens against a key/value cache: `decode_attention`."""

from pallas_kernels.decode_attention.api import decode_attention, explain
from pallas_kernels.decode_attention.case import Case

__all__ = ["Case", "decode_attention", "explain"]
