"""Schedules, carried out by a reader of text that knows nothing of how they were made."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from palmjax.config import ConfigError
from palmjax.evaluation.schedule import Request, Schedule, Shape, check, rolling

SMALL = Shape(shards=1, rows=3, page=4, depth=5, pool=12, tile=5)
ids = st.integers(0, 2)
contexts = st.lists(ids, min_size=1, max_size=11).map(tuple)
continuations = st.lists(ids, min_size=1, max_size=9).map(tuple)
asked = st.lists(st.builds(Request, contexts, continuations), max_size=25, unique=True)


def said(before: tuple[int, ...], target: int) -> int:
    """What the reader says of a target behind all that it has read: different for all that differs."""
    return hash((before, target))


def carry_out(plan: Schedule) -> tuple[list[list[int]], list[int]]:
    """What was said of each request's tokens, and the order in which requests were complete.

    A page is read by its tokens and those of its ancestors, taken from where they were written.
    """
    shape, results = plan.shape, dict[int, int]()
    pool = dict[tuple[int, int], list[int]]()
    done = []
    for step in plan.steps():
        written, heard = {}, dict[int, int]()
        seen = list[list[int]]()
        for row in range(shape.shards * shape.rows):
            shard, number = row // shape.rows, step.number[row]
            above = [pool.get((shard, int(place))) for place in step.pages[row, :number]]
            assert None not in above, "an ancestor was not read, or is gone"
            seen.append([token for page in above if page is not None for token in page])
            own = (shard, int(step.pages[row, number]))
            assert own[1] == 0 or own not in written, "two rows write one page"
            written[own] = step.tokens[row].tolist()
        pool |= {place: tokens for place, tokens in written.items() if place[1]}
        assert 0 <= step.tiles <= shape.tiles
        flat = (step.picks.reshape(shape.shards, -1), step.targets.reshape(shape.shards, -1))
        for source in step.source.tolist():
            shard, place = divmod(source, shape.tiles * shape.tile)
            assert place < step.tiles * shape.tile, "behind the tiles that are scored"
            row, offset = divmod(int(flat[0][shard, place]), shape.page)
            row += shard * shape.rows
            before = (*seen[row], *step.tokens[row, : offset + 1].tolist())
            heard[source] = said(before, int(flat[1][shard, place]))
        for source, result in zip(step.source.tolist(), step.result.tolist(), strict=True):
            assert result not in results, "scored twice"
            results[result] = heard[source]
        done += step.done
    numbers = [range(plan.results[i], plan.results[i + 1]) for i in range(len(plan.order))]
    return [[results[number] for number in of_one] for of_one in numbers], done


def wanted(request: Request) -> list[int]:
    whole, first = (*request.context, *request.continuation), len(request.context)
    return [said(whole[:place], whole[place]) for place in range(first, len(whole))]


@given(asked, st.integers(1, 3), st.integers(1, 4), st.integers(6, 30))
def test_every_token_is_scored_once_behind_what_precedes_it(
    requests: list[Request], shards: int, rows: int, pool: int
) -> None:
    plan = Schedule(requests, dataclasses.replace(SMALL, shards=shards, rows=rows, pool=pool))
    found, done = carry_out(plan)
    assert found == [wanted(request) for request in requests]
    assert sorted(done) == list(range(len(requests)))


def test_what_is_shared_is_read_once() -> None:
    shots = tuple(range(8))
    requests = [Request((*shots, 10 + q), (20 + c, 1)) for q in range(6) for c in range(4)]
    plan = Schedule(requests, dataclasses.replace(SMALL, pool=40))
    assert plan.pages == 2 + 6 * 4  # the shots, and a page for each choice, which begins in the question's
    one_token = [Request((*shots, 10 + q), (20 + c,)) for q in range(6) for c in range(4)]
    assert Schedule(one_token, dataclasses.replace(SMALL, pool=40)).pages == 2 + 6
    assert carry_out(plan)[0] == [wanted(request) for request in requests]


def test_more_targets_than_a_step_scores_are_scored_in_several() -> None:
    requests = [Request((1, 2), (n,)) for n in range(100)]
    plan = Schedule(requests, SMALL)
    assert plan.pages == 1 and len(plan) == -(-100 // (SMALL.tiles * SMALL.tile))
    assert carry_out(plan)[0] == [wanted(request) for request in requests]


@given(asked, st.randoms(use_true_random=False))
def test_the_order_is_the_requests_own_and_steps_are_too(requests: list[Request], rng: random.Random) -> None:
    shuffled = rng.sample(requests, len(requests))
    plan, other = Schedule(requests, SMALL), Schedule(shuffled, SMALL)
    in_order = [requests[number] for number in plan.order]
    assert in_order == [shuffled[number] for number in other.order]
    assert len(plan) == len(other)
    kept = [request for request in in_order if rng.random() < 0.5]
    rest = Schedule(kept, SMALL)
    assert [kept[number] for number in rest.order] == kept, "a part of the requests comes in the order of the whole"
    same = Schedule(in_order, SMALL).digest
    assert Schedule([*in_order], SMALL).digest == same
    if requests:
        changed = dataclasses.replace(in_order[0], continuation=(*in_order[0].continuation, 1))
        assert Schedule([changed, *in_order[1:]], SMALL).digest != same
        assert Schedule(in_order, dataclasses.replace(SMALL, pool=13)).digest != same


def test_the_last_steps_are_full_whatever_the_lengths() -> None:
    """The longest of the requests ahead begins first: otherwise the end would wait for a few long ones."""
    rng = np.random.default_rng(1)
    requests = [Request(tuple(rng.integers(0, 99, rng.integers(1, 70)).tolist()), (1,)) for _ in range(60)]
    plan = Schedule(requests, Shape(shards=1, rows=8, page=4, depth=20, pool=300, tile=4))
    assert len(plan) * 8 < plan.pages + 2 * 8
    assert carry_out(plan)[0] == [wanted(request) for request in requests]


def test_shards_share_the_work() -> None:
    rng = np.random.default_rng(0)
    requests = [Request(tuple(rng.integers(0, 99, rng.integers(1, 15)).tolist()), (1, 2, 3)) for _ in range(600)]
    one = Schedule(requests, dataclasses.replace(SMALL, pool=40))
    four = Schedule(requests, dataclasses.replace(SMALL, pool=40, shards=4))
    assert len(four) < 1.1 * len(one) / 4
    assert carry_out(four)[0] == carry_out(one)[0]


@given(st.lists(st.integers(1, 9), max_size=40), st.integers(1, 12))
def test_rolling_windows_are_those_of_lm_eval(tokens: list[int], length: int) -> None:
    windows = get_rolling_token_windows(tokens, prefix_token=0, max_seq_len=length, context_len=1)
    theirs = [make_disjoint_window(window) for window in windows]
    ours = rolling(tokens, 0, length)
    assert [(list(r.context), list(r.continuation)) for r in ours] == [(list(a), list(b)) for a, b in theirs]
    assert [token for request in ours for token in request.continuation] == tokens
    assert all(request.read <= length for request in ours)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request((), (1,)), "request 1 has an empty context; an empty context is the id of BOS or EOS"),
        (Request((1,), ()), "request 1 has an empty continuation"),
        (Request((1, 10), (1,)), "request 1 has token 10; the model's ids are 0 to 9"),
        (Request((1,), (-1,)), "request 1 has token -1"),
        (Request((1, 2, 3), (4, 5, 6)), "request 1 has 3 tokens of context and 3 of continuation.*must fit 4"),
    ],
)
def test_what_can_not_be_scored_is_named(request_: Request, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check([Request((1, 2, 3), (4, 5)), request_], 10, 4)
