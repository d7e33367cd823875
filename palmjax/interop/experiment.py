"""The gin file of a converted model: what `generate` and `eval` load with it, and what training goes on from."""

from __future__ import annotations

import dataclasses
from typing import Any

from palmjax.models.decoder import Decoder

LONGEST_ROW = 4096
"""Tokens of a row in the run file that is written: a model made for more is seldom finetuned with so many."""


def model_bindings(model: Decoder) -> str:
    """gin lines that build `model` as MODEL: every field that is not its class's default.

    A class that stands in several places with different values gets a scope in the later ones.
    """
    groups: dict[str, dict[str, str]] = {}

    def written(value: Any, place: str) -> str:
        if dataclasses.is_dataclass(value):
            return f"@{add(value, place)}()"
        if isinstance(value, tuple):
            return "(" + "".join(f"{written(item, f'{place}_{i}')}, " for i, item in enumerate(value)).strip() + ")"
        return repr(value)

    def add(part: Any, place: str) -> str:
        name = type(part).__name__
        lines = {}
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if value != field.default:
                lines[field.name] = written(value, f"{place}_{field.name}".lstrip("_"))
        if groups.setdefault(name, lines) != lines:
            name = f"{place}/{name}"
            groups[name] = lines
        return name

    add(model, "")
    text = ["MODEL = @Decoder()"]
    for name, lines in groups.items():
        text += [f"{name}.{field} = {value}" for field, value in lines.items()]
    return "\n".join(text) + "\n"


def finetuning(*, origin: str, folder: str, vocabulary: str | None, length: int, step: int) -> str:
    """A run file without its model: training on text files of the user's from a converted checkpoint's parameters.

    origin: what was converted. folder: where the checkpoint is. vocabulary: path of a SentencePiece model or a
    tokenizer.json. length: tokens a row. step: of the checkpoint, from which TRAIN_STEPS counts on.
    """
    return f"""# {origin}, converted by palmjax.
#   palmjax generate --checkpoint {folder} --prompt 'text'
#   palmjax eval --checkpoint {folder} --gin.TRAIN_FILES='/data/*.txt'
#   palmjax train {folder}/finetune.gin --gin.MODEL_DIR=runs/mine --gin.TRAIN_FILES='/data/*.txt'
include "run/train.gin"
include "optim/adamw_cosine.gin"
include "data/text_files.gin"

MODEL_DIR = "runs/finetuned"
INITIAL_CHECKPOINT_PATH = {folder!r}
SENTENCEPIECE_MODEL = {vocabulary!r}
TASK_FEATURE_LENGTHS = {{"targets": {length}}}
TRAIN_STEPS = {step + 1000}              # absolute
BATCH_SIZE = 32
LEARNING_RATE = 1e-5
WARMUP_STEPS = 100

"""
