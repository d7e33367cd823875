"""Ring attention on eight virtual devices equals attention on one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels.attention import Mask, attention, ring_attention
from tests.kernels.cases import Example

ROWS = PartitionSpec("data", "sequence")


@pytest.mark.multidevice
@pytest.mark.parametrize(("impl", "chip", "length"), [("xla", None, 64), ("tpu", "TPU v4", 512)])
def test_a_ring_of_four_equals_one_device(impl, chip, length):
    example = Example(
        length=length,
        heads=4,
        kv_heads=2,
        width=16,
        mask=Mask(window=length // 2 + 3),
        cuts=(5, length // 2 - 1),
        prefixes=(9, length // 4 + 5),
        alibi=True,
        soft_cap=3.0,
    )
    q, k, v, w, _ = (x.astype(np.float32) for x in example.arrays())
    keywords = example.keywords()
    ids, marks = keywords.pop("segments"), keywords.pop("prefix")

    def single(q: Any, k: Any, v: Any) -> Any:
        out = attention(q, k, v, segments=ids, prefix=marks, impl="einsum", **keywords)
        return jnp.sum(w * out), out

    (_, out), gradients = jax.jit(jax.value_and_grad(single, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    mesh = jax.make_mesh((2, 4), ("data", "sequence"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, ROWS) for x in (q, k, v, w, ids, marks)]

        def part(q: Any, k: Any, v: Any, ids: Any, marks: Any) -> Any:
            extra = {"impl": impl, "chip": chip, "interpret": True, **keywords}
            return ring_attention(q, k, v, axis="sequence", segments=ids, prefix=marks, **extra)

        ring = jax.shard_map(part, in_specs=(ROWS,) * 5, out_specs=ROWS, check_vma=False)

        def total(q: Any, k: Any, v: Any, w: Any, ids: Any, marks: Any) -> Any:
            out = ring(q, k, v, ids, marks)
            return jnp.sum(w * out), out

        (_, ring_out), ring_gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(*placed)
    for mine, true in zip((ring_out, *ring_gradients), (out, *gradients), strict=True):
        assert np.linalg.norm(np.asarray(mine) - np.asarray(true)) < 1e-5 * np.linalg.norm(true)
