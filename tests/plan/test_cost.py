"""A schedule's length, against schedules small enough to add up by hand."""

from __future__ import annotations

import numpy as np
import pytest

from palmjax.plan import chips, cost, hlo, topology
from palmjax.plan.network import Network

V5E = chips.HARDWARE["v5e"]
SECOND = int(V5E.clock)
"""Cycles of a second."""


def network(slices: int = 1) -> Network:
    where = topology.parse("v5e:16x16", slices)
    one = np.stack(np.meshgrid(np.arange(16), np.arange(16), indexing="ij"), -1).reshape(-1, 2)
    coords = np.concatenate([np.concatenate([np.full((256, 1), s), one], 1) for s in range(slices)])
    return Network(where, coords, {"data": slices, "fsdp": 256})


def step(body: str, *, computations: str = "", slices: int = 1) -> cost.Step:
    text = (
        f"HloModule jit_step, is_scheduled=true\n\n%one (p: f32[8]) -> f32[8] {{\n  %p = f32[8]{{0}} parameter(0)\n"
        f"  ROOT %c = f32[8]{{0}} negate(%p)\n}}\n\n{computations}\nENTRY %main (a: f32[8]) -> f32[8] {{\n"
        f"  %a = f32[8]{{0}} parameter(0)\n{body}\n}}\n"
    )
    return cost.predict(hlo.parse(text), V5E, network(slices), slices)


def compute(name: str, seconds: float, operand: str = "a") -> str:
    cycles = int(seconds * SECOND)
    config = f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}'
    return f"  %{name} = f32[8]{{0}} fusion(%{operand}), kind=kLoop, calls=%one, {config}"


ROW = ",".join(map(str, range(16)))
GATHER_BYTES = 16 * 4 * 10**9


def gather_start(name: str) -> str:
    shapes = f"(f32[{10**9}]{{0}}, f32[{16 * 10**9}]{{0}})"
    return f"  %{name} = {shapes} all-gather-start(%big), channel_id=1, replica_groups={{{{{ROW}}}}}, dimensions={{0}}"


BIG = f'  %big = f32[{10**9}]{{0}} custom-call(), custom_call_target="AllocateBuffer"'
GATHER = GATHER_BYTES * 15 / 16 / (2 * 50e9 * chips.ICI_EFFICIENCY) + 8e-6


def test_operations_run_one_after_another() -> None:
    found = step(f"{compute('x', 0.25)}\n{compute('y', 0.5, 'x')}")
    assert found.seconds == pytest.approx(0.75, rel=1e-6)
    assert found.by("kind") == {cost.OTHER: pytest.approx(0.75, rel=1e-6)}


def test_a_transfer_hides_behind_what_stands_before_its_done() -> None:
    done = f"  %d = f32[{16 * 10**9}]{{0}} all-gather-done(%s)"
    shorter = step(f"{BIG}\n{gather_start('s')}\n{compute('x', 0.25)}\n{done}")
    assert shorter.seconds == pytest.approx(GATHER, rel=1e-6)
    assert shorter.by("kind")[cost.ICI] == pytest.approx(GATHER - 0.25, rel=1e-6)
    assert shorter.by("axis")["fsdp"] == pytest.approx(GATHER - 0.25, rel=1e-6)
    longer = step(f"{BIG}\n{gather_start('s')}\n{compute('x', 2 * GATHER)}\n{done}")
    assert longer.seconds == pytest.approx(2 * GATHER, rel=1e-6)
    assert sum(e.hidden for e in longer.entries) == pytest.approx(GATHER, rel=1e-6)


def test_two_transfers_on_the_same_links_queue() -> None:
    body = f"{BIG}\n{gather_start('s')}\n{gather_start('t')}\n  %d = f32[8]{{0}} all-gather-done(%s)\n"
    assert step(body + "  %e = f32[8]{0} all-gather-done(%t)").seconds == pytest.approx(2 * GATHER, rel=1e-6)


def test_a_collective_without_a_start_is_all_exposed() -> None:
    gather = f"  %g = f32[{16 * 10**9}]{{0}} all-gather(%big), channel_id=1, replica_groups={{{{{ROW}}}}}"
    found = step(f"{BIG}\n{compute('x', 0.5)}\n{gather}")
    assert found.seconds == pytest.approx(0.5 + GATHER, rel=1e-6)


