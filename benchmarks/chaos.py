"""One run, killed a hundred times: are its final bits those of a run that nobody disturbed?

    python -m benchmarks.chaos --kills 100 --seed 0
    python -m benchmarks.chaos --kills 0 --stop 120 --clock

A tiny PaLM is trained twice on the same text. The second run is ended by SIGKILL at random instants, start-up, steps
and saves alike, and started again each time; most attempts are forked from a process that has imported palmjax, so that
the time goes into what can be lost. Printed: where the kills fell, how many steps were computed twice, and how
many of the final state's arrays, optimizer moments included, are equal bit for bit; exit code 1 unless all are. After
each kill the next attempt must go on from the newest checkpoint that was whole when the process died: "lost" counts
the attempts that did not. With --stop a run is stopped amid its steps (SIGSTOP) for so many seconds and goes on, under
a watchdog that would take a tenth of that for a hang. With --clock a run's wall clock jumps amid its steps, an hour
ahead and then two back (`wall_clock.c`, which needs a C compiler).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from palmjax import model_dir
from palmjax.checkpoint import inspect

ROOT = Path(__file__).parent.parent
GIN = """
include "run/train.gin"
include "models/palm.gin"
include "optim/palm_adafactor.gin"
include "data/text_files.gin"
VOCAB_SIZE = 264
Decoder.num_layers = 2
Decoder.d_model = 64
Decoder.dtype = "float32"
Attention.num_heads = 4
Attention.head_dim = 16
SwiGLU.d_ff = 128
DROPOUT_RATE = 0.1
TASK_FEATURE_LENGTHS = {"targets": 64}
BATCH_SIZE = 16
EVAL_BATCH_SIZE = 8
EVAL_PERIOD = 0
EVAL_STEPS = 2
TextFiles.validation_share = 0.2
SaveCheckpointConfig.period = 5
SaveCheckpointConfig.keep = 2
TrainConfig.log_period = 100
TrainConfig.tensorboard = False
"""
WORDS = ["the", "model", "reads", "a", "row", "of", "tokens", "and", "learns", "what", "follows", "from", "before"]


@dataclasses.dataclass(frozen=True)
class Job:
    """A tiny job in `folder`: its gin file, its text and its token store; each run has its own MODEL_DIR."""

    folder: Path
    steps: int

    def prepare(self) -> Job:
        rng = random.Random(0)
        (self.folder / "text").mkdir(parents=True, exist_ok=True)
        for i in range(40):
            lines = [" ".join(rng.choices(WORDS, k=rng.randint(4, 12))) for _ in range(60)]
            (self.folder / "text" / f"{i:03}.txt").write_text("\n".join(lines) + "\n")
        (self.folder / "job.gin").write_text(GIN)
        return self

    def arguments(self, run: Path, *bindings: str) -> list[str]:
        """Of `palmjax`."""
        values = {
            "MODEL_DIR": run,
            "TRAIN_FILES": self.folder / "text" / "*.txt",
            "STORE_DIR": self.folder / "stores",
            "TRAIN_STEPS": self.steps,
        }
        given = [*(f"--gin.{name}={value}" for name, value in values.items()), *(f"--gin.{b}" for b in bindings)]
        return ["train", str(self.folder / "job.gin"), *given]

    def start(self, run: Path, *bindings: str, **added: str) -> subprocess.Popen[str]:
        """`palmjax train` as a user starts it. added: to its environment."""
        with (run.parent / f"{run.name}.log").open("a") as console:
            return subprocess.Popen(
                [sys.executable, "-m", "palmjax", *self.arguments(run, *bindings)],
                cwd=ROOT,
                env=environment() | added,
                stdout=console,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def fork(self, run: Path) -> Forked:
        """The same, of a process that has imported already what the run needs."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["palmjax.train", "orbax.checkpoint", "palmjax.configure"])
        os.environ.update(environment())  # which the server, and with it every child, is started with
        process = context.Process(target=_forked, args=(self.arguments(run), f"{run}.log"), daemon=True)
        process.start()
        return Forked(process)


@dataclasses.dataclass(frozen=True)
class Forked:
    """What `disturb` needs of a process."""

    process: Any

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()

    def wait(self) -> int:
        self.process.join()
        return self.process.exitcode


def _forked(arguments: Sequence[str], console: str) -> None:
    from palmjax import cli

    descriptor = os.open(console, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.exit(cli.main(arguments))


def environment() -> dict[str, str]:
    return os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}


