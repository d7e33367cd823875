"""The time of one step, from the schedule the compiler made. The whole model is on this page.

**Order.** A TPU runs its instructions one after another, in the order of the scheduled HLO. The walk keeps a clock: a
synchronous operation advances it by its own time; a start (copy-start, collective-permute-start, send, the first part
of an asynchronous collective) occupies a resource (a dimension of the torus, the slices' network, the memory engine)
from the moment that resource is free; the matching done advances the clock only if the transfer has not ended. What a
done waits is *exposed*; the rest was hidden behind what stood between.

**Compute.** The TPU compiler writes its own estimate of cycles on every fusion; they are divided by the clock that
makes the printed peak (`chips.Hardware.clock`). No factor is fitted. An operation without an estimate costs its bytes
over HBM's bandwidth. A Mosaic (Pallas) kernel carries none: its cycles come from the kernel's own table
(`pallas_kernels.schedule`) where it has the shape, else from the roofline, and the plan says which.

**Collectives** follow `network.py`: bytes over the links that the group's place on the torus and the compiler's chosen
algorithm give, plus hops times latency.

**Loops.** A body is walked once and counts as often as it runs; if a resource is busy longer than the body takes, the
body takes that long: in the steady state the queue is what limits.

**Not in it.** Contention between prefetches and compute for HBM, stragglers, the input pipeline, the host. They make a
real step slower than this one.

**Other devices.** Without cycles (GPU, CPU) an operation takes the larger of its FLOPs at `MATMUL_EFFICIENCY` of the
peak and its bytes at `MEMORY_EFFICIENCY` of the bandwidth: a roofline, and the plan says so.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from typing import Any

import numpy as np

from pallas_kernels import schedule
from palmjax.plan import flops as counting
from palmjax.plan import hlo, traffic
from palmjax.plan.chips import Hardware
from palmjax.plan.network import Cost, Network

MATMUL_EFFICIENCY = 0.75
"""Of a GPU's printed peak in large bf16 matmuls: 770 of 989 TFLOP/s, measured on one H200."""

MEMORY_EFFICIENCY = 0.9
"""Of a GPU's printed HBM bandwidth in large copies: 4.3 of 4.8 TB/s, measured on one H200."""

_FREE = frozenset(
    ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id")
    + ("iota", "opt-barrier", "add-dependency", "bitcast-convert")
)
"""Operations that move no data: the compiler folds them away or names what is there."""
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all")
_FAR = 6
"""Steps back to the operation whose result a transfer moves: a start, copies, a bitcast."""
MATMUL, OTHER, KERNEL = "matmul", "other compute", "kernel"
ICI, NVLINK, DCN = "exposed ICI", "exposed NVLink", "exposed DCN"
"""Between the chips of a slice; between the GPUs of a node; between slices or nodes, over the data centre's network."""
COMMUNICATION = (ICI, NVLINK, DCN)
KINDS = (MATMUL, OTHER, KERNEL, *COMMUNICATION)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One operation of the schedule. seconds: what it added to the clock in one run; runs: how often in a step.

    hidden: seconds of a transfer that other work covered. axis: the mesh axes of a collective, else "". source: where
    its time comes from: "compiler's cycles", "bytes", "network", or a kernel's own table. inside: whether it runs in
    the loop over the layers.
    """

    kind: str
    seconds: float
    runs: int
    instruction: hlo.Instruction
    op_name: str
    place: str
    axis: str = ""
    hidden: float = 0.0
    source: str = ""
    inside: bool = False

    @property
    def total(self) -> float:
        return self.seconds * self.runs


@dataclasses.dataclass(frozen=True)
class Step:
    """The predicted step. seconds: its length; entries: everything that takes time; flops: of a device's matmuls."""

    seconds: float
    entries: tuple[Entry, ...]
    flops: float

    def by(self, attribute: str) -> dict[str, float]:
        """Seconds a step by `kind`, `axis` or another attribute of the entries."""
        sums: dict[str, float] = collections.defaultdict(float)
        for entry in self.entries:
            sums[getattr(entry, attribute)] += entry.total
        return dict(sums)


def predict(module: hlo.Module, hardware: Hardware, network: Network, slices: int) -> Step:
    """The step that `module` is the schedule of. Raises ValueError if a loop's trips are unknown."""
    walk = _Walk(module, hardware, network, slices)
    seconds = walk.run(module.entry, 1)
    return Step(seconds, tuple(walk.entries), walk.flops)


