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
    overrides   step, overrides, why: overrides.json has changed; a start follows
    preempted   step
    stopped     step, why
    done        step
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import enum
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from palmjax.metrics.startup import StartupClock

_clock = StartupClock()

import jax  # noqa: E402 - the clock starts before the slow imports

from palmjax import checkpoint, distributed, guard, model_dir, provenance  # noqa: E402
from palmjax.config import ConfigError, Experiment  # noqa: E402
from palmjax.data import feed  # noqa: E402
from palmjax.data.order import Skips  # noqa: E402
from palmjax.evaluation.heldout import HeldOut  # noqa: E402
from palmjax.metrics import Recorder  # noqa: E402
from palmjax.run import NO_TEXT, Description, Profile, Run  # noqa: E402
from palmjax.state import TrainState  # noqa: E402
from palmjax.step import tensor_names  # noqa: E402
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
            pool=stack.enter_context(ThreadPoolExecutor(1, "palmjax-compile")),
            preemption=stack.enter_context(guard.Preemption()),
            profile=stack.enter_context(Profile(run.settings.profile_steps, run.folder)),
            clock=clock,
            rewinds=guard.read_rewinds(run.folder),
            watchdog=stack.enter_context(Watchdog(run.settings.watchdog, run.folder)),
        )
        ended = Ended.AGAIN
        while ended is Ended.AGAIN:
            ended = attempt(job)
        return ended.value


@dataclasses.dataclass(kw_only=True)
class Job:
    """What this process keeps from one attempt to the next. rewinds: all that were decided. launched: steps, ever."""

    run: Run
    heldout: HeldOut | None
    pool: ThreadPoolExecutor
    preemption: guard.Preemption
    profile: Profile
    clock: StartupClock
    rewinds: tuple[guard.Rewind, ...]
    watchdog: Watchdog
    launched: int = 0


@dataclasses.dataclass(kw_only=True)
class Attempt:
    """A run on its way from one step on, until it ends, rewinds or follows other overrides."""

    run: Run
    heldout: HeldOut | None
    state: TrainState
    first: int
    skips: Skips
    rewinds: int
    overrides: guard.Overrides
    watch: guard.Watch
    saver: checkpoint.Checkpointer
    recorder: Recorder
    batches: feed.Feed

    def info(self, step: int, scores: Mapping[str, float]) -> provenance.RunInfo:
        """What a checkpoint of `step` says of the run; the metrics of all steps before it are known.

        scores: of the held-out evaluation at this step, if there was one.
        """
        run = self.run
        return provenance.RunInfo(
            seed=run.settings.seed,
            data=provenance.DataPosition(
                first_row=run.dataset.first_row(step, self.skips), skips=self.skips, fingerprint=run.dataset.fingerprint
            ),
            config=run.description.operative,
            flat_config=run.description.flat,
            vocabulary=run.dataset.vocabulary,
            mesh=dict(run.mesh.shape),
            code=provenance.code_version(),
            libraries=provenance.library_versions(),
            metrics=scores,
            guard={"rewinds": self.rewinds, "overrides": self.overrides.to_json(), **self.watch.memory()},
        )

    def evaluate(self, step: int, max_batches: int | None) -> Mapping[str, float]:
        """Scores the held-out split, if there is one, records it and returns the numbers by name."""
        if self.heldout is None:
            return {}
        # Scores of a part and of the whole are not points of one curve.
        part = self.run.settings.eval_steps is not None and max_batches is None
        name = f"{self.heldout.task}_all" if part else self.heldout.task
        with self.recorder.paused():
            began = time.perf_counter()
            result = self.heldout.run(self.state.params, max_batches)
            self.recorder.evaluation(step, name, result.metrics(), seconds=time.perf_counter() - began)
        return result.metrics()

    def save(self, step: int, scores: Mapping[str, float]) -> float:
        """Begins to save; returns the seconds that the loop stood still."""
        began = time.perf_counter()
        self.saver.save(step, self.state, self.info(step, scores))
        return time.perf_counter() - began

    def note(self, saved: checkpoint.Saved | None) -> None:
        """Records a checkpoint that has become whole."""
        if saved is not None:
            self.recorder.event("checkpoint", **dataclasses.asdict(saved))

    def overrides_changed(self, step: int) -> bool:
        """Whether overrides.json says something new, as process 0 sees it. A mistake in it is told and changes nothing:
        a typing error must not end a run that is well.
        """
        changed = False
        if jax.process_index() == 0:
            try:
                new = guard.Overrides.read(self.run.folder)
                new.check(step, self.overrides.to_json())
                changed = new != self.overrides
            except ConfigError as error:
                self.recorder.message(f"not followed: {error}")
        changed = distributed.from_first(changed)
        if changed:
            self.recorder.event("overrides", step=step, why=f"{guard.OVERRIDES} has changed")
        return changed


