"""A job on a Slurm cluster, one process a GPU. Prints the batch script, or submits it with sbatch.

    python -m launch.slurm --nodes 4 --gpus_per_node 8 --time 24:00:00 -- train gin/exp/palm_8b.gin

The processes find each other through Slurm's own variables. Slurm sends SIGTERM before the time is over; the run saves
and ends with exit code 75. Behind every end that another start may help, this one and a lost node alike, the script
puts itself back into the queue, up to `--max_restarts` times (Slurm counts them, its own requeues included).
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Mapping, Sequence

from launch import command


def script(options: argparse.Namespace, arguments: Sequence[str], added: Mapping[str, str]) -> str:
    """The batch script."""
    flags = {
        "job-name": options.name,
        "nodes": options.nodes,
        "ntasks-per-node": options.gpus_per_node,
        "gpus-per-node": options.gpus_per_node,
        "cpus-per-task": options.cpus_per_task,
        "time": options.time,
        "signal": f"TERM@{options.grace}",
        "output": options.output,
        "open-mode": "append",
        "partition": options.partition,
        "account": options.account,
    }
    directives = "\n".join(f"#SBATCH --{name}={value}" for name, value in flags.items() if value is not None)
    exports = "\n".join(f"export {key}={shlex.quote(value)}" for key, value in {**command.AUTO, **added}.items())
    setup = f"\n{options.setup}" if options.setup else ""
    line = command.as_shell(command.palmjax(arguments, options.python))
    final = "|".join(map(str, command.FINAL))
    return f"""#!/bin/bash
{directives}
#SBATCH --requeue

{exports}{setup}
restarts="${{SLURM_RESTART_COUNT:-0}}"
if [ "$restarts" -gt 0 ]; then
    export PALMJAX_RESTARTS="$restarts"
fi
srun --kill-on-bad-exit=1 {line}
code=$?
case "$code" in
{final}) ;;
*)
    if [ "$restarts" -lt {options.max_restarts} ]; then
        echo "exit code $code: restart $((restarts + 1)) of {options.max_restarts}"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    ;;
esac
exit "$code"
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns sbatch's exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.slurm", description="A Slurm cluster of GPUs.")
    parser.add_argument("--name", default="palmjax", help="of the job (palmjax)")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus_per_node", type=int, default=8)
    parser.add_argument("--cpus_per_task", type=int)
    parser.add_argument("--time", default="24:00:00", help="wall-clock limit (24:00:00)")
    parser.add_argument(
        "--grace", type=int, default=300, help="seconds before the limit at which to save and leave (300)"
    )
    command.add_max_restarts(parser, 100)
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument(
        "--output", default="slurm-%j.out", help="log file, appended to after a requeue (slurm-%%j.out)"
    )
    parser.add_argument("--python", default="python3", help="such as .venv/bin/python (python3)")
    parser.add_argument("--setup", help="a shell command to run first, such as `module load cuda`")
    parser.add_argument("--env", action="append", default=[], metavar="KEY=VALUE", help="may be given several times")
    options, arguments = command.parse(parser, argv)
    for name in ("name", "time", "partition", "account", "output"):
        if re.search(r"[\s\"'`$\\]", value := getattr(options, name) or ""):
            parser.error(f"--{name} {value!r}: no spaces or quotes, sbatch's directives can't hold them")
    text = script(options, arguments, command.pairs(options.env, parser))
    if options.dry_run:
        print(text, end="")
        return 0
    return command.submit(["sbatch"], text)


if __name__ == "__main__":
    raise SystemExit(main())
