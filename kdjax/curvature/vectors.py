"""Internals of curvature: vectors as pytrees and as flat arrays, checks, and the choice of the loop over products."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

Matvec: TypeAlias = Callable[[PyTree], PyTree]
"""The product of a symmetric matrix with a vector, a pytree; returns the same structure."""

Loop: TypeAlias = Literal["compiled", "host"]
"""Where a Krylov method calls its products: in one compiled loop, or from Python."""


_WIDE = (np.dtype(np.float32), np.dtype(np.float64))


def widen(tree: PyTree) -> PyTree:
    """Floating-point arrays in float32, or float64 if they are; others unchanged."""

    def wide(x):
        if isinstance(x, jax.Array) and x.dtype in _WIDE and not x.weak_type:
            return x  # ten times as fast as asarray
        floating = jnp.issubdtype(jnp.result_type(x), jnp.floating)
        return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32)) if floating else x

    return jax.tree.map(wide, tree)


def random_like(key: Array, like: PyTree, *, distribution: Literal["normal", "signs"] = "normal") -> PyTree:
    """A random vector with the structure of ``like``: a Lanczos start, or a probe of a trace.

    Args:
      key: for the draw.
      like: arrays, for their shapes and dtypes.
      distribution: "normal", whose direction is uniform, or "signs", ±1 with equal probability (Rademacher).

    Returns:
      A pytree of independent numbers, float32 or wider.
    """
    check_arrays("random_like", like)
    return _draw(key, widen(like), distribution)


_ONE = np.int32(0)  # the exponent of 1
_WIDTH = 1024  # numbers in a row of a cut vector


def cut(vector: Float[Array, " n"]) -> Float[Array, "rows width"]:
    """A flat vector in rows of up to 1024 numbers, zero-padded.

    Matrix-vector products accumulate sequentially in float32, at least on a CPU, and lose digits that orthogonality
    needs over millions of numbers. As rows, an inner product is one product per row and a sum over rows, which takes
    the same time and is accurate at any length.
    """
    width = min(len(vector), _WIDTH)
    filled = jnp.concatenate([vector, jnp.zeros(-len(vector) % width, vector.dtype)])
    return filled.reshape(-1, width)


def join(rows: Float[Array, "*batch rows width"], size: int) -> Float[Array, "*batch n"]:
    """Inverse of :func:`cut` for a vector of this size."""
    return rows.reshape(*rows.shape[:-2], -1)[..., :size]


def inner(a: Float[Array, "rows width"], b: Float[Array, "rows width"]) -> Float[Array, ""]:
    """The inner product of two cut vectors."""
    return jnp.sum(jnp.einsum("rw,rw->r", a, b, precision=jax.lax.Precision.HIGHEST))


def norm(x: Array) -> Float[Array, ""]:
    """The 2-norm of an array, without overflow or underflow of squares."""
    unit = power_of_two(jnp.max(jnp.abs(x), initial=0))
    return unit * jnp.linalg.norm((x / unit).ravel())


def power_of_two(x: Float[Array, ""]) -> Float[Array, ""]:
    """The power of two above a number, by which scaling does not round; 1 for zero."""
    return jnp.ldexp(jnp.ones((), x.dtype), exponent_of(x))


def exponent_of(x: Float[Array, ""]) -> Int[Array, ""]:
    """The exponent of :func:`power_of_two`, clipped so that its inverse is finite too."""
    farthest = jnp.finfo(x.dtype).maxexp - 28
    return jnp.clip(jnp.frexp(x)[1], -farthest, farthest)


def flatten(tree: PyTree) -> Float[Array, " n"]:
    """All numbers of a tree as one vector, in the order of ``ravel_pytree``."""
    return ravel_pytree(widen(tree))[0]


def unflatten(like: PyTree, vector: Float[Array, " n"]) -> PyTree:
    """Inverse of :func:`flatten` for trees with the structure of ``like``."""
    return ravel_pytree(widen(like))[1](vector)


def size_of(tree: PyTree) -> int:
    """The number of scalars in a tree."""
    return sum(x.size for x in jax.tree.leaves(tree))


def structure_of(tree: PyTree) -> tuple[Any, tuple[tuple[int, ...], ...]]:
    """Tree structure and shapes, which can be compared and hashed."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple(jnp.shape(x) for x in leaves)


