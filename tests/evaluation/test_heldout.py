"""Held-out evaluation against a float64 oracle, at any batch size and on any mesh."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from palmjax import mesh, sharding
from palmjax.config import ConfigError, DatasetConfig, MeshConfig, ShardingRules
from palmjax.data import feed, index
from palmjax.data.batch import ConcatenateAndCut, PackDocuments
from palmjax.data.store import Folder, PartWriter, write_manifest
from palmjax.data.vocabulary import Bytes, PassThrough, Vocabulary
from palmjax.evaluation import heldout
from palmjax.evaluation.heldout import HeldOut
from tests.models import palm_numpy
from tests.models.builders import tiny_palm

LENGTH = 32
TEXTS = [f"Größe {n}: " + "ü≠" * (n % 5) + "x" * (n * 13 % 37) for n in range(23)]
QUESTION = 4  # tokens of each document that are only conditioned on


def settings(folder: Path, **changes: Any) -> DatasetConfig:
    values = {
        "mixture_or_task_name": "texts",
        "task_feature_lengths": {"targets": LENGTH},
        "batch_size": 8,
        "packing": ConcatenateAndCut(),
        "store_dir": str(folder),
        "split": "validation",
        "shuffle": False,
    }
    return DatasetConfig(**(values | changes))


def write_store(config: DatasetConfig, vocabulary: Vocabulary, documents: list[list[int]]) -> None:
    folder = Folder(f"{config.store_dir}/{config.mixture_or_task_name}/validation-0")
    writer = PartWriter(folder, 0, vocabulary)
    for document in documents:
        writer.add(np.array([*document, 1]), num_unweighted=QUESTION)
    write_manifest(folder, config.mixture_or_task_name, "validation", vocabulary, [writer.finish()])
    name = config.mixture_or_task_name
    index.save(config, [index.Source(name, f"{name}/validation-0", 1.0)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores")
    write_store(settings(path), Bytes(), [Bytes().encode(text) for text in TEXTS])
    return path


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_palm(num_layers=1, heads=2, vocab_size=259, vocab_multiple=8).build()


def on_mesh(model: Any, layout: tuple[int, ...] = (1, 1, 1)) -> tuple[Any, Any]:
    """A mesh and the model's parameters on it, the same values on every mesh."""
    count = math.prod(layout)
    placed = mesh.build(MeshConfig(**dict(zip(mesh.AXES, layout, strict=True))), jax.devices()[:count])
    with sharding.activate(placed, ShardingRules()):
        abstract = sharding.concrete(jax.eval_shape(model.init, jax.random.key(0)), placed)
    params = jax.jit(model.init)(jax.random.key(0))
    params["decoder"]["decoder_norm"]["scale"] *= 0.5  # some distance from one-hot predictions
    return placed, jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, abstract))


def heldout_of(config: DatasetConfig, model: Any, placed: Any, rules: ShardingRules) -> HeldOut:
    return HeldOut(feed.open_dataset(config), model, placed, rules)


def oracle(params: Any, model: Any) -> dict[str, float]:
    """What the sums are, from the documents' own text: float64, one row at a time, no store and no batch."""
    stream = [(i, n >= QUESTION) for text in TEXTS for n, i in enumerate([*Bytes().encode(text), 1])]
    sums: dict[str, float] = dict.fromkeys(heldout.SUMS, 0.0)
    for first in range(0, len(stream), LENGTH):
        targets = np.array([i for i, _ in stream[first : first + LENGTH]])
        scored = np.array([scored for _, scored in stream[first : first + LENGTH]])
        logits = palm_numpy.forward(params, np.array([0, *targets[:-1]]))[:, : model.config.vocab_size]
        log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        nats = log_z - logits[np.arange(len(targets)), targets]
        sums["nats"] += nats[scored].sum()
        sums["log_z_squared"] += (log_z[scored] ** 2).sum()
        sums["tokens"] += scored.sum()
        sums["correct"] += (logits.argmax(-1) == targets)[scored].sum()
    sums["bytes"] = sum(len(text.encode()) - QUESTION for text in TEXTS)
    return sums


def assert_same(result: heldout.Result, wanted: dict[str, float]) -> None:
    for name in ("tokens", "correct", "bytes"):
        assert getattr(result, name) == wanted[name], name
    for name in ("nats", "log_z_squared"):
        assert getattr(result, name) == pytest.approx(wanted[name], rel=2e-6), name


