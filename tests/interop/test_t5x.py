"""T5X's checkpoints, made here by hand as its own code writes them, against palmjax's, and the way out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
import tokenizers
from flax import serialization, traverse_util
from tokenizers.models import WordLevel

from palmjax import checkpoint, cli, decode
from palmjax.config import SaveCheckpointConfig
from palmjax.data.vocabulary import Bytes
from palmjax.interop import convert
from palmjax.interop.mapping import leaves
from palmjax.interop.t5x import reading
from palmjax.optim import Adafactor
from palmjax.provenance import DataPosition, RunInfo
from palmjax.state import init_state
from tests.interop import models
from tests.models.builders import tiny_palm

CROSS = ("decoder", "layers_0", "encoder_decoder_attention", "query", "kernel")
LAYERS, WIDTH, HEADS, SIZE, HIDDEN, VOCAB = 3, 32, 4, 6, 48, models.VOCAB

Tree = dict[tuple[str, ...], np.ndarray]


def random(*shape: int, seed: int, scale: float = 0.3) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def decoder_only(tied: bool = True) -> Tree:
    """Parameters of T5X's decoder-only network (t5x/examples/decoder_only): flat kernels, `layers_N`."""
    tree: dict[str, np.ndarray] = {
        "decoder/token_embedder/embedding": random(VOCAB, WIDTH, seed=0, scale=1.0),
        "decoder/relpos_bias/rel_embedding": random(HEADS, 32, seed=1, scale=1.0),
        "decoder/decoder_norm/scale": 1 + random(WIDTH, seed=2),
    }
    if not tied:
        tree["decoder/logits_dense/kernel"] = random(WIDTH, VOCAB, seed=3)
    for layer in range(LAYERS):
        shapes = {
            "pre_self_attention_layer_norm/scale": (WIDTH,),
            "pre_mlp_layer_norm/scale": (WIDTH,),
            **{f"self_attention/{name}/kernel": (WIDTH, HEADS * SIZE) for name in ("query", "key", "value")},
            "self_attention/out/kernel": (HEADS * SIZE, WIDTH),
            "mlp/wi_0/kernel": (WIDTH, HIDDEN),
            "mlp/wi_1/kernel": (WIDTH, HIDDEN),
            "mlp/wo/kernel": (HIDDEN, WIDTH),
        }
        for number, (name, shape) in enumerate(shapes.items()):
            values = random(*shape, seed=100 * layer + number + 10, scale=0.15)
            tree[f"decoder/layers_{layer}/{name}"] = values + (len(shape) == 1)
    return {tuple(name.split("/")): value for name, value in tree.items()}


def t5_logits(tree: Tree, tokens: np.ndarray) -> np.ndarray:
    """float64 [B, T, V] of that network, written from its description in numpy."""
    p = {"/".join(name): value.astype(np.float64) for name, value in tree.items()}

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * p[name]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    length = tokens.shape[1]
    back = np.maximum(np.arange(length)[:, None] - np.arange(length), 0)
    large = 16 + (np.log(back / 16 + np.finfo(np.float32).eps) / np.log(128 / 16) * 16).astype(int)
    bias = p["decoder/relpos_bias/rel_embedding"][:, np.where(back < 16, back, np.minimum(large, 31))]
    mask = np.where(np.tril(np.ones((length, length))), 0.0, -1e10)
    x = p["decoder/token_embedder/embedding"][tokens]
    for layer in range(LAYERS):
        name = f"decoder/layers_{layer}"
        h = norm(x, f"{name}/pre_self_attention_layer_norm/scale")
        q, k, v = (
            (h @ p[f"{name}/self_attention/{n}/kernel"]).reshape(*h.shape[:2], HEADS, SIZE)
            for n in ("query", "key", "value")
        )
        scores = np.einsum("bqhd,bkhd->bhqk", q, k) + bias + mask
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        attended = np.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*h.shape[:2], -1)
        x = x + attended @ p[f"{name}/self_attention/out/kernel"]
        h = norm(x, f"{name}/pre_mlp_layer_norm/scale")
        gated = gelu(h @ p[f"{name}/mlp/wi_0/kernel"]) * (h @ p[f"{name}/mlp/wi_1/kernel"])
        x = x + gated @ p[f"{name}/mlp/wo/kernel"]
    x = norm(x, "decoder/decoder_norm/scale")
    if (head := "decoder/logits_dense/kernel") in p:
        return x @ p[head]
    return x @ p["decoder/token_embedder/embedding"].T / np.sqrt(WIDTH)


