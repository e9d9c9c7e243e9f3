"""SPRKD as one transformation: approach a region, descend from it, and escape along negative curvature."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from kdjax.transforms._utils import (
    Draws,
    check_params,
    check_period,
    check_positive,
    nan,
    require_loss,
    static_sizes,
    transformation,
    zero_count,
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
    approach: Any  # state of approach_region; None without a region
    phase: jax.Array  # int32[], of the latest update: 0 approach, 1 descend and escape
    wait: jax.Array  # int32[], updates until the cooldown is over
    lambda_min: jax.Array  # float32[], smallest eigenvalue at the latest check; NaN before the first
    lambda_max: jax.Array  # float32[], largest eigenvalue at the latest check
    residual: jax.Array  # float32[], residual of lambda_min
    events: jax.Array  # int32[], accepted escapes
    num_checks: jax.Array  # int32[], searches for negative curvature
    hvps: jax.Array  # int32[], Hessian-vector products computed
    evaluations: jax.Array  # int32[], losses computed


def sprkd(
    base: optax.GradientTransformation,
    *,
    key: Array | int,
    period: int | Array = 100,
    num_matvecs: int | Array | None = None,
    region: Params | None = None,
    escape_radius: Scalar = 0.3,
    perturbation_radius: Scalar = 0.01,
    negative_curvature_ratio: Scalar = 0.1,
    budget: int | Array = 20,
    cooldown: int | Array = 20,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Saddle point recruitment around any optimiser.

    1. Approach, if a region is given: :func:`approach_region`, with its defaults, moves the parameters there. Gradients
       are not used, and the state of the base stays as initialised.
    2. Descend and escape: the updates are those of the base, **bit for bit**. Every ``period`` updates, unless an
       escape was accepted within the last ``cooldown`` updates or ``budget`` escapes were made, :func:`escape` searches
       for negative curvature and replaces the update if it finds a lower loss. On a convex loss this is the base
       optimiser. (XLA may round the same update differently in another program, depending on what it fuses.)

    It wraps the base instead of following it in a chain. Put nothing that scales updates after it: an escape compares
    the losses after its own steps. It moves all parameters that it is given, so let the loss close over frozen ones. An
    escape leaves the base's momentum as it is.

    A check costs ``num_matvecs`` Hessian-vector products, one more with ``certify_fn``, and 14 losses if there is
    negative curvature. It sits in ``lax.cond``, of which ``jax.vmap`` would compute both branches at every step: train
    several networks with ``jax.lax.map`` instead. For networks whose convolutions are slow inside compiled loops on a
    CPU, call :func:`escape` from Python.

    ``update`` takes the extra arguments ``value_fn``, the loss of the parameters on this batch; ``grad``; and
    optionally ``certify_fn``, the loss on another batch, which must confirm the negative curvature.

    Args:
      base: the optimiser.
      key: for perturbations and Lanczos start vectors.
      period: updates from one check to the next; the first check is at the first update.
      num_matvecs: Hessian-vector products per check, at most the number of parameters; by default that or 16. Memory
        is as many vectors.
      region: parameters to approach first, such as those of ``kdjax.saddles.select_weights``.
      escape_radius: length of the longest escape, relative to the norm of the parameters (or to 1, if that is less).
      perturbation_radius: length of the perturbation before a check, relative to the same; 0 for none.
      negative_curvature_ratio: threshold of :math:`-\lambda_{min} / \lambda_{max}`.
      budget: escapes in all.
      cooldown: updates after an escape without a check; 20 as published.
      axis_name: mapped axis whose devices hold parts of the batch. Losses and products are averaged over it, so all
        devices decide alike. Updates must come averaged.

    Returns:
      A transformation whose ``update`` needs ``params`` and ``value_fn``.

    Raises:
      ValueError: if an option is out of range, ``num_matvecs`` not from 1 to the number of parameters, the region not
        like the parameters, parameters are not floating, or ``update`` lacks an argument.

    References:
      Dewan, SPRKD, arXiv 2607.23346, 2026. As published, an escape is ``accept_if_better`` around
      ``negative_eigenstep`` and ``perturb``.

    Examples:
      >>> loss = lambda p: p[0] ** 2 - p[1] ** 2 + p[1] ** 4 / 4
      >>> tx = sprkd(optax.sgd(0.1), num_matvecs=2, period=10, key=jax.random.key(0))
      >>> params = jnp.array([1.0, 0.0])  # SGD converges from here to the saddle and stays
      >>> state = tx.init(params)
      >>> update = jax.jit(lambda p, state: tx.update(jax.grad(loss)(p), state, p, value_fn=loss))
      >>> for _ in range(60):
      ...     updates, state = update(params, state)
      ...     params = optax.apply_updates(params, updates)
      >>> round(float(loss(params)), 2)
      -1.0
    """
    [num_matvecs] = static_sizes("sprkd", num_matvecs=num_matvecs)
    check_period("sprkd", period)
    check_positive("sprkd", escape_radius=escape_radius)
    check_positive(
        "sprkd",
        zero=True,
        perturbation_radius=perturbation_radius,
        negative_curvature_ratio=negative_curvature_ratio,
        budget=budget,
        cooldown=cooldown,
    )
    base = optax.with_extra_args_support(base)
    approach = None if region is None else approach_region(region)
    draws = Draws(key)

    def init(params: Params) -> SprkdState:
        check_params("sprkd", params, num_matvecs)
        return SprkdState(
            zero_count(),
            draws.init(),
            base.init(params),
            None if approach is None else approach.init(params),
            jnp.asarray(DESCEND if approach is None else APPROACH, jnp.int32),
            zero_count(),
            *(nan() for _ in range(3)),
            *(zero_count() for _ in range(4)),
        )

    def update(updates, state, params=None, *, value_fn=None, grad=None, certify_fn=None, **extra_args):
        params, value_fn = require_loss("sprkd", params, value_fn)
        grad = updates if grad is None else grad
        steps, base_state = base.update(
            updates, state.base, params, value_fn=value_fn, grad=grad, **extra_args
        )
        phase, approach_state = state.phase, state.approach
        if approach is not None:
            steps, approach_state = approach.update(steps, state.approach, params)
            phase = optax.tree.get(approach_state, "arrived").astype(jnp.int32)
            base_state = jax.lax.cond(phase == DESCEND, lambda: base_state, lambda: state.base)

        def check():
            found = escape(
                value_fn,
                params,
                steps,
                draws.draw(state.key, state.num_checks),
                num_matvecs=num_matvecs,
                escape_radius=escape_radius,
                perturbation_radius=perturbation_radius,
                negative_curvature_ratio=negative_curvature_ratio,
                certify_fn=certify_fn,
                axis_name=axis_name,
            )
            accepted = found.accepted.astype(jnp.int32)
            spent = (accepted, jnp.ones((), jnp.int32), found.hvps, found.evaluations)
            wait = jnp.where(found.accepted, jnp.asarray(cooldown, jnp.int32), 0)
            return found.updates, wait, (found.lambda_min, found.lambda_max, found.residual), spent

        def idle():
            latest = (state.lambda_min, state.lambda_max, state.residual)
            return steps, jnp.maximum(state.wait - 1, 0), latest, tuple(zero_count() for _ in range(4))

        due = (state.count % period == 0) & (phase == DESCEND) & (state.wait == 0) & (state.events < budget)
        steps, wait, latest, spent = jax.lax.cond(due, check, idle)
        totals = (state.events, state.num_checks, state.hvps, state.evaluations)
        return steps, SprkdState(
            jnp.asarray(optax.safe_increment(state.count)),
            state.key,
            base_state,
            approach_state,
            phase,
            wait,
            *latest,
            *(total + more for total, more in zip(totals, spent, strict=True)),
        )

    return transformation(init, update)
