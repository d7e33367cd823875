"""`v4:12x16x16`, `h200:8`, `cpu`: a machine by name. Imports no jax."""

from __future__ import annotations

import dataclasses
import math
import re

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