def attempt(job: Job) -> Ended:
    """From the newest checkpoint in force to an end. All processes call it together."""
    run, settings = job.run, job.run.settings
    is_primary, clock = jax.process_index() == 0, job.clock
    with contextlib.ExitStack() as stack:
        starting = stack.enter_context(contextlib.ExitStack())
        starting.enter_context(job.watchdog.phase("start"))
        # ---- What has been decided ----
        overrides = guard.Overrides.read(run.folder)
        if is_primary:
            guard.remove_void(run.folder, model_dir.steps(run.folder), run.rewinds_at, job.rewinds)
        # Also: nobody looks for the newest checkpoint before the void ones are gone.
        distributed.agree("guard.json or overrides.json", f"{job.rewinds} {overrides}")
        run.follow(overrides, model_dir.newest(run.folder) or 0, job.pool)
        if job.heldout is not None and not job.launched:
            job.pool.submit(job.heldout.compile, run.program.abstract_state.params)

        # ---- State: own checkpoint, initial checkpoint, scratch ----
        saver = stack.enter_context(checkpoint.Checkpointer(run.folder, run.experiment.checkpoint.save))
        prog, initial = run.program, run.experiment.checkpoint.restore.path
        start = checkpoint.start(run.folder, initial, prog.abstract_state, prog.initial_state, run.dataset.vocabulary)
        first, info = int(start.state.step), start.info if start.resumed else None
        memory = info.guard if info is not None else {}
        overrides.check(first, memory.get("overrides", {}))
        skips = run.skips(start, first, job.rewinds, overrides)
        clock.mark("state")

        # ---- What a run leaves behind ----
        watch = guard.Watch(
            run.experiment.guard,
            position=guard.Position(order=run.dataset, skips=skips),
            save_period=run.experiment.checkpoint.save.period,
            tensors=tensor_names(prog.abstract_state.params),
            rewinds=job.rewinds,
            memory=memory,
            loss_scale=None if run.experiment.loss_scale is None else run.experiment.loss_scale.build(),
        )
        recorder = stack.enter_context(
            Recorder(
                run.folder,
                run.throughput(),
                total_steps=settings.steps,
                start_step=first,
                log_period=settings.log_period,
                tensorboard=settings.tensorboard,
                rewinds=len(job.rewinds),
                observer=watch.observe,
                is_primary=is_primary,
            )
        )
        if is_primary:
            run.write_texts()
        job.watchdog.tell = recorder.event
        _announce(job, recorder, start, first, skips, overrides)

        # ---- The loop ----
        batches = feed.Feed(run.dataset, run.batch_sharding(), first, max(first, settings.steps), skips)
        going = Attempt(
            run=run,
            heldout=job.heldout,
            state=start.state,
            first=first,
            skips=skips,
            rewinds=len(job.rewinds),
            overrides=overrides,
            watch=watch,
            saver=saver,
            recorder=recorder,
            batches=stack.enter_context(batches),
        )
        del start  # its state is the loop's to donate
        if first < settings.steps:
            run.steps[run.dataset.batch_size(first)]
        clock.mark("compile")
        starting.close()
        ended = loop(job, going)
        stack.enter_context(job.watchdog.phase("end"))
        return finish(job, going) if ended is Ended.DONE else ended


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
            recorder.event("preempted", step=done)
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


def finish(job: Job, going: Attempt) -> Ended:
    """The end: the whole held-out split, and a sample."""
    run, recorder, settings = job.run, going.recorder, job.run.settings
    going.note(going.saver.wait())
    going.evaluate(settings.steps, None)
    if settings.sample_prompt is not None:
        recorder.message(run.sample(going.state.params))
    recorder.event("done", step=settings.steps)
    return Ended.DONE


def _announce(
    job: Job, recorder: Recorder, start: checkpoint.Start, first: int, skips: Skips, overrides: guard.Overrides
) -> None:
    """Says, on the console and in an event, where the run begins and what is in force."""
    run = job.run
    changes = run.description.changes_since(start.info) if start.resumed else []
    lines = [*run.describe(), *(f"changed since the checkpoint: {change}" for change in changes)]
    for line in lines if not job.launched else ():  # said once
        recorder.message(line)
    recorder.message(f"from {start.origin}, step {first}")
    if overrides.to_json():
        recorder.message(f"overridden by hand: {json.dumps(overrides.to_json())}")
    recorder.event(
        "start",
        step=first,
        origin=start.origin,
        mesh=dict(run.mesh.shape),
        code=provenance.code_version(),
        config=run.description.digest,
        rewinds=len(job.rewinds),
        skips=skips,
        overrides=overrides.to_json(),
        changes=changes,
    )
    for lost in start.skipped:
        recorder.event("restore skipped", checkpoint=lost.step, reason=lost.reason, path=lost.path)
        recorder.message(f"checkpoint_{lost.step} was passed over: {lost.reason}; it lies in {lost.path}")
    restarts = os.environ.get("PALMJAX_RESTARTS")  # launch.local's
    if restarts is not None and not job.launched:
        code = int(os.environ.get("PALMJAX_LAST_EXIT", "0"))
        recorder.event("restart", step=first, attempt=int(restarts), exit_code=code)


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
