"""What all of curvature shares: vectors as pytrees, flattened once, and where a loop over products runs."""

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
"""A symmetric matrix as its product with a vector, a pytree of one structure in and out."""

Loop: TypeAlias = Literal["compiled", "host"]
"""Where the products of a Krylov method are called from: one compiled loop, or Python."""


def select(params: PyTree, only: str | Sequence[str] | None) -> PyTree:
    """The parameters whose path starts with one of the names; None in place of the others.

    Args:
      params: any pytree; paths are written as in ``"Dense_0/kernel"``.
      only: names of parts, such as ``"Dense_0"`` or ``("Conv_0", "Dense_0/bias")``; None selects everything.

    Raises:
      ValueError: if a name matches nothing.
    """
    if only is None:
        return params
    names = (only,) if isinstance(only, str) else tuple(only)
    paths = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for name in names or ("",):
        if not any(_within(path, name) for path in paths):
            raise ValueError(f"no parameter lies in {name!r}; there are {_some(paths)}.")
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if any(_within(_name(path), name) for name in names) else None, params
    )


_WIDE = (np.dtype(np.float32), np.dtype(np.float64))


def widen(tree: PyTree) -> PyTree:
    """Floating-point arrays as float32, or as float64 where they come so; others as they are."""

    def wide(x):
        if isinstance(x, jax.Array) and x.dtype in _WIDE and not x.weak_type:
            return x  # already so, which asarray takes ten times as long to find
        floating = jnp.issubdtype(jnp.result_type(x), jnp.floating)
        return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32)) if floating else x

    return jax.tree.map(wide, tree)


def random_like(key: Array, like: PyTree, *, distribution: Literal["normal", "signs"] = "normal") -> PyTree:
    """A random vector of the structure of ``like``: the start of a Lanczos run, or a probe of a trace.

    Args:
      key: of the draw.
      like: arrays, of which only shapes and dtypes matter.
      distribution: standard normal, whose direction is uniform, or "signs", ±1 with even chances (Rademacher).

    Returns:
      A pytree of independent numbers, float32 or wider.
    """
    check_arrays("random_like", like)
    return _draw(key, widen(like), distribution)


_ONE = np.int32(0)  # the exponent of 1
_WIDTH = 1024  # numbers in a row of a cut vector


def cut(vector: Float[Array, " n"]) -> Float[Array, "rows width"]:
    """A flat vector in rows of up to 1024 numbers, the last one filled up with zeros.

    Matrix-vector products add in float32 one number after another, at least on a CPU, and over millions of them lose
    digits that orthogonality needs. In this form an inner product is a product for each row and a sum over the rows,
    which costs the same time and is accurate at any length.
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
    """The 2-norm of all numbers of an array; squares neither overflow nor vanish."""
    unit = power_of_two(jnp.max(jnp.abs(x), initial=0))
    return unit * jnp.linalg.norm((x / unit).ravel())


def power_of_two(x: Float[Array, ""]) -> Float[Array, ""]:
    """The power of two next to a number, by which one may scale without rounding; 1 for zero."""
    return jnp.ldexp(jnp.ones((), x.dtype), exponent_of(x))


def exponent_of(x: Float[Array, ""]) -> Int[Array, ""]:
    """The exponent of :func:`power_of_two`, kept from the ends of the range, so that its inverse is a number too."""
    farthest = jnp.finfo(x.dtype).maxexp - 28
    return jnp.clip(jnp.frexp(x)[1], -farthest, farthest)


def flatten(tree: PyTree) -> Float[Array, " n"]:
    """All numbers in the order of ``ravel_pytree``."""
    return ravel_pytree(widen(tree))[0]


def unflatten(like: PyTree, vector: Float[Array, " n"]) -> PyTree:
    """Inverse of :func:`flatten` for trees such as ``like``."""
    return ravel_pytree(widen(like))[1](vector)


def size_of(tree: PyTree) -> int:
    """How many numbers a tree holds."""
    return sum(x.size for x in jax.tree.leaves(tree))


def structure_of(tree: PyTree) -> tuple[Any, tuple[tuple[int, ...], ...]]:
    """Tree and shapes, to be compared and hashed."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple(jnp.shape(x) for x in leaves)


def check_arrays(what: str, tree: PyTree) -> None:
    """Raises a ValueError unless the tree holds numbers, all of them real and floating."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if not sum(getattr(x, "size", 1) for _, x in leaves):
        raise ValueError(f"{what} needs at least one parameter, got none: pass the parameters themselves.")
    for path, leaf in leaves:
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"{what} needs real floating-point numbers, {_name(path) or 'the array'} is {dtype}: leave it out "
                "with `only`, or let the loss close over it."
            )


def check_structure(what: str, got: PyTree, wanted: tuple[Any, tuple[tuple[int, ...], ...]]) -> None:
    """Raises a ValueError unless the tree has this structure, of :func:`structure_of`."""
    structure, shapes = structure_of(got)
    if structure != wanted[0]:
        raise ValueError(f"{what} needs a vector of the structure {wanted[0]}, got {structure}.")
    if shapes != wanted[1]:
        raise ValueError(f"{what} needs a vector of the shapes {_some(wanted[1])}, got {_some(shapes)}.")


def check_finite(what: str, *arrays: Array | np.ndarray) -> None:
    """Raises a ValueError on NaN or infinity; says nothing while a function is being compiled."""
    if all(map(is_known, arrays)) and not all(np.isfinite(x).all() for x in arrays):
        raise ValueError(
            f"{what} met a product that is not finite: look whether loss and gradient are finite at these parameters."
        )


def is_known(array: Any) -> bool:
    """Whether the numbers are there, rather than a stand-in for them while a function is being compiled."""
    return not isinstance(array, Tracer)


def choose_loop(loop: Loop | None, matvec: Matvec, like: PyTree, *trees: PyTree) -> Loop:
    """The loop asked for, or the faster one.

    That is the compiled one off the CPU, inside a compiled function, and for the convolutions of :mod:`kdjax.models`,
    of which it computes once what no vector changes.
    """
    if loop not in (None, "compiled", "host"):
        raise ValueError(f"loop needs to be 'compiled', 'host' or None, got {loop!r}.")
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
    """Whether a program has convolutions "plain", or "chosen" by platform, as those of :mod:`kdjax.models.layers`."""
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
    """A form that crosses the border of a jitted function: itself if it is a pytree, else constant there."""
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
    """:func:`multiply` called from Python: in one program if the function is a pytree, else as it is."""
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
    check_structure("matvec is to return what it takes, which", product, structure_of(like))
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


def _within(path: str, name: str) -> bool:
    return path == name or path.startswith(f"{name}/")


def _some(values: Sequence[Any]) -> str:
    shown = ", ".join(map(str, values[:6]))
    return f"{shown} and {len(values) - 6} more" if len(values) > 6 else shown
