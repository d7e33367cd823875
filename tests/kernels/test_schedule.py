"""What the TPU compiler makes of the kernels: every tuned row compiles for its chip, and its schedule is the committed
one.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import pytest

os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # beside another test process that compiles

from pallas_kernels import aot, schedule
from pallas_kernels.attention import KEPT, Case, Mask, attention, bundles, table, tpu_backward, tpu_forward

GOALS = {
    ("TPU v4", "forward"): 185_000,
    ("TPU v4", "backward"): 360_000,
    ("TPU v5", "forward"): 170_000,
    ("TPU v6 lite", "forward"): 140_000,
}
"""Of the busiest core at T=2048, 16 heads of 256, bfloat16, causal, one sequence: bundles on TPU v4, else simulated
cycles."""


def rows():
    return [
        pytest.param(row, id=f"{row.chip}-{row.length}-{row.heads}-{row.head_dim}-{row.dtype}") for row in table.rows()
    ]


def tuning(row: table.Row) -> dict:
    from dataclasses import asdict

    return asdict(row.tuning)


@pytest.mark.slow
@pytest.mark.parametrize("row", rows())
def test_every_tuned_row_compiles_for_its_chip_with_every_mask_at_the_most_keys(row):
    keys = min(row.tuning.forward_keys, row.tuning.backward_keys)
    function, operands = bundles.program(row.chip, keys, row.heads, row.head_dim, row.dtype, tuning(row), ranged=True)
    text = aot.compile_for(row.chip, function, operands).as_text()
    assert {schedule.kernel_in(line) for line in text.splitlines() if "tpu_custom_call" in line} == {
        tpu_forward.NAME,
        tpu_backward.NAME,
    }


def of_the_goals(chip: str) -> table.Row:
    case = Case(rows=1, length=2048, heads=16, kv_heads=1, head_dim=256, dtype="bfloat16", mask=Mask())
    row = table.find(case, chip)
    assert row is not None and (row.length, row.heads, row.head_dim) == (2048, 16, 256)
    return row


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "source", "passes"),
    [("TPU v4", "bundles", 2), ("TPU v5", "simulated", 1), ("TPU v6 lite", "simulated", 1)],
)
def test_the_schedule_is_the_committed_one(chip, source, passes):
    """Within 3 % of the table: instructions on TPU v4, elsewhere the compiler's simulation, waits included."""
    row = of_the_goals(chip)
    assert row.source == source
    shape = (chip, row.length, row.heads, row.head_dim, row.dtype, tuning(row))
    found = bundles.measure(*shape) if source == "bundles" else bundles.simulate(*shape, both=False)
    assert len(found) == passes
    for which, cost in found.items():
        committed = getattr(row, f"{which}_cost")
        assert abs(cost - committed) <= 0.03 * committed, f"{which}: {cost}, committed {committed}"


@pytest.mark.slow
def test_a_policy_that_keeps_the_named_results_runs_the_forward_pass_once():
    def kernels_run(policy: Any) -> list[str]:
        op = jax.checkpoint(functools.partial(attention, impl="tpu", chip="TPU v4"), policy=policy)

        def total(q: Any, k: Any, v: Any) -> Any:
            return jnp.sum(jnp.square(op(q, k, v)))

        q, k = (jax.ShapeDtypeStruct((1, 256, heads, 128), "bfloat16") for heads in (2, 1))
        text = aot.compile_for("TPU v4", jax.grad(total, argnums=(0, 1, 2)), [q, k, k]).as_text()
        calls = [line for line in text.splitlines() if "tpu_custom_call" in line and "palmjax" in line]
        return sorted(str(schedule.kernel_in(line)) for line in calls)

    forward, backward = tpu_forward.NAME, tpu_backward.NAME
    assert kernels_run(None) == [backward, forward, forward]
    assert kernels_run(jax.checkpoint_policies.save_only_these_names(*KEPT)) == [backward, forward]


def test_the_table_holds_the_goals():
    for (chip, which), goal in GOALS.items():
        row = of_the_goals(chip)
        cost, source = getattr(row, f"{which}_cost"), row.source if which == "forward" else row.backward_source
        assert source == ("bundles" if chip == "TPU v4" else "simulated"), f"{chip} {which}: {source}"
        assert cost is not None and cost <= goal, f"{chip} {which}: {cost}"


def test_cycles_come_from_the_table_and_say_so():
    flops = 4 * 16 * 256 * 2048 * 2049 // 2
    cycles, source = schedule.cycles("jvp_palmjax_attention_forward_.1", "TPU v4", flops=flops)
    assert "bundles of the tuned row T=2048 D=256" in source
    assert "simulated of the tuned row" in schedule.cycles("palmjax_attention_forward", "TPU v5", flops=flops)[1]
    row = next(row for row in table.rows() if (row.chip, row.head_dim, row.dtype) == ("TPU v4", 256, "bfloat16"))
    assert cycles == pytest.approx(row.forward_cost)
    twice, _ = schedule.cycles("palmjax_attention_forward", "TPU v4", flops=2 * flops)
    assert twice == pytest.approx(2 * cycles)
    peak, source = schedule.cycles("palmjax_attention_forward", "TPU v4", flops=flops, dtype="float32")
    assert peak == pytest.approx(flops / 262144)
    assert source == "matrix units' peak"
    with pytest.raises(ValueError, match="no kernel is called 'fusion'"):
        schedule.cycles("fusion", "TPU v4", flops=1.0)
    with pytest.raises(ValueError, match="chip 'cpu' is not known"):
        schedule.cycles("palmjax_attention_forward", "cpu", flops=1.0)


def test_a_listing_is_read_in_blocks():
    """Blocks end at branches, at marks and where the depth of loops changes."""
    text = """
     0   :  { %s1 = smov 0 }
   0x1 LB: > { %a = vmatmul.f32 %x  ;;  %b = vmatmul.f32 %y }
   0x2   : > { %99 = sbr.rel (%p1) target = $region4 }
   0x3 LB: > > { %c = vmatmul.f32 %x }
   0x4   : > > { %s2 = sadd 1 /* spill */ }
   0x5   : > { %d = vadd %x }
   0x6 PF: > { %e = vadd %x }
"""
    assert [(b["bundles"], b["products"], b["depth"], b["loop"]) for b in aot.blocks(text)] == [
        (1, 0, 0, 0),
        (2, 2, 1, 0),
        (2, 1, 2, 1),
        (1, 0, 1, 0),
        (1, 0, 1, 0),
    ]
    assert sum(b["spills"] for b in aot.blocks(text)) == 1
