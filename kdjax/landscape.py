r"""What the loss looks like around a point of parameter space, and how rough it is there.

A loss is any pure ``loss(params) -> scalar``, and params any pytree of floating-point arrays: freeze batch statistics
and the dropout key before. Directions are pytrees like params, an eigenvector of the Hessian as good as a random one.

* :func:`random_direction`, :func:`filter_normalised`, :func:`filter_norms`: where to go, in steps that mean the same
  for every network.
* :func:`line`, :func:`surface`: losses along one direction and over the plane of two.
* :func:`interpolate`: losses from one solution to another, and the height of the barrier between them.
* :func:`transects`, :func:`fractal_dimension`: losses on lines through a region, and the dimension of their graphs.

Losses come back as float64 NumPy arrays, so that what is subtracted afterwards loses nothing more. All points of a line
are computed in one compiled loop, one after the other, which holds one moved copy of the parameters however many there
are: several at a time are no faster on a CPU, where their convolutions become grouped ones, and a call from the host
for each is far slower with a tiny network.

One compiled program serves all calls with the same function and shapes. Give it its data as
``jax.tree_util.Partial(loss, batch)``, called as ``loss(batch, params)``: arrays that a function closes over are
compiled into the program as constants, which takes time, and are kept as long as it is.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from kdjax.types import Params

Loss: TypeAlias = Callable[[Params], Array]
"""A pure function of the parameters that returns one floating-point number."""

Steps: TypeAlias = Sequence[float] | np.ndarray | Array
"""How far to go along a direction, once for each loss; a direction's own length is 1."""

FEWEST_ULPS = 100.0
"""Mean size of the increments, in roundings of the loss, below which roughness is not told from rounding."""

_ORDERS = {"madogram": 1, "second_differences": 2}  # how often each estimator takes differences


class Interpolation(NamedTuple):
    """Losses on the segment between two solutions; see :func:`interpolate`."""

    positions: Float[np.ndarray, " points"]  # 0 at the first solution, 1 at the second
    losses: Float[np.ndarray, " points"]
    barrier: float  # largest height of the losses above the straight line between those of the ends


class Transects(NamedTuple):
    """Values of a function at equal distances along several lines."""

    values: Float[np.ndarray, "transects points"]
    spacing: float = 1.0  # distance of neighbouring points
    precision: float | None = None  # relative rounding of the values; None is that of their type


class Roughness(NamedTuple):
    """How rough a function is at a range of scales; see :func:`fractal_dimension`."""

    dimension: float  # of the graph along a line, 1 to 2; NaN where rounding would be measured
    standard_error: float  # of the mean over the transects; NaN for a single one
    exponent: float  # with which increments grow with distance, before it is cut to [0, 1]
    window: tuple[float, float]  # smallest and largest distance between the points compared
    ulps: float  # mean size of the smallest increments, in roundings of the value, where it is least
    transects: int


def random_direction(key: Key[Array, ""], params: Params) -> Params:
    """A normal number for every parameter, in float32.

    Args:
      key: of the draw.
      params: whose structure and shapes the direction has; floating-point arrays.

    Raises:
      ValueError: if an array does not hold floating-point numbers.
    """
    _check_floating("random_direction", params)
    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten(_normal(key, tuple(np.shape(leaf) for leaf in leaves)))


def filter_normalised(
    direction: Params, params: Params, *, vectors: Literal["zero", "scale"] = "zero"
) -> Params:
    r"""Gives every filter of a direction the norm of the same filter of the parameters.

    .. math:: d_f \leftarrow \frac{d_f}{\lVert d_f \rVert_2} \lVert \theta_f \rVert_2

    A filter is an index of the last axis of an array with two axes or more, as in the kernels of Flax: the incoming
    weights of one unit. A step of length t then changes every unit by the share t of itself, and surfaces of networks
    whose weights differ in size can be compared: one layer multiplied by c and the next by 1/c, which a ReLU network
    does not notice, change nothing in them. It is *not* invariant to a factor for each unit of a layer, since a filter
    of the next layer holds weights of all of them.

    Args:
      direction: any pytree like params, such as a random direction or an eigenvector; a filter that is zero stays so.
      params: the point to start from.
      vectors: what becomes of arrays with fewer than two axes, which are biases and the parameters of normalisation:
        "zero", as in the paper, holds them where they are; "scale" gives each as a whole the norm of its parameters.

    Returns:
      The direction, in float32 or wider. May be used under ``jax.jit``.

    Raises:
      ValueError: if the direction has not the structure and shapes of params, or all of it would be set to zero.

    References:
      Li et al., `Visualizing the Loss Landscape of Neural Nets <https://arxiv.org/abs/1712.09913>`_, 2018, section 4.
    """
    _check_like("filter_normalised", params, direction=direction)
    _check_filters("filter_normalised", params, vectors)
    return _with_norms(direction, params, vectors)


