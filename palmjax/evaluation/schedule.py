"""Requests, and the steps that answer them: which pages of which requests are read together. Numpy only.

A request's tokens are cut every C tokens into pages, and pages that begin alike, back to the first token, are one page:
a few-shot context, or a question with its choices, is read once. The pages so make trees. A step reads `rows` pages
whose parents were read before, each against the keys of its ancestors.

What a token's arithmetic sees is its own page and those before it, each at its place, and nothing else: not which
pages share its step, nor how long other requests are, nor whether a page is shared. That is what makes answers
independent of the schedule, down to the bit, wherever a product's rows do not depend on each other.

A schedule is a function of the requests and the `Shape` alone, so that all processes of a job make the same one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import math
from collections.abc import Iterator, Sequence

import numpy as np

from palmjax.config import ConfigError


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """What is asked: log p(continuation | context). Token ids; the context holds BOS already, and neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def read(self) -> int:
        """Tokens that the model reads: all but the last."""
        return len(self.context) + len(self.continuation) - 1


def rolling(tokens: Sequence[int], prefix: int, max_length: int) -> list[Request]:
    """Requests whose log-likelihoods add up to that of a whole text, each token scored once.

    Disjoint windows of `max_length` tokens, as lm-eval cuts them: the first follows the id `prefix` (BOS or EOS), each
    next one the token before it, and the last one as much of the text as a row holds.
    """
    if max_length < 1:
        raise ConfigError(f"max_length = {max_length}: must be at least 1")
    text, requests = tuple(tokens), []
    for first in range(0, len(text), max_length):
        stop = min(first + max_length, len(text))
        context = (prefix,) if first == 0 else text[max(stop - max_length - 1, 0) : first]
        requests.append(Request(context, text[first:stop]))
    return requests


