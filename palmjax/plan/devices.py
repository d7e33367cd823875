"""A machine's devices without the machine, to compile for.

TPU topologies come from libtpu, which compiles for every generation on any Linux machine; GPUs from XLA's CUDA plugin
(`cuda.py`).
"""

from __future__ import annotations

import os
from typing import Any

from palmjax import libtpu
from palmjax.config import ConfigError
from palmjax.plan import cuda
from palmjax.plan.topology import Topology


def prepare_environment(topology: Topology) -> None:
    """What must stand in the environment before jax starts its first backend. A real TPU machine's own values stay."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if topology.hardware is None:
        return
    if topology.hardware.platform == "cuda":
        cuda.prepare_environment()
        return
    if not libtpu.installed():
        raise ConfigError(f"planning for {topology} needs the TPU compiler: pip install 'palmjax[plan]'")
    libtpu.settle()
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # several compilers at work side by side; none opens a device


def of(topology: Topology) -> list[Any]:
    """The JAX devices of `topology`, to compile for. Call `prepare_environment` first.

    Raises ConfigError if the compiler does not know the shape, or the plugin is missing.
    """
    import jax
    from jax.experimental import topologies

    if topology.key == "cpu":
        jax.config.update("jax_num_cpu_devices", topology.devices)
        return list(jax.devices("cpu"))
    hardware = topology.hardware
    assert hardware is not None
    if hardware.platform == "cuda":
        return cuda.devices(topology)
    # The compiler takes a slice for an open mesh unless told that it wraps, and then picks slower collectives.
    extra: dict[str, Any] = {"wrap": [*topology.wrap, *[False] * (3 - len(topology.wrap))]}
    if topology.key == "v4":  # without megacore a chip is two devices of 16 GiB, which no runtime offers any more
        extra["chip_config_name"] = "megacore"
    if topology.slices > 1:
        extra["num_slices"] = topology.slices
    name = f"{topology.key}:{'x'.join(map(str, topology.shape))}"
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **extra).devices)
    except Exception as error:  # libtpu's own errors have no common class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"the TPU compiler knows no topology {name}: {reason[:200]}") from error