def filter_norms(params: Params, *, vectors: Literal["zero", "scale"] = "zero") -> Params:
    r"""Norms of all filters, as :func:`filter_normalised` means them.

    Times a vector they lead from coordinates in which every filter has norm 1 back to the parameters. With D the
    diagonal matrix of them, the Hessian in those coordinates is :math:`D H D`, which, as there, one layer multiplied
    by c and the next by 1/c does not change.

    Args:
      params: floating-point arrays.
      vectors: as for :func:`filter_normalised`; what "zero" holds has norm 0.

    Returns:
      Like params, each array of a shape that broadcasts to the parameter's: (1, ..., 1, units), or () for a vector; in
      float32 or wider.

    Raises:
      ValueError: if all of it would be zero.

    References:
      Li et al., `Visualizing the Loss Landscape of Neural Nets <https://arxiv.org/abs/1712.09913>`_, 2018, section 4.
    """
    _check_floating("filter_norms", params)
    _check_filters("filter_norms", params, vectors)
    return _all_norms(params, vectors)


def line(loss: Loss, params: Params, direction: Params, *, steps: Steps) -> Float[np.ndarray, " steps"]:
    """Losses at ``params + t * direction`` for every t of ``steps``.

    The sum is taken in float32 or wider and rounded to the type of the parameter: in bfloat16 a step below 1/256 of a
    parameter does not move it, so widen the parameters first if small steps matter.

    Args:
      loss: of the parameters.
      params: where t is 0.
      direction: as it is; see :func:`filter_normalised` for a length that can be compared between networks.
      steps: t, in any order.

    Returns:
      One loss per step, infinite or NaN where the loss is.

    Raises:
      ValueError: if the direction is zero or not like params, or the loss is not one floating-point number.

    Cost:
      One evaluation of the loss per step; the memory of a single one, and of two copies of the parameters.

    Examples:
      >>> line(lambda params: jnp.sum(params**2), jnp.ones(3), jnp.ones(3), steps=[-1.0, 0.0, 1.0]).tolist()
      [0.0, 3.0, 12.0]
    """
    steps = _distances("line", "steps", steps)
    _check_directions("line", params, direction=direction)
    return _on_host(_losses(_partial(loss), (params, direction), np.stack([np.ones_like(steps), steps], 1)))


def surface(
    loss: Loss, params: Params, first: Params, second: Params, *, xs: Steps, ys: Steps
) -> Float[np.ndarray, "xs ys"]:
    """Losses over a plane: entry [i, j] is the loss at ``params + xs[i] * first + ys[j] * second``.

    A row is one compiled loop, so a surface that takes too long can be interrupted between rows.

    Args:
      loss: of the parameters.
      params: where x and y are 0.
      first: direction of x, as in :func:`line`.
      second: direction of y; for a picture without shear, about orthogonal to the first, as random ones are.
      xs: steps along the first.
      ys: steps along the second.

    Returns:
      One loss per pair of steps, infinite or NaN where the loss is.

    Raises:
      ValueError: as :func:`line`.

    Cost:
      One evaluation of the loss per pair; the memory of a single one, and of three copies of the parameters.

    References:
      Li et al., `Visualizing the Loss Landscape of Neural Nets <https://arxiv.org/abs/1712.09913>`_, 2018: planes of
      two filter-normalised random directions.
    """
    xs, ys = _distances("surface", "xs", xs), _distances("surface", "ys", ys)
    _check_directions("surface", params, first=first, second=second)
    rows = (np.stack([np.ones_like(ys), np.full_like(ys, x), ys], 1) for x in xs)
    loss = _partial(loss)
    return np.stack([_on_host(_losses(loss, (params, first, second), row)) for row in rows])


