"""Devices to a jax Mesh: real ones, virtual ones or those of an ahead-of-time topology."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from palmjax.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "tensor")
"""Axes of every mesh. One whose MeshConfig.expert is not 1 has `expert` as well, behind them."""


def axes(config: MeshConfig) -> tuple[str, ...]:
    """The mesh's axes, outermost first."""
    return AXES if config.expert == 1 else (*AXES, "expert")


def shape(config: MeshConfig, devices: int) -> tuple[int, ...]:
    """The mesh's shape with -1 resolved.

    Raises ConfigError if more than one axis is -1, an axis is below one, or the product is not the device count.
    """
    names = axes(config)
    sizes = [getattr(config, axis) for axis in names]
    text = ", ".join(f"{axis}={size}" for axis, size in zip(names, sizes, strict=True))
    if sizes.count(-1) > 1:
        raise ConfigError(f"MeshConfig({text}): only one axis may be -1 (the rest)")
    if any(size < 1 and size != -1 for size in sizes):
        raise ConfigError(f"MeshConfig({text}): an axis is a positive number of devices, or -1 for the rest")
    given = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and devices % given == 0:
        sizes[sizes.index(-1)] = devices // given
    if math.prod(sizes) != devices:
        wanted = f"a multiple of {given}" if -1 in sizes else f"{given}"
        raise ConfigError(f"MeshConfig({text}) asks for {wanted} devices; this job has {devices}")
    return tuple(sizes)


def build(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices` (default: all of this job's) with the explicit axes of `axes(config)`.

    On TPU the axes are laid along the torus. Over several slices (pods joined by DCN) the data axis is the one that
    crosses them, so it must be a multiple of the slice count. GPUs and CPUs keep their order: tensor groups are
    neighbours.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = shape(config, len(devices))
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if devices[0].platform != "tpu":
        grid = np.asarray(devices, dtype=object).reshape(sizes)
    elif slices == 1:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        if sizes[0] % slices:
            raise ConfigError(f"MeshConfig.data={sizes[0]} is not a multiple of the {slices} slices that it must cross")
        inner = (sizes[0] // slices, *sizes[1:])
        across = (slices, *[1] * (len(sizes) - 1))
        grid = mesh_utils.create_hybrid_device_mesh(inner, across, devices, allow_split_physical_axes=True)
    names = axes(config)
    return Mesh(grid, names, axis_types=(AxisType.Explicit,) * len(names))