@pytest.mark.parametrize(
    ("layout", "batch_size"),
    [((1, 1, 1), 1), ((1, 1, 1), 3), ((1, 1, 1), 64), ((2, 2, 2), 8), ((8, 1, 1), 16), ((1, 4, 2), 4)],
    ids=str,
)
def test_every_token_is_scored_once_at_any_batch_size_on_any_mesh(folder, model, layout, batch_size):
    placed, params = on_mesh(model, layout)
    result = heldout_of(settings(folder, batch_size=batch_size), model, placed, ShardingRules()).run(params)
    want = oracle(params, model)
    assert 0 < want["correct"] < want["tokens"] < sum(len(text.encode()) + 1 for text in TEXTS)
    assert_same(result, want)
    got = result.metrics()
    assert got["loss"] == pytest.approx(want["nats"] / want["tokens"], rel=2e-6)
    assert got["bits_per_byte"] == pytest.approx(want["nats"] / math.log(2) / want["bytes"], rel=2e-6)
    assert got["accuracy"] == want["correct"] / want["tokens"]
    assert got["z"] == pytest.approx(want["log_z_squared"] / want["tokens"], rel=2e-6)


def test_packed_documents_are_each_scored_alone(folder, model):
    """Bytes and tokens do not depend on the packing; the loss does, since a document does not see the one before."""
    placed, params = on_mesh(model)
    cut = heldout_of(settings(folder), model, placed, ShardingRules()).run(params)
    packed_config = settings(folder, packing=PackDocuments())
    index.save(packed_config, [index.Source("texts", "texts/validation-0", 1.0)])
    packed = heldout_of(packed_config, model, placed, ShardingRules()).run(params)
    assert (packed.tokens, packed.bytes) == (cut.tokens, cut.bytes)
    assert packed.nats != pytest.approx(cut.nats, rel=1e-4)


def test_the_first_batches_are_the_first_rows_and_the_program_is_compiled_once(folder, model):
    placed, params = on_mesh(model)
    four = heldout_of(settings(folder, batch_size=4), model, placed, ShardingRules())
    two = heldout_of(settings(folder, batch_size=2), model, placed, ShardingRules())
    seen = []
    part = four.run(params, 2, lambda done, batches: seen.append((done, batches)))
    assert_same(part, vars(two.run(params, 4)))
    assert seen == [(0, 2), (1, 2), (2, 2)]
    assert four.run(params, 10_000) == four.run(params) != part
    assert four._step._cache_size() == 1


@pytest.mark.multidevice
def test_it_can_be_compiled_before_there_are_parameters(folder, model):
    placed, params = on_mesh(model, (2, 2, 2))
    lazy = heldout_of(settings(folder), model, placed, ShardingRules()).run(params)
    ahead = heldout_of(settings(folder), model, placed, ShardingRules())
    ahead.compile(sharding.abstract_state(lambda: model.init(jax.random.key(0)), placed, ShardingRules()))
    assert ahead.run(params) == lazy


def test_a_vocabulary_without_text_has_no_bits_per_byte(tmp_path, model):
    config = settings(tmp_path)
    write_store(config, PassThrough(num_ids=200), [[3, 4, 5, 6, 7, 8, 9]] * 10)
    placed, params = on_mesh(model)
    result = heldout_of(config, model, placed, ShardingRules()).run(params)
    assert math.isnan(result.bits_per_byte)
    assert "bits_per_byte" not in result.metrics()
    assert result.tokens == 10 * 4


def test_a_mesh_that_does_not_divide_the_batch_is_refused_by_name(folder, model):
    placed, _ = on_mesh(model, (2, 2, 2))
    with pytest.raises(ConfigError, match=r"batch.*6.*data=2 x fsdp=2"):
        heldout_of(settings(folder, batch_size=6), model, placed, ShardingRules())


def test_a_vocabulary_that_the_model_does_not_know_is_refused(folder):
    placed, _ = on_mesh(tiny_palm(num_layers=1, heads=2, vocab_size=200).build())
    with pytest.raises(ConfigError, match=r"'texts' has 259 ids and the model only 200"):
        heldout_of(settings(folder), tiny_palm(vocab_size=200).build(), placed, ShardingRules())


def test_nothing_to_score_is_refused(folder, model):
    placed, params = on_mesh(model)
    with pytest.raises(ConfigError, match=r"'texts'.*'validation' has no token to score"):
        heldout_of(settings(folder), model, placed, ShardingRules()).run(params, 0)