def interpolate(loss: Loss, a: Params, b: Params, *, steps: int) -> Interpolation:
    r"""Losses on the straight way from one solution to another, and the height of the barrier between them.

    .. math:: \max_\alpha \; L((1 - \alpha) a + \alpha b) - [(1 - \alpha) L(a) + \alpha L(b)]

    Solutions without a barrier are linearly connected. Hidden units may be permuted without changing a network, so
    two independent trainings can lie apart for that reason alone.

    Args:
      loss: of the parameters.
      a: one solution.
      b: another with the same structure and shapes.
      steps: equal ones from a to b, so that steps + 1 losses are computed; a barrier narrower than one can be missed.

    Returns:
      The losses, both ends at exactly the given parameters, and the barrier: 0 or more, or NaN or infinite where a loss
      on the way is.

    Raises:
      ValueError: if the solutions do not match, there are fewer than two steps, or the loss of an end is not finite.

    Cost:
      steps + 1 evaluations of the loss; the memory of a single one, and of two copies of the parameters.

    References:
      Entezari et al., `The Role of Permutation Invariance in Linear Mode Connectivity of Neural Networks
      <https://arxiv.org/abs/2110.06296>`_, 2022, section 2. Frankle et al., `Linear Mode Connectivity and the Lottery
      Ticket Hypothesis <https://arxiv.org/abs/1912.05671>`_, 2020, section 2, measure from the mean of the two ends,
      which is the same height where they are equally low.
    """
    if steps < 2:
        raise ValueError(f"interpolate needs 2 steps or more, to look between the ends, got {steps}.")
    _check_like("interpolate", a, b=b)
    positions = np.linspace(0, 1, steps + 1)
    losses = _on_host(_losses(_partial(loss), (a, b), np.stack([1 - positions, positions], 1)))
    if not np.isfinite(losses[[0, -1]]).all():
        raise ValueError(
            f"interpolate needs a finite loss at both ends, got {losses[0]} and {losses[-1]}: "
            "compare solutions that have not diverged."
        )
    heights = losses - ((1 - positions) * losses[0] + positions * losses[-1])
    return Interpolation(positions, losses, float(np.max(heights)))


def transects(
    loss: Loss,
    params: Params,
    key: Key[Array, ""],
    *,
    radius: float,
    count: int,
    points: int,
    vectors: Literal["zero", "scale"] = "zero",
) -> Transects:
    """Losses on lines through ``params`` in random filter-normalised directions, for :func:`fractal_dimension`.

    For other directions, or lines through other points, stack what :func:`line` returns into a :class:`Transects`.

    Args:
      loss: of the parameters; a deterministic one, since noise has dimension 2.
      params: in the middle of every line.
      key: of the directions.
      radius: how far to go on both sides, as a share of each filter's own norm.
      count: of lines; the standard error falls with its root.
      points: on each, both ends included.
      vectors: of :func:`filter_normalised`.

    Returns:
      The losses, their spacing, and as precision the rounding of the loss's type or of the parameters', whichever is
      coarser. It does not know of products that a device rounds further, as GPUs and TPUs may: call it there under
      ``jax.default_matmul_precision("float32")``.

    Raises:
      ValueError: if there is nothing to move or measure, or the loss is not one floating-point number.

    Cost:
      count · points evaluations of the loss; the memory of a single one, and of a few copies of the parameters.
    """
    if not radius > 0 or count < 1 or points < 2:
        raise ValueError(
            "transects needs a radius above 0, one line and two points at least, "
            f"got radius={radius}, count={count}, points={points}."
        )
    _check_floating("transects", params)
    steps = np.linspace(-radius, radius, points)
    coefficients = np.stack([np.ones_like(steps), steps], 1)
    loss, found = _partial(loss), []
    for i in range(count):
        direction = random_direction(jax.random.fold_in(key, i), params)
        direction = filter_normalised(direction, params, vectors=vectors)
        if i == 0:
            _check_directions("transects", params, direction=direction)
        found.append(_losses(loss, (params, direction), coefficients))
    types = [jnp.result_type(x) for x in (found[0], *jax.tree.leaves(params))]
    precision = max(float(jnp.finfo(dtype).eps) for dtype in types)
    return Transects(np.stack([_on_host(losses) for losses in found]), steps[1] - steps[0], precision)


