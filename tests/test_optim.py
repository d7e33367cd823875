"""Optimizers against published vectors, against plain numpy, over stacked layers and over an explicit mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from palmjax.config import ConfigError, OptimizerPart
from palmjax.optim import Adafactor, AdamW, Constant, InverseSquareRoot, WarmupCosine, clip_by_global_norm, global_norm

AXES = {
    "kernel": ("layers", "embed", "mlp"),
    "scale": ("layers", "embed"),
    "embedding": ("vocab", "embed"),
}
SHAPES = {"kernel": (3, 4, 8), "scale": (3, 4), "embedding": (8, 4)}


def random_tree(seed: int, size: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: size * rng.standard_normal(shape) for name, shape in SHAPES.items()}


def run(optimizer: OptimizerPart, axes: Any, params: Any, gradients: list[Any]) -> tuple[Any, Any]:
    """Parameters and optimizer state after one jitted update for each tree of gradients."""
    transformation = optimizer.build(axes)

    @jax.jit
    def step(params: Any, state: Any, gradient: Any) -> tuple[Any, Any]:
        updates, state = transformation.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = transformation.init(params)
    for gradient in gradients:
        params, state = step(params, state, gradient)
    return params, state


# ------------------------------------------------------------------------------------------------ Adafactor


def test_adafactor_worked_vector() -> None:
    """Three updates by hand: the recursion of T5X adafactor.py, unfactored, with PaLM's rate and decay."""
    gradients = [[0.1, -0.2], [0.1, 0.3], [-0.05, 0.1]]
    expected = [
        [0.4995547153, -0.2495797153],
        [0.4987541334, -0.2496509008],
        [0.4982663337, -0.2498997686],
    ]
    with jax.enable_x64(True):
        for count, values in enumerate(expected, start=1):
            params, _ = run(
                Adafactor(),
                {"p": ("embed",)},
                {"p": jnp.array([0.5, -0.25])},
                [{"p": jnp.array(g)} for g in gradients[:count]],
            )
            np.testing.assert_allclose(params["p"], values, rtol=0, atol=1e-8)


def numpy_adafactor(optimizer: Adafactor, params: Any, gradients: list[Any]) -> tuple[Any, Any, Any]:
    """Adafactor over separate float64 arrays, written as the paper writes it: one array and one update at a time."""
    params = {name: value.copy() for name, value in params.items()}
    m = {name: np.zeros_like(value) for name, value in params.items()}
    v = {name: np.zeros_like(value) for name, value in params.items()}
    for k, gradient in enumerate(gradients, start=1):
        lr = min(1e-2, 1 / np.sqrt(k))
        b2 = 1 - k**-0.8
        norm = np.sqrt(sum(np.sum(g**2) for g in gradient.values()))
        for name, p in params.items():
            g = gradient[name]
            if optimizer.clip_by_global_norm is not None and norm > optimizer.clip_by_global_norm:
                g = g * optimizer.clip_by_global_norm / norm
            v[name] = b2 * v[name] + (1 - b2) * (g**2 + 1e-30)
            y = g / np.sqrt(v[name])
            if optimizer.clip_threshold is not None:
                y = y / max(1.0, np.sqrt(np.mean(y**2)) / optimizer.clip_threshold)
            size = max(np.sqrt(np.mean(p**2)), 1e-3)
            m[name] = 0.9 * m[name] + 0.1 * lr * size * y
            params[name] = (1 - lr**2) * p - m[name]
    return params, m, v


def unstack(tree: dict[str, Any]) -> dict[str, Any]:
    """One array a layer: kernel [3, 4, 8] -> kernel.0, kernel.1, kernel.2, each [4, 8]."""
    flat = {}
    for name, value in tree.items():
        if AXES[name][0] == "layers":
            flat |= {f"{name}.{layer}": value[layer] for layer in range(len(value))}
        else:
            flat[name] = value
    return flat


@pytest.mark.parametrize("clip_threshold", [None, 0.7])
@pytest.mark.parametrize("global_clip", [None, 0.5])
def test_adafactor_over_stacked_layers_is_adafactor_of_each_layer(
    clip_threshold: float | None, global_clip: float | None
) -> None:
    optimizer = Adafactor(clip_threshold=clip_threshold, clip_by_global_norm=global_clip)
    params = random_tree(0, 0.1)
    # Layers of very different size, one below the least parameter scale: statistics over the stack would mix them.
    params["kernel"] *= np.array([1.0, 30.0, 1e-4])[:, None, None]
    gradients = [random_tree(seed, 0.3) for seed in range(1, 7)]
    with jax.enable_x64(True):
        got, state = run(optimizer, AXES, jax.tree.map(jnp.asarray, params), gradients)
        expected = numpy_adafactor(optimizer, unstack(params), [unstack(g) for g in gradients])
        for ours, theirs in zip((got, state.m, state.v), expected, strict=True):
            ours = unstack(ours)
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                np.testing.assert_allclose(ours[name], value, rtol=1e-11, atol=1e-16, err_msg=name)


