"""`compile(experiment, topology) -> Plan`: the compiled step, what it holds, how long it takes, and a run's bill."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any

import numpy as np

from palmjax.config import BatchSizePart, ConfigError, Experiment
from palmjax.metrics.throughput import mfu
from palmjax.plan import compiler, cost, memory
from palmjax.plan.layouts import policy_name
from palmjax.plan.network import Network
from palmjax.plan.topology import Topology

SLOWEST = 10
LIMIT = 0.96
"""Of a device's memory, what a step may take: compilers and runtimes keep the rest (on v4 1.25 of 32 GiB)."""

PUE = 1.08
"""Power of the data centre over that of its machines, as PaLM reports for its own (appendix, carbon footprint)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slow:
    """One of the slowest operations: seconds a step in all its runs, its kind, traced name and place in the source."""

    seconds: float
    runs: int
    kind: str
    shape: str
    op_name: str
    place: str
    axis: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Time:
    """A predicted step. All values are seconds a step unless said.

    kinds: by `cost.KINDS`. hidden: communication behind compute. axes: exposed communication by mesh axes. parts: by
    (part of the model, pass), as "mlp backward". layer: of one layer, forward and backward together; outside:
    embeddings, loss, optimizer. sources: by where the figure comes from.
    """

    step: float
    kinds: dict[str, float]
    hidden: float
    axes: dict[str, float]
    parts: dict[str, float]
    layer: float
    outside: float
    sources: dict[str, float]
    slowest: tuple[Slow, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What a whole run takes at the planned speed. energy_mwh: chips alone, with the data centre's PUE; None
    unknown."""

    tokens: float
    days: float
    chip_hours: float
    energy_mwh: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What `palmjax plan` knows of a job.

    fits: whether a device's memory holds the step; `problem` are the compiler's words if not. usage and hbm_bytes: of
    one device. model_flops: a token, 6N + 12LHQT (PaLM appendix B). hardware_flops: a token, of the matmuls the
    compiler kept and as kernels state theirs (of causal attention the half they compute). time and all that follows
    from it: None for a step that does not fit, and on a CPU, whose speed is not modelled.
    """

    topology: str
    chips: int
    mesh: dict[str, int]
    rows: int
    length: int
    microbatches: int
    remat: str
    residual: tuple[str, ...]
    parameters: int
    compiler: str
    options: str
    compile_seconds: float
    fits: bool
    problem: str
    usage: memory.Usage
    hbm_bytes: int | None
    model_flops: float
    hardware_flops: float | None
    time: Time | None
    tokens_per_second: float | None
    mfu: float | None
    hfu: float | None
    run: Run | None
    caveats: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for `json.dumps`."""
        return dataclasses.asdict(self)


def batch_rows(experiment: Experiment) -> int:
    """The largest batch of the run, rows."""
    size = experiment.train_dataset.batch_size
    return max(size.build().sizes) if isinstance(size, BatchSizePart) else size


def row_length(experiment: Experiment) -> int:
    """Tokens of a row. Raises ConfigError if the task names no targets."""
    length = experiment.train_dataset.task_feature_lengths.get("targets")
    if length is None:
        raise ConfigError("TASK_FEATURE_LENGTHS names no 'targets': how many tokens has a row?")
    return length


def compile(
    experiment: Experiment,
    topology: Topology,
    *,
    rows: int | None = None,
    options: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    timeout: float = 3600,
) -> Plan:
    """Compiles the experiment's train step for `topology` and reads off its memory and time.

    rows: a step's batch (default: the run's largest). options: the TPU compiler's flags (default: LIBTPU_INIT_ARGS).
    cache: folder of compiled steps. Raises ConfigError for a mesh or batch that does not divide, or a compiler that is
    not installed; `CompilerError` if the compiler fails.
    """
    request = compiler.Request(experiment, topology, rows or batch_rows(experiment), row_length(experiment), options)
    return build(request, compiler.compile_step(request, cache, timeout))


