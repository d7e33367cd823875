"""The shipped models of the converted families, at their real sizes, against transformers' own, without memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from palmjax import configure
from palmjax.config import ConfigError
from palmjax.interop import experiment
from palmjax.interop.huggingface import families

PARAMETERS = {
    "gpt2_small": ("gpt2", 124_439_808),
    "gpt2_xl": ("gpt2", 1_557_611_200),
    "opt_350m": ("opt", 331_196_416),
    "opt_175b": ("opt", 174_604_468_224),
    "bloom_176b": ("bloom", 176_247_271_424),
    "falcon_7b": ("falcon", 6_921_720_704),
    "falcon_40b": ("falcon", 41_303_293_952),
    "falcon_180b": ("falcon", 178_557_088_768),
    "gpt_j_6b": ("gptj", 6_050_882_784),
    "gpt_neox_20b": ("gpt_neox", 20_554_567_680),
    "llama_7b": ("llama", 6_738_415_616),
    "llama2_70b": ("llama", 68_976_648_192),
    "mistral_7b": ("mistral", 7_241_732_096),
    "palm_8b": ("cohere", 8_632_012_800),
    "palm_540b": ("cohere", 540_356_474_880),
}
"""Shipped gin file -> its family in transformers, and the model's parameters as its authors or transformers count."""


def shipped(name: str, folder: Path) -> Any:
    run = folder / "run.gin"
    run.write_text(experiment.finetuning(origin="a test", folder="runs/x", vocabulary=None, length=64, step=0))
    return configure.load([str(run), f"models/{name}.gin"], ["TRAIN_FILES = ()"]).experiment.model


@pytest.mark.parametrize("name", PARAMETERS)
def test_names_and_shapes_are_those_of_transformers(tmp_path, name):
    model = shipped(name, tmp_path)
    family, config = families.holding(model, name)
    planned = {tensor.name: tensor.shape for tensor in family.plan(model).values()}
    assert (family.model_type, sum(map(math.prod, planned.values()))) == PARAMETERS[name]
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    found = {key: tuple(value.shape) for key, value in theirs.named_parameters()}
    if family.model_type == "gpt_neox":  # transformers 5 calls it so in memory, and by its old name in files
        found["embed_out.weight"] = found.pop("lm_head.weight")
    assert found == planned


@pytest.mark.parametrize("name", ["gopher_280b", "bert_base", "glam_1_7b_64e", "gpt3_175b"])
def test_models_that_no_family_has_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=f"{name}: no family of transformers is this model"):
        families.holding(shipped(name, tmp_path), name)
