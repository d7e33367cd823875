"""Answers on disk: by content, append-only, and the same bytes whatever was killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from palmjax.config import ConfigError
from palmjax.evaluation.schedule import Request
from palmjax.evaluation.store import Answer, Store

ROOT = Path(__file__).parents[2]
ONE, OTHER = Request((1, 2), (3,)), Request((1,), (2, 3))

WORKER = """
import sys, time
import jax
from palmjax.evaluation.run import Scorer, ScorerConfig
from palmjax.evaluation.store import Store
from tests.evaluation.test_run import questions
from tests.models.families import FAMILIES, parameters

config = FAMILIES["falcon_7b"]
model, params = config.build(), parameters(config)
scorer = Scorer(model, params, config=ScorerConfig(rows=4))
with Store(sys.argv[1], scorer.identity(params)) as store:
    print("begins with", len(store), flush=True)
    scorer.score(questions(30), lambda done, total: time.sleep(0.01), kept=store)
    print("ends with", len(store), flush=True)
"""


def start(path: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WORKER, str(path)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
@pytest.mark.e2e
def test_killed_at_five_random_moments_the_file_is_that_of_an_undisturbed_run(tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed.jsonl", tmp_path / "killed.jsonl"
    text, _ = start(undisturbed).communicate(timeout=300)
    assert "ends with 90" in text, text
    whole = undisturbed.read_bytes()
    rng, sizes = random.Random(0), [0]
    for number in range(1, 6):
        process = start(killed)
        # At a random moment behind the last one's: some answers more, and mid-step.
        wanted = max(sizes[-1], len(whole) * number // 7) + rng.randint(1, len(whole) // 20)
        while process.poll() is None and (not killed.exists() or killed.stat().st_size < wanted):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        text, _ = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, text
        sizes.append(killed.stat().st_size)
        assert whole.startswith(killed.read_bytes())
        if number == 3:  # and once in the middle of a line
            with killed.open("r+b") as file:
                file.truncate(sizes[-1] - 7)
            sizes[-1] -= 7
    assert len(set(sizes)) == 6 and sizes[-1] < len(whole)
    text, _ = start(killed).communicate(timeout=300)
    assert "begins with 0" not in text and "ends with 90" in text, text
    assert killed.read_bytes() == whole


def test_an_answer_is_found_by_its_content_alone(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with Store(path, "a model") as store:
        store.put(ONE, Answer(-1.25, True, 1))
        store.put_text((1, 2), "greedy", "x \ud83d")
        assert store.get(ONE) == Answer(-1.25, True, 1)
        assert store.get(OTHER) is None, "other tokens are conditioned on"
        assert store.get_text((1, 2), "greedy") == "x \ud83d"
        assert store.get_text((1, 2), "sampled") is None and store.get_text((1,), "greedy") is None
    with Store(path, "another model") as store:
        assert len(store) == 2 and store.get(ONE) is None and store.get_text((1, 2), "greedy") is None
        store.put(ONE, Answer(-2.5, False, 1))
    with Store(path, "a model") as store:
        assert len(store) == 3 and store.get(ONE) == Answer(-1.25, True, 1)
        before = path.read_bytes()
        store.put(ONE, Answer(-9.0, False, 1))
        assert path.read_bytes() == before, "what is written stays"


def test_log_likelihoods_keep_their_bits(tmp_path: Path) -> None:
    values = [-0.1 * 3, -1e-300, -123456.789012345678, -(2**-1074)]
    with Store(tmp_path / "answers.jsonl", "m") as store:
        for number, value in enumerate(values):
            store.put(Request((number,), (1,)), Answer(value, False, 1))
    with Store(tmp_path / "answers.jsonl", "m") as store:
        found = [store.get(Request((number,), (1,))) for number in range(len(values))]
    assert [answer and answer.log_likelihood.hex() for answer in found] == [value.hex() for value in values]


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "answers.jsonl"
    with Store(path, "m") as store:
        store.put(ONE, Answer(-1.0, True, 1))
        first = path.read_bytes()
        store.put(OTHER, Answer(-2.0, True, 2))
    path.write_bytes(path.read_bytes()[:-cut])
    with Store(path, "m") as store:
        assert store.get(ONE) is not None and store.get(OTHER) is None
        assert path.read_bytes() == first


def test_damage_elsewhere_is_named(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"key": "a", "text": "b"}\nnot json\n{"key": "c", "text": "d"}\n')
    with pytest.raises(ConfigError, match=r"answers.jsonl:2 is damaged"):
        Store(path, "m")
    path.write_text(json.dumps(["a list"]) + "\n")
    with pytest.raises(ConfigError, match=r"answers.jsonl:1 is damaged"):
        Store(path, "m")


def test_one_process_at_a_time_and_a_folder_that_can_be_written(tmp_path: Path) -> None:
    with (
        Store(tmp_path / "answers.jsonl", "m"),
        pytest.raises(ConfigError, match="is being written by another process"),
    ):
        Store(tmp_path / "answers.jsonl", "m")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can't be written"):
        Store(tmp_path / "file" / "answers.jsonl", "m")
