"""Checkpoints: state, data position, configuration and code version in one folder, written while training goes on.

MODEL_DIR/checkpoint_<step>/ (T5X's layout) holds `state/`, the arrays in Orbax's OCDBT format, `info/`, a JSON
`RunInfo`, and `checksums.json`. A checkpoint gets its name only when it is whole. Two kinds of checksum tell that what
is read is what was saved: of every file (`seal`) and of every array as it lay on the devices (`digest`). Reading checks
`info` first, so a checkpoint of another model, optimizer or vocabulary is refused before an array is read, and no dtype
ever changes on the way.

Orbax takes half a second or more to import, so every function here imports it when called.
"""

from palmjax.checkpoint.begin import Skipped, Start, start
from palmjax.checkpoint.reading import check_vocabulary, read_info, restore_params, restore_state
from palmjax.checkpoint.saving import Checkpointer, Saved, SaveError
from palmjax.checkpoint.seal import Damaged
from palmjax.checkpoint.tree import describe
from palmjax.model_dir import Unreadable, newest, resolve, steps

__all__ = [
    "Checkpointer",
    "Damaged",
    "SaveError",
    "Saved",
    "Skipped",
    "Start",
    "Unreadable",
    "check_vocabulary",
    "describe",
    "newest",
    "read_info",
    "resolve",
    "restore_params",
    "restore_state",
    "start",
    "steps",
]
