"""lm-eval on palmjax beside lm-eval's own `hf` backend: equal weights, equal tasks, from files alone."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import lm_eval
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models import huggingface
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from palmjax.config import ConfigError
from palmjax.interop import convert
from palmjax.interop import lm_eval as backend
from tests.interop.lm_eval_tasks import BEGIN, CHAT, WORDS, write_model, write_tasks

ROOT = Path(__file__).parents[2]
NEAR = 1e-4
"""Nats that a request's log-likelihood may differ by, both computed in float32."""


@dataclasses.dataclass
class Pair:
    """One model twice. ours, theirs: lm-eval models; folder: of the palmjax checkpoint."""

    kind: str
    folder: Path
    ours: Any
    theirs: Any


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder, count=8)
    return folder


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return made(request.param, tmp_path_factory.mktemp(request.param))


def made(kind: str, folder: Path) -> Pair:
    source = write_model(folder / "hf", kind)
    convert.from_huggingface(source, folder / "ours", ['Decoder.dtype = "float32"'])
    wrapped: Any = huggingface
    # Their cache scores a one-token choice by another request's logits where those were split elsewhere.
    theirs = wrapped.HFLM(
        pretrained=str(source), dtype="float32", batch_size=8, device="cpu", logits_cache=False, max_length=128
    )
    return Pair(kind, folder / "ours", backend.load(str(folder / "ours"), max_length=128), theirs)


def evaluate(model: Any, folder: Path, names: list[str], **given: Any) -> Any:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    simple_evaluate: Any = lm_eval.simple_evaluate  # its decorator hides its parameters
    return simple_evaluate(model=model, tasks=names, task_manager=manager, bootstrap_iters=0, **given)


