"""How flat the loss is where training ended: sharpness, spectral density and loss surface of a trained network.

All three look at the cross-entropy on the same sample of images, without dropout and with stored batch statistics. They
are built once and called for every network that is to be compared::

    measure = flatness.make_measure(dataset)
    measure(student)["sharpness/filter_normalised"]
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kdjax import curvature, data, landscape, methods
from kdjax.models import Network
from kdjax.teacher import TrainedNetwork
from kdjax.types import Batch, ModelState, Params, Scalar

NORMALISED = "/filter_normalised"  # appended to the name of a measure
STEPS = 5  # of the search for the largest loss within a radius, from either end of the eigenvector


def make_measure(
    dataset: data.Dataset,
    *,
    num_images: int = 512,
    num_matvecs: int = 20,
    radius: float = 0.05,
) -> Callable[[TrainedNetwork], dict[str, float]]:
    r"""Builds a function that measures the curvature at the weights of a trained network.

    ``loss`` and ``gradient_norm`` stand alone: curvature falls with the loss by itself (Granziol), so compare networks
    of equal loss. The other measures come twice. Under their own name they belong to the Hessian H in the parameters,
    which can be made as sharp as one likes without changing the network (Dinh et al.). With ``/filter_normalised``
    appended they belong to D H D, the Hessian in coordinates in which every filter has norm 1
    (:func:`kdjax.landscape.filter_norms`): multiplying one layer by c and the next by 1/c, which ReLU does not notice,
    changes nothing in them.

    * ``lambda_max``, ``lambda_min``: the largest and smallest eigenvalue found by Lanczos, and with ``_residual`` how
      far at most a true eigenvalue lies.
    * ``trace`` by Hutch++, and ``trace_error``, its standard error.
    * ``sharpness``: the largest increase of the loss within a radius, as in SAM; filter-normalised, as in ASAM. It is
      the largest increase met by steps along the gradient on the sphere, from both ends of the top eigenvector: a lower
      bound.

    Args:
      dataset: after :func:`kdjax.data.split`.
      num_images: size of the sample of training images, the same for all networks.
      num_matvecs: Hessian-vector products for the eigenvalues, and as many for the trace; at least 6.
      radius: of the sharpness; filter-normalised, as a share of each filter's norm.

    Returns:
      ``trained -> {measure: value}``. It raises a ValueError if a loss or gradient is not finite.

    References:
      Dinh et al., `Sharp Minima Can Generalize For Deep Nets <https://arxiv.org/abs/1703.04933>`_, 2017. Granziol,
      `Flatness is a False Friend <https://arxiv.org/abs/2006.09091>`_, 2020. Foret et al., `Sharpness-Aware
      Minimization <https://arxiv.org/abs/2010.01412>`_, 2021, equation 1. Kwon et al., `ASAM
      <https://arxiv.org/abs/2102.11600>`_, 2021, section 3, by filters.
    """
    problem = _problem(dataset, num_images)

    def measure(trained: TrainedNetwork) -> dict[str, float]:
        loss, params, batch, state = problem(trained)
        value, slope = _slope(loss, params, batch, state)
        operator = curvature.hessian(loss, params, batch, state)
        norms = landscape.filter_norms(params)
        # Ones in the shapes of the norms, so that both kinds of measures are one program.
        kinds = {"": jax.tree.map(jnp.ones_like, norms), NORMALISED: norms}
        found = {"loss": value, "gradient_norm": optax.tree.norm(slope)}
        for kind, scales in kinds.items():
            matvec = jax.tree_util.Partial(_scaled, operator, scales)
            start = curvature.random_like(jax.random.key(0), params)
            ends = curvature.extreme_eigenpairs(matvec, start, num_matvecs=num_matvecs)
            trace = curvature.hutch_plus_plus(matvec, params, jax.random.key(1), num_matvecs=num_matvecs)
            top = jax.tree.map(lambda rows: rows[0], ends.top.vectors)
            highest = _highest(loss, params, scales, radius, top, batch, state)
            measures = {
                "lambda_max": ends.top.values[0],
                "lambda_max_residual": ends.top.residuals[0],
                "lambda_min": ends.bottom.values[0],
                "lambda_min_residual": ends.bottom.residuals[0],
                "trace": trace.estimate,
                "trace_error": trace.standard_error,
                "sharpness": highest - value,
            }
            found |= {name + kind: number for name, number in measures.items()}
        return {name: float(number) for name, number in found.items()}

    return measure


def make_density(
    dataset: data.Dataset,
    *,
    num_images: int = 512,
    num_matvecs: int = 60,
    num_probes: int = 4,
) -> Callable[[TrainedNetwork], dict[str, Any]]:
    """Builds a function that estimates the density of the Hessian's eigenvalues at the weights of a network.

    Args:
      dataset: as in :func:`make_measure`.
      num_images: size of the sample.
      num_matvecs: Hessian-vector products per probe; see :func:`kdjax.curvature.spectral_density`.
      num_probes: random starts, one line of the density each.

    Returns:
      ``trained -> {"grid": [...], "density": [one list per probe]}``.
    """
    problem = _problem(dataset, num_images)

    def measure(trained: TrainedNetwork) -> dict[str, Any]:
        loss, params, batch, state = problem(trained)
        matvec, key = curvature.hessian(loss, params, batch, state), jax.random.key(0)
        found = curvature.spectral_density(
            matvec, params, key, num_matvecs=num_matvecs, num_probes=num_probes
        )
        grid = found.grid[::4]  # as fine as a figure shows
        lines = curvature.smoothed(found.nodes, found.weights, grid, width=found.width)
        return {"grid": _digits(grid), "density": [_digits(line) for line in lines]}

    return measure


def make_surface(
    dataset: data.Dataset,
    *,
    num_images: int = 256,
    points: int = 25,
    radius: float = 1.0,
) -> Callable[[TrainedNetwork], dict[str, Any]]:
    """Builds a function that computes the loss over a plane through the weights of a network.

    The plane is spanned by two random filter-normalised directions, from the same draws for all networks, so that
    steps mean the same in each.

    Args:
      dataset: as in :func:`make_measure`.
      num_images: size of the sample.
      points: along each direction; odd, so that the weights themselves are one.
      radius: how far to go on both sides, as a share of each filter's norm.

    Returns:
      ``trained -> {"x": [...], "y": [...], "loss": [[one per y] per x]}``. It raises a ValueError if a loss is not
      finite.

    Raises:
      ValueError: if the points are even or fewer than 3.

    References:
      Li et al., `Visualizing the Loss Landscape of Neural Nets <https://arxiv.org/abs/1712.09913>`_, 2018, section 4.
    """
    if points < 3 or points % 2 == 0:
        raise ValueError(f"points must be odd and 3 or more, so that one is in the centre, got {points}.")
    problem = _problem(dataset, num_images)
    steps = np.arange(1 - points, points, 2) * radius / (points - 1)

    def measure(trained: TrainedNetwork) -> dict[str, Any]:
        loss, params, batch, state = problem(trained)
        directions = (landscape.random_direction(jax.random.key(seed), params) for seed in (0, 1))
        first, second = (landscape.filter_normalised(direction, params) for direction in directions)
        of_params = jax.tree_util.Partial(loss, batch=batch, model_state=state)
        with jax.default_matmul_precision("float32"):
            found = landscape.surface(of_params, params, first, second, xs=steps, ys=steps)
        if not np.isfinite(found).all():
            raise ValueError(
                f"a loss within a radius of {radius} around the weights is not finite: give a smaller one."
            )
        return {"x": _digits(steps), "y": _digits(steps), "loss": [_digits(row) for row in found]}

    return measure


def _problem(
    dataset: data.Dataset, num_images: int
) -> Callable[[TrainedNetwork], tuple[Any, Params, Batch, ModelState]]:
    """Network → its loss and arguments: the same images for all, normalised as each was trained."""
    ids = np.sort(np.random.default_rng(0).permutation(dataset.splits["train"])[:num_images])

    def of(trained: TrainedNetwork) -> tuple[Any, Params, Batch, ModelState]:
        images = data.normalise(jnp.asarray(dataset.images[ids]), **trained.normalisation._asdict())
        batch = {"image": images, "label": jnp.asarray(dataset.labels[ids])}
        # On one device, like the images.
        params, state = jax.device_put(jax.device_get(trained.weights), jax.local_devices()[0])
        return _loss_of(trained.network), params, batch, state

    return of


@functools.cache  # one function per network, so that its programs are compiled once
def _loss_of(network: Network) -> Callable[[Params, Batch, ModelState], jax.Array]:
    return curvature.evaluation_loss(
        network.apply, lambda outputs, batch: {"hard": methods.cross_entropy(outputs, batch)}
    )


def _scaled(operator: curvature.Operator, scales: Params, vector: Params) -> Params:
    """D H D v."""
    product = operator(jax.tree.map(jnp.multiply, scales, vector))
    return jax.tree.map(jnp.multiply, scales, product)


@functools.partial(jax.jit, static_argnums=0)
def _slope(loss: Any, params: Params, *arguments: Any) -> tuple[jax.Array, Params]:
    with jax.default_matmul_precision("float32"):
        return jax.value_and_grad(loss)(params, *arguments)


@functools.partial(jax.jit, static_argnums=0)
def _ahead(
    loss: Any, params: Params, scales: Params, radius: Scalar, direction: Params, *arguments: Any
) -> tuple[jax.Array, Params]:
    """Loss at a distance along a direction of the scaled coordinates, and its gradient in them."""
    length = radius / jnp.maximum(optax.tree.norm(direction), jnp.finfo(jnp.float32).tiny)
    moved = jax.tree.map(lambda p, scale, d: p + length * scale * d, params, scales, direction)
    value, slope = _slope(loss, moved, *arguments)
    return value, jax.tree.map(jnp.multiply, scales, slope)


def _highest(loss: Any, params: Params, scales: Params, radius: float, top: Params, *arguments: Any) -> float:
    """The highest loss met on the sphere around the parameters; for a convex loss every step goes up."""
    heights = []
    for sign in (1, -1):
        direction = jax.tree.map(lambda x: sign * x, top)  # noqa: B023
        for _ in range(STEPS):
            height, direction = _ahead(loss, params, scales, radius, direction, *arguments)
            heights.append(float(height))
    return max(heights)


def _digits(values: Any) -> list[float]:
    """Four significant digits of each number, for a smaller file."""
    return [float(f"{value:.4g}") for value in np.asarray(values).tolist()]
