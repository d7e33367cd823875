"""Whether a value fits a field's annotation. gin checks nothing: `batch_size = '8'` would fail hours later."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any, Literal


class Mismatch(Exception):
    """A value of the wrong type; its text is `expected X, got Y` and, where it is clear, what to write."""


def expected(annotation: Any) -> str:
    """An annotation in words: "int or BatchSizePart", "tuple of str", "one of 'full', 'none'"."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is None or annotation is types.NoneType:
        return "None"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(expected(arg) for arg in args)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(map(repr, args))
    if origin is tuple and args[-1:] == (...,):
        return f"tuple of {expected(args[0])}"
    if origin is tuple:
        return "(" + ", ".join(expected(arg) for arg in args) + ")"
    if origin is not None and issubclass(origin, Mapping):
        return f"dict of {expected(args[0])} to {expected(args[1])}"
    return getattr(annotation, "__name__", str(annotation))


def _got(value: Any) -> str:
    if value is None or hasattr(type(value), "__dataclass_fields__"):
        return "None" if value is None else type(value).__name__
    return f"{type(value).__name__} {value!r}"


def _mismatch(value: Any, annotation: Any) -> Mismatch:
    members = typing.get_args(annotation) or (annotation,)
    hint = ""
    if isinstance(value, str) and value.lower() in ("true", "false", "none"):
        hint = f" (write {value.capitalize()})"
    elif int in members and isinstance(value, float) and value.is_integer():
        hint = f" (write {int(value)})"
    elif isinstance(value, str) and (typing.get_origin(annotation) is tuple or annotation is tuple):
        hint = f" (write ({value!r},))"
    elif str in members and not isinstance(value, str):
        hint = " (quote it)"
    return Mismatch(f"expected {expected(annotation)}, got {_got(value)}{hint}")


def check(value: Any, annotation: Any) -> Any:
    """`value` as the annotation wants it: an int becomes a float where a float is due, a list a tuple.

    bool is not an int here. Raises Mismatch for a value that does not fit, and TypeError for an annotation
    that is not understood, which is a mistake in the dataclass.
    """
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _check_union(value, annotation, args)
    if origin is Literal:
        if any(type(value) is type(arg) and value == arg for arg in args):
            return value
        raise _mismatch(value, annotation)
    if annotation is tuple or origin is tuple:
        return _check_tuple(value, annotation, args)
    if annotation in (dict, Mapping) or origin is dict or origin is Mapping:
        if not isinstance(value, Mapping):
            raise _mismatch(value, annotation)
        key_type, item_type = args or (Any, Any)
        try:
            return {check(key, key_type): check(item, item_type) for key, item in value.items()}
        except Mismatch:
            raise _mismatch(value, annotation) from None
    if annotation is float and type(value) is int:
        return float(value)
    if annotation in (int, float, str, bool):
        if type(value) is annotation:
            return value
        raise _mismatch(value, annotation)
    if annotation is None or annotation is types.NoneType:
        if value is None:
            return value
        raise _mismatch(value, annotation)
    if not isinstance(annotation, type):
        raise TypeError(f"configure does not understand the annotation {annotation!r}")
    if isinstance(value, annotation):
        return value
    raise _mismatch(value, annotation)


def _check_union(value: Any, annotation: Any, args: tuple[Any, ...]) -> Any:
    if type(value) in args:  # an exact member is never converted: 1 stays an int under `float | int`
        return value
    for arg in args:
        try:
            return check(value, arg)
        except Mismatch:
            continue
    raise _mismatch(value, annotation)


def _check_tuple(value: Any, annotation: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    if not isinstance(value, (tuple, list)):
        raise _mismatch(value, annotation)
    if not args:
        return tuple(value)
    if args[-1:] == (...,):
        args = (args[0],) * len(value)
    if len(value) != len(args):
        raise _mismatch(value, annotation)
    try:
        return tuple(check(item, arg) for item, arg in zip(value, args, strict=True))
    except Mismatch:
        raise _mismatch(value, annotation) from None
