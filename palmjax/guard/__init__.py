"""What a run does when something looks wrong, by rules from gin: steps that are not finite, loss spikes, what a person
changes on the way, and being asked to stop.

What is not finite is refused on the devices, inside the step (`palmjax.step`). All else is decided on the host from the
metrics that the recorder reads one step late, so the loop never waits for the step just launched. Every decision is
a pure function of the configuration and of what the run has computed, and is on disk before it acts: a run killed at
any instant decides the same again and goes on to the same bits.

    watch       reads every step's metrics: what happened, and whether to rewind or to stop
    record      guard.json in MODEL_DIR: the rewinds decided so far, and which checkpoints they have made void
    overrides   overrides.json in MODEL_DIR: learning rates and skipped rows given by hand
    preemption  SIGTERM: the step after which all processes stop
    notice      what the cloud's metadata server announces: maintenance, preemption

May import config, distributed, data, optim, model_dir and metrics' data types; no checkpoint and no step.
"""

from palmjax.guard.overrides import FILE as OVERRIDES
from palmjax.guard.overrides import Overrides
from palmjax.guard.preemption import EXIT_PREEMPTED, Preemption
from palmjax.guard.record import FILE as RECORD
from palmjax.guard.record import Rewind, is_void, read_rewinds, remove_void, write_rewinds
from palmjax.guard.watch import EXIT_STOPPED, Position, Stop, Watch

__all__ = [
    "EXIT_PREEMPTED",
    "EXIT_STOPPED",
    "OVERRIDES",
    "RECORD",
    "Overrides",
    "Position",
    "Preemption",
    "Rewind",
    "Stop",
    "Watch",
    "is_void",
    "read_rewinds",
    "remove_void",
    "write_rewinds",
]
