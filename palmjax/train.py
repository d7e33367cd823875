"""Training: the composition root and the loop. `palmjax train FILE.gin [--gin.KEY=VALUE ...]`; run again to resume.

A run is a pure function of its configuration. The loop only launches steps: batches are read ahead, metrics are written
one step late, and checkpoints are written in the background.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from palmjax.metrics.startup import StartupClock

_clock = StartupClock()

import jax  # noqa: E402 - the clock starts before the slow imports

from palmjax import chips, distributed, guard, mesh, model_dir, provenance  # noqa: E402
from palmjax.config import ConfigError, Experiment, section  # noqa: E402
from palmjax.data import feed  # noqa: E402
from palmjax.data.vocabulary import Vocabulary  # noqa: E402
from palmjax.evaluation.heldout import HeldOut  # noqa: E402
from palmjax.metrics import Recorder, Throughput  # noqa: E402
from palmjax.models.account import account, parameter_table  # noqa: E402
from palmjax.models.api import LanguageModel  # noqa: E402
from palmjax.state import TrainState  # noqa: E402
from palmjax.step import Program, Step, program  # noqa: E402


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
    primary = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(model_dir.lock(folder))
        preemption = stack.enter_context(guard.Preemption())

        # ---- Data and the program; the step is compiled aside while the state is made ready ----
        placed = mesh.build(experiment.mesh)
        prog = program(experiment, placed)
        dataset = feed.open_dataset(experiment.train_dataset)
        length, sizes = dataset.sequence_length, dataset.batch_sizes()
        for rows in sizes:
            _check_batch(prog, rows, length, settings.microbatches)
        _check_vocabulary(prog.model, dataset)
        heldout = HeldOut.open(experiment, prog.model, placed)
        clock.mark("data")
        pool = stack.enter_context(ThreadPoolExecutor(1, "palmjax-compile"))
        steps = Steps(prog, length, dataset.batch_size(model_dir.newest(folder) or 0), pool)

        # ---- State: own checkpoint, initial checkpoint, scratch ----
        from palmjax import checkpoint  # Orbax: half a second that the compiler's thread runs through

        saver = checkpoint.Checkpointer(folder, experiment.checkpoint.save)
        initial = experiment.checkpoint.restore.path
        start = checkpoint.start(folder, initial, prog.abstract_state, prog.initial_state, dataset.vocabulary)
        state, first = start.state, int(start.state.step)
        skips = start.info.data.skips if start.info and start.resumed else ()
        clock.mark("state")
        if first >= settings.steps:
            print(f"{start.origin} has all of TRAIN_STEPS = {settings.steps}; raise it to go on", file=sys.stderr)
            return 0

        # ---- What a run leaves behind ----
        axes = dict(placed.shape)
        cost = account(prog.model.config, length)
        if primary:
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
                is_primary=primary,
            )
        )
        for line in (f"{cost.parameters:,} parameters on {_mesh_text(placed)}", dataset.describe()):
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
            with recorder.paused():
                began = time.perf_counter()
                result = heldout.run(state.params, max_batches)
                recorder.evaluation(step, heldout.task, result.metrics(), seconds=time.perf_counter() - began)

        # ---- The loop ----
        batches = stack.enter_context(
            feed.Feed(dataset, prog.batch_sharding(sizes[0], length), first, settings.steps, skips)
        )
        compiled = steps[dataset.batch_size(first)]
        clock.mark("compile")
        blocked = waited = 0.0
        for step in range(first, settings.steps):
            with _profiled(settings.profile_steps, step, folder):
                batch = next(batches)
                compiled = steps[dataset.batch_size(step)]
                state, metrics = compiled(state, batch)
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
            if saver.should_save(done) or done == settings.steps or stop:
                began = time.perf_counter()
                saver.save(done, state, info(done))
                blocked = time.perf_counter() - began
            saver.check()
            if stop:
                recorder.flush()
                saver.close()
                recorder.event("preempted", step=done)
                recorder.message(f"asked to stop: checkpoint_{done} is saved; run the same command again to go on")
                return guard.EXIT_PREEMPTED
            if settings.eval_period and done % settings.eval_period == 0 and done < settings.steps:
                evaluate(done, state, settings.eval_steps)

        # ---- The end ----
        recorder.flush()
        saver.close()
        evaluate(settings.steps, state, None)
        if settings.sample_prompt is not None:
            recorder.message(_sample(experiment, prog, state, dataset.vocabulary))
        recorder.event("done", step=settings.steps)
    return 0


def _check_batch(prog: Program, rows: int, length: int, microbatches: int) -> None:
    if rows % microbatches:
        raise ConfigError(f"BATCH_SIZE = {rows} is not a multiple of TrainConfig.microbatches = {microbatches}")
    prog.batch_sharding(rows // microbatches, length)


def _check_vocabulary(model: LanguageModel, dataset: feed.Dataset) -> None:
    ids = model.config.vocab_size
    if dataset.vocabulary.size > ids:
        task, size = dataset.config.mixture_or_task_name, dataset.vocabulary.size
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


@contextlib.contextmanager
def _profiled(steps: tuple[int, int] | None, step: int, folder: str) -> Iterator[None]:
    """Traces steps `steps[0]` to `steps[1]` into MODEL_DIR/profile."""
    if steps is not None and step == steps[0]:
        jax.profiler.start_trace(f"{folder}/profile")
    with jax.profiler.StepTraceAnnotation("train", step_num=step) if steps is not None else contextlib.nullcontext():
        yield
    if steps is not None and step == steps[1]:
        jax.profiler.stop_trace()


def _sample(experiment: Experiment, prog: Program, state: TrainState, vocabulary: Vocabulary) -> str:
    """The greedy continuation of the configured prompt."""
    from palmjax import decode

    prompt = experiment.train.sample_prompt or ""
    ids = vocabulary.encode(prompt)
    (found,) = decode.generate(
        prog.model,
        state.params,
        [ids],
        experiment.train.sample_tokens,
        stop=vocabulary.eos_id,
        mesh=prog.mesh,
        rules=prog.rules,
    )
    return f"sample: {prompt}{vocabulary.decode(found.tokens.tolist())}"


def enable_compilation_cache(folder: str | None) -> None:
    """Keeps compiled programs in `folder`, unless the environment names another (JAX_COMPILATION_CACHE_DIR)."""
    if folder is None or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


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
    flat = dict(line.split(" = ", 1) for line in configure.describe(loaded.experiment).splitlines() if " = " in line)
    enable_compilation_cache(loaded.experiment.train.compilation_cache)
    _clock.mark("imports")
    with distributed.session(options):
        return train(loaded.experiment, Description(operative=loaded.operative, flat=flat))


if __name__ == "__main__":
    from palmjax.cli import run_main

    raise SystemExit(run_main(main))
