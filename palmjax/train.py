"""Training: the composition root and the loop. `palmjax train FILE.gin [--gin.KEY=VALUE ...]`; run again to resume.

A run is a pure function of its configuration. The loop only launches steps: batches are read ahead, metrics are written
one step late, and checkpoints are written in the background.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from palmjax.metrics.startup import StartupClock

_clock = StartupClock()

import jax  # noqa: E402 - the clock starts before the slow imports

from palmjax import chips, distributed, guard, mesh, model_dir, provenance  # noqa: E402
from palmjax.config import ConfigError, Experiment, section  # noqa: E402
from palmjax.data import feed, index  # noqa: E402
from palmjax.data.order import Skips  # noqa: E402
from palmjax.data.vocabulary import Vocabulary  # noqa: E402
from palmjax.evaluation.heldout import HeldOut  # noqa: E402
from palmjax.metrics import Recorder, Throughput, read_metrics  # noqa: E402
from palmjax.models.account import account, parameter_table  # noqa: E402
from palmjax.models.api import LanguageModel  # noqa: E402
from palmjax.state import TrainState  # noqa: E402
from palmjax.step import Program, Step, program  # noqa: E402
from palmjax.trained import enable_compilation_cache  # noqa: E402

if TYPE_CHECKING:
    from palmjax.checkpoint import Start


@section
class Description:
    """The configuration as text. operative: gin that gives an equal experiment; flat: one line for each value."""

    operative: str = ""
    flat: Mapping[str, str] = dataclasses.field(default_factory=dict)


_NO_TEXT = Description()


class Steps:
    """The compiled step for each batch size. Sizes that come later are compiled when they come; the first at once,
    aside.
    """

    def __init__(self, prog: Program, length: int, first: int, pool: ThreadPoolExecutor):
        self._program, self._length = prog, length
        self._compiled: dict[int, Future[Step]] = {}
        self._pool = pool
        self._ask(first)

    def _ask(self, rows: int) -> Future[Step]:
        if rows not in self._compiled:
            self._compiled[rows] = self._pool.submit(lambda: self._program.lower(rows, self._length).compile())
        return self._compiled[rows]

    def __getitem__(self, rows: int) -> Step:
        return self._ask(rows).result()


def train(experiment: Experiment, description: Description = _NO_TEXT, clock: StartupClock = _clock) -> int:
    """Runs `experiment` to its last step, or from its newest checkpoint on. Returns the process's exit code.

    0: done. `guard.EXIT_PREEMPTED`: asked to stop; saved, run the same command again. Raises ConfigError for what the
    user can mend.
    """
    settings, folder = experiment.train, experiment.model_dir
    with contextlib.ExitStack() as stack:
        stack.enter_context(model_dir.lock(folder))
        modules = index.sources_of(experiment.train_dataset.modules)
        agreed = "\n".join([*description.flat.values(), str(provenance.code_version()), str(modules)])
        distributed.agree("gin files or code", hashlib.sha256(agreed.encode()).hexdigest())

        # ---- Data and the program; the step is compiled aside while the state is made ready ----
        placed = mesh.build(experiment.mesh)
        prog = program(experiment, placed)
        dataset = feed.open_dataset(experiment.train_dataset)
        distributed.agree("token stores", dataset.fingerprint)
        length, sizes = dataset.sequence_length, dataset.batch_sizes()
        for rows in sizes:
            _check_batch(prog, rows, length, settings.microbatches)
        _check_vocabulary(prog.model, dataset)
        prog.model.check_rows(length, experiment.train_dataset.packing)
        heldout = HeldOut.open(experiment, prog.model, placed)
        if heldout is not None and heldout.vocabulary.fingerprint != dataset.vocabulary.fingerprint:
            raise ConfigError(f"the held-out task {heldout.task!r} has another vocabulary than the training task")
        clock.mark("data")
        if _is_done(folder, settings.steps):
            print(f"{folder} has all of TRAIN_STEPS = {settings.steps}; raise it to go on", file=sys.stderr)
            return 0
        pool = stack.enter_context(ThreadPoolExecutor(1, "palmjax-compile"))
        steps = Steps(prog, length, dataset.batch_size(model_dir.newest(folder) or 0), pool)
        if heldout is not None:
            pool.submit(heldout.compile, prog.abstract_state.params)

        # ---- State: own checkpoint, initial checkpoint, scratch ----
        from palmjax import checkpoint  # Orbax: half a second that the compiler's thread runs through

        saver = stack.enter_context(checkpoint.Checkpointer(folder, experiment.checkpoint.save))
        initial = experiment.checkpoint.restore.path
        start = checkpoint.start(folder, initial, prog.abstract_state, prog.initial_state, dataset.vocabulary)
        state, first = start.state, int(start.state.step)
        skips = _skips(start, dataset, first)
        clock.mark("state")

        # ---- What a run leaves behind ----
        axes = dict(placed.shape)
        cost = account(prog.model.config, length)
        if jax.process_index() == 0:
            _write(folder, "config.gin", description.operative)
            _write(folder, "model-info.txt", parameter_table(prog.model.config, axes, experiment.sharding))
        recorder = stack.enter_context(
            Recorder(
                folder,
                _throughput(cost, placed),
                total_steps=settings.steps,
                start_step=first,
                log_period=settings.log_period,
                tensorboard=settings.tensorboard,
                is_primary=jax.process_index() == 0,
            )
        )
        size = f"{cost.parameters:,} parameters"
        if cost.active_parameters != cost.parameters:
            size += f", {cost.active_parameters:,} of them a token,"
        for line in (f"{size} on {_mesh_text(placed)}", dataset.describe()):
            recorder.message(line)
        recorder.message(f"from {start.origin}, step {first}")
        recorder.event("start", step=first, origin=start.origin, mesh=axes, code=provenance.code_version())
        for change in _changes(start.info, description) if start.resumed else ():
            recorder.message(f"changed since the checkpoint: {change}")

        def info(step: int) -> provenance.RunInfo:
            position = provenance.DataPosition(
                first_row=dataset.first_row(step, skips), skips=skips, fingerprint=dataset.fingerprint
            )
            return provenance.RunInfo(
                seed=settings.seed,
                data=position,
                config=description.operative,
                flat_config=description.flat,
                vocabulary=dataset.vocabulary,
                mesh=axes,
                code=provenance.code_version(),
                libraries=provenance.library_versions(),
            )

        def evaluate(step: int, state: TrainState, max_batches: int | None) -> None:
            if heldout is None:
                return
            # Scores of a part and of the whole are not points of one curve.
            part = settings.eval_steps is not None and max_batches is None
            name = f"{heldout.task}_all" if part else heldout.task
            with recorder.paused():
                began = time.perf_counter()
                result = heldout.run(state.params, max_batches)
                recorder.evaluation(step, name, result.metrics(), seconds=time.perf_counter() - began)

        # ---- The loop ----
        preemption = stack.enter_context(guard.Preemption())
        profile = stack.enter_context(Profile(settings.profile_steps, folder))
        batches = stack.enter_context(
            feed.Feed(dataset, prog.batch_sharding(sizes[0], length), first, max(first, settings.steps), skips)
        )
        if first < settings.steps:
            steps[dataset.batch_size(first)]
        clock.mark("compile")
        blocked = waited = 0.0
        for step in range(first, settings.steps):
            profile.before(step)
            batch = next(batches)
            state, metrics = steps[dataset.batch_size(step)](state, batch)
            profile.after(step, metrics)
            tokens = dataset.batch_size(step) * length
            recorder.record(
                step + 1, metrics, tokens=tokens, data_wait=batches.seconds_waited - waited, checkpoint_block=blocked
            )
            waited, blocked, done = batches.seconds_waited, 0.0, step + 1
            if step == first:
                jax.block_until_ready(metrics)
                clock.mark("step")
                recorder.message(clock.describe())
                recorder.event("first step", step=done, seconds=clock.seconds)
            stop = preemption.reached(done)
            # Before the save: a run that is killed in between evaluates again instead of never.
            if settings.eval_period and done % settings.eval_period == 0 and done < settings.steps:
                evaluate(done, state, settings.eval_steps)
            if saver.should_save(done) or done == settings.steps or stop:
                recorder.flush()  # the line of this step is on disk before its checkpoint can be
                began = time.perf_counter()
                saver.save(done, state, info(done))
                blocked = time.perf_counter() - began
            saver.check()
            if stop:
                saver.wait()
                recorder.event("preempted", step=done)
                recorder.message(f"asked to stop: checkpoint_{done} is saved; run the same command again to go on")
                return guard.EXIT_PREEMPTED

        # ---- The end: the whole held-out split, and a sample ----
        recorder.flush()
        saver.wait()
        evaluate(settings.steps, state, None)
        if settings.sample_prompt is not None:
            recorder.message(_sample(experiment, prog, state, dataset.vocabulary))
        recorder.event("done", step=settings.steps)
    return 0


class Profile:
    """A trace of steps (first, last) in MODEL_DIR/profile. A context manager: it is written however the run ends."""

    def __init__(self, steps: tuple[int, int] | None, folder: str):
        self._steps, self._folder, self._running = steps, folder, False

    def before(self, step: int) -> None:
        if self._steps is not None and not self._running and self._steps[0] <= step <= self._steps[1]:
            jax.profiler.start_trace(f"{self._folder}/profile")
            self._running = True

    def after(self, step: int, metrics: Any) -> None:
        """metrics: of the step just launched, waited for before the trace ends."""
        if self._running and self._steps is not None and step >= self._steps[1]:
            jax.block_until_ready(metrics)
            self.__exit__()

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


def _is_done(folder: str, steps: int) -> bool:
    """Whether an earlier run has come to its very end: the last step, the evaluation and the sample behind it."""
    if model_dir.newest(folder) != steps:
        return False
    try:
        return any(row.get("event") == "done" and row.get("step") == steps for row in read_metrics(folder))
    except ConfigError:  # no metrics: the checkpoint was copied here
        return False


def _skips(start: Start, dataset: feed.Dataset, first: int) -> Skips:
    """The rows to pass over from here on, so that the data goes on where the checkpoint's run stood.

    Another batch size counts rows in other steps, which an entry of its own makes up for. Raises ConfigError if it was
    other data: going on would repeat some of it and leave some out.
    """
    if start.info is None or not start.resumed:
        return ()
    data = start.info.data
    if data.fingerprint != dataset.fingerprint:
        raise ConfigError(
            f"{start.origin} stands at row {data.first_row:,} of other data: files, vocabulary, mixture, "
            "length, packing, seed or shuffling differ\n"
            "to train on from its parameters, give INITIAL_CHECKPOINT_PATH and a new MODEL_DIR"
        )
    shift = data.first_row - dataset.first_row(first, data.skips)
    return (*data.skips, (first, shift)) if shift else data.skips


def _check_batch(prog: Program, rows: int, length: int, microbatches: int) -> None:
    if rows % microbatches:
        raise ConfigError(f"BATCH_SIZE = {rows} is not a multiple of TrainConfig.microbatches = {microbatches}")
    prog.batch_sharding(rows // microbatches, length)


def _check_vocabulary(model: LanguageModel, dataset: feed.Dataset) -> None:
    ids, size = model.config.vocab_size, dataset.vocabulary.size
    if size > ids:
        task = dataset.config.mixture_or_task_name
        raise ConfigError(f"task {task!r} has {size:,} ids and the model only {ids:,}; set VOCAB_SIZE={size}")


def _throughput(cost: Any, placed: jax.sharding.Mesh) -> Throughput:
    chip = chips.find(placed.devices.flat[0].device_kind)
    peak = None if chip is None else chip.flops_per_device * placed.size
    return Throughput(
        model_flops=cost.flops_per_token,
        hardware_flops=cost.hardware_flops_per_token,
        peak_flops=peak,
        devices=placed.size,
    )


def _mesh_text(placed: jax.sharding.Mesh) -> str:
    shape = ", ".join(f"{axis} {size}" for axis, size in placed.shape.items())
    return f"{placed.size} x {placed.devices.flat[0].device_kind} ({shape}; {jax.process_count()} processes)"


def _changes(info: provenance.RunInfo | None, description: Description) -> list[str]:
    """Values that differ between the checkpoint's configuration and this one."""
    old, new = (info.flat_config if info else {}), description.flat
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [f"{name}: {old.get(name, 'not set')} -> {new.get(name, 'not set')}" for name in names]


def _write(folder: str, name: str, text: str) -> None:
    path = model_dir.as_path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / name).write_text(text)


def _sample(experiment: Experiment, prog: Program, state: TrainState, vocabulary: Vocabulary) -> str:
    """A continuation of the configured prompt, drawn at temperature 0.7: a young model's greedy one repeats itself."""
    from palmjax import decode
    from palmjax.sampling import Temperature

    prompt = experiment.train.sample_prompt or ""
    ids = vocabulary.encode(prompt)
    (found,) = decode.generate(
        prog.model,
        state.params,
        [ids],
        experiment.train.sample_tokens,
        sampling=Temperature(temperature=0.7),
        seed=experiment.train.seed,
        bos=vocabulary.bos_id,
        stop=vocabulary.eos_id,
        as_prefix="prefix" in prog.packing.batch_fields,
        mesh=prog.mesh,
        rules=prog.rules,
    )
    return f"sample: {prompt}{decode.continuation_text(vocabulary, ids, found.tokens.tolist())}"


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
