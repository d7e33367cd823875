"""Plans of a tiny job, compiled by the real TPU compiler: memory, time, cache, search, records. One cache for all."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from palmjax import configure, plan
from palmjax.config import ConfigError, Experiment
from palmjax.metrics.throughput import mfu
from palmjax.models.account import account
from palmjax.plan import build, check, compiler, main, report, search

TINY = str(pathlib.Path(__file__).parent / "tiny.gin")
V4, V5E = plan.parse("v4:2x2x1"), plan.parse("v5e:2x2")


def load(*bindings: str) -> Experiment:
    return configure.load([TINY], bindings, placeholders=True).experiment


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("plans"))


@pytest.fixture(scope="module")
def tiny(cache: str) -> plan.Plan:
    return plan.compile(load(), V4, cache=cache)


def test_a_plan_accounts_for_every_second_and_byte(tiny: plan.Plan) -> None:
    assert tiny.fits and tiny.time is not None and tiny.tokens_per_second is not None
    assert sum(tiny.time.kinds.values()) == pytest.approx(tiny.time.step)
    assert sum(tiny.time.parts.values()) == pytest.approx(tiny.time.step)
    assert 3 * tiny.time.layer + tiny.time.outside == pytest.approx(tiny.time.step)
    assert sum(tiny.time.axes.values()) == pytest.approx(tiny.time.kinds["exposed ICI"])
    assert {"fsdp", "tensor"} <= set(tiny.time.axes)
    assert tiny.time.kinds["matmul"] > 0 and len(tiny.time.slowest) == build.SLOWEST
    assert tiny.tokens_per_second == pytest.approx(16 * 256 / tiny.time.step)
    assert tiny.mfu == pytest.approx(mfu(tiny.tokens_per_second, tiny.model_flops, 4 * 275e12))


def test_the_compiled_matmuls_are_the_models(tiny: plan.Plan) -> None:
    """6N + 12LHQT of the model, with two differences: both tensor shards compute the one key/value head, and the
    kernel does 7 of attention's 12 LHQT: half of 2 products forward and 5 backward.
    """
    assert tiny.hardware_flops is not None
    totals = account(load().model, 256)  # pyright: ignore[reportArgumentType]
    twice = 3 * 6 * 2 * 256 * 128  # layers x (forward and backward) x key and value of 256 x 128, once more
    spared = 5 * 3 * 4 * 128 * 256
    assert totals.flops_per_token == tiny.model_flops
    assert tiny.hardware_flops == pytest.approx(tiny.model_flops + twice - spared, rel=0.002)


def test_memory_is_what_the_state_weighs(tiny: plan.Plan) -> None:
    """Parameters float32 over four devices, Adafactor's two moments unfactored; TPU layouts pad small arrays."""
    least = 4 * tiny.parameters / 4
    assert least <= tiny.usage.parameters <= 1.5 * least
    assert tiny.usage.optimizer == pytest.approx(2 * tiny.usage.parameters, rel=0.01)
    assert tiny.usage.total == tiny.usage.parameters + tiny.usage.optimizer + tiny.usage.inputs + (
        tiny.usage.activations + tiny.usage.temporaries + tiny.usage.program
    )


def test_a_run_s_bill_follows_from_its_tokens(tiny: plan.Plan) -> None:
    assert tiny.run is not None and tiny.tokens_per_second is not None
    assert tiny.run.tokens == 100 * 16 * 256
    hours = tiny.run.tokens / tiny.tokens_per_second / 3600
    assert tiny.run.chip_hours == pytest.approx(4 * hours)
    assert tiny.run.energy_mwh == pytest.approx(4 * hours * 170 * 1.08 / 1e6)


def test_the_same_step_is_compiled_once(tiny: plan.Plan, cache: str) -> None:
    before = sorted(os.listdir(cache))
    assert plan.compile(load(), V4, cache=cache) == tiny
    # A file name and a learning rate's words are no part of what is compiled; another batch is.
    assert plan.compile(load("MODEL_DIR='elsewhere'"), V4, cache=cache) == tiny
    assert sorted(os.listdir(cache)) == before


def test_a_killed_compiler_leaves_the_cache_as_it_was(tmp_path: pathlib.Path) -> None:
    arguments = ["plan", TINY, "--topology", "v4:2x2x1", "--cache", str(tmp_path)]
    process = subprocess.Popen([sys.executable, "-m", "palmjax", *arguments], start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".request-*/request")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert [p for p in tmp_path.iterdir() if not p.name.startswith(".")] == []
    # What the kill left lying about is no entry, and the next plan is whole.
    assert plan.compile(load(), V4, cache=tmp_path).fits


