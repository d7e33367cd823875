"""The train step: `step(state, batch) -> (state, metrics)`, pure, the only copy. Training runs it, planning compiles
it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from palmjax import sharding
from palmjax.config import ConfigError, Experiment, PackingPart, ShardingRules
from palmjax.data.batch import Batch, abstract_batch
from palmjax.loss import LossFn, Sums
from palmjax.loss_scale import LossScale
from palmjax.optim import global_norm, squared_norms
from palmjax.state import TrainState, init_state

Metrics = dict[str, jax.Array]
"""float32 scalars: `loss`, `z_loss` (mean nats a token), `accuracy`, `weight` (tokens), `grad_norm`,
`learning_rate`; with experts also those of `expert_metrics`.

With a rule for what is not finite or a loss scale also `nonfinite`: 0, or 1 + the place in `tensor_names` of the first
tensor that was not finite. With a loss scale `loss_scale`, the one that the step used.
"""

Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def build_step(
    loss: LossFn,
    optimizer: optax.GradientTransformationExtraArgs,
    learning_rate: Callable[[jax.Array], jax.Array],
    *,
    microbatches: int = 1,
    dropout: bool = False,
    skip_nonfinite: bool = False,
    loss_scale: LossScale | None = None,
) -> Step:
    """The step of one optimizer update over one batch.

    loss: sums over tokens; the gradient is that of the mean over all the batch's tokens, whatever `microbatches` it is
    split in.
    learning_rate: of the step, reported in the metrics. dropout: whether the model needs keys; they depend on (rng,
    step) only. skip_nonfinite: a step whose loss or gradient is not finite changes the step counter only; with a
    `loss_scale`, whose overflows must not reach the parameters, it is always so.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step) if dropout else None
        gradients, sums, divisor = _gradients(loss, state, batch, key, microbatches)
        gradients = jax.tree.map(lambda g: g / divisor, gradients)

        def update(gradients: Any, params: Any, opt_state: Any) -> tuple[Any, Any]:
            # The run's own step drives the schedule: behind an initial checkpoint the moments are younger than the run.
            updates, opt_state = optimizer.update(gradients, opt_state, params, step=state.step)
            return optax.apply_updates(params, updates), opt_state

        weight = jnp.maximum(sums["weight"], 1.0)
        metrics = {
            "loss": sums["loss"] / weight,
            "z_loss": sums["z_loss"] / weight,
            "accuracy": sums["correct"] / weight,
            "weight": sums["weight"],
            "grad_norm": global_norm(gradients),
            "learning_rate": learning_rate(state.step),
        } | expert_metrics(sums)
        if not skip_nonfinite and loss_scale is None:
            params, opt_state = update(gradients, state.params, state.opt_state)
            return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics
        first = _first_nonfinite(sums["loss"], gradients)
        metrics["nonfinite"] = first.astype(jnp.float32)
        # A branch, not a selection by element: that would keep the old moments beside the new ones, in copies.
        params, opt_state = jax.lax.cond(
            first == 0,
            update,
            lambda _, params, opt_state: (params, opt_state),
            gradients,
            state.params,
            state.opt_state,
        )
        done = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        if loss_scale is not None and state.loss_scale is not None:
            metrics["loss_scale"] = state.loss_scale.scale
            # 1 is the loss itself, which no scale has touched.
            scale = loss_scale.update(state.loss_scale, first > 1)
            done = done.replace(
                loss_scale=jax.tree.map(lambda new, old: jnp.where(first == 1, old, new), scale, state.loss_scale)
            )
        return done, metrics

    return step


def _gradients(
    loss: LossFn, state: TrainState, batch: Batch, key: jax.Array | None, microbatches: int
) -> tuple[Any, Sums, jax.Array]:
    """Gradients of the summed loss, times some factor; the sums; and what to divide by for the gradients of the mean.

    Under a loss scale the factor is the scale over the batch's tokens: float16 is to hold gradients of the mean, times
    the scale, as it did in the runs whose scales the defaults are.
    """
    if state.loss_scale is None:
        gradients, sums = accumulate(loss, state.params, batch, key, microbatches)
        return gradients, sums, jnp.maximum(sums["weight"], 1.0)
    factor = state.loss_scale.scale / batch.tokens.size

    def scaled(params: Any, batch: Batch, dropout_key: jax.Array | None = None) -> tuple[jax.Array, Sums]:
        total, sums = loss(params, batch, dropout_key)
        return total * factor, sums

    gradients, sums = accumulate(scaled, state.params, batch, key, microbatches)
    return gradients, sums, jnp.maximum(sums["weight"], 1.0) * factor


def _first_nonfinite(loss: jax.Array, gradients: Any) -> jax.Array:
    """int32 []: 0 if all is finite, 1 for the loss, 2 + i for the i-th gradient in tree order.

    A gradient is judged by its squared norm, which the global norm has made already.
    """
    broken = ~jnp.isfinite(jnp.stack([loss, *squared_norms(gradients)]))
    return jnp.where(jnp.any(broken), 1 + jnp.argmax(broken).astype(jnp.int32), 0)


