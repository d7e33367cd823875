"""A run on its way: from its newest checkpoint in force on, until it ends, rewinds or follows other overrides."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import jax

from palmjax import checkpoint, distributed, guard, model_dir, provenance
from palmjax.config import ConfigError
from palmjax.data import feed
from palmjax.data.order import Skips
from palmjax.evaluation.heldout import HeldOut
from palmjax.evaluation.suites import Session
from palmjax.metrics import Recorder, StartupClock
from palmjax.run import Profile, Run
from palmjax.state import TrainState
from palmjax.step import tensor_names
from palmjax.watchdog import Watchdog


@dataclasses.dataclass(kw_only=True)
class Job:
    """What this process keeps from one attempt to the next. rewinds: all that were decided. launched: steps, ever.

    overrides: those followed last.
    """

    run: Run
    heldout: HeldOut | None
    tasks: Session | None
    pool: ThreadPoolExecutor
    preemption: guard.Preemption
    profile: Profile
    clock: StartupClock
    rewinds: tuple[guard.Rewind, ...]
    watchdog: Watchdog
    overrides: guard.Overrides | None = None
    launched: int = 0


@dataclasses.dataclass(kw_only=True)
class Attempt:
    """A run on its way from one step on, until it ends, rewinds or follows other overrides."""

    run: Run
    heldout: HeldOut | None
    tasks: Session | None
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
        """Scores the held-out split and the tasks, if there are any, records them and returns the numbers by name; a
        task's own name is in front of its numbers' (`piqa_acc`).
        """
        found = {} if self.heldout is None else dict(self._held_out(self.heldout, step, max_batches))
        if self.tasks is not None:
            with self.recorder.paused():
                began = time.perf_counter()
                outcomes = self.tasks.values(self.state.params)
                seconds = (time.perf_counter() - began) / len(outcomes)  # all were asked at once
                for one in outcomes:
                    self.recorder.evaluation(step, one.name, one.summary(), seconds=seconds)
                    found |= {f"{one.name}_{name}": value for name, value in one.summary().items()}
        return found

    def _held_out(self, heldout: HeldOut, step: int, max_batches: int | None) -> Mapping[str, float]:
        # Scores of a part and of the whole are not points of one curve.
        part = self.run.settings.eval_steps is not None and max_batches is None
        name = f"{heldout.task}_all" if part else heldout.task
        with self.recorder.paused():
            began = time.perf_counter()
            result = heldout.run(self.state.params, max_batches)
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


def begin(job: Job, stack: contextlib.ExitStack) -> Attempt:
    """From the newest checkpoint in force, the initial one or scratch; `stack` closes what it opens.

    All processes call it together. Raises ConfigError if there is nothing that it can begin with.
    """
    run, settings, primary = job.run, job.run.settings, jax.process_index() == 0
    # ---- What has been decided ----
    overrides = job.overrides = _read_overrides(job)
    if primary:
        guard.remove_void(run.folder, model_dir.steps(run.folder), run.rewinds_at, job.rewinds)
    # Also: nobody looks for the newest checkpoint before the void ones are gone.
    distributed.meet("void checkpoints are gone")
    newest = model_dir.newest(run.folder)
    _check_steps_left(run, newest)
    run.follow(overrides, newest or 0, job.pool)
    if job.heldout is not None and not job.launched:
        job.pool.submit(job.heldout.compile, run.program.abstract_state.params)

    # ---- State: own checkpoint, initial checkpoint, scratch ----
    saver = stack.enter_context(checkpoint.Checkpointer(run.folder, run.experiment.checkpoint.save))
    prog, initial = run.program, run.experiment.checkpoint.restore.path
    start = checkpoint.start(run.folder, initial, prog.abstract_state, prog.initial_state, run.dataset.vocabulary)
    first, info = int(start.state.step), start.info if start.resumed else None
    memory = info.guard if info is not None else {}
    if (known := memory.get("rewinds", 0)) > len(job.rewinds):
        raise ConfigError(
            f"{start.origin} was saved behind {known} rewinds, of which {guard.RECORD} knows {len(job.rewinds)}: what "
            "holds a loss spike can't be told from the rest\nput that file back beside the checkpoint"
        )
    overrides.check(first, memory.get("overrides", {}))
    skips = run.skips(start, first, job.rewinds, overrides)
    job.clock.mark("state")

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
            is_primary=primary,
        )
    )
    if primary:
        run.write_texts()
    job.watchdog.tell = recorder.event
    _announce(job, recorder, start, first, skips, overrides)

    batches = feed.Feed(run.dataset, run.batch_sharding(), first, max(first, settings.steps), skips)
    return Attempt(
        run=run,
        heldout=job.heldout,
        tasks=job.tasks,
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


def _check_steps_left(run: Run, newest: int | None) -> None:
    """Raises ConfigError if the run would begin behind its last step: it would be called done with nothing trained.

    newest: the step of MODEL_DIR's newest checkpoint.
    """
    initial = run.experiment.checkpoint.restore.path
    if newest is not None:
        if newest > run.settings.steps:
            raise ConfigError(
                f"{run.folder} has {model_dir.PREFIX}{newest}, which is past TRAIN_STEPS = {run.settings.steps}; "
                "raise it to go on, or choose another MODEL_DIR"
            )
    elif initial is not None and (step := checkpoint.read_info(initial).step) >= run.settings.steps:
        raise ConfigError(
            f"{initial} stands at step {step}, and TRAIN_STEPS = {run.settings.steps} includes its steps: "
            f"nothing is left to train; to train 1000 more, set {step + 1000}"
        )


def _read_overrides(job: Job) -> guard.Overrides:
    """What overrides.json says, as process 0 reads it. Raises ConfigError if that can't be followed, unless the run is
    on its way already: a typing error must not end one that rewinds, and is told at the next checkpoint.
    """
    problem, value = "", {}
    if jax.process_index() == 0:
        try:
            value = guard.Overrides.read(job.run.folder).to_json()
        except ConfigError as error:
            problem = str(error)
    problem, value = json.loads(distributed.text_from_first(json.dumps([problem, value])))
    if not problem:
        return guard.Overrides.from_json(value)
    if job.overrides is None:
        raise ConfigError(problem)
    return job.overrides


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
    restarts = os.environ.get("PALMJAX_RESTARTS")  # the launchers'
    if restarts is not None and not job.launched:
        code = os.environ.get("PALMJAX_LAST_EXIT")  # a queue does not keep it
        recorder.event("restart", step=first, attempt=int(restarts), exit_code=None if code is None else int(code))
