"""Leave a saddle along negative curvature: one kernel, and the published steps as transformations."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from kdjax import curvature
from kdjax.transforms._utils import (
    Draws,
    ValueFn,
    added,
    as_key,
    as_partial,
    cast_like,
    check_params,
    check_period,
    check_positive,
    finite_or_infinite,
    hessian_at,
    inner,
    is_traced,
    length_scale,
    matvecs,
    mean_over,
    nan,
    require_loss,
    require_params,
    scaled,
    static_sizes,
    transformation,
    where,
    zero_count,
)
from kdjax.types import Params, Scalar


class Escape(NamedTuple):
    """Result of :func:`escape`."""

    updates: Params  # to be added to the parameters: the given updates, bit for bit, unless accepted
    accepted: jax.Array  # bool[]
    lambda_min: jax.Array  # float32[], smallest eigenvalue found at the perturbed point
    lambda_max: jax.Array  # float32[], largest eigenvalue
    residual: jax.Array  # float32[], residual of lambda_min: an eigenvalue lies within this distance
    hvps: jax.Array  # int32[], Hessian-vector products computed
    evaluations: jax.Array  # int32[], losses computed


def escape(
    value_fn: ValueFn,
    params: Params,
    updates: Params,
    key: Array | int,
    *,
    num_matvecs: int | Array | None = None,
    escape_radius: Scalar = 0.3,
    perturbation_radius: Scalar = 0.01,
    negative_curvature_ratio: Scalar = 0.1,
    certify_fn: ValueFn | None = None,
    axis_name: str | None = None,
) -> Escape:
    r"""Searches for negative curvature and steps along it if that has a lower loss than the given updates.

    1. Perturb: :math:`x = \theta + \sigma c \, \xi / \lVert \xi \rVert`, with Gaussian :math:`\xi`, σ the
       ``perturbation_radius`` and c the norm of the parameters, or 1 if that is less. At a monkey saddle, or at zero in
       a deep linear network, the Hessian is zero; negative curvature appears only beside it.
    2. Find the extreme eigenpairs of the Hessian at x by Lanczos' method from a random start.
    3. Continue if :math:`\lambda_{min}` plus its residual is negative, :math:`-\lambda_{min} > s \, \lambda_{max}`
       with s the ``negative_curvature_ratio``, and, with ``certify_fn``, the curvature along the eigenvector v is
       negative for that loss too.
    4. Compare the losses at :math:`x \pm r v` for the ``escape_radius`` times c and five halvings of it. Both signs,
       since the gradient is zero at a saddle; a search, since 1/|λ| is no step length. The lowest is taken if it is
       below the loss at θ and below that after the given updates. Non-finite losses are never taken.

    This is the kernel of :func:`kdjax.transforms.sprkd`. Called from Python on concrete arrays on a CPU, it runs
    Lanczos' method in a host loop, since convolutions inside compiled loops are slow there. A training loop can call it
    every so many steps, beside its own jitted step and before ``optax.apply_updates``. To compile once, pass the same
    function every time and its data as ``jax.tree_util.Partial(loss, batch)``, which calls ``loss(batch, params)``.

    Args:
      value_fn: the loss of the parameters: deterministic, with BatchNorm statistics frozen.
      params: θ, pytree of floating-point arrays. The curvature is computed in float32 or wider.
      updates: the step of the base transformation, like the parameters; zeros for none.
      key: for the perturbation and Lanczos' start.
      num_matvecs: Hessian-vector products, at most the number of parameters; by default that or 16. Memory is as many
        vectors.
      escape_radius: length of the longest step, relative to c.
      perturbation_radius: length of the perturbation, relative to c; 0 for none.
      negative_curvature_ratio: s, least :math:`-\lambda_{min} / \lambda_{max}` that counts as negative curvature.
      certify_fn: the loss on other data. On a minibatch most directions of small negative curvature are noise.
      axis_name: mapped axis whose devices hold parts of the batch; losses and products are averaged over it.

    Returns:
      The updates, the eigenvalues found, and the cost: ``num_matvecs`` products, one more with ``certify_fn``, and 14
      losses if step 4 is reached.

    Raises:
      ValueError: if ``num_matvecs`` is not from 1 to the number of parameters, an option is out of range, or parameters
        are not floating; and, called from Python, if a product is not finite. Inside a compiled function the updates
        are then returned unchanged.

    References:
      Dewan, SPRKD, arXiv 2607.23346, 2026. Perturbing first: Jin et al., `How to Escape Saddle Points Efficiently
      <https://arxiv.org/abs/1703.00887>`_, 2017. Step lengths that eigenvalues do not predict: Alain et al., `Negative
      eigenvalues of the Hessian in deep neural networks <https://arxiv.org/abs/1902.02366>`_, 2019.

    Examples:
      >>> saddle = lambda p: p[0] ** 2 - p[1] ** 2 + p[1] ** 4 / 4
      >>> found = escape(saddle, jnp.zeros(2), jnp.zeros(2), jax.random.key(0), num_matvecs=2, escape_radius=1.0)
      >>> bool(found.accepted), bool(saddle(found.updates) < -0.7)
      (True, True)
    """
    [num_matvecs] = static_sizes("escape", num_matvecs=num_matvecs)
    check_params("escape", params, num_matvecs)
    num_matvecs = matvecs(num_matvecs, params)
    check_positive("escape", escape_radius=escape_radius)
    check_positive(
        "escape",
        zero=True,
        perturbation_radius=perturbation_radius,
        negative_curvature_ratio=negative_curvature_ratio,
    )
    noise_key, start_key = jax.random.split(as_key(key))
    length = length_scale(params)
    noise = scaled(curvature.random_like(noise_key, params), perturbation_radius * length)
    perturbed = added(params, noise)
    ends = curvature.extreme_eigenpairs(
        hessian_at(value_fn, perturbed, axis_name),
        curvature.random_like(start_key, params),
        num_matvecs=num_matvecs,
    )
    vector = jax.tree.map(lambda v: v[0], ends.bottom.vectors)
    lowest, residual, highest = ends.bottom.values[0], ends.bottom.residuals[0], ends.top.values[0]
    negative = (lowest + residual < 0) & (-lowest > negative_curvature_ratio * highest)
    hvps = num_matvecs
    if certify_fn is not None:
        product = hessian_at(certify_fn, perturbed, axis_name)(vector)
        negative, hvps = negative & (inner(vector, product) < 0), hvps + 1
    grid = jnp.asarray(escape_radius * length, jnp.float32) * 0.5 ** jnp.arange(_LENGTHS, dtype=jnp.float32)
    search = _search if is_traced((perturbed, negative)) else _compiled_search
    found, accepted, evaluations = search(
        as_partial(value_fn), params, updates, noise, vector, grid, negative, axis_name
    )
    lowest, highest, residual = (x.astype(jnp.float32) for x in (lowest, highest, residual))
    return Escape(found, accepted, lowest, highest, residual, jnp.asarray(hvps, jnp.int32), evaluations)


_LENGTHS = 6  # step lengths to try, each half the one before


def _search(value_fn, params, updates, noise, vector, grid, negative, axis_name):
    """The lowest of the candidates, if it is below both the current loss and that after the given updates."""
    steps = jnp.concatenate([jnp.zeros(2), grid, -grid])
    kinds = jnp.minimum(jnp.arange(len(steps)), 2)  # no step, the given updates, noise + step * vector

    def candidate(kind, step):
        def choose(u, z, v):
            # No products with 0: updates may be infinite.
            along = jnp.where(kind == 2, z + step * v, 0)
            return jnp.where(kind == 1, u, along.astype(u.dtype))

        return jax.tree.map(choose, updates, noise, vector)

    def search():
        def value(at):
            return mean_over(axis_name, value_fn(optax.apply_updates(params, candidate(*at))))

        values = finite_or_infinite(jax.lax.map(value, (kinds, steps)))
        best = 2 + jnp.argmin(values[2:])
        lower = values[best] < jnp.minimum(values[0], values[1])
        return where(lower, candidate(kinds[best], steps[best]), updates), lower, len(steps)

    found, accepted, spent = jax.lax.cond(negative, search, lambda: (updates, jnp.asarray(False), 0))
    return found, accepted, jnp.asarray(spent, jnp.int32)


_compiled_search = jax.jit(_search, static_argnums=7)


class EigenstepState(NamedTuple):
    """State of :func:`negative_eigenstep`."""

    count: jax.Array  # int32[], updates seen
    key: jax.Array  # uint32[...], raw
    lambda_min: jax.Array  # float32[], smallest eigenvalue at the latest check; NaN before the first
    residual: jax.Array  # float32[], residual of lambda_min
    num_checks: jax.Array  # int32[], searches for negative curvature
    steps: jax.Array  # int32[], searches that found it and added a step
    hvps: jax.Array  # int32[], Hessian-vector products computed


_CAP, _MAX_GRADIENT_NORM = 0.1, 0.02  # as published


def negative_eigenstep(
    *,
    period: int | Array,
    key: Array | int,
    num_matvecs: int | Array | None = None,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds a step along the direction of most negative curvature, as published.

    With the most negative eigenpair (λ, v) of the Hessian at ``params + updates`` it adds
    :math:`-\operatorname{sign}(g \cdot v) \min(0.1, 1 / |\lambda|) \, v`, if λ plus its residual is negative and the
    norm of the gradient g there is at most .02. It does not check that the loss falls: wrap it in
    :func:`kdjax.transforms.accept_if_better`.

    Args:
      period: updates from one check to the next; the first check is at the first update.
      key: for Lanczos start vectors.
      num_matvecs: Hessian-vector products per check, at most the number of parameters; by default that or 16.
      axis_name: mapped axis whose devices hold parts of the batch; derivatives are averaged over it.

    Returns:
      A transformation whose ``update`` needs ``params`` and ``value_fn``.

    Raises:
      ValueError: if an option is out of range, ``num_matvecs`` exceeds the number of parameters, parameters are not
        floating, or ``update`` lacks an argument.

    References:
      Dewan, SPRKD, arXiv 2607.23346, 2026.
    """
    [num_matvecs] = static_sizes("negative_eigenstep", num_matvecs=num_matvecs)
    check_period("negative_eigenstep", period)
    draws = Draws(key)

    def init(params: Params) -> EigenstepState:
        check_params("negative_eigenstep", params, num_matvecs)
        return EigenstepState(zero_count(), draws.init(), nan(), nan(), *(zero_count() for _ in range(3)))

    def update(updates, state, params=None, *, value_fn=None, **extra_args):
        del extra_args
        params, value_fn = require_loss("negative_eigenstep", params, value_fn)
        products = matvecs(num_matvecs, params)

        def check():
            here = added(params, updates)
            slope = mean_over(axis_name, jax.grad(value_fn)(here))
            ends = curvature.extreme_eigenpairs(
                hessian_at(value_fn, here, axis_name),
                curvature.random_like(draws.draw(state.key, state.num_checks), params),
                num_matvecs=products,
                top=0,
            )
            vector = jax.tree.map(lambda v: v[0], ends.bottom.vectors)
            value = ends.bottom.values[0]
            steps = jnp.minimum(_CAP, 1 / jnp.abs(value))
            eta = jnp.where(inner(slope, vector) > 0, -steps, steps)
            certain = value + ends.bottom.residuals[0] < 0
            takes = certain & (optax.tree.norm(slope) <= _MAX_GRADIENT_NORM)
            longer = jax.tree.map(lambda u, v: (u + eta * v).astype(u.dtype), updates, vector)
            residual = ends.bottom.residuals[0].astype(jnp.float32)
            found = (value.astype(jnp.float32), residual)
            return where(takes, longer, updates), found, takes.astype(jnp.int32), jnp.ones((), jnp.int32)

        def pass_through():
            return updates, (state.lambda_min, state.residual), zero_count(), zero_count()

        due = state.count % period == 0
        updates, (lowest, residual), taken, checked = jax.lax.cond(due, check, pass_through)
        count = jnp.asarray(optax.safe_increment(state.count))
        num_checks, steps = state.num_checks + checked, state.steps + taken
        hvps = state.hvps + checked * products
        return updates, EigenstepState(count, state.key, lowest, residual, num_checks, steps, hvps)

    return transformation(init, update)


