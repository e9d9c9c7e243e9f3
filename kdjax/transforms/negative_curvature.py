"""Leaving a saddle along negative curvature: one kernel, and the published steps one by one."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from kdjax import curvature
from kdjax.curvature.vectors import widen
from kdjax.transforms._utils import (
    Draws,
    ValueFn,
    as_key,
    as_partial,
    cast_like,
    check_like,
    check_moved,
    check_period,
    check_positive,
    chosen,
    counter,
    extent,
    finite_or_infinite,
    hessian_at,
    inner,
    is_traced,
    matvecs,
    mean_over,
    moved,
    needed,
    needs_params,
    scaled,
    sizes,
    transformation,
    unmeasured,
)
from kdjax.types import Params, Scalar


class Escape(NamedTuple):
    """What :func:`escape` found, and did."""

    updates: Params  # to be added to the parameters: the base's own, bit for bit, unless accepted
    accepted: jax.Array  # bool[]
    lambda_min: jax.Array  # float32[], smallest eigenvalue found at the perturbed point
    lambda_max: jax.Array  # float32[], largest one
    residual: jax.Array  # float32[], of the smallest: an eigenvalue lies that near
    hvps: jax.Array  # int32[], Hessian-vector products spent
    evaluations: jax.Array  # int32[], losses computed


def escape(
    value_fn: ValueFn,
    params: Params,
    updates: Params,
    key: Array | int,
    *,
    num_matvecs: int | Array | None = None,
    radius: Scalar = 0.3,
    sigma: Scalar = 0.01,
    trials: int | Array | None = None,
    strength: Scalar = 0.1,
    direction: Params | None = None,
    certify_fn: ValueFn | None = None,
    axis_name: str | None = None,
) -> Escape:
    r"""Looks for a way down along negative curvature, and takes it only if it is lower than the step at hand.

    1. Perturb: :math:`x = \theta + \sigma c \, \xi / \lVert \xi \rVert`, with Gaussian :math:`\xi` and c the norm of
       the parameters, or 1 if that is less. At a monkey saddle, or at zero in a deep linear network, the Hessian is
       zero, and only beside it there is a direction to be seen.
    2. Find the extreme eigenpairs of the Hessian at x by Lanczos' method, started at random, or at random plus a
       direction twice as long. A wrong direction costs products, and cannot hide what a random start sees.
    3. Go on if :math:`\lambda_{min}` is negative with its residual, :math:`-\lambda_{min} > s \, \lambda_{max}`, and
       the curvature along its vector v is negative on the second batch too, where there is one.
    4. Compare the losses at :math:`x \pm r v`, :math:`r = c \cdot radius \cdot 2^{-j}` for j below ``trials``. Both
       signs, since the gradient says nothing at a saddle; a search, since 1/|λ| is no length. The lowest is taken if
       it is below the loss at θ and below that after the base's step. What is not finite is never taken.

    This is the kernel of :func:`kdjax.transforms.sprkd`. Called from Python with arrays at hand, Lanczos' method runs
    in a loop on the host on a CPU, where convolutions inside compiled loops are slow. A training loop can then call it
    every so many steps, beside its own jitted step and before ``optax.apply_updates``. To compile once, hand over the
    same function every time, and its data as ``jax.tree_util.Partial(loss, batch)``, which calls
    ``loss(batch, params)``.

    Args:
      value_fn: the loss of the parameters: deterministic, with batch statistics frozen.
      params: θ, pytree of floating-point arrays; the curvature is computed in float32 whatever they are.
      updates: the step of the base transformation, like the parameters; zeros for none.
      key: of the perturbation and of Lanczos' start.
      num_matvecs: Hessian-vector products, at most the number of parameters, by default that or 16. Memory is as many
        vectors.
      radius: length of the longest step, as a share of c.
      sigma: length of the perturbation, as a share of c; 0 for none.
      trials: lengths to try, 6 by default, each half the one before.
      strength: s, the share of :math:`\lambda_{max}` that counts as negative curvature.
      direction: where to expect negative curvature, like the parameters, of any length; such as a teacher's.
      certify_fn: the loss on other data. On a minibatch most directions of small negative curvature are noise.
      axis_name: of the mapped axis whose devices hold parts of the batch; losses and products are averaged over it.

    Returns:
      The updates, and what was found and spent: ``num_matvecs`` products, one more with ``certify_fn``, and
      ``2 * trials + 2`` losses if 3. holds.

    Raises:
      ValueError: if ``num_matvecs`` is not from 1 to the number of parameters, there are no trials, the direction is
        not like the parameters, or these are not floating; and, called from Python, if a product is not finite.
        Inside a compiled function the updates then come back as they were.

    References:
      Dewan, SPRKD, arXiv 2607.23346, 2026. Perturbing first is Jin et al., `How to Escape Saddle Points Efficiently
      <https://arxiv.org/abs/1703.00887>`_, 2017. Lengths that eigenvalues do not tell: Alain et al., `Negative
      eigenvalues of the Hessian in deep neural networks <https://arxiv.org/abs/1902.02366>`_, 2019.

    Examples:
      >>> saddle = lambda p: p[0] ** 2 - p[1] ** 2 + p[1] ** 4 / 4
      >>> found = escape(saddle, jnp.zeros(2), jnp.zeros(2), jax.random.key(0), num_matvecs=2, radius=1.0)
      >>> bool(found.accepted), bool(saddle(found.updates) < -0.7)
      (True, True)
    """
    num_matvecs, trials = sizes("escape", num_matvecs=num_matvecs, trials=trials)
    check_moved("escape", params, num_matvecs)
    num_matvecs, trials = matvecs(num_matvecs, params), 6 if trials is None else trials
    check_positive("escape", radius=radius, trials=trials)
    check_positive("escape", zero=True, sigma=sigma, strength=strength)
    if direction is not None:
        check_like("escape", params, direction=direction)
    noise_key, start_key = jax.random.split(as_key(key))
    length = extent(params)
    noise = scaled(curvature.random_like(noise_key, params), sigma * length)
    here = moved(params, noise)
    ends = curvature.extreme_eigenpairs(
        hessian_at(value_fn, here, axis_name),
        _start(start_key, params, direction),
        num_matvecs=num_matvecs,
    )
    vector = jax.tree.map(lambda v: v[0], ends.bottom.vectors)
    lowest, residual, highest = ends.bottom.values[0], ends.bottom.residuals[0], ends.top.values[0]
    strong = (lowest + residual < 0) & (-lowest > strength * highest)
    hvps = num_matvecs
    if certify_fn is not None:
        product = hessian_at(certify_fn, here, axis_name)(vector)
        strong, hvps = strong & (inner(vector, product) < 0), hvps + 1
    grid = jnp.asarray(radius * length, jnp.float32) * 0.5 ** jnp.arange(trials, dtype=jnp.float32)
    search = _search if is_traced((here, strong)) else _compiled_search
    found, accepted, evaluations = search(
        as_partial(value_fn), params, updates, noise, vector, grid, strong, axis_name
    )
    lowest, highest, residual = (x.astype(jnp.float32) for x in (lowest, highest, residual))
    return Escape(found, accepted, lowest, highest, residual, jnp.asarray(hvps, jnp.int32), evaluations)


def _start(key, params, direction):
    """Random, and twice as long along a direction: no more, so that every eigenvector keeps a part."""
    start = curvature.random_like(key, params)
    if direction is None:
        return start
    return jax.tree.map(jnp.add, scaled(start, 1), scaled(widen(direction), 2))


def _search(value_fn, params, updates, noise, vector, grid, strong, axis_name):
    """The lowest of the candidates if it is below both standing still and the base's step."""
    steps = jnp.concatenate([jnp.zeros(2), grid, -grid])
    kinds = jnp.minimum(jnp.arange(len(steps)), 2)  # stand still, the base's step, noise + step * vector

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
        return chosen(lower, candidate(kinds[best], steps[best]), updates), lower, len(steps)

    found, accepted, spent = jax.lax.cond(strong, search, lambda: (updates, jnp.asarray(False), 0))
    return found, accepted, jnp.asarray(spent, jnp.int32)


