"""A plan for people: a page of text and one picture."""

from __future__ import annotations

import os
from typing import Any

from palmjax.metrics.throughput import si
from palmjax.plan import cost
from palmjax.plan.build import Plan, Time, part
from palmjax.plan.search import Result

_GIB = 2**30
_HELD = ("parameters", "optimizer", "inputs", "activations", "temporaries", "program")


def text(plan: Plan) -> str:
    """The plan on a page: fit, memory, time, where it goes, the run's bill."""
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    lines = [
        f"{si(plan.parameters)} parameters on {plan.topology} ({plan.chips:,} chips), mesh {mesh}",
        f"{plan.rows:,} rows of {plan.length:,} tokens a step in {plan.microbatches} microbatch"
        f"{'es' if plan.microbatches > 1 else ''}, remat {plan.remat}, "
        f"residual over {'+'.join(plan.residual) or 'no axis'}",
        f"compiled by {plan.compiler} in {plan.compile_seconds:.0f} s" + (f", {plan.options}" if plan.options else ""),
        "",
        *_memory(plan),
    ]
    if plan.time is not None:
        lines += ["", *_time(plan)]
    else:
        lines += ["", "STEP  no time: " + ("its speed is not modelled" if plan.fits else "it does not fit")]
    return "\n".join(lines) + "\n"


def _memory(plan: Plan) -> list[str]:
    used = plan.usage.total
    if plan.hbm_bytes is None:
        lines = [f"MEMORY  {_gib(used)} a device"]
    else:
        share = f"{_gib(used)} of {_gib(plan.hbm_bytes)} a device ({100 * used / plan.hbm_bytes:.0f} %)"
        lines = [f"{'FITS' if plan.fits else 'DOES NOT FIT'}  {share}"]
    if plan.problem:
        lines.append(f"  the compiler: {plan.problem}")
    lines += [f"  {name:<14}{_gib(getattr(plan.usage, name)):>12}" for name in _HELD if getattr(plan.usage, name)]
    lines.append("  largest buffers at the peak")
    lines += [f"  {_gib(b.bytes):>12}  {b.shape:<28} {short(b.op_name)}" for b in plan.usage.largest]
    return lines


def _time(plan: Plan) -> list[str]:
    time = plan.time
    assert time is not None and plan.tokens_per_second is not None and plan.hardware_flops is not None
    assert plan.mfu is not None and plan.hfu is not None
    lines = [
        f"STEP  {time.step:.3g} s, {si(plan.tokens_per_second)} tokens/s, MFU {100 * plan.mfu:.1f} %, "
        f"HFU {100 * plan.hfu:.1f} %",
        f"  FLOPs a token: {si(plan.model_flops)} of the model, {si(plan.hardware_flops)} of the compiled matmuls",
    ]
    lines += [f"  {kind:<28}{s:>10.4g} s {100 * s / time.step:>5.1f} %" for kind, s in time.kinds.items() if s]
    if time.hidden > 1e-6 * time.step:
        lines.append(f"  {'communication hidden':<28}{time.hidden:>10.4g} s   behind compute, not in the step")
    lines += [f"    exposed along {axis:<14}{s:>10.4g} s" for axis, s in time.axes.items() if s > 1e-3 * time.step]
    if time.layer:
        lines.append(f"  a layer {1000 * time.layer:.4g} ms; outside the layers {time.outside:.4g} s")
    lines.append("  by part")
    lines += [f"    {name:<28}{s:>8.4g} s" for name, s in time.parts.items() if s > 5e-3 * time.step]
    lines.append(f"  slowest {len(time.slowest)} operations")
    for slow in time.slowest:
        axis = f" over {slow.axis}" if slow.axis else ""
        lines.append(
            f"    {slow.seconds:>8.4g} s  x{slow.runs:<6}{slow.kind}{axis}  {slow.shape}  {part(slow.op_name)}: "
            f"{short(slow.op_name)}  {slow.place}"
        )
    if plan.run is not None:
        energy = (
            "" if plan.run.energy_mwh is None else f", {plan.run.energy_mwh:,.4g} MWh (chips, with the data centre's)"
        )
        lines += [
            "",
            f"RUN  {si(plan.run.tokens)} tokens: {plan.run.days:.3g} days, "
            f"{plan.run.chip_hours:,.0f} chip-hours{energy}",
        ]
    return lines + [f"  note: {caveat}" for caveat in plan.caveats]


def short(op_name: str) -> str:
    """The end of a traced name, without what every name has."""
    for noise in ("jit(step)/", "while/body/", "closed_call/", "checkpoint/", "rematted_computation/"):
        op_name = op_name.replace(noise, "")
    return op_name if len(op_name) <= 56 else "..." + op_name[-53:]


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f} GiB" if size >= 0.1 * _GIB else f"{size / 2**20:.3g} MiB"


