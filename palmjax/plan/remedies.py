"""What would make a step fit that does not: changes of one or two settings, by arithmetic, then by the compiler.

The arithmetic (`layouts.py`) is scaled so that it gives the bytes which the compiler counted for the step that does not
fit; the likeliest changes are then compiled, since a suggestion is worth little that fails on the pod.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Callable, Iterator
from typing import Any

from palmjax.config import ConfigError, Experiment
from palmjax.plan import build, compiler
from palmjax.plan.build import Plan
from palmjax.plan.layouts import Guesser, Layout, current, policy_name
from palmjax.plan.topology import Topology

SETTINGS = 2
"""Settings that a change may touch; the axes of the mesh count as one."""
CANDIDATES = 6


@dataclasses.dataclass(frozen=True)
class Remedy:
    """A change that should make a step fit. bindings: of gin. layout: what they lead to. plan: the compiled step; None
    where it was not compiled.
    """

    bindings: tuple[str, ...]
    layout: Layout
    plan: Plan | None = None

    def __str__(self) -> str:
        return " ".join(shlex.quote(f"--gin.{text.replace(' = ', '=', 1)}") for text in self.bindings)

    def to_json(self) -> dict[str, Any]:
        """Plain values: the bindings, and of a compiled step its memory, seconds and MFU."""
        found: dict[str, Any] = {"bindings": list(self.bindings), "compiled": self.plan is not None}
        if self.plan is not None and self.plan.time is not None:
            found |= {"bytes": self.plan.usage.total, "step": self.plan.time.step, "mfu": self.plan.mfu}
        return found


def candidates(experiment: Experiment, topology: Topology, plan: Plan) -> list[Remedy]:
    """Changes that should make a step fit whose `plan` does not, the best first, by arithmetic: one setting before two
    where that is hardly slower, then by guessed time. Raises ConfigError for a CPU.
    """
    assert plan.hbm_bytes is not None
    guesser = Guesser(experiment, topology, plan.length)
    own = current(experiment, topology, plan.rows)
    scale = plan.usage.total / guesser.guess(own).bytes
    found: list[tuple[float, float, Remedy]] = []
    for layout in guesser.layouts((plan.rows,)):
        if layout.options:
            continue  # flags change no memory
        bindings = layout.bindings(own)
        settings = {_setting(text, layout) for text in bindings}
        guess = guesser.guess(layout)
        if 1 <= len(settings) <= SETTINGS and guess.bytes * scale <= build.LIMIT * plan.hbm_bytes:
            found.append((guess.seconds * (1 + 0.1 * len(settings)), guess.bytes, Remedy(tuple(bindings), layout)))
    ranked = [remedy for *_, remedy in sorted(found, key=lambda f: f[:2])]
    # One of each kind: neighbouring meshes fail and fit together, and more microbatches only cost time.
    kinds: dict[Any, Remedy] = {}
    for remedy in ranked:
        layout = remedy.layout
        kinds.setdefault((layout.remat, layout.residual, layout.tensor), remedy)
    return list(kinds.values())[:CANDIDATES]


def _setting(binding: str, layout: Layout) -> str:
    """What a binding changes: a policy's own fields are the policy, and all axes the mesh."""
    name = binding.split(" = ")[0]
    if name.startswith("MeshConfig."):
        return "mesh"
    return "Decoder.remat" if name.startswith(f"{policy_name(layout.remat)}.") else name


def proved(
    experiment: Experiment,
    topology: Topology,
    plan: Plan,
    *,
    wanted: int = 1,
    cache: str | os.PathLike[str] | None = None,
    timeout: float = 3600,
    progress: Callable[[str], None] = lambda words: None,
) -> list[Remedy]:
    """`candidates`, compiled in their order until `wanted` of them fit; those that fit first, the fastest before the
    others, then those that were not compiled. What the compiler refuses is left out.
    """
    fit: list[Remedy] = []
    open_: list[Remedy] = []
    for remedy in candidates(experiment, topology, plan):
        if len(fit) >= wanted:
            open_.append(remedy)
            continue
        progress(f"trying {remedy}")
        try:
            changed = remedy.layout.apply(experiment)
            found = build.compile(changed, topology, rows=plan.rows, cache=cache, timeout=timeout)
        except (ConfigError, compiler.CompilerError):
            continue
        if found.fits:
            fit.append(dataclasses.replace(remedy, plan=found))
    return sorted(fit, key=lambda r: r.plan.time.step if r.plan and r.plan.time else 0.0) + open_


def least(experiment: Experiment, topology: Topology, plan: Plan) -> str:
    """For a step that no change of settings makes fit: what the state alone takes of a device, in words."""
    held = plan.usage.parameters + plan.usage.optimizer
    assert plan.hbm_bytes is not None
    whole = 12 * plan.parameters / topology.devices
    share = f"{whole / 2**30:.3g} GiB of a device's {plan.hbm_bytes / 2**30:.0f}"
    if whole > 0.5 * build.LIMIT * plan.hbm_bytes:
        return f"parameters and moments alone, spread over all devices, take {share}: more chips"
    return (
        f"no change of {SETTINGS} settings is enough; parameters and moments take {held / 2**30:.3g} GiB here and "
        f"{share} spread over all devices: try --search"
    )


def lines(remedies: list[Remedy]) -> Iterator[str]:
    """A line for each remedy: the flags, and what is known of the step that they make."""
    for remedy in remedies:
        plan = remedy.plan
        known = "by arithmetic"
        if plan is not None:
            known = f"compiled: {plan.usage.total / 2**30:.1f} GiB"
            if plan.time is not None and plan.mfu is not None:
                known += f", {plan.time.step:.3g} s a step, MFU {100 * plan.mfu:.1f} %"
        yield f"  {remedy}   {known}"
