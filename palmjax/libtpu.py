"""The TPU compiler on a machine without a TPU: libtpu asks a metadata server what machine it is on, and complains.

Installed for `palmjax plan`, it would otherwise greet every run of every verb on a laptop with warnings, and end those
that are profiled: jax's profiler asks every plugin that is loaded, and dies of a segmentation fault in a libtpu of
another version than the one that jax names (seen: jax 0.10.2 with libtpu 0.0.51).
"""

from __future__ import annotations

import glob
import importlib.util
import os
import sys

_CUDA = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")


def installed() -> bool:
    """Whether the TPU compiler can be loaded."""
    return importlib.util.find_spec("libtpu") is not None


def settle() -> None:
    """Tells libtpu what it would ask for, unless a TPU is here or somebody has said it. Call before jax is imported.

    Also keeps jax from loading it to look for a TPU, where JAX_PLATFORMS does not say what to look for.
    """
    if not installed() or glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"):
        return
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v4-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    if "jax" in sys.modules:
        return
    if importlib.util.find_spec("jax_plugins") is None:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    elif glob.glob("/dev/nvidia[0-9]*") and any(map(importlib.util.find_spec, _CUDA)):
        os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu")