def picture(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Memory, time by kind and by part, and the slowest operations, as one PNG."""
    from matplotlib.figure import Figure

    if plan.time is None:
        figure = Figure(figsize=(14, 4.8), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.6))
        _draw_memory(left, plan)
        _draw_buffers(right, plan)
    else:
        figure = Figure(figsize=(14, 9), layout="constrained")
        axes = figure.subplots(2, 2, width_ratios=(1, 1.6))
        _draw_memory(axes[0, 0], plan)
        _draw_kinds(axes[1, 0], plan.time)
        _draw_parts(axes[0, 1], plan.time)
        _draw_slowest(axes[1, 1], plan.time)
    figure.suptitle(_headline(plan), fontsize=12)
    figure.savefig(path, dpi=110)


_COLORS = {
    cost.MATMUL: "#2b7a5d",
    cost.OTHER: "#e0a030",
    cost.KERNEL: "#7b4fa3",
    cost.ICI: "#c2452d",
    cost.NVLINK: "#c2452d",
    cost.DCN: "#7a1f3d",
}


def _headline(plan: Plan) -> str:
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    words = [f"{si(plan.parameters)} parameters on {plan.topology}", mesh, f"{plan.rows} x {plan.length} tokens"]
    if plan.time is not None and plan.mfu is not None:
        words.append(f"{plan.time.step:.3g} s a step, MFU {100 * plan.mfu:.1f} %")
    return ", ".join(words) + ("" if plan.fits else "  - DOES NOT FIT")


def pareto(result: Result, path: str | os.PathLike[str]) -> None:
    """The layouts of a search, memory against tokens/s, with the Pareto front, as one PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    runs = [tried for tried in result.tried if tried.speed and tried.plan]
    for tried in runs:
        assert tried.plan is not None
        own = tried is result.own
        color = "#c2452d" if own else "#2b7a5d"
        axes.scatter(tried.plan.usage.total / _GIB, tried.speed, color=color, s=60 if own else 36, zorder=3)
        name = f"{'yours: ' if own else ''}{tried.layout}"
        axes.annotate(
            name, (tried.plan.usage.total / _GIB, tried.speed), (6, 4), textcoords="offset points", fontsize=7
        )
    front = [(t.plan.usage.total / _GIB, t.speed) for t in result.pareto() if t.plan is not None]
    axes.plot(*zip(*front, strict=True), color="#2b7a5d", linewidth=1, alpha=0.5) if front else None
    axes.set(xlabel="memory of a device, GiB", ylabel="predicted tokens/s", title="Layouts compiled")
    axes.margins(0.15)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def _draw_memory(axes: Any, plan: Plan) -> None:
    bottom = 0.0
    for name in _HELD:
        size = getattr(plan.usage, name) / _GIB
        if size > 0.005 * plan.usage.total / _GIB:
            axes.bar(0, size, bottom=bottom, width=0.6, label=f"{name} {size:.2f}")
            bottom += size
    if plan.hbm_bytes:
        axes.axhline(plan.hbm_bytes / _GIB, color="black", linestyle="--", linewidth=1)
        axes.text(0.42, plan.hbm_bytes / _GIB, "HBM", va="bottom", ha="right")
    axes.set(title="Memory of a device, GiB", xlim=(-0.5, 1.4), xticks=[])
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center right", frameon=False)


def _draw_buffers(axes: Any, plan: Plan) -> None:
    buffers = plan.usage.largest[::-1]
    bars = axes.barh(range(len(buffers)), [b.bytes / _GIB for b in buffers], color="#4878a8")
    axes.bar_label(bars, fmt="%.3g", padding=3)
    axes.set_yticks(range(len(buffers)), [f"{short(b.op_name)[-52:]}\n{b.shape}" for b in buffers], fontsize=7)
    axes.set(title="Largest buffers at the peak, GiB")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_kinds(axes: Any, time: Time) -> None:
    kinds = {kind: seconds for kind, seconds in time.kinds.items() if seconds > 1e-3 * time.step}
    bars = axes.barh(list(kinds)[::-1], list(kinds.values())[::-1], color=[_COLORS[kind] for kind in kinds][::-1])
    axes.bar_label(bars, fmt=lambda s: f"{s:.3g} s, {100 * s / time.step:.0f} %", padding=3)
    axes.set(title="Step by kind, seconds", xlim=(0, 1.35 * max(kinds.values())))
    axes.spines[["top", "right"]].set_visible(False)


def _draw_parts(axes: Any, time: Time) -> None:
    parts = [(name, seconds) for name, seconds in time.parts.items() if seconds > 0.004 * time.step][:14][::-1]
    colors = [_COLORS.get(name, "#4878a8") for name, _ in parts]
    bars = axes.barh([name for name, _ in parts], [seconds for _, seconds in parts], color=colors)
    axes.bar_label(bars, fmt="%.3g", padding=3)
    axes.set(title="Step by part and pass, seconds")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_slowest(axes: Any, time: Time) -> None:
    rows = time.slowest[::-1]
    names = [
        f"{part(s.op_name)}: {short(s.op_name).removesuffix('/dot_general')[-32:]}\n"
        f"{s.shape}{' over ' + s.axis if s.axis else ''}  {s.place}"
        for s in rows
    ]
    bars = axes.barh(range(len(rows)), [s.seconds for s in rows], color=[_COLORS[s.kind] for s in rows])
    axes.bar_label(bars, fmt="%.3g", padding=3)
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.set(title="Slowest operations, seconds a step")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
