"""`tests.kernels.mutations` for the Hopper kernels. Not part of the suite.

python -m tests.kernels.mutations_gpu [NAME ...]
"""

from __future__ import annotations

import os
import sys

from tests.kernels.mutations import Mutation, main

TEST = "tests/kernels/test_attention_gpu.py"
TILE, FORWARD, BACKWARD = (f"pallas_kernels/attention/gpu_{name}.py" for name in ("tile", "forward", "backward"))
PLAIN = f"{TEST}::test_kernels_equal_float64_forward_and_backward"
RACES = f"{TEST}::test_warpgroups_race_for_nothing_and_read_nothing_unwritten"
DECODE, KERNEL = (f"pallas_kernels/decode_attention/gpu{name}.py" for name in ("", "_kernel"))
DECODE_TEST = "tests/kernels/test_decode_attention_gpu.py::test_the_kernel_sees_what_is_filled_and_nothing_else"

MUTATIONS = {
    "mask shifted by one": Mutation(TILE, "seen = key() < over", "seen = key() <= over", PLAIN),
    "far end shifted by one": Mutation(TILE, "key() >= over", "key() > over", PLAIN),
    "soft-cap's derivative left out": Mutation(BACKWARD, "weights * (1.0 - tanh * tanh)", "weights", PLAIN),
    "no rescaling by the new maximum": Mutation(TILE, "values * over(keep, values.shape, ROW)", "values", PLAIN),
    "scale left out of dQ": Mutation(BACKWARD, "(dq * plan.scale)", "(dq)", PLAIN),
    "scale left out of dK": Mutation(BACKWARD, "(dk * plan.scale)", "(dk)", PLAIN),
    "values not waited for": Mutation(FORWARD, "plgpu.barrier_wait(tile_full.at[of_values])", "pass", RACES),
    "weights not waited for": Mutation(BACKWARD, "plgpu.barrier_wait(of.sent)", "pass", RACES),
    "a slot filled before it is empty": Mutation(TILE, "plgpu.barrier_wait(barrier.at[slot])", "pass", RACES),
    "a warpgroup takes one turn more": Mutation(
        FORWARD, "        pl.when(at.warpgroup == 0)(next_turn)", "        next_turn()", PLAIN
    ),
    "decode: unwritten values weigh": Mutation(
        KERNEL, "_clear(plan, of.v_tiles.at[slot], item.most - start)", "pass", DECODE_TEST
    ),
    "decode: the last tile's beginning counts twice": Mutation(
        KERNEL, 'numbers["first"] = jnp.maximum(numbers["first"], index * work.tile)', "pass", DECODE_TEST
    ),
    "decode: parts overlap": Mutation(
        KERNEL, "jnp.minimum(first + work.part,", "jnp.minimum(first + work.part + 1,", DECODE_TEST
    ),
    "decode: keys not waited for": Mutation(KERNEL, "plgpu.barrier_wait(of.k_full.at[slot])", "pass", DECODE_TEST),
    "decode: sums not waited for": Mutation(KERNEL, "plgpu.barrier_wait(of.sent)", "pass", DECODE_TEST),
    "decode: sums given before the former are taken": Mutation(
        KERNEL,
        "            plgpu.barrier_wait(of.taken)\n\n        of.row_smem",
        "            pass\n\n        of.row_smem",
        DECODE_TEST,
    ),
    "decode: queries copied before the former are read": Mutation(
        KERNEL,
        "                plgpu.barrier_wait(of.q_empty)\n\n            rows =",
        "                pass\n\n            rows =",
        DECODE_TEST,
    ),
    "decode: warpgroups' sums scaled by each other's": Mutation(
        KERNEL, "for x in (top, other))", "for x in (other, top))", DECODE_TEST
    ),
    "decode: unwritten parts weigh": Mutation(
        DECODE, "jnp.where(written[:, :, None], lse, reference.EMPTY)", "lse", DECODE_TEST
    ),
    "decode: pages of another row": Mutation(
        KERNEL, "of.page_table[row, number]", "of.page_table[0, number]", DECODE_TEST
    ),
    "decode: one head's keys for all": Mutation(
        KERNEL, "head = jax.lax.rem(item.sequence, work.kv_heads)", "head = 0", DECODE_TEST
    ),
}


if __name__ == "__main__":
    # A barrier too few may leave warpgroups waiting for ever (`interpreted_gpu.ENDS`).
    os.environ["PYTEST_ADDOPTS"] = "--timeout=60"
    sys.exit(main(MUTATIONS, sys.argv[1:]))
