"""What the TPU compiler makes of the kernels: every tuned row compiles for its chip, and its schedule is the committed
one.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # beside another test process that compiles

from pallas_kernels import aot, schedule
from pallas_kernels.attention import KEPT, Case, Mask, attention, cost, explain, table, tpu, tpu_backward, tpu_forward
from pallas_kernels.attention.table import Shape
from pallas_kernels.attention.tpu_plan import Blocks
from pallas_kernels.decode_attention import choice as decode_choice
from pallas_kernels.decode_attention import cost as decode_cost
from pallas_kernels.linear_cross_entropy import choice as loss_choice
from pallas_kernels.linear_cross_entropy import cost as loss_cost

GOALS = {
    ("TPU v4", "forward"): 185_000,
    ("TPU v4", "backward"): 360_000,
    ("TPU v5", "forward"): 170_000,
    ("TPU v6 lite", "forward"): 140_000,
}
"""Of the busiest core at T=2048, 16 heads of 256, bfloat16, causal, one sequence: bundles on TPU v4, else simulated
cycles."""


def largest_programs(chip: str) -> dict[str, tuple[str, Any, list[jax.ShapeDtypeStruct]]]:
    """Program text to (name, function, operands): what each row of each op runs at its largest. Rows whose kernels are
    one and the same program have one entry.
    """
    found = {}

    def add(name: str, program: tuple[Any, list[jax.ShapeDtypeStruct]]) -> None:
        function, operands = program
        text = str(jax.make_jaxpr(function)(*operands))
        # An estimate for XLA, in which heads are counted; the kernels know only rows.
        found.setdefault(re.sub(r"cost_estimate=CostEstimate\([^)]*\)", "", text), (name, function, operands))

    for row in table.rows():
        for which in cost.PASSES if row.chip == chip else ():
            given = (chip, which, dataclasses.asdict(row.shape), dataclasses.asdict(row.tuning))
            add(f"{which} of {row.sizes}", cost.program(*given, everything=True))
            if which == "backward" and row.tuning.backward.vmem_mib is None:
                # A narrow dQ and its sum take as much as a wide one; the compiler's own limit leaves little room.
                add(f"{which}, one part, of {row.sizes}", cost.program(*given, everything=True, summed=False))
    for row in decode_choice.rows():
        if row.chip == chip:
            add(f"cache of {row.head_dim} {row.dtype}", decode_cost.most(chip, row.size, row.head_dim, row.dtype))
    for row in loss_choice.rows():
        if row.chip == chip:
            tiles = dataclasses.asdict(row.tiles)
            add("loss", loss_cost.program(chip, tiles, width=2 * loss_cost.WIDTH, soft_cap=30.0))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("chip", table.chips())
def test_every_tuned_row_compiles_for_its_chip_with_what_takes_most_memory(chip):
    programs = largest_programs(chip)
    kernels = set()
    for name, function, operands in programs.values():
        try:
            text = aot.compile_for(chip, function, operands).as_text()
        except aot.CompileError as error:
            pytest.fail(f"{name}: {error}")
        kernels |= {schedule.kernel_in(line) for line in text.splitlines() if "tpu_custom_call" in line}
    assert kernels >= {tpu_forward.NAME, tpu_backward.NAME}


def of_the_goals(chip: str) -> table.Row:
    case = Case(rows=1, length=2048, heads=16, kv_heads=1, head_dim=256, dtype="bfloat16", mask=Mask())
    row = table.find(case, chip)
    assert row is not None
    assert (row.length, row.heads, row.head_dim, row.mask) == (2048, 16, 256, "causal")
    return row


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["TPU v4", "TPU v5", "TPU v6 lite"])
def test_the_schedule_is_the_committed_one(chip):
    """Within 3 % of the tables, each op and both passes: instructions on TPU v4, elsewhere the compiler's simulation,
    waits included.
    """
    row = of_the_goals(chip)
    decode = next(row for row in decode_choice.rows() if (row.chip, row.dtype) == (chip, "bfloat16"))
    asked = {which: cost.question(chip, which, row.shape, row.tuning) for which in cost.PASSES}
    asked["decode"] = decode_cost.question(chip, decode.size, decode.head_dim, decode.dtype)
    committed: dict[str, tuple[Any, str]] = {
        "forward": (row.forward_cost, row.source),
        "backward": (row.backward_cost, row.backward_source),
        "decode": (decode.cost, decode.source),
    }
    if chip not in aot.SIMULATED:
        # The profiler takes minutes and gigabytes for it.
        loss = loss_choice.find("bfloat16", chip)
        assert loss is not None
        asked["loss"] = loss_cost.question(chip, loss.tiles)
        committed["loss"] = loss.cost, loss.source
    for name, answer in zip(asked, aot.costs(chip, list(asked.values())), strict=True):
        assert not isinstance(answer, aot.CompileError), f"{name}: {answer}"
        assert answer[1] == committed[name][1] == ("bundles" if chip == "TPU v4" else "simulated"), name
        now, then = (x if isinstance(x, dict) else {name: x} for x in (answer[0], committed[name][0]))
        assert now.keys() == then.keys()
        for kernel, taken in now.items():
            assert abs(taken - then[kernel]) <= 0.03 * then[kernel], f"{kernel}: {taken}, committed {then[kernel]}"


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


SMALL = tpu.Tuning(
    forward=Blocks(rows=128, keys=256, cores=2),
    backward=Blocks(rows=128, keys=256, cores=2),
    forward_keys=1024,
    backward_keys=1024,
)


@pytest.mark.parametrize("mask", ["causal", "full", "window", "packed"])
@pytest.mark.parametrize("which", ["forward", "backward"])
def test_every_chunk_that_a_block_sees_is_counted_once(mask, which):
    """In a made-up listing a block has as many bundles as its tile has chunks of keys."""
    shape = Shape(length=1024, heads=1, head_dim=128, dtype="bfloat16", mask=mask)
    calls = cost.parts(which, shape, SMALL)
    [call] = calls
    sizes = sorted({(end - 1 - full) % 2 + 1 for _, full, _, end in call.bounds.tolist()})
    loops = [*([1] if call.plan.from_below else []), *([] if call.plan.one_chunk_of_diagonal else [2]), 2]
    blocks = [{"products": 1, "bundles": size, "depth": 1, "loop": 0} for size in sizes]
    blocks += [{"products": 1, "bundles": size, "depth": 2, "loop": 1 + n} for n, size in enumerate(loops)]
    seen = sum(end - low for low, _, _, end in call.bounds.tolist())
    assert cost.busiest_core(calls, which, 1, 128, blocks) == seen
    halves = cost.busiest_core(calls, which, 2, 128, blocks)
    assert seen / 2 <= halves <= seen / 2 + call.plan.blocks


def test_a_sum_is_zeroed_once_and_not_in_every_step():
    calls = cost.parts("backward", Shape(length=1024, heads=1, head_dim=128, dtype="bfloat16", mask="causal"), SMALL)
    tiles = [{"products": 1, "bundles": 0, "depth": depth, "loop": depth - 1} for depth in (1, 1, 2)]
    around = [{"products": 0, "bundles": size, "depth": 1, "loop": 0} for size in (256, 200)]
    steps = calls[0].plan.blocks // 2
    assert cost.busiest_core(calls, "backward", 2, 128, [*around, *tiles]) == 256 + steps * 200


@pytest.mark.parametrize("mask", ["window", "packed"])
def test_what_a_row_is_costed_by_is_attention_with_its_mask(mask):
    """The kernels alone, interpreted; keys in parts, whose log-sum-exp adds them up."""
    shape = Shape(length=700, heads=2, head_dim=128, dtype="float32", mask=mask)
    function, operands = cost.program(
        "TPU v4", "forward", dataclasses.asdict(shape), dataclasses.asdict(SMALL), whole=True, interpret=True
    )
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(x.shape, np.float32) for x in operands)
    out, _ = jax.jit(function)(q, k, v)
    q, out = (np.asarray(x).reshape(1, -1, 2, 128)[:, :700] for x in (q, out))
    given: Any = (q, *(x[:, :700, None] for x in (k, v)))
    packed: Any = np.arange(700, dtype=np.int32)[None] // cost.SEGMENT if mask == "packed" else None
    want = attention(*given, mask=cost.mask_of(shape), segments=packed, impl="einsum")
    np.testing.assert_allclose(out, want, rtol=2e-5, atol=2e-6)
    assert np.any(np.abs(out - attention(*given, impl="einsum")) > 1e-2)


def test_a_mask_takes_its_own_row_and_is_told_where_there_is_none(monkeypatch):
    def row(length: int, mask: str, heads: int = 16) -> table.Row:
        of = Shape(length=length, heads=heads, head_dim=256, dtype="bfloat16", mask=mask)
        return dataclasses.replace(table.rows()[0], chip="TPU v4", source="bundles", **dataclasses.asdict(of))

    made = (row(2048, "causal"), row(8192, "causal"), row(8192, "window"), row(2048, "causal", heads=48))
    monkeypatch.setattr(table, "rows", lambda: made)
    case = Case(rows=1, length=2048, heads=16, kv_heads=1, head_dim=256, dtype="bfloat16", mask=Mask())
    packed = dataclasses.replace(case, segments=True, length=8192)
    short = dataclasses.replace(case, mask=Mask(window=2048))  # holds the whole row
    for given, taken in (
        (case, made[0]),
        (dataclasses.replace(case, heads=40), made[3]),
        (dataclasses.replace(case, mask=Mask(window=512)), made[2]),
        (short, made[0]),
        (dataclasses.replace(case, mask=Mask(causal=False)), made[0]),
        (packed, made[1]),
    ):
        assert table.find(given, "TPU v4") is taken, given
    told = "tpu (TPU v4; block sizes of the row for window T=8192, 16 heads of 256 bfloat16, bundles) for"
    assert told in explain("auto", dataclasses.replace(case, mask=Mask(window=512)), "TPU v4")
    told = (
        "tpu (named; block sizes of the row for causal T=8192, 16 heads of 256 bfloat16, bundles; no row is for packed)"
    )
    assert told in explain("tpu", packed, "TPU v4")
    with pytest.raises(ValueError, match=r"Shape.mask = 'prefix': one of causal, full, window, packed"):
        row(2048, "prefix")


def test_costs_are_of_one_yardstick(monkeypatch):
    aborted, refused = aot.ProfileError("aborted"), aot.CompileError("too large")
    monkeypatch.setattr(aot, "listings", lambda chip, questions: [{"f": []}] * len(questions))

    def asked(count: Any = len) -> aot.Question:
        return aot.Question(target="", arguments={}, count=count, cycles=lambda found: found["f"])

    def costs(simulated: list[Any], questions: Any = None, chip: str = "TPU v5") -> list[Any]:
        monkeypatch.setattr(aot, "simulated", lambda chip, questions: simulated)
        return aot.costs(chip, questions or [asked()] * len(simulated))

    assert costs([{"f": 7}, refused]) == [(7, "simulated"), refused]
    assert costs([{"f": 7}, aborted]) == [(1, "bundles")] * 2
    assert costs([{"f": 7}, aborted], [asked(None)] * 2) == [(7, "simulated"), aborted]
    assert costs([{"f": 7}], chip="TPU v4") == [(1, "bundles")]
    [unread] = costs([{"f": 7}], [asked(None)], chip="TPU v4")
    assert isinstance(unread, aot.ProfileError)
    with pytest.raises(ValueError, match="the compiler does not simulate 'TPU v4'; it does TPU v5 lite"):
        monkeypatch.undo()
        aot.simulated("TPU v4", [])
    with pytest.raises(aot.ProfileError, match="no kernel g among f"):
        aot.of_kernel({"f": 7}, "g")
