"""Collectives on a torus, against times worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from palmjax.plan import chips, topology
from palmjax.plan.network import Network, Span

HOP = chips.ICI_HOP_SECONDS


def network(name: str, axes: dict[str, int], slices: int = 1) -> Network:
    """A mesh laid row by row over the torus: the last mesh axis along its last dimension."""
    where = topology.parse(name, slices)
    one = np.stack(np.meshgrid(*map(np.arange, where.shape), indexing="ij"), axis=-1).reshape(-1, len(where.shape))
    coords = np.concatenate([np.concatenate([np.full((len(one), 1), s), one], axis=1) for s in range(slices)])
    return Network(where, coords, axes)


def test_the_torus_closes_in_whole_cubes_and_along_a_whole_v5e_pod() -> None:
    assert topology.parse("v4:4x4x8").wrap == (True, True, True)
    assert topology.parse("v4:2x4x4").wrap == (False, False, False)
    assert topology.parse("v5e:8x16").wrap == (False, True)


def test_what_a_group_spans() -> None:
    net = network("v4:4x4x4", {"fsdp": 16, "tensor": 4})
    assert net.spans(np.arange(4)) == [Span(2, 4, 1, True)]
    assert net.spans(np.arange(0, 64, 4)) == [Span(0, 4, 1, True), Span(1, 4, 1, True)]
    assert net.spans(np.array([0, 2])) == [Span(2, 2, 2, False)]
    assert net.mesh_axes(np.arange(4)) == "tensor"
    assert net.mesh_axes(np.arange(0, 64, 4)) == "fsdp"


def test_a_ring_uses_both_directions_and_a_line_one() -> None:
    size = 64e6
    ring, line = network("v5e:16x16", {"fsdp": 256}), network("v5e:8x8", {"fsdp": 64})
    link = 50e9 * chips.ICI_EFFICIENCY
    on_ring = ring.collective("all-gather", np.arange(16), size, {}).seconds
    on_line = line.collective("all-gather", np.arange(8), size, {}).seconds
    assert on_ring == pytest.approx(size * 15 / 16 / (2 * link) + 8 * HOP)
    assert on_line == pytest.approx(size * 7 / 8 / link + 8 * HOP)


def test_an_all_reduce_is_a_scatter_and_a_gather() -> None:
    net = network("v4:4x4x4", {"fsdp": 64})
    gather, scatter, reduce = (
        net.collective(kind, np.arange(4), 1e6, {}).seconds for kind in ("all-gather", "reduce-scatter", "all-reduce")
    )
    assert reduce == pytest.approx(gather + scatter)


def test_the_compilers_algorithm_says_how_many_links_are_at_work() -> None:
    net = network("v4:4x4x4", {"fsdp": 64})
    plane = np.arange(0, 64, 4)
    link = 50e9 * chips.ICI_EFFICIENCY

    def bandwidth(algorithm: dict[str, str]) -> float:
        cost = net.collective("all-gather", plane, 1e9, algorithm)
        return 1e9 * 15 / 16 / cost.seconds

    assert bandwidth({"emitter": "1DAllGather"}) == pytest.approx(2 * link, rel=1e-3)
    assert bandwidth({"emitter": "2DAllGather"}) == pytest.approx(4 * link, rel=1e-3)
    assert bandwidth({"emitter": "x", "debug": "StrategyND{colors:1 phases:2"}) == pytest.approx(2 * link, rel=1e-3)
    assert bandwidth({"emitter": "x", "debug": "StrategyRing{colors:1 phases:1"}) == pytest.approx(2 * link, rel=1e-3)


def test_groups_with_a_stride_share_their_links() -> None:
    net = network("v5e:16x16", {"fsdp": 256})
    dense, strided = (net.collective("all-gather", g, 1e9, {}).seconds for g in (np.arange(4), np.arange(0, 16, 4)))
    # Both directions of a ring, each shared by four groups, against one direction of a line.
    assert strided / dense == pytest.approx(2.0, rel=1e-3)


def test_a_permute_pays_for_hops_and_knows_its_direction() -> None:
    net = network("v5e:16x16", {"fsdp": 256})
    here = np.arange(16)
    one = net.permute(np.stack([here, (here + 1) % 16], 1), 1e6)
    back = net.permute(np.stack([here, (here - 1) % 16], 1), 1e6)
    far = net.permute(np.stack([here, (here + 3) % 16], 1), 1e6)
    assert one.seconds == pytest.approx(1e6 / (50e9 * chips.ICI_EFFICIENCY) + HOP)
    assert far.seconds == pytest.approx(3 * one.seconds)
    assert one.resources != back.resources


def test_slices_exchange_through_their_hosts() -> None:
    net = network("v4:4x4x4", {"data": 2, "fsdp": 64}, slices=2)
    cost = net.collective("all-reduce", np.array([0, 64]), 1e6, {})
    rate = chips.HARDWARE["v4"].dcn_bandwidth * chips.DCN_EFFICIENCY
    assert cost.resources == ("dcn",)
    assert cost.seconds == pytest.approx(2 * 1e6 / 2 / rate + chips.DCN_SECONDS)
    # 128 devices that span both: inside a slice each chip has a 64th to send.
    whole = net.collective("all-reduce", np.arange(128), 1e6, {})
    assert whole.seconds == pytest.approx(2 * 1e6 / 64 / 2 / rate + chips.DCN_SECONDS)


def test_all_to_all_is_bound_by_the_middle_of_its_longest_dimension() -> None:
    net = network("v5e:16x16", {"expert": 256})
    link = 50e9 * chips.ICI_EFFICIENCY
    cost = net.collective("all-to-all", np.arange(16), 1e6, {})
    assert cost.seconds == pytest.approx(1e6 * 16 / 8 / link + 8 * HOP)


def test_every_chip_gives_a_plausible_clock() -> None:
    for key, hardware in chips.HARDWARE.items():
        assert hardware.sources
        if hardware.macs_per_cycle is not None:
            assert 0.5e9 < hardware.clock < 3e9, key
    # The clocks that Google's papers and profiles name.
    assert chips.HARDWARE["v4"].clock == pytest.approx(1.05e9, rel=0.01)
    assert chips.HARDWARE["v5p"].clock == pytest.approx(1.75e9, rel=0.01)
