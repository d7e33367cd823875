"""How the next token is chosen from logits, as values: greedily, or drawn at a temperature from the most probable."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from palmjax.config import ConfigError, Part, section

Choose = Callable[[jax.Array, jax.Array], jax.Array]
"""(logits float32 [V], key) -> the token, int32 []."""


class SamplingPart(Part):
    """A way to choose."""

    @abc.abstractmethod
    def build(self) -> Choose: ...


@section
class Greedy(SamplingPart):
    """The most probable token; of equals the one with the lowest id."""

    def build(self) -> Choose:
        return lambda logits, key: jnp.argmax(logits).astype(jnp.int32)


@section
class Temperature(SamplingPart):
    """A token drawn from softmax(logits / temperature), cut to its most probable tokens.

    top_k: the k most probable (Fan et al. 2018). top_p: the fewest whose probabilities, after the temperature and
    top_k, sum to at least top_p (nucleus sampling, Holtzman et al. 2020). None cuts nothing. Tokens as probable as the
    last one kept are kept too.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ConfigError(f"temperature = {self.temperature}: must be above 0; Greedy() is the limit at 0")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k = {self.top_k}: must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p = {self.top_p}: must be above 0 and at most 1")

    def build(self) -> Choose:
        return lambda logits, key: jax.random.categorical(key, self.kept(logits)).astype(jnp.int32)

    def kept(self, logits: jax.Array) -> jax.Array:
        """logits / temperature, float32 [V], with -inf for what is cut away."""
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[0]:
            last = jax.lax.top_k(logits, self.top_k)[0][-1]
            logits = jnp.where(logits >= last, logits, -jnp.inf)
        if self.top_p is not None and self.top_p < 1:
            falling = jnp.sort(logits, descending=True)
            probabilities = jax.nn.softmax(falling)
            before = jnp.cumsum(probabilities) - probabilities
            last = jnp.min(jnp.where(before < self.top_p, falling, jnp.inf))
            logits = jnp.where(logits >= last, logits, -jnp.inf)
        return logits
