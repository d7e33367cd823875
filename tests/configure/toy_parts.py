"""Parts small enough to read in one look, imported by the gin text of these tests as a user's own module would be."""

from __future__ import annotations

from typing import Any, Literal

from palmjax.config import ConfigError, LossPart, ModelPart, OptimizerPart, PackingPart, section


class Built:
    def build(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("configure never builds a part")


@section
class Norm:
    epsilon: float = 1e-6


@section
class Toy(Built, ModelPart):
    layers: int
    first: Norm = Norm(epsilon=1e-3)
    last: Norm = Norm()
    policy: Literal["full", "none"] = "none"
    rate: float = 0.0

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ConfigError(f"layers must be at least 1, got {self.layers}")


@section
class Sgd(Built, OptimizerPart):
    rate: float = 0.1

    def learning_rate(self, step: Any) -> Any:
        raise AssertionError


@section
class Momentum(Sgd):
    momentum: float = 0.9


@section
class Abstract(OptimizerPart):
    def build(self) -> Any: ...


@section
class Entropy(Built, LossPart):
    weights: tuple[float, ...] = ()


@section
class Pack(Built, PackingPart):
    documents: bool = False


@section
class Lines:
    """A task by shape: `tasks` derives from nothing of palmjax."""

    name: str
    files: tuple[str, ...] = ()

    def build(self) -> None: ...
