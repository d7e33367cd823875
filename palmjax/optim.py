"""Optimizers and learning-rate schedules, as configuration parts whose `build` returns an optax transformation.

Steps count as T5X counts them: an update sees `step`, the updates done before it (0 for the first), and the
recipes' formulas use k = step + 1. Every moment has its parameter's shape and sharding and at least float32.
May import jax, optax and `palmjax.config`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from palmjax.config import ConfigError, OptimizerPart, SchedulePart, section

Schedule = Callable[[Any], jax.Array]


def _require(condition: bool, part: object, field: str, rule: str) -> None:
    """Raises ConfigError naming the part, the field and its value unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{type(part).__name__}.{field} = {getattr(part, field)!r}: it must be {rule}.")


# ---------------------------------------------------------------------------------------------- schedules


def _count(step: Any) -> jax.Array:
    """k = step + 1 as the default float (float32, or float64 under x64): update `step` is the k-th."""
    return jnp.asarray(step).astype(jnp.result_type(float)) + 1


@section
class InverseSquareRoot(SchedulePart):
    """PaLM's and T5's schedule: `peak` for the first `constant_steps` updates, then falling as 1/sqrt(k).

    lr(k) = peak * sqrt(constant_steps / max(k, constant_steps)). The defaults are PaLM section 5: min(1e-2, 1/sqrt(k)).
    There is no linear warm-up.
    """

    peak: float = 1e-2
    constant_steps: int = 10_000

    def __post_init__(self) -> None:
        _require(self.peak > 0, self, "peak", "above 0")
        _require(self.constant_steps >= 1, self, "constant_steps", "1 or more")

    def build(self) -> Schedule:
        return lambda step: self.peak * jnp.sqrt(self.constant_steps / jnp.maximum(_count(step), self.constant_steps))


@section
class WarmupCosine(SchedulePart):
    """Linear warm-up, then half a cosine down to `final_fraction * peak`, then flat (GPT-3, Gopher, LLaMA).

    The warm-up is peak * k / warmup_steps, so the first update already moves. `decay_steps` counts from the start of
    training, warm-up included: lr(decay_steps) is the final rate.
    """

    peak: float
    warmup_steps: int
    decay_steps: int
    final_fraction: float = 0.1

    def __post_init__(self) -> None:
        _require(self.peak > 0, self, "peak", "above 0")
        _require(self.warmup_steps >= 0, self, "warmup_steps", "0 or more")
        _require(self.decay_steps > self.warmup_steps, self, "decay_steps", f"above warmup_steps ({self.warmup_steps})")
        _require(0 <= self.final_fraction <= 1, self, "final_fraction", "from 0 to 1")

    def build(self) -> Schedule:
        def schedule(step: Any) -> jax.Array:
            k = _count(step)
            warmup = jnp.minimum(k / max(self.warmup_steps, 1), 1.0)
            progress = jnp.clip((k - self.warmup_steps) / (self.decay_steps - self.warmup_steps), 0.0, 1.0)
            cosine = 0.5 * (1 + jnp.cos(math.pi * progress))
            return self.peak * warmup * (self.final_fraction + (1 - self.final_fraction) * cosine)

        return schedule


@section
class Constant(SchedulePart):
    """The same learning rate at every step; PaLM's finetuning uses 5e-5 with Adafactor."""

    value: float

    def __post_init__(self) -> None:
        _require(self.value > 0, self, "value", "above 0")

    def build(self) -> Schedule:
        return lambda step: jnp.full((), self.value, _count(step).dtype)


@section
class OverriddenSchedule(SchedulePart):
    """`schedule`, set by hand from some steps on.

    values: (from_step, learning rate) with rising steps; each holds until the next, None being the schedule's own.
    Steps are those of `learning_rate`: the updates done before.
    """

    schedule: SchedulePart
    values: tuple[tuple[int, float | None], ...] = ()

    def __post_init__(self) -> None:
        steps = [step for step, _ in self.values]
        _require(steps == sorted(set(steps)) and min(steps, default=0) >= 0, self, "values", "of rising steps")
        _require(all(rate is None or rate > 0 for _, rate in self.values), self, "values", "of rates above 0, or None")

    def build(self) -> Schedule:
        planned = self.schedule.build()

        def schedule(step: Any) -> jax.Array:
            own = rate = planned(step)
            for from_step, value in self.values:
                rate = jnp.where(step >= from_step, own if value is None else value, rate)
            return rate

        return schedule