@dataclasses.dataclass
class _Transfer:
    """A transfer under way: when it ends, how long it takes alone, and the mesh axes it runs along."""

    end: float
    cost: Cost
    axis: str

    @property
    def kind(self) -> str:
        return _kind(self.cost.resources)


def _kind(resources: tuple[str, ...]) -> str:
    """What a wait for one of `resources` counts as."""
    named = {"dcn": DCN, "nvlink": NVLINK, "hbm": OTHER}
    return next((kind for resource, kind in named.items() if resource in resources), ICI)


class _Walk:
    def __init__(self, module: hlo.Module, hardware: Hardware, network: Network, slices: int) -> None:
        self.module, self.hardware, self.network, self.slices = module, hardware, network, slices
        self.clock = 0.0
        self.free: dict[str, float] = {}
        self.busy: dict[str, float] = collections.defaultdict(float)
        self.under_way: dict[str, _Transfer] = {}
        self.entries: list[Entry] = []
        self.flops = 0.0
        self.inside = False

    def run(self, name: str, runs: int) -> float:
        """Walks a computation once; returns how long one run of it takes."""
        began, computation = self.clock, self.module.computations[name]
        for instruction in computation.instructions:
            self._visit(computation, instruction, runs)
        return self.clock - began

    def _visit(self, computation: hlo.Computation, instruction: hlo.Instruction, runs: int) -> None:
        opcode = instruction.opcode
        if opcode in _FREE:
            return
        if opcode == "while":
            self._loop(instruction, runs)
        elif opcode == "call":
            self.run(next(iter(instruction.called.values())), runs)
        elif opcode == "conditional":
            self._conditional(instruction, runs)
        elif opcode in ("send", "recv", "send-done", "recv-done"):
            self._exchange(computation, instruction, runs)
        elif opcode == "async-update":
            self.under_way[instruction.name] = self.under_way.pop(instruction.operands[0], None) or _Transfer(
                self.clock, Cost(0.0, ()), ""
            )
        elif opcode.endswith("-done"):
            self._wait(instruction, instruction.operands[0], runs)
        elif opcode.endswith("-start"):
            self._start(computation, instruction, runs)
        else:
            self._operation(computation, instruction, runs)

    # Control flow.

    def _loop(self, loop: hlo.Instruction, runs: int) -> None:
        trips = self.module.trips(loop)
        outside, self.busy = self.busy, collections.defaultdict(float)
        first, began = len(self.entries), self.clock
        # What was under way before the loop delays its first turn at most, not every one.
        self.free = {resource: min(end, began) for resource, end in self.free.items()}
        outer, self.inside = self.inside, self.inside or self._is_stack(loop)
        body = self.run(loop.called["body"], runs * trips)
        slowest = max(self.busy, key=lambda resource: self.busy[resource], default=None)
        if slowest is not None and self.busy[slowest] > body:
            waited = self.busy[slowest] - body
            self.entries.append(
                Entry(_kind((slowest,)), waited, runs * trips, loop, loop.op_name, "", "", source="network")
            )
            body = self.busy[slowest]
        if trips == 0:
            del self.entries[first:]
        self.clock = began + body * trips
        for resource, seconds in self.busy.items():
            outside[resource] += seconds * trips
        self.busy, self.inside = outside, outer
        for resource in self.free:
            self.free[resource] = min(self.free[resource], self.clock)

    def _is_stack(self, loop: hlo.Instruction) -> bool:
        """Whether a loop is the one over the layers: most of what its body names belongs to them."""
        names = [i.op_name for i in self.module.computations[loop.called["body"]].instructions if i.op_name]
        return 2 * sum("/layers" in name for name in names) > len(names)

    def _conditional(self, instruction: hlo.Instruction, runs: int) -> None:
        """The slowest branch: a plan is no place for luck."""
        best: tuple[float, list[Entry], float] = (-1.0, [], 0.0)
        began, entries, flops = self.clock, self.entries, self.flops
        for role, name in instruction.called.items():
            if role.startswith("branch") or role.endswith("_computation"):
                self.clock, self.entries, self.flops = began, [], 0.0
                seconds = self.run(name, runs)
                if seconds > best[0]:
                    best = (seconds, self.entries, self.flops)
        self.entries, self.clock, self.flops = entries + best[1], began + max(best[0], 0.0), flops + best[2]

    # Transfers.

    def _begin(self, name: str, cost: Cost, axis: str) -> None:
        start = max([self.clock, *(self.free.get(resource, 0.0) for resource in cost.resources)])
        for resource in cost.resources:
            self.free[resource] = start + cost.seconds
            self.busy[resource] += cost.seconds
        self.under_way[name] = _Transfer(start + cost.seconds, cost, axis)

    def _wait(self, instruction: hlo.Instruction, name: str, runs: int) -> None:
        transfer = self.under_way.pop(name, None)
        if transfer is None:  # begun in another iteration, whose time covers it
            return
        waited = max(transfer.end - self.clock, 0.0)
        self.clock += waited
        hidden = max(transfer.cost.seconds - waited, 0.0)
        self._add(transfer.kind, waited, runs, instruction, axis=transfer.axis, hidden=hidden, source="network")

    def _start(self, computation: hlo.Computation, instruction: hlo.Instruction, runs: int) -> None:
        opcode = instruction.opcode.removesuffix("-start")
        if opcode in ("copy", "slice", "dynamic-slice", "dynamic-update-slice"):
            # The destination is what moves; its other end is on the other side of HBM's bus.
            moved = min((s.bytes for s in instruction.result if s.elements > 1), default=0.0)
            self._begin(instruction.name, Cost(moved / self.hardware.hbm_bandwidth_per_device, ("hbm",)), "")
            return
        found = self._collective(computation, instruction)
        if found is None:
            self._operation(computation, instruction, runs)
            return
        self._begin(instruction.name, *found)

    def _exchange(self, computation: hlo.Computation, instruction: hlo.Instruction, runs: int) -> None:
        """Slices exchange through their hosts: a send and a recv of one rendezvous are one transfer."""
        if not instruction.opcode.endswith("-done"):
            if instruction.opcode == "send":
                size = max((s.bytes for s in instruction.result), default=0.0)
                if "ALL_REDUCE" in instruction.text:
                    size *= 2.0 * (self.slices - 1) / max(self.slices, 1)
                self._begin(instruction.rendezvous, self.network.exchange(size), self._across())
            return
        begun = computation.by_name.get(instruction.operands[0])
        if instruction.opcode == "recv-done" and begun is not None:
            self._wait(instruction, begun.rendezvous, runs)

    def _across(self) -> str:
        """The mesh axis whose neighbours lie in different slices: the data axis."""
        return next(iter(self.network.axes), "")

    # Operations.

    def _operation(self, computation: hlo.Computation, instruction: hlo.Instruction, runs: int) -> None:
        channel = self._asynchronous(instruction)
        if channel is not None and instruction.name.startswith("async-collective-done"):
            self._wait(instruction, channel, runs)
            return
        if channel is not None and instruction.name.startswith("async-collective-start"):
            found = self._collective(computation, instruction)
            if found is not None:
                self._begin(channel, *found)
            return
        found = None if channel is not None else self._collective(computation, instruction)
        if found is not None:
            self._begin(instruction.name, *found)
            self._wait(instruction, instruction.name, runs)
            return
        flops = counting.flops(self.module, computation, instruction)
        self.flops += flops * runs
        kind = MATMUL if flops else OTHER
        if instruction.target == "tpu_custom_call":
            seconds, flops, source = self._kernel(computation, instruction)
            self.flops += flops * runs
            kind = KERNEL
        elif instruction.cycles is not None and self.hardware.platform == "tpu":
            # The estimate is of one JAX device's core or fused cores.
            seconds, source = instruction.cycles / self.hardware.clock, "compiler's cycles"
        elif self.hardware.platform == "tpu":
            seconds = self._moved(computation, instruction) / self.hardware.hbm_bandwidth_per_device
            source = "bytes"
        else:
            compute = flops / (self.hardware.chip.flops_per_device * MATMUL_EFFICIENCY)
            moved = self._moved(computation, instruction)
            memory = moved / (self.hardware.hbm_bandwidth_per_device * MEMORY_EFFICIENCY)
            seconds, source = max(compute, memory), "roofline"
        if seconds > 0:
            self.clock += seconds
            self._add(kind, seconds, runs, instruction, source=source)

    def _asynchronous(self, instruction: hlo.Instruction) -> str | None:
        """The channel of a collective that runs beside compute in steps fused into several operations; else None."""
        if instruction.opcode != "fusion":
            return None
        if not (instruction.name.startswith("async-collective") or "async_collective" in instruction.called["calls"]):
            return None
        inner = self._inner(instruction)
        found = re.search(r"channel_id=(\d+)", inner.text) if inner is not None else None
        return f"channel {found[1]}" if found else None

    def _inner(self, instruction: hlo.Instruction) -> hlo.Instruction | None:
        """The collective inside a fusion, or the instruction itself if it is one."""
        kind = instruction.opcode.removesuffix("-start")
        if kind in _COLLECTIVES or kind == "collective-permute":
            return instruction
        if instruction.opcode in ("fusion", "async-start"):
            return next((i for i in self.module.walk(instruction.called["calls"]) if self._is_collective(i)), None)
        return None

    @staticmethod
    def _is_collective(instruction: hlo.Instruction) -> bool:
        return instruction.opcode.removesuffix("-start") in (*_COLLECTIVES, "collective-permute")

    def _collective(self, computation: hlo.Computation, instruction: hlo.Instruction) -> tuple[Cost, str] | None:
        """The network's cost of an instruction and the mesh axes it runs along; None if it is no collective."""
        inner = self._inner(instruction)
        if inner is None:
            return None
        home = computation if inner is instruction else self._home(inner)
        kind = inner.opcode.removesuffix("-start")
        if kind == "collective-permute":
            assert inner.pairs is not None, inner.name
            size = inner.result[0].bytes
            return self.network.permute(inner.pairs, size), self.network.mesh_axes(inner.pairs[0])
        group = inner.groups[0] if inner.groups is not None else np.arange(len(self.network.coords))
        operands = sum(s.bytes for name in inner.operands if name in home.by_name for s in home.by_name[name].result)
        # A reduction followed by the choice of one's own share is emitted as one reduce-scatter.
        if kind == "all-reduce" and "all-reduce-scatter" in instruction.called.get("calls", ""):
            kind = "reduce-scatter"
        size = operands * (len(group) if kind == "all-gather" else 1)
        algorithm = instruction.algorithm or inner.algorithm
        return self.network.collective(kind, group, size, algorithm), self.network.mesh_axes(group)

    def _home(self, instruction: hlo.Instruction) -> hlo.Computation:
        return next(c for c in self.module.computations.values() if c.by_name.get(instruction.name) is instruction)

    def _kernel(self, computation: hlo.Computation, instruction: hlo.Instruction) -> tuple[float, float, str]:
        """Seconds, FLOPs and source of a Mosaic kernel: ours by its table, others by the cost that their author stated
        (`pl.CostEstimate`), as a roofline.
        """
        stated = {k: float(v) for k, v in re.findall(r'"(flops|bytes_accessed)":"?(\d+)', instruction.text)}
        flops, moved = stated.get("flops", 0.0), stated.get("bytes_accessed", self._moved(computation, instruction))
        chip = self.hardware.chip
        roofline = max(flops / chip.flops_per_device, moved / self.hardware.hbm_bandwidth_per_device)
        name = f"{instruction.name} {instruction.op_name}"
        if schedule.kernel_in(name) is None:
            return roofline, flops, "the stated FLOPs and bytes of kernels, at the peak"
        operands = (computation.by_name[n] for n in instruction.operands if n in computation.by_name)
        arrays = [shape for operand in operands for shape in operand.result if len(shape.dims) == 3]
        # Queries, [rows, tokens x heads, width], are the largest; keys, [rows, tokens, width], are of their type.
        queries = max(arrays, key=lambda a: a.elements)
        keys = [a for a in arrays if a.dtype == queries.dtype and a.dims[-1] == queries.dims[-1]]
        cycles, source = schedule.cycles(
            name,
            schedule.chip_in(chip.kinds),
            flops=flops,
            width=queries.dims[-1],
            length=min(a.dims[1] for a in keys),
            dtype={"bf16": "bfloat16", "f32": "float32"}.get(queries.dtype, queries.dtype),
        )
        return max(cycles / self.hardware.clock, roofline), flops, f"kernels: {source}"

    def _moved(self, computation: hlo.Computation, instruction: hlo.Instruction) -> float:
        return traffic.moved(self.module, computation, instruction)

    def _add(self, kind: str, seconds: float, runs: int, instruction: hlo.Instruction, **details: Any) -> None:
        named = self.module.named(instruction)
        name, place = named.op_name, self.module.source(named)
        if not name and kind in COMMUNICATION:
            name, place = self._moves(instruction)
        self.entries.append(Entry(kind, seconds, runs, instruction, name, place, inside=self.inside, **details))

    def _moves(self, instruction: hlo.Instruction) -> tuple[str, str]:
        """Of a transfer that the compiler made up: the traced name and place of what made its data."""
        at = instruction
        for _ in range(_FAR):
            before = (self.module.find(name) for name in at.operands)
            at = next((i for i in before if i is not None), None)
            if at is None:
                break
            made = self.module.named(at)
            if made.op_name:
                return f"{made.op_name} (moved)", self.module.source(made)
        return "", ""
