r"""Loss landscapes: the loss along lines and over planes through a point of parameter space.

A loss is any pure ``loss(params) -> scalar``, and params any pytree of floating-point arrays. Freeze BatchNorm
statistics and the dropout key first. Directions are pytrees like params, such as random ones or eigenvectors of the
Hessian.

* :func:`random_direction`, :func:`filter_normalised`, :func:`filter_norms`: directions whose length means the same for
  every network.
* :func:`line`, :func:`surface`: losses along one direction, and over the plane of two.

Losses are returned as float64 NumPy arrays. All points of a line are computed one after another in a compiled loop that
holds a single moved copy of the parameters. Several at a time are no faster on a CPU, where their convolutions become
grouped ones, and one call per point is far slower for small networks.

One compiled program serves all calls with the same function and shapes. Pass data as
``jax.tree_util.Partial(loss, batch)``, called as ``loss(batch, params)``: arrays in a closure are compiled into the
program as constants, which is slow and keeps them in memory.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from kdjax.types import Params

Loss: TypeAlias = Callable[[Params], Array]
"""A pure function of the parameters that returns one floating-point number."""

Steps: TypeAlias = Sequence[float] | np.ndarray | Array
"""Multiples of a direction, one for each loss."""


def random_direction(key: Key[Array, ""], params: Params) -> Params:
    """A standard normal number for every parameter, in float32.

    Args:
      key: for the draw.
      params: floating-point arrays, for their structure and shapes.

    Raises:
      ValueError: if an array does not hold floating-point numbers.
    """
    _check_floating("random_direction", params)
    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten(_normal(key, tuple(np.shape(leaf) for leaf in leaves)))


def filter_normalised(direction: Params, params: Params) -> Params:
    r"""Scales every filter of a direction to the norm of the same filter of the parameters.

    .. math:: d_f \leftarrow \frac{d_f}{\lVert d_f \rVert_2} \lVert \theta_f \rVert_2

    A filter is an index of the last axis of an array with two axes or more, as in the kernels of Flax: the incoming
    weights of one unit. A step of length t then changes every unit by the share t of itself, so surfaces of networks
    with weights of different sizes can be compared. Scaling one layer by c and the next by 1/c, which does not change a
    ReLU network, does not change its surface. The surface is *not* invariant to a factor for each unit, since a filter
    of the next layer holds weights of all of them. Arrays with fewer than two axes (biases, normalisation) do not move,
    as in the paper.

    Args:
      direction: pytree like params, such as a random direction or an eigenvector; zero filters stay zero.
      params: the centre of the line or surface.

    Returns:
      The direction, in float32 or wider. Works under ``jax.jit``.

    Raises:
      ValueError: if the direction does not match params, or no array has two axes.

    References:
      Li et al., `Visualizing the Loss Landscape of Neural Nets <https://arxiv.org/abs/1712.09913>`_, 2018, section 4.
    """
    _check_like("filter_normalised", params, direction=direction)
    _check_filters("filter_normalised", params)
    return _with_norms(direction, params)


def filter_norms(params: Params) -> Params:
    r"""Norms of all filters, as in :func:`filter_normalised`.

    Multiplied by a vector, they map coordinates in which every filter has norm 1 back to the parameters. With D the
    diagonal matrix of them, the Hessian in those coordinates is :math:`D H D`. It has the same invariance to scaled
    layers.

    Args:
      params: floating-point arrays.

    Returns:
      Like params, in float32 or wider; each array broadcasts to the parameter's shape: (1, ..., 1, units), or () and
      zero for an array with fewer than two axes.

    Raises:
      ValueError: if no array has two axes.

    References:
      Li et al., `Visualizing the Loss Landscape of Neural Nets <https://arxiv.org/abs/1712.09913>`_, 2018, section 4.
    """
    _check_floating("filter_norms", params)
    _check_filters("filter_norms", params)
    return _all_norms(params)


def line(loss: Loss, params: Params, direction: Params, *, steps: Steps) -> Float[np.ndarray, " steps"]:
    """Losses at ``params + t * direction`` for every t of ``steps``.

    The sum is computed in float32 or wider and rounded to the parameter's dtype. In bfloat16, a step below 1/256 of a
    parameter does not move it: widen the parameters first if small steps matter.

    Args:
      loss: of the parameters.
      params: the point at t = 0.
      direction: used as it is; see :func:`filter_normalised` for lengths that can be compared between networks.
      steps: t, in any order.

    Returns:
      One loss per step, infinite or NaN where the loss is.

    Raises:
      ValueError: if the direction is zero or does not match params, or the loss is not one floating-point number.

    Cost:
      One evaluation of the loss per step; the memory of one, and of two copies of the parameters.

    Examples:
      >>> line(lambda params: jnp.sum(params**2), jnp.ones(3), jnp.ones(3), steps=[-1.0, 0.0, 1.0]).tolist()
      [0.0, 3.0, 12.0]
    """
    steps = _checked_steps("line", "steps", steps)
    _check_directions("line", params, direction=direction)
    return _on_host(_losses(_partial(loss), (params, direction), np.stack([np.ones_like(steps), steps], 1)))


def surface(
    loss: Loss, params: Params, first: Params, second: Params, *, xs: Steps, ys: Steps
) -> Float[np.ndarray, "xs ys"]:
    """Losses over a plane: entry [i, j] is the loss at ``params + xs[i] * first + ys[j] * second``.

    Each row is one compiled loop, so a long computation can be interrupted between rows.

    Args:
      loss: of the parameters.
      params: the point at x = y = 0.
      first: direction of x, as in :func:`line`.
      second: direction of y; roughly orthogonal to the first for an undistorted picture, as random directions are.
      xs: steps along the first.
      ys: steps along the second.

    Returns:
      One loss per pair of steps, infinite or NaN where the loss is.

    Raises:
      ValueError: as :func:`line`.

    Cost:
      One evaluation of the loss per pair; the memory of one, and of three copies of the parameters.

    References:
      Li et al., `Visualizing the Loss Landscape of Neural Nets <https://arxiv.org/abs/1712.09913>`_, 2018: planes of
      two filter-normalised random directions.
    """
    xs, ys = _checked_steps("surface", "xs", xs), _checked_steps("surface", "ys", ys)
    _check_directions("surface", params, first=first, second=second)
    rows = (np.stack([np.ones_like(ys), np.full_like(ys, x), ys], 1) for x in xs)
    loss = _partial(loss)
    return np.stack([_on_host(_losses(loss, (params, first, second), row)) for row in rows])


@jax.jit
def _losses(loss: jax.tree_util.Partial, trees: tuple[Params, ...], coefficients: Array) -> Array:
    """Losses at linear combinations of pytrees, one for each row of coefficients."""

    def combine(weights, *leaves):
        wide = [_wide(leaf) for leaf in leaves]
        total = sum(w.astype(x.dtype) * x for w, x in zip(weights, wide, strict=True))
        return jnp.asarray(total).astype(jnp.result_type(leaves[0]))

    def at(weights):
        value = jnp.asarray(loss(jax.tree.map(lambda *leaves: combine(weights, *leaves), *trees)))
        if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(
                f"the loss must be one floating-point number, got {value.dtype} of shape {value.shape}: "
                "reduce it with jnp.mean."
            )
        return value

    return jax.lax.map(at, coefficients)


# Compiled as wholes; otherwise every operation on every array would be compiled by itself.
@functools.partial(jax.jit, static_argnums=1)
def _normal(key: Array, shapes: tuple[tuple[int, ...], ...]) -> list[Array]:
    """Normal arrays of these shapes, cut from one draw, since a draw for each would be slow to compile."""
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    parts = jnp.split(jax.random.normal(key, (ends[-1],), jnp.float32), ends[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


@jax.jit
def _with_norms(directions: Params, params: Params) -> Params:
    """The directions with the norms of the parameters, filter by filter."""

    def normalise(direction, param):
        norm = _norms(direction)
        return _wide(direction) * (_norms(param) / jnp.where(norm > 0, norm, 1))

    return jax.tree.map(normalise, directions, params)


def _norms(array: Array) -> Array:
    """The norm of each filter of an array; zero for an array with fewer than two axes."""
    array = _wide(array)
    if array.ndim < 2:
        return jnp.zeros((), array.dtype)
    return jnp.sqrt(jnp.sum(array**2, axis=tuple(range(array.ndim - 1)), keepdims=True))


@jax.jit
def _all_norms(params: Params) -> Params:
    return jax.tree.map(_norms, params)


def _partial(loss: Loss) -> jax.tree_util.Partial:
    """The loss as a pytree: its arrays become arguments of the compiled program, its function the cache key."""
    return loss if isinstance(loss, jax.tree_util.Partial) else jax.tree_util.Partial(loss)


def _wide(x) -> Array:
    """In float32, or in float64 if x is."""
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


def _on_host(losses: Array) -> np.ndarray:
    return np.asarray(losses).astype(np.float64)


def _checked_steps(function: str, name: str, steps: Steps) -> np.ndarray:
    steps = np.asarray(steps, np.float64)
    if steps.ndim != 1 or steps.size == 0 or not np.isfinite(steps).all():
        raise ValueError(
            f"{function} needs {name} as a flat list of finite numbers, got shape {steps.shape}; "
            "np.linspace(-1, 1, 51) is usual."
        )
    return steps


def _check_floating(function: str, params: Params) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError(f"{function} needs params with at least one array, got none.")
    for path, leaf in leaves:
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"{function} needs floating-point arrays, but params{jax.tree_util.keystr(path)} is {dtype}: "
                "leave it out of params and let the loss close over it."
            )


def _check_filters(function: str, params: Params) -> None:
    if all(np.ndim(leaf) < 2 for leaf in jax.tree.leaves(params)):
        raise ValueError(f"{function} needs an array of two axes or more in params, got none.")


def _check_like(function: str, params: Params, **others: Params) -> None:
    """Raises a ValueError unless the other pytrees have the structure and shapes of the parameters."""
    _check_floating(function, params)
    for name, other in others.items():
        if jax.tree.structure(other) != jax.tree.structure(params):
            raise ValueError(
                f"{function} needs {name} as a pytree with the structure of the parameters: "
                "build it with jax.tree.map over them, or with random_direction."
            )
        pairs = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(other), strict=True)
        for (path, leaf), got in pairs:
            if np.shape(leaf) != np.shape(got):
                raise ValueError(
                    f"{function} needs {name}{jax.tree_util.keystr(path)} of shape {np.shape(leaf)} like the "
                    f"parameter, got {np.shape(got)}: build it from the same parameters."
                )


def _check_directions(function: str, params: Params, **directions: Params) -> None:
    _check_like(function, params, **directions)
    for name, direction in directions.items():
        if not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(direction)):
            raise ValueError(f"{function} needs a non-zero {name}, got zeros: use random_direction.")
