"""How flat the loss is where training ended, in the parameters and in units of their filters, and what lies around."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common.assessing import Arms, kept, normalisation_of, of_every_run
from experiments.common.objectives import scratch
from experiments.common.tasks import Task
from experiments.common.teachers import Teacher
from experiments.common.training import Trained
from kdjax import curvature, data, landscape, models
from kdjax.types import Batch, ModelState, Params

NORMALISED = "/filter_normalised"  # behind the name of a measure
STEPS = 5  # to the largest increase of the loss within a radius, from either end of the eigenvector


def flatness_of(
    task: Task,
    arms: Arms,
    directory: Path,
    *,
    split: str = "train",
    num_images: int = 512,
    num_matvecs: int = 20,
    radius: float = 0.05,
) -> dict[str, dict[str, list[float]]]:
    r"""Curvature of the cross-entropy at the final weights of every run of every arm, on the same images for all.

    Dropout is off and batch statistics are frozen. Two measures stand alone: ``loss`` and ``gradient_norm``. Curvature
    falls with the loss by itself (Granziol), so runs are to be compared at equal loss. The others come twice. As they
    are called they belong to the Hessian H in the parameters, which can be made as sharp as one likes without changing
    the network (Dinh et al.). With ``/filter_normalised`` behind their name they belong to D H D, the Hessian in
    coordinates where every filter has norm 1 (:func:`kdjax.landscape.filter_norms`; vectors are held): one layer
    multiplied by c and the next by 1/c, which ReLU does not notice, change nothing in them.

    * ``lambda_max``, ``lambda_min``: the largest and the smallest eigenvalue that Lanczos' method finds, and with
      ``_residual`` behind it how far at most a true one lies.
    * ``trace`` by Hutch++, and ``trace_error``, its standard error.
    * ``sharpness``: the largest increase of the loss within a radius, as SAM has it; filter-normalised, as ASAM. It is
      the largest met by steps along the gradient to the sphere, from both ends of the top eigenvector: a lower bound.

    Args:
      task: whose images they are.
      arms: arm → finished runs; those of one network share their compiled programs.
      directory: where each run's numbers are kept; they are not computed again for equal weights and options.
      split: the images; the same sample of it for all runs.
      num_images: of that sample, or all of the split if it has fewer.
      num_matvecs: Hessian-vector products for the eigenvalues, and as many for the trace; at least 6.
      radius: of the sharpness, SAM's own; filter-normalised, each filter's part of it is a share of its norm.

    Returns:
      Arm → measure → one number per run, the field ``flatness`` of a result.

    Raises:
      ValueError: if a loss or gradient is not finite.

    References:
      Dinh et al., `Sharp Minima Can Generalize For Deep Nets <https://arxiv.org/abs/1703.04933>`_, 2017. Granziol,
      `Flatness is a False Friend <https://arxiv.org/abs/2006.09091>`_, 2020. Foret et al., `Sharpness-Aware
      Minimization <https://arxiv.org/abs/2010.01412>`_, 2021, equation 1. Kwon et al., `ASAM
      <https://arxiv.org/abs/2102.11600>`_, 2021, section 3, by filters.
    """
    options = (task.fingerprint, split, num_images, num_matvecs, radius)
    problem = _problem(task, split, num_images)

    def measure(run: Trained | Teacher) -> dict[str, float]:
        loss, params, batch, state = problem(run)
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

    return of_every_run(arms, directory, options, measure, label="flatness")


def densities_of(
    task: Task,
    arms: Arms,
    directory: Path,
    *,
    split: str = "train",
    num_images: int = 512,
    num_matvecs: int = 60,
    num_probes: int = 4,
) -> dict[str, dict[str, Any]]:
    """Density of the eigenvalues of the Hessian of :func:`flatness_of`, at the final weights of each arm's first run.

    Args:
      task: as there, and so on up to ``num_images``.
      arms: arm → finished runs.
      directory: where it is kept; another one than that of the flatness.
      split: the images.
      num_images: of the sample.
      num_matvecs: Hessian-vector products per probe; see :func:`kdjax.curvature.spectral_density`.
      num_probes: random starts, each a line of the density.

    Returns:
      Arm → ``{"grid": [...], "density": [one list per probe]}``, the field ``densities`` of a result.
    """
    options = (task.fingerprint, split, num_images, num_matvecs, num_probes)
    problem = _problem(task, split, num_images)

    def measure(run: Trained | Teacher) -> dict[str, Any]:
        loss, params, batch, state = problem(run)
        matvec, key = curvature.hessian(loss, params, batch, state), jax.random.key(0)
        found = curvature.spectral_density(
            matvec, params, key, num_matvecs=num_matvecs, num_probes=num_probes
        )
        grid = found.grid[::4]  # as much as a figure shows
        lines = curvature.smoothed(found.nodes, found.weights, grid, width=found.width)
        return {"grid": _digits(grid), "density": [_digits(line) for line in lines]}

    return {arm: kept(directory / arm / "0.json", runs[0], options, measure) for arm, runs in arms.items()}


def surfaces_of(
    task: Task,
    arms: Arms,
    directory: Path,
    *,
    split: str = "train",
    num_images: int = 256,
    points: int = 25,
    radius: float = 1.0,
) -> dict[str, dict[str, Any]]:
    """The loss of :func:`flatness_of` over a plane through the final weights of each arm's first run.

    The plane is that of two random filter-normalised directions, from the same draws for all arms, so that steps mean
    the same in each; eigenvectors of the Hessian are other ones for each arm, and none any more once normalised.

    Args:
      task: as there, and so on up to ``num_images``.
      arms: arm → finished runs.
      directory: where it is kept; another one than those of the flatness and the densities.
      split: the images.
      num_images: of the sample.
      points: along each direction; odd, so that the weights themselves are one.
      radius: how far to go on both sides, as a share of each filter's own norm.

    Returns:
      Arm → ``{"x": [...], "y": [...], "loss": [[one per y] per x]}``, the field ``surfaces`` of a result.

    Raises:
      ValueError: if the points are even or fewer than 3, or a loss is not finite.

    References:
      Li et al., `Visualizing the Loss Landscape of Neural Nets <https://arxiv.org/abs/1712.09913>`_, 2018, section 4.
    """
    if points < 3 or points % 2 == 0:
        raise ValueError(f"points must be odd and 3 or more, so that one is in the centre, got {points}.")
    options = (task.fingerprint, split, num_images, points, radius)
    problem = _problem(task, split, num_images)
    steps = np.arange(1 - points, points, 2) * radius / (points - 1)

    def measure(run: Trained | Teacher) -> dict[str, Any]:
        loss, params, batch, state = problem(run)
        directions = (landscape.random_direction(jax.random.key(seed), params) for seed in (0, 1))
        first, second = (landscape.filter_normalised(direction, params) for direction in directions)
        of_params = jax.tree_util.Partial(loss, batch=batch, model_state=state)
        with jax.default_matmul_precision("float32"):
            found = landscape.surface(of_params, params, first, second, xs=steps, ys=steps)
        if not np.isfinite(found).all():
            raise ValueError(
                f"a loss within a radius of {radius} around the final weights is not finite: give a smaller one."
            )
        return {"x": _digits(steps), "y": _digits(steps), "loss": [_digits(row) for row in found]}

    return {arm: kept(directory / arm / "0.json", runs[0], options, measure) for arm, runs in arms.items()}


def _problem(
    task: Task, split: str, num_images: int
) -> Callable[[Trained | Teacher], tuple[Any, Params, Batch, ModelState]]:
    """Run → its loss, and what that takes: the same images for all, normalised as each network wants them."""
    ids = np.sort(np.random.default_rng(0).permutation(task.split[split])[:num_images])

    def of(run: Trained | Teacher) -> tuple[Any, Params, Batch, ModelState]:
        mean, std = normalisation_of(task, run)
        images = data.normalise(jnp.asarray(task.source.images[ids]), mean=mean, std=std)
        batch = {"image": images, "label": jnp.asarray(task.source.labels[ids])}
        # On one device, like the images.
        params, state = jax.device_put(jax.device_get(run.weights), jax.local_devices()[0])
        return _loss_of(run.module), params, batch, state

    return of


@functools.cache  # the same function for all runs, so that their programs are compiled once
def _loss_of(module: Any) -> Callable[[Params, Batch, ModelState], jax.Array]:
    return curvature.evaluation_loss(models.apply_fn(module), scratch)


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
    loss: Any, params: Params, scales: Params, radius: float, direction: Params, *arguments: Any
) -> tuple[jax.Array, Params]:
    """Loss at a distance along a direction of the scaled coordinates, and the gradient in them there."""
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
    """Four of each number, for a smaller file."""
    return [float(f"{value:.4g}") for value in np.asarray(values).tolist()]
