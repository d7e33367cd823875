"""Continuing prompts: prefill, then one token at a time in place in the key/value cache. `palmjax generate`.

Every row is its own request: it stops at its own EOS, and its random numbers depend on (seed, request, position) only,
so what it gets does not depend on which other prompts share its batch.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from palmjax import sharding
from palmjax.config import ConfigError, ShardingRules
from palmjax.data.vocabulary import Vocabulary
from palmjax.loss import token_losses
from palmjax.models.api import Cache, LanguageModel
from palmjax.sampling import Choose, Greedy, SamplingPart, Temperature

SMALLEST_BUCKET = 16


@dataclasses.dataclass(frozen=True)
class Continuation:
    """What followed a prompt. tokens: int32 [n], the stop token included if it came. finished: whether it came.

    log_probs: float32 [n], log p(token | all before it) of the model itself, before temperature and cuts (nats).
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    finished: bool


def generate(
    model: LanguageModel,
    params: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: SamplingPart | None = None,
    seed: int = 0,
    requests: Sequence[int] | None = None,
    bos: int | None = 0,
    stop: int | None = 1,
    as_prefix: bool = False,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
) -> list[Continuation]:
    """Continues each prompt by at most `max_new_tokens` tokens, all prompts in one batch.

    prompts: token ids without BOS, never cut. bos: the id put before each, so that an empty prompt is BOS alone; None
    for none, as other stacks prompt some models. sampling: Greedy() by default.
    seed, requests: row i draws from the key of (seed, requests[i], position); requests are 0, 1, ... by default. So the
    continuation of a prompt with its first tokens of continuation is the rest of the same continuation.
    stop: the id that ends a row (EOS), or None. as_prefix: prompts are read as the inputs of a prefix language model,
    each of whose tokens sees all of them. mesh, rules: where `params` lie; None for one device. All processes of
    a job call it together with equal arguments.

    Rows, prompt length and new tokens are each rounded up to a power of two, so that few programs are compiled.
    Raises ConfigError for no prompts, ids outside the vocabulary, a row longer than the positions that the model has,
    a `max_new_tokens` below one, or a seed that is negative or longer than 32 bits.
    """
    prompts = [[*([] if bos is None else [bos]), *prompt] for prompt in prompts]
    _check(model, prompts, max_new_tokens, seed)
    sampling, rules = sampling or Greedy(), rules or ShardingRules()
    rows = _padded_rows(len(prompts), mesh, rules)
    tokens = np.zeros((rows, _bucket(max(map(len, prompts)))), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths, ids = np.ones(rows, np.int32), np.zeros(rows, np.int32)
    lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
    ids[: len(prompts)] = np.arange(len(prompts)) if requests is None else requests
    # Rows that only fill the batch up are done before they begin.
    done = np.arange(rows) >= len(prompts)
    with contextlib.nullcontext() if mesh is None else sharding.activate(mesh, rules):
        result = _decode(
            params,
            _place(tokens, mesh, rules),
            *(_place(values, mesh, rules) for values in (lengths, ids, done)),
            np.asarray(jax.random.key_data(jax.random.key(seed))),
            np.int32(-1 if stop is None else stop),
            np.int32(max_new_tokens),
            model=model,
            sampling=sampling,
            rules=rules,
            new_length=_bucket(max_new_tokens),
            as_prefix=as_prefix,
        )
    out, log_probs, count = jax.device_get(result)
    return [_cut(out[row, :count], log_probs[row, :count], stop) for row in range(len(prompts))]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """The carry of the loop over tokens: B rows, `count` tokens chosen; the last of them is not in the cache yet."""

    cache: Cache
    tokens: jax.Array  # int32 [B, new_length]
    log_probs: jax.Array  # float32 [B, new_length]
    done: jax.Array  # bool [B]
    count: jax.Array  # int32 []


@functools.partial(jax.jit, static_argnames=("model", "sampling", "rules", "new_length", "as_prefix"))
def _decode(
    params: Any,
    prompts: jax.Array,
    lengths: jax.Array,
    requests: jax.Array,
    done: jax.Array,
    key: jax.Array,
    stop: jax.Array,
    limit: jax.Array,
    *,
    model: LanguageModel,
    sampling: SamplingPart,
    rules: ShardingRules,
    new_length: int,
    as_prefix: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens and log-probabilities [B, new_length], and how many columns are filled. prompts: int32 [B, T], BOS first.

    rules: the active ones, named so that a program is not used under others.
    """
    rows, length = prompts.shape
    params = model.in_compute_dtype(params)
    choose = functools.partial(_choose, sampling.build(), key, requests)

    def record(logits: jax.Array, cache: Cache, state: _State) -> _State:
        token = choose(cache["length"], logits)
        log_probs = -token_losses(logits[:, None], token[:, None])[0]
        return _State(
            cache=cache,
            tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.count, axis=1),
            log_probs=jax.lax.dynamic_update_slice_in_dim(state.log_probs, log_probs, state.count, axis=1),
            done=state.done | (token == stop),
            count=state.count + 1,
        )

    def step(state: _State) -> _State:
        last = jax.lax.dynamic_slice_in_dim(state.tokens, state.count - 1, 1, axis=1)[:, 0]
        return record(*model.extend(params, last, state.cache), state)

    # The prompt is read against a cache of its own length, and only then given room for what follows.
    logits, cache = model.prefill(params, prompts, lengths, model.init_cache(rows, length), as_prefix=as_prefix)
    empty = functools.partial(
        jnp.zeros, (rows, new_length), out_sharding=sharding.out_spec(("batch", None), (rows, new_length))
    )
    begin = _State(cache, empty(jnp.int32), empty(jnp.float32), done, jnp.int32(0))
    state = record(logits, _grown(cache, length + new_length), begin)
    state = jax.lax.while_loop(lambda state: (state.count < limit) & ~jnp.all(state.done), step, state)
    chosen, log_probs = (sharding.constrain(x, (None, None)) for x in (state.tokens, state.log_probs))
    return chosen, log_probs, state.count


def _choose(
    pick: Choose,
    key: jax.Array,
    requests: jax.Array,
    positions: jax.Array,
    logits: jax.Array,
) -> jax.Array:
    """The next token of each row, int32 [B], chosen where the row lies, with the key of (request, position)."""

    def rows(positions: jax.Array, requests: jax.Array, logits: jax.Array, key: jax.Array) -> jax.Array:
        def one(position: jax.Array, request: jax.Array, logits: jax.Array) -> jax.Array:
            return pick(
                logits, jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(key), request), position)
            )

        return jax.vmap(one)(positions, requests, logits)

    inputs = (("batch",), ("batch",), ("batch", None), (None,))
    return sharding.local(rows, inputs, ("batch",), positions, requests, logits, key)


def _grown(cache: Cache, length: int) -> Cache:
    """The cache with room for `length` tokens a row."""

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0), (0, 0)))

    return {"key": pad(cache["key"]), "value": pad(cache["value"]), "length": cache["length"]}


def _check(model: LanguageModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, seed: int) -> None:
    if not prompts:
        raise ConfigError("no prompts to continue")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens = {max_new_tokens}: must be at least 1")
    if not 0 <= seed < 1 << 32:  # jax.random.key would drop the higher bits
        raise ConfigError(f"seed = {seed}: must be from 0 to {(1 << 32) - 1}")
    if not model.config.attention.causal:
        raise ConfigError("Attention.causal = False: an encoder has no next token to continue a prompt with")
    vocab_size = model.config.vocab_size
    for row, prompt in enumerate(prompts):
        for token in prompt:
            if not 0 <= token < vocab_size:
                raise ConfigError(f"prompt {row} has token {token}; the model's ids are 0 to {vocab_size - 1}")
        if not prompt:
            raise ConfigError(f"prompt {row} is empty, and no BOS is put before it")
        # The last new token is never read.
        if (longest := model.config.max_length) is not None and len(prompt) + max_new_tokens - 1 > longest:
            raise ConfigError(
                f"prompt {row} has {len(prompt)} tokens; with max_new_tokens = {max_new_tokens} it passes the "
                f"{longest} positions that the model has"
            )


def _bucket(size: int) -> int:
    """The next power of two, at least SMALLEST_BUCKET."""
    return max(SMALLEST_BUCKET, 1 << (size - 1).bit_length())


def _padded_rows(prompts: int, mesh: Mesh | None, rules: ShardingRules) -> int:
    """The next power of two that the mesh axes of a batch divide, or else their next multiple."""
    ways = 1 if mesh is None else math.prod(mesh.shape.get(axis, 1) for axis in rules.batch)
    return -(-(1 << (prompts - 1).bit_length()) // ways) * ways


def _place(values: np.ndarray, mesh: Mesh | None, rules: ShardingRules) -> Any:
    """`values` [B, ...] over the devices by rows, the same on every process."""
    if mesh is None:
        return values
    axes: sharding.Axes = ("batch", *[None] * (values.ndim - 1))
    placed = sharding.named(mesh, rules, axes, values.shape, "prompts")
    return jax.make_array_from_callback(values.shape, placed, values.__getitem__)


def _cut(tokens: np.ndarray, log_probs: np.ndarray, stop: int | None) -> Continuation:
    """A row up to its first stop token, which it keeps."""
    ends = np.flatnonzero(tokens == stop) if stop is not None else np.zeros(0, int)
    count = int(ends[0]) + 1 if ends.size else len(tokens)
    return Continuation(tokens=tokens[:count], log_probs=log_probs[:count], finished=bool(ends.size))


# --- text ----------------------------------------------------------------------------------------------------------


def continuation_text(vocabulary: Vocabulary, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of `tokens` behind `prompt`. A piece's space, or half a character, needs what precedes it."""
    before, whole = vocabulary.decode(prompt), vocabulary.decode([*prompt, *tokens])
    return whole[len(before) :] if whole.startswith(before) else vocabulary.decode(tokens)


def _encode(vocabulary: Vocabulary, text: str) -> list[int]:
    try:
        return vocabulary.encode(text)
    except UnicodeEncodeError as error:
        raise ConfigError(f"the prompt {text[:40]!a} is not UTF-8 text") from error


def _read_prompts(options: argparse.Namespace) -> list[str]:
    """The prompts of the command line, then those of files, one a file, as they are."""
    prompts: list[str] = list(options.prompt or ())
    for name in options.prompt_file or ():
        try:
            if name == "-":
                prompts.append(sys.stdin.read())
            else:
                with open(name, encoding="utf-8", newline="") as file:
                    prompts.append(file.read())
        except OSError as error:
            raise ConfigError(f"--prompt_file={name} can't be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"--prompt_file={name} is not UTF-8 text: {error}") from error
    if not prompts:
        raise ConfigError("no prompt: give --prompt TEXT or --prompt_file FILE, each as often as you like")
    return prompts


def _sampling(options: argparse.Namespace) -> SamplingPart:
    if options.temperature:
        return Temperature(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    if options.top_k is not None or options.top_p is not None:
        raise ConfigError("--top_k and --top_p cut what is drawn from: add --temperature 1, since 0 draws nothing")
    return Greedy()


def _flags() -> argparse.ArgumentParser:
    from palmjax import configure, distributed

    parser = argparse.ArgumentParser(
        prog="palmjax generate",
        description="Continue prompts with a checkpoint, on any mesh. No prompt is cut, however long; "
        "a note says so when prompt and continuation pass the length of training.",
        epilog=configure.USAGE
        + "\nexample: palmjax generate --checkpoint runs/first --prompt 'def ' --temperature 0.8",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a checkpoint_N folder, or a MODEL_DIR: its newest")
    add("--prompt", action="append", metavar="TEXT", help="text to continue; repeatable, all go in one batch")
    add("--prompt_file", action="append", metavar="FILE", help="a file with a prompt, taken as it is; - for stdin")
    add("--max_new_tokens", type=int, default=128, metavar="N", help="tokens a prompt at most (128)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 (default) takes the most probable token")
    add("--top_k", type=int, metavar="K", help="draw from the K most probable tokens")
    add("--top_p", type=float, metavar="P", help="draw from the fewest tokens of total probability P")
    add("--seed", type=int, default=0, metavar="S", help="of the draws (0)")
    add(
        "--json", action="store_true", help="a line of JSON a prompt: prompt, continuation, tokens, log_probs, finished"
    )
    distributed.add_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """`palmjax generate --checkpoint DIR --prompt TEXT [...]`: prints each prompt with its continuation."""
    from palmjax import checkpoint, configure, distributed, model_dir, trained
    from palmjax.data import feed

    flags, rest = configure.parse_flags(sys.argv[1:] if argv is None else argv)
    options = _flags().parse_args(rest)
    texts, sampling = _read_prompts(options), _sampling(options)
    with distributed.session(options):
        path = model_dir.resolve(options.checkpoint)
        info = checkpoint.read_info(path)
        prompts = [_encode(info.vocabulary, text) for text in texts]
        bos = info.vocabulary.prompt_bos if all(prompts) else info.vocabulary.bos_id
        with trained.config_file(path, info) as file:
            experiment = configure.load([file, *flags.files], flags.bindings, flags.search_paths).experiment
        trained.enable_compilation_cache(experiment.train.compilation_cache)
        opened = trained.open_checkpoint(path, info, experiment)
        params = opened.params()
        began = time.perf_counter()
        found = generate(
            opened.model,
            params,
            prompts,
            options.max_new_tokens,
            sampling=sampling,
            seed=options.seed,
            bos=bos,
            stop=info.vocabulary.eos_id,
            as_prefix="prefix" in experiment.train_dataset.packing.batch_fields,
            mesh=opened.mesh,
            rules=experiment.sharding,
        )
        if jax.process_index() == 0:
            seconds, trained_on = time.perf_counter() - began, feed.row_length(experiment.train_dataset)
            _print(info.vocabulary, texts, prompts, found, as_json=options.json)
            _print_notes(prompts, found, seconds, trained_on)
    return 0


def _print(
    vocabulary: Vocabulary,
    texts: Sequence[str],
    prompts: Sequence[Sequence[int]],
    found: Sequence[Continuation],
    *,
    as_json: bool,
) -> None:
    for number, (text, prompt, one) in enumerate(zip(texts, prompts, found, strict=True), 1):
        tokens = one.tokens.tolist()
        continuation = continuation_text(vocabulary, prompt, tokens)
        if as_json:
            record = {"prompt": text, "continuation": continuation, "tokens": tokens}
            print(json.dumps({**record, "log_probs": one.log_probs.tolist(), "finished": one.finished}))
        else:
            if len(texts) > 1:
                print(f"--- prompt {number} of {len(texts)} ---")
            print(text + continuation)
    sys.stdout.flush()


def _print_notes(
    prompts: Sequence[Sequence[int]], found: Sequence[Continuation], seconds: float, trained_on: int
) -> None:
    """On standard error: how fast it went, and which rows passed the length of training."""
    tokens = sum(len(one.tokens) for one in found)
    print(f"{tokens:,} tokens in {seconds:.1f} s, compilation included", file=sys.stderr)
    longest = max(1 + len(prompt) + len(one.tokens) for prompt, one in zip(prompts, found, strict=True))
    if longest > trained_on:
        print(
            f"note: {longest:,} tokens in a row, and the model was trained on rows of {trained_on:,}; nothing was cut, "
            "but text beyond that length may be poor",
            file=sys.stderr,
        )


if __name__ == "__main__":
    from palmjax.cli import run_main

    raise SystemExit(run_main(main))