def test_adafactor_in_float32_stays_near_float64() -> None:
    params, gradients = random_tree(0, 0.1), [random_tree(seed, 0.3) for seed in range(1, 9)]
    f32 = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)  # noqa: E731
    got, _ = run(Adafactor(), AXES, f32(params), [f32(g) for g in gradients])
    expected, _, _ = numpy_adafactor(Adafactor(), unstack(params), [unstack(g) for g in gradients])
    for name, value in unstack(got).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_adafactor_without_decay_keeps_parameters_that_get_no_gradient() -> None:
    params = {"p": jnp.array([0.5, -2.0])}
    got, _ = run(Adafactor(weight_decay_lr_exponent=None), {"p": ("embed",)}, params, [{"p": jnp.zeros(2)}] * 3)
    np.testing.assert_array_equal(got["p"], params["p"])
    decayed, _ = run(Adafactor(), {"p": ("embed",)}, params, [{"p": jnp.zeros(2)}] * 3)
    np.testing.assert_allclose(decayed["p"], params["p"] * (1 - 1e-4) ** 3, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------- AdamW


def test_adamw_against_numpy_and_only_matrices_decay() -> None:
    optimizer = AdamW(schedule=Constant(value=1e-2), clip_by_global_norm=0.5)
    params, gradients = random_tree(0), [random_tree(seed) for seed in range(1, 5)]
    with jax.enable_x64(True):
        got, _ = run(optimizer, AXES, jax.tree.map(jnp.asarray, params), gradients)
    for name in params:
        p, m, v = params[name], 0.0, 0.0
        for k, gradient in enumerate(gradients, start=1):
            norm = np.sqrt(sum(np.sum(g**2) for g in gradient.values()))
            g = gradient[name] * min(1.0, 0.5 / norm)
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
            decay = 0.0 if name == "scale" else 0.1
            p = p - 1e-2 * (m / (1 - 0.9**k) / (np.sqrt(v / (1 - 0.95**k)) + 1e-8) + decay * p)
        np.testing.assert_allclose(got[name], p, rtol=1e-9, err_msg=name)


# ------------------------------------------------------------------------------------------------- schedules


def test_palm_schedule_and_weight_decay() -> None:
    """PaLM section 5: 1e-2 for 10,000 steps, then 1/sqrt(k); weight decay is the rate squared."""
    with jax.enable_x64(True):
        rate = {k: float(Adafactor().learning_rate(k - 1)) for k in (1, 5000, 10_000, 50_000, 115_000, 255_000)}
    assert [rate[1], rate[5000], rate[10_000]] == [1e-2] * 3
    assert rate[50_000] == pytest.approx(4.4721e-3, abs=5e-8)
    assert rate[115_000] == pytest.approx(2.9488e-3, abs=5e-8)
    assert rate[255_000] == pytest.approx(1.98030e-3, abs=5e-9)
    assert rate[255_000] ** 2 == pytest.approx(3.9216e-6, abs=5e-11)
    for k, value in rate.items():
        assert value == pytest.approx(min(1e-2, k**-0.5), rel=1e-12)


def test_inverse_square_root_is_continuous_at_any_peak() -> None:
    schedule = InverseSquareRoot(peak=3e-3, constant_steps=100).build()
    assert float(schedule(99)) == pytest.approx(3e-3)
    assert float(schedule(100)) == pytest.approx(3e-3 * np.sqrt(100 / 101))
    assert float(schedule(399)) == pytest.approx(1.5e-3)


def test_warmup_cosine() -> None:
    schedule = WarmupCosine(peak=6e-4, warmup_steps=10, decay_steps=110, final_fraction=0.1).build()
    assert float(schedule(0)) == pytest.approx(6e-5)
    assert float(schedule(4)) == pytest.approx(3e-4)
    assert float(schedule(9)) == pytest.approx(6e-4)
    assert float(schedule(59)) == pytest.approx(6e-4 * 0.55)  # half way down: the mean of 1 and 0.1
    assert float(schedule(109)) == pytest.approx(6e-5)
    assert float(schedule(10**6)) == pytest.approx(6e-5)
    assert float(WarmupCosine(peak=1.0, warmup_steps=0, decay_steps=4, final_fraction=0.0).build()(3)) == 0.0


def test_schedules_are_traceable_float32() -> None:
    for part in (InverseSquareRoot(), WarmupCosine(peak=1e-3, warmup_steps=5, decay_steps=50), Constant(value=5e-5)):
        rate = jax.jit(AdamW(schedule=part).learning_rate)(jnp.int32(7))
        assert rate.dtype == jnp.float32 and rate.shape == ()
        assert float(rate) == pytest.approx(float(part.build()(7)), rel=1e-6)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: WarmupCosine(peak=1e-3, warmup_steps=100, decay_steps=100), "decay_steps"),
        (lambda: InverseSquareRoot(constant_steps=0), "constant_steps"),
        (lambda: Constant(value=0.0), "value"),
        (lambda: Adafactor(beta1=1.0), "beta1"),
        (lambda: Adafactor(clip_by_global_norm=0.0), "clip_by_global_norm"),
        (lambda: AdamW(schedule=Constant(value=1e-3), weight_decay=-0.1), "weight_decay"),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_name(make: Any, field: str) -> None:
    with pytest.raises(ConfigError, match=rf"\.{field} = "):
        make()