# --- T5X's writers, by hand ----------------------------------------------------------------------------------------


def write_legacy(folder: Path, target: Tree, states: Tree, step: int = 60, **spec: Any) -> Path:
    """As t5x/checkpoints.py leaves it: arrays of two dimensions in zarr chunks, the others inside the msgpack.

    spec: changes to the specs' metadata on disk, which need not be those that the msgpack repeats.
    """
    path = folder / f"checkpoint_{step}"
    path.mkdir(parents=True)

    def leaf(prefix: str, name: tuple[str, ...], array: np.ndarray) -> Any:
        if array.ndim < 2:
            return array
        relative = f"{prefix}.{'.'.join(name)}/"
        metadata = {
            "chunks": [-(-size // 2) for size in array.shape],
            "compressor": {"id": "gzip", "level": 1},
            "shape": list(array.shape),
        }
        dtype = array.dtype.name
        on_disk = {"driver": "file", "path": f"{path}/{relative}"}
        store = ts.open(
            {"driver": "zarr", "dtype": dtype, "kvstore": on_disk, "metadata": metadata | spec}, create=True
        ).result()
        store.write(array).result()
        return {
            "driver": "zarr",
            "dtype": dtype,
            "kvstore": {"driver": "gcs", "bucket": "t5x-dummy-bucket", "path": relative},
            "metadata": metadata,
        }

    def tree(prefix: str, arrays: Tree) -> Any:
        return traverse_util.unflatten_dict({name: leaf(prefix, name, array) for name, array in arrays.items()})

    state = {"step": np.int32(step), "param_states": tree("state.param_states", states)}
    content = {"version": 3, "optimizer": {"target": tree("target", target), "state": state}}
    (path / "checkpoint").write_bytes(serialization.msgpack_serialize(content))
    return path


def write_orbax(folder: Path, target: Tree, states: Tree, step: int = 60) -> Path:
    """As T5X's Orbax manager leaves it: `state/` with everything in it, and no `info`."""
    path = folder / f"checkpoint_{step}"
    tree = {"target": traverse_util.unflatten_dict(target), "state": {"step": np.float32(step)}}
    if states:
        tree["state"]["param_states"] = traverse_util.unflatten_dict(states)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
        orbax.save(path / "state", args=ocp.args.PyTreeSave(jax.tree.map(jnp.asarray, tree)))
    return path


def adafactor_states(target: Tree) -> Tree:
    """Factored for matrices, as T5X's Adafactor keeps them, with what it doesn't use as [1]."""
    states: Tree = {}
    for number, (name, array) in enumerate(target.items()):
        factored = array.ndim == 2
        shapes = {"v_row": array.shape[:1], "v_col": array.shape[1:], "v": (1,)} if factored else {"v": array.shape}
        for key in ("m", "v", "v_row", "v_col"):
            states[(*name, key)] = np.abs(random(*shapes.get(key, (1,)), seed=number))
    return states


# --- in ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("write", "dtype", "tied"),
    [
        (write_legacy, np.float32, True),
        (write_legacy, np.float32, False),
        (write_legacy, ml_dtypes.bfloat16, True),
        (write_orbax, np.float32, True),
    ],
    ids=["legacy", "legacy, untied", "legacy, bfloat16", "orbax"],
)
def test_a_decoder_only_checkpoint_gives_its_own_logits(tmp_path, write, dtype, tied):
    tree = {name: array.astype(dtype) for name, array in decoder_only(tied).items()}
    write(tmp_path / "run", tree, adafactor_states(tree))
    assert cli.main(["convert", str(tmp_path / "run"), str(tmp_path / "ours")]) == 0
    model, params = models.restored(tmp_path / "ours")
    assert checkpoint.read_info(tmp_path / "ours").step == 60
    tokens, real = models.ragged((40, 25, 3))
    found = jax.jit(lambda params, batch: model.logits(params, model.hidden(params, batch)))(
        params, models.batch(tokens, real)
    )
    assert models.relative(np.asarray(found)[real], t5_logits(tree, tokens)[real]) < 1e-5
    (one,) = decode.generate(model, params, [tokens[0].tolist()], 16, bos=None, stop=None)
    row = tokens[:1]
    for token in one.tokens:
        assert token == t5_logits(tree, row)[0, -1].argmax()
        row = np.append(row, [[token]], axis=1)


@pytest.mark.parametrize("write", [write_legacy, write_orbax])
def test_every_array_is_read_as_it_was_written(tmp_path, write):
    target = decoder_only()
    target[("decoder", "layers_0", "mlp", "wo", "kernel")] = random(HIDDEN, WIDTH, seed=9).astype(ml_dtypes.bfloat16)
    states = adafactor_states(target)
    found = reading.read(write(tmp_path, target, states))
    assert found.step == 60
    for arrays, wanted in ((found.target, target), (found.param_states, states)):
        assert arrays.keys() == wanted.keys()
        for name, array in wanted.items():
            assert (arrays[name].shape, arrays[name].dtype) == (array.shape, array.dtype.name), name
            np.testing.assert_array_equal(arrays[name].read(), array)


def test_chunks_and_compressors_are_those_of_the_files(tmp_path):
    """Of a run on another mesh: the msgpack's spec says one thing and .zarray another."""
    target = decoder_only()
    found = reading.read(write_legacy(tmp_path, target, {}, chunks=[5, 7], compressor={"id": "zstd", "level": 1}))
    files = list((tmp_path / "checkpoint_60" / "target.decoder.layers_0.mlp.wo.kernel").iterdir())
    assert len(files) > 20
    for name, array in target.items():
        np.testing.assert_array_equal(found.target[name].read(), array)


@pytest.mark.parametrize(
    "form",
    [{"scan_axis": 0}, {"scan_axis": 1}, {"scan_axis": 1, "flat": True}, {"scan_axis": None, "flat": True}],
    ids=["scanned over 0", "scanned over 1", "scanned over 1, flat", "unscanned, flat"],
)
def test_palm_shaped_trees_in_every_form(tmp_path, form):
    """Multi-query, parallel, SwiGLU: the tree of palmjax's own names, as a T5X user may have spelt it."""
    model = tiny_palm()
    params = leaves(jax.device_get(model.build().init(jax.random.key(0))))
    tree: Tree = {}
    for name, array in params.items():
        stacked = name[:2] == ("decoder", "layers")
        layers = list(array) if stacked else [array]
        if form.get("flat") and "self_attention" in name:
            rows = (-1, array.shape[-1]) if "out" in name else (array.shape[1], -1)
            layers = [layer.reshape(rows) for layer in layers]
        if not stacked:
            tree[name] = layers[0]
        elif form["scan_axis"] is None:
            tree |= {("decoder", f"layers_{i}", *name[2:]): layer for i, layer in enumerate(layers)}
        else:
            tree[name] = np.stack(layers, axis=form["scan_axis"])
    write_legacy(tmp_path / "run", tree, {})
    convert.from_t5x(tmp_path / "run", tmp_path / "ours")
    ours, found = models.restored(tmp_path / "ours")
    assert ours.config.block == model.block
    for name, array in leaves(found).items():
        np.testing.assert_array_equal(np.asarray(array), params[name], err_msg="/".join(name))


def test_a_gin_file_tells_what_the_shapes_do_not(tmp_path, capfd):
    tree = {name: array for name, array in decoder_only().items() if "relpos_bias" not in name}
    write_legacy(tmp_path / "run", tree, {})
    assert cli.main(["convert", str(tmp_path / "run"), str(tmp_path / "ours")]) == 2
    error = capfd.readouterr().err
    assert "how many heads" in error and "MODEL.gin" in error and not (tmp_path / "ours").exists()
    gin = tmp_path / "model.gin"
    gin.write_text(
        f"MODEL = @Decoder()\nDecoder.vocab_size = {VOCAB}\nDecoder.num_layers = {LAYERS}\nDecoder.d_model = {WIDTH}\n"
        "Decoder.block = @SerialBlock()\nDecoder.final_norm = @RMSNorm()\nSerialBlock.norm = @RMSNorm()\n"
        f"SerialBlock.attention = @Attention()\nAttention.num_heads = {HEADS}\nAttention.num_kv_heads = {HEADS}\n"
        f"Attention.head_dim = {SIZE}\nSerialBlock.mlp = @GEGLU()\nGEGLU.d_ff = {HIDDEN}\n"
    )
    assert cli.main(["convert", str(tmp_path / "run"), str(tmp_path / "ours"), str(gin)]) == 0
    model, _ = models.restored(tmp_path / "ours")
    assert model.config.attention.head_dim == SIZE
    gin.write_text(gin.read_text().replace(f"d_ff = {HIDDEN}", "d_ff = 40"))
    capfd.readouterr()
    assert cli.main(["convert", str(tmp_path / "run"), str(tmp_path / "other"), str(gin)]) == 2
    error = capfd.readouterr().err
    assert "[32, 48]" in error and "[32, 40]" in error and "wi_0" in error


MISTAKES: dict[str, tuple[Any, list[str]]] = {
    "an encoder": (
        lambda path: write_legacy(path.parent, decoder_only() | {CROSS: np.zeros((8, 8))}, {}, step=70),
        ["checkpoint_70", "/".join(CROSS), "palmjax has decoders only"],
    ),
    "a missing array": (
        lambda path: shutil.rmtree(path / "target.decoder.layers_1.mlp.wo.kernel"),
        ["target.decoder.layers_1.mlp.wo.kernel", "can't be opened"],
    ),
    "a damaged msgpack": (
        lambda path: (path / "checkpoint").write_bytes((path / "checkpoint").read_bytes()[:200]),
        ["checkpoint_60/checkpoint", "damaged"],
    ),
    "an older version": (
        lambda path: (path / "checkpoint").write_bytes(
            serialization.msgpack_serialize(
                serialization.msgpack_restore((path / "checkpoint").read_bytes()) | {"version": 2}
            )
        ),
        ["version 2", "uint16"],
    ),
    "TensorFlow's": (
        lambda path: (path / "checkpoint").write_bytes(b'model_checkpoint_path: "model.ckpt-1"'),
        ["TensorFlow"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_read_is_refused_and_nothing_is_left(tmp_path, capfd, mistake):
    change, words = MISTAKES[mistake]
    change(write_legacy(tmp_path / "run", decoder_only(), {}))
    assert cli.main(["convert", str(tmp_path / "run"), str(tmp_path / "ours")]) == 2
    error = capfd.readouterr().err
    assert all(word in error for word in words) and "Traceback" not in error, error
    assert not (tmp_path / "ours").exists()


def test_a_vocabulary_is_given_beside_the_checkpoint(tmp_path, capfd):
    write_legacy(tmp_path / "run", decoder_only(), {})
    arguments = ["convert", str(tmp_path / "run"), str(tmp_path / "ours"), "--vocabulary"]
    for missing in ("none.model", "none.json"):
        assert cli.main([*arguments, str(tmp_path / missing)]) == 2
        assert missing in capfd.readouterr().err and not (tmp_path / "ours").exists()
    tokenizer = tokenizers.Tokenizer(WordLevel({"a": 0, "end": 1}, unk_token="a"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "end"}}')
    assert cli.main([*arguments, str(tmp_path / "tokenizer.json")]) == 0
    vocabulary = checkpoint.read_info(tmp_path / "ours").vocabulary
    assert (vocabulary.encode("a"), vocabulary.eos_id) == ([0], 1)
    assert (tmp_path / "ours" / convert.BESIDE / "tokenizer.json").exists()


# --- out -----------------------------------------------------------------------------------------------------------


def read_by_hand(path: Path) -> tuple[Tree, Tree, int]:
    """A legacy checkpoint as T5X reads it: specs opened without their chunks and compressor."""
    state: Any = serialization.msgpack_restore((path / "checkpoint").read_bytes())
    assert state["version"] == 3 and set(state) == {"version", "optimizer"}

    def array(leaf: Any) -> np.ndarray:
        if not isinstance(leaf, dict):
            return leaf
        spec = ts.Spec(leaf).to_json()
        del spec["metadata"]["chunks"], spec["metadata"]["compressor"]
        spec["kvstore"]["path"] = f"{path}/{spec['kvstore']['path']}"
        return ts.open(spec, open=True).result().read().result()

    def tree(value: Any) -> Tree:
        flat = traverse_util.flatten_dict(value, is_leaf=lambda _, leaf: "driver" in leaf)
        return {name: array(leaf) for name, leaf in flat.items()}

    optimizer = state["optimizer"]
    return tree(optimizer["target"]), tree(optimizer["state"]["param_states"]), int(optimizer["state"]["step"])


def test_a_decoder_only_checkpoint_goes_back_under_its_own_names(tmp_path):
    tree = decoder_only(tied=False)
    write_legacy(tmp_path / "run", tree, {})
    convert.from_t5x(tmp_path / "run", tmp_path / "ours")
    assert cli.main(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "t5x"]) == 0
    found, states, step = read_by_hand(tmp_path / "back" / "checkpoint_60")
    assert step == 60 and found.keys() == tree.keys() and not states
    for name, array in tree.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], array, err_msg="/".join(name))
    again = reading.read(tmp_path / "back" / "checkpoint_60")
    assert again.target.keys() == tree.keys()


def trained(folder: Path) -> Any:
    """A palmjax run's checkpoint of step 7 with Adafactor's moments, and its state."""
    config = tiny_palm(vocab_multiple=64)
    optimizer = Adafactor().build(config.build().axes)
    state = init_state(config.build().init(jax.random.key(1)), optimizer, jax.random.key(2))
    moments = jax.tree.map(lambda p: jnp.abs(p) + 0.5, state.params)
    state = state.replace(step=jnp.int32(7), opt_state=state.opt_state._replace(m=state.params, v=moments))
    from palmjax.interop import experiment

    text = experiment.finetuning(origin="a test", folder="runs/x", vocabulary=None, length=32, step=7)
    run = convert._run_file(text, config, (), ())
    mesh: dict[str, int] = {"data": 1}
    info = RunInfo(
        seed=0,
        data=DataPosition(first_row=0),
        config=run.operative,
        flat_config={},
        vocabulary=Bytes(),
        mesh=mesh,
        code={},
        libraries={},
    )
    with checkpoint.Checkpointer(str(folder), SaveCheckpointConfig()) as saver:
        saver.save(7, state, info)
    return config, state


def test_a_run_goes_out_with_adafactors_moments(tmp_path):
    config, state = trained(tmp_path / "ours")
    convert.to_t5x(str(tmp_path / "ours"), tmp_path / "out")
    target, states, step = read_by_hand(tmp_path / "out" / "checkpoint_7")
    assert step == 7
    for name, array in leaves(jax.device_get(state.params)).items():
        wanted = array[: config.vocab_size] if "embedding" in name else array
        np.testing.assert_array_equal(target[name], wanted)
        assert {key for *path, key in states if tuple(path) == name} == {"m", "v", "v_row", "v_col"}
        np.testing.assert_array_equal(states[(*name, "m")], wanted)
        np.testing.assert_array_equal(states[(*name, "v")], np.abs(wanted) + 0.5)
        assert states[(*name, "v_row")].shape == (1,)
    half = convert.to_t5x(str(tmp_path / "ours"), tmp_path / "half", dtype="bfloat16")
    found, states, _ = read_by_hand(Path(half))
    assert {array.dtype.name for array in found.values()} == {"bfloat16"}, "the parameters only"
    assert {array.dtype.name for array in states.values()} == {"float32"}


def test_a_checkpoint_of_t5x_is_not_written_twice(tmp_path, capfd):
    trained(tmp_path / "ours")
    arguments = ["convert", str(tmp_path / "ours"), str(tmp_path / "out"), "--to", "t5x"]
    assert cli.main(arguments) == 0
    assert json.loads(json.dumps(sorted(path.name for path in (tmp_path / "out").iterdir()))) == ["checkpoint_7"]
    assert cli.main(arguments) == 2
    assert "exists already" in capfd.readouterr().err
