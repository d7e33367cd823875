"""A job on all hosts of a Cloud TPU VM (a single host, or a pod slice), over `gcloud ... ssh --worker=all`.

    python -m launch.tpu_vm --name my-v4-32 --zone us-central2-b --dir palmjax -- train gin/exp/palm_8b.gin

palmjax must be installed on the hosts (`--setup` gives a command to run first on each). Every host runs the same
command; they find each other through the TPU's own metadata. With `--max_restarts` each host's shell starts its process
again: when one is lost the others leave within a minute, and all meet again.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence

from launch import command

PAUSE_SECONDS = 10
"""Between a process's end and its next start."""


def remote_line(
    arguments: Sequence[str],
    directory: str,
    python: str,
    added: Mapping[str, str],
    setup: str | None,
    max_restarts: int = 0,
) -> str:
    """What each host's shell runs."""
    steps = [f"cd {shlex.quote(directory)}"] if directory else []
    steps += [setup] if setup else []
    line = command.as_shell(command.palmjax(arguments, python), {**command.AUTO, **added})
    return " && ".join([*steps, again_and_again(line, max_restarts) if max_restarts else line])


def again_and_again(line: str, max_restarts: int) -> str:
    """A POSIX shell's loop around `line`, which ends with the code of its last end."""
    final = "|".join(map(str, command.FINAL))
    return (
        f"{{ n=0; while :; do {line}; code=$?; case $code in {final}) break;; esac; "
        f"[ $n -ge {max_restarts} ] && break; n=$((n + 1)); "
        f'echo "exit code $code: restart $n of {max_restarts}" >&2; sleep {PAUSE_SECONDS}; '
        "export PALMJAX_RESTARTS=$n PALMJAX_LAST_EXIT=$code; done; exit $code; }"
    )


def gcloud(name: str, zone: str, project: str | None, line: str) -> list[str]:
    """The gcloud command that runs `line` on every host of the TPU."""
    where = [f"--zone={zone}", *([f"--project={project}"] if project else [])]
    return ["gcloud", "compute", "tpus", "tpu-vm", "ssh", name, *where, "--worker=all", f"--command={line}"]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns gcloud's exit code: that of a host that failed, if any."""
    parser = argparse.ArgumentParser(prog="python -m launch.tpu_vm", description="All hosts of a Cloud TPU VM.")
    parser.add_argument("--name", required=True, help="the TPU VM's name")
    parser.add_argument("--zone", required=True)
    parser.add_argument("--project")
    parser.add_argument("--dir", default="", help="folder on the hosts to run in (the home folder)")
    parser.add_argument("--python", default="python3", help="the hosts' Python, such as .venv/bin/python (python3)")
    parser.add_argument("--setup", help="a shell command to run first")
    parser.add_argument("--env", action="append", default=[], metavar="KEY=VALUE", help="may be given several times")
    command.add_max_restarts(parser, 0)
    options, arguments = command.parse(parser, argv)
    added = command.pairs(options.env, parser)
    line = remote_line(arguments, options.dir, options.python, added, options.setup, options.max_restarts)
    call = gcloud(options.name, options.zone, options.project, line)
    if options.dry_run:
        print(command.as_shell(call))
        return 0
    return command.submit(call)


if __name__ == "__main__":
    raise SystemExit(main())