def check(requests: Sequence[Request], vocab_size: int, max_length: int | None) -> None:
    """Raises ConfigError, naming the request by its number, if one can't be scored."""
    for number, request in enumerate(requests):
        for name in ("context", "continuation"):
            ids = getattr(request, name)
            if not ids:
                raise ConfigError(f"request {number} has an empty {name}; an empty context is the id of BOS or EOS")
            if min(ids) < 0 or max(ids) >= vocab_size:
                wrong = next(i for i in ids if not 0 <= i < vocab_size)
                raise ConfigError(f"request {number} has token {wrong}; the model's ids are 0 to {vocab_size - 1}")
        if max_length is not None and request.read > max_length:
            raise ConfigError(
                f"request {number} has {len(request.context):,} tokens of context and {len(request.continuation):,} of "
                f"continuation; with the last one unread they must fit {max_length:,}: cut the context, and count it"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of what is compiled. shards: devices, or groups of them, that each read requests of their own.

    rows: pages that a shard reads in a step. page: tokens a page (C). depth: pages of the longest request. pool: pages
    that a shard keeps, page 0 being no request's. tile: targets that are scored together.
    """

    shards: int
    rows: int
    page: int
    depth: int
    pool: int
    tile: int

    def __post_init__(self) -> None:
        assert min(dataclasses.astuple(self)) >= 1
        assert self.pool > self.depth, "a request alone must fit the pool"

    @property
    def tiles(self) -> int:
        """Tiles of a step, at most: as many targets as it reads tokens."""
        return math.ceil(self.rows * self.page / self.tile)


@dataclasses.dataclass(frozen=True)
class Step:
    """What a step reads and scores. Leading dimensions are [shards * rows] and [shards].

    tokens: int32 [R, C]. number: int32 [R], which page of its request a row is. pages: int32 [R, depth], where its
    ancestors and itself lie. picks: int32 [shards, tiles, tile], which of the shard's tokens are scored (row * C +
    place). targets: int32, of the same shape. tiles: how many of the tiles hold any.
    source, result: int64 [n]: target number source[i], counted over all shards, gives token log-probability number
    result[i]. done: requests, by number, that have all theirs behind this step.
    """

    tokens: np.ndarray
    number: np.ndarray
    pages: np.ndarray
    picks: np.ndarray
    targets: np.ndarray
    tiles: int
    source: np.ndarray
    result: np.ndarray
    done: tuple[int, ...]


@dataclasses.dataclass(slots=True)
class _Page:
    """A page of a tree; its `sequence` is one of those that it is a part of. scored: (request, first, last + 1) of the
    positions whose next token is scored for a request.
    """

    parent: int
    number: int
    sequence: int
    children: list[int] = dataclasses.field(default_factory=list)
    scored: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
    place: int = 0


_Visit = tuple[int, list[tuple[int, int, int]]]
"""A page, and what of it is scored."""


class Schedule:
    """The steps that answer `requests`, which must differ from each other.

    order: numbers of the requests in the order of their tokens, a function of each request alone: a run that is
    interrupted and goes on with the rest goes on in the same order.
    """

    def __init__(self, requests: Sequence[Request], shape: Shape):
        self.shape = shape
        self._requests = requests
        self._tokens = [np.asarray(r.context + r.continuation, np.int32) for r in requests]
        self._first = [len(r.context) - 1 for r in requests]
        counts = np.asarray([len(r.continuation) for r in requests], np.int64)
        self.results = np.concatenate([[0], np.cumsum(counts)])
        """Request i's token log-probabilities are number results[i] to results[i + 1]."""
        # Big-endian bytes compare as the numbers do, at once.
        keys = [
            (t[:-1].astype(">u4").tobytes(), int(t[-1]), first)
            for t, first in zip(self._tokens, self._first, strict=True)
        ]
        self.order: list[int] = sorted(range(len(requests)), key=keys.__getitem__)
        self._shards = [_Forest(self, part) for part in self._parts()]
        self._plans = [forest.plan() for forest in self._shards]

    def __len__(self) -> int:
        """Steps."""
        return max((len(plan) for plan in self._plans), default=0)

    @property
    def pages(self) -> int:
        """Pages read, over all shards."""
        return sum(len(forest.pages) for forest in self._shards)

    def sequence(self, request: int) -> np.ndarray:
        """What is read of a request: all tokens but the last."""
        return self._tokens[request][:-1]

    def scored(self, request: int) -> tuple[int, int]:
        """The first position whose next token is scored, and the one behind the last."""
        return self._first[request], len(self._tokens[request]) - 1

    @property
    def digest(self) -> str:
        """SHA-256 of the requests, the shape and every step: schedules are equal exactly if theirs are."""
        digest = hashlib.sha256(repr((self.shape, self.order)).encode())
        for tokens, first in zip(self._tokens, self._first, strict=True):
            digest.update(b"%d %d " % (len(tokens), first) + tokens.tobytes())
        for forest, plan in zip(self._shards, self._plans, strict=True):
            for step in plan:
                digest.update(repr([(v, forest.pages[v].place, scored) for v, scored in step]).encode())
        return digest.hexdigest()

    def _parts(self) -> list[list[int]]:
        """Requests of each shard, in order. Portions of some steps are split evenly, so that all shards advance in step
        and answers come nearly in order.
        """
        shape, parts = self.shape, [[] for _ in range(self.shape.shards)]
        if shape.shards == 1:
            return [list(self.order)]
        cost, last = [], np.zeros(0, np.int32)
        for request in self.order:
            tokens = self.sequence(request)
            cost.append(1 + len(tokens) // shape.page - common_length(last, tokens) // shape.page)
            last = tokens
        portion, total, behind = 64 * shape.rows * shape.shards, sum(cost), 0
        for request, pages in zip(self.order, cost, strict=True):
            start = behind // portion * portion
            parts[(behind - start) * shape.shards // min(portion, total - start)].append(request)
            behind += pages
        return parts

    def steps(self) -> Iterator[Step]:
        """Every step, in turn."""
        for number in range(len(self)):
            yield self._step([plan[number] if number < len(plan) else [] for plan in self._plans])

    def _step(self, visits: Sequence[Sequence[_Visit]]) -> Step:
        shape = self.shape
        rows = shape.shards * shape.rows
        tokens = np.zeros((rows, shape.page), np.int32)
        numbers = np.zeros(rows, np.int32)
        pages = np.zeros((rows, shape.depth), np.int32)
        room = shape.tiles * shape.tile
        picks, targets = (np.zeros((shape.shards, room), np.int32) for _ in range(2))
        source, result, done, most = [], [], [], 0
        for shard, (forest, of_shard) in enumerate(zip(self._shards, visits, strict=True)):
            count = 0
            for row, (index, scored) in enumerate(of_shard):
                page = forest.pages[index]
                begin = page.number * shape.page
                text = self.sequence(page.sequence)[begin : begin + shape.page]
                at = shard * shape.rows + row
                tokens[at, : len(text)], numbers[at] = text, page.number
                pages[at, : page.number + 1] = forest.path(index)
                for request, first, stop in scored:
                    n, (begins, ends) = stop - first, self.scored(request)
                    place = row * shape.page + first - begin
                    picks[shard, count : count + n] = np.arange(place, place + n)
                    targets[shard, count : count + n] = self._tokens[request][first + 1 : stop + 1]
                    source.append(shard * room + np.arange(count, count + n))
                    offset = int(self.results[request]) + first - begins
                    result.append(np.arange(offset, offset + n))
                    count += n
                    if stop == ends:
                        done.append(request)
            most = max(most, count)
        tiled = (shape.shards, shape.tiles, shape.tile)
        return Step(
            tokens=tokens,
            number=numbers,
            pages=pages,
            picks=picks.reshape(tiled),
            targets=targets.reshape(tiled),
            tiles=math.ceil(most / shape.tile),
            source=np.concatenate(source) if source else np.zeros(0, np.int64),
            result=np.concatenate(result) if result else np.zeros(0, np.int64),
            done=tuple(done),
        )


def common_length(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences begin with alike."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if different.size else n


class _Forest:
    """The pages of one shard's requests, given in order; page numbers are in preorder."""

    def __init__(self, schedule: Schedule, requests: Sequence[int]):
        self._shape = schedule.shape
        self.pages: list[_Page] = []
        self.roots: list[int] = []
        size, path, last = self._shape.page, list[int](), np.zeros(0, np.int32)
        for request in requests:
            tokens = schedule.sequence(request)
            common = common_length(last, tokens)
            kept = common // size
            if common % size and common == len(last):
                self.pages[path[kept]].sequence = request  # the last page is the beginning of this one
                kept += 1
            del path[kept:]
            for number in range(kept, -(-len(tokens) // size)):
                parent = path[-1] if path else -1
                (self.pages[parent].children if path else self.roots).append(len(self.pages))
                path.append(len(self.pages))
                self.pages.append(_Page(parent, number, request))
            begins, ends = schedule.scored(request)
            for number in range(begins // size, len(path)):
                first, stop = max(begins, number * size), min(ends, (number + 1) * size)
                self.pages[path[number]].scored.append((request, first, stop))
            last = tokens

    def path(self, index: int) -> list[int]:
        """Where the pages from the root to `index` lie."""
        places = []
        while index >= 0:
            page = self.pages[index]
            places.append(page.place)
            index = page.parent
        return places[::-1]

    def plan(self) -> list[list[_Visit]]:
        """Steps in which every page is visited behind its parent, with all that it has to score.

        Always the first pages in preorder that can be read, so that few requests are open at a time; of those that
        begin a branch the one that takes most steps to its end (`_Ready`). A page lies in the pool until all below it
        is read. As many places as the longest request needs are left for the first page in preorder, so that what is
        open always comes to its end.
        """
        shape, steps = self._shape, list[list[_Visit]]()
        ready, free = _Ready(self.pages, shape.rows), list(range(1, shape.pool))
        for index in self.roots:
            ready.put(index)
        waiting = [len(page.children) for page in self.pages]
        unscored = {}
        while ready:
            visits, held_back, finished = list[_Visit](), list[int](), list[int]()
            room = shape.tiles * shape.tile
            while ready and len(visits) < shape.rows:
                full = len(free) <= shape.depth
                index = ready.first() if full else ready.next()
                page = self.pages[index]
                if visits and ((full and page.place == 0) or (room == 0 and page.scored)):
                    break
                ready.take(index)
                page.place = page.place or heapq.heappop(free)
                now, later = _split(unscored.pop(index, page.scored), room)
                room -= sum(stop - first for _, first, stop in now)
                visits.append((index, now))
                if later:
                    unscored[index] = later
                    held_back.append(index)
                    break
                finished.append(index)
            for index in finished:
                for child in self.pages[index].children:
                    ready.put(child)
                while index >= 0 and waiting[index] == 0:
                    heapq.heappush(free, self.pages[index].place)
                    index = self.pages[index].parent
                    if index >= 0:
                        waiting[index] -= 1
            for index in held_back:
                ready.put(index)
            steps.append(visits)
        return steps


LOOKAHEAD = 4
"""Branches, in multiples of a step's rows, from which the next one to begin is chosen."""


class _Ready:
    """Pages whose parents are read, and which of them comes next.

    A branch is a page that begins a request's own way: a root, or one of more children than a step has rows. Pages that
    go on come before branches, in preorder. Of the first branches in preorder the highest comes first: were the
    shortest left for the end, the last steps would be waiting for a few long ones.
    """

    def __init__(self, pages: Sequence[_Page], rows: int):
        self._pages, self._rows = pages, rows
        self._height = [1] * len(pages)
        for index in range(len(pages) - 1, -1, -1):
            if (parent := pages[index].parent) >= 0:
                self._height[parent] = max(self._height[parent], 1 + self._height[index])
        self._going, self._later = list[int](), list[int]()
        self._near = set[int]()

    def __bool__(self) -> bool:
        return bool(self._going or self._near or self._later)

    def put(self, index: int) -> None:
        parent = self._pages[index].parent
        begins = parent < 0 or len(self._pages[parent].children) > self._rows
        heapq.heappush(self._later if begins else self._going, index)

    def _look(self) -> None:
        while self._later and len(self._near) < LOOKAHEAD * self._rows:
            self._near.add(heapq.heappop(self._later))

    def first(self) -> int:
        """In preorder."""
        self._look()
        return min([*self._going[:1], *self._near, *self._later[:1]])

    def next(self) -> int:
        if self._going:
            return self._going[0]
        self._look()
        return min(self._near, key=lambda index: (-self._height[index], index))

    def take(self, index: int) -> None:
        """One that `first` or `next` gave."""
        for heap in (self._going, self._later):
            if heap[:1] == [index]:
                heapq.heappop(heap)
                return
        self._near.remove(index)


def _split(
    scored: list[tuple[int, int, int]], room: int
) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    """The first `room` positions of `scored`, and the rest."""
    now = list[tuple[int, int, int]]()
    for number, (request, first, stop) in enumerate(scored):
        if stop - first > room:
            cut = first + room
            rest = [(request, cut, stop), *scored[number + 1 :]]
            return [*now, *([(request, first, cut)] if room else [])], rest
        now.append((request, first, stop))
        room -= stop - first
    return now, []
