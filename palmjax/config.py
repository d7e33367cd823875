"""The configuration tree: frozen, keyword-only dataclasses, with no jax and no gin.

`Experiment` is the root. What has variants (a model, an optimizer, a packing, a batch size over time) is a
field typed by one of the abstract parts below; each variant is a frozen dataclass with a `build()`, defined in the
room that implements it and chosen by reference in gin (`Experiment.optimizer = @Adafactor()`). The same tree can be
built in plain Python. `configure.py` builds it from gin files and checks every type; this module imports nothing of
palmjax.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar, dataclass_transform

_T = TypeVar("_T")


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field,))
def section(cls: type[_T]) -> type[_T]:
    """Decorator of every configuration class: a frozen, keyword-only dataclass, and known as one to type checkers."""
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


class ConfigError(ValueError):
    """Something a user wrote cannot work. Its text is one or two lines: what, where, and the nearest right thing.

    exit_code: of the process that it ends.
    """

    exit_code = 2


def require(ok: bool, section: object, field: str, words: str) -> None:
    """Raises ConfigError unless `ok`, as `Class.field = value: must be <words>`. For a section's `__post_init__`."""
    if not ok:
        raise ConfigError(f"{type(section).__name__}.{field} = {getattr(section, field)!r}: must be {words}")


SEEDS = 1 << 32
"""Seeds are below this: `jax.random.key` drops the higher bits (without x64), and two runs would be the same one."""


def _require_seed(section: TrainConfig | DatasetConfig) -> None:
    require(0 <= section.seed < SEEDS, section, "seed", "from 0 to 2**32 - 1")


class Part(abc.ABC):
    """Base of everything with variants. `build` makes the working object; its arguments are the room's own."""

    @abc.abstractmethod
    def build(self, *args: Any, **kwargs: Any) -> Any: ...


class ModelPart(Part):
    """A language model's architecture (`palmjax.models`). `build()` returns a `models.api.LanguageModel`.

    dropout: the rate in training; 0 for none.
    """

    dropout: float


class OptimizerPart(Part):
    """An optimizer (`palmjax.optim`). `build(axes)` returns an `optax.GradientTransformation`."""

    @abc.abstractmethod
    def learning_rate(self, step: Any) -> Any:
        """The learning rate of the update made after `step` updates, a float scalar; traceable."""


class SchedulePart(Part):
    """A learning rate over steps (`palmjax.optim`). `build()` returns `step -> learning rate`."""


class LossPart(Part):
    """A training loss (`palmjax.loss`). `build(model)` returns `(params, batch, dropout_key) -> (sum, sums)`.

    sum: over the batch's tokens, what is differentiated. sums: what is reported, among them `weight`, the tokens that
    count, by which the step divides.
    """


class LossScalePart(Part):
    """How gradients are kept inside float16's range (`palmjax.loss_scale`). `build()` returns a `LossScale`."""


class PackingPart(Part):
    """How a token stream becomes rows of fixed length (`palmjax.data.batch`).

    batch_fields: marks that its batches have (`data.batch.MarkedBatch`). shifted: whether what is read
    is the targets shifted by one, so that only causal attention may be trained on it.
    """

    shifted: ClassVar[bool] = True
    batch_fields: ClassVar[tuple[str, ...]] = ()


class BatchSizePart(Part):
    """Rows a step as a function of the step (`palmjax.data.order`)."""


class TaskPart(Part):
    """A seqio task made from values (paths, a key) rather than by a module's import (`tasks`). `build()` registers it.

    `tasks` imports nothing of palmjax, so its dataclasses are accepted here by shape: a `name` and a `build`.
    """

    name: str

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        if cls is not TaskPart:
            return NotImplemented
        fields = getattr(other, "__dataclass_fields__", {})
        return ("name" in fields and hasattr(other, "build")) or NotImplemented


class SuitePart(Part):
    """Tasks to evaluate a model on (`palmjax.evaluation.tasks.Suite`). `build()` reads their documents."""