def tensor_names(params: Any) -> tuple[str, ...]:
    """What the metric `nonfinite` numbers from 1 on: the loss, and the gradient of each parameter, "gradient of
    decoder/decoder_norm/scale".
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return ("the loss", *(f"the gradient of {jax.tree_util.keystr(p, simple=True, separator='/')}" for p in paths))


def expert_metrics(sums: Sums) -> Metrics:
    """Of a mixture of experts `aux_loss` (mean a token, over all layers) and `dropped_share`, the part of the tokens'
    choices that found their expert full; of a dense model nothing.
    """
    if "routed" not in sums:
        return {}
    return {
        "aux_loss": sums["aux_loss"] / jnp.maximum(sums["weight"], 1.0),
        "dropped_share": sums["dropped"] / jnp.maximum(sums["routed"], 1.0),
    }


def accumulate(loss: LossFn, params: Any, batch: Batch, key: jax.Array | None, microbatches: int) -> tuple[Any, Sums]:
    """Gradients of the summed loss and the sums, over the batch in `microbatches` parts, one after the other."""
    gradient = jax.grad(loss, has_aux=True)
    if microbatches == 1:
        return gradient(params, batch, key)
    parts = jax.tree.map(lambda x: sharding.split_rows(x, microbatches), batch)

    def add(total: tuple[Any, Sums], part: tuple[jax.Array, Batch]) -> tuple[tuple[Any, Sums], None]:
        index, rows = part
        one = gradient(params, rows, None if key is None else jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, one), None

    # From zeros, so that there is one copy of the program; the loop keeps the parts from being alive side by side.
    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(gradient, params, first, key)
    zeros = jax.tree.map(sharding.zeros_like, shapes)
    total, _ = jax.lax.scan(add, zeros, (jnp.arange(microbatches), parts))
    return total


@dataclasses.dataclass(frozen=True)
class Program:
    """An experiment's training on one mesh, real or ahead-of-time: what is compiled, and for which shapes and layouts.

    abstract_state: a TrainState of ShapeDtypeStructs with concrete shardings, as `compile` and a restored checkpoint
    expect it.
    """

    model: Any
    mesh: Mesh
    rules: ShardingRules
    packing: PackingPart
    step: Step
    init: Callable[[], TrainState]
    abstract_state: TrainState

    def initial_state(self) -> TrainState:
        """The state before the first step, every array born with its sharding."""
        with sharding.activate(self.mesh, self.rules):
            return jax.jit(self.init)()

    def batch_sharding(self, rows: int, length: int) -> jax.sharding.NamedSharding:
        """The layout of every field of a batch. Raises ConfigError if the mesh does not divide its rows."""
        return sharding.named(self.mesh, self.rules, ("batch", "length"), (rows, length), "a batch")

    def lower(self, rows: int, length: int) -> jax.stages.Lowered:
        """The step lowered for batches of `rows` rows of `length` tokens; the state's memory is reused for the
        result.
        """
        placed = self.batch_sharding(rows, length)
        batch = abstract_batch(self.packing, rows, length, placed)
        with sharding.activate(self.mesh, self.rules):
            return jax.jit(self.step, donate_argnums=0).lower(self.abstract_state, batch)


def program(experiment: Experiment, mesh: Mesh) -> Program:
    """The program of `experiment` on `mesh`.

    Raises ConfigError if a mesh axis does not divide a dimension, or a float16 model has no loss scale.
    """
    model = experiment.model.build()
    if model.config.dtype == "float16" and experiment.loss_scale is None:
        raise ConfigError(
            'Decoder.dtype = "float16": small gradients would round to zero; set '
            "Experiment.loss_scale = @DynamicLossScale(), or train in bfloat16, which needs none"
        )
    optimizer = optax.with_extra_args_support(experiment.optimizer.build(model.axes))
    loss_scale = None if experiment.loss_scale is None else experiment.loss_scale.build()
    step = build_step(
        experiment.loss.build(model),
        optimizer,
        experiment.optimizer.learning_rate,
        microbatches=experiment.train.microbatches,
        dropout=experiment.model.dropout > 0,
        skip_nonfinite=experiment.guard.nonfinite is not None,
        loss_scale=loss_scale,
    )

    def init() -> TrainState:
        params_key, step_key = jax.random.split(jax.random.key(experiment.train.seed))
        return init_state(model.init(params_key), optimizer, step_key, loss_scale)

    return Program(
        model=model,
        mesh=mesh,
        rules=experiment.sharding,
        packing=experiment.train_dataset.packing,
        step=step,
        init=init,
        abstract_state=sharding.abstract_state(init, mesh, experiment.sharding),
    )