# ------------------------------------------------------------------------------------------- norms and dtypes


def test_global_norm_and_its_clip() -> None:
    tree = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]], jnp.bfloat16)}
    assert float(global_norm(tree)) == 5.0
    clipped = clip_by_global_norm(tree, 1.0)
    assert float(global_norm(clipped)) == pytest.approx(1.0, rel=1e-2)
    assert clipped["b"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(clip_by_global_norm(tree, 5.5)["a"], tree["a"])
    np.testing.assert_array_equal(clip_by_global_norm({"a": jnp.zeros(2)}, 1.0)["a"], jnp.zeros(2))
    assert clip_by_global_norm(tree, None) is tree
    assert np.isnan(clip_by_global_norm({"a": jnp.array([1.0, jnp.nan])}, 1.0)["a"]).all()


OPTIMIZERS = [
    Adafactor(clip_threshold=1.0),
    AdamW(schedule=WarmupCosine(peak=1e-3, warmup_steps=2, decay_steps=20)),
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__)
def test_no_dtype_of_the_state_ever_changes(optimizer: OptimizerPart) -> None:
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), random_tree(0))
    before = optimizer.build(AXES).init(params)
    _, after = run(optimizer, AXES, params, [params] * 3)
    kind = lambda tree: jax.tree.map(lambda x: (x.dtype, x.shape, x.weak_type), tree)  # noqa: E731
    assert kind(before) == kind(after)
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype("int32"), jnp.dtype("float32")}
    steps = [leaf for leaf in jax.tree.leaves(after) if leaf.dtype == jnp.int32]
    assert steps and all(int(step) == 3 for step in steps)


def test_moments_of_bfloat16_parameters_are_float32() -> None:
    params = {"p": jnp.ones((4, 4), jnp.bfloat16)}
    got, state = run(Adafactor(), {"p": ("embed", "mlp")}, params, [params])
    assert got["p"].dtype == jnp.bfloat16
    assert state.m["p"].dtype == state.v["p"].dtype == jnp.float32


# ------------------------------------------------------------------------------------------------------ mesh


@pytest.mark.multidevice
def test_moments_take_the_parameters_shardings() -> None:
    """On an explicit 2 x 2 x 2 mesh: the state's shardings are the parameters', the numbers those of one device."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 3)
    specs = {
        "kernel": PartitionSpec(None, "fsdp", "tensor"),
        "scale": PartitionSpec(None, "fsdp"),
        "embedding": PartitionSpec("tensor", "fsdp"),
    }
    trees = [jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), random_tree(seed)) for seed in range(4)]
    for optimizer in OPTIMIZERS:
        alone, _ = run(optimizer, AXES, trees[0], trees[1:])
        with jax.set_mesh(mesh):
            params, *gradients = (jax.tree.map(jax.device_put, tree, specs) for tree in trees)
            for state in (
                jax.jit(optimizer.build(AXES).init)(params),
                optimizer.build(AXES).init(params),
                run(optimizer, AXES, params, gradients)[1],
            ):
                moments = [state.m, state.v] if isinstance(optimizer, Adafactor) else [state[1].mu, state[1].nu]
                for moment in moments:
                    for name, leaf in moment.items():
                        assert jax.typeof(leaf).sharding == jax.typeof(params[name]).sharding, name
            together, _ = run(optimizer, AXES, params, gradients)
        for name in alone:
            np.testing.assert_allclose(together[name], alone[name], rtol=2e-6, atol=1e-7, err_msg=name)
