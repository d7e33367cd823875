"""The conversion itself: what it refuses, what a kill leaves, how much memory it takes, what travels along."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import transformers

from palmjax import checkpoint, cli
from palmjax.checkpoint import seal
from palmjax.checkpoint.arrays import Reader
from palmjax.config import ConfigError
from palmjax.interop import convert, safetensors_files
from palmjax.interop.huggingface import families
from tests.interop import models

ROOT = Path(__file__).parents[2]
LLAMA = "llama 2: grouped queries"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A tiny LLaMA as transformers saves it. Not to be changed."""
    folder = tmp_path_factory.mktemp("source") / "tiny-llama"
    models.tiny(LLAMA).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(source, tmp_path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "tiny-llama"))


# --- what is refused -----------------------------------------------------------------------------------------------


def rewritten(folder: Path, change: Any) -> None:
    """The folder's tensors after `change(dict of arrays)`, written by the safetensors library."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def configured(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)


def renamed(folder: Path) -> None:
    def change(tensors: Any) -> None:
        tensors["model.layers.1.mlp.gat_proj.weight"] = tensors.pop("model.layers.1.mlp.gate_proj.weight")

    rewritten(folder, change)


MISTAKES: dict[str, tuple[Any, list[str]]] = {
    "a wrong name": (renamed, ["model.layers.1.mlp.gate_proj.weight", "[48, 32]", "gat_proj"]),
    "a missing tensor": (
        lambda folder: rewritten(folder, lambda tensors: tensors.pop("model.norm.weight")),
        ["'model.norm.weight'", "[32]", "LlamaForCausalLM"],
    ),
    "a tensor too many": (
        lambda folder: rewritten(folder, lambda tensors: tensors.update(extra=np.zeros(3, np.float32))),
        ["'extra'", "[3]", "model.safetensors"],
    ),
    "a wrong shape": (
        lambda folder: configured(folder, intermediate_size=40),
        ["gate_proj.weight", "[48, 32]", "[40, 32]", "model.safetensors", "config.json"],
    ),
    "a wrong dtype": (
        lambda folder: rewritten(folder, lambda tensors: tensors.update({"model.norm.weight": np.zeros(32, np.int64)})),
        ["'model.norm.weight'", "I64", "F32"],
    ),
    "an 8-bit float": (
        lambda folder: rewritten(
            folder, lambda tensors: tensors.update({"model.norm.weight": np.zeros(32, ml_dtypes.float8_e4m3fn)})
        ),
        ["model.safetensors: 'model.norm.weight'", "F8_E4M3", "BF16"],
    ),
    "a truncated file": (truncated, ["model.safetensors", "truncated", "bytes"]),
    "not a safetensors file": (lambda folder: (folder / "model.safetensors").write_bytes(b"{}"), ["model.safetensors"]),
    "a damaged header": (
        lambda folder: (folder / "model.safetensors").write_bytes((100).to_bytes(8, "little") + b"?" * 200),
        ["model.safetensors", "header"],
    ),
    "no tensors": (lambda folder: (folder / "model.safetensors").unlink(), ["model.safetensors", "config.json"]),
    "an index without its file": (
        lambda folder: (folder / safetensors_files.INDEX).write_text(
            json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}})
        ),
        ["model-00001-of-00002.safetensors", "missing", "model.norm.weight"],
    ),
    "an unknown architecture": (lambda folder: configured(folder, model_type="llamma"), ["'llamma'", "'llama'"]),
    "no architecture": (lambda folder: (folder / "config.json").write_text("{}"), ["model_type"]),
    "a config that is not JSON": (lambda folder: (folder / "config.json").write_text("{"), ["config.json", "JSON"]),
    "a missing size": (lambda folder: configured(folder, hidden_size=None), ["config.json"]),
    "an activation that is not there": (lambda folder: configured(folder, hidden_act="tanh"), ["hidden_act", "'tanh'"]),
    "scaled rotary positions": (
        lambda folder: configured(folder, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4}),
        ["dynamic", "'yarn'", "config.json"],
    ),
    "scaled rotary positions without a number": (
        lambda folder: configured(folder, rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}),
        ["low_freq_factor", "config.json"],
    ),
    "a key that nobody knows": (
        lambda folder: configured(folder, residual_multiplier=0.22, use_cache=True),
        ["residual_multiplier = 0.22", "config.json", "--ignore residual_multiplier"],
    ),
    "a quantised model": (
        lambda folder: configured(folder, quantization_config={"bits": 4}),
        ["quantization_config", "config.json"],
    ),
    "heads rotated in part": (lambda folder: configured(folder, partial_rotary_factor=0.5), ["partial_rotary_factor"]),
    "heads that do not divide": (lambda folder: configured(folder, num_key_value_heads=3), ["num_kv_heads"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_source_that_is_wrong_is_refused_and_nothing_is_left(copy, tmp_path, capfd, mistake):
    change, words = MISTAKES[mistake]
    change(copy)
    assert cli.main(["convert", str(copy), str(tmp_path / "out")]) == 2
    error = capfd.readouterr().err
    error = error[error.index("error: ") :]
    assert len(error.strip().splitlines()) <= 2 and "Traceback" not in error
    assert all(word in error for word in words), error
    assert not (tmp_path / "out").exists()


def test_the_command_line_refuses_what_it_cannot_do(copy, tmp_path, capfd):
    assert cli.main(["convert", str(copy), str(tmp_path / "out")]) == 0
    for arguments, words in (
        ([str(copy), str(tmp_path / "out")], ["already holds checkpoint_0"]),
        (["/nowhere", str(tmp_path / "new")], ["/nowhere"]),
        ([str(tmp_path / "out"), str(copy)], ["not empty"]),
        ([str(tmp_path / "out"), str(tmp_path / "new"), "--model_type", "gpt2"], ["gpt2", "'llama'"]),
        ([str(tmp_path / "out"), str(tmp_path / "new"), "--max_shard_size", "big"], ["--max_shard_size=big"]),
        ([str(copy), str(tmp_path / "new"), "--to", "huggingface"], ["convert to palmjax first"]),
        ([str(copy), str(tmp_path / "new"), "--gin.RMSNorm.epsilon=1e-3"], ["another model"]),
    ):
        assert cli.main(["convert", *arguments]) == 2
        error = capfd.readouterr().err
        assert all(word in error for word in words), error
        assert not (tmp_path / "new").exists()


def test_an_unknown_key_may_be_passed_over(copy, tmp_path):
    configured(copy, residual_multiplier=0.22)
    out, back = str(tmp_path / "out"), str(tmp_path / "back")
    assert cli.main(["convert", str(copy), out, "--ignore", "residual_multiplier"]) == 0
    assert cli.main(["convert", out, back]) == 0
    assert json.loads((tmp_path / "back" / "config.json").read_text())["residual_multiplier"] == 0.22


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: family.model_type)
def test_every_key_of_transformers_own_configuration_has_a_known_meaning(family):
    """A key that a later version adds fails here, before it can change a model unseen."""
    defaults = transformers.AutoConfig.for_model(family.model_type).to_dict()
    family.model(defaults, "its defaults")


def test_a_checkpoint_of_no_family_is_refused(copy, tmp_path, capfd):
    """Soft-capped scores are in none of the eight."""
    assert cli.main(["convert", str(copy), str(tmp_path / "out")]) == 0
    info = tmp_path / "out" / "checkpoint_0" / "info" / "metadata"
    value = json.loads(info.read_text())
    value["config"] = value["config"].replace("Attention.soft_cap = None", "Attention.soft_cap = 30.0")
    info.write_text(json.dumps(value))
    seal.write(tmp_path / "out" / "checkpoint_0")
    shutil.rmtree(tmp_path / "out" / convert.BESIDE)
    capfd.readouterr()
    assert cli.main(["convert", str(tmp_path / "out"), str(tmp_path / "new")]) == 2
    assert "no family of transformers" in capfd.readouterr().err
    assert not (tmp_path / "new").exists()


# --- the result ----------------------------------------------------------------------------------------------------


def test_the_checkpoint_is_what_orbax_itself_writes(source, tmp_path):
    convert.from_huggingface(source, tmp_path / "out")
    state = tmp_path / "out" / "checkpoint_0" / "state"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
        tree = orbax.restore(state)
        orbax.save(tmp_path / "orbax", args=ocp.args.PyTreeSave(tree))
    theirs, ours = (json.loads((folder / "_METADATA").read_text()) for folder in (tmp_path / "orbax", state))
    assert ours == theirs
    one, other = Reader(state), Reader(tmp_path / "orbax")
    assert one.names == other.names and one.names
    for name in one.names:
        np.testing.assert_array_equal(one.open(name).read().result(), other.open(name).read().result())


def test_tensors_written_here_are_read_by_the_safetensors_library(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"a{i}": rng.standard_normal((i + 1, 7)).astype(np.float32) for i in range(5)}
    wanted = [(name, "F32", array.shape) for name, array in arrays.items()]
    placed = safetensors_files.create(tmp_path, wanted, max_shard_bytes=200)
    mapped = safetensors_files.Mapped(placed, writable=True)
    for name, array in arrays.items():
        mapped.array(name)[...] = array
    index = json.loads((tmp_path / safetensors_files.INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    for name, file in index["weight_map"].items():
        np.testing.assert_array_equal(safetensors.numpy.load_file(tmp_path / file)[name], arrays[name])
    assert safetensors_files.read_folder(tmp_path) == placed


# --- killed --------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from palmjax.interop import convert, staging
finished, count = staging.Staging.finished, 0
def counting(self, parts):
    global count
    finished(self, parts)
    count += len(list(parts))
    if count >= 5:
        os.kill(os.getpid(), signal.SIGKILL)
staging.Staging.finished = counting
from palmjax.interop import transfer
transfer.IN_FLIGHT_BYTES = 1
from palmjax import cli
cli.main(sys.argv[1:])
"""