class Log:
    """A run's metrics.jsonl as it grows: each line is parsed once, so that looking often takes nothing from the run."""

    def __init__(self, run: Path):
        self._path = run / "metrics.jsonl"
        self._file: Any = None
        self._forget()

    def _forget(self) -> None:
        self._rest = b""
        self.last_step = 0
        self.starts: list[dict[str, Any]] = []
        self.seconds: collections.deque[float] = collections.deque(maxlen=6)

    def look(self) -> Log:
        """Reads what is new."""
        with contextlib.suppress(FileNotFoundError):
            if self._file is None or self._path.stat().st_ino != os.fstat(self._file.fileno()).st_ino:
                self._forget()  # a start has cut off what was lost
                self._file = self._path.open("rb")
            *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
            for row in map(json.loads, lines):
                if row["kind"] == "train":
                    self.last_step = max(self.last_step, row["step"])
                    self.seconds.append(row["seconds"])
                elif row.get("event") == "start":
                    self.starts.append(row)
        return self

    def started(self, since: float) -> list[int]:
        """Steps at which attempts began since a time."""
        return [row["step"] for row in self.starts if row["time"] >= since]


@dataclasses.dataclass
class Outcome:
    """kills: how many by where they fell. lost: attempts that did not begin at the newest whole checkpoint. repeated:
    steps that were computed again. seconds: of all the attempts. starts: step at which each began.
    """

    kills: collections.Counter[str]
    lost: int = 0
    repeated: int = 0
    seconds: float = 0.0


def disturb(job: Job, run: Path, kills: int, seed: int) -> Outcome:
    """Runs `job` to its end with `kills` SIGKILLs on the way.

    One kill in eight falls into the start-up. The others wait for one of the next steps, and then for a random part of
    the time that eight steps and their saves take.
    """
    rng, out, began, log = random.Random(seed), Outcome(collections.Counter()), time.monotonic(), Log(run)
    for number in range(kills):
        before = model_dir.newest(run) or 0
        at = time.time()
        process: Any
        if rng.random() < 1 / 8:
            process = job.start(run)
            time.sleep(rng.random() * 4)
        else:
            process = job.fork(run)
            target = max(log.look().last_step, before) + 1 + rng.randrange(5)
            _wait_for_step(log, run, at, min(target, job.steps - 1), process)
            # A first step's seconds have the compilation in them.
            time.sleep(rng.random() * 8 * statistics.median(log.seconds))
        process.kill()
        process.wait()
        newest = model_dir.newest(run) or 0
        out.lost += any(step != before for step in log.look().started(at))
        out.repeated += max(0, log.last_step - newest)
        out.kills[_where(run, log.last_step > before)] += 1
        if newest >= job.steps:
            raise SystemExit(f"the run ended after {number + 1} kills: give it more --steps")
    process = job.start(run)
    if process.wait(600):
        raise SystemExit(f"the last attempt ended with {process.returncode}; see {run}.log")
    out.seconds = time.monotonic() - began
    return out


def _wait_for_step(log: Log, run: Path, since: float, step: int, process: Any) -> None:
    """Until the attempt that was started at `since` has written the metrics of `step`."""
    deadline = time.monotonic() + 300
    while not (log.look().started(since) and log.last_step >= step):
        if process.poll() is not None:
            if process.returncode == 0:
                return
            raise SystemExit(f"an attempt ended by itself with {process.returncode}; see {run}.log")
        if time.monotonic() > deadline:
            raise SystemExit(f"step {step} did not come in 300 s; see {run}.log")
        time.sleep(0.01)


def _where(run: Path, has_stepped: bool) -> str:
    """Where the kill fell, from what it left behind."""
    names = [path.name for path in run.glob("checkpoint_*.*")] if run.exists() else []
    for suffix, where in ((".deleting", "deleting an old one"), (".orbax-checkpoint-tmp", "writing a checkpoint")):
        if any(name.endswith(suffix) for name in names):
            return where
    if any(name.endswith(".written") for name in names):
        return "summing up a checkpoint"
    return "steps" if has_stepped else "start-up"


