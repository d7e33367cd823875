"""Every shipped model has the published architecture's parameters, to the last digit where its arithmetic gives one."""

from __future__ import annotations

import functools
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from palmjax import configure, zoo
from palmjax.config import ConfigError
from palmjax.models import account
from palmjax.models.decoder import Decoder

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "models"
FILES = sorted(path.stem for path in (ROOT / "gin" / "models").glob("*.gin"))
FAMILIES = {
    *("bert", "bloom", "falcon", "glam", "glam_moe", "gopher", "gpt2", "gpt3", "llama", "llama2", "opt", "palm"),
}
"""Files that need a size."""
OURS = {"palm_nano", "palm_pico", "maxtext"}
"""Models that nobody published a count of."""

TOTALS = {
    "palm_8b": 8_632_012_800,
    "palm_62b": 62_495_662_080,
    "palm_540b": 540_356_474_880,
    "gopher_44m": 43_646_976,
    "gopher_117m": 116_588_544,
    "gopher_417m": 417_202_176,
    "gopher_1_4b": 1_374_158_848,
    "gopher_7_1b": 7_110_393_856,
    "gopher_280b": 279_697_162_240,
    "chinchilla_70b": 70_055_362_560,
    "gpt2_small": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "gpt3_small": 125_226_240,
    "gpt3_medium": 355_871_744,
    "gpt3_large": 760_300_032,
    "gpt3_xl": 1_315_723_264,
    "gpt3_2_7b": 2_651_553_280,
    "gpt3_6_7b": 6_658_404_352,
    "gpt3_13b": 12_853_386_240,
    "gpt3_175b": 174_604_259_328,
    "mt_nlg_530b": 529_600_819_200,
    "opt_125m": 125_239_296,
    "opt_350m": 331_196_416,
    "opt_1_3b": 1_315_758_080,
    "opt_2_7b": 2_651_596_800,
    "opt_6_7b": 6_658_473_984,
    "opt_13b": 12_853_473_280,
    "opt_30b": 29_974_540_288,
    "opt_66b": 65_719_701_504,
    "opt_175b": 174_604_468_224,
    "bloom_560m": 559_214_592,
    "bloom_1_1b": 1_065_314_304,
    "bloom_1_7b": 1_722_408_960,
    "bloom_3b": 3_002_557_440,
    "bloom_7_1b": 7_069_016_064,
    "bloom_176b": 176_247_271_424,
    "falcon_7b": 6_921_720_704,
    "falcon_40b": 41_303_293_952,
    "falcon_180b": 178_557_088_768,
    "gpt_j_6b": 6_050_882_784,
    "gpt_neox_20b": 20_554_567_680,
    "llama_7b": 6_738_415_616,
    "llama_13b": 13_015_864_320,
    "llama_33b": 32_528_943_616,
    "llama_65b": 65_285_660_672,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "mistral_7b": 7_241_732_096,
    "bert_base": 109_482_240,
    "bert_large": 335_141_888,
    "glam_137b": 137_702_416_384,
}
"""Parameters as each source counts them, from its own formula (GLaM 137B: lingvo's DenseLm128B8x8)."""

EXPERTS = {  # file -> total and active parameters by the formula of the paper's table 4, to the digits that it gives
    "glam_0_1b": (137.8e6, 137.8e6),
    "glam_0_1b_64e": (1.908e9, 152e6),
    "glam_1_7b": (1.676e9, 1.676e9),
    "glam_1_7b_32e": (13.96e9, 1.878e9),
    "glam_1_7b_64e": (26.84e9, 1.879e9),
    "glam_1_7b_128e": (52.61e9, 1.881e9),
    "glam_1_7b_256e": (104.2e9, 1.884e9),
    "glam_8b": (8.721e9, 8.721e9),
    "glam_8b_64e": (142.9e9, 9.799e9),
    "glam_64b_64e": (1.162e12, 96.60e9),
}


@functools.cache
def load(file: str) -> Decoder:
    model = configure.load_model([f"models/{file}.gin"])
    assert isinstance(model, Decoder)
    return model


@functools.cache
def entries() -> dict[str, zoo.Entry]:
    return {row.file: zoo.entry(row, load(row.file)) for row in zoo.ROWS}


def test_every_model_file_has_a_row_and_every_row_a_total() -> None:
    assert sorted({*FAMILIES, *OURS, *entries()}) == FILES
    assert sorted(entries()) == sorted({*TOTALS, *EXPERTS})


@pytest.mark.parametrize("file", TOTALS)
def test_totals_are_exact(file: str) -> None:
    assert entries()[file].counted == TOTALS[file]


@pytest.mark.parametrize("file", EXPERTS)
def test_experts_are_the_published_ones(file: str) -> None:
    one, (total, active) = entries()[file], EXPERTS[file]
    layers = load(file).num_layers
    assert one.counted == pytest.approx(total, rel=5e-4)
    # The active parameters of 0.1B/64E are given to three digits.
    assert one.cost.active_parameters == pytest.approx(active, rel=2e-3 if file == "glam_0_1b_64e" else 5e-4)
    # L 4dhk + (L/2) 3dH + (L/2) (E 2dH + dE) + Vd, and what the formula leaves out: norms and buckets.
    config, first = load(file), load(file).block.layers[0]
    d, width, projections = config.d_model, first.mlp.d_ff, 4 * first.attention.num_heads * first.attention.head_dim
    experts = int(file.rpartition("_")[2][:-1]) if file.endswith("e") else None
    half = 3 * d * width if experts is None else experts * (2 * d * width + d)
    formula = layers * d * projections + layers // 2 * (3 * d * width + half) + config.vocab_size * d
    assert one.counted == formula


