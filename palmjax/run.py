"""What a training run consists of before it has a state: mesh, data, program, held-out split, compiled steps.

It is the same whatever step the run begins at, so that a run that rewinds makes it once, and `palmjax replay` makes it
as `palmjax train` did.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from palmjax import chips, distributed, mesh, model_dir, provenance
from palmjax.checkpoint import Damaged, Start, read_info
from palmjax.config import ConfigError, Experiment, section
from palmjax.data import feed, index
from palmjax.data.order import Skips
from palmjax.evaluation.heldout import HeldOut
from palmjax.evaluation.suites import Session
from palmjax.evaluation.tasks import Suite
from palmjax.files import write_whole
from palmjax.guard import Overrides, Rewind
from palmjax.metrics import Throughput, read_metrics
from palmjax.models.account import account, parameter_table
from palmjax.models.api import LanguageModel
from palmjax.step import Program, Step, program


@section
class Description:
    """The configuration as text. operative: gin that gives an equal experiment; flat: one line for each value."""

    operative: str = ""
    flat: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Hexadecimal digest of the operative configuration."""
        return hashlib.sha256(self.operative.encode()).hexdigest()[:16]

    def changes_since(self, info: provenance.RunInfo | None) -> list[str]:
        """Values that differ between a checkpoint's configuration and this one."""
        old, new = (info.flat_config if info else {}), self.flat
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        return [f"{name}: {old.get(name, 'not set')} -> {new.get(name, 'not set')}" for name in names]


NO_TEXT = Description()

_FREE = re.compile(r"train_dataset\.(batch_size|store_dir|workers)\b")
"""What may change of a run's data: the rows and their order stay."""

CONFIGS = "configs"
"""Folder in MODEL_DIR of every configuration that the run has had, `<digest>.gin`; config.gin is the last of them."""


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

    def has(self, rows: int) -> bool:
        """Whether the step for this batch size is ready."""
        return rows in self._compiled and self._compiled[rows].done()

    def __getitem__(self, rows: int) -> Step:
        return self._ask(rows).result()