@pytest.fixture(scope="module")
def too_big(cache: str) -> plan.Plan:
    return plan.compile(load("Decoder.vocab_size=262144"), V5E, rows=256, cache=cache)


def test_a_step_that_does_not_fit_says_what_fills_the_memory(too_big: plan.Plan) -> None:
    assert not too_big.fits and "Ran out of memory" in too_big.problem
    assert too_big.time is None and too_big.mfu is None
    compilers_own = re.search(r"\(([\d.]+)G\)", too_big.problem)
    assert compilers_own is not None
    assert too_big.usage.total / 2**30 == pytest.approx(float(compilers_own[1]), rel=0.01)
    sizes = [buffer.bytes for buffer in too_big.usage.largest]
    assert sizes == sorted(sizes, reverse=True) and all(buffer.op_name for buffer in too_big.usage.largest)
    # 128 rows of 256 tokens' logits over half the vocabulary, in float32.
    assert too_big.usage.largest[0].bytes == 128 * 256 * 131072 * 4
    assert "logits" in too_big.usage.largest[0].op_name or "BTV" in too_big.usage.largest[0].op_name


def test_what_is_said_to_make_it_fit_does(
    too_big: plan.Plan, cache: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the verb: the first change was compiled, and its flags, given to the verb, make the same plan."""
    job = [TINY, "--topology", "v5e:2x2", "--batch_size", "256", "--gin.Decoder.vocab_size=262144", "--cache", cache]
    assert main.main([*job, "--output", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    first, *others = text[text.index("TO FIT") :].splitlines()[1:]
    assert "compiled: " in first and others and all("by arithmetic" in line for line in others)
    told = json.loads((tmp_path / "plan.json").read_text())
    assert told["fits"] is False and told["to_fit"][0]["compiled"] and told["to_fit"][0]["mfu"] > 0
    change = shlex.split(first.split("   compiled")[0])
    assert main.main([*job, *change, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["to_fit"] == [] and found["mfu"] == told["to_fit"][0]["mfu"]


def test_the_report_and_the_picture(tiny: plan.Plan, too_big: plan.Plan, tmp_path: pathlib.Path) -> None:
    text = report.text(tiny)
    for words in ("FITS", "STEP", "MFU", "HFU", "matmul", "exposed along fsdp", "largest", "chip-hours", "libtpu"):
        assert words in text
    assert "DOES NOT FIT" in report.text(too_big) and "STEP  no time" in report.text(too_big)
    for number, one in enumerate((tiny, too_big)):
        report.picture(one, tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads(json.dumps(tiny.to_json()))["time"]["step"] == pytest.approx(tiny.time and tiny.time.step)


def test_a_search_ranks_compiled_layouts_and_writes_the_winner(cache: str, tmp_path: pathlib.Path) -> None:
    told = []
    result = search.search(load(), V4, budget=3, jobs=1, cache=cache, progress=lambda *news: told.append(news))
    assert len(result.tried) == 4 and result.own is not None and result.legal > 20
    assert [news[0] for news in told] == [1, 2, 3, 4] and told[0][1] == 4
    speeds = [tried.speed for tried in result.tried]
    assert speeds == sorted(speeds, reverse=True)
    assert result.best is not None and result.best.speed >= result.own.speed
    text = search.table(result)
    assert "<- yours" in text and "*" in text
    path = tmp_path / "best.gin"
    path.write_text(search.winner(result, [TINY], ["RANDOM_SEED=3"]))
    best = configure.load([str(path)], placeholders=True).experiment
    assert best.train.seed == 3
    assert plan.compile(best, V4, options=result.best.layout.options, cache=cache) == result.best.plan
    report.pareto(result, tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").exists()
    # Asked again, nothing is compiled: it is the same search.
    before = sorted(os.listdir(cache))
    again = search.search(load(), V4, budget=3, jobs=1, cache=cache)
    assert [t.plan for t in again.tried] == [t.plan for t in result.tried] and sorted(os.listdir(cache)) == before


def test_a_record_holds_until_the_step_changes(
    tiny: plan.Plan, cache: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "job.gin"
    command = f"# palmjax plan {path} --topology v4:2x2x1"
    path.write_text(f'# A job.\n{command}\n{check.figures(tiny)}\ninclude "{TINY}"\n')
    assert main.main([str(path), "--check", "--cache", cache]) == 0
    assert "as recorded" in capsys.readouterr().out
    old = path.read_text()
    for figure, changed, words in (
        (r"MFU [\d.]+", "MFU 99.9", "MFU was 99.9"),
        (r"[\d.]+ s a step", f"{1.05 * tiny.time.step:.3g} s a step", "step was"),  # pyright: ignore
        (r"[\d.]+ of", "9.9 of", "memory was 9.9"),
    ):
        path.write_text(re.sub(figure, changed, old, count=1))
        assert main.main([str(path), "--check", "--cache", cache]) == 1
        assert words in capsys.readouterr().out
    assert main.main(["--check", "--update", str(path), "--cache", cache]) == 0
    assert path.read_text() == old
    path.write_text(f"{command}\n# no figures\n")
    with pytest.raises(ConfigError, match=r"job\.gin:2"):
        main.main([str(path), "--check", "--cache", cache])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--topology", "v9:2x2"], "known are v4"),
        (["--topology", "v4:2x2"], "3 dimensions"),
        (["--topology", "v4"], "how many chips"),
        (["--topology", "v4:3x5x7"], "knows no topology"),
        (["--topology", "v4:2x2x2"], "asks for 4 devices; this job has 8"),
        (["--topology", "v4:2x2x1", "--slices", "2"], "asks for 4 devices"),
        (["--topology", "v4:2x2x1", "--batch_size", "7"], "not divisible"),
        (["--topology", "v4:2x2x1", "--batch_size", "0"], "at least 1"),
        (["--topology", "v4:2x2x1", "--output", TINY], "tiny.gin can't be written"),
        ([], "--topology is missing"),
        (["--topology", "v4:2x2x1", "--search", "--batch_sizes", "many"], "numbers of rows"),
        (["--check", "--topology", "v4:2x2x1"], "from the files' headers"),
        (["--topology", "v4:2x2x1", "--update"], "goes with --check"),
    ],
)
def test_what_is_asked_wrongly_is_said_in_a_line(arguments: list[str], words: str, cache: str) -> None:
    with pytest.raises(ConfigError) as error:
        main.main([TINY, *arguments, "--cache", cache])
    assert words in str(error.value) and len(str(error.value).splitlines()) <= 2


def test_a_model_alone_is_named_and_completed() -> None:
    with pytest.raises(ConfigError, match=r"model alone.*plan gin/exp/palm_8b\.gin, or") as error:
        main.main(["gin/models/palm_8b.gin", "--topology", "v4:2x2x1"])
    assert len(str(error.value).splitlines()) == 2


def test_without_the_compiler_the_extra_is_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real child process that cannot see libtpu: a finder in front of the path hides it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\nfind = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, package=None: None if name == 'libtpu' else find(name, package)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.getcwd()]))
    with pytest.raises(ConfigError, match=r"pip install 'palmjax\[plan\]'"):
        plan.compile(load(), V4, cache=tmp_path / "cache")


def test_an_aborting_compiler_is_an_error_in_words(tmp_path: pathlib.Path) -> None:
    with pytest.raises(compiler.CompilerError, match=r"ended \(|Unknown"):
        plan.compile(load(), V4, options="--xla_no_such_flag_at_all=1", cache=tmp_path)
    assert [p for p in tmp_path.iterdir() if not p.name.startswith(".")] == []


def test_a_cpu_plan_has_memory_and_no_time(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice: jax's own cache, which a user may have set, hands out programs without the dumps that tell the memory."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "jax"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    for name in ("first", "second"):
        found = plan.compile(load(), plan.parse("cpu:4"), cache=tmp_path / name)
        assert found.fits and found.usage.parameters > 0 and found.time is None and found.mfu is None
        assert "not modelled" in report.text(found)


def test_an_entry_that_was_half_written_is_never_read(tiny: plan.Plan, cache: str, tmp_path: pathlib.Path) -> None:
    """The rename is what makes an entry; a folder without its facts is compiled again."""
    name = next(p.name for p in pathlib.Path(cache).iterdir() if (p / "facts.json").exists())
    (tmp_path / name).mkdir()
    shutil.copy(pathlib.Path(cache, name, "step.hlo.zst"), tmp_path / name)
    assert plan.compile(load(), V4, cache=tmp_path).fits


@pytest.mark.parametrize("name", ["palm_8b", "palm_62b", "palm_540b"])
def test_every_pod_s_config_records_its_plan(name: str) -> None:
    assert check.records(f"gin/exp/{name}.gin")


@pytest.mark.parametrize("where", ["v5p:2x2x1", "v6e:2x2"])
def test_every_generation_of_tpu_is_timed_with_our_kernel(where: str, cache: str) -> None:
    found = plan.compile(load("TASK_FEATURE_LENGTHS={'targets': 512}"), plan.parse(where), cache=cache)
    assert found.time is not None and found.time.kinds["kernel"] > 0
    assert any("bundles of the tuned row" in words and "D=128" in words for words in found.caveats)