_compiled_search = jax.jit(_search, static_argnums=7)


class EigenstepState(NamedTuple):
    """State of :func:`negative_eigenstep`."""

    count: jax.Array  # int32[], updates seen
    key: jax.Array  # uint32[...], raw
    lambda_min: jax.Array  # float32[], when it last looked; NaN before
    residual: jax.Array  # float32[], likewise
    probes: jax.Array  # int32[], how often it looked
    steps: jax.Array  # int32[], how often it found negative curvature, and added a step
    hvps: jax.Array  # int32[], Hessian-vector products spent


def negative_eigenstep(
    *,
    period: int | Array,
    key: Array | int,
    num_matvecs: int | Array | None = None,
    length: Literal["adaptive", "curvature"] = "adaptive",
    cap: Scalar = 0.1,
    max_gradient_norm: Scalar = 0.02,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds a step along the direction of most negative curvature, as published.

    With the most negative eigenpair (λ, v) of the Hessian at ``params + updates`` it adds :math:`s \eta v`,
    :math:`s = - \operatorname{sign}(g \cdot v)`, if λ is negative with its residual and the gradient g there is short.
    It does not ask whether the loss falls: wrap it in :func:`kdjax.transforms.accept_if_better`.

    Args:
      period: steps from one look to the next, the first of them at the first update.
      key: of Lanczos' starts.
      num_matvecs: Hessian-vector products of a look, at most the number of parameters, by default that or 16.
      length: rule of :math:`\eta`: "adaptive" is :math:`\min(cap, 1 / |\lambda|)`, "curvature" :math:`|\lambda| / 2`.
      cap: of "adaptive".
      max_gradient_norm: the gradient's norm above which nothing is done; infinity for always.
      axis_name: of the mapped axis whose devices hold parts of the batch; derivatives are averaged over it.

    Returns:
      A transformation whose ``update`` needs ``params`` and ``value_fn``.

    Raises:
      ValueError: if an option is out of its range, ``num_matvecs`` beyond the number of parameters, parameters are not
        floating, or ``update`` lacks what it needs.

    References:
      Dewan, SPRKD, arXiv 2607.23346, 2026.
    """
    [num_matvecs] = sizes("negative_eigenstep", num_matvecs=num_matvecs)
    check_period("negative_eigenstep", period)
    check_positive("negative_eigenstep", cap=cap, max_gradient_norm=max_gradient_norm)
    if length not in ("adaptive", "curvature"):
        raise ValueError(f"length must be 'adaptive' or 'curvature', got {length!r}.")
    draws = Draws(key)

    def init(params: Params) -> EigenstepState:
        check_moved("negative_eigenstep", params, num_matvecs)
        return EigenstepState(
            counter(), draws.init(), unmeasured(), unmeasured(), *(counter() for _ in range(3))
        )

    def update(updates, state, params=None, *, value_fn=None, **extra_args):
        del extra_args
        params, value_fn = needed("negative_eigenstep", params, value_fn)
        products = matvecs(num_matvecs, params)

        def look():
            here = moved(params, updates)
            slope = mean_over(axis_name, jax.grad(value_fn)(here))
            ends = curvature.extreme_eigenpairs(
                hessian_at(value_fn, here, axis_name),
                curvature.random_like(draws.draw(state.key, state.probes), params),
                num_matvecs=products,
                top=0,
            )
            vector = jax.tree.map(lambda v: v[0], ends.bottom.vectors)
            value = ends.bottom.values[0]
            steps = jnp.abs(value) / 2 if length == "curvature" else jnp.minimum(cap, 1 / jnp.abs(value))
            eta = jnp.where(inner(slope, vector) > 0, -steps, steps)
            certain = value + ends.bottom.residuals[0] < 0
            takes = certain & (optax.tree.norm(slope) <= max_gradient_norm)
            longer = jax.tree.map(lambda u, v: (u + eta * v).astype(u.dtype), updates, vector)
            residual = ends.bottom.residuals[0].astype(jnp.float32)
            found = (value.astype(jnp.float32), residual)
            return chosen(takes, longer, updates), found, takes.astype(jnp.int32), jnp.ones((), jnp.int32)

        def pass_through():
            return updates, (state.lambda_min, state.residual), counter(), counter()

        due = state.count % period == 0
        updates, (lowest, residual), taken, looked = jax.lax.cond(due, look, pass_through)
        count = jnp.asarray(optax.safe_increment(state.count))
        probes, steps = state.probes + looked, state.steps + taken
        hvps = state.hvps + looked * products
        return updates, EigenstepState(count, state.key, lowest, residual, probes, steps, hvps)

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
      period: steps from one perturbation to the next, the first of them at the first update.
      key: of the noise.
      radius: length of the noise, its direction uniform, as a share of the norm of the parameters (or of 1, if that is
        less).
      sigma: standard deviation for each parameter, as published (:math:`\sigma^2 = 0.1` in the paper). It does not know
        the scale of the network; give one of the two.

    Returns:
      A transformation whose ``update`` needs ``params``.

    Raises:
      ValueError: if not exactly one of ``radius`` and ``sigma`` is given, an option is out of its range, parameters are
        not floating, or ``update`` is called without them.

    References:
      Dewan, SPRKD, arXiv 2607.23346, 2026.
    """
    check_period("perturb", period)
    if (radius is None) == (sigma is None):
        raise ValueError(
            "perturb needs one of radius, relative to the parameters, and sigma, which is not: "
            f"got radius={radius} and sigma={sigma}."
        )
    check_positive("perturb", zero=True, radius=radius, sigma=sigma)
    draws = Draws(key)

    def init(params: Params) -> PerturbState:
        check_moved("perturb", params)
        return PerturbState(counter(), draws.init())

    def update(updates, state, params=None, **extra_args):
        del extra_args
        params = needs_params("perturb", params)

        def disturb():
            noise = curvature.random_like(draws.draw(state.key, state.count), params)
            if radius is not None:
                noise = scaled(noise, radius * extent(params))
            elif sigma is not None:
                noise = optax.tree.scale(sigma, noise)
            return cast_like(moved(updates, noise), updates)

        updates = jax.lax.cond(state.count % period == 0, disturb, lambda: updates)
        return updates, PerturbState(jnp.asarray(optax.safe_increment(state.count)), state.key)

    return transformation(init, update)
