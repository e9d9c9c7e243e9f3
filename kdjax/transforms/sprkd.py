"""SPRKD as one transformation: approach a region, descend from it, and escape along negative curvature."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from kdjax.curvature.vectors import widen
from kdjax.transforms._utils import (
    Draws,
    check_like,
    check_moved,
    check_period,
    check_positive,
    counter,
    kept,
    needed,
    sizes,
    transformation,
    unmeasured,
)
from kdjax.transforms.negative_curvature import escape
from kdjax.transforms.warm_start import approach_region
from kdjax.types import Params, Scalar

APPROACH, DESCEND = 0, 1  # values of SprkdState.phase


class SprkdState(NamedTuple):
    """State of :func:`sprkd`."""

    count: jax.Array  # int32[], updates seen
    key: jax.Array  # uint32[...], raw
    base: optax.OptState
    approach: Any  # of approach_region; None without a region
    direction: Any  # float32, like the parameters; None without one
    phase: jax.Array  # int32[], of the latest update: 0 approach, 1 descend and escape
    wait: jax.Array  # int32[], updates until the cooldown is over
    lambda_min: jax.Array  # float32[], when it last looked; NaN before
    lambda_max: jax.Array  # float32[], likewise
    residual: jax.Array  # float32[], likewise, of the smallest
    events: jax.Array  # int32[], escapes accepted
    probes: jax.Array  # int32[], how often it looked
    hvps: jax.Array  # int32[], Hessian-vector products spent
    evaluations: jax.Array  # int32[], losses computed


def sprkd(
    base: optax.GradientTransformation,
    *,
    key: Array | int,
    period: int | Array = 100,
    num_matvecs: int | Array | None = None,
    radius: Scalar = 0.3,
    sigma: Scalar = 0.01,
    trials: int | Array | None = None,
    strength: Scalar = 0.1,
    max_gradient_norm: Scalar = float("inf"),
    budget: int | Array = 20,
    cooldown: int | Array = 20,
    warmup: int | Array = 0,
    certify: bool = True,
    direction: Params | None = None,
    region: Params | None = None,
    form: Literal["smooth", "published"] = "smooth",
    half_life: Scalar = 10.0,
    epsilon: Scalar = 0.1,
    max_approach: int | Array = 200,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Saddle point recruitment around any optimiser.

    It has two phases:

    * Approach, with a region: :func:`approach_region` moves the parameters until they are there. Gradients are not
      used, and the base waits in the state of its start.
    * Descend and escape: the updates are those of the base, **bit for bit**. Only when it is time is :func:`escape`
      asked for better ones: every ``period`` updates counted from the first, after ``warmup``, not before ``cooldown``
      updates have passed since the last escape, and until ``budget`` escapes were made. Where it finds none, nothing
      changes: on a convex loss this is the base optimiser. (XLA may round the same update in another way in another
      program, according to what it fuses it with.)

    It wraps the base rather than follow it in a chain, and nothing that scales updates should follow it: what an escape
    has compared are the losses after its own steps. It moves all parameters that it is given: let the loss close over
    what is to be frozen. The base's momentum is left as it is by an escape.

    A look costs ``num_matvecs`` Hessian-vector products, one more with ``certify_fn``, and ``2 * trials + 2`` losses if
    there is negative curvature. It sits in ``lax.cond``, of which ``jax.vmap`` would compute both sides every time:
    train several networks with ``jax.lax.map`` instead. For networks whose convolutions are slow inside compiled loops
    on a CPU, call :func:`escape` from Python.

    ``update`` takes the extra arguments ``value_fn``, the loss of the parameters on this batch; ``grad``; and, if there
    is one, ``certify_fn``, the loss on another batch, which must confirm a direction.

    Args:
      base: the optimiser.
      key: of perturbations and of Lanczos' starts.
      period: updates from one look to the next.
      num_matvecs: Hessian-vector products of a look, at most the number of parameters, by default that or 16. Memory
        is as many vectors.
      radius: length of the longest escape, as a share of the norm of the parameters (or of 1, if that is less).
      sigma: length of the perturbation before looking, likewise; 0 for none.
      trials: lengths to try, 6 by default, each half the one before, in both directions.
      strength: how large, as a share of the largest eigenvalue, the negative one must be.
      max_gradient_norm: do not look where the gradient is longer: .02 as published. It depends on the scale of the
        loss. The gradient is ``grad``, or the updates as they come if that is not given.
      budget: escapes in all.
      cooldown: updates after an escape without a look; 20 as published.
      warmup: updates before the first look.
      certify: False ignores ``certify_fn``.
      direction: where to expect negative curvature, like the parameters; see :func:`escape`.
      region: what to approach first, like the parameters; see :func:`approach_region`, likewise the next four.
      form: of the approach.
      half_life: of the approach.
      epsilon: distance at which the region is reached.
      max_approach: updates after which it counts as reached.
      axis_name: of the mapped axis whose devices hold parts of the batch: losses and products are averaged over it, so
        that all devices decide alike. Updates must come averaged.

    Returns:
      A transformation whose ``update`` needs ``params`` and ``value_fn``.

    Raises:
      ValueError: if an option is out of its range, ``num_matvecs`` not from 1 to the number of parameters, region or
        direction not like the parameters, parameters are not floating, or ``update`` lacks what it needs.

    References:
      Dewan, SPRKD, arXiv 2607.23346, 2026. As published, an escape is ``accept_if_better`` around
      ``negative_eigenstep`` and ``perturb``.

    Examples:
      >>> loss = lambda p: p[0] ** 2 - p[1] ** 2 + p[1] ** 4 / 4
      >>> tx = sprkd(optax.sgd(0.1), num_matvecs=2, period=10, key=jax.random.key(0))
      >>> params = jnp.array([1.0, 0.0])  # SGD goes from here to the saddle, and stays
      >>> state = tx.init(params)
      >>> update = jax.jit(lambda p, state: tx.update(jax.grad(loss)(p), state, p, value_fn=loss))
      >>> for _ in range(60):
      ...     updates, state = update(params, state)
      ...     params = optax.apply_updates(params, updates)
      >>> round(float(loss(params)), 2)
      -1.0
    """
    num_matvecs, trials = sizes("sprkd", num_matvecs=num_matvecs, trials=trials)
    check_period("sprkd", period)
    check_positive("sprkd", radius=radius, trials=trials, max_gradient_norm=max_gradient_norm)
    check_positive(
        "sprkd", zero=True, sigma=sigma, strength=strength, budget=budget, cooldown=cooldown, warmup=warmup
    )
    base = optax.with_extra_args_support(base)
    approaching = None
    if region is not None:
        approaching = approach_region(
            region, form=form, half_life=half_life, epsilon=epsilon, max_steps=max_approach
        )
    draws = Draws(key)

    def init(params: Params) -> SprkdState:
        check_moved("sprkd", params, num_matvecs)
        if direction is not None:
            check_like("sprkd", params, direction=direction)
        return SprkdState(
            counter(),
            draws.init(),
            base.init(params),
            None if approaching is None else approaching.init(params),
            None if direction is None else kept(params, direction),
            jnp.asarray(DESCEND if approaching is None else APPROACH, jnp.int32),
            counter(),
            *(unmeasured() for _ in range(3)),
            *(counter() for _ in range(4)),
        )

    def update(updates, state, params=None, *, value_fn=None, grad=None, certify_fn=None, **extra_args):
        params, value_fn = needed("sprkd", params, value_fn)
        grad = updates if grad is None else grad
        steps, base_state = base.update(
            updates, state.base, params, value_fn=value_fn, grad=grad, **extra_args
        )
        phase, approach_state = state.phase, state.approach
        if approaching is not None:
            steps, approach_state = approaching.update(steps, state.approach, params)
            phase = optax.tree.get(approach_state, "arrived").astype(jnp.int32)
            base_state = jax.lax.cond(phase == DESCEND, lambda: base_state, lambda: state.base)

        def look():
            found = escape(
                value_fn,
                params,
                steps,
                draws.draw(state.key, state.probes),
                num_matvecs=num_matvecs,
                radius=radius,
                sigma=sigma,
                trials=trials,
                strength=strength,
                direction=state.direction,
                certify_fn=certify_fn if certify else None,
                axis_name=axis_name,
            )
            accepted = found.accepted.astype(jnp.int32)
            spent = (accepted, jnp.ones((), jnp.int32), found.hvps, found.evaluations)
            wait = jnp.where(found.accepted, jnp.asarray(cooldown, jnp.int32), 0)
            return found.updates, wait, (found.lambda_min, found.lambda_max, found.residual), spent

        def idle():
            seen = (state.lambda_min, state.lambda_max, state.residual)
            return steps, jnp.maximum(state.wait - 1, 0), seen, tuple(counter() for _ in range(4))

        due = (
            (state.count % period == 0)
            & (state.count >= warmup)
            & (phase == DESCEND)
            & (state.wait == 0)
            & (state.events < budget)
            & (optax.tree.norm(widen(grad)) <= max_gradient_norm)
        )
        steps, wait, seen, spent = jax.lax.cond(due, look, idle)
        totals = (state.events, state.probes, state.hvps, state.evaluations)
        return steps, SprkdState(
            jnp.asarray(optax.safe_increment(state.count)),
            state.key,
            base_state,
            approach_state,
            state.direction,
            phase,
            wait,
            *seen,
            *(total + more for total, more in zip(totals, spent, strict=True)),
        )

    return transformation(init, update)
