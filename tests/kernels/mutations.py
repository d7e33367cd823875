"""Breaks the kernels on purpose, one line at a time, and runs the test that must notice. Not part of the suite.

    python -m tests.kernels.mutations [NAME ...]

Each mutation is applied to a copy of the sources in a temporary folder, so nothing here changes. Prints what each was
and whether the suite fails of it; exits with 1 if one survives.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TPU = "tests/kernels/test_attention_tpu.py"
FORWARD, BACKWARD, PLAN = (f"pallas_kernels/attention/tpu_{name}.py" for name in ("forward", "backward", "plan"))
DECODE = "pallas_kernels/decode_attention/tpu.py"
DECODE_TEST = "tests/kernels/test_decode_attention.py::test_the_tpu_kernel_sees_what_is_filled_and_nothing_else"
PLAIN = f"{TPU}::test_kernels_equal_float64_forward_and_backward"
RACES = f"{TPU}::test_two_cores_race_for_nothing_and_read_nothing_unwritten"
LOSS, TOTAL, TOTAL_TPU = (f"pallas_kernels/linear_cross_entropy/{name}.py" for name in ("xla", "total", "tpu"))
LOSS_FILE = "tests/kernels/test_linear_cross_entropy.py"
LOSS_TEST = f"{LOSS_FILE}::test_a_vocabulary_sharded_over_a_mesh_axis_gives_the_same"
TOTAL_TEST = f"{LOSS_FILE}::test_the_tpu_kernels_of_a_total_equal_float64_and_race_for_nothing"
TOTAL_SHARDED = f"{LOSS_FILE}::test_a_total_of_a_sharded_vocabulary_is_the_same"


@dataclasses.dataclass(frozen=True)
class Mutation:
    """`before`, which `file` has once, becomes `after`; `test` must then fail."""

    file: str
    before: str
    after: str
    test: str


MUTATIONS = {
    "causal mask shifted by one": Mutation(PLAN, "key * heads <= row - ahead", "key * heads < row - ahead", PLAIN),
    "data's mask shifted by one": Mutation(
        PLAN, 'key < column(plan, columns_ref, "stop"', 'key <= column(plan, columns_ref, "stop"', PLAIN
    ),
    "window shifted by one": Mutation(
        PLAN, "(key + mask.window) * heads > row", "(key + mask.window) * heads >= row", PLAIN
    ),
    "one tile too few": Mutation(
        PLAN, "count = (end - 1 - rest - full) >> steps", "count = (end - 2 - rest - full) >> steps", PLAIN
    ),
    "masked tiles taken for whole": Mutation(PLAN, "jnp.minimum((high - full) >> steps, count)", "count", PLAIN),
    "scale left out of dQ": Mutation(BACKWARD, "(dq_sum[...] * plan.scale)", "(dq_sum[...])", PLAIN),
    "scale left out of dK": Mutation(BACKWARD, "jnp.sum(dk, axis=1) * plan.scale", "jnp.sum(dk, axis=1)", PLAIN),
    "no rescaling by the new maximum": Mutation(
        FORWARD, "sum_ref[...] * jnp.tile(keep, (1, values.shape[1] // LANES)) + values", "sum_ref[...] + values", PLAIN
    ),
    "soft-cap's derivative left out": Mutation(BACKWARD, "d_scores * (1.0 - tanh * tanh)", "d_scores", PLAIN),
    "sums not zeroed": Mutation(BACKWARD, "dk_sum[...] = jnp.zeros_like(dk_sum)", "pass", RACES),
    "copy not waited for": Mutation(BACKWARD, "            copy.wait()", "            pass", RACES),
    "cores write one sum": Mutation(BACKWARD, "dk_hbm.at[n, core]", "dk_hbm.at[n, 0]", RACES),
    "cores take the same blocks": Mutation(BACKWARD, "2 * step + ((step + core) & 1)", "2 * step + (step & 1)", RACES),
    "decode: own position not seen": Mutation(
        DECODE, '(entry < fields["stop"])', '(entry + 1 < fields["stop"])', DECODE_TEST
    ),
    "decode: unwritten values weigh": Mutation(
        DECODE, "v = jnp.where(entry + start.astype(jnp.float32) < behind, v, jnp.zeros_like(v))", "pass", DECODE_TEST
    ),
    "decode: heads see each other": Mutation(DECODE, 'head == fields["head"]', "head >= 0.0", DECODE_TEST),
    "decode: splits overlap": Mutation(
        DECODE, "return begin + split * count // self.splits, begin", "return begin, begin", DECODE_TEST
    ),
    "loss: padding gets probability": Mutation(LOSS, "ids < jnp.minimum(static.rows, end)", "ids < end", LOSS_TEST),
    "loss: z-loss has no gradient": Mutation(LOSS, "(d_loss + d_log_z)[:, None]", "d_loss[:, None]", LOSS_TEST),
    "loss: shards' cotangents not added": Mutation(
        LOSS, "d_loss, d_log_z = jax.lax.psum((d_loss, d_log_z), static.axis)", "pass", LOSS_TEST
    ),
    "total: padding gets probability": Mutation(TOTAL_TPU, "row < real_ref[0]", "row < real_ref[0] + 1", TOTAL_TEST),
    "total: first sums not zeroed": Mutation(TOTAL_TPU, "out_ref[...] = jnp.zeros_like(out_ref)", "pass", TOTAL_TEST),
    "total: soft-cap's derivative left out": Mutation(
        TOTAL_TPU, "(exps if tanh is None else exps * (1.0 - tanh * tanh))", "exps", TOTAL_TEST
    ),
    "total: a part's gradient replaces the sum": Mutation(
        TOTAL_TPU, "after[...] = before[...] + dot", "after[...] = dot", TOTAL_TEST
    ),
    "total: tiles' own maximum left in": Mutation(
        TOTAL_TPU, "share = jnp.exp(top - most)", "share = jnp.ones_like(top)", TOTAL_TEST
    ),
    "total: the next device's targets are padding's": Mutation(
        TOTAL, "jnp.where((t >= begin) & (t < begin + real), t - begin, -1)", "t - begin", TOTAL_SHARDED
    ),
    "total: shards' cotangents not added": Mutation(
        TOTAL, "d_total = jax.lax.psum(d_total, static.axis)", "pass", TOTAL_SHARDED
    ),
}


def survives(mutation: Mutation) -> bool:
    """Whether the test passes in spite of it."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("pallas_kernels", "palmjax", "tests"):
            shutil.copytree(ROOT / name, Path(folder) / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        path = Path(folder) / mutation.file
        text = path.read_text()
        assert text.count(mutation.before) == 1, (
            f"{mutation.file} has {mutation.before!r} {text.count(mutation.before)} times"
        )
        path.write_text(text.replace(mutation.before, mutation.after))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", mutation.test]
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, "PYTHONPATH": folder}, capture_output=True, text=True
        )
        # 1 is pytest's "tests failed"; anything else is not an answer.
        assert done.returncode in (0, 1), done.stdout[-2000:] + done.stderr[-2000:]
        return done.returncode == 0


def main(mutations: Mapping[str, Mutation], names: list[str]) -> int:
    """Tries those of `mutations` with these names, or all. Returns 1 if one survives."""
    survivors = 0
    for name in names or mutations:
        alive = survives(mutations[name])
        survivors += alive
        print(f"{'SURVIVES' if alive else 'noticed':<9} {name:<52} {mutations[name].test}", flush=True)
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(MUTATIONS, sys.argv[1:]))