def killed(*arguments: str) -> None:
    """The verb, killed behind its fifth tensor."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", KILLED, "convert", *arguments], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL


def test_a_killed_conversion_goes_on_and_looks_half_written_until_then(source, tmp_path, capfd):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    convert.from_huggingface(source, whole)
    killed(str(source), str(cut))
    with pytest.raises(ConfigError, match="no whole checkpoint"):
        checkpoint.read_info(cut)
    progress = (cut / "checkpoint_0.progress").read_text().splitlines()
    assert 5 <= len(progress) - 1 < 21
    array = next((cut / "checkpoint_0.converting" / "state" / "d").iterdir())
    before = array.stat().st_mtime_ns
    convert.from_huggingface(source, cut)
    assert (cut / "checkpoint_0" / "state" / "d" / array.name).stat().st_mtime_ns == before, "written again"
    assert sorted(path.name for path in cut.iterdir()) == sorted(path.name for path in whole.iterdir())
    one, other = (Reader(folder / "checkpoint_0" / "state") for folder in (whole, cut))
    for name in one.names:
        np.testing.assert_array_equal(one.open(name).read().result(), other.open(name).read().result())

    killed(str(whole), str(tmp_path / "back"))
    assert not (tmp_path / "back").exists()
    convert.to_huggingface(str(whole), tmp_path / "back")
    want = safetensors.numpy.load_file(source / "model.safetensors")
    found = safetensors.numpy.load_file(tmp_path / "back" / "model.safetensors")
    assert found.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_array_equal(found[name], array)
    assert not list(tmp_path.glob("back.*"))


def test_another_source_begins_anew(source, tmp_path):
    killed(str(source), str(tmp_path / "out"))
    other = Path(shutil.copytree(source, tmp_path / "other"))
    rewritten(other, lambda tensors: tensors.update({name: array + 1 for name, array in tensors.items()}))
    convert.from_huggingface(other, tmp_path / "out")
    reader = Reader(tmp_path / "out" / "checkpoint_0" / "state")
    table = safetensors.numpy.load_file(other / "model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(reader.open("params.token_embedder.embedding").read().result(), table)


# --- memory --------------------------------------------------------------------------------------------------------

MEASURED = """
import sys, threading, time
import psutil
from palmjax import cli
import palmjax.interop.convert, palmjax.checkpoint, orbax.checkpoint, palmjax.configure
process, peak = psutil.Process(), 0
# A small one first: what is imported and allocated once is not the conversion's.
assert cli.main(["convert", sys.argv[1], sys.argv[2] + "/warm"]) == 0
assert cli.main(["convert", sys.argv[2] + "/warm", sys.argv[2] + "/warm-back"]) == 0
def watch():
    global peak
    while True:
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
for source, target in ((sys.argv[3], sys.argv[2] + "/big"), (sys.argv[2] + "/big", sys.argv[2] + "/back")):
    before = peak = process.memory_info().rss
    assert cli.main(["convert", source, target]) == 0
    print("GROWTH", peak - before)
