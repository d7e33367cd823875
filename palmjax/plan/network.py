"""How long a collective takes on a torus of chips, or between slices: an alpha-beta model with the geometry read off.

A collective names groups of devices. Their coordinates say which dimensions of the torus a group spans, with what
stride, and whether each closes to a ring. The compiler says, on TPU, which algorithm it emits: one ring through all
the group ("1D"), or phases along several dimensions with as many colours at work at once ("ND").

With n devices, B bytes of the whole (the result of an all-gather, the operand of a reduction), l the bandwidth of a
link in one direction:

  all-gather, reduce-scatter   B (n-1)/n / bandwidth, all-reduce twice that
  bandwidth                    2 l for a closed ring (both directions at once), l for an open line, whose last
                               chip hears everything over its one link; times the colours, each along its own
                               dimension
  a group with stride s        shares its links with s-1 others: bandwidth / s
  collective permute           bytes x hops / l: a shift by h hops puts h flows on each link
  all-to-all                   the most loaded link of the longest dimension: B k/8 on a ring, B k/4 on a line
  latency                      a microsecond for each hop of the longest way: half the ring, or the line
"""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

from palmjax.plan import chips
from palmjax.plan.topology import Topology


@dataclasses.dataclass(frozen=True)
class Span:
    """What a group covers of one dimension of the torus: members, distance between neighbours, and if it closes."""

    dim: int
    members: int
    stride: int
    ring: bool


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds of a collective, and what it occupies meanwhile: directions of the torus ("0+", "0-", ...), the switch
    ("nvlink") or the network ("dcn")."""

    seconds: float
    resources: tuple[str, ...]


class Network:
    """The network of a mesh's devices.

    coords: int [devices, 1 + dims]: slice, then the place on the torus, in the mesh's order. axes: mesh axis sizes.
    """

    def __init__(self, topology: Topology, coords: np.ndarray, axes: dict[str, int]) -> None:
        hardware = topology.hardware
        assert hardware is not None, "a CPU has no network"
        self.topology, self.hardware, self.coords, self.axes = topology, hardware, coords, axes
        # Devices of one chip share its links.
        self.link = hardware.link_bandwidth * chips.ICI_EFFICIENCY / hardware.chip.devices
        self.dcn = hardware.dcn_bandwidth * chips.DCN_EFFICIENCY / hardware.chip.devices

    def mesh_axes(self, group: np.ndarray) -> str:
        """The mesh axes that a group of positions spans, as "fsdp" or "data+fsdp"."""
        places = np.stack(np.unravel_index(group, tuple(self.axes.values())))
        spanned = [name for name, row in zip(self.axes, places, strict=True) if (row != row[0]).any()]
        return "+".join(spanned) or "none"

    def spans(self, group: np.ndarray) -> list[Span]:
        """What one group of positions covers of the torus, dimension by dimension; those it does not move along left
        out.

        A group that is no regular sub-grid counts as a line along the longest dimension, with all others' flows.
        """
        here = self.coords[group][:, 1:]
        found = []
        for dim in range(min(here.shape[1], len(self.topology.shape))):
            values = np.unique(here[:, dim])
            if len(values) == 1:
                continue
            steps = np.diff(values)
            stride = int(steps[0])
            size = self.topology.shape[dim]
            whole = len(values) * stride == size
            regular = bool((steps == stride).all())
            ring = self.topology.wrap[dim] and whole and regular and len(values) > 2
            found.append(Span(dim, len(values), stride if regular else int(steps.max()), ring))
        return found

    def crosses_slices(self, group: np.ndarray) -> bool:
        return len(np.unique(self.coords[group][:, 0])) > 1

    def collective(self, kind: str, group: np.ndarray, size: float, algorithm: dict[str, str]) -> Cost:
        """The cost of a collective of `kind` (all-gather, reduce-scatter, all-reduce, all-to-all) over groups like
        `group`.

        size: bytes of the whole, a device's share times the group where it is a gather's result or a reduction's
        operand.
        """
        n = len(group)
        if n == 1 or size == 0:
            return Cost(0.0, ())
        if self.crosses_slices(group):
            return self.across(kind, group, size)
        if self.hardware.ici_dims == 0:
            return self._switched(kind, group, size)
        spans = self.spans(group)
        if not spans:  # the cores of one chip
            return Cost(0.0, ())
        used = tuple(f"{span.dim}{way}" for span in spans for way in "+-")  # both directions of each dimension
        if kind == "all-to-all":
            return Cost(max(self._to_all(span, size) for span in spans) + self._latency(spans), used)
        bandwidth = self._bandwidth(spans, algorithm)
        times = 2.0 if kind == "all-reduce" else 1.0
        one_ring = self._phases(algorithm) == 1 and len(spans) > 1
        hops = n / 2 if one_ring else sum(s.members / (2 if s.ring else 1) for s in spans)
        seconds = times * (size * (n - 1) / n / bandwidth + hops * chips.ICI_HOP_SECONDS)
        return Cost(seconds, used)

    def across(self, kind: str, group: np.ndarray, size: float) -> Cost:
        """A collective between slices. Inside each it runs over the torus at the same time, faster; it is the network
        that counts. Each chip sends its own share over its part of the host's card.
        """
        slices = len(np.unique(self.coords[group][:, 0]))
        inside = len(group) / slices
        times = 2.0 if kind == "all-reduce" else 1.0
        return self.exchange(times * size / inside * (slices - 1) / slices)

    def exchange(self, size: float) -> Cost:
        """`size` bytes out of each device to other slices."""
        return Cost(size / self.dcn + chips.DCN_SECONDS, ("dcn",))

    def permute(self, pairs: np.ndarray, size: float) -> Cost:
        """Every device sends `size` bytes along `pairs` [pairs, 2] of positions."""
        places = self.coords[pairs]
        if (places[:, 0, 0] != places[:, 1, 0]).any():
            return self.exchange(size)
        if self.hardware.ici_dims == 0:
            nodes = places[:, :, 1] // chips.GPUS_PER_NODE
            crosses = bool((nodes[:, 0] != nodes[:, 1]).any())
            return Cost(size / (self.dcn if crosses else self.link), ("dcn" if crosses else "nvlink",))
        shape = np.array(self.topology.shape)
        ahead = places[:, 1, 1 : 1 + len(shape)] - places[:, 0, 1 : 1 + len(shape)]
        wrap = np.array(self.topology.wrap)
        short = np.where(wrap & (np.abs(ahead) * 2 > shape), ahead - np.sign(ahead) * shape, ahead)
        hops = np.abs(short).sum(axis=1)
        if not hops.any():
            return Cost(0.0, ())
        # Both directions of a link carry data at once: a shift ahead does not delay one back, nor the one flow that
        # closes an open line, which runs back over links that the others leave free.
        dim = int(np.abs(short).sum(axis=0).argmax())
        ahead_, back = (np.abs(short[:, dim])[short[:, dim] * sign > 0] for sign in (1, -1))
        load = max(1.0, float(np.median(ahead_ if len(ahead_) >= len(back) else back)))
        way = f"{dim}{'+' if len(ahead_) >= len(back) else '-'}"
        return Cost(size * load / self.link + float(hops.max()) * chips.ICI_HOP_SECONDS, (way,))

    def _phases(self, algorithm: dict[str, str]) -> int:
        """Dimensions that the compiler works through one after another; 1 is a single ring."""
        found = re.search(r"phases:(\d+)", algorithm.get("debug", ""))
        if found:
            return int(found[1])
        ring = re.match(r"(\d)D", algorithm.get("emitter", ""))
        return int(ring[1]) if ring else (1 if "Ring" in algorithm.get("emitter", "") else 0)

    def _bandwidth(self, spans: list[Span], algorithm: dict[str, str]) -> float:
        """Bytes/s that a group moves in and out of each chip."""
        phases = self._phases(algorithm)
        if phases == 1 and len(spans) > 1:
            # A path through a grid of two or more dimensions closes to a ring if one side is even.
            closed = any(span.members % 2 == 0 for span in spans)
            return self.link * (2 if closed else 1) / max(span.stride for span in spans)
        colors = re.search(r"colors:(\d+)", algorithm.get("debug", ""))
        at_once = min(int(colors[1]), len(spans)) if colors else len(spans)
        each = sorted((self.link * (2 if span.ring else 1) / span.stride for span in spans), reverse=True)
        return sum(each[:at_once])

    def _to_all(self, span: Span, size: float) -> float:
        load = span.members / (8 if span.ring else 4)
        return size * load * span.stride / self.link

    def _latency(self, spans: list[Span]) -> float:
        return chips.ICI_HOP_SECONDS * sum(span.members / (2 if span.ring else 1) for span in spans)

    def _switched(self, kind: str, group: np.ndarray, size: float) -> Cost:
        """Behind a switch every device sends at its full rate. Between nodes each sends its share of what its node has
        gathered over its own part of the network; inside one it all goes over the switch.
        """
        n, times = len(group), 2.0 if kind == "all-reduce" else 1.0
        nodes = len(np.unique(self.coords[group][:, 1] // chips.GPUS_PER_NODE))
        latency = math.log2(n) * chips.ICI_HOP_SECONDS
        if nodes == 1:
            return Cost(times * size * (n - 1) / n / self.link + latency, ("nvlink",))
        between = times * size / (n / nodes) * (nodes - 1) / nodes / self.dcn
        return Cost(between + latency, ("dcn",))