class PerturbState(NamedTuple):
    """State of :func:`perturb`."""

    count: jax.Array  # int32[], updates seen
    key: jax.Array  # uint32[...], raw


def perturb(
    *, period: int | Array, key: Array | int, radius: Scalar | None = None, sigma: Scalar | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Adds Gaussian noise to the updates every so many steps.

    Args:
      period: updates from one perturbation to the next; the first is at the first update.
      key: for the noise.
      radius: length of the noise relative to the norm of the parameters (or to 1, if that is less), in a uniformly
        random direction.
      sigma: absolute standard deviation for each parameter, as published (:math:`\sigma^2 = 0.1` in the paper). Pass
        one of the two.

    Returns:
      A transformation whose ``update`` needs ``params``.

    Raises:
      ValueError: if not exactly one of ``radius`` and ``sigma`` is given, an option is out of range, parameters are not
        floating, or ``update`` is called without them.

    References:
      Dewan, SPRKD, arXiv 2607.23346, 2026.
    """
    check_period("perturb", period)
    if (radius is None) == (sigma is None):
        raise ValueError(
            "perturb needs either radius, relative to the parameters, or sigma, absolute: "
            f"got radius={radius} and sigma={sigma}."
        )
    check_positive("perturb", zero=True, radius=radius, sigma=sigma)
    draws = Draws(key)

    def init(params: Params) -> PerturbState:
        check_params("perturb", params)
        return PerturbState(zero_count(), draws.init())

    def update(updates, state, params=None, **extra_args):
        del extra_args
        params = require_params("perturb", params)

        def disturb():
            noise = curvature.random_like(draws.draw(state.key, state.count), params)
            if radius is not None:
                noise = scaled(noise, radius * length_scale(params))
            elif sigma is not None:
                noise = optax.tree.scale(sigma, noise)
            return cast_like(added(updates, noise), updates)

        updates = jax.lax.cond(state.count % period == 0, disturb, lambda: updates)
        return updates, PerturbState(jnp.asarray(optax.safe_increment(state.count)), state.key)

    return transformation(init, update)