"""


def big(folder: Path, vocab: int = 49_152, width: int = 1024) -> int:
    """A GPT-2 whose token table is most of it, written block by block. Returns the table's bytes."""
    folder.mkdir()
    sizes = {"vocab_size": vocab, "n_embd": width, "n_layer": 1, "n_head": 8, "n_positions": 8, "n_inner": 64}
    config = sizes | {"model_type": "gpt2", "tie_word_embeddings": False, "eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(config))
    from palmjax.interop.huggingface.gpt import GPT2

    planned = GPT2.plan(GPT2.model(config, "here"))
    placed = safetensors_files.create(folder, [(t.name, "F32", t.shape) for t in planned.values()], 1 << 40)
    mapped = safetensors_files.Mapped(placed, writable=True)
    rng = np.random.default_rng(0)
    row = rng.standard_normal(width).astype(np.float32)
    for name, tensor in placed.items():
        mapped.array(name)[...] = row[0] if name.endswith("bias") else np.resize(row, tensor.shape[-1])
    return 4 * vocab * width


@pytest.mark.slow
def test_host_memory_grows_by_less_than_the_largest_tensor_and_a_fifth(source, tmp_path):
    """Both directions, with the transposed head as large as the table; measured in a process of its own."""
    largest = big(tmp_path / "source")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MEASURED, str(source), str(tmp_path), str(tmp_path / "source")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    growth = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("GROWTH")]
    assert len(growth) == 2
    print(f"largest tensor {largest / 1e6:.0f} MB; grown by {', '.join(f'{g / 1e6:.0f}' for g in growth)} MB")
    assert max(growth) < 1.2 * largest


