"""`palmjax eval --tasks` as real processes: it survives SIGKILL, is verified, compared, watched and plotted."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image

from palmjax import cli, configure
from palmjax.config import DatasetConfig
from palmjax.data import index
from tests.e2e import jobs

FIXTURES = Path(__file__).parents[1] / "evaluation" / "fixtures"
SUITE = """
include "eval/tasks/piqa.gin"
include "eval/tasks/arc_easy.gin"
include "eval/tasks/lambada.gin"
include "eval/tasks/wikitext.gin"
include "eval/tasks/triviaqa.gin"
TASKS_DIR = %gin.REQUIRED
Records.folder = %TASKS_DIR
PIQA_SHOTS = @Drawn()
Drawn.count = 1
triviaqa/Generate.max_new_tokens = 4
Suite.formats = 3
Suite.tasks = (@piqa/Task(), @arc_easy/Task(), @lambada/Task(), @wikitext/Task(), @triviaqa/Task())
"""


@pytest.fixture(scope="module")
def flags(undisturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    file = tmp_path_factory.mktemp("suite") / "five.gin"
    file.write_text(SUITE)
    return ["eval", "--checkpoint", str(undisturbed), "--tasks", str(file), f"--gin.TASKS_DIR={FIXTURES}"]


@pytest.fixture(scope="module")
def result(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("result")
    text = jobs.verb(*flags, "--output", str(folder))
    assert "requests" in text and "/s)" in text
    assert all(f"\n{task} " in text for task in ("piqa", "arc_easy", "lambada", "wikitext", "triviaqa"))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "answers.jsonl"}


def lines(folder: Path) -> int:
    path = folder / "answers.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_killed_at_five_random_moments_it_writes_the_same_bytes(flags: list[str], result: Path, tmp_path: Path) -> None:
    rng, total = random.Random(11), lines(result)
    for moment in sorted(rng.sample(range(1, total), 5)):
        process = jobs.start(*flags, "--output", str(tmp_path))
        while lines(tmp_path) < moment:
            assert process.poll() is None, process.communicate()[0][-3000:]
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -9
        assert not (tmp_path / "result.json").exists()
    assert 0 < lines(tmp_path) <= total
    with open(tmp_path / "answers.jsonl", "ab") as file:
        file.write(b'["half a li')  # what a kill in the middle of a write leaves
    jobs.verb(*flags, "--output", str(tmp_path))
    assert files(tmp_path) == files(result)
    assert lines(tmp_path) == total


def test_a_result_carries_what_it_depended_on(result: Path) -> None:
    content = json.loads((result / "result.json").read_text())
    manifest = content["manifest"]
    wanted = {
        "checkpoint",
        "tokenizer",
        "tasks",
        "prompts",
        "requests",
        "numerics",
        "code",
        "suite",
        "counters",
        "rules",
    }
    assert wanted <= manifest.keys()
    assert {"dtype", "mesh", "device", "libraries", "scorer", "max_length"} <= manifest["numerics"].keys()
    assert len(manifest["tasks"]["piqa"]["formats"]) == 3 and manifest["tasks"]["piqa"]["count"] == 5
    assert len(content["tasks"]["piqa"]["formats"]["scores"]) == 3
    assert manifest["counters"]["lambada"]["truncated"] == 5  # rows of 64 tokens
    document = json.loads((result / "arc_easy.jsonl").read_text().splitlines()[0])
    assert {"id", "prompt", "shots", "replies", "values", "counts"} <= document.keys()


def test_a_result_is_verified_and_what_changed_is_named(flags: list[str], result: Path, tmp_path: Path) -> None:
    text = jobs.verb("eval", "verify", str(result))
    assert "holds" in text and "32 have the same bits" in text
    moved, folder = tmp_path / "fixtures", tmp_path / "result"
    shutil.copytree(FIXTURES, moved)
    shutil.copytree(result, folder)
    piqa = moved / "piqa" / "validation.jsonl"
    piqa.write_text(piqa.read_text().replace("Keep bread fresh.", "Keep bread soft."))
    content = json.loads((folder / "result.json").read_text())
    lambada = folder / "lambada.jsonl"
    lambada.write_text(lambada.read_text().replace('"replies": [[-', '"replies": [[-1'))
    text = jobs.verb("eval", "verify", str(folder), f"--gin.TASKS_DIR={moved}", "--requests", "200", code=1)
    assert "tasks.piqa.documents" in text and "tasks.arc_easy" not in text
    assert text.count("differs  lambada") == 5
    assert content["manifest"]["tasks"]["piqa"]["documents"] in text


def test_checkpoints_are_compared_on_the_same_documents(flags: list[str], result: Path, tmp_path: Path, capfd) -> None:
    early = ["eval", "--checkpoint", f"{flags[2]}/checkpoint_5", *flags[3:], "--output", str(tmp_path / "early")]
    assert cli.main(early) == 0
    capfd.readouterr()
    assert cli.main(["eval", "compare", str(tmp_path / "early"), str(result)]) == 0
    text = capfd.readouterr().out
    wikitext = text[text.index("wikitext") :].partition("triviaqa")[0]
    assert "B is better" in wikitext and "bootstrap" in wikitext  # fewer bits a byte after 35 more steps
    piqa = text[text.index("piqa") :].partition("arc_easy")[0]
    assert "no ranking" in piqa and "McNemar p" in piqa
    assert cli.main(["eval", "compare", str(result), str(result)]) == 0
    assert "is better" not in capfd.readouterr().out
    limited = [*flags, "--limit", "3", "--output", str(tmp_path / "limited")]
    assert cli.main(limited) == 0
    assert cli.main(["eval", "compare", str(result), str(tmp_path / "limited")]) == 2
    assert "not the same documents" in capfd.readouterr().err


def test_checkpoints_are_evaluated_as_they_appear_and_plotted(
    flags: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    model, folder = tmp_path / "run", tmp_path / "scores"
    for step in (5, 10):
        shutil.copytree(undisturbed / f"checkpoint_{step}", model / f"checkpoint_{step}")
    watched = ["eval", "--checkpoint", str(model), *flags[3:], "--watch", "--output", str(folder), "--limit", "3"]
    process = jobs.start(*watched)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint_10" / "result.json").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][-3000:]
        time.sleep(0.05)
    shutil.copytree(undisturbed / "checkpoint_40", tmp_path / "part")
    (tmp_path / "part").rename(model / "checkpoint_40")
    text = jobs.finish(process, timeout=120)  # the last step of TRAIN_STEPS ends it
    assert [line for line in text.splitlines() if line.startswith("step ") and ":" not in line] == [
        "step 5",
        "step 10",
        "step 40",
    ]
    scores = json.loads((folder / "scores.json").read_text())
    assert list(scores["wikitext"]) == ["5", "10", "40"]
    assert scores["wikitext"]["40"]["value"] < scores["wikitext"]["5"]["value"]
    with Image.open(folder / "scores.png") as image:
        assert image.format == "PNG" and min(image.size) > 300
        assert len(image.convert("L").getcolors() or ()) > 20  # something is drawn


def test_documents_that_the_training_set_holds_are_told_apart(
    flags: list[str], undisturbed: Path, job: jobs.Job, tmp_path: Path, capfd
) -> None:
    """One document's text is a stretch of the training text, at 13 words and more; the others are not in it."""
    dataset = configure.load([str(undisturbed / "config.gin")]).experiment.train_dataset
    assert isinstance(dataset, DatasetConfig)
    sources = index.lookup(dataset)  # the folder holds the stores of other tests' runs too
    assert sources is not None and len(sources) == 1
    store = f"{job.stores}/{sources[0].path}"
    seen = " ".join(Path(job.text).parent.joinpath("000.txt").read_text().split()[40:60])
    unseen = "none of these many words about weather and music stand anywhere in what was read by it"
    rows = [{"text": f"{seen} end"}, {"text": f"{unseen} end"}, {"text": "too short end"}]
    (tmp_path / "lambada").mkdir()
    (tmp_path / "lambada" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [*flags[:5], f"--gin.TASKS_DIR={tmp_path}", "--gin.Suite.tasks=(@lambada/Task(),)", "--gin.Suite.formats=1"]
    given += ["--contamination", store, "--output", str(tmp_path / "out")]
    assert cli.main(given) == 0
    assert "13-grams in the training set: clean" in capfd.readouterr().out
    told = [json.loads(line) for line in (tmp_path / "out" / "lambada.jsonl").read_text().splitlines()]
    assert {row["where"].rpartition(":")[2]: row["contaminated"] for row in told} == {"1": True, "2": False, "3": None}
    found = json.loads((tmp_path / "out" / "result.json").read_text())["tasks"]["lambada"]["contamination"]
    assert found["clean"]["n"] == found["dirty"]["n"] == found["unknown"] == 1


def test_a_run_is_scored_on_tasks_while_it_trains(job: jobs.Job, tmp_path: Path) -> None:
    suite = ["Experiment.infer_eval=@Suite()", f"TASKS_DIR='{FIXTURES}'", "EVAL_PERIOD=20"]
    flags = job.flags(tmp_path / "run", *suite, "TRAIN_STEPS=40")
    text = jobs.verb("train", flags[0], "gin/eval/in_training.gin", *flags[1:])
    rows = [row for row in jobs.metrics(tmp_path / "run", "eval") if row["task"] == "piqa"]
    assert [row["step"] for row in rows] == [20, 40] and all(0 <= row["acc"] <= 1 for row in rows)
    assert "eval piqa at step 20" in text
    # The same scorer, the same parameters: the same number as the verb's.
    alone = ["eval", "--checkpoint", str(tmp_path / "run"), "--tasks", "gin/eval/tasks/piqa.gin"]
    alone += [
        f"--gin.Records.folder={FIXTURES}",
        "--gin.Suite.tasks=(@piqa/Task(),)",
        "--output",
        str(tmp_path / "out"),
    ]
    jobs.verb(*alone)
    found = json.loads((tmp_path / "out" / "result.json").read_text())["tasks"]["piqa"]["metrics"]["acc"]["value"]
    assert found == rows[-1]["acc"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["--gin.SENTENCEPIECE_MODEL=other.model"], "tokenized by the checkpoint's own vocabulary (bytes)"),
        (["--gin.TASKS_DIR=/nowhere"], "Records.files: no file matches '/nowhere/piqa/validation*'"),
        (["--gin.Suite.max_length=2"], "tokens follow the context, and a row has 2"),
        (["--gin.piqa/Task.on_overflow='error'"], "validation.jsonl:3: the prompt has 72 tokens without exemplars"),
        (["--gin.piqa/Task.shot=3"], "Task has no field 'shot'; nearest: shots"),
        (["--limit", "0"], "Suite.limit = 0: must be 1 or more"),
        (["--max_batches", "3"], "--max_batches has no effect with --tasks"),
        (["--contamination", "/nowhere"], "no finished token store at /nowhere"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_evaluated_is_refused_in_a_line(
    flags: list[str], tmp_path: Path, capfd, changed: list[str], words: str
) -> None:
    assert cli.main([*flags, "--output", str(tmp_path / "out"), *changed]) == 2
    text = capfd.readouterr().err
    error = text[text.index("error: ") :].strip()
    assert words in error and "Traceback" not in text and len(error.splitlines()) <= 2, error
    assert not (tmp_path / "out").exists(), "it is refused before anything is asked"


def test_flags_of_tasks_need_tasks(undisturbed: Path, capfd) -> None:
    assert cli.main(["eval", "--checkpoint", str(undisturbed), "--limit", "3"]) == 2
    assert "--limit has no effect without --tasks" in capfd.readouterr().err
    assert cli.main(["eval", "compare", str(undisturbed), "/nowhere"]) == 2
    assert "there is no result" in capfd.readouterr().err