def test_falcon_180b_with_its_head_stored_apart_is_the_published_count() -> None:
    model = load("falcon_180b")
    assert TOTALS["falcon_180b"] + model.vocab_size * model.d_model == 179_522_565_120


def test_gpt_j_with_the_copies_of_its_shards_is_the_published_count() -> None:
    d, layers, shards = 4096, 28, 8
    copies = (shards - 1) * (layers * (2 * d + d) + 2 * d)
    assert TOTALS["gpt_j_6b"] + copies + shards * d == 6_053_381_344


def test_published_figures_agree_but_where_the_source_contradicts_itself() -> None:
    for one in entries().values():
        if one.row.file.startswith(("gpt2", "opt_350m")):
            continue  # nominal sizes
        assert abs(one.difference) < 0.04 or not one.row.consistent, one.row
    assert {file for file, one in entries().items() if not one.row.consistent} == {
        *("gpt3_xl", "gpt3_13b", "glam_0_1b", "glam_0_1b_64e", "glam_1_7b_32e"),
    }
    assert all(one.row.note for one in entries().values() if not one.row.consistent)


def test_bytes_and_optimal_tokens_are_the_published_ones() -> None:
    kv = {file: one.cost.kv_bytes_per_token for file, one in entries().items()}
    assert (kv["palm_540b"], kv["gpt3_175b"], kv["llama2_70b"]) == (120_832, 4_718_592, 327_680)
    # Hoffmann et al. 2022, table 3.
    for parameters, tokens in ((400e6, 8.0e9), (1e9, 20.2e9), (10e9, 205.1e9), (175e9, 3.7e12), (1e12, 21.2e12)):
        assert zoo.optimal_tokens(parameters) == pytest.approx(tokens, rel=0.02)
    assert entries()["glam_8b_64e"].optimal_tokens is None
    assert entries()["bert_base"].optimal_tokens is None


@pytest.mark.parametrize("file", ["gpt3_small", "opt_350m", "glam_0_1b_64e", "bert_base", "gopher_44m", "gpt_j_6b"])
def test_counted_shapes_are_those_of_the_parameters_that_init_makes(file: str) -> None:
    model = load(file).build()
    made = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), made) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), model.abstract_params()
    )
    assert account.count(made) == entries()[file].cost.parameters + entries()[file].cost.vocabulary_padding


@pytest.mark.parametrize("file", [file for file in FILES if file not in FAMILIES])
def test_model_resolves_as_recorded(file: str) -> None:
    text, golden = configure.describe(load(file)), GOLDEN / f"{file}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert golden.exists(), f"no record of gin/models/{file}.gin: run this file with UPDATE_GOLDEN=1"
    assert text.splitlines() == golden.read_text().splitlines()


def test_no_record_is_left_over() -> None:
    assert sorted(path.stem for path in GOLDEN.glob("*.txt")) == [file for file in FILES if file not in FAMILIES]


def test_operative_file_of_layers_in_turn_reproduces_them(tmp_path: Path) -> None:
    files = ["run/train.gin", "optim/adamw_cosine.gin", "data/python_stdlib.gin", "models/glam_0_1b_64e.gin"]
    bindings = ["MODEL_DIR=run", "TRAIN_STEPS=9000", "TASK_FEATURE_LENGTHS={'targets': 8}"]
    loaded = configure.load(files, bindings)
    (tmp_path / "config.gin").write_text(loaded.operative)
    assert configure.load([str(tmp_path / "config.gin")]).experiment == loaded.experiment
    assert loaded.experiment.model == load("glam_0_1b_64e")


def test_a_family_without_a_size_says_what_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"not set: .*Decoder\.num_layers"):
        configure.load_model(["models/llama.gin"])
    with pytest.raises(ConfigError, match="MODEL"):
        configure.load_model(["optim/palm_adafactor.gin"])
    with pytest.raises(ConfigError, match="no effect"):
        configure.load_model(["models/llama_7b.gin"], ["MLP.d_ff=3"])


def palmjax_models(*arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """The process, and the CPU seconds it took: wall time would measure what else the machine does."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    command = [sys.executable, "-m", "palmjax", "models", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done, spent() - before


def test_the_table_is_printed_in_seconds() -> None:
    found = [palmjax_models() for _ in range(2)]
    text = found[0][0].stdout
    assert found[0][0].returncode == 0, found[0][0].stderr
    assert min(seconds for _, seconds in found) < 5.0
    for one in entries().values():
        line = next(line for line in text.splitlines() if line.startswith(f"{one.row.name} "))
        assert f"{one.counted:,}" in line
        assert ("inconsistent" in line) == (not one.row.consistent)


def test_json_has_every_figure_and_names_select() -> None:
    done, _ = palmjax_models("--json", "llama2_70b")
    (record,) = map(json.loads, done.stdout.splitlines())
    assert record["counted"] == record["parameters"] == 68_976_648_192
    assert record["kv_bytes_per_token"] == 327_680
    assert record["difference"] == pytest.approx(68_976_648_192 / 68_976_653_312 - 1)
    assert record["flops_per_token"] == pytest.approx(6 * 68_976_648_192 + 12 * 80 * 64 * 128 * 4096)
    done, _ = palmjax_models("gpt5")
    assert done.returncode == 2
    assert "no shipped model is named like gpt5" in done.stderr