def build(request: compiler.Request, artifact: compiler.Artifact) -> Plan:
    """The plan of a compiled step."""
    from palmjax.models.account import account

    experiment, topology = request.experiment, request.topology
    model: Any = experiment.model
    totals = account(model, request.length)
    hardware = topology.hardware
    tokens = request.rows * request.length
    time, speed, mfu_, hfu, per_token, run, caveats = None, None, None, None, None, None, []
    hbm = hardware.chip.hbm_bytes_per_device if hardware else None
    problem = artifact.oom
    # The TPU compiler itself refuses what does not fit; XLA compiles for a GPU whatever its size.
    refuses = hardware is None or hardware.platform == "tpu"
    if not refuses and hbm is not None and artifact.usage.total > LIMIT * hbm:
        problem = f"{artifact.usage.total / 2**30:.1f} GiB are more than {LIMIT:.0%} of the device's {hbm / 2**30:.0f}"
    # A schedule that was given up half-way for want of memory has no estimates worth reading.
    if hardware is not None and not problem:
        network = Network(topology, np.array(artifact.facts["coords"]), artifact.facts["mesh"])
        try:
            step = cost.predict(artifact.module, hardware, network, topology.slices)
        except ValueError as error:  # a form of HLO that no rule here reads
            raise compiler.CompilerError(f"the compiled step can't be timed: {error}") from error
        time, speed, caveats = _time(step, model.num_layers), tokens / step.seconds, _caveats(step)
        per_token = step.flops * topology.devices / tokens
        peak = hardware.chip.bf16_flops * topology.chips
        mfu_, hfu = mfu(speed, totals.flops_per_token, peak), mfu(speed, per_token, peak)
        run = _run(experiment, request, speed)
    remat = getattr(model, "remat", None)
    return Plan(
        topology=str(topology),
        chips=topology.chips,
        mesh=artifact.facts["mesh"],
        rows=request.rows,
        length=request.length,
        microbatches=experiment.train.microbatches,
        remat=policy_name(remat),
        residual=experiment.sharding.residual,
        parameters=totals.parameters,
        compiler=artifact.facts["compiler"],
        options=artifact.facts["options"],
        compile_seconds=artifact.facts["compile_seconds"],
        fits=not problem,
        problem=problem,
        usage=artifact.usage,
        hbm_bytes=hbm,
        model_flops=totals.flops_per_token,
        hardware_flops=per_token,
        time=time,
        tokens_per_second=speed,
        mfu=mfu_,
        hfu=hfu,
        run=run,
        caveats=tuple(caveats),
    )


def _time(step: cost.Step, layers: int) -> Time:
    inside = sum(e.total for e in step.entries if e.inside)
    slowest = sorted(step.entries, key=lambda e: -e.total)[:SLOWEST]
    parts: dict[str, float] = {}
    for entry in step.entries:
        name = part(entry.op_name) if entry.kind not in cost.COMMUNICATION else entry.kind
        parts[name] = parts.get(name, 0.0) + entry.total
    return Time(
        step=step.seconds,
        kinds={kind: step.by("kind").get(kind, 0.0) for kind in cost.KINDS},
        hidden=sum(e.hidden * e.runs for e in step.entries if e.kind in cost.COMMUNICATION),
        axes={axis: seconds for axis, seconds in step.by("axis").items() if axis},
        parts=dict(sorted(parts.items(), key=lambda item: -item[1])),
        layer=inside / layers,
        outside=step.seconds - inside,
        sources=step.by("source"),
        slowest=tuple(
            Slow(
                seconds=e.total,
                runs=e.runs,
                kind=e.kind,
                shape=str(next(iter(e.instruction.result), "")),
                op_name=e.op_name or e.instruction.name,
                place=_relative(e.place),
                axis=e.axis,
            )
            for e in slowest
        ),
    )


_PARTS = (
    ("norms", r"norm/|norm$"),
    ("attention", r"attention|alibi|rotary|rope"),
    ("mlp", r"/mlp|/moe|experts"),
    ("embedding", r"embed"),
    ("layers, other", r"/layers"),
)


def part(op_name: str) -> str:
    """Which part of the model, in which pass, a traced operation belongs to."""
    if "jvp(" not in op_name:
        return "optimizer and metrics" if op_name else "made by the compiler"
    name = next((name for name, pattern in _PARTS if re.search(pattern, op_name)), "logits and loss")
    if "rematted_computation" in op_name:
        return f"{name}, recomputed"
    return f"{name}, {'backward' if 'transpose(' in op_name else 'forward'}"


def _relative(place: str) -> str:
    """A path below the package or the working directory, without what comes before."""
    for root in (os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), os.getcwd()):
        if place.startswith(root + os.sep):
            return place[len(root) + 1 :]
    return place


def _caveats(step: cost.Step) -> list[str]:
    sources = step.by("source")
    words = []
    if sources.get("roofline"):
        words.append(
            f"time is a roofline at {cost.MATMUL_EFFICIENCY:.0%} of peak matmul and {cost.MEMORY_EFFICIENCY:.0%} of "
            "memory bandwidth, not a compiler's clock"
        )
    words += [f"{sources[name]:.3g} s by {name}" for name in sources if "kernels" in name]
    return words


def _run(experiment: Experiment, request: compiler.Request, speed: float) -> Run:
    size = experiment.train_dataset.batch_size
    steps = experiment.train.steps
    rows = size.build().first_row(steps) if isinstance(size, BatchSizePart) else size * steps
    tokens = float(rows * request.length)
    hours = tokens / speed / 3600
    hardware = request.topology.hardware
    watts = hardware.watts if hardware else None
    chip_hours = hours * request.topology.chips
    energy = None if watts is None else chip_hours * watts * PUE / 1e6
    return Run(tokens=tokens, days=hours / 24, chip_hours=chip_hours, energy_mwh=energy)
