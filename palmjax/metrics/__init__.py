"""What a run reports: metrics.jsonl, the console, TensorBoard; tokens/s, MFU and HFU; the breakdown of its start.

A `Recorder` is told of step k right after step k was launched, and only then fetches and writes the numbers of step
k - 1: it never waits for the step just launched, and the host never runs more than one step ahead of the devices.
May import jax and `palmjax.config`.
"""

from palmjax.metrics.recorder import Recorder
from palmjax.metrics.startup import StartupClock, process_age
from palmjax.metrics.throughput import Throughput, mfu

__all__ = ["Recorder", "StartupClock", "Throughput", "mfu", "process_age"]