def check_arrays(what: str, tree: PyTree) -> None:
    """Raises a ValueError unless the tree holds arrays, all of them real and floating."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if not sum(getattr(x, "size", 1) for _, x in leaves):
        raise ValueError(f"{what} needs at least one parameter, got none: pass the parameters themselves.")
    for path, leaf in leaves:
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"{what} needs real floating-point numbers, {_name(path) or 'the array'} is {dtype}: let the loss "
                "close over it."
            )


def check_structure(what: str, got: PyTree, wanted: tuple[Any, tuple[tuple[int, ...], ...]]) -> None:
    """Raises a ValueError unless the tree has this structure, of :func:`structure_of`."""
    structure, shapes = structure_of(got)
    if structure != wanted[0]:
        raise ValueError(f"{what} needs a vector of the structure {wanted[0]}, got {structure}.")
    if shapes != wanted[1]:
        raise ValueError(f"{what} needs a vector of the shapes {_some(wanted[1])}, got {_some(shapes)}.")


def check_finite(what: str, *arrays: Array | np.ndarray) -> None:
    """Raises a ValueError on NaN or infinity; traced arrays pass."""
    if all(map(is_known, arrays)) and not all(np.isfinite(x).all() for x in arrays):
        raise ValueError(
            f"{what} met a product that is not finite: check that loss and gradient are finite at these parameters."
        )


def is_known(array: Any) -> bool:
    """Whether an array is concrete, not traced."""
    return not isinstance(array, Tracer)


def choose_loop(loop: Loop | None, matvec: Matvec, like: PyTree, *trees: PyTree) -> Loop:
    """The given loop, or the faster one.

    The compiled loop is faster on accelerators, and on a CPU for the convolutions of :mod:`kdjax.models`, since it
    hoists what does not depend on the vector. Inside a compiled function it is the only one.
    """
    if loop not in (None, "compiled", "host"):
        raise ValueError(f"loop must be 'compiled', 'host' or None, got {loop!r}.")
    if loop is not None:
        return loop
    known = all(map(is_known, jax.tree.leaves((matvec, like, trees))))
    if not known or jax.default_backend() != "cpu":
        return "compiled"
    if jax.tree_util.all_leaves([matvec]):
        return "host"
    vector = jax.eval_shape(_take, like)
    found = _convolutions(_multiply.trace(matvec, vector, like, _ONE).jaxpr.jaxpr)
    return "compiled" if found == {"chosen"} else "host"


def _convolutions(jaxpr: Any, kind: str = "plain") -> set[str]:
    """Kinds of convolutions in a program: "plain", or "chosen" by platform as in :mod:`kdjax.models.layers`."""
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            found.add(kind)
        inner = "chosen" if equation.primitive.name == "cond" else kind
        for part in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr")):
            if hasattr(part, "jaxpr") or hasattr(part, "eqns"):
                found |= _convolutions(getattr(part, "jaxpr", part), inner)
    return found


def as_argument(matvec: Matvec) -> Matvec:
    """The function as an argument of a jitted one: itself if it is a pytree, otherwise a static ``Partial``."""
    return jax.tree_util.Partial(matvec) if jax.tree_util.all_leaves([matvec]) else matvec


def multiply_all(
    matvec: Matvec, vectors: Float[Array, "m rows width"], like: PyTree, loop: Loop | None
) -> Float[Array, "m rows width"]:
    """The product with each cut vector, one after another."""
    if choose_loop(loop, matvec, like, vectors) == "compiled":
        return _multiply_each(as_argument(matvec), vectors, like)
    return jnp.stack([multiply_here(matvec, vector, like) for vector in vectors])


def multiply_here(
    matvec: Matvec, vector: Float[Array, "rows width"], like: PyTree, exponent: Any = _ONE
) -> Float[Array, "rows width"]:
    """:func:`multiply` from Python: one compiled program if the function is a pytree, otherwise not compiled."""
    if jax.tree_util.all_leaves([matvec]):
        return _taken(_checked(matvec(_given(vector, like, exponent)), like))
    return _multiply(matvec, vector, like, exponent)


def multiply(
    matvec: Matvec, vector: Float[Array, "rows width"], like: PyTree, exponent: Any = _ONE
) -> Float[Array, "rows width"]:
    """The product with a cut vector times a power of two."""
    return _take(_checked(matvec(_give(vector, like, exponent)), like))


def _give(vector, like, exponent):
    return unflatten(like, join(vector, size_of(like)) * jnp.ldexp(jnp.ones((), vector.dtype), exponent))


def _take(product):
    return cut(flatten(product))


def _checked(product: PyTree, like: PyTree) -> PyTree:
    check_structure("matvec must return the structure it takes and", product, structure_of(like))
    return product


@jax.jit
def _multiply_each(matvec, vectors, like):
    return jax.lax.map(lambda vector: multiply(matvec, vector, like), vectors)


_multiply, _given, _taken = jax.jit(multiply), jax.jit(_give), jax.jit(_take)


@functools.partial(jax.jit, static_argnums=2)
def _draw(key, like, distribution):
    zeros = flatten(like)
    draw = jax.random.normal if distribution == "normal" else jax.random.rademacher
    return unflatten(like, draw(key, zeros.shape, zeros.dtype))


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _some(values: Sequence[Any]) -> str:
    listed = ", ".join(map(str, values[:6]))
    return f"{listed} and {len(values) - 6} more" if len(values) > 6 else listed
