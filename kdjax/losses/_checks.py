"""Checks the arguments of every public loss against its annotations.

Shapes and dtypes are static, so the checks work on tracers and cost nothing in a compiled step. Values are checked only
outside ``jit``, where they are known; this waits for the device that holds them.
"""

import functools
import inspect
import numbers
import types
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from kdjax.types import Scalar

P = ParamSpec("P")
R = TypeVar("R")


class Range(NamedTuple):
    """Allowed values of an option."""

    words: str
    holds: Callable[[float], bool]
    usual: str = ""


Positive = Annotated[Scalar, Range("above 0", lambda x: x > 0)]
Temperature = Annotated[Scalar, Range("above 0", lambda x: x > 0, "; the field uses 1 to 20")]
NonNegative = Annotated[Scalar, Range("of at least 0", lambda x: x >= 0)]
Exponent = Annotated[Scalar, Range("of at least 1", lambda x: x >= 1, "; the field uses 1, 2 and 4")]
Share = Annotated[Scalar, Range("from 0 to 1", lambda x: 0 <= x <= 1)]
Fraction = Annotated[Scalar, Range("of at least 0 and below 1", lambda x: 0 <= x < 1)]
Probability = Annotated[Scalar, Range("between 0 and 1", lambda x: 0 < x < 1, "; the paper uses 0.99")]

_KINDS = {"Float": jnp.floating, "Int": jnp.integer, "Bool": jnp.bool_}
_LEAST = {"classes": 2}  # smallest size of a dimension; 1 for all others
_NUMBERED_BY = {  # arguments that hold indices, and the dimension that they index; a void label is below 0
    "labels": "classes",
    "teacher_classes": "classes",
    "partner": "batch",
    "index": "examples",
    "candidates": "examples",
}


