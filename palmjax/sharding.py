"""The sharding seam: logical axes to mesh axes. Model code names logical axes; nobody else says PartitionSpec.

The mesh is explicit: every array's type carries its sharding, so parameters, gradients and optimizer moments keep their
layout through `jax.grad` and `lax.scan` with no annotation. Under `activate(mesh, rules)` the functions below place
their results; with no mesh active they are the plain jnp operations, so the same model runs unsharded.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from palmjax.config import ConfigError, MeshConfig, ShardingRules

Axes = tuple[str | None, ...]
"""Logical axis names of an array, one for each dimension; None is never sharded."""

MESH_AXES = frozenset(field.name for field in dataclasses.fields(MeshConfig))

_active_rules: contextvars.ContextVar[ShardingRules | None] = contextvars.ContextVar("sharding_rules", default=None)
_active_kind: contextvars.ContextVar[str | None] = contextvars.ContextVar("device_kind", default=None)


@contextlib.contextmanager
def activate(mesh: Mesh, rules: ShardingRules) -> Iterator[None]:
    """Makes `mesh` and `rules` the ones that every function of this module uses inside the block."""
    token, kind = _active_rules.set(rules), _active_kind.set(mesh.devices.flat[0].device_kind)
    try:
        with jax.set_mesh(mesh):
            yield
    finally:
        _active_rules.reset(token)
        _active_kind.reset(kind)


def device_kind() -> str | None:
    """The kind of device, as jax names it ("TPU v4"), of the active mesh; None when there is none.

    What a kernel is chosen by. The mesh may be one of an ahead-of-time topology, so jax's default backend says nothing.
    """
    return _active_kind.get()


def mesh_axes(rules: ShardingRules, axes: Axes, shape: Sequence[int], sizes: dict[str, int], where: str) -> list:
    """The mesh axes of each dimension, checked.

    Raises ConfigError if an axis does not divide its dimension (naming both) or if two dimensions claim one mesh axis.
    """
    assert len(axes) == len(shape), f"{where}: {len(axes)} logical axes {axes} for an array of shape {tuple(shape)}"
    out: list[tuple[str, ...]] = []
    for name, size in zip(axes, shape, strict=True):
        wanted = () if name is None or size == 1 else getattr(rules, name)
        # An axis that a mesh may have and this one has not is of size one.
        wanted = tuple(a for a in wanted if a in sizes or a not in MESH_AXES)
        unknown = [a for a in wanted if a not in sizes]
        if unknown:
            raise ConfigError(f"ShardingRules.{name} names mesh axis {unknown[0]!r}; the mesh has {', '.join(sizes)}")
        ways = 1
        for axis in wanted:
            ways *= sizes[axis]
        if size % ways:
            raise ConfigError(
                f"{where}: dimension {name!r} of size {size} is not divisible by mesh axes "
                f"{' x '.join(f'{a}={sizes[a]}' for a in wanted)}; change MeshConfig or ShardingRules.{name}"
            )
        taken = [a for a in wanted if any(a in earlier for earlier in out)]
        if taken:
            raise ConfigError(f"{where}: ShardingRules put mesh axis {taken[0]!r} on two dimensions of {axes}")
        out.append(tuple(wanted))
    return out


def _as_spec(dims: Sequence[tuple[str, ...]]) -> PartitionSpec:
    return PartitionSpec(*[d[0] if len(d) == 1 else (d or None) for d in dims])


def _active_sizes() -> dict[str, int] | None:
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or _active_rules.get() is None else dict(mesh.shape)


def _dims(axes: Axes, shape: Sequence[int], where: str) -> list[tuple[str, ...]] | None:
    """Mesh axes under the active mesh, or None when there is none."""
    sizes, rules = _active_sizes(), _active_rules.get()
    if sizes is None or rules is None:
        return None
    return mesh_axes(rules, axes, shape, sizes, where)


def out_spec(axes: Axes, shape: Sequence[int], where: str = "array") -> PartitionSpec | None:
    """The active PartitionSpec for an array born with these axes: pass it as `out_sharding=`; None with no mesh."""
    dims = _dims(axes, shape, where)
    return None if dims is None else _as_spec(dims)


def ways(axes: Axes, shape: Sequence[int]) -> tuple[int, ...]:
    """Into how many blocks each dimension of an array of `shape` with these axes is cut; ones with no mesh."""
    dims, sizes = _dims(axes, shape, "array"), _active_sizes() or {}
    return tuple(math.prod(sizes[axis] for axis in dim) for dim in dims or [()] * len(shape))


def named(mesh: Mesh, rules: ShardingRules, axes: Axes, shape: Sequence[int], where: str = "array") -> NamedSharding:
    """The concrete sharding of an array of `shape` with these logical axes on `mesh`."""
    return NamedSharding(mesh, _as_spec(mesh_axes(rules, axes, shape, dict(mesh.shape), where)))


def constrain(x: jax.Array, axes: Axes, where: str = "activation") -> jax.Array:
    """`x` laid out by its logical axes; moves data only where the layout differs."""
    spec = out_spec(axes, x.shape, where)
    return x if spec is None else jax.sharding.reshard(x, spec)


def einsum(equation: str, x: jax.Array, w: jax.Array, out: Axes, dtype: Any = None, partial: bool = False) -> jax.Array:
    """`jnp.einsum` of two operands, multiplied in `x.dtype`, with the result laid out by the logical axes `out`.

    dtype: of the result, `x.dtype` by default; float32 keeps what the products are accumulated in. Its gradient is
    rounded to `x.dtype` for the products of the backward pass, as matrix units take them.

    What each operand must look like follows from `out`: a kept dimension has the result's layout, and a contracted one
    stays sharded only if both operands agree on it (tensor parallelism's row-wise product). So a weight sharded over
    `fsdp` is gathered here, in the compute dtype, and its gradient is scattered back by the transpose.

    partial: where the sum runs over a mesh axis, leave each device its part of it (`total` adds them up, once for
    several results).
    """
    w = w.astype(x.dtype)
    operands, result = equation.split("->")
    x_dims, w_dims = operands.split(",")
    assert len(result) == len(out), f"{equation}: {len(out)} axes {out} for result {result!r}"
    sizes = dict(zip(x_dims, x.shape, strict=True)) | dict(zip(w_dims, w.shape, strict=True))
    dims = _dims(out, [sizes[d] for d in result], equation)
    if dims is None:
        return _product(equation, None, dtype, x, w)
    of_result = dict(zip(result, dims, strict=True))
    x_now, w_now = _current(x_dims, x), _current(w_dims, w)
    contracted = {d: x_now[d] for d in x_dims if d not in of_result and x_now[d] == w_now.get(d)}
    busy = {axis for axes in contracted.values() for axis in axes}

    def wanted(dim: str) -> tuple[str, ...]:
        if dim not in of_result:
            return contracted.get(dim, ())
        # A mesh axis that is summed over can't shard a kept dimension of the operand too: the sum is scattered to it.
        return () if busy & set(of_result[dim]) else of_result[dim]

    x = jax.sharding.reshard(x, _as_spec([wanted(d) for d in x_dims]))
    w = jax.sharding.reshard(w, _as_spec([wanted(d) for d in w_dims]))
    spec = _as_spec(dims)
    # A sum over axes of size one is whole already.
    parts = frozenset(axis for axis in busy if (_active_sizes() or {}).get(axis, 1) > 1)
    if partial and parts:
        spec = PartitionSpec(*_as_spec([tuple(a for a in dim if a not in parts) for dim in dims]), unreduced=parts)
    return _product(equation, spec, dtype, x, w)


def _product(equation: str, spec: PartitionSpec | None, dtype: Any, x: jax.Array, w: jax.Array) -> jax.Array:
    if dtype is None or dtype == x.dtype:
        return jnp.einsum(equation, x, w, out_sharding=spec)
    return _wide_product(equation, spec, dtype, x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _wide_product(equation: str, spec: PartitionSpec | None, dtype: Any, x: jax.Array, w: jax.Array) -> jax.Array:
    """The product of `x` and `w` in a wider `dtype` than theirs."""
    return jnp.einsum(equation, x, w, out_sharding=spec, preferred_element_type=dtype)


def _wide_product_forward(
    equation: str, spec: PartitionSpec | None, dtype: Any, x: jax.Array, w: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _wide_product(equation, spec, dtype, x, w), (x, w)


def _wide_product_backward(
    equation: str, spec: PartitionSpec | None, dtype: Any, operands: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    # A product with a float32 operand runs at a fraction of a matrix unit's rate (on GPUs), and the weight's gradient
    # would be a float32 array of its whole width until it is reduced.
    x = operands[0]
    _, back = jax.vjp(lambda x, w: jnp.einsum(equation, x, w, out_sharding=spec), *operands)
    return back(gradient.astype(x.dtype))


_wide_product.defvjp(_wide_product_forward, _wide_product_backward)


def total(parts: Sequence[jax.Array], axes: Axes) -> jax.Array:
    """The sum of arrays of one shape, some of which may be `partial` sums, laid out by the logical axes `axes`.

    Where all are parts over the same mesh axes, they are added first and reduced once.
    """
    if _active_sizes() is None or len({jax.typeof(part).sharding.spec.unreduced for part in parts}) == 1:
        return constrain(functools.reduce(operator.add, parts), axes)
    return functools.reduce(operator.add, [constrain(part, axes) for part in parts])


def is_partial(inputs: Sequence[Any], params: Mapping[str, Any]) -> bool:
    """Whether a traced operation works on partial sums or makes them: for policies that choose what to keep."""
    made = params.get("out_sharding") or params.get("sharding")
    kinds = [made, *(getattr(x, "sharding", None) for x in inputs)]
    return any(getattr(getattr(kind, "spec", None), "unreduced", None) for kind in kinds)


def _current(letters: str, x: jax.Array) -> dict[str, tuple[str, ...]]:
    """Mesh axes of each dimension of a traced or concrete array, by einsum letter."""
    spec = tuple(jax.typeof(x).sharding.spec)
    spec += (None,) * (len(letters) - len(spec))
    return {d: (s,) if isinstance(s, str) else tuple(s or ()) for d, s in zip(letters, spec, strict=True)}


def take(table: jax.Array, ids: jax.Array, axes: Axes, dtype: Any) -> jax.Array:
    """Rows `ids` of `table` [rows, width] in `dtype`, laid out by `axes`; the table's rows may stay sharded."""
    # Cast behind the lookup, so that the gradients of a frequent row's thousands of occurrences add up in the table's
    # own float32.
    if _active_sizes() is None:
        return table[ids].astype(dtype)
    table = jax.sharding.reshard(table, PartitionSpec(jax.typeof(table).sharding.spec[0], None))
    placed = out_spec(axes, (*ids.shape, table.shape[1]), "embedding lookup")
    return table.at[ids].get(out_sharding=placed).astype(dtype)


def local(
    fn: Callable[..., jax.Array], inputs: Sequence[Axes | None], out: Axes, *arrays: jax.Array | None
) -> jax.Array:
    """`fn` on each device's own block of `arrays` (`shard_map`), for kernels that know nothing of meshes.

    `inputs[i]` are the logical axes of `arrays[i]`; an array may be None and is then passed on as None. The result has
    the first array's shape with the logical axes `out`.
    """
    shape = next(a.shape for a in arrays if a is not None)
    return local_many(lambda *given: (fn(*given),), inputs, ((out, shape),), *arrays)[0]


def local_many(
    fn: Callable[..., tuple[jax.Array, ...]],
    inputs: Sequence[Axes | None],
    outs: Sequence[tuple[Axes, Sequence[int]]],
    *arrays: jax.Array | None,
) -> tuple[jax.Array, ...]:
    """`local` for a `fn` with several results, `outs` being logical axes and whole shape of each."""
    present = [(axes, a) for axes, a in zip(inputs, arrays, strict=True) if a is not None and axes is not None]

    def call(*given: jax.Array) -> tuple[jax.Array, ...]:
        values = iter(given)
        return fn(*[None if a is None else next(values) for a in arrays])

    if _active_sizes() is None:
        return call(*[a for _, a in present])
    specs = tuple(out_spec(axes, a.shape, "kernel operand") for axes, a in present)
    placed = [jax.sharding.reshard(a, s) for (_, a), s in zip(present, specs, strict=True)]
    results = tuple(out_spec(axes, shape, "kernel result") for axes, shape in outs)
    # Unchecked: a Pallas call cannot say over which mesh axes its results vary (jax 0.10.2, in interpret mode too).
    return jax.shard_map(call, in_specs=specs, out_specs=results, check_vma=False)(*placed)


def exchange(x: jax.Array, before: Axes, after: Axes) -> jax.Array:
    """`x`, laid out by the logical axes `before`, laid out by `after`, where one mesh axis goes from one dimension to
    another: an all-to-all over it. Where no axis moves, nothing does.
    """
    source, target = (_dims(axes, x.shape, "exchange") for axes in (before, after))
    if source is None or target is None or source == target:
        return x
    moves = [(i, set(s) - set(t)) for i, (s, t) in enumerate(zip(source, target, strict=True)) if set(s) - set(t)]
    gains = [(i, set(t) - set(s)) for i, (s, t) in enumerate(zip(source, target, strict=True)) if set(t) - set(s)]
    assert len(moves) == len(gains) == 1 and moves[0][1] == gains[0][1], f"{before} to {after} moves {moves}, {gains}"
    (concat, axes), (split, _) = moves[0], gains[0]
    names = tuple(axis for axis in source[concat] if axis in axes)
    # Blocks of the group are neighbours only where their axes are the last of the dimension.
    assert source[concat][len(source[concat]) - len(names) :] == names and target[split][: -len(names)] == source[split]

    def swap(block: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(block, names, split_axis=split, concat_axis=concat, tiled=True)

    return jax.shard_map(swap, in_specs=_as_spec(source), out_specs=_as_spec(target))(x)


def split_rows(x: jax.Array, parts: int) -> jax.Array:
    """[rows, ...] -> [parts, rows/parts, ...] with the rows' sharding kept and no data moved between devices.

    Part m takes every parts-th row (m, m + parts, ...), so that each device splits its own block.
    """
    rows = x.shape[0] // parts
    if _active_sizes() is None:
        return jnp.moveaxis(x.reshape(rows, parts, *x.shape[1:]), 1, 0)
    spec = tuple(jax.typeof(x).sharding.spec)
    spec += (None,) * (x.ndim - len(spec))
    split = jax.lax.reshape(x, (rows, parts, *x.shape[1:]), out_sharding=PartitionSpec(spec[0], None, *spec[1:]))
    return jnp.moveaxis(split, 1, 0)


def zeros_like(abstract: Any) -> jax.Array:
    """Zeros of an abstract array's shape and type, in the layout that its type carries (none outside a mesh)."""
    layout = abstract.sharding
    spec = None if layout is None or layout.mesh.empty else layout.spec
    return jnp.zeros(abstract.shape, abstract.dtype, out_sharding=spec)


def concrete(abstract: Any, mesh: Mesh) -> Any:
    """ShapeDtypeStructs traced under an active mesh, with their shardings on the concrete `mesh` (scalars
    replicated).
    """

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = leaf.sharding.spec if isinstance(leaf.sharding, NamedSharding) else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, abstract)


def abstract_state(make: Callable[[], Any], mesh: Mesh, rules: ShardingRules) -> Any:
    """Shapes, dtypes and concrete shardings of what `make()` returns under the mesh, without computing it."""
    with activate(mesh, rules):
        return concrete(jax.eval_shape(make), mesh)


def text(dims: Sequence[tuple[str, ...]]) -> str:
    """Mesh axes of each dimension as people read them: `(fsdp, tensor)`, with `-` for a replicated dimension."""
    return "(" + ", ".join("+".join(d) or "-" for d in dims) + ")"
