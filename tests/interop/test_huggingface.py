"""Every family against transformers itself: logits, greedy tokens, gradients, and the way back bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

from palmjax import decode
from palmjax.interop import convert
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

    prompts = [row[:length].tolist() for row, length in zip(tokens, LENGTHS, strict=True)]
    ours = decode.generate(model, params, prompts, 64, bos=None, stop=None)
    for prompt, one in zip(prompts, ours, strict=True):
        given = torch.tensor([prompt])
        settings = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        chosen = theirs.generate(given, attention_mask=torch.ones_like(given), **settings)[0, len(prompt) :]
        assert one.tokens.tolist() == chosen.tolist()

    convert.to_huggingface(str(tmp_path / "ours"), tmp_path / "back")
    np.testing.assert_array_equal(models.torch_logits(models.load(tmp_path / "back"), tokens, real), want)