def answers(results: Any, task: str) -> list[Any]:
    """What the model said, request by request."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [answer[0] for sample in samples for answer in sample["resps"]]


def prompts(results: Any, task: str) -> list[str]:
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [str(sample["arguments"]) for sample in samples]


def assert_near(ours: list[Any], theirs: list[Any]) -> None:
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        if isinstance(mine, tuple):
            assert mine[0] == pytest.approx(other[0], abs=NEAR) and mine[1] == other[1], (mine, other)
        elif isinstance(mine, float):
            assert mine == pytest.approx(other, abs=NEAR)
        else:
            assert mine == other


@pytest.mark.slow
def test_every_request_type_says_what_hf_says(pair: Pair, tasks: Path) -> None:
    names = ["tiny_cloze", "tiny_letters", "tiny_last_word", "tiny_rolling", "tiny_written"]
    ours, theirs = evaluate(pair.ours, tasks, names), evaluate(pair.theirs, tasks, names)
    for name in names:
        assert prompts(ours, name) == prompts(theirs, name)
        assert_near(answers(ours, name), answers(theirs, name))
        for metric, value in theirs["results"][name].items():
            if isinstance(value, float) and not math.isnan(value):
                assert ours["results"][name][metric] == pytest.approx(value, rel=1e-4), (name, metric)
    written = answers(ours, "tiny_written")
    assert len(set(written)) > 3 and not any("\n" in text or " from" in text for text in written)
    said = ours["config"]
    assert said["palmjax_begins_with_bos"] == (pair.kind == "llama") and len(said["palmjax_numerics_sha256"]) == 64


EDGES = {
    "a plain pair": ("the model reads", " a row"),
    "a trailing space": ("the model reads ", "a row"),
    "several trailing spaces": ("the model reads   \n ", "a row"),
    "an empty context": ("", "the model"),
    "only a space": (" ", "the model"),
    "no space between": ("the mod", "els read"),
    "not ASCII": ("日本 größer naïve", " 語 größer"),
    "half of a character's bytes": ("größ", "er 日"),
    "a context that brings BOS": (f"{BEGIN} the model", " reads"),
    "a context longer than the window": ("the model reads a row of tokens " * 60, " and learns"),
    "both longer than the window": ("the model " * 70, " reads a row" * 20),
    "longer than the window": ("the", " model reads" * 200),
    "an empty context and BOS": ("", f"{BEGIN} the"),
}


def test_boundaries_bos_and_truncation_are_those_of_lm_eval(pair: Pair) -> None:
    scored, refused = {}, {}
    for name, edge in EDGES.items():
        try:
            (scored[name],) = pair.theirs.loglikelihood([Instance("loglikelihood", {}, edge, 0)], disable_tqdm=True)
        except AssertionError:  # lm-eval has no score for it
            refused[name] = edge
    asked = [Instance("loglikelihood", {}, EDGES[name], 0) for name in scored]
    assert_near(pair.ours.loglikelihood(asked, disable_tqdm=True), list(scored.values()))
    # GPT-2's tokenizer puts nothing before a text of spaces alone; LLaMA's has a token for all of "größer".
    own = {"gpt2": "only a space", "llama": "half of a character's bytes"}
    assert set(refused) == {"longer than the window", own[pair.kind]}
    for text in [*[a + b for a, b in EDGES.values()], BEGIN, "", "  two  spaces "]:
        assert pair.ours.tok_encode(text) == pair.theirs.tok_encode(text), text
        assert pair.ours.tok_encode(text, False) == pair.theirs.tok_encode(text, False), text


def test_what_lm_eval_has_no_score_for_is_scored_by_rule_and_counted(pair: Pair) -> None:
    def theirs(context: list[int], continuation: list[int]) -> float:
        return pair.theirs._loglikelihood_tokens([(("", ""), context, continuation)], disable_tqdm=True)[0][0]

    def ours(context: str, continuation: str, counted: str) -> float:
        before = pair.ours.counts
        ((total, _),) = pair.ours.loglikelihood([Instance("loglikelihood", {}, (context, continuation), 0)])
        new = {name: count - before[name] for name, count in pair.ours.counts.items()}
        assert new[counted] == 1, new
        return total

    encode = pair.ours.tok_encode
    context, continuation = pair.ours._encode_pair(*(window := ("the", " model reads" * 200)))
    windows = get_rolling_token_windows(continuation, context[-1], pair.ours.max_length, 1)
    total = sum(theirs(*make_disjoint_window(one)) for one in windows)
    assert ours(*window, "longer_than_a_row") == pytest.approx(total, abs=3 * NEAR)
    parts = [(word[i:j], word[i : j + 1]) for word in WORDS for i in range(len(word)) for j in range(i + 1, len(word))]
    begin, whole = next((a, b) for a, b in parts if len(encode(a, False)) == len(encode(b, False)))
    ids, place = encode(whole), len(encode(begin)) - 1
    alone = theirs(ids[:place] or [pair.ours.prefix_token_id], ids[place:])
    assert ours(begin, whole[len(begin) :], "merged_with_the_context") == pytest.approx(alone, abs=NEAR)
    if pair.kind == "gpt2":
        alone = theirs([pair.ours.prefix_token_id], encode(" the"))
        assert ours(" ", "the", "no_context_left") == pytest.approx(alone, abs=NEAR)
    with pytest.raises(ConfigError, match="an empty continuation behind 'the model': there is nothing to score"):
        ours("the model", "", "no_context_left")


@pytest.mark.slow
def test_a_chat_template_brings_bos_once(pair: Pair, tasks: Path, tmp_path: Path) -> None:
    if pair.kind == "gpt2":
        with pytest.raises(ConfigError, match=r"brings no chat template.*chat_template=FILE"):
            evaluate(pair.ours, tasks, ["tiny_cloze"], apply_chat_template=True)
        (tmp_path / "chat.jinja").write_text(CHAT)
        theirs, ours = pair.theirs, backend.load(str(pair.folder), chat_template=str(tmp_path / "chat.jinja"))
        theirs.tokenizer.chat_template = CHAT
    else:
        theirs, ours = pair.theirs, pair.ours
    given: dict[str, Any] = {"apply_chat_template": True, "fewshot_as_multiturn": True, "limit": 4}
    given["system_instruction"] = "Answer."
    names = ["tiny_cloze", "tiny_written"]
    mine, other = evaluate(ours, tasks, names, **given), evaluate(theirs, tasks, names, **given)
    for name in names:
        assert prompts(mine, name) == prompts(other, name) and "[system] Answer." in prompts(mine, name)[0]
        assert_near(answers(mine, name), answers(other, name))
    ids = ours.tok_encode(ours.apply_chat_template([{"role": "user", "content": "the model"}]))
    assert ids.count(ours.prefix_token_id) == 1 and ids[0] == ours.prefix_token_id


def test_sampled_texts_do_not_depend_on_what_else_is_asked(pair: Pair) -> None:
    how = {"until": ["\n"], "max_gen_toks": 8, "do_sample": True, "temperature": 0.9, "top_k": 20}
    asked = [Instance("generate_until", {}, (text, how), n) for n, text in enumerate(["the", "a row", "the", "of"])]
    whole = pair.ours.generate_until(asked, disable_tqdm=True)
    assert whole[0] != whole[2], "a prompt asked twice is drawn twice"
    assert pair.ours.generate_until(asked[1:2], disable_tqdm=True) == whole[1:2]
    with pytest.raises(ConfigError, match="generation_kwargs: penalty_alpha can't be set here"):
        pair.ours.generate_until([Instance("generate_until", {}, ("the", how | {"penalty_alpha": 0.6}), 0)])


@pytest.fixture(scope="module", params=["mistral", "bloom"])
def other(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A window shorter than the text, and ALiBi with a tokenizer that lowers case, drops spaces and has no BOS."""
    return made(request.param, tmp_path_factory.mktemp(request.param))


