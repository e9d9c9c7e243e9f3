"""Baselines for SPRKD: two optimisers that leave saddles without a teacher."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from kdjax import curvature
from kdjax.curvature.krylov import ritz
from kdjax.curvature.vectors import flatten, norm, size_of, unflatten, widen
from kdjax.transforms._utils import (
    Draws,
    cast_like,
    check_params,
    check_positive,
    hessian_at,
    matvecs,
    nan,
    rate_at,
    require_loss,
    scaled,
    static_sizes,
    transformation,
    zero_count,
)
from kdjax.types import Params, Scalar


class PerturbedGradientState(NamedTuple):
    """State of :func:`perturbed_gradient_descent`."""

    count: jax.Array  # int32[], updates seen
    key: jax.Array  # uint32[...], raw
    wait: jax.Array  # int32[], updates until the next perturbation is allowed
    perturbations: jax.Array  # int32[], perturbations so far


def perturbed_gradient_descent(
    learning_rate: optax.ScalarOrSchedule,
    *,
    key: Array | int,
    radius: Scalar = 0.01,
    max_gradient_norm: Scalar = 0.02,
    wait: int | Array = 20,
) -> optax.GradientTransformationExtraArgs:
    r"""Gradient descent that jumps to a random nearby point where the gradient is small, and then waits.

    The jump is uniform in a ball and takes the place of one update. The paper also stops when the loss has hardly
    fallen after a wait; here the caller decides when to stop.

    Args:
      learning_rate: :math:`\eta`, or a schedule of it over updates.
      key: for the jumps.
      radius: r, absolute radius of the ball.
      max_gradient_norm: :math:`g_{thres}`, the gradient norm at or below which it jumps.
      wait: :math:`t_{thres}`, least number of updates between two jumps.

    Returns:
      A transformation that takes gradients and applies the learning rate itself.

    Raises:
      ValueError: if an option is out of range, or parameters are not floating.

    References:
      Jin et al., `How to Escape Saddle Points Efficiently <https://arxiv.org/abs/1703.00887>`_, 2017, algorithm 2.
    """
    check_positive("perturbed_gradient_descent", learning_rate=learning_rate, radius=radius)
    check_positive("perturbed_gradient_descent", zero=True, max_gradient_norm=max_gradient_norm, wait=wait)
    draws = Draws(key)

    def init(params: Params) -> PerturbedGradientState:
        check_params("perturbed_gradient_descent", params)
        return PerturbedGradientState(zero_count(), draws.init(), zero_count(), zero_count())

    def update(updates, state, params=None, **extra_args):
        del params, extra_args

        def jump():
            direction_key, radius_key = jax.random.split(draws.draw(state.key, state.perturbations))
            share = jax.random.uniform(radius_key) ** (1 / size_of(updates))
            noise = scaled(curvature.random_like(direction_key, updates), radius * share)
            return cast_like(noise, updates), jnp.asarray(wait, jnp.int32), jnp.ones((), jnp.int32)

        def descend():
            rate = rate_at(learning_rate, state.count)
            down = jax.tree.map(lambda g: (-rate * g).astype(g.dtype), updates)
            return down, jnp.maximum(state.wait - 1, 0), zero_count()

        jumps_now = (optax.tree.norm(widen(updates)) <= max_gradient_norm) & (state.wait == 0)
        steps, left, jumps = jax.lax.cond(jumps_now, jump, descend)
        count = jnp.asarray(optax.safe_increment(state.count))
        return steps, PerturbedGradientState(count, state.key, left, state.perturbations + jumps)

    return transformation(init, update)


class SaddleFreeState(NamedTuple):
    """State of :func:`saddle_free_newton`."""

    count: jax.Array  # int32[], updates seen
    lambda_min: (
        jax.Array
    )  # float32[], smallest eigenvalue in the gradient's Krylov space; NaN before the first
    lambda_max: jax.Array  # float32[], largest eigenvalue


def saddle_free_newton(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    num_matvecs: int | Array | None = None,
    damping: Scalar = 1e-3,
) -> optax.GradientTransformationExtraArgs:
    r"""Newton's method with the absolute values of the eigenvalues, in the Krylov space of the gradient.

    The step is :math:`-\eta (|H| + d I)^{-1} g`, with H projected by Lanczos' method started at the gradient. Saddles
    repel it, but it cannot leave one where the gradient has no component along negative curvature, such as the saddle
    itself.

    Args:
      learning_rate: :math:`\eta`, or a schedule of it over updates.
      num_matvecs: Hessian-vector products per step, at most the number of parameters; by default that or 16. Memory
        is as many vectors.
      damping: d, above 0.

    Returns:
      A transformation that takes gradients, and whose ``update`` needs ``params`` and ``value_fn``.

    Raises:
      ValueError: if an option is out of range, ``num_matvecs`` exceeds the number of parameters, parameters are not
        floating, or ``update`` lacks an argument.

    References:
      Dauphin et al., `Identifying and attacking the saddle point problem in high-dimensional non-convex optimization
      <https://arxiv.org/abs/1406.2572>`_, 2014, algorithm 1, with one step in each Krylov space and a fixed damping.
    """
    [num_matvecs] = static_sizes("saddle_free_newton", num_matvecs=num_matvecs)
    check_positive("saddle_free_newton", learning_rate=learning_rate, damping=damping)

    def init(params: Params) -> SaddleFreeState:
        check_params("saddle_free_newton", params, num_matvecs)
        return SaddleFreeState(zero_count(), nan(), nan())

    def update(updates, state, params=None, *, value_fn=None, **extra_args):
        del extra_args
        params, value_fn = require_loss("saddle_free_newton", params, value_fn)
        products = matvecs(num_matvecs, params)
        gradient = flatten(updates)
        length = norm(gradient)
        # With a zero gradient the step is zero from any start.
        start = jnp.where(length > 0, gradient, 1)
        operator = hessian_at(value_fn, widen(params), None)
        found = curvature.lanczos(operator, unflatten(updates, start), num_matvecs=products)
        values, vectors, reached = ritz(found.alphas, found.betas)
        there = jnp.arange(products) < reached
        values = jnp.where(there, values, values[0])
        # The gradient is its norm times the first Krylov vector.
        shares = jnp.where(there, length * vectors[0] / (jnp.abs(values) + damping), 0)
        step = -rate_at(learning_rate, state.count) * jnp.matmul(
            vectors @ shares, jnp.asarray(found.basis), precision=jax.lax.Precision.HIGHEST
        )
        steps = cast_like(unflatten(updates, step), updates)
        ends = (jnp.min(values).astype(jnp.float32), jnp.max(values).astype(jnp.float32))
        return steps, SaddleFreeState(jnp.asarray(optax.safe_increment(state.count)), *ends)

    return transformation(init, update)
