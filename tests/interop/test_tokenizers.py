"""Tokenizers travel along: text in and out as transformers has it, data stores, training, and the way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE

from palmjax import checkpoint, cli
from palmjax.data.vocabulary import HuggingFace, PassThrough, SentencePiece, from_json
from palmjax.interop import convert
from tests.interop import models

TEXT = "the model reads a row of tokens and learns what follows from what came before it, über 12 Zeilen\n"
END, BEGIN = "<|end|>", "<|begin|>"


def byte_level(folder: Path, *, begins: bool) -> Any:
    """A byte-level BPE as GPT-2's (no BOS before a prompt) or LLaMA 3's (one); 97 ids. Returns transformers' own."""
    tokenizer = tokenizers.Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    special = [END, BEGIN] if begins else [END]
    alphabet = sorted({piece for word in pre_tokenizers.ByteLevel().pre_tokenize_str(TEXT) for piece in word[0]})
    trainer = trainers.BpeTrainer(vocab_size=97, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    if begins:
        begin = (BEGIN, tokenizer.token_to_id(BEGIN))
        tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single=f"{BEGIN} $A", special_tokens=[begin]
        )
    assert tokenizer.get_vocab_size() <= 97
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=BEGIN if begins else None
    )
    fast.save_pretrained(folder)
    return fast


@pytest.fixture(params=[False, True], ids=["gpt2: no BOS", "llama: BOS"])
def folder(request, tmp_path) -> tuple[Path, Any, Any]:
    """(folder, model, tokenizer) of transformers."""
    name = "llama 2: grouped queries" if request.param else "gpt2"
    model = models.tiny(name)
    model.config.eos_token_id = model.generation_config.eos_token_id = 0
    model.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs", model, byte_level(tmp_path / "theirs", begins=request.param)


def test_text_in_and_out_as_transformers_has_it(folder, tmp_path, capfd):
    source, model, tokenizer = folder
    assert cli.main(["convert", str(source), str(tmp_path / "ours")]) == 0
    capfd.readouterr()
    prompt = "the row of 12 über "
    flags = ["generate", "--json", "--checkpoint", str(tmp_path / "ours"), "--max_new_tokens", "24"]
    assert cli.main([*flags, "--prompt", prompt]) == 0
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    settings = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": 0}
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :].tolist()
    assert found["tokens"] == wanted
    assert found["continuation"] == tokenizer.decode([i for i in wanted if i > 0], skip_special_tokens=True)


def test_the_vocabulary_is_the_tokenizers(folder):
    source, _, tokenizer = folder
    vocabulary = HuggingFace.read(source / "tokenizer.json")
    assert vocabulary == from_json(json.loads(json.dumps(vocabulary.to_json())), vocabulary.files())
    assert vocabulary.eos_id == tokenizer.eos_token_id and vocabulary.size == len(tokenizer)
    ids = vocabulary.encode(TEXT)
    assert ids == tokenizer(TEXT, add_special_tokens=False).input_ids
    assert vocabulary.decode([*ids, vocabulary.eos_id, 5]) == TEXT
    assert vocabulary.token_bytes()[ids].sum() == len(TEXT.encode())
    assert vocabulary.token_bytes()[vocabulary.eos_id] == 0
    begins = tokenizer("the").input_ids[0] != vocabulary.encode("the")[0]
    assert vocabulary.prompt_bos == (tokenizer.bos_token_id if begins else None)
    assert vocabulary.bos_id == (tokenizer.bos_token_id if begins else tokenizer.eos_token_id)