def fractal_dimension(
    sampled: Transects,
    *,
    lags: Sequence[int],
    estimator: Literal["madogram", "second_differences"] = "madogram",
) -> Roughness:
    r"""Dimension of a function's graph along lines, from how its increments grow with distance.

    The mean increment over a distance h grows as :math:`h^H` at the scales looked at. The graph has the dimension
    :math:`D = 2 - H`: 1 for anything smooth, kinks included, 1.5 for a Brownian path, 2 for noise. H is the slope of a
    least-squares line through the logarithms, for each transect, averaged over them.

    * ``"madogram"``: :math:`\mathrm{E}|f(x + h) - f(x)|`. A trend hides roughness that is smaller than it.
    * ``"second_differences"``: :math:`\mathrm{E}|f(x + h) - 2 f(x) + f(x - h)|`. A straight trend, which a loss has
      wherever its gradient is not zero, cancels, so that roughness on a slope is still seen. The exponent goes up to
      2, where the function is smooth at these scales.

    Both are right to .05 for Weierstrass functions on 1025 points with lags 1 to 16 (tested); on few points errors are
    larger. Counting boxes is biased low at the same scales, and so not offered.

    **What it does not say.** The loss of a differentiable network has D → 1 as the scales shrink, so a dimension means
    nothing without its window; compare at the same one, and with a parabola. Rounding is noise, of dimension 2: mean
    increments must be 100 roundings of the loss or more, or the answer is NaN, and ``ulps`` says how many they are
    (take larger lags or a larger radius, or compute the loss in float64). The dimensions of training trajectories
    followed hyperparameters more than they did generalisation (Tan et al.).

    Args:
      sampled: values at equal distances.
      lags: the scales, as whole numbers of points from small to large, such as (1, 2, 4, 8) on 257 points.
      estimator: one of the above. Both on the same values, when they agree, are better evidence than one.

    Raises:
      ValueError: with a value that is not finite, fewer than two lags, or fewer points than they need.

    Cost:
      On the host, O(values · lags).

    References:
      Gneiting, Ševčíková, Percival, `Estimators of Fractal Dimension: Assessing the Roughness of Time Series and
      Spatial Data <https://arxiv.org/abs/1101.1444>`_, 2012, who recommend the madogram and show that counting
      boxes is biased. Kent, Wood, Estimating the Fractal Dimension of a Locally Self-similar Gaussian Process by using
      Increments, 1997, for second differences; theirs are squared, ours absolute, which outliers disturb less. Tan et
      al., `On the Limitations of Fractal Dimension as a Measure of Generalization
      <https://arxiv.org/abs/2406.02234>`_, 2024.

    Examples:
      >>> values = np.sin(np.linspace(0, 6, 65))[None]
      >>> round(fractal_dimension(Transects(values, spacing=6 / 64), lags=(1, 2, 4)).dimension, 1)
      1.0
    """
    if estimator not in _ORDERS:
        raise ValueError(f"estimator must be 'madogram' or 'second_differences', got {estimator!r}.")
    order = _ORDERS[estimator]
    values = _checked_values(sampled, lags, order)
    sizes = np.stack([_increments(values, lag, order) for lag in lags], axis=1)
    # Not of each value: one near zero is the sum of larger ones, and as inexact as they are.
    rounding = _precision(sampled) * np.max(np.abs(values), axis=1)
    ulps = float(np.min(np.min(sizes, axis=1) / np.maximum(rounding, np.finfo(np.float64).tiny)))
    window = (lags[0] * float(sampled.spacing), lags[-1] * float(sampled.spacing))
    if ulps < FEWEST_ULPS:
        return Roughness(np.nan, np.nan, np.nan, window, ulps, len(values))
    x = np.log(lags) - np.mean(np.log(lags))
    exponents = np.log(sizes) @ x / np.sum(x**2)
    exponent = float(np.mean(exponents))
    error = float(np.std(exponents, ddof=1) / len(values) ** 0.5) if len(values) > 1 else np.nan
    return Roughness(2 - min(max(exponent, 0.0), 1.0), error, exponent, window, ulps, len(values))


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


