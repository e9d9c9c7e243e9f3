"""Optax transformations that distillation needs and optax lacks.

Each is an ``optax.GradientTransformationExtraArgs``: it ignores extra arguments that are not its own, keeps its dtypes
fixed, and its state records what one would want to plot or to evaluate.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from kdjax.types import Params


class ParameterEmaState(NamedTuple):
    """State of :func:`parameter_ema`."""

    count: jax.Array  # int32[], updates seen
    ema: Params  # float32 average of the parameters, without the bias of its start


def parameter_ema(decay: float) -> optax.GradientTransformationExtraArgs:
    r"""Keeps a moving average of the parameters beside them; passes the updates through unchanged.

    Put it last in a chain, since it averages ``params + updates``. The weight of the newest parameters is
    :math:`(1 - d) / (1 - d^n)` after n updates, which makes the average unbiased from the first update on (the start
    is forgotten at once, and n equal parameters average to themselves). Read it back with
    ``optax.tree.get(opt_state, "ema")``.

    Args:
      decay: d in [0, 1); .999 averages over about the last thousand updates.

    Returns:
      A transformation whose ``update`` needs ``params``.

    Raises:
      ValueError: if decay is outside [0, 1), or ``update`` is called without parameters.

    References:
      Polyak, Juditsky, Acceleration of Stochastic Approximation by Averaging, 1992; the bias correction is that of
      Kingma, Ba, `Adam <https://arxiv.org/abs/1412.6980>`_, 2015, section 3.

    Examples:
      >>> tx = optax.chain(optax.sgd(0.1), parameter_ema(0.9))
      >>> state = tx.init(jnp.ones(3))
      >>> updates, state = tx.update(jnp.ones(3), state, jnp.ones(3))
      >>> optax.tree.get(state, "ema").round(2).tolist()
      [0.8999999761581421, 0.8999999761581421, 0.8999999761581421]
    """
    if not 0 <= decay < 1:
        raise ValueError(f"parameter_ema needs a decay in [0, 1), got {decay}; .99 to .9999 are usual.")

    def init(params: Params) -> ParameterEmaState:
        # A copy, not a cast: a state that shares buffers with the parameters could not be donated with them.
        return ParameterEmaState(
            jnp.zeros((), jnp.int32), jax.tree.map(lambda p: jnp.array(p, jnp.float32), params)
        )

    def update(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(
                "parameter_ema needs the current parameters: call update(updates, state, params)."
            )
        count = jnp.asarray(optax.safe_increment(state.count))
        weight = (1 - decay) / (1 - jnp.asarray(decay, jnp.float32) ** count)
        new_params = optax.apply_updates(params, updates)
        ema = jax.tree.map(lambda e, p: e + weight * (p.astype(jnp.float32) - e), state.ema, new_params)
        return updates, ParameterEmaState(count, ema)

    return optax.GradientTransformationExtraArgs(init, update)


def max_norm(limit: float) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the incoming weights of every unit within a ball: the weight constraint that goes with dropout.

    Put it last in a chain, since it looks at ``params + updates``: a unit whose weight vector would leave the ball is
    set back to its surface, :math:`w \leftarrow w \min(1, c / \lVert w \rVert_2)`. A unit is an index of the last axis
    of an array with two axes or more, as in the kernels of dense layers and convolutions; biases and scales are free.
    Units inside the ball are updated bit for bit as without it.

    Args:
      limit: c, the largest L2 norm of a unit's incoming weights; the dropout paper allows a squared norm of 15.

    Returns:
      A transformation whose ``update`` needs ``params``, and which has no state.

    Raises:
      ValueError: if the limit is not positive, or ``update`` is called without parameters.

    References:
      Hinton et al., `Improving neural networks by preventing co-adaptation of feature detectors
      <https://arxiv.org/abs/1207.0580>`_, 2012, appendix A.

    Examples:
      >>> params = jnp.array([[3.0, 0.3], [4.0, 0.4]])
      >>> updates, _ = max_norm(1.0).update(jnp.zeros((2, 2)), optax.EmptyState(), params)
      >>> jnp.linalg.norm(optax.apply_updates(params, updates), axis=0).round(3).tolist()
      [1.0, 0.5]
    """
    if not limit > 0:
        raise ValueError(
            f"max_norm needs a limit above 0, got {limit}; 15 ** 0.5 is the one published for MNIST."
        )

    def update(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError("max_norm needs the current parameters: call update(updates, state, params).")

        def constrain(update, param):
            if param.ndim < 2:
                return update
            new = (param + update).astype(jnp.float32)
            norm = jnp.sqrt(jnp.sum(new**2, axis=tuple(range(new.ndim - 1)), keepdims=True))
            outside = norm > limit
            back = new * (limit / jnp.where(outside, norm, limit)) - param.astype(jnp.float32)
            return jnp.where(outside, back.astype(update.dtype), update)

        return jax.tree.map(constrain, updates, params), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
