"""Loss scaling: what float16's narrow range needs (Micikevicius et al. 2018, section 3.2) and bfloat16's does not.

The loss is multiplied by the scale before it is differentiated and the gradient divided by it in float32, so that small
gradients do not round to zero on the way. Scales are powers of two: neither changes a digit. May import jax and
`palmjax.config`.
"""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp

from palmjax.config import LossScalePart, require, section


@jax.tree_util.register_dataclass
@section
class LossScaleState:
    """What is saved of a loss scale, each of shape []. scale: float32, of the next step. clean: int32, steps without an
    overflow since the scale last changed its course. patience: int32, overflows left until it falls.
    """

    scale: jax.Array
    clean: jax.Array
    patience: jax.Array


class LossScale(Protocol):
    """A rule for the scale. minimum: below it the scale never goes. max_at_minimum: overflows there end the run."""

    @property
    def minimum(self) -> float: ...

    @property
    def max_at_minimum(self) -> int: ...

    def init(self) -> LossScaleState:
        """The state before the first step."""
        ...

    def update(self, state: LossScaleState, overflow: jax.Array) -> LossScaleState:
        """The state after a step. overflow: bool [], whether its gradient was not finite. Traceable."""
        ...


@section
class DynamicLossScale(LossScalePart):
    """Doubles after `window` steps in a row without an overflow, and halves at every overflow but the first
    `hysteresis - 1` since it last doubled. The defaults are those of BLOOM 560M; GPT-NeoX-20B has a window of 1000.

    The meaning is Megatron-LM's `DynamicGradScaler`, and DeepSpeed's with its hysteresis not consecutive: an overflow
    restarts the window; the hysteresis is full again only when the scale has doubled.

    init: the first step's scale. minimum: below it the scale never goes. max_at_minimum: overflows at the minimum,
    since the scale last doubled, after which the run stops (OPT's log book: a scale at its end is a run that diverges).
    """

    init: float = 4096.0
    window: int = 500
    hysteresis: int = 2
    minimum: float = 1.0
    max_at_minimum: int = 10

    def __post_init__(self) -> None:
        require(self.window >= 1, self, "window", "1 or more")
        require(self.hysteresis >= 1, self, "hysteresis", "1 (halve at every overflow) or more")
        require(self.minimum > 0, self, "minimum", "above 0")
        require(self.init >= self.minimum, self, "init", f"minimum = {self.minimum} or more")
        require(self.max_at_minimum >= 1, self, "max_at_minimum", "1 or more")

    def build(self) -> LossScale:
        return _Dynamic(self)


class _Dynamic:
    def __init__(self, config: DynamicLossScale):
        self._config = config
        self.minimum, self.max_at_minimum = config.minimum, config.max_at_minimum

    def init(self) -> LossScaleState:
        c = self._config
        return LossScaleState(
            scale=jnp.float32(c.init), clean=jnp.zeros((), jnp.int32), patience=jnp.int32(c.hysteresis)
        )

    def update(self, state: LossScaleState, overflow: jax.Array) -> LossScaleState:
        c = self._config
        clean = jnp.where(overflow, 0, state.clean + 1)
        patience = jnp.where(overflow, jnp.maximum(state.patience - 1, 0), state.patience)
        grow = clean == c.window
        halved = jnp.where(overflow & (patience == 0), jnp.maximum(state.scale / 2, c.minimum), state.scale)
        return LossScaleState(
            scale=jnp.where(grow, state.scale * 2, halved),
            clean=jnp.where(grow, 0, clean),
            patience=jnp.where(grow, c.hysteresis, patience),
        )