# ----------------------------------------------------------------------------------------------- gradients


def squared_norms(tree: Any) -> list[jax.Array]:
    """The sum of squares of each leaf in tree order, [] each, in at least float32."""
    return [jnp.sum(jnp.square(_wide(leaf))) for leaf in jax.tree.leaves(tree)]


def global_norm(tree: Any) -> jax.Array:
    """sqrt of the sum of squares over every element of every leaf, [], in at least float32."""
    return jnp.sqrt(sum(squared_norms(tree), jnp.zeros(())))


def clip_by_global_norm(gradients: Any, max_norm: float | None) -> Any:
    """Gradients scaled by min(1, max_norm / global norm) (Pascanu et al. 2013); as they are when max_norm is None."""
    if max_norm is None:
        return gradients
    norm = global_norm(gradients)
    # max, not min(1, max_norm / norm): no division by zero, and a norm that is not finite stays visible.
    scale = max_norm / jnp.maximum(norm, max_norm)
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients)


def _wide_dtype(x: jax.Array) -> Any:
    """float32, or the dtype of `x` when that is wider."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(_wide_dtype(x))


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple)


def _stacked_dims(axes: tuple[str | None, ...]) -> int:
    """Leading dimensions that count layers and not elements of a parameter: 1 under a scan over layers, else 0."""
    return int(bool(axes) and axes[0] == "layers")


# ---------------------------------------------------------------------------------------------- optimizers


@section
class ScheduledOptimizer(OptimizerPart):
    """What the optimizers here have in common: a schedule, and a clip of the gradients' global norm, applied first.

    clip_by_global_norm: over all parameters and layers together; None for no clip.
    """

    schedule: SchedulePart
    clip_by_global_norm: float | None = 1.0

    def __post_init__(self) -> None:
        clip = self.clip_by_global_norm
        _require(clip is None or clip > 0, self, "clip_by_global_norm", "above 0, or None for no clip")

    def learning_rate(self, step: Any) -> jax.Array:
        """Learning rate of the update made after `step` updates; `step` int [] or a Python int. Traceable."""
        return self.schedule.build()(step)


class AdafactorState(NamedTuple):
    """step: int32 [], updates done. m: momentum, in units of the parameters. v: second moment of the gradients."""

    step: jax.Array
    m: Any
    v: Any


@section
class Adafactor(ScheduledOptimizer):
    """Adafactor (Shazeer and Stern 2018) as PaLM section 5 uses it, with T5X's `adafactor.py` as the exact meaning.

    The second moment is not factored, so it is Adam with a learning rate relative to each parameter's size. For each
    parameter p with gradient g at k = step + 1:

        b2 = 1 - k^-decay_exponent
        v  = b2 v + (1 - b2) (g^2 + epsilon)
        u  = lr max(RMS(p), min_parameter_scale) g / sqrt(v)
        m  = beta1 m + (1 - beta1) u
        p  = (1 - lr^weight_decay_lr_exponent) p - m

    RMS is over one layer's parameter: where `axes` begin with "layers", each layer of the stack has its own.

    clip_threshold: g / sqrt(v) is scaled down so that its RMS is at most this (T5X's default is 1.0; PaLM names none).
    weight_decay_lr_exponent: PaLM decays by lr^2, of the parameter itself; None for no decay.
    """

    schedule: SchedulePart = InverseSquareRoot()
    beta1: float = 0.9
    decay_exponent: float = 0.8
    epsilon: float = 1e-30
    min_parameter_scale: float = 1e-3
    clip_threshold: float | None = None
    weight_decay_lr_exponent: float | None = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        clip = self.clip_threshold
        _require(0 <= self.beta1 < 1, self, "beta1", "in [0, 1)")
        _require(0 < self.decay_exponent <= 1, self, "decay_exponent", "in (0, 1]")
        _require(self.epsilon > 0, self, "epsilon", "above 0")
        _require(self.min_parameter_scale >= 0, self, "min_parameter_scale", "0 or more")
        _require(clip is None or clip > 0, self, "clip_threshold", "above 0, or None for no clip")

    def build(self, axes: Any) -> optax.GradientTransformationExtraArgs:
        """The transformation for parameters whose logical axes are `axes`, a tree of tuples of names.

        `update` needs the parameters, and returns what is to be added to them. step: the run's, for the schedule; by
        default the number of updates made.
        """
        stacked = jax.tree.map(_stacked_dims, axes, is_leaf=_is_axes)
        schedule = self.schedule.build()

        def init(params: Any) -> AdafactorState:
            moment = jax.tree.map(lambda p: jnp.zeros_like(p, _wide_dtype(p)), params)
            return AdafactorState(jnp.zeros((), jnp.int32), moment, jax.tree.map(jnp.zeros_like, moment))

        def update(
            updates: Any, state: Any, params: Any = None, *, step: Any = None, **_: Any
        ) -> tuple[Any, AdafactorState]:
            assert params is not None, "Adafactor's update is relative to the parameters: pass them"
            # b2 follows the moments' own age, which an initial checkpoint's step would overstate.
            lr = schedule(state.step if step is None else step)
            mixing = _count(state.step) ** -self.decay_exponent  # 1 - b2, without the cancellation
            decay = 0.0 if self.weight_decay_lr_exponent is None else lr**self.weight_decay_lr_exponent

            def one(p: jax.Array, g: jax.Array, m: jax.Array, v: jax.Array, stack: int) -> tuple[jax.Array, ...]:
                return self._update_one(_wide(p), g.astype(v.dtype), m, v, stack, lr, mixing, decay)

            gradients = clip_by_global_norm(updates, self.clip_by_global_norm)
            results = jax.tree.map(one, params, gradients, state.m, state.v, stacked)
            deltas, m, v = jax.tree.transpose(jax.tree.structure(params), jax.tree.structure((0, 0, 0)), results)
            return deltas, AdafactorState(state.step + 1, m, v)

        return optax.GradientTransformationExtraArgs(init, update)

    def _update_one(
        self, p: jax.Array, g: jax.Array, m: jax.Array, v: jax.Array, stack: int, lr: Any, mixing: Any, decay: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(change of p, new m, new v) of one parameter, whose first `stack` dimensions count layers."""

        def rms(x: jax.Array) -> jax.Array:
            return jnp.sqrt(jnp.mean(jnp.square(x), axis=tuple(range(stack, x.ndim)), keepdims=True))

        lr, mixing, decay = (jnp.asarray(x, v.dtype) for x in (lr, mixing, decay))
        v = (1 - mixing) * v + mixing * (jnp.square(g) + self.epsilon)
        y = g * jax.lax.rsqrt(v)
        scale = lr * jnp.maximum(rms(p), self.min_parameter_scale)
        if self.clip_threshold is not None:
            scale = scale / jnp.maximum(1.0, rms(y) / self.clip_threshold)
        m = self.beta1 * m + (1 - self.beta1) * scale * y
        return -(decay * p + m), m, v


@section
class AdamW(ScheduledOptimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), by optax: p -= lr (m / (sqrt(v) + eps) + decay p).

    The defaults are those of GPT-3, LLaMA and BLOOM. Only matrices decay: norm scales and biases, the parameters with
    a single dimension beside "layers", do not.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(0 <= self.beta1 < 1, self, "beta1", "in [0, 1)")
        _require(0 <= self.beta2 < 1, self, "beta2", "in [0, 1)")
        _require(self.epsilon > 0, self, "epsilon", "above 0")
        _require(self.weight_decay >= 0, self, "weight_decay", "0 or more")

    def build(self, axes: Any) -> optax.GradientTransformationExtraArgs:
        """The transformation for float32 parameters whose logical axes are `axes`, a tree of tuples of names.

        step: as in Adafactor's.
        """
        schedule = self.schedule.build()
        matrices = jax.tree.map(lambda names: len(names) - _stacked_dims(names) > 1, axes, is_leaf=_is_axes)
        direction = optax.chain(
            optax.stateless(lambda gradients, params: clip_by_global_norm(gradients, self.clip_by_global_norm)),
            optax.scale_by_adam(b1=self.beta1, b2=self.beta2, eps=self.epsilon),
            optax.add_decayed_weights(self.weight_decay, mask=matrices),
        )

        def update(updates: Any, state: Any, params: Any = None, *, step: Any = None, **_: Any) -> tuple[Any, Any]:
            lr = schedule(state[1].count if step is None else step)
            deltas, state = direction.update(updates, state, params)
            return jax.tree.map(lambda d: -lr.astype(d.dtype) * d, deltas), state

        return optax.GradientTransformationExtraArgs(direction.init, update)
