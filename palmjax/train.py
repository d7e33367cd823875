"""Training: the composition root and the loop. `palmjax train FILE.gin [--gin.KEY=VALUE ...]`; run again to resume.

A run is a pure function of its configuration. The loop only launches steps: batches are read ahead, metrics are written
one step late, and checkpoints are written in the background. What the guard decides from the metrics (a rewind), and
what a person changes (overrides.json), is written down first; then the run goes on from its newest checkpoint in force
as it would after a kill, by the same lines of code.

Events in metrics.jsonl, beside those of `palmjax.guard.watch`; `step` counts as the train lines do:
    start       step, origin, mesh, code, config (digest: configs/<config>.gin), rewinds, skips, overrides, changes
    first step  step, seconds (of the phases before it)
    restart     step, attempt, exit_code: the launcher has started the job again after it ended with that code
    restore skipped  checkpoint (step), reason, path: a damaged one was passed over and set aside
    checkpoint  step, blocked, seconds, bytes, deleted: a save has become whole (`checkpoint.Saved`)
    rewind      number, step (decided at), to, skips, rows ([first, end) passed over), why
    overrides   step, why: overrides.json has changed; a start follows, which says what it is now
    preempted   step, why
    stopped     step, why
    done        step
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import enum
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from palmjax.metrics.startup import StartupClock

_clock = StartupClock()

import jax  # noqa: E402 - the clock starts before the slow imports

from palmjax import distributed, guard, model_dir  # noqa: E402
from palmjax.attempt import Attempt, Job, begin  # noqa: E402
from palmjax.config import Experiment  # noqa: E402
from palmjax.run import NO_TEXT, Description, Profile, Run  # noqa: E402
from palmjax.trained import enable_compilation_cache  # noqa: E402
from palmjax.watchdog import Watchdog  # noqa: E402


class Ended(enum.Enum):
    """How the loop has ended; the value is the process's exit code. AGAIN: it goes on from its newest checkpoint."""

    DONE = 0
    STOPPED = guard.EXIT_STOPPED
    PREEMPTED = guard.EXIT_PREEMPTED
    AGAIN = -1


