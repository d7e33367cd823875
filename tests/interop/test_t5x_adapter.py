"""palmjax's decoder under T5X's model interface.

t5x itself is on no package index and can't be installed here, so `DecoderOnlyModel` below stands in for it: what
t5x/models.py and t5x/decoding.py ask of a module, call by call. The checkpoint in between is in T5X's format.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import core, traverse_util
from flax.linen import partitioning

from palmjax import decode
from palmjax.interop import convert
from palmjax.interop.experiment import model_bindings
from palmjax.interop.t5x.adapter import PalmjaxDecoder
from palmjax.models.attention import Attention
from palmjax.models.decoder import Decoder, SerialBlock
from palmjax.models.embeddings import Embedding, LearnedPositions
from palmjax.models.layers import MLP
from palmjax.models.positions import NoPositions
from tests.interop import models
from tests.interop.test_t5x import write_legacy
from tests.models.builders import tiny_palm

LENGTH = 24


class DecoderOnlyModel:
    """How T5X's model of that name uses its module: variables, logits of a batch, a cache, one token after another."""

    def __init__(self, module: Any, prefix: bool = False):
        self.module, self.prefix = module, prefix

    def get_initial_variables(self, rng: Any, shape: tuple[int, int]) -> Any:
        ones = jnp.ones(shape, jnp.int32)
        return core.freeze(self.module.init(rng, ones, ones, enable_dropout=False))

    def logits(self, params: Any, batch: dict[str, Any], dropout_rng: Any = None, mutable: Any = False) -> Any:
        rngs = None if dropout_rng is None else {"dropout": dropout_rng}
        return self.module.apply(
            {"params": params},
            batch["decoder_input_tokens"],
            batch["decoder_target_tokens"],
            decoder_segment_ids=batch.get("decoder_segment_ids"),
            decoder_positions=batch.get("decoder_positions"),
            decoder_causal_attention=batch["decoder_causal_attention"] if self.prefix else None,
            rngs=rngs,
            decode=False,
            enable_dropout=rngs is not None,
            mutable=mutable,
        )

    def loss(self, params: Any, batch: dict[str, Any], dropout_rng: Any = None) -> Any:
        logits = self.logits(params, batch, dropout_rng)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["decoder_target_tokens"])
        weights = batch["decoder_loss_weights"]
        return (losses * weights).sum() / weights.sum()

    def predict(self, params: Any, inputs: Any, causal_attention: Any, decodes: int = 1) -> np.ndarray:
        """Greedy continuations: `inputs` begin with BOS 0 and are 0 behind the prompt. Rows repeat `decodes` times."""
        lengths = jnp.sum(inputs[:, 1:] != 0, axis=-1)
        ones = jnp.ones_like(inputs)
        _, made = self.module.apply(
            {"params": params}, ones, ones, enable_dropout=False, decode=True, mutable=["cache"]
        )
        _, filled = self.module.apply(
            {"params": params, "cache": made["cache"]},
            decoder_input_tokens=inputs,
            decoder_target_tokens=causal_attention,
            decoder_causal_attention=None,
            mutable=["cache"],
            enable_dropout=False,
            prefill=True,
            prefill_lengths=lengths,
        )
        # T5X's decoding repeats what has rows, on the axis that `scan_layers` means, the index of the cache too.
        axis = 1 if getattr(self.module, "scan_layers", False) else 0
        cache = jax.tree.map(lambda x: jnp.repeat(x, decodes, axis=axis), core.unfreeze(filled["cache"]))
        lengths, row = jnp.repeat(lengths, decodes), np.repeat(np.asarray(inputs), decodes, axis=0)
        step = jax.jit(
            lambda cache, token: self.module.apply(
                {"params": params, "cache": cache},
                token,
                token,
                enable_dropout=False,
                decode=True,
                max_decode_length=inputs.shape[1],
                mutable=["cache"],
            )
        )
        index = np.asarray(lengths)
        for _ in range(inputs.shape[1] - 1 - int(index.max())):
            token = row[np.arange(len(row)), index][:, None]
            logits, changed = step(cache, jnp.asarray(token))
            cache, index = changed["cache"], index + 1
            row[np.arange(len(row)), index] = np.asarray(jnp.squeeze(logits, axis=1).argmax(-1))
        return row


def gpt() -> Decoder:
    attention = Attention(
        num_heads=4, num_kv_heads=4, head_dim=8, positions=NoPositions(), qkv_bias=True, out_bias=True
    )
    return Decoder(
        vocab_size=96,
        num_layers=2,
        d_model=32,
        block=SerialBlock(attention=attention, mlp=MLP(d_ff=64, bias=True)),
        embedding=Embedding(positions=LearnedPositions(length=64)),
        dtype="float32",
    )


def batch(rows: int = 4, packed: bool = True) -> dict[str, np.ndarray]:
    """What seqio's DecoderFeatureConverter makes: two documents a row and padding at its end."""
    rng = np.random.default_rng(0)
    targets = rng.integers(3, 96, (rows, LENGTH), dtype=np.int32)
    segments = np.broadcast_to(np.repeat([1, 2, 0], [10, 11, 3]).astype(np.int32), targets.shape)
    positions = np.broadcast_to(
        np.concatenate([np.arange(10), np.arange(11), np.zeros(3)]).astype(np.int32), segments.shape
    )
    targets = targets * (segments > 0)
    inputs = np.roll(targets, 1, axis=1) * (positions > 0)
    out = {
        "decoder_input_tokens": inputs,
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (segments > 0).astype(np.int32),
        "decoder_causal_attention": ((segments == 1) & (positions < 5)).astype(np.int32),
    }
    return out | ({"decoder_segment_ids": segments, "decoder_positions": positions} if packed else {})