class Run:
    """An experiment on its mesh and data.

    program, steps: with the learning rates of the overrides last given to `follow`.
    """

    program: Program
    steps: Steps

    def __init__(self, experiment: Experiment, description: Description = NO_TEXT):
        """Opens the data, building its stores if need be; nothing is compiled yet. All processes call it together.

        Raises ConfigError for whatever in the experiment cannot work, and if the processes differ in it.
        """
        modules = index.sources_of(experiment.train_dataset.modules)
        agreed = "\n".join([*description.flat.values(), str(provenance.code_version()), str(modules)])
        distributed.agree("gin files or code", hashlib.sha256(agreed.encode()).hexdigest())
        self.experiment, self.description = experiment, description
        self.folder, self.settings = experiment.model_dir, experiment.train
        self.mesh = mesh.build(experiment.mesh)
        self.program = program(experiment, self.mesh)
        self.dataset = feed.open_dataset(experiment.train_dataset)
        distributed.agree("token stores", self.dataset.fingerprint)
        self.length = self.dataset.sequence_length
        for rows in self.dataset.batch_sizes():
            _check_batch(self.program, rows, self.length, self.settings.microbatches)
        _check_vocabulary(self.program.model, self.dataset)
        self.program.model.check_rows(self.length, experiment.train_dataset.packing)
        self.cost = account(self.program.model.config, self.length)
        self._rates: Any = None

    def is_done(self) -> bool:
        """Whether an earlier process has come to the very end: the last step, the evaluation and the sample behind."""
        if model_dir.newest(self.folder) != self.settings.steps:
            return False
        try:
            rows = read_metrics(self.folder, damaged=lambda _: None)
            return any(row.get("event") == "done" and row.get("step") == self.settings.steps for row in rows)
        except ConfigError:  # no metrics: the checkpoint was copied here
            return False

    def rewinds_at(self, step: int) -> int:
        """How many rewinds were decided when the checkpoint of `step` was saved."""
        try:
            info = read_info(model_dir.as_path(self.folder) / f"{model_dir.PREFIX}{step}")
        except Damaged:  # no run can begin with it
            return sys.maxsize
        return info.guard.get("rewinds", 0)

    def open_tasks(self) -> Session | None:
        """The tasks that the run is evaluated on, their prompts made; None if it has none."""
        suite = self.experiment.infer_eval
        if suite is None:
            return None
        assert isinstance(suite, Suite), "the only SuitePart"
        return Session(suite, self.experiment, self.program.model, self.mesh, self.dataset.vocabulary)

    def open_heldout(self) -> HeldOut | None:
        """The held-out split; None if the experiment has none. Raises ConfigError if it can't be scored."""
        found = HeldOut.open(self.experiment, self.program.model, self.mesh)
        if found is not None and found.vocabulary.fingerprint != self.dataset.vocabulary.fingerprint:
            raise ConfigError(f"the held-out task {found.task!r} has another vocabulary than the training task")
        return found

    def follow(self, overrides: Overrides, first: int, pool: ThreadPoolExecutor) -> None:
        """Has the step compiled in `pool`, for the batch of step `first`, unless one with these rates is already."""
        if self._rates == overrides.learning_rate:
            return
        if overrides.learning_rate:
            self.program = program(overrides.apply(self.experiment), self.mesh)
        elif self._rates:
            self.program = program(self.experiment, self.mesh)
        self._rates = overrides.learning_rate
        self.steps = Steps(self.program, self.length, self.dataset.batch_size(first), pool)

    def batch_sharding(self) -> jax.sharding.NamedSharding:
        """The layout of the batches' fields, whatever their size."""
        return self.program.batch_sharding(self.dataset.batch_sizes()[0], self.length)

    def skips(self, start: Start, first: int, rewinds: tuple[Rewind, ...], overrides: Overrides) -> Skips:
        """The rows to pass over from step `first` on: what the checkpoint's run had passed over and what was decided
        since, so that the data goes on where it stood, and what is skipped by hand.

        Another batch size counts rows in other steps, which an entry of its own makes up for. Raises ConfigError if it
        was other data: going on would repeat some of it and leave some out.
        """
        skips: Skips = rewinds[-1].skips if rewinds else ()
        if start.info is not None and start.resumed:
            data = start.info.data
            if data.fingerprint != self.dataset.fingerprint:
                changes = self.description.changes_since(start.info)
                told = [change for change in changes if change.startswith("train_dataset.") and not _FREE.match(change)]
                raise ConfigError(
                    f"{start.origin} stands at row {data.first_row:,} of other data: "
                    f"{', '.join(told) or 'its files or its tasks have changed'}\n"
                    "to train on from its parameters, give INITIAL_CHECKPOINT_PATH and a new MODEL_DIR"
                )
            if len(rewinds) <= start.info.guard.get("rewinds", 0):
                skips = data.skips
            shift = data.first_row - self.dataset.first_row(first, data.skips)
            skips = (*skips, (first, shift)) if shift else skips
        # What lies ahead was skipped by hand, which `overrides` says anew.
        known = max(first, rewinds[-1].to if rewinds else 0)
        past = tuple((step, rows) for step, rows in skips if step <= known)
        return overrides.add_skips(past, first, self.dataset)

    def throughput(self) -> Throughput:
        """What turns this run's tokens and seconds into rates."""
        chip = chips.find(self.mesh.devices.flat[0].device_kind)
        return Throughput(
            model_flops=self.cost.flops_per_token,
            hardware_flops=self.cost.hardware_flops_per_token,
            peak_flops=None if chip is None else chip.flops_per_device * self.mesh.size,
            devices=self.mesh.size,
        )

    def describe(self) -> list[str]:
        """Lines for people: how large the model is, on which devices, and what it reads."""
        cost, placed = self.cost, self.mesh
        size = f"{cost.parameters:,} parameters"
        if cost.active_parameters != cost.parameters:
            size += f", {cost.active_parameters:,} of them a token,"
        shape = ", ".join(f"{axis} {count}" for axis, count in placed.shape.items())
        kind = placed.devices.flat[0].device_kind
        devices = f"{placed.size} x {kind} ({shape}; {jax.process_count()} processes)"
        return [f"{size} on {devices}", self.dataset.describe()]

    def sample(self, params: Any) -> str:
        """The configured prompt continued, drawn at temperature 0.7: a young model's greedy text repeats itself."""
        from palmjax import decode
        from palmjax.sampling import Temperature

        vocabulary, prompt = self.dataset.vocabulary, self.settings.sample_prompt or ""
        ids = vocabulary.encode(prompt)
        (found,) = decode.generate(
            self.program.model,
            params,
            [ids],
            self.settings.sample_tokens,
            sampling=Temperature(temperature=0.7),
            seed=self.settings.seed,
            bos=vocabulary.bos_id,
            stop=vocabulary.eos_id,
            as_prefix="prefix" in self.program.packing.batch_fields,
            mesh=self.mesh,
            rules=self.program.rules,
        )
        return f"sample: {prompt}{decode.continuation_text(vocabulary, ids, found.tokens.tolist())}"

    def write_texts(self) -> None:
        """Writes into MODEL_DIR the configuration, under its own name too, and the parameters. For process 0."""
        texts = {
            "config.gin": self.description.operative,
            f"{CONFIGS}/{self.description.digest}.gin": self.description.operative,
            "model-info.txt": parameter_table(self.program.model.config, dict(self.mesh.shape), self.program.rules),
        }
        for name, text in texts.items():
            path = model_dir.as_path(self.folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text)


def _check_batch(prog: Program, rows: int, length: int, microbatches: int) -> None:
    if rows % microbatches:
        raise ConfigError(f"BATCH_SIZE = {rows} is not a multiple of TrainConfig.microbatches = {microbatches}")
    prog.batch_sharding(rows // microbatches, length)


def _check_vocabulary(model: LanguageModel, dataset: feed.Dataset) -> None:
    ids, size = model.config.vocab_size, dataset.vocabulary.size
    if size > ids:
        task = dataset.config.mixture_or_task_name
        raise ConfigError(f"task {task!r} has {size:,} ids and the model only {ids:,}; set VOCAB_SIZE={size}")


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
