"""`palmjax plan --search`: layouts ranked by a guess, the best of them compiled, the winner as a gin file.

Every layout that divides is guessed (`layouts.py`), the likeliest are compiled in processes side by side, and ranked by
what the plan of each compiled step says. Compiled steps are cached, so a search that was interrupted goes on.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from palmjax.config import ConfigError, Experiment
from palmjax.metrics.throughput import clock
from palmjax.plan import build, compiler
from palmjax.plan.build import Plan
from palmjax.plan.layouts import Guess, Guesser, Layout, current
from palmjax.plan.topology import Topology

SLACK = 1.3
"""Guessed bytes may exceed the memory by this and the layout is still tried: the guess is rough, the compiler is
not.
"""


@dataclasses.dataclass(frozen=True)
class Tried:
    """A compiled layout. plan: None if the compiler failed or refused it, then `problem` says why."""

    layout: Layout
    guess: Guess
    plan: Plan | None
    problem: str = ""

    @property
    def speed(self) -> float:
        """Tokens/s; 0 for what does not run."""
        return 0.0 if self.plan is None or self.plan.tokens_per_second is None else self.plan.tokens_per_second


@dataclasses.dataclass(frozen=True)
class Result:
    """A search. own: the layout that was asked about; tried: all that were compiled, the fastest first."""

    own: Tried | None
    tried: tuple[Tried, ...]
    legal: int
    seconds: float

    @property
    def best(self) -> Tried | None:
        return next((t for t in self.tried if t.speed), None)

    def pareto(self) -> tuple[Tried, ...]:
        """Of the layouts that fit, those that no other beats in both tokens/s and memory; the fastest first."""
        front: list[Tried] = []
        for tried in self.tried:
            if tried.speed and tried.plan and all(tried.plan.usage.total < t.plan.usage.total for t in front if t.plan):
                front.append(tried)
        return tuple(front)


Progress = Callable[[int, int, Tried], None]
"""Told (layouts compiled, layouts to compile, the newest)."""


def search(
    experiment: Experiment,
    topology: Topology,
    *,
    rows: Sequence[int] | None = None,
    budget: int = 12,
    jobs: int = 2,
    cache: str | os.PathLike[str] | None = None,
    timeout: float = 3600,
    progress: Progress | None = None,
) -> Result:
    """Compiles the `budget` likeliest layouts of `experiment` on `topology`, and the experiment's own if it is legal.

    rows: batches to try (default: the run's largest). jobs: compilers side by side. Raises ConfigError if no layout
    divides.
    """
    began = time.monotonic()
    length = build.row_length(experiment)
    batches = tuple(rows or (build.batch_rows(experiment),))
    options = os.environ.get("LIBTPU_INIT_ARGS", "")
    guesser = Guesser(experiment, topology, length)
    try:
        own = current(experiment, topology, batches[0], options)
    except ConfigError:
        own = None
    legal = {layout: guesser.guess(layout) for layout in guesser.layouts(batches, options)}
    if not legal:
        raise ConfigError(
            f"no mesh of {topology} divides {' or '.join(map(str, batches))} rows and the model's dimensions"
        )
    chosen = shortlist(legal, guesser.hardware.chip.hbm_bytes_per_device, budget)
    if own is not None:  # also with a policy or a number of microbatches that is on no list: the compiler will say
        legal.setdefault(own, guesser.guess(own))
        chosen = [own, *(layout for layout in chosen if layout != own)]

    def plan(layout: Layout) -> Tried:
        request = compiler.Request(layout.apply(experiment), topology, layout.rows, length, layout.options)
        try:
            return Tried(layout, legal[layout], build.build(request, compiler.compile_step(request, cache, timeout)))
        except (ConfigError, compiler.CompilerError) as error:
            return Tried(layout, legal[layout], None, str(error))

    tried: list[Tried] = []
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        try:
            for done in concurrent.futures.as_completed([pool.submit(plan, layout) for layout in chosen]):
                tried.append(done.result())
                if progress is not None:
                    progress(len(tried), len(chosen), tried[-1])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            compiler.stop_all()
            raise
    ranked = tuple(sorted(tried, key=lambda t: (-t.speed, t.guess.seconds)))
    mine = next((t for t in ranked if t.layout == own), None)
    return Result(mine, ranked, len(legal), time.monotonic() - began)


def shortlist(legal: dict[Layout, Guess], hbm: float, budget: int) -> list[Layout]:
    """The `budget` layouts most worth compiling: by guessed tokens/s, one for each kind, then the next of each.

    A kind is a tensor axis, remat policy, number of microbatches and batch; within one, less memory comes first.
    """
    kinds: dict[Any, list[Layout]] = {}
    for layout, guess in legal.items():
        if guess.bytes <= SLACK * hbm:
            kind = (layout.tensor, layout.remat, layout.microbatches, layout.rows)
            kinds.setdefault(kind, []).append(layout)
    for members in kinds.values():
        members.sort(key=lambda layout: (legal[layout].seconds / layout.rows, legal[layout].bytes))
    order = sorted(kinds.values(), key=lambda members: legal[members[0]].seconds / members[0].rows)
    # Guesses of a kind's best stand for the kind; two of each give the neighbours a chance.
    ranked = [
        (legal[m].seconds / m.rows * (1 + 0.03 * nth), m) for members in order for nth, m in enumerate(members[:3])
    ]
    return [layout for _, layout in sorted(ranked, key=lambda item: item[0])[:budget]]


def table(result: Result) -> str:
    """What was tried, the fastest first: time, MFU, memory, and a star for those on the Pareto front."""
    front = set(map(id, result.pareto()))
    lines = [f"{len(result.tried)} of {result.legal:,} legal layouts compiled in {clock(result.seconds)}"]
    lines.append(f"{'':2}{'tokens/s':>10}{'MFU':>8}{'step s':>9}{'GiB':>7}   layout")
    for tried in result.tried:
        plan = tried.plan
        mark = "*" if id(tried) in front else " "
        own = "   <- yours" if tried is result.own else ""
        if plan is None:
            lines.append(f"{mark:2}{'-':>10}{'':24}   {tried.layout}: {tried.problem[:90]}{own}")
        elif plan.time is None or plan.mfu is None:
            lines.append(f"{mark:2}{'no fit':>10}{'':17}{plan.usage.total / 2**30:>7.1f}   {tried.layout}{own}")
        else:
            lines.append(
                f"{mark:2}{tried.speed:>10,.0f}{100 * plan.mfu:>7.1f}%{plan.time.step:>9.3g}"
                f"{plan.usage.total / 2**30:>7.1f}   {tried.layout}{own}"
            )
    lines.append("* no other layout is both faster and smaller")
    if result.best is not None and result.own is not None and result.own.speed:
        lines.append(f"best is {result.best.speed / result.own.speed:.3f} x yours")
    return "\n".join(lines) + "\n"


def winner(result: Result, files: Sequence[str], bindings: Sequence[str]) -> str:
    """A gin file that runs the best layout: the given files, the given lines of gin, and what the search changed.

    Raises ConfigError if nothing fits.
    """
    best = result.best
    if best is None or best.plan is None or best.plan.mfu is None or best.plan.time is None:
        raise ConfigError("no layout that was compiled fits; try more (--budget), more chips or a smaller batch")
    lines = [
        f"# {best.layout} on {best.plan.topology}:",
        f"# {best.plan.time.step:.3g} s a step, MFU {100 * best.plan.mfu:.1f} %, "
        f"{best.plan.usage.total / 2**30:.1f} GiB a device",
        f"# (palmjax plan --search, {best.plan.compiler}).",
    ]
    if best.layout.options:
        lines.append(f"# Launch with LIBTPU_INIT_ARGS='{best.layout.options}'")
    lines += [f'include "{file}"' for file in files] + [""]
    lines += bindings
    own = result.own.layout if result.own else None
    # The run's own batches, perhaps a ramp, stay where the search did not change them.
    lines += [line for line in best.layout.bindings(own) if own or not line.startswith("BATCH_SIZE")]
    return "\n".join(lines) + "\n"


def progress_line(newest: Tried) -> str:
    """A layout that was just tried, and what came of it, in a few words."""
    plan = newest.plan
    how = f"{plan.mfu:.1%} MFU" if plan and plan.mfu is not None else "does not fit" if plan else newest.problem[:60]
    return f"{newest.layout}: {how}"