@pytest.mark.parametrize("config", [tiny_palm(), gpt()], ids=["palm", "gpt"])
def test_it_learns_under_t5xs_interface_and_its_checkpoint_is_read_here(tmp_path, config):
    model, rows = DecoderOnlyModel(PalmjaxDecoder(config)), batch()
    params = model.get_initial_variables(jax.random.key(0), (4, LENGTH))["params"]
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        loss, gradients = jax.value_and_grad(model.loss)(params, rows)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = optimizer.init(params), []
    for _ in range(30):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]

    target: Any = traverse_util.flatten_dict(core.unfreeze(jax.device_get(params)))
    gin = tmp_path / "model.gin"
    gin.write_text(model_bindings(config))
    write_legacy(tmp_path / "run", target, {}, step=30)
    convert.from_t5x(tmp_path / "run", tmp_path / "ours", [str(gin)])
    ours, restored = models.restored(tmp_path / "ours")
    found = ours.logits(
        restored, ours.hidden(restored, models.batch(rows["decoder_input_tokens"], np.ones((4, 24), bool)))
    )
    plain = {key: value for key, value in rows.items() if "segment" not in key and "positions" not in key}
    wanted = model.logits(params, plain | {"decoder_target_tokens": np.ones((4, LENGTH), np.int32)})
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)


def test_packing_keeps_documents_apart_and_a_prefix_is_seen_by_all():
    model, rows = DecoderOnlyModel(PalmjaxDecoder(tiny_palm())), batch()
    params = model.get_initial_variables(jax.random.key(0), (4, LENGTH))["params"]
    whole = model.logits(params, rows)
    alone = {name: value[:, 10:21] for name, value in rows.items()}
    np.testing.assert_allclose(whole[:, 10:21], model.logits(params, alone), rtol=2e-5, atol=2e-5)
    seen = DecoderOnlyModel(PalmjaxDecoder(tiny_palm()), prefix=True).logits(params, rows)
    assert np.abs(seen[:, 0] - whole[:, 0]).max() > 1e-2, "the first token now sees the whole prefix"
    np.testing.assert_allclose(seen[:, 10:21], whole[:, 10:21], rtol=2e-5, atol=2e-5)
    logits, collections = model.logits(params, rows, mutable=["intermediates"])
    np.testing.assert_array_equal(logits, whole)
    assert collections == {}


def test_dropout_only_with_a_key():
    model, rows = DecoderOnlyModel(PalmjaxDecoder(tiny_palm(dropout=0.3))), batch()
    params = model.get_initial_variables(jax.random.key(0), (4, LENGTH))["params"]
    plain, dropped = model.loss(params, rows), model.loss(params, rows, jax.random.key(1))
    assert plain == model.loss(params, rows) and plain != dropped != model.loss(params, rows, jax.random.key(2))


@pytest.mark.parametrize("config", [tiny_palm(), gpt()], ids=["palm", "gpt"])
def test_prefill_and_decoding_are_palmjaxs(config):
    model = DecoderOnlyModel(PalmjaxDecoder(config))
    params = core.unfreeze(model.get_initial_variables(jax.random.key(3), (3, LENGTH))["params"])
    prompts = [[5, 9, 40], [7], [11, 12, 13, 14, 15]]
    inputs = np.zeros((3, LENGTH), np.int32)
    for row, prompt in enumerate(prompts):
        inputs[row, 1 : 1 + len(prompt)] = prompt
    causal = (np.arange(LENGTH) <= [[len(prompt)] for prompt in prompts]).astype(np.int32)
    found = model.predict(params, jnp.asarray(inputs), jnp.asarray(causal), decodes=2)
    wanted = decode.generate(config.build(), params, prompts, LENGTH - 6, stop=None)
    for row, (prompt, one) in enumerate(zip(prompts, wanted, strict=True)):
        first, second = (found[2 * row + i, 1 + len(prompt) :][: LENGTH - 6].tolist() for i in range(2))
        assert first == second == one.tokens.tolist()


def test_axes_are_in_names_that_t5xs_rules_know():
    """Those of `standard_logical_axis_rules` and of Adafactor's `standard_logical_factor_rules`."""
    known = {"vocab", "embed", "mlp", "heads", "kv", "relpos_buckets", "layers", "stack"}
    for config in (tiny_palm(), gpt()):
        variables = PalmjaxDecoder(config).init(jax.random.key(0))
        names = partitioning.get_axis_names(variables["params_axes"])
        flat: Any = traverse_util.flatten_dict(core.unfreeze(names), sep="/")
        params: Any = traverse_util.flatten_dict(variables["params"], sep="/")
        assert flat.keys() == params.keys()
        for name, axes in flat.items():
            assert len(axes) == params[name].ndim and set(axes) <= known, name
            if params[name].ndim > 2 and "layers" in name:
                assert axes[0] == "layers" and ("embed" in axes or name.endswith("bias"))
