"""Launchers for clusters: what exactly they would submit."""

from __future__ import annotations

import ast
import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from launch import gke, slurm, tpu_vm

ROOT = Path(__file__).parent.parent.parent
HARD = "--gin.PROMPT='it\\'s $HOME \"x\"'"
"""An argument with all that a shell could take amiss."""


def dry(module, capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert module.main([*argv, "--dry_run", "--", "train", "x.gin", HARD]) == 0
    return capsys.readouterr().out


def test_tpu_vm(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--name=pod", "--zone=us-east5-a", "--project=p", "--dir=my dir", "--setup=. env/bin/activate"]
    call = shlex.split(dry(tpu_vm, capsys, *options, "--env", "TPU_LOG=a b"))
    assert call[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"]
    assert call[6:9] == ["--zone=us-east5-a", "--project=p", "--worker=all"]
    remote = call[9].removeprefix("--command=")
    expected = ["cd", "my dir", "&&", ".", "env/bin/activate", "&&", "PALMJAX_DISTRIBUTED=auto", "TPU_LOG=a b"]
    assert shlex.split(remote) == [*expected, "python3", "-m", "palmjax", "train", "x.gin", HARD]


def test_the_remote_line_means_the_same_to_a_real_shell(tmp_path: Path) -> None:
    fake = tmp_path / "fake-python"
    fake.write_text('#!/bin/sh\nprintf "%s|" "$PALMJAX_DISTRIBUTED" "$@"\n')
    fake.chmod(0o755)
    line = tpu_vm.remote_line(["train", HARD], str(tmp_path), str(fake), {}, None)
    said = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout
    assert said == f"auto|-m|palmjax|train|{HARD}|"


@pytest.mark.parametrize(
    ("ends", "attempts", "code"),
    [([75, 137, 0], ["-", "1 75", "2 137"], 0), ([2], ["-"], 2), ([69, 69, 70], ["-", "1 69", "2 69"], 70)],
)
def test_a_host_starts_its_process_again_until_it_ends_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: list[int], attempts: list[str], code: int
) -> None:
    """The remote line with --max_restarts=2, run by the shell that a host has."""
    monkeypatch.setattr(tpu_vm, "PAUSE_SECONDS", 0)
    fake = tmp_path / "fake-python"
    (tmp_path / "ends").write_text("".join(f"{one}\n" for one in ends))
    fake.write_text(
        '#!/bin/sh\necho "${PALMJAX_RESTARTS:--} $PALMJAX_LAST_EXIT" >> seen\n'
        'exit "$(sed -n "$(wc -l < seen)p" ends)"\n'
    )
    fake.chmod(0o755)
    line = tpu_vm.remote_line(["train", HARD], str(tmp_path), str(fake), {}, "true", 2)
    assert subprocess.run(["sh", "-c", line], capture_output=True, check=False).returncode == code
    assert [one.strip() for one in (tmp_path / "seen").read_text().splitlines()] == attempts


GKE = [
    *("--name=palm", "--image=img:1", "--accelerator=tpu-v5p-slice", "--topology=2x2x4", "--hosts=4", "--slices=2"),
    *("--env", "A=1", "--service_account=writer", "--max_restarts=7"),
]


def test_gke(capsys: pytest.CaptureFixture[str]) -> None:
    value = yaml.safe_load(dry(gke, capsys, *GKE))
    assert value["kind"] == "JobSet" and value["spec"]["failurePolicy"]["maxRestarts"] == 7
    (rule,) = value["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    (replicated,) = value["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 2
    job = replicated["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 4 and job["backoffLimit"] == 0
    (ends,) = job["podFailurePolicy"]["rules"]
    assert ends["action"] == "FailJob" and ends["onExitCodes"]["values"] == [2, 65]
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "2x2x4"
    assert pod["serviceAccountName"] == "writer" and pod["terminationGracePeriodSeconds"] == 300
    (container,) = pod["containers"]
    assert container["command"] == ["python3", "-m", "palmjax", "train", "x.gin", HARD]
    assert container["env"] == [{"name": "PALMJAX_DISTRIBUTED", "value": "auto"}, {"name": "A", "value": "1"}]
    assert container["resources"]["limits"]["google.com/tpu"] == 4


def test_yaml_round_trips_what_a_manifest_can_hold() -> None:
    value = {"a": [], "b": {}, "c": [{"d": "yes", "e": [1, "x: y # z"]}, [1, [2]]], "f": None, "g": "$(X)\n\u00e9"}
    assert yaml.safe_load(gke.as_yaml(value)) == value == json.loads(json.dumps(value))


def test_kubernetes_does_not_expand_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert gke.main([*GKE, "--dry_run", "--", "train", "--gin.A=$(HOME)"]) == 0
    assert '"--gin.A=$$(HOME)"' in capsys.readouterr().out


def test_slurm(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = dry(
        slurm, capsys, "--nodes=4", "--time=1:00:00", "--partition=gpu", "--setup=module load cuda", "--env", "A=b c"
    )
    script = tmp_path / "job.sh"
    script.write_text(text)
    subprocess.run(["bash", "-n", str(script)], check=True)
    directives = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    for wanted in (
        "--nodes=4",
        "--ntasks-per-node=8",
        "--time=1:00:00",
        "--partition=gpu",
        "--signal=TERM@300",
        "--requeue",
    ):
        assert f"#SBATCH {wanted}" in directives
    assert "#SBATCH --account" not in text


@pytest.mark.parametrize(
    ("code", "before", "requeued"),
    [(0, 0, False), (2, 0, False), (65, 0, False), (75, 0, True), (137, 2, True), (75, 3, False)],
)
def test_the_slurm_script_requeues_a_run_that_another_start_may_help(
    tmp_path: Path, capsys, code: int, before: int, requeued: bool
) -> None:
    """The script run by bash, with stand-ins for Slurm's tools."""
    text = dry(slurm, capsys, "--env", "A=b c", "--max_restarts=3")
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "srun").write_text(
        f'#!/bin/sh\nprintf "%s|" "$A" "$PALMJAX_RESTARTS" "$@" > {tmp_path}/srun\nexit {code}\n'
    )
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/scontrol\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    env = {"PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_ID": "77"}
    env |= {"SLURM_RESTART_COUNT": str(before)} if before else {}  # which a job's first start has not
    assert subprocess.run(["bash", "-c", text], env=env, check=False).returncode == code
    said = (tmp_path / "srun").read_text()
    assert said == f"b c|{before or ''}|--kill-on-bad-exit=1|python3|-m|palmjax|train|x.gin|{HARD}|"
    assert (tmp_path / "scontrol").exists() == requeued
    assert not requeued or (tmp_path / "scontrol").read_text() == "requeue 77\n"


@pytest.mark.parametrize(
    ("module", "argv", "said"),
    [
        (gke, [*GKE, "--name=Palm_8B"], "--name Palm_8B"),
        (gke, [*GKE, "--env", "nonsense"], "--env nonsense: expected KEY=VALUE"),
        (slurm, ["--name=two words"], "no spaces or quotes"),
        (tpu_vm, ["--zone=z"], "--name"),
    ],
)
def test_bad_options_are_said_in_a_line(module, argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        module.main([*argv, "--dry_run", "--", "train", "x.gin"])
    assert exit_.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(("module", "argv", "tool"), [(gke, GKE, "kubectl"), (slurm, [], "sbatch")])
def test_a_missing_tool_is_named(
    module, argv: list[str], tool: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert shutil.which(tool) is None
    assert module.main([*argv, "--", "train", "x.gin"]) == 127
    assert f"{tool} is not installed here" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "argv", "tool"), [(gke, GKE, "kubectl"), (slurm, [], "sbatch")])
def test_what_is_submitted_is_what_the_dry_run_prints(
    module,
    argv: list[str],
    tool: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    printed = dry(module, capsys, *argv)
    fake = tmp_path / tool
    fake.write_text(f"#!/bin/sh\ncat > {tmp_path}/stdin\nexit 5\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert module.main([*argv, "--", "train", "x.gin", HARD]) == 5
    assert (tmp_path / "stdin").read_text().strip() == printed.strip()


def test_launchers_never_import_palmjax() -> None:
    for file in (ROOT / "launch").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.split(".")[0] in ("palmjax", "jax")], file
