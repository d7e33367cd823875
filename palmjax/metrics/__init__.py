"""What a run reports: JSON lines, the console, TensorBoard; tokens/s, MFU and HFU; the breakdown of its start.

A `Recorder` is told of step k right after step k was launched, and only then fetches and writes the numbers of step
k - 1: it never waits for the step just launched, and the host never runs more than one step ahead of the devices.
On a remote MODEL_DIR (gs://) a thread uploads what a local one would have appended. May import jax, `palmjax.config`
and `palmjax.model_dir`.
"""

from palmjax.metrics.lines import in_force, read_metrics
from palmjax.metrics.recorder import Recorder
from palmjax.metrics.startup import StartupClock, process_age
from palmjax.metrics.throughput import Throughput, mfu
from palmjax.metrics.uploader import Pace

__all__ = ["Pace", "Recorder", "StartupClock", "Throughput", "in_force", "mfu", "process_age", "read_metrics"]