def checked(loss: Callable[P, R]) -> Callable[P, R]:
    """Decorates a loss: checks its arguments against its annotations; dimensions of one name must have one size.

    Also converts NumPy arrays to JAX arrays and integers to int32. A ValueError names the loss, the argument, what is
    needed and what was passed.
    """
    signature = inspect.signature(loss)
    hints = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    arrays = [name for name, hint in hints.items() if _leaves(hint)]

    @functools.wraps(loss)
    def with_checks(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{loss.__name__}: {error}") from None
        sizes: dict[str, Any] = {
            name.removeprefix("num_"): value for name, value in given.arguments.items() if hints[name] is int
        }
        parts = [part for name, value in given.arguments.items() for part in _parts(name, value, hints[name])]
        try:
            for name, value, hint in parts:
                _check_kind(name, value, hint, sizes)
            for name, value, hint in parts:
                _check_values(name, value, hint, sizes)
        except ValueError as error:
            raise ValueError(f"{loss.__name__} needs {error}") from None
        given.arguments |= {
            name: jax.tree.map(_as_jax, given.arguments[name]) for name in arrays if name in given.arguments
        }
        return loss(*given.args, **given.kwargs)

    return with_checks


def _parts(name: str, value: Any, hint: Any) -> Iterator[tuple[str, Any, Any]]:
    """An argument with its annotation; for a tuple of arrays, each array."""
    kinds = typing.get_args(hint)
    if isinstance(hint, type) and issubclass(hint, tuple) and isinstance(value, hint):
        for field, kind in typing.get_type_hints(hint).items():
            yield f"{name}.{field}", getattr(value, field), kind
    elif typing.get_origin(hint) is tuple and isinstance(value, tuple | list) and len(value) == len(kinds):
        for i, pair in enumerate(zip(value, kinds, strict=True)):
            yield f"{name}[{i}]", *pair
    else:
        yield name, value, hint


def _leaves(hint: Any) -> list[Any]:
    """The arrays and numbers that an annotation allows; empty for other types, which are not checked."""
    if typing.get_origin(hint) is Annotated:
        return _leaves(typing.get_args(hint)[0])
    if isinstance(hint, type) and issubclass(hint, tuple):
        return [leaf for member in typing.get_type_hints(hint).values() for leaf in _leaves(member)]
    if typing.get_origin(hint) in (typing.Union, types.UnionType, tuple):
        return [leaf for member in typing.get_args(hint) for leaf in _leaves(member)]
    known = hint in (int, float) or getattr(getattr(hint, "dtype", None), "__name__", None) in _KINDS
    return [hint] if known else []


def _check_kind(name: str, value: Any, hint: Any, sizes: dict[str, Any]) -> None:
    leaves = _leaves(hint)
    if not leaves or (value is None and type(None) in typing.get_args(hint)):
        return
    if not any(_fits(value, leaf, sizes) for leaf in leaves):
        wanted = " or ".join(dict.fromkeys(_words(leaf, sizes) for leaf in leaves))
        raise ValueError(f"{name} as {wanted}, got {_came(value)}{_advice(name, value, sizes)}")
    for dim in " ".join(getattr(leaf, "dim_str", "") for leaf in leaves).split():
        if sizes.get(dim, 9) in range(_LEAST.get(dim, 1)):
            one = "; a softmax over one class is always 1: write a single sigmoid logit z as the two logits 0 and z"
            raise ValueError(
                f"at least {_LEAST.get(dim, 1)} {dim}, got {name} as {_came(value)}{one * (dim == 'classes')}."
            )


def _fits(value: Any, leaf: Any, sizes: dict[str, Any]) -> bool:
    """Whether a value matches one annotation; if so, adds the sizes of its dimensions to those known."""
    if leaf in (int, float):
        number = numbers.Integral if leaf is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    if not isinstance(value, jax.Array | np.ndarray | np.generic):
        return False
    if not jnp.issubdtype(value.dtype, _KINDS[leaf.dtype.__name__]):
        return False
    tried = dict(sizes)
    if not _bind(leaf.dim_str.split(), value.shape, tried):
        return False
    sizes.update(tried)
    return True


def _bind(dims: list[str], shape: tuple[int, ...], sizes: dict[str, Any]) -> bool:
    """Whether a shape agrees with its dimensions' names, given the sizes bound so far; binds the others.

    One name may have a star, which stands for any number of axes.
    """
    star = next((i for i, dim in enumerate(dims) if dim.startswith("*")), None)
    axes: tuple[Any, ...] = shape
    if star is not None:
        end = len(shape) - (len(dims) - star - 1)
        axes = (*shape[:star], shape[star:end], *shape[end:]) if end >= star else ()
    return len(axes) == len(dims) and all(
        sizes.setdefault(*pair) == pair[1] for pair in zip(dims, axes, strict=True)
    )


def _check_values(name: str, value: Any, hint: Any, sizes: dict[str, Any]) -> None:
    """Raises an error for numbers out of range, where they are known."""
    leaves = _leaves(hint)
    if not leaves or value is None or isinstance(value, Tracer):
        return
    limit = sizes.get(_NUMBERED_BY.get(name, ""))
    if limit is not None and np.size(value) and getattr(value, "is_fully_addressable", True):
        low, high = np.min(np.asarray(value)), np.max(np.asarray(value))
        if high >= limit or (low < 0 and name != "labels"):
            void = ", or below 0 for an example without a label" * (name == "labels")
            raise ValueError(f"{name} from 0 to {limit - 1}{void}, got {high if high >= limit else low}.")
    if np.ndim(value) == 0 and float in leaves:
        number = np.asarray(value).item()
        if not np.isfinite(number):
            raise ValueError(f"a finite {name}, got {number}.")
        for allowed in _ranges(hint):
            if not allowed.holds(number):
                raise ValueError(f"a {name} {allowed.words}, got {number}{allowed.usual}.")


def _ranges(hint: Any) -> list[Range]:
    members = typing.get_args(hint)
    own = [member for member in members if isinstance(member, Range)]
    return own + [found for member in members if typing.get_args(member) for found in _ranges(member)]


def _as_jax(value: Any) -> Any:
    """NumPy numbers as Python's, NumPy arrays as JAX's, integer arrays as int32."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray | jax.Array) and jnp.issubdtype(value.dtype, jnp.integer):
        return jnp.asarray(value).astype(jnp.int32)
    return jnp.asarray(value) if isinstance(value, np.ndarray) else value


def _words(leaf: Any, sizes: dict[str, Any]) -> str:
    """An annotation as text, with the sizes that are known: ``int [*batch] = [4]``."""
    if leaf in (int, float):
        return "a number"
    dims = leaf.dim_str.split()
    if not dims:
        return "a number"
    known = [str(sizes.get(dim, dim)).strip("(,)") for dim in dims]
    filled = ", ".join(size for size in known if size)
    names = ", ".join(dims)
    return f"{leaf.dtype.__name__.lower()} [{names}]" + f" = [{filled}]" * (filled != names)


def _came(value: Any) -> str:
    if not hasattr(value, "dtype"):
        return f"{value!r}"[:60] + f" ({type(value).__name__})"
    return f"{value.dtype}{list(value.shape)}"


def _advice(name: str, value: Any, sizes: dict[str, Any]) -> str:
    """How to correct the call, where that is known."""
    if not hasattr(value, "dtype"):
        return "."
    if name == "labels":
        if value.ndim > 1 and value.shape[-1] == 1:
            return ": write labels[..., 0]."
        if value.ndim > 1 and value.shape[-1] == sizes.get("classes"):
            return ": labels are class indices, not one-hot; write jnp.argmax(labels, axis=-1)."
        if not jnp.issubdtype(value.dtype, jnp.integer):
            return ": labels are class indices; write labels.astype(jnp.int32)."
    return "."
