"""Plans of jobs beyond one slice of one dense model: several slices, experts, cycles of blocks, the newest chip."""

from __future__ import annotations

import pathlib

import pytest

from palmjax import configure, plan
from palmjax.models.account import account

SIZES = [
    "TASK_FEATURE_LENGTHS={'targets': 256}",
    "VOCAB_SIZE=1024",
    "TRAIN_STEPS=10",
    "WARMUP_STEPS=2",
    "BATCH_SIZE=16",
]
SMALL = ["Decoder.num_layers=4", "Decoder.d_model=256", "Attention.num_heads=4", "Attention.head_dim=64"]
TINY = str(pathlib.Path(__file__).parent / "tiny.gin")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("plans"))


def compiled(cache: str, where: plan.Topology, files: list[str], *bindings: str) -> plan.Plan:
    return plan.compile(configure.load(files, bindings, placeholders=True).experiment, where, cache=cache)


def family(model: str) -> list[str]:
    return ["run/train.gin", f"models/{model}.gin", "optim/adamw_cosine.gin", "data/jsonl.gin"]


def test_slices_exchange_gradients_over_the_data_center_s_network(cache: str) -> None:
    one = compiled(cache, plan.parse("v5e:2x2"), [TINY])
    two = compiled(cache, plan.parse("v5e:2x2", 2), [TINY], "MeshConfig.data=2")
    assert two.chips == 8 and two.fits and two.time is not None and one.time is not None
    assert two.time.kinds["exposed DCN"] > 0 and one.time.kinds.get("exposed DCN", 0) == 0
    assert two.usage.parameters == pytest.approx(one.usage.parameters, rel=0.05)
    assert two.tokens_per_second is not None and one.tokens_per_second is not None
    assert two.tokens_per_second < 2 * one.tokens_per_second


def test_experts_are_exchanged_along_their_axis(cache: str) -> None:
    found = compiled(
        cache,
        plan.parse("v5e:2x2"),
        family("glam_moe"),
        *(*SIZES, *SMALL, "Attention.num_kv_heads=4", "GEGLU.d_ff=512", "MLP.d_ff=512", "Experts.num_experts=8"),
        *("MeshConfig.expert=4", "MeshConfig.data=1", "MeshConfig.fsdp=1", "MeshConfig.tensor=1"),
    )
    assert found.fits and found.time is not None and found.hardware_flops is not None
    assert found.time.axes["expert"] > 0
    # Every second layer computes 1.25 x two experts for a token; none of it is left out or counted for all eight.
    assert found.model_flops < found.hardware_flops < 2 * found.model_flops


def test_every_block_of_a_cycle_is_in_the_plan(cache: str) -> None:
    bindings = [*SIZES, *SMALL, "Attention.num_kv_heads=4", "MLP.d_ff=1024", "LearnedPositions.length=256"]
    bindings += ["banded/Attention.window=64", "MeshConfig.fsdp=4"]
    found = compiled(cache, plan.parse("v5e:2x2"), family("gpt3_small"), *bindings)
    experiment = configure.load(family("gpt3_small"), bindings, placeholders=True).experiment
    totals = account(experiment.model, 256)  # pyright: ignore[reportArgumentType]
    assert found.fits and found.time is not None and found.hardware_flops is not None
    assert found.parameters == totals.parameters
    # Two turns of the loop over cycles of two blocks: with the elementwise parts recomputed, no matmul runs twice but
    # attention's, and a banded layer's kernel may compute less than the whole.
    assert 0.85 * totals.flops_per_token < found.hardware_flops < 1.35 * totals.flops_per_token


def test_the_newest_chip_has_two_devices(cache: str) -> None:
    found = compiled(cache, plan.parse("tpu7x:2x2x1"), [TINY], "MeshConfig.fsdp=4")
    assert found.chips == 4 and found.fits and found.time is not None
    assert found.mesh == {"data": 1, "fsdp": 4, "tensor": 2}