LOOP = """%body (b: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %b = (s32[], f32[8]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %x = f32[8]{{0}} get-tuple-element(%b), index=1
{inside}
  ROOT %t = (s32[], f32[8]{{0}}) tuple(%i, %x)
}}

%cond (c: (s32[], f32[8])) -> pred[] {{
  %c = (s32[], f32[8]{{0}}) parameter(0)
  %j = s32[] get-tuple-element(%c), index=0
  %n = s32[] constant(10)
  ROOT %lt = pred[] compare(%j, %n), direction=LT
}}
"""
RUN = """  %z = s32[] constant(0)
  %init = (s32[], f32[8]{0}) tuple(%z, %a)
  %w = (s32[], f32[8]{0}) while(%init), condition=%cond, body=%body"""


def test_a_loop_counts_its_body_as_often_as_it_runs() -> None:
    found = step(RUN, computations=LOOP.format(inside=compute("y", 0.125, "x")))
    assert found.seconds == pytest.approx(1.25, rel=1e-6)
    assert [e.runs for e in found.entries] == [10]


EXCHANGE = """  %tok = token[] after-all()
  %s = (f32[100000000]{0}, u32[], token[]) send(%big, %tok), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="r_0",_xla_megascale_transfer_type="ALL_REDUCE"}
  %r = (f32[100000000]{0}, u32[], token[]) recv(%tok), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="r_0",_xla_megascale_transfer_type="ALL_REDUCE"}
  %sd = token[] send-done(%s), channel_id=2, is_host_transfer=true
  %rd = (f32[100000000]{0}, token[]) recv-done(%r), channel_id=3, is_host_transfer=true"""  # noqa: E501


def test_slices_exchange_while_the_chip_computes() -> None:
    # Two slices: an all-reduce sends 2 (S-1)/S = 1 time the bytes.
    seconds = 4e8 / (V5E.dcn_bandwidth * chips.DCN_EFFICIENCY) + chips.DCN_SECONDS
    found = step(f"{BIG}\n{EXCHANGE}", slices=2)
    assert found.by("kind")[cost.DCN] == pytest.approx(seconds, rel=1e-6)
    assert found.by("axis")["data"] == pytest.approx(seconds, rel=1e-6)


def test_a_loop_is_no_faster_than_its_busiest_link() -> None:
    """Each turn starts a transfer that the next turn waits for: hidden, but the network still has to carry them all."""
    start = EXCHANGE.splitlines()[:2]
    inside = "\n".join([BIG, *start, compute("y", 0.01, "x")])
    seconds = 4e8 / (V5E.dcn_bandwidth * chips.DCN_EFFICIENCY) + chips.DCN_SECONDS
    found = step(RUN, computations=LOOP.format(inside=inside), slices=2)
    assert found.seconds == pytest.approx(10 * seconds, rel=1e-6)


def test_operations_without_an_estimate_cost_their_bytes() -> None:
    copy = f"  %y = f32[{10**9}]{{0}} copy(%big)"
    assert step(f"{BIG}\n{copy}").seconds == pytest.approx(8e9 / V5E.hbm_bandwidth, rel=1e-6)


def test_what_lies_on_chip_is_not_read_from_memory() -> None:
    copy = f"  %y = f32[{10**9}]{{0:T(1024)S(1)}} copy(%big)"
    assert step(f"{BIG}\n{copy}").seconds == pytest.approx(4e9 / V5E.hbm_bandwidth, rel=1e-6)


def test_the_slower_branch_counts() -> None:
    branches = "\n".join(
        f"%{name} (q: f32[8]) -> f32[8] {{\n  %q = f32[8]{{0}} parameter(0)\n{compute('y', seconds, 'q')}\n}}\n"
        for name, seconds in (("fast", 0.25), ("slow", 0.5))
    )
    choose = "  %k = s32[] constant(0)\n  %o = f32[8]{0} conditional(%k, %a, %a), branch_computations={%fast, %slow}"
    assert step(choose, computations=branches).seconds == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize(("gpus", "kind"), [(8, cost.NVLINK), (16, cost.DCN)])
def test_gpus_of_a_node_talk_over_nvlink_and_nodes_over_the_network(gpus: int, kind: str) -> None:
    where = topology.parse("h200:16")
    coords = np.stack([np.zeros(16, int), np.arange(16)], 1)
    group = ",".join(map(str, range(gpus)))
    gather = f"all-gather(%a), replica_groups={{{{{group}}}}}, dimensions={{0}}"
    text = (
        "HloModule jit_step, is_scheduled=true\n\nENTRY %main (a: f32[8]) -> f32[128] {\n"
        f"  %a = f32[8]{{0}} parameter(0)\n  ROOT %g = f32[{8 * gpus}]{{0}} {gather}\n}}\n"
    )
    assert where.hardware is not None
    found = cost.predict(hlo.parse(text), where.hardware, Network(where, coords, {"fsdp": 16}), 1)
    assert found.by("kind") == {kind: found.seconds} and found.seconds > 0