def test_other_families_and_tokenizers_say_what_hf_says(other: Pair) -> None:
    rows = ["the model reads a row of tokens " * 9, "THE  Model\u00a0reads,\t größer 🙂\n\n"]
    pairs = [*((text, " and learns") for text in rows), ("the mo", "del reads a row"), ("12 34 ", "56"), ("", "Row")]
    asked = [Instance("loglikelihood", {}, one, n) for n, one in enumerate(pairs)]
    assert_near(
        other.ours.loglikelihood(asked, disable_tqdm=True), other.theirs.loglikelihood(asked, disable_tqdm=True)
    )
    whole = [Instance("loglikelihood_rolling", {}, (text * 3,), n) for n, text in enumerate(rows)]
    assert_near(
        other.ours.loglikelihood_rolling(whole, disable_tqdm=True),
        other.theirs.loglikelihood_rolling(whole, disable_tqdm=True),
    )
    hows: list[dict[str, Any]] = [{"until": [" row", "of"], "max_gen_toks": 20}, {"until": [], "max_gen_toks": 9}]
    hows.append({"until": "the", "max_gen_toks": 20, "num_beams": 2, "do_sample": False})
    written = [Instance("generate_until", {}, (text, how), 0) for text in (*rows, "a") for how in hows]
    texts = other.ours.generate_until(written, disable_tqdm=True)
    assert texts == other.theirs.generate_until(written, disable_tqdm=True) and len(set(texts)) > 3


def verb(*arguments: str, launched: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = ["-m", "launch.local", *launched, "--"] if launched else ["-m", "palmjax"]
    return subprocess.run(
        [sys.executable, *command, "lm-eval", *arguments],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def written_samples(folder: Path) -> dict[str, list[Any]]:
    """Of each task, the documents with their prompts' hashes and what the model said."""
    found = {}
    for file in sorted(folder.rglob("samples_*.jsonl")):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        found[file.name.split("_2")[0]] = [(row["doc_id"], row["prompt_hash"], row["resps"]) for row in rows]
    return found


@pytest.mark.slow
@pytest.mark.e2e
def test_the_verb_prints_the_table_and_two_processes_write_what_one_writes(
    pair: Pair, tasks: Path, tmp_path: Path
) -> None:
    if pair.kind == "gpt2":
        pytest.skip("one family is enough for processes")
    names = "tiny_cloze,tiny_last_word,tiny_rolling,tiny_written"
    common = ["--checkpoint", str(pair.folder), "--tasks", names, "--include_path", str(tasks), "--log_samples"]
    kept = ["--answers", str(tmp_path / "answers.jsonl")]
    one = verb(*common, *kept, "--output_path", str(tmp_path / "one"))
    assert one.returncode == 0, one.stderr[-3000:]
    assert "|tiny_cloze" in one.stdout and "palmjax" in one.stdout
    assert "|Version|Filter|n-shot|" in one.stdout and "os.fork" not in one.stderr
    size = (tmp_path / "answers.jsonl").stat().st_size
    again = verb(*common, *kept, "--output_path", str(tmp_path / "again"))
    assert again.returncode == 0 and (tmp_path / "answers.jsonl").stat().st_size == size
    two = verb(*common, "--output_path", str(tmp_path / "two"), launched=("--processes", "2", "--devices", "2"))
    assert two.returncode == 0, (two.stdout + two.stderr)[-3000:]
    assert two.stdout.count("|tiny_cloze") == 1, "one process prints"
    written = written_samples(tmp_path / "one")
    assert len(written) == 4 and written == written_samples(tmp_path / "two") == written_samples(tmp_path / "again")


def test_what_lm_eval_does_not_know_is_refused_in_a_line() -> None:
    with pytest.raises(ConfigError, match="--tasks: Tasks not found: tiny_nonesuch"):
        backend._harness(["run", "--model", "palmjax", "--tasks", "tiny_nonesuch"])
    backend._check_model_args({"max_length": 9, "batch_size": 1})
    with pytest.raises(ConfigError, match="no 'max_lenght'; did you mean 'max_length'"):
        backend._check_model_args({"max_lenght": 9})
    with pytest.raises(ConfigError, match="no 'peft'; it sets max_length, add_bos_token"):
        backend._check_model_args({"peft": 9})


def test_lm_eval_that_is_not_installed_is_named_with_the_command() -> None:
    program = (
        "import sys; sys.modules['lm_eval'] = None; from palmjax.cli import main; raise SystemExit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "lm-eval", "--checkpoint", "x", "--tasks", "y"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 2
    last = found.stderr.strip().splitlines()[-1]
    assert last.startswith("error: lm-eval is not installed") and last.endswith("pip install 'palmjax[lm-eval]'")
