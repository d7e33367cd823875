"""Every family against transformers itself: logits, greedy tokens, gradients, and the way back bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers

from palmjax import checkpoint, decode
from palmjax.interop import convert
from palmjax.interop.huggingface import families
from palmjax.interop.layout import View
from palmjax.interop.mapping import leaves
from palmjax.loss import CrossEntropy
from palmjax.step import accumulate
from tests.interop import models

LENGTHS = (23, 9, 16, 2)
"""Ragged, and longer than Mistral's window."""


def exported(name: str, folder: Path) -> Any:
    model = models.tiny(name)
    model.save_pretrained(folder, safe_serialization=True)
    return model


@pytest.mark.parametrize("name", list(models.CONFIGS))
def test_logits_greedy_tokens_and_the_way_back(tmp_path, name):
    theirs = exported(name, tmp_path / "theirs")
    convert.from_huggingface(tmp_path / "theirs", tmp_path / "ours")
    model, params = models.restored(tmp_path / "ours")
    tokens, real = models.ragged(LENGTHS)
    want = models.torch_logits(theirs, tokens, real)

    logits = jax.jit(lambda params, batch: model.logits(params, model.hidden(params, batch)))
    found = np.asarray(logits(params, models.batch(tokens, real)))
    assert models.relative(found[real], want[real]) < 1e-4

    prompts = [row[:length].tolist() for row, length in zip(tokens[:2], LENGTHS[:2], strict=True)]
    ours = decode.generate(model, params, prompts, 64, bos=None, stop=None)
    for prompt, one in zip(prompts, ours, strict=True):
        given = torch.tensor([prompt])
        settings = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        chosen = theirs.generate(given, attention_mask=torch.ones_like(given), **settings)[0, len(prompt) :]
        assert one.tokens.tolist() == chosen.tolist()

    # As after training here: nothing but the checkpoint's own configuration tells what the model is.
    shutil.rmtree(tmp_path / "ours" / convert.BESIDE)
    vocabulary = checkpoint.read_info(str(tmp_path / "ours" / "checkpoint_0")).vocabulary
    convert.to_huggingface(str(tmp_path / "ours"), tmp_path / "back")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["model_type"] == theirs.config.model_type
    assert written["eos_token_id"] == vocabulary.eos_id
    np.testing.assert_array_equal(models.torch_logits(models.load(tmp_path / "back"), tokens, real), want)


@pytest.mark.parametrize("name", ["gpt2", "llama 2: grouped queries", "bloom"])
def test_the_gradients_of_a_step_are_torchs(tmp_path, name):
    theirs = exported(name, tmp_path / "theirs")
    convert.from_huggingface(tmp_path / "theirs", tmp_path / "ours")
    model, params = models.restored(tmp_path / "ours")
    tokens, real = models.ragged(LENGTHS)
    batch = models.batch(tokens, real)

    given = {"input_ids": torch.tensor(tokens).long(), "attention_mask": torch.tensor(real).long()}
    log_probs = theirs(**given, use_cache=False).logits.log_softmax(-1)
    chosen = log_probs.gather(-1, torch.tensor(batch.targets).long()[..., None])[..., 0]
    weights = torch.tensor(batch.weights)
    (-(chosen * weights).sum() / weights.sum()).backward()

    loss = CrossEntropy(z_loss=0.0).build(model)
    gradients, sums = jax.jit(lambda params: accumulate(loss, params, batch, None, 1))(params)
    ours = {path: np.asarray(g / sums["weight"]) for path, g in leaves(gradients).items()}
    family, _ = families.holding(model.config, name)
    theirs_by_name = dict(theirs.named_parameters())
    for tensor in family.plan(model.config).values():
        found = np.zeros(tensor.shape, np.float32)
        for part in tensor.parts:
            values = ours[part.parameter][part.index]
            view = View.of(found, part.pattern, part.sizes, part.take)
            view.write(tuple(slice(0, size) for size in view.shape), values)
        want = theirs_by_name[tensor.name].grad.numpy()
        assert models.relative(found, want) < 1e-4, tensor.name


def test_any_mesh_reads_its_own_slices(tmp_path):
    theirs = exported("falcon 40b: grouped queries, two norms", tmp_path / "theirs")
    convert.from_huggingface(tmp_path / "theirs", tmp_path / "ours")
    model, one = models.restored(tmp_path / "ours")
    # 97 tokens are divided by no mesh axis, so the vocabulary stays whole.
    bindings = ["MeshConfig.data=2", "MeshConfig.fsdp=2", "MeshConfig.tensor=2", "ShardingRules.vocab=()"]
    opened = models.opened(tmp_path / "ours", *bindings)
    laid_out = opened.params()
    query = laid_out["decoder"]["layers"]["self_attention"]["query"]["kernel"]
    assert {shard.data.shape for shard in query.addressable_shards} == {(2, 16, 2, 8)}
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(laid_out), jax.device_get(one))
    assert theirs.config.num_kv_heads == model.config.attention.num_kv_heads == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_comes_back_as_it_was_and_shards_are_indexed(tmp_path, dtype):
    model = models.tiny("llama 2: grouped queries", getattr(torch, dtype))
    model.save_pretrained(tmp_path / "theirs", max_shard_size="16KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    convert.from_huggingface(tmp_path / "theirs", tmp_path / "ours")
    ours, _ = models.restored(tmp_path / "ours")
    assert ours.config.dtype == "bfloat16"
    convert.to_huggingface(str(tmp_path / "ours"), tmp_path / "back", max_shard_bytes=16_000)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    assert back.dtype == model.dtype
    for (name, found), want in zip(back.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(found, want), name
