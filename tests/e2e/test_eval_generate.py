"""`palmjax eval` and `palmjax generate` on a trained checkpoint: other meshes, equal numbers, and what they refuse."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palmjax import cli, configure, trained
from palmjax.checkpoint import read_info
from tests.decode.models import by_full_forward_passes
from tests.e2e import jobs

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

FOUR = ("--gin.MeshConfig.data=1", "--gin.MeshConfig.fsdp=4")
SQUARE = ("--gin.MeshConfig.data=2", "--gin.MeshConfig.tensor=2")


def evaluated(*arguments: str, **options: Any) -> dict[str, Any]:
    """The line of JSON of `palmjax eval`, run as a process."""
    return json.loads(jobs.verb("eval", "--json", *arguments, **options).splitlines()[-1])


def generated(*arguments: str, **options: Any) -> list[dict[str, Any]]:
    """The lines of JSON of `palmjax generate`, run as a process."""
    text = jobs.verb("generate", "--json", *arguments, **options)
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def test_eval_gives_the_numbers_of_training_on_any_mesh(undisturbed, tmp_path):
    (last,) = [row for row in jobs.metrics(undisturbed, "eval") if row["step"] == 40]
    output = tmp_path / "numbers.jsonl"
    one = evaluated("--checkpoint", str(undisturbed), "--output", str(output))
    assert one["step"] == 40 and one["checkpoint"] == str(undisturbed / "checkpoint_40")
    assert json.loads(output.read_text()) == one
    others = [
        evaluated("--checkpoint", str(undisturbed / "checkpoint_40"), *FOUR, devices=4),
        evaluated("--checkpoint", str(undisturbed), *SQUARE, "--batch_size", "6", devices=4),
        last,
    ]
    for other in others:
        assert (other["tokens"], other["bytes"]) == (one["tokens"], one["bytes"])
        for name in ("loss", "bits_per_byte", "accuracy", "z"):
            assert other[name] == pytest.approx(one[name], rel=1e-5), name


def test_two_processes_give_the_numbers_of_one(undisturbed):
    def launched(verb: str, *flags: str) -> str:
        """What process 0 prints on standard output; the launcher puts its number before each line."""
        command = [sys.executable, "-m", "launch.local", "--processes", "2", "--devices", "2", "--", verb]
        given = [*command, "--checkpoint", str(undisturbed), *SQUARE, *flags]
        done = subprocess.run(given, env=jobs.environment(), cwd=jobs.ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        (line,) = [line for line in done.stdout.splitlines() if "] {" in line]
        assert line.startswith("[0] ")
        return line.removeprefix("[0] ")

    one, two = evaluated("--checkpoint", str(undisturbed)), json.loads(launched("eval", "--json"))
    assert (two["tokens"], two["bytes"]) == (one["tokens"], one["bytes"])
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    flags = ["--prompt", "the ", "--max_new_tokens", "32"]
    (text,) = generated("--checkpoint", str(undisturbed), *flags)
    assert json.loads(launched("generate", "--json", *flags))["tokens"] == text["tokens"]


def test_eval_prints_for_people_and_takes_any_checkpoint(undisturbed, capfd):
    assert cli.main(["eval", "--checkpoint", str(undisturbed / "checkpoint_5"), "--max_batches", "2"]) == 0
    early = capfd.readouterr().out
    assert "checkpoint_5 (step 5) on text_files (validation)" in early
    loss = float(early.split("held-out loss")[1].split()[0])
    assert loss > jobs.metrics(undisturbed, "eval")[-1]["loss"] + 0.5, "35 steps more should have helped"
    for name in ("bits per byte", "token accuracy", "tokens", "bytes"):
        assert name in early


def test_greedy_continuations_are_those_of_full_forward_passes_on_any_mesh(undisturbed):
    prompts = ["the model ", "", "learns what follows"]
    flags = ["--checkpoint", str(undisturbed), "--max_new_tokens", "48"]
    flags += [flag for prompt in prompts for flag in ("--prompt", prompt)]
    one = generated(*flags)
    assert [record["prompt"] for record in one] == prompts
    info = read_info(undisturbed)
    opened = trained.open_checkpoint(
        str(undisturbed / "checkpoint_40"), info, configure.load([str(undisturbed / "config.gin")]).experiment
    )
    # By way of numpy, so that no mesh comes with them.
    params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), opened.params())
    want, log_probs = by_full_forward_passes(opened.model, params, [info.vocabulary.encode(p) for p in prompts], 48)
    for row, record in enumerate(one):
        count = len(record["tokens"])
        assert record["tokens"] == want[row, :count].tolist()
        assert record["finished"] == (1 in want[row]) and (count == 48 or record["finished"])
        np.testing.assert_allclose(record["log_probs"], log_probs[row, :count], rtol=1e-4, atol=1e-4)
        assert record["continuation"] == info.vocabulary.decode(record["tokens"])
    other = generated(*flags, *SQUARE, devices=4)
    assert [record["tokens"] for record in other] == [record["tokens"] for record in one]


def test_draws_are_repeatable_and_prompts_come_from_files_too(undisturbed, tmp_path, capfd):
    (tmp_path / "prompt.txt").write_text("a row of tokens ")
    flags = ["generate", "--checkpoint", str(undisturbed), "--max_new_tokens", "24", "--temperature", "0.9"]
    flags += ["--top_k", "12", "--top_p", "0.9", "--prompt", "the ", "--prompt_file", str(tmp_path / "prompt.txt")]

    def run(*more: str) -> tuple[str, str]:
        assert cli.main([*flags, *more]) == 0
        return capfd.readouterr()

    text, notes = run("--seed", "3")
    assert text.startswith("--- prompt 1 of 2 ---\nthe ") and "--- prompt 2 of 2 ---\na row of tokens " in text
    assert "tokens in" in notes and "trained on" not in notes
    assert run("--seed", "3")[0] == text != run("--seed", "4")[0]


def test_searches_and_stop_strings_are_flags(undisturbed, capfd):
    flags = ["generate", "--json", "--checkpoint", str(undisturbed), "--max_new_tokens", "40", "--prompt", "the "]

    def run(*more: str) -> dict[str, Any]:
        assert cli.main([*flags, *more]) == 0
        return json.loads(capfd.readouterr().out)

    greedy = run()
    beams = run("--beams", "3", "--length_penalty", "0")
    assert sum(beams["log_probs"]) >= sum(greedy["log_probs"])
    assert run("--contrastive", "0.6", "--top_k", "3")["continuation"] != greedy["continuation"]
    stop = greedy["continuation"][5:8]
    cut = run("--stop", "never", "--stop", stop)
    assert cut["finished"] and cut["continuation"] == greedy["continuation"].split(stop)[0]


def test_a_prompt_longer_than_the_rows_of_training_is_kept_whole_and_noted(undisturbed, capfd):
    prompt = "the model reads a row of tokens and learns what follows from before the row ends"
    assert cli.main(["generate", "--checkpoint", str(undisturbed), "--prompt", prompt, "--max_new_tokens", "8"]) == 0
    text, notes = capfd.readouterr()
    assert text.startswith(prompt) and len(text.rstrip("\n")) > len(prompt)
    assert "89 tokens in a row" in notes and "trained on rows of 64" in notes


def test_neither_verb_needs_seqio_once_the_store_is_built(undisturbed):
    program = (
        "import sys\n"
        "sys.modules.update(seqio=None, tensorflow=None)\n"
        "from palmjax import cli\n"
        f"flags = ['--checkpoint', {str(undisturbed)!r}]\n"
        "assert cli.main(['eval', *flags, '--max_batches', '1']) == 0\n"
        "assert cli.main(['generate', *flags, '--prompt', 'the', '--max_new_tokens', '3']) == 0\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=jobs.environment(), cwd=jobs.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.fixture
def refused(capfd):
    """Runs a verb in this process, which has 8 devices, and returns its error: two lines at most and exit code 2."""

    def run(*arguments: str) -> str:
        assert cli.main(arguments) == 2
        text = capfd.readouterr().err
        assert "Traceback" not in text
        error = text[text.index("error: ") :].strip()
        assert len(error.splitlines()) <= 2, error
        return error

    return run


@pytest.mark.parametrize("verb", ["eval", "generate"])
def test_a_missing_checkpoint_is_refused_by_real_processes(undisturbed, tmp_path, verb):
    flags = ["--prompt", "x"] if verb == "generate" else []
    text = jobs.verb(verb, "--checkpoint", str(undisturbed / "checkpoint_7"), *flags, code=2)
    error = text[text.index("error: ") :].strip()
    assert "Traceback" not in text and len(error.splitlines()) <= 2
    assert "checkpoint_7" in error and "checkpoint_40" in error


@pytest.mark.parametrize("verb", ["eval", "generate"])
def test_damaged_and_half_written_checkpoints_are_refused(undisturbed, tmp_path, refused, verb):
    flags = ["--prompt", "x"] if verb == "generate" else []
    assert "/nowhere" in refused(verb, "--checkpoint", "/nowhere", *flags)
    assert "no whole checkpoint" in refused(verb, "--checkpoint", str(tmp_path), *flags)
    folder = tmp_path / "run"
    for step in (35, 40):
        shutil.copytree(undisturbed / f"checkpoint_{step}", folder / f"checkpoint_{step}")
    (folder / "checkpoint_40" / "commit_success.txt").unlink()
    (folder / "checkpoint_40" / "state" / "manifest.ocdbt").unlink()
    error = refused(verb, "--checkpoint", str(folder / "checkpoint_40"), *flags)
    assert "half written" in error and "checkpoint_35" in error
    for file in (folder / "checkpoint_35" / "state").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(b"")
    assert "checkpoint_35" in refused(verb, "--checkpoint", str(folder / "checkpoint_35"), *flags)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gin.MeshConfig.tensor=3"], ["tensor=3", "8", "--gin.MeshConfig.data=-1"]),
        (["--gin.MeshConfig.tensor=8"], ["heads", "4", "tensor=8"]),
        (["--batch_size", "3"], ["batch", "3", "data=8"]),
        (["--batch_size", "0"], ["--batch_size=0"]),
        (["--gin.MeshConfig.fspd=8"], ["fspd", "fsdp"]),
        (["--gin.Decoder.d_model=32"], ["another model", "32", "64"]),
        (["--gin.Experiment.train_eval_dataset=None"], ["train_eval_dataset"]),
        (["--max_batches", "0"], ["no token to score"]),
    ],
    ids=lambda value: value[0] if value[0].startswith("--") else "",
)
def test_eval_refuses_what_cannot_be_evaluated(undisturbed, refused, flags, words):
    error = refused("eval", "--checkpoint", str(undisturbed), *flags)
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--prompt"]),
        (["--prompt_file", "/nowhere/prompt.txt"], ["/nowhere/prompt.txt"]),
        (["--prompt", "x", "--top_k", "3"], ["--top_k", "--temperature"]),
        (["--prompt", "x", "--temperature", "-1"], ["temperature = -1"]),
        (["--prompt", "x", "--temperature", "1", "--top_p", "2"], ["top_p = 2"]),
        (["--prompt", "x", "--max_new_tokens", "0"], ["max_new_tokens = 0"]),
        (["--prompt", "x", "--beams", "2", "--temperature", "1"], ["--temperature and --beams"]),
        (["--prompt", "x", "--length_penalty", "2"], ["--length_penalty", "--beams 4"]),
        (["--prompt", "x", "--contrastive", "1.5"], ["alpha = 1.5"]),
        (["--prompt", "x", "--stop", ""], ["empty stop string"]),
        (["--prompt", "x", "--min_new_tokens", "500"], ["min_new_tokens = 500"]),
        (["--prompt", "\udcff"], ["UTF-8"]),
        (["--prompt", "x", "--gin.MeshConfig.fsdp=3"], ["fsdp=3", "8", "--gin.MeshConfig.fsdp=1"]),
    ],
    ids=lambda value: " ".join(value).encode("ascii", "replace").decode() if "--prompt" in value[:1] else "",
)
def test_generate_refuses_what_cannot_be_continued(undisturbed, refused, flags, words):
    error = refused("generate", "--checkpoint", str(undisturbed), *flags)
    assert all(word in error for word in words), error


def test_a_prompt_file_that_is_not_text_is_refused(undisturbed, refused, tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    flags = ["--checkpoint", str(undisturbed), "--prompt_file", str(tmp_path / "binary")]
    assert "binary" in refused("generate", *flags)


def test_evaluation_on_another_vocabulary_is_refused(job, undisturbed, refused, tmp_path):
    assert cli.main(["tokenizer", "--input", job.text, "--vocab_size", "300", "--output", str(tmp_path / "sp")]) == 0
    (model,) = Path(tmp_path / "sp").glob("*.model")
    error = refused("eval", "--checkpoint", str(undisturbed), f"--gin.SENTENCEPIECE_MODEL={model}")
    assert "another vocabulary" in error and "bytes" in error and "sentencepiece" in error
