"""Families and objectives trained from gin files by the command line: text to checkpoint, scored and continued."""

from __future__ import annotations

from pathlib import Path

import pytest

from palmjax import cli
from tests.e2e import jobs

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
COMMON = str(Path(__file__).parent / "families.gin")


def train(job, folder, files, *bindings) -> int:
    given = [f"MODEL_DIR={folder}", f"TRAIN_FILES={job.text}", f"STORE_DIR={job.stores}", *bindings]
    return cli.main(["train", COMMON, *files, *(f"--gin.{binding}" for binding in given)])


def losses(folder) -> list[float]:
    return [row["loss"] for row in jobs.metrics(folder)]


RUNS = {
    "bert": (
        ["models/bert.gin", "objectives/masked_lm.gin"],
        ["VOCAB_SIZE=260", "MLP.d_ff=128", "MaskedLM.length=96", "LearnedPositions.length=96"],
    ),
    "ul2": (
        ["models/llama.gin", "objectives/ul2.gin"],
        ["VOCAB_SIZE=387", "SwiGLU.d_ff=96", "MixtureOfDenoisers.length=64"],
    ),
    "experts": (
        ["models/glam_moe.gin", "mesh/fsdp.gin"],
        [
            *("VOCAB_SIZE=259", "MLP.d_ff=64", "GEGLU.d_ff=96", "Experts.num_experts=4"),
            *("MeshConfig.fsdp=2", "MeshConfig.expert=4", "Experts.capacity_factor=1.0"),
        ],
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_family_learns_and_is_scored(name, job, tmp_path, capfd):
    files, bindings = RUNS[name]
    folder = tmp_path / "run"
    assert train(job, folder, files, *bindings) == 0
    found = losses(folder)
    assert sum(found[-5:]) < 0.8 * sum(found[:5]), found
    last = jobs.metrics(folder)[-1]
    assert ("dropped_share" in last) == (name == "experts")
    if name == "experts":
        assert 0.0 < last["dropped_share"] < 0.6
        assert 0.01 * 0.9 < last["aux_loss"] < 0.04
    capfd.readouterr()
    assert cli.main(["eval", "--checkpoint", str(folder)]) == 0
    assert "loss" in capfd.readouterr().out
    code = cli.main(["generate", "--checkpoint", str(folder), "--prompt", "the model", "--max_new_tokens", "4"])
    out, error = capfd.readouterr()
    if name == "bert":
        assert code == 2 and "encoder" in error
    else:
        assert code == 0 and out.startswith("the model")


def test_bert_on_rows_of_next_tokens_is_refused(job, tmp_path, capfd):
    bindings = ["VOCAB_SIZE=260", "MLP.d_ff=128"]
    assert train(job, tmp_path / "run", ["models/bert.gin"], *bindings) == 2
    assert "PackPairs" in capfd.readouterr().err