def train(experiment: Experiment, description: Description = NO_TEXT, clock: StartupClock = _clock) -> int:
    """Runs `experiment` to its last step, or from its newest checkpoint on. Returns the process's exit code.

    0: done. `guard.EXIT_PREEMPTED`: asked to stop; saved, run the same command again. `guard.EXIT_STOPPED`: the guard
    has stopped it, and has said why. Raises ConfigError for what the user can mend.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(model_dir.lock(experiment.model_dir))
        run = Run(experiment, description)
        heldout = run.open_heldout()
        clock.mark("data")
        if run.is_done():
            print(f"{run.folder} has all of TRAIN_STEPS = {run.settings.steps}; raise it to go on", file=sys.stderr)
            return 0
        job = Job(
            run=run,
            heldout=heldout,
            tasks=run.open_tasks(),
            pool=stack.enter_context(ThreadPoolExecutor(1, "palmjax-compile")),
            preemption=stack.enter_context(guard.Preemption()),
            profile=stack.enter_context(Profile(run.settings.profile_steps, run.folder)),
            clock=clock,
            rewinds=guard.read_rewinds(run.folder),
            watchdog=stack.enter_context(Watchdog(run.settings.watchdog, run.folder)),
        )
        ended = Ended.AGAIN
        while ended is Ended.AGAIN:
            with contextlib.ExitStack() as opened:
                with job.watchdog.phase("start"):
                    going = begin(job, opened)
                    if going.first < run.settings.steps:
                        run.steps[run.dataset.batch_size(going.first)]
                clock.mark("compile")
                ended = loop(job, going)
                if ended is Ended.DONE:
                    with job.watchdog.phase("end"):
                        finish(job, going)
                del going  # its state, before the next one is read
        return ended.value


def loop(job: Job, going: Attempt) -> Ended:
    """Launches the steps up to the last one, which DONE means is computed and saved."""
    run, recorder, saver, settings = job.run, going.recorder, going.saver, job.run.settings
    blocked = waited = 0.0
    for step in range(going.first, settings.steps):
        job.profile.before(step)
        batch, rows = next(going.batches), run.dataset.batch_size(step)
        if not run.steps.has(rows):
            with job.watchdog.phase("compilation"):
                run.steps[rows]
        going.state, metrics = run.steps[rows](going.state, batch)
        job.profile.after(step, metrics)
        tokens, data_wait = rows * run.length, going.batches.seconds_waited - waited
        recorder.record(step + 1, metrics, tokens=tokens, data_wait=data_wait, checkpoint_block=blocked)
        job.watchdog.step_ended(step)  # the one before: its metrics have come
        waited, blocked, done = going.batches.seconds_waited, 0.0, step + 1
        if not job.launched:
            jax.block_until_ready(metrics)
            job.clock.mark("step")
            recorder.message(job.clock.describe())
            recorder.event("first step", step=done, seconds=job.clock.seconds)
        job.launched += 1
        asked = job.preemption.reached(job.launched)  # of numbers that rise, as steps do not where a run rewinds
        scores: Mapping[str, float] = {}
        # Before the save: a run that is killed in between evaluates again instead of never.
        if settings.eval_period and done % settings.eval_period == 0 and done < settings.steps:
            with job.watchdog.phase("evaluation"):
                scores = going.evaluate(done, settings.eval_steps)
        saving = saver.should_save(done) or done == settings.steps or asked
        if saving:
            recorder.flush()  # the line of this step is on disk before its checkpoint can be, and the guard has seen it
        if going.watch.verdict is not None:
            return decided(job, going)
        if saving:
            with job.watchdog.phase("save"):
                blocked = going.save(done, scores)
        going.note(saver.check())
        if asked:
            with job.watchdog.phase("save"):
                going.note(saver.wait())
            recorder.event("preempted", step=done, why=f"{job.preemption.why}: saved")
            recorder.message(f"asked to stop: checkpoint_{done} is saved; run the same command again to go on")
            return Ended.PREEMPTED
        if saving and done < settings.steps and going.overrides_changed(done):
            with job.watchdog.phase("save"):
                going.note(saver.wait())
            return Ended.AGAIN
    return Ended.DONE


def decided(job: Job, going: Attempt) -> Ended:
    """Writes down what the guard has decided; the step under way is given up."""
    verdict, recorder = going.watch.verdict, going.recorder
    with job.watchdog.phase("save"):
        going.note(going.saver.wait())
    recorder.flush()
    if isinstance(verdict, guard.Stop):
        recorder.event("stopped", step=verdict.step, why=verdict.why)
        recorder.message(
            f"error: {verdict.why}\n"
            f"palmjax replay --run {job.run.folder} --step {verdict.step} --print_batch shows what was read; "
            f"{guard.OVERRIDES} in MODEL_DIR can skip it or lower the learning rate"
        )
        return Ended.STOPPED
    assert isinstance(verdict, guard.Rewind)
    number, order = len(job.rewinds) + 1, job.run.dataset
    rows = order.first_row(verdict.to, going.skips), order.first_row(verdict.to, verdict.skips)
    why = f"back from step {verdict.step} to step {verdict.to}, past rows {rows[0]}..{rows[1]}"
    recorder.event("rewind", number=number, **dataclasses.asdict(verdict), rows=rows, why=why)
    recorder.message(f"rewind {number}: {why}")
    recorder.flush()
    job.rewinds = (*job.rewinds, verdict)
    if jax.process_index() == 0:
        guard.write_rewinds(job.run.folder, job.rewinds)
    return Ended.AGAIN


def finish(job: Job, going: Attempt) -> None:
    """The end: the whole held-out split, and a sample."""
    run, recorder, settings = job.run, going.recorder, job.run.settings
    going.note(going.saver.wait())
    going.evaluate(settings.steps, None)
    if settings.sample_prompt is not None:
        recorder.message(run.sample(going.state.params))
    recorder.event("done", step=settings.steps)


def main(argv: Sequence[str] | None = None) -> int:
    """`palmjax train FILE.gin [...]`. T5X's flags for several processes are understood too."""
    from palmjax import configure

    flags, rest = configure.parse_flags(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="palmjax train",
        description="Train a model from gin files. Run the same command again to go on from its newest checkpoint.",
        epilog=configure.USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    distributed.add_flags(parser)
    options = parser.parse_args(rest)
    loaded = configure.load(flags.files, flags.bindings, flags.search_paths)
    flat = {name: repr(value) for name, value in loaded.flat().items()}
    enable_compilation_cache(loaded.experiment.train.compilation_cache)
    _clock.mark("imports")
    with distributed.session(options):
        return train(loaded.experiment, Description(operative=loaded.operative, flat=flat))


if __name__ == "__main__":
    from palmjax.cli import run_main

    raise SystemExit(run_main(main))
