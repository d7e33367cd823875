"""The front door: light, and every mistake of a user is a line on stderr and exit code 2."""

from __future__ import annotations

import errno
import importlib.util
import os
import resource
import subprocess
import sys

import pytest

from palmjax import cli
from palmjax.config import ConfigError


def run(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(("-c", code) if code else ("-m", "palmjax")), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def cpu_seconds(code: str, *arguments: str) -> float:
    """The least CPU time of five runs, children of this process; wall time would measure what else the machine does."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    times = []
    for _ in range(5):
        before = spent()
        assert run(*arguments, code=code).returncode == 0
        times.append(spent() - before)
    return min(times)


def test_importing_palmjax_is_light() -> None:
    heavy = "sorted({'jax', 'tensorflow', 'numpy', 'gin', 'seqio', 'flax'} & set(sys.modules))"
    done = run(code=f"import palmjax, palmjax.cli, palmjax.config, sys; print({heavy})")
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
    assert cpu_seconds("import palmjax") < 0.3
    assert cpu_seconds("from palmjax.cli import main; main(['--help'])") < 0.3


def test_a_run_without_a_tpu_can_be_profiled_where_the_tpu_compiler_is_installed(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("JAX_PLATFORMS")
    traced = "import jax; jax.devices(); jax.profiler.start_trace(given[0]); jax.profiler.stop_trace()"
    code = f"import sys; from palmjax import cli; sys.exit(cli.run_main(lambda given: exec({traced!r}), sys.argv[1:]))"
    done = run(str(tmp_path), code=code)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.glob("**/*.xplane.pb"))


def test_help_names_every_verb() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert all(f"  {verb} " in done.stdout for verb in cli.VERBS)
    assert run().stdout == done.stdout


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_a_module_with_a_main(verb: str) -> None:
    module = cli.VERBS[verb][0]
    assert importlib.util.find_spec(module), f"`palmjax {verb}` needs {module}"
    done = run(verb, "--help")
    assert done.returncode == 0, done.stderr
    assert f"palmjax {verb}" in done.stdout


def test_an_unknown_verb_gets_the_nearest() -> None:
    done = run("trian")
    assert (done.returncode, done.stderr) == (2, "error: palmjax has no verb 'trian'; did you mean 'train'?\n")


def test_a_users_mistake_is_one_line_and_exit_code_2() -> None:
    done = run("config", "exp/palm_stdlb.gin")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no gin file 'exp/palm_stdlb.gin'; did you mean exp/palm_stdlib.gin\n")
    assert "Traceback" not in done.stderr
    done = subprocess.run([sys.executable, "-m", "palmjax.configure", "--gin_fle=x"], capture_output=True, check=False)
    assert done.returncode == 2


def test_exit_codes(capsys, monkeypatch) -> None:
    def raises(error: BaseException):
        def main(argv=None) -> int:
            raise error

        return main

    assert cli.run_main(lambda argv: 7) == 7
    assert cli.run_main(raises(ConfigError("the batch does not divide"))) == 2
    assert capsys.readouterr().err == "error: the batch does not divide\n"
    assert cli.run_main(raises(KeyboardInterrupt())) == 130
    capsys.readouterr()
    assert cli.run_main(lambda argv: os.stat("no/such/file").st_size) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: no/such/file: No such file or directory (FileNotFoundError at test_cli.py:")
    assert line.endswith("; PALMJAX_TRACEBACK=1 shows more)\n") and line.count("\n") == 1
    monkeypatch.setenv("PALMJAX_TRACEBACK", "1")
    assert cli.run_main(raises(OSError(errno.EINVAL, "Invalid argument"))) == 74
    said = capsys.readouterr().err
    assert "in main\n    raise error" in said and said.splitlines()[-1].startswith(
        "error: Invalid argument (OSError at"
    )
    with pytest.raises(ZeroDivisionError):  # ours: it keeps its traceback
        cli.run_main(raises(ZeroDivisionError()))


def test_gin_may_import_modules_of_the_working_directory(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    seen = []
    cli.run_main(lambda argv: seen.append(list(sys.path)) or 0)
    assert seen[0][-1] == os.getcwd()