def stop(job: Job, run: Path, seconds: float) -> None:
    """Runs `job` with a pause of SIGSTOP amid its steps, watched by a dog with little patience."""
    dog = ("TrainConfig.watchdog=@WatchdogConfig()", f"WatchdogConfig.least_seconds={seconds / 10}")
    began, process = time.time(), job.start(run, *dog)
    _wait_for_step(Log(run), run, began, job.steps // 4, process)
    process.send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    process.send_signal(signal.SIGCONT)
    _end(run, process)


class WallClock:
    """The wall clock of processes that are started with its `environment`: whatever asks for the time there, Python or
    a library, gets the machine's plus `set`'s seconds, and waits for a time of day end by it. Needs a C compiler.
    """

    def __init__(self, folder: Path):
        compiler = shutil.which("cc")
        if compiler is None:
            raise SystemExit("a clock that jumps needs a C compiler (cc)")
        library, self._file = folder / "wall_clock.so", folder / "wall_clock"
        source = str(Path(__file__).with_name("wall_clock.c"))
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), source, "-ldl"], check=True)
        self._file.write_bytes(struct.pack("q", 0))
        self.environment = {"LD_PRELOAD": str(library), "WALL_CLOCK": str(self._file)}

    def set(self, seconds: int) -> None:
        with self._file.open("r+b", buffering=0) as file:
            file.write(struct.pack("q", seconds))


def jump(job: Job, run: Path) -> None:
    """Runs `job` with a wall clock that jumps an hour ahead in its first half, and an hour behind in its second."""
    clock = WallClock(run.parent)
    dog = ("TrainConfig.watchdog=@WatchdogConfig()", "WatchdogConfig.least_seconds=60")
    process = job.start(run, *dog, **clock.environment)
    for part, seconds in enumerate((3600, -3600), 1):
        _wait_for_step(Log(run), run, 0, part * job.steps // 4, process)
        clock.set(seconds)
    _end(run, process)
    times = [row["time"] for row in map(json.loads, (run / "metrics.jsonl").open()) if "time" in row]
    jumps = [round((after - before) / 3600) for before, after in itertools.pairwise(times)]
    if [hours for hours in jumps if hours] != [1, -2]:
        raise SystemExit(f"the clock did not jump under the run: hours between its events are {jumps}")


def _end(run: Path, process: subprocess.Popen[str]) -> None:
    if process.wait(1200):
        raise SystemExit(f"the run ended with {process.returncode}; see {run}.log")


def compare(a: Path, b: Path, steps: int) -> tuple[int, int]:
    """(equal arrays, arrays) of the two runs' final states."""
    changes, _ = inspect.diff(str(a / f"checkpoint_{steps}"), str(b / f"checkpoint_{steps}"))
    return sum(change.same for change in changes), len(changes)


def report(out: Outcome, kills: int, steps: int, equal: tuple[int, int]) -> Mapping[str, Any]:
    fell = ", ".join(f"{count} {where}" for where, count in out.kills.most_common())
    print(f"{kills} kills in {steps} steps: {fell}")
    print(f"{out.repeated} steps were computed twice, {out.lost} attempts began before the newest whole checkpoint")
    print(f"{equal[0]} of {equal[1]} arrays of the final state equal the undisturbed run's, bit for bit")
    print(f"{out.seconds:.0f} s, {out.seconds / (kills + 1):.1f} s an attempt")
    return {"kills": dict(out.kills), "lost": out.lost, "repeated": out.repeated, "equal": equal}


def _tell(what: str, equal: tuple[int, int]) -> bool:
    """Prints it; returns whether an array differs."""
    print(f"{what}: {equal[0]} of {equal[1]} arrays equal, bit for bit", flush=True)
    return equal[0] != equal[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if the disturbed run ended with the bits of the other one and lost nothing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, help="of the run (30 a kill)")
    parser.add_argument("--seed", type=int, default=0, help="of the instants (0)")
    parser.add_argument("--stop", type=float, metavar="SECONDS", help="also stop a run for so long")
    parser.add_argument("--clock", action="store_true", help="also let a run's wall clock jump")
    parser.add_argument("--folder", type=Path, help="where to work, kept; else a temporary one")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        folder = options.folder or Path(temporary)
        job = Job(folder.absolute(), options.steps or max(400, 30 * options.kills)).prepare()
        calm, disturbed = job.folder / "calm", job.folder / "disturbed"
        _end(calm, job.start(calm))
        wrong = 0
        if options.stop is not None:
            stop(job, job.folder / "stop", options.stop)
            wrong += _tell(f"stopped for {options.stop:.0f} s", compare(calm, job.folder / "stop", job.steps))
        if options.clock:
            jump(job, job.folder / "clock")
            wrong += _tell("the clock an hour ahead, then two back", compare(calm, job.folder / "clock", job.steps))
        if options.kills:
            out = disturb(job, disturbed, options.kills, options.seed)
            equal = compare(calm, disturbed, job.steps)
            report(out, options.kills, job.steps, equal)
            wrong += equal[0] != equal[1] or out.lost > 0
        return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
