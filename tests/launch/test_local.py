"""launch.local: real processes, their lines, their signals and their exit codes; without jax, so that it is quick."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import local

ROOT = Path(__file__).parent.parent.parent


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_command_lines_and_environment(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--processes", "2", "--devices", "4", "--port", "5000", "--dry_run", "--", "train", "x.gin", "--gin.A='b'"]
    assert local.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[1] == (
        f"JAX_PLATFORMS=cpu PYTHONUNBUFFERED=1 JAX_NUM_CPU_DEVICES=4 {sys.executable} -m palmjax train x.gin "
        "'--gin.A='\"'\"'b'\"'\"'' --coordinator_address=localhost:5000 --process_count=2 --process_index=1"
    )


def test_one_process_has_no_coordinator() -> None:
    assert local.commands(["train", "x.gin"], 1, 5000) == [[sys.executable, "-m", "palmjax", "train", "x.gin"]]


def test_every_line_is_prefixed_and_streams_stay_apart(capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import os, sys; print('out', os.environ['ADDED']); print('err', file=sys.stderr); print('no newline', end='')"
    )
    assert local.supervise([python(code), python("print('other')")], {"ADDED": "here"}) == 0
    captured = capsys.readouterr()
    assert sorted(captured.out.splitlines()) == ["[0] no newline", "[0] out here", "[1] other"]
    assert captured.err == "[0] err\n"


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        (["sys.exit(0)", "sys.exit(0)"], 0),
        (["time.sleep(0.6); sys.exit(69)", "sys.exit(3)"], 3),
        (["sys.exit(75)", "sys.exit(75)"], 75),
        (["os.kill(os.getpid(), 9)", "time.sleep(0.6); sys.exit(69)"], 137),
    ],
)
def test_the_exit_code_is_that_of_the_first_that_failed(ends: list[str], code: int) -> None:
    assert local.supervise([python(f"import os, sys, time; {end}") for end in ends], {}) == code


def test_those_that_stay_are_ended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One fails, one does not leave by itself, one does not even mind SIGTERM."""
    monkeypatch.setattr(local, "GRACE_SECONDS", 0.8)
    monkeypatch.setattr(local, "KILL_SECONDS", 0.8)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    begun = time.monotonic()
    assert (
        local.supervise([python("import sys; sys.exit(4)"), python("import time; time.sleep(60)"), python(deaf)], {})
        == 4
    )
    assert 1.6 <= time.monotonic() - begun < 20
    said = capsys.readouterr().err
    assert "process 0 ended with exit code 4" in said and "SIGTERM" in said and "SIGKILL" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_go_to_all(number: signal.Signals) -> None:
    child = (
        "import signal, sys, time; n = int(sys.argv[1]); "
        "signal.signal(n, lambda *_: sys.exit(75)); print('ready', flush=True); time.sleep(60)"
    )
    code = (
        "import sys; from launch import local; "
        f"sys.exit(local.supervise([[sys.executable, '-c', {child!r}, '{int(number)}']] * 2, {{}}))"
    )
    launcher = subprocess.Popen(
        python(code), cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": "."}
    )
    assert launcher.stdout is not None
    assert {launcher.stdout.readline() for _ in range(2)} == {"[0] ready\n", "[1] ready\n"}
    launcher.send_signal(number)
    assert launcher.wait(20) == 75


def test_without_dashes_the_way_out_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--processes", "2"], ["--processes", "2", "--"]):
        with pytest.raises(SystemExit) as exit_:
            local.main(argv)
        assert exit_.value.code == 2
        assert "behind `--`" in capsys.readouterr().err


def launch(folder: Path, code: str, *options: str) -> list[str]:
    """A command line: the launcher over a stand-in for palmjax, a package of `folder` whose main is `code`."""
    (folder / "palmjax").mkdir(exist_ok=True)
    (folder / "palmjax" / "__init__.py").touch()
    (folder / "palmjax" / "__main__.py").write_text(f"import os, pathlib, signal, sys, time\n{code}")
    run = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from launch import local; sys.exit(local.main())"
    return [sys.executable, "-c", run, "--processes", "1", *options, "--", "train", "x.gin"]


COUNTED = """
ends, count = {ends}, pathlib.Path("count")
number = int(count.read_text()) if count.exists() else 0
count.write_text(str(number + 1))
print("attempt", os.environ.get("PALMJAX_RESTARTS"), os.environ.get("PALMJAX_LAST_EXIT"))
if ends[number] < 0:
    os.kill(os.getpid(), -ends[number])
sys.exit(ends[number])
"""


@pytest.mark.parametrize(
    ("ends", "limit", "attempts", "code"),
    [
        ([75, -9, 69, 0], 5, [("None", "None"), ("1", "75"), ("2", "137"), ("3", "69")], 0),
        ([75, 75, 75], 1, [("None", "None"), ("1", "75")], 75),
        ([2, 0], 5, [("None", "None")], 2),
    ],
)
def test_a_job_is_started_again_until_it_ends_for_good(
    tmp_path: Path, ends: list[int], limit: int, attempts: list[tuple[str, str]], code: int
) -> None:
    command = launch(tmp_path, COUNTED.format(ends=ends), f"--max-restarts={limit}")
    quick = [part.replace("sys.exit(local", "local.RESTART_SECONDS = (0.01, 0.1); sys.exit(local") for part in command]
    run = subprocess.run(quick, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == code, run.stderr
    assert [tuple(line.split()[2:]) for line in run.stdout.splitlines()] == attempts
    assert run.stderr.count("restart") == len(attempts) - 1


def test_a_launcher_that_is_asked_to_stop_does_not_start_again(tmp_path: Path) -> None:
    code = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); print('ready', flush=True); time.sleep(60)"
    command = launch(tmp_path, code, "--max_restarts", "5")
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        assert run.stdout is not None and "ready" in run.stdout.readline()
        run.send_signal(signal.SIGTERM)
        rest = run.stdout.read()
    assert run.returncode == 75 and "restart" not in rest