@section
class MeshConfig:
    """Devices on each mesh axis; one axis may be -1, meaning all the rest. The product must be the device count.

    `data` replicates parameters and splits the batch; over several slices (pods) it is the axis that crosses DCN.
    `fsdp` splits the batch and the parameters. `tensor` splits heads, MLP and vocabulary. `expert` splits the batch and
    the experts of a mixture, which tokens reach by all-to-all; at 1 the mesh has no such axis.
    PaLM's layout is data 2 (pods), fsdp 256, tensor 12 (PaLM section 4).
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1


@section
class ShardingRules:
    """Mesh axes of each logical axis; () replicates. Names are T5X's where T5X has one.

    Parameters use `vocab embed mlp heads kv_heads head_dim layers`, and `experts router positions token_types
    relpos_buckets`; activations use `batch length residual` and the same `mlp heads kv_heads vocab experts`.
    `expert_batch` is the batch while its tokens are with their experts: `batch` without the axes of `experts`.
    A dimension of size one is always replicated (multi-query's single K/V head). An axis that MeshConfig knows and the
    mesh has not (`expert` at size 1) splits nothing.
    """

    batch: tuple[str, ...] = ("data", "fsdp", "expert")
    length: tuple[str, ...] = ()
    residual: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ("tensor",)
    embed: tuple[str, ...] = ("fsdp",)
    mlp: tuple[str, ...] = ("tensor",)
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    head_dim: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    experts: tuple[str, ...] = ("expert",)
    expert_batch: tuple[str, ...] = ("data", "fsdp")
    router: tuple[str, ...] = ()
    positions: tuple[str, ...] = ()
    token_types: tuple[str, ...] = ()
    relpos_buckets: tuple[str, ...] = ()


@section
class DatasetConfig:
    """One stream of batches. Field names are those of T5X's `utils.DatasetConfig`; use the scopes `train/`,
    `train_eval/`.

    mixture_or_task_name: a seqio Task or Mixture, registered by `modules` or by `tasks`.
    modules: Python modules to import before the name is looked up; every `import` line in gin adds its module here.
    task_feature_lengths: {"targets": T}, tokens a row.
    batch_size: rows a step over all hosts, or a `BatchSizePart` for a ramp.
    tasks: tasks to register first, each a `TaskPart` value, such as `@JsonLines()`.
    store_dir: folder of the token stores (local or gs://), shared by all hosts.
    workers: processes that tokenize when the store is built; 0 tokenizes in the calling process.
    """

    mixture_or_task_name: str
    task_feature_lengths: Mapping[str, int]
    batch_size: int | BatchSizePart
    packing: PackingPart
    store_dir: str
    split: str = "train"
    shuffle: bool = True
    seed: int = 0
    use_cached: bool = False
    modules: tuple[str, ...] = ()
    tasks: tuple[TaskPart, ...] = ()
    workers: int = 0

    def __post_init__(self) -> None:
        size = self.batch_size
        require(not isinstance(size, int) or size >= 1, self, "batch_size", "1 or more")
        _require_seed(self)
        require(self.workers >= 0, self, "workers", "0 (tokenize in the calling process) or more")


@section
class KeepBest:
    """Keeps the `count` checkpoints with the lowest (or the highest) held-out `metric`: `loss`, `bits_per_byte`, ...

    Only checkpoints that were saved at a step of an evaluation compete: let SaveCheckpointConfig.period divide
    TrainConfig.eval_period.
    """

    metric: str = "loss"
    count: int = 1
    highest: bool = False

    def __post_init__(self) -> None:
        require(self.count >= 1, self, "count", "1 or more")


@section
class SaveCheckpointConfig:
    """When to save: `period` steps apart. The newest `keep` stay (None: all), every multiple of `keep_period`, the
    `best`, and those with a file named PINNED in their folder.

    host_bytes: of host memory that a save may take at once, for the copies of whole arrays' parts; the largest array's
    part is what it takes at least. The steps then wait until the checkpoint is whole. None: a save copies all of the
    process's part of the state first, and the steps go on beside it.
    """

    period: int = 1000
    keep: int | None = 3
    keep_period: int | None = None
    best: KeepBest | None = None
    host_bytes: int | None = None

    def __post_init__(self) -> None:
        require(self.period >= 1, self, "period", "1 or more")
        require(self.keep is None or self.keep >= 1, self, "keep", "1 or more, or None for all")
        require(self.keep_period is None or self.keep_period >= 1, self, "keep_period", "1 or more, or None for none")
        require(self.host_bytes is None or self.host_bytes >= 1, self, "host_bytes", "1 or more, or None for all")


@section
class RestoreCheckpointConfig:
    """Initial parameters from `path` (a `checkpoint_N` folder or a MODEL_DIR: its newest) when MODEL_DIR has none."""

    path: str | None = None


@section
class CheckpointConfig:
    """Saving into MODEL_DIR and the initial checkpoint."""

    save: SaveCheckpointConfig = SaveCheckpointConfig()
    restore: RestoreCheckpointConfig = RestoreCheckpointConfig()


@section
class NonFiniteRule:
    """A step whose loss or gradient is not finite changes nothing but the step counter: parameters and moments stay.

    GLaM trained so (Du et al. 2022, section 4). max_in_a_row: steps that may be passed over one after the other; the
    next one stops the run, since a state that gives no finite loss any more will not give one later.
    """

    max_in_a_row: int = 10

    def __post_init__(self) -> None:
        require(self.max_in_a_row >= 0, self, "max_in_a_row", "0 (stop at the first) or more")


@section
class SpikeRule:
    """A loss spike takes the run back to a checkpoint and past the rows that came with it (PaLM section 5.1: about 100
    steps back, 200-500 batches skipped).

    A step is high if (loss - median) / (1.4826 MAD) of the last `window` losses that were not is above `threshold`;
    `steps` high ones in a row are a spike. 1.4826 MAD is the standard deviation of normal losses, and is taken to be
    at least a thousandth of the median.

    rewind_steps: the run goes back to the last multiple of the save period that is so far before the first high step.
    skip_steps: batches that it passes over from there. max_rewinds: the next spike stops the run.
    """

    window: int = 128
    threshold: float = 6.0
    steps: int = 3
    rewind_steps: int = 100
    skip_steps: int = 300
    max_rewinds: int = 20

    def __post_init__(self) -> None:
        require(self.window >= 8, self, "window", "8 or more: fewer losses have no steady median")
        require(self.threshold > 0, self, "threshold", "above 0")
        require(self.steps >= 1, self, "steps", "1 or more")
        require(self.rewind_steps >= 1, self, "rewind_steps", "1 or more")
        require(self.skip_steps >= 1, self, "skip_steps", "1 or more")
        require(self.max_rewinds >= 0, self, "max_rewinds", "0 (stop at the first spike) or more")


@section
class GuardConfig:
    """What a run does when a step looks wrong (`palmjax.guard`). nonfinite: None lets whatever comes into the
    parameters. spike: None watches for none; @SpikeRule() is PaLM's rule.
    """

    nonfinite: NonFiniteRule | None = NonFiniteRule()
    spike: SpikeRule | None = None

    def check(self, save: SaveCheckpointConfig) -> None:
        """Raises ConfigError unless what `save` keeps serves a rewind, and a rewind passes its spike."""
        rule = self.spike
        if rule is None:
            return
        # The last loss is known one step late, and the checkpoint is up to a period further back.
        back = rule.rewind_steps + rule.steps + 1
        keep = 1 + -(-back // save.period)
        if save.keep is not None and save.keep < keep:
            raise ConfigError(
                f"SaveCheckpointConfig.keep = {save.keep}: SpikeRule.rewind_steps = {rule.rewind_steps} at "
                f"SaveCheckpointConfig.period = {save.period} needs the newest {keep} checkpoints, or None for all"
            )
        require(
            rule.skip_steps >= back + save.period,
            rule,
            "skip_steps",
            f"{back + save.period} or more, or the spike's own rows would come again: a rewind goes up to "
            f"rewind_steps + steps + SaveCheckpointConfig.period = {save.period} back",
        )


@section
class WatchdogConfig:
    """When a run that does not move is given up (`palmjax.watchdog`): exit code 70, and every thread's stack written.

    No step has ended for `factor` times the median step, and `least_seconds`; or something else (the start with its
    compilation, an evaluation, a save) has taken `other_seconds`.
    """

    factor: float = 20.0
    least_seconds: float = 120.0
    other_seconds: float = 3600.0

    def __post_init__(self) -> None:
        require(self.factor > 1, self, "factor", "more than 1")
        require(self.least_seconds > 0, self, "least_seconds", "more than 0")
        require(self.other_seconds > 0, self, "other_seconds", "more than 0")


@section
class TrainConfig:
    """The loop. Steps are absolute, as T5X's TRAIN_STEPS: they include those of the initial checkpoint.

    microbatches: gradient accumulation; each step's rows are split in this many.
    eval_period: steps between held-out evaluations (0: only at the end); eval_steps: batches each (None: all).
    log_period: steps between log lines; every step goes to metrics.jsonl.
    profile_steps: (first, last) steps traced into MODEL_DIR/profile.
    sample_prompt: text continued after the last step; None for no sample. sample_tokens: how many tokens.
    compilation_cache: folder of compiled programs; None turns the cache off.
    watchdog: None never gives up a run that does not move.
    """

    steps: int
    seed: int = 0
    microbatches: int = 1
    eval_period: int = 0
    eval_steps: int | None = None
    log_period: int = 10
    profile_steps: tuple[int, int] | None = None
    sample_prompt: str | None = None
    sample_tokens: int = 128
    tensorboard: bool = True
    compilation_cache: str | None = "~/.cache/palmjax/compiled"
    watchdog: WatchdogConfig | None = WatchdogConfig()

    def __post_init__(self) -> None:
        require(self.steps >= 1, self, "steps", "1 or more")
        _require_seed(self)
        require(self.microbatches >= 1, self, "microbatches", "1 or more")
        require(self.eval_period >= 0, self, "eval_period", "0 (only at the end) or more")
        require(self.eval_steps is None or self.eval_steps >= 1, self, "eval_steps", "1 or more, or None for all")
        require(self.log_period >= 1, self, "log_period", "1 or more")
        first, last = self.profile_steps or (0, 0)
        require(0 <= first <= last, self, "profile_steps", "(first, last) with 0 <= first <= last, or None")
        require(self.sample_tokens >= 1, self, "sample_tokens", "1 or more")


@section
class Experiment:
    """A whole run. Everything that decides a run's numbers is in here; a run is a pure function of this value.

    infer_eval: tasks that the model is scored on whenever it is evaluated (T5X's infer_eval), such as a small
    `@Suite()` of gin/eval/in_training.gin; None for none.
    """

    model_dir: str
    model: ModelPart
    optimizer: OptimizerPart
    loss: LossPart
    train_dataset: DatasetConfig
    train_eval_dataset: DatasetConfig | None
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    loss_scale: LossScalePart | None = None
    infer_eval: SuitePart | None = None
    mesh: MeshConfig = MeshConfig()
    sharding: ShardingRules = ShardingRules()

    def __post_init__(self) -> None:
        self.guard.check(self.checkpoint.save)
