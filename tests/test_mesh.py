"""Meshes from one number an axis, on every kind of device."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import pytest
from jax.sharding import AxisType

from palmjax import mesh
from palmjax.config import ConfigError, MeshConfig


@dataclasses.dataclass(frozen=True)
class FakeTpu:
    """What mesh construction reads of a TPU device."""

    id: int
    coords: tuple[int, ...]
    device_kind: str
    slice_index: int = 0
    platform: str = "tpu"
    core_on_chip: int = 0
    process_index: int = 0


def torus(kind: str, *shape: int, slices: int = 1) -> list[FakeTpu]:
    places = itertools.product(range(slices), *(range(n) for n in reversed(shape)))
    return [FakeTpu(i, tuple(reversed(p[1:])), kind, slice_index=p[0]) for i, p in enumerate(places)]


@pytest.mark.parametrize(
    ("config", "devices", "shape"),
    [
        (MeshConfig(), 8, (8, 1, 1)),
        (MeshConfig(data=1, fsdp=-1), 8, (1, 8, 1)),
        (MeshConfig(data=2, fsdp=-1, tensor=2), 8, (2, 2, 2)),
        (MeshConfig(data=2, fsdp=256, tensor=12), 6144, (2, 256, 12)),
    ],
)
def test_shape_resolves_the_rest(config, devices, shape):
    assert mesh.shape(config, devices) == shape


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MeshConfig(data=-1, fsdp=-1), ["only one axis may be -1"]),
        (MeshConfig(data=0), ["data=0", "positive"]),
        (MeshConfig(tensor=3), ["multiple of 3", "8"]),
        (MeshConfig(data=2, fsdp=2, tensor=1), ["asks for 4 devices", "8"]),
    ],
)
def test_impossible_meshes_are_refused(config, words):
    with pytest.raises(ConfigError) as error:
        mesh.shape(config, 8)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_virtual_cpu_devices_fill_the_data_axis_by_default():
    built = mesh.build(MeshConfig())
    assert dict(built.shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert built.axis_types == (AxisType.Explicit,) * 3
    assert dict(mesh.build(MeshConfig(), jax.devices()[:4]).shape)["data"] == 4


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("TPU v2", (4, 4, 1)),
        ("TPU v3", (4, 4, 1)),
        ("TPU v4", (4, 4, 4)),
        ("TPU v5 lite", (4, 8, 1)),
        ("TPU v5", (4, 4, 4)),
        ("TPU v6 lite", (4, 8, 1)),
        ("TPU7x", (4, 4, 4)),
    ],
)
def test_every_tpu_generation_has_a_mesh(kind, shape):
    devices = torus(kind, *shape)
    built = mesh.build(MeshConfig(data=1, fsdp=-1, tensor=4), devices)
    assert built.devices.shape == (1, len(devices) // 4, 4)
    assert {d.id for d in built.devices.flat} == set(range(len(devices)))


def test_only_the_data_axis_crosses_slices():
    devices = torus("TPU v4", 4, 4, 4, slices=2)
    built = mesh.build(MeshConfig(data=2, fsdp=-1, tensor=4), devices)
    for index, row in enumerate(built.devices):
        assert {d.slice_index for d in row.flat} == {index}
    with pytest.raises(ConfigError, match="2 slices"):
        mesh.build(MeshConfig(data=1, fsdp=-1), devices)
