"""Training objectives as seqio preprocessors: from tokenized documents to what is conditioned on and what is predicted.

An objective is a value of a task, such as `JsonLines.objective = @SpanCorruption()`. It makes `inputs`, which carry no
loss, and `targets` from a document's tokens; a decoder reads them one behind the other (`PackPrefixes` lets a whole
segment see its inputs). Random choices depend on seqio's seed and the example's number only. What is done to a piece
is in `tasks.corruption`; that, seqio and TensorFlow are imported inside functions.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from tasks.corruption import Example


class Objective(abc.ABC):
    """What a task's documents are turned into.

    length: documents are cut in pieces of this many tokens. extra_ids: ids added behind the vocabulary's own, as
    seqio's `extra_ids`: sentinels, the last id first, and masks.
    """

    length: int
    extra_ids: int

    @abc.abstractmethod
    def example(self, tokens: np.ndarray, rng: np.random.Generator, vocabulary: Any) -> Example:
        """`inputs` and `targets` of one piece, int32 [n] with n from 2 to `length`. vocabulary: seqio's."""

    def preprocess(self, dataset: Any, vocabulary: Any) -> Any:
        """A tf.data.Dataset of tokenized documents to one of examples; a piece of one token gives none."""
        import seqio
        import tensorflow as tf

        def cut(example: Any) -> Any:
            tokens = example["targets"]
            starts = tf.range(0, tf.size(tokens), self.length)
            pieces = tf.data.Dataset.from_tensor_slices(starts)
            return pieces.map(lambda start: {"targets": tokens[start : start + self.length]})

        @seqio.map_over_dataset(num_seeds=1)
        def corrupt(example: Any, seed: Any) -> Any:
            def run(tokens: np.ndarray, seed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
                import numpy as np

                made = self.example(tokens, np.random.default_rng(seed.astype(np.uint32)), vocabulary)
                return made["inputs"].astype(np.int32), made["targets"].astype(np.int32)

            inputs, targets = tf.numpy_function(run, [example["targets"], seed], [tf.int32, tf.int32])
            inputs.set_shape([None])
            targets.set_shape([None])
            return {"inputs": inputs, "targets": targets}

        # seqio's decorator passes the seed.
        return corrupt(dataset.flat_map(cut).filter(lambda example: tf.size(example["targets"]) > 1))  # pyright: ignore[reportCallIssue]


def _check_length(objective: Objective) -> None:
    if objective.length < 2:
        raise ValueError(f"{type(objective).__name__}.length is {objective.length}; a piece has 2 tokens or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixLM(Objective):
    """A piece cut at a random place: its head is conditioned on, its tail predicted (Raffel et al. 2020, 3.2.1)."""

    length: int = 512
    extra_ids: int = 0

    def __post_init__(self) -> None:
        _check_length(self)

    def example(self, tokens: np.ndarray, rng: np.random.Generator, vocabulary: Any) -> Example:
        from tasks import corruption

        return corruption.split_at(tokens, int(rng.integers(1, len(tokens))))


def _check_noise(part: Any) -> None:
    if not 0.0 < part.noise_density < 1.0:
        raise ValueError(f"{type(part).__name__}.noise_density is {part.noise_density}; it must be between 0 and 1")
    if part.mean_span < 1.0:
        raise ValueError(f"{type(part).__name__}.mean_span is {part.mean_span}; a span has 1 token or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanCorruption(Objective):
    """T5's objective: noise_density of the tokens dropped in spans of mean_span (Raffel et al. 2020, section 3.1.4)."""

    length: int = 512
    noise_density: float = 0.15
    mean_span: float = 3.0
    extra_ids: int = 100

    def __post_init__(self) -> None:
        _check_length(self)
        _check_noise(self)

    def example(self, tokens: np.ndarray, rng: np.random.Generator, vocabulary: Any) -> Example:
        from tasks import corruption

        noise = corruption.noise_spans(len(tokens), self.noise_density, self.mean_span, rng)
        return corruption.corrupt_spans(tokens, noise, vocabulary, self.extra_ids)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoiser:
    """One of UL2's denoisers: its share of the examples (relative to the others'), and what it drops.

    mode: text of the token that is put before the inputs, "" for none. mean_span: None for a tail of noise_density on
    average, which is predicted as it is (the S-denoiser).
    """

    mode: str
    share: float
    noise_density: float
    mean_span: float | None

    def __post_init__(self) -> None:
        if self.share <= 0.0:
            raise ValueError(f"Denoiser.share is {self.share}; it must be above 0")
        if self.mean_span is not None:
            _check_noise(self)
        elif not 0.0 < self.noise_density <= 0.5:
            raise ValueError(f"Denoiser.noise_density is {self.noise_density}; of a tail it is above 0, 0.5 at most")


UL2 = (
    Denoiser(mode="[R]", share=0.33 / 2, noise_density=0.15, mean_span=3.0),
    Denoiser(mode="[R]", share=0.33 / 2, noise_density=0.15, mean_span=8.0),
    Denoiser(mode="[S]", share=0.34, noise_density=0.25, mean_span=None),
    Denoiser(mode="[X]", share=0.33 / 4, noise_density=0.5, mean_span=3.0),
    Denoiser(mode="[X]", share=0.33 / 4, noise_density=0.5, mean_span=8.0),
    Denoiser(mode="[X]", share=0.33 / 4, noise_density=0.15, mean_span=64.0),
    Denoiser(mode="[X]", share=0.33 / 4, noise_density=0.5, mean_span=64.0),
)
"""The seven of Tay et al. 2022, table 1: regular, sequential and extreme ones, about a third of the examples each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureOfDenoisers(Objective):
    """UL2's objective: each piece goes to one denoiser, which says so by its mode token (Tay et al. 2022, section 3).

    Mode tokens are text that the vocabulary encodes: one id each if it has them as pieces.
    """

    length: int = 512
    denoisers: tuple[Denoiser, ...] = UL2
    extra_ids: int = 128

    def __post_init__(self) -> None:
        _check_length(self)
        if not self.denoisers:
            raise ValueError("MixtureOfDenoisers.denoisers is empty")

    def example(self, tokens: np.ndarray, rng: np.random.Generator, vocabulary: Any) -> Example:
        import numpy as np

        from tasks import corruption

        shares = np.asarray([one.share for one in self.denoisers])
        chosen = self.denoisers[int(rng.choice(len(shares), p=shares / shares.sum()))]
        if chosen.mean_span is None:
            # Uniform from one token to twice the mean, as the paper's S-denoiser is a random prefix.
            most = min(max(round(2 * chosen.noise_density * len(tokens)), 1), len(tokens) - 1)
            place = len(tokens) - int(rng.integers(1, most + 1))
            made = corruption.split_at(tokens, place)
        else:
            noise = corruption.noise_spans(len(tokens), chosen.noise_density, chosen.mean_span, rng)
            made = corruption.corrupt_spans(tokens, noise, vocabulary, self.extra_ids)
        mode = np.asarray(vocabulary.encode(chosen.mode) if chosen.mode else [], tokens.dtype)
        return made | {"inputs": np.concatenate([mode, made["inputs"]])}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLM(Objective):
    """BERT's masked language model (Devlin et al. 2019, section 3.1): mask_rate of the tokens are predicted.

    Of those 80 % are read as the mask (the vocabulary's last id), 10 % as a random id of its own and 10 % as they are.
    `inputs` and `targets` are equally long and aligned, targets 0 where nothing is predicted: pack them with
    `PackPairs`.
    """

    length: int = 512
    mask_rate: float = 0.15
    extra_ids: int = 1

    def __post_init__(self) -> None:
        _check_length(self)
        if not 0.0 < self.mask_rate < 1.0:
            raise ValueError(f"MaskedLM.mask_rate is {self.mask_rate}; it must be between 0 and 1")

    def example(self, tokens: np.ndarray, rng: np.random.Generator, vocabulary: Any) -> Example:
        from tasks import corruption

        mask, last = corruption.sentinel(vocabulary, 0), int(vocabulary.vocab_size) - self.extra_ids
        # Strangers come from behind pad, EOS and UNK, and from before the extra ids.
        return corruption.mask_tokens(tokens, self.mask_rate, rng, mask=mask, first=3, last=last)