def test_eval_and_training_go_on_from_it_and_the_tokenizer_comes_back(folder, tmp_path, capfd):
    source, _, tokenizer = folder
    (tmp_path / "text.txt").write_text(TEXT * 30)
    assert cli.main(["convert", str(source), str(tmp_path / "ours"), "--gin.TASK_FEATURE_LENGTHS={'targets': 64}"]) == 0
    data = [f"--gin.TRAIN_FILES='{tmp_path}/text.txt'", f"--gin.VALIDATION_FILES='{tmp_path}/text.txt'"]
    data += [f"--gin.STORE_DIR='{tmp_path}/stores'", "--gin.MeshConfig.data=1", "--gin.MeshConfig.fsdp=8"]
    data += ["--gin.ShardingRules.vocab=()", "--gin.EVAL_BATCH_SIZE=8"]
    capfd.readouterr()
    assert cli.main(["eval", "--json", "--checkpoint", str(tmp_path / "ours"), *data]) == 0
    scores = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert scores["bytes"] == len((TEXT * 30).encode())

    run = ["train", str(tmp_path / "ours" / "finetune.gin"), f"--gin.MODEL_DIR={tmp_path}/tuned", *data]
    run += ["--gin.TRAIN_STEPS=12", "--gin.BATCH_SIZE=8", "--gin.WARMUP_STEPS=1", "--gin.LEARNING_RATE=1e-2"]
    run += ["--gin.TASK_FEATURE_LENGTHS={'targets': 64}"]
    assert cli.main(run) == 0
    assert checkpoint.read_info(tmp_path / "tuned").vocabulary == checkpoint.read_info(tmp_path / "ours").vocabulary
    capfd.readouterr()
    assert cli.main(["eval", "--json", "--checkpoint", str(tmp_path / "tuned")]) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["loss"] < scores["loss"] - 0.5

    # Out of the run's own folder: what transformers needs of the tokenizer is in the checkpoint itself.
    assert cli.main(["convert", str(tmp_path / "tuned"), str(tmp_path / "back")]) == 0
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert again(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert again.eos_token == tokenizer.eos_token
    model = models.load(tmp_path / "back")
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        assert float(model(ids, labels=ids).loss) < scores["loss"] - 0.5, "trained here, better there"
    # Out of the converted folder: the files themselves.
    assert cli.main(["convert", str(tmp_path / "ours"), str(tmp_path / "copied")]) == 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "copied" / name).read_bytes() == (source / name).read_bytes()


def test_a_sentencepiece_model_is_used_as_it_is(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT * 20)
    flags = ["--vocab_size", "290", "--input", str(tmp_path / "text.txt"), "--output", str(tmp_path / "sp")]
    assert cli.main(["tokenizer", *flags]) == 0
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model("llama", **models.LLAMA | {"vocab_size": 290})
    )
    model.save_pretrained(tmp_path / "theirs")
    content = (tmp_path / "sp" / "tokenizer.model").read_bytes()
    (tmp_path / "theirs" / "tokenizer.model").write_bytes(content)
    convert.from_huggingface(tmp_path / "theirs", tmp_path / "ours")
    assert checkpoint.read_info(tmp_path / "ours").vocabulary == SentencePiece(content)
    assert checkpoint.read_info(tmp_path / "ours").vocabulary.bos_id == 0
    (tmp_path / "ours" / convert.BESIDE / "tokenizer.model").unlink()
    convert.to_huggingface(str(tmp_path / "ours"), tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == content


def test_without_a_tokenizer_ids_have_no_text(tmp_path):
    models.tiny("bloom").save_pretrained(tmp_path / "theirs")
    convert.from_huggingface(tmp_path / "theirs", tmp_path / "ours")
    assert checkpoint.read_info(tmp_path / "ours").vocabulary == PassThrough(num_ids=models.VOCAB, eos=2)


def test_a_row_begins_with_the_vocabularys_bos():
    from palmjax.data.batch import PackDocuments

    ends = np.asarray([3, 6])
    layout = PackDocuments().build(6, lambda: ends, 8)
    targets = np.asarray([[5, 6, 2, 7, 8, 2, 0, 0]], np.int32)
    batch = layout.batch(targets, None, np.asarray([0]), np.asarray([6]), bos=1)
    assert batch.tokens.tolist() == [[1, 5, 6, 1, 7, 8, 0, 0]]
