"""Objectives: the statistics that their papers state, nothing lost, and rows as a model reads them."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from palmjax.config import ConfigError, DatasetConfig
from palmjax.data import feed
from palmjax.data.batch import PackPairs, PackPrefixes
from tasks.corruption import corrupt_spans, noise_spans
from tasks.jsonl import JsonLines
from tasks.objectives import UL2, Denoiser, MaskedLM, MixtureOfDenoisers, PrefixLM, SpanCorruption
from tasks.text_files import TextFiles

VOCABULARY = SimpleNamespace(vocab_size=1100, encode=lambda text: [1000 + ord(text[1]) % 50])
"""Ids 3 to 999 are text; sentinels count down from 1099."""


def text(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 1000, length).astype(np.int32)


def restored(inputs: np.ndarray, targets: np.ndarray, sentinels: int = 100) -> list[int]:
    """The text, put together again from what was dropped."""
    spans: dict[int, list[int]] = {}
    for token in targets.tolist():
        if token >= 1100 - sentinels:
            spans[token] = current = []
        else:
            current.append(token)  # pyright: ignore[reportPossiblyUnbound]
    return [t for token in inputs.tolist() for t in spans.get(token, [token])]


@pytest.mark.parametrize(("density", "mean"), [(0.15, 3.0), (0.15, 8.0), (0.5, 3.0), (0.15, 64.0), (0.5, 64.0)])
def test_noise_has_its_density_and_spans_their_mean(density, mean):
    covered, spans = [], []
    for seed in range(50):
        noise = noise_spans(512, density, mean, np.random.default_rng(seed))
        starts = np.flatnonzero(np.diff(noise.astype(int), prepend=0) == 1)
        covered.append(noise.sum())
        spans.append(len(starts))
        assert not noise[0] and noise[-1]
    assert set(covered) == {round(512 * density)}
    assert np.mean(covered) / np.mean(spans) == pytest.approx(mean, rel=0.05 if mean < 64 else 0.3)
    noises = {noise_spans(512, density, mean, np.random.default_rng(seed)).tobytes() for seed in range(50)}
    assert len(noises) == 50 or mean == 64.0, "spans must be drawn"


@pytest.mark.parametrize("length", [2, 3, 7, 512])
def test_span_corruption_loses_nothing(length):
    for seed in range(20):
        tokens = text(length, seed)
        made = SpanCorruption().example(tokens, np.random.default_rng(seed), VOCABULARY)
        assert restored(made["inputs"], made["targets"]) == tokens.tolist()
        marks = [t for t in made["targets"].tolist() if t >= 1000]
        assert marks == [1099 - i for i in range(len(marks))], "sentinels count down, the last one closes"
        assert [t for t in made["inputs"].tolist() if t >= 1000] == marks[:-1]


def test_span_corruption_of_the_papers_example():
    """'Thank you for inviting me to your party last week' with 'for inviting' and 'last' dropped (figure 2)."""
    words = np.arange(10, 20)
    noise = np.isin(np.arange(10), [2, 3, 8])
    made = corrupt_spans(words, noise, VOCABULARY, 100)
    assert made["inputs"].tolist() == [10, 11, 1099, 14, 15, 16, 17, 1098, 19]
    assert made["targets"].tolist() == [1099, 12, 13, 1098, 18, 1097]
    with pytest.raises(ValueError, match="2 spans need 3 sentinels, and extra_ids is 2"):
        corrupt_spans(words, noise, VOCABULARY, 2)


def test_masked_tokens_are_15_percent_and_80_10_10():
    fates = Counter()
    for seed in range(200):
        tokens = text(512, seed)
        made = MaskedLM().example(tokens, np.random.default_rng(seed), VOCABULARY)
        chosen = made["targets"] != 0
        assert chosen.sum() == round(0.15 * 512)
        np.testing.assert_array_equal(made["targets"][chosen], tokens[chosen])
        np.testing.assert_array_equal(made["inputs"][~chosen], tokens[~chosen])
        read = made["inputs"][chosen]
        fates["mask"] += int(np.sum(read == 1099))
        fates["same"] += int(np.sum(read == tokens[chosen]))
        fates["all"] += int(chosen.sum())
    assert fates["mask"] / fates["all"] == pytest.approx(0.8, abs=0.015)
    assert fates["same"] / fates["all"] == pytest.approx(0.1, abs=0.015)


def test_ul2_mixes_its_denoisers_by_their_shares_and_names_them():
    names = {VOCABULARY.encode(mode)[0]: mode for mode in ("[R]", "[S]", "[X]")}
    assert len(names) == 3
    modes, tails = Counter(), []
    mixture = MixtureOfDenoisers()
    for seed in range(2000):
        tokens = text(400, seed)
        made = mixture.example(tokens, np.random.default_rng(seed), VOCABULARY)
        mode = names[int(made["inputs"][0])]
        modes[mode] += 1
        if mode == "[S]":
            np.testing.assert_array_equal(np.concatenate([made["inputs"][1:], made["targets"]]), tokens)
            tails.append(len(made["targets"]))
        else:
            assert restored(made["inputs"][1:], made["targets"], sentinels=90) == tokens.tolist()
    assert modes["[S]"] / 2000 == pytest.approx(0.34, abs=0.03)
    assert modes["[R]"] / 2000 == pytest.approx(0.33, abs=0.03)
    assert np.mean(tails) == pytest.approx(100, rel=0.05), "a quarter of the row on average"
    # A denoiser is extreme if it drops half of the text or more, or long spans (section 3.1).
    for one in UL2:
        extreme = one.mean_span is not None and (one.noise_density >= 0.5 or one.mean_span >= 12)
        assert (one.mode == "[X]") == extreme


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SpanCorruption(noise_density=1.0), "noise_density is 1.0"),
        (lambda: SpanCorruption(mean_span=0.5), "mean_span is 0.5"),
        (lambda: PrefixLM(length=1), "PrefixLM.length is 1"),
        (lambda: MaskedLM(mask_rate=0.0), "mask_rate is 0.0"),
        (lambda: Denoiser(mode="", share=0.0, noise_density=0.5, mean_span=3.0), "share is 0.0"),
        (lambda: MixtureOfDenoisers(denoisers=()), "denoisers is empty"),
    ],
)
def test_impossible_values_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# --- through a store to batches --------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path):
    lines = "".join(f"{chr(65 + i % 26) * (5 + 37 * i % 90)}\n" for i in range(40))
    (tmp_path / "text.txt").write_text(lines)
    return tmp_path


def dataset(corpus, objective, packing, length=64):
    task = TextFiles(
        name=f"{type(objective).__name__.lower()}_lines",
        paths=str(corpus / "text.txt"),
        lines=True,
        validation_share=0.0,
        objective=objective,
    )
    config = DatasetConfig(
        mixture_or_task_name=task.name,
        task_feature_lengths={"targets": length},
        batch_size=4,
        packing=packing,
        store_dir=str(corpus / "stores"),
        tasks=(task,),  # pyright: ignore[reportArgumentType] a TaskPart by shape
        shuffle=False,
    )
    return feed.open_dataset(config)


def segments_of(data):
    """(tokens, targets, weights, prefix or None) of every segment of one pass, positions checked."""
    for batch in data.eval_batches():
        for row in range(batch.tokens.shape[0]):
            for number in range(1, batch.segments[row].max() + 1):
                here = batch.segments[row] == number
                np.testing.assert_array_equal(batch.positions[row][here], np.arange(here.sum()))
                prefix = None if batch.prefix is None else batch.prefix[row][here]
                yield batch.tokens[row][here], batch.targets[row][here], batch.weights[row][here], prefix


def pieces_of(corpus, length):
    lines = [[ord(letter) + 3 for letter in line] for line in (corpus / "text.txt").read_text().splitlines()]
    pieces = [line[i : i + length] for line in lines for i in range(0, len(line), length)]
    return [piece for piece in pieces if len(piece) > 1]


def test_a_prefix_is_the_inputs_and_what_predicts_the_first_target(corpus):
    seen = []
    for tokens, targets, weights, prefix in segments_of(dataset(corpus, PrefixLM(length=60), PackPrefixes())):
        inputs = int(np.sum(weights == 0))
        assert 1 <= inputs < len(targets)
        assert weights.tolist() == [0.0] * inputs + [1.0] * (len(targets) - inputs)
        assert prefix is not None
        assert prefix.tolist() == [1] * (inputs + 1) + [0] * (len(targets) - inputs - 1)
        assert tokens.tolist() == [0, *targets[:-1]]
        assert targets[-1] == 1
        seen.append(targets[:-1].tolist())
    assert sorted(seen) == sorted(pieces_of(corpus, 60))


def test_masked_pairs_are_aligned_rows(corpus):
    predicted = total = 0
    data = dataset(corpus, MaskedLM(length=32), PackPairs())
    assert data.vocabulary.size == 260
    for tokens, targets, weights, prefix in segments_of(data):
        assert prefix is None
        np.testing.assert_array_equal(weights, (targets != 0).astype(np.float32))
        letter = Counter(tokens[targets == 0].tolist()).most_common(1)
        assert not letter or set(targets[targets != 0].tolist()) <= {letter[0][0]}, "a line is one letter"
        predicted, total = predicted + int(weights.sum()), total + len(targets)
    assert total == sum(map(len, pieces_of(corpus, 32)))
    assert predicted / total == pytest.approx(0.15, abs=0.02)


def test_a_store_is_the_same_whenever_it_is_built(corpus, tmp_path_factory):
    first = dataset(corpus, SpanCorruption(length=48), PackPrefixes())
    again = tmp_path_factory.mktemp("again")
    (again / "text.txt").write_text((corpus / "text.txt").read_text())
    second = dataset(again, SpanCorruption(length=48), PackPrefixes())
    for a, b in zip(first.eval_batches(), second.eval_batches(), strict=True):
        for field in ("tokens", "targets", "weights", "segments", "positions", "prefix"):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
    drawn = {tuple(targets[weights > 0].tolist()) for _, targets, weights, _ in segments_of(first)}
    assert len(drawn) > 20


def test_what_does_not_fit_together_is_refused(corpus):
    with pytest.raises(ConfigError, match="two aligned halves"):
        dataset(corpus, PrefixLM(length=40), PackPairs())
    with pytest.raises(ConfigError, match=r"document of \d+ tokens is longer than a row of 16"):
        dataset(corpus, MaskedLM(length=32), PackPairs(), length=16)
    task = JsonLines(name="both", paths=str(corpus / "text.txt"), inputs_key="q", objective=PrefixLM())
    with pytest.raises(ValueError, match="PrefixLM makes inputs of its own"):
        task.build()


def test_objectives_are_values():
    assert hash(MixtureOfDenoisers()) == hash(MixtureOfDenoisers())
    assert dataclasses.replace(MaskedLM(), length=9) != MaskedLM()
    assert functools.reduce(lambda a, b: a + b, [one.share for one in UL2]) == pytest.approx(1.0)