# These are compiled as a whole, since every operation on every array would else be compiled by itself.
@functools.partial(jax.jit, static_argnums=1)
def _normal(key: Array, shapes: tuple[tuple[int, ...], ...]) -> list[Array]:
    """Normal numbers in these shapes, from one draw cut up, since a draw of each would take long to compile."""
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    parts = jnp.split(jax.random.normal(key, (ends[-1],), jnp.float32), ends[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


@functools.partial(jax.jit, static_argnums=2)
def _with_norms(directions: Params, params: Params, vectors: str) -> Params:
    """The directions with the norms of the parameters, filter by filter."""

    def normalise(direction, param):
        norm = _norms(direction, "scale")
        return _wide(direction) * (_norms(param, vectors) / jnp.where(norm > 0, norm, 1))

    return jax.tree.map(normalise, directions, params)


def _norms(array: Array, vectors: str) -> Array:
    """The norm of each filter of an array."""
    array = _wide(array)
    if array.ndim < 2 and vectors == "zero":
        return jnp.zeros((), array.dtype)
    axes = tuple(range(array.ndim - 1)) if array.ndim > 1 else None
    return jnp.sqrt(jnp.sum(array**2, axis=axes, keepdims=array.ndim > 1))


@functools.partial(jax.jit, static_argnums=1)
def _all_norms(params: Params, vectors: str) -> Params:
    return jax.tree.map(functools.partial(_norms, vectors=vectors), params)


def _partial(loss: Loss) -> jax.tree_util.Partial:
    """The loss as a pytree, whose arrays are arguments of the compiled program and whose function is its name."""
    return loss if isinstance(loss, jax.tree_util.Partial) else jax.tree_util.Partial(loss)


def _wide(x) -> Array:
    """In float32, or float64 where it is."""
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


def _on_host(losses: Array) -> np.ndarray:
    return np.asarray(losses).astype(np.float64)


def _increments(values: np.ndarray, lag: int, order: int) -> np.ndarray:
    """Mean absolute difference of the given order over a distance, for each transect."""
    for _ in range(order):
        values = values[:, lag:] - values[:, :-lag]
    return np.mean(np.abs(values), axis=1)


def _precision(sampled: Transects) -> float:
    if sampled.precision is not None:
        return sampled.precision
    dtype = np.asarray(sampled.values).dtype
    return float(jnp.finfo(dtype if jnp.issubdtype(dtype, jnp.floating) else np.float64).eps)


def _distances(function: str, name: str, steps: Steps) -> np.ndarray:
    steps = np.asarray(steps, np.float64)
    if steps.ndim != 1 or steps.size == 0 or not np.isfinite(steps).all():
        raise ValueError(
            f"{function} needs {name} as a flat list of finite numbers, got shape {steps.shape}; "
            "np.linspace(-1, 1, 51) is usual."
        )
    return steps


def _checked_values(sampled: Transects, lags: Sequence[int], order: int) -> np.ndarray:
    """The values in float64, if the lags can be measured on them."""
    if len(lags) < 2 or lags[0] < 1 or any(b <= a for a, b in itertools.pairwise(lags)):
        raise ValueError(
            f"lags must be two or more rising whole numbers from 1, such as (1, 2, 4), got {lags}."
        )
    values = np.asarray(sampled.values).astype(np.float64)
    if values.ndim != 2 or not len(values):
        raise ValueError(
            f"values must have shape [transects, points], got {values.shape}: write values[None] for one transect."
        )
    fewest = order * lags[-1] + 1
    if values.shape[1] < fewest:
        raise ValueError(
            f"a lag of {lags[-1]} needs {fewest} points or more with this estimator, got {values.shape[1]}: "
            "sample more of them, or leave out large lags."
        )
    if not np.isfinite(values).all():
        raise ValueError(
            "a dimension needs finite losses, and some here are not: sample within a smaller radius."
        )
    return values


def _check_floating(function: str, params: Params) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError(
            f"{function} needs params with an array in them, got none: pass what is to be moved."
        )
    for path, leaf in leaves:
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"{function} moves floating-point arrays only, and params{jax.tree_util.keystr(path)} is {dtype}: "
                "leave it out of params and let the loss close over it."
            )


def _check_filters(function: str, params: Params, vectors: str) -> None:
    if vectors not in ("zero", "scale"):
        raise ValueError(f"vectors must be 'zero' or 'scale', got {vectors!r}.")
    if vectors == "zero" and all(np.ndim(leaf) < 2 for leaf in jax.tree.leaves(params)):
        raise ValueError(
            f"{function} finds no array of two axes or more in params, so nothing would move: "
            "pass vectors='scale'."
        )


def _check_like(function: str, params: Params, **others: Params) -> None:
    """Raises unless the other pytrees have the structure and shapes of the parameters."""
    _check_floating(function, params)
    for name, other in others.items():
        if jax.tree.structure(other) != jax.tree.structure(params):
            raise ValueError(
                f"{function} needs {name} as a pytree of the same structure as the parameters: "
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
            raise ValueError(
                f"{function} would stay where it is, since {name} is zero: pass one from random_direction, and "
                "vectors='scale' to filter_normalised if only vectors are to move."
            )
