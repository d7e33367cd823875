"""`v4:12x16x16`, `h200:8`, `cpu`: a machine by name, and its devices without the machine.

Parsing imports no jax; `devices` does. TPU topologies come from libtpu, which compiles for every generation on any
Linux machine.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from typing import Any

from palmjax import libtpu
from palmjax.config import ConfigError
from palmjax.plan import chips
from palmjax.plan.chips import Hardware

EXAMPLES = "v4:12x16x16, v5e:16x16, v5p:4x4x8, v6e:16x16, tpu7x:2x2x2, h100:8, h200:8, a100:16, cpu:8"


@dataclasses.dataclass(frozen=True)
class Topology:
    """A number of equal slices (pods, or parts of one) of one kind of chip, joined by the data centre's network.

    key: chip, as in `palmjax.plan.chips`. shape: chips along each dimension of a slice's torus; GPUs: (count,).
    """

    key: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Whether the torus closes along each dimension: v5e and v6e where a dimension is the whole pod's 16 chips,
        v4, v5p and tpu7x in slices built of whole 4x4x4 cubes (Cloud TPU's system architecture pages).
        """
        if self.hardware is None or not self.hardware.ici_dims:
            return (False,) * len(self.shape)
        if self.hardware.ici_dims == 2:
            return tuple(size == 16 for size in self.shape)
        return (all(size % 4 == 0 for size in self.shape),) * len(self.shape)

    @property
    def hardware(self) -> Hardware | None:
        """Figures of the chip; None for a CPU."""
        return None if self.key == "cpu" else chips.find(self.key)

    @property
    def devices(self) -> int:
        """JAX devices of all slices."""
        return self.chips * (self.hardware.chip.devices if self.hardware else 1)

    def __str__(self) -> str:
        name = f"{self.key}:{'x'.join(map(str, self.shape))}"
        return name if self.slices == 1 else f"{self.slices} x {name}"


def parse(text: str, slices: int = 1) -> Topology:
    """The topology called `text`. Raises ConfigError for an unknown chip or a shape that the chip can't have."""
    key, _, size = text.strip().lower().partition(":")
    if key == "cpu":
        size = size or "1"
    else:
        hardware = chips.find(key)
        dims = hardware.ici_dims or 1
        if not size:
            raise ConfigError(f"--topology={text}: how many chips? For example {_example(key)}")
        if not re.fullmatch(r"\d+(x\d+)*", size) or size.count("x") + 1 != dims:
            raise ConfigError(f"--topology={text}: {key} takes {_dims(dims)}, as in {_example(key)}")
    if not re.fullmatch(r"\d+(x\d+)*", size) or slices < 1 or 0 in (shape := tuple(map(int, size.split("x")))):
        raise ConfigError(f"--topology={text} --slices={slices}: sizes are numbers of 1 or more, as in {EXAMPLES}")
    if slices > 1 and key == "cpu":
        raise ConfigError(f"--slices={slices}: a CPU has no slices")
    return Topology(key, shape, slices)


def _example(key: str) -> str:
    return next(e for e in EXAMPLES.split(", ") if e.startswith(key + ":"))


def _dims(dims: int) -> str:
    return "a number of chips" if dims == 1 else f"{dims} dimensions of its torus"


def prepare_environment(topology: Topology) -> None:
    """What must stand in the environment before jax starts its first backend. A real TPU machine's own values stay."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if topology.hardware is None:
        return
    if topology.hardware.platform == "cuda":
        from palmjax.plan import cuda

        cuda.prepare_environment()
        return
    if not libtpu.installed():
        raise ConfigError(f"planning for {topology} needs the TPU compiler: pip install 'palmjax[plan]'")
    libtpu.settle()
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # several compilers at work side by side; none opens a device


def devices(topology: Topology) -> list[Any]:
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
        from palmjax.plan import cuda

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
