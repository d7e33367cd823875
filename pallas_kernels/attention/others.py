"""Other people's attention under our signature, to be named and to be measured against: cuDNN, jax's flash and splash
kernels, tokamax. Imported when named; none of them is chosen by "auto".
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention.case import Case

NAMES = ("cudnn", "jax_flash", "jax_splash", "tokamax")

BLOCK = 512
"""Of jax's TPU kernels. Their own default of 128 takes four times as long."""

LANES = 128


def refusals(impl: str, case: Case, chip: str | None) -> list[str]:
    """Every reason for which `impl` cannot do `case` on `chip`."""
    reasons = [f"no {name}" for name in ("alibi", "bias", "prefix", "lse") if getattr(case, name)]
    if case.segments and impl in ("cudnn", "tokamax"):
        reasons.append("no segments")
    if case.segments and not case.mask.causal and impl == "jax_splash":
        reasons.append("segments with Mask(causal=True) only")
    if case.soft_cap and impl in ("cudnn", "jax_flash"):
        reasons.append("no soft_cap")
    if case.mask.window is not None and (impl == "jax_flash" or not case.mask.causal):
        reasons.append("no window" if case.mask.causal else "no window without Mask(causal=True)")
    tpu = chip is not None and chip.startswith("TPU")
    if impl == "cudnn":
        if chip is None or not chip.startswith("NVIDIA"):
            reasons.append(f"chip {chip!r} is no NVIDIA GPU")
        if case.dtype not in ("bfloat16", "float16"):
            reasons.append(f"{case.dtype}: it has bfloat16 and float16")
        if case.head_dim % 8 or case.head_dim > 256:
            reasons.append(f"head_dim {case.head_dim}: multiples of 8 up to 256")
    elif impl in ("jax_flash", "jax_splash"):
        if not tpu:
            reasons.append(f"chip {chip!r} is no TPU")
        if case.length % LANES:
            reasons.append(f"length {case.length}: multiples of {LANES}")
        if case.head_dim % LANES:
            reasons.append(f"head_dim {case.head_dim}: multiples of {LANES}")
    elif importlib.util.find_spec("tokamax") is None:
        reasons.append("tokamax is not installed")
    return reasons


def run(impl: str, q: jax.Array, k: jax.Array, v: jax.Array, *, case: Case, **kwargs: Any) -> jax.Array:
    """`attention` by the named implementation, which `refusals` has let pass. No log-sum-exp.

    kwargs: scale, soft_cap and segments as in `attention`; block: of jax's TPU kernels, BLOCK by default.
    """
    functions = {"cudnn": _cudnn, "jax_flash": _flash, "jax_splash": _splash, "tokamax": _tokamax}
    return functions[impl](q, k, v, case=case, **kwargs)


def _cudnn(q: Any, k: Any, v: Any, *, case: Case, scale: float, soft_cap: Any, segments: Any) -> jax.Array:
    del soft_cap, segments
    window = None if case.mask.window is None else (case.mask.window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=case.mask.causal, local_window_size=window, implementation="cudnn"
    )


def _flash(
    q: Any, k: Any, v: Any, *, case: Case, scale: float, soft_cap: Any, segments: Any, block: int = BLOCK
) -> jax.Array:
    del soft_cap
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    block = next(size for size in (block, 256, LANES) if case.length % size == 0)
    names = (
        "block_q block_k_major block_k block_q_major_dkv block_k_major_dkv block_k_dkv block_q_dkv "
        "block_k_major_dq block_k_dq block_q_dq"
    )
    sizes = flash.BlockSizes(block_b=1, **dict.fromkeys(names.split(), block))
    heads = case.heads // case.kv_heads
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, jnp.repeat(k, heads, axis=2), jnp.repeat(v, heads, axis=2)))
    ids = None if segments is None else flash.SegmentIds(segments, segments)
    out = flash.flash_attention(q, k, v, segment_ids=ids, causal=case.mask.causal, sm_scale=scale, block_sizes=sizes)
    return jnp.swapaxes(out, 1, 2)


def _splash(
    q: Any, k: Any, v: Any, *, case: Case, scale: float, soft_cap: Any, segments: Any, block: int = BLOCK
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, heads = case.length, case.heads // case.kv_heads
    block = next(size for size in (block, 256, LANES) if T % size == 0)
    names = "block_q block_kv block_kv_compute block_q_dkv block_kv_dkv block_kv_dkv_compute block_q_dq block_kv_dq"
    sizes: dict[str, Any] = dict.fromkeys(names.split(), block)
    if case.mask.window is not None:
        seen: Any = masks.LocalMask((T, T), (case.mask.window - 1, 0), 0)
    else:
        seen = masks.CausalMask((T, T)) if case.mask.causal else masks.FullMask((T, T))
    kernel = splash.make_splash_mqa_single_device(
        masks.MultiHeadMask([seen] * heads),
        block_sizes=splash.BlockSizes(**sizes),
        attn_logits_soft_cap=soft_cap,
    )
    grouped = jnp.moveaxis(q.reshape(*q.shape[:2], case.kv_heads, heads, q.shape[3]), 1, 3) * scale
    ids = None if segments is None else splash.SegmentIds(segments, segments)
    # Rows, then key/value heads.
    of_heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    out: Any = jax.vmap(of_heads, in_axes=(0, 0, 0, None if ids is None else 0))(
        grouped.astype(q.dtype), jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), ids
    )
    return jnp.moveaxis(out, 3, 1).reshape(q.shape)


def _tokamax(q: Any, k: Any, v: Any, *, case: Case, scale: float, soft_cap: Any, segments: Any) -> jax.Array:
    del segments
    tokamax: Any = importlib.import_module("tokamax")
    window = None if case.mask.window is None else (case.mask.window - 1, 0)
    call = functools.partial(tokamax.dot_product_attention, scale=scale, logits_soft_cap=soft_cap)
    return call(q, k, v, is_causal=case.mask.causal, local_window_size=window)