# --- files of earlier days -----------------------------------------------------------------------------------------


def test_tensors_without_the_prefix_and_with_buffers_of_old_versions(tmp_path):
    """As the hub's oldest GPT-2 files have them: no `transformer.`, masks stored, the tied head stored too."""
    models.tiny("gpt2").save_pretrained(tmp_path / "theirs")
    convert.from_huggingface(tmp_path / "theirs", tmp_path / "new")

    def old(tensors: Any) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["lm_head.weight"] = tensors["wte.weight"]
        for layer in range(2):
            tensors[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 128, 128), np.uint8))
            tensors[f"h.{layer}.attn.masked_bias"] = np.full((), -1e4, np.float32)

    rewritten(tmp_path / "theirs", old)
    convert.from_huggingface(tmp_path / "theirs", tmp_path / "old")
    one, other = (Reader(tmp_path / name / "checkpoint_0" / "state") for name in ("new", "old"))
    for name in one.names:
        np.testing.assert_array_equal(one.open(name).read().result(), other.open(name).read().result())


OLD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": (
        {"model_type": "bloom", "vocab_size": 97, "n_embed": 32, "n_layer": 2, "num_attention_heads": 4},
        "bloom",
    ),
    "llama": (
        {"model_type": "llama", "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"num_key_value_heads": 2, "intermediate_size": 48, "rope_theta": 1e4, "torch_dtype": "float32"}
        | {"rope_scaling": None, "pretraining_tp": 1, "rms_norm_eps": 1e-5},
        LLAMA,
    ),
    "gpt_neox": (
        {"model_type": "gpt_neox", "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "rotary_pct": 0.25}
        | {"num_attention_heads": 2, "intermediate_size": 48, "rotary_emb_base": 10000},
        "gpt_neox: rotation of a part, two norms",
    ),
    "falcon": (
        {"model_type": "falcon", "vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4, "multi_query": True},
        "falcon 7b: multi-query, one norm",
    ),
}


@pytest.mark.parametrize("name", OLD_CONFIGS)
def test_configurations_of_old_versions_mean_the_same(tmp_path, name):
    config, case = OLD_CONFIGS[name]
    models.tiny(case).config.save_pretrained(tmp_path)
    now = json.loads((tmp_path / "config.json").read_text())
    family = families.named(name, "here")
    assert family.model(config, "old") == family.model(now, "new")
