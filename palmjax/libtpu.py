"""The TPU compiler on a machine without a TPU: libtpu asks a metadata server what machine it is on, and complains.

Installed for `palmjax plan`, it would otherwise greet every run of every verb on a laptop with warnings.
"""

from __future__ import annotations

import glob
import importlib.util
import os


def installed() -> bool:
    """Whether the TPU compiler can be loaded."""
    return importlib.util.find_spec("libtpu") is not None


def settle() -> None:
    """Tells libtpu what it would ask for, unless a TPU is here or somebody has said it. Call before jax starts."""
    if not installed() or glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"):
        return
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v4-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
