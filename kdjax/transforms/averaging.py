"""Averages of the parameters."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from kdjax.transforms._utils import known, require_params, transformation, zero_count
from kdjax.types import Params, Scalar


class ParameterEmaState(NamedTuple):
    """State of :func:`parameter_ema`."""

    count: jax.Array  # int32[], updates seen
    ema: Params  # float32 average of the parameters, bias-corrected


def parameter_ema(decay: Scalar) -> optax.GradientTransformationExtraArgs:
    r"""Keeps a moving average of the parameters beside them; passes the updates through unchanged.

    Put it last in a chain, since it averages ``params + updates``. The weight of the newest parameters is
    :math:`(1 - d) / (1 - d^n)` after n updates, so the average is unbiased from the first update on: the initial
    parameters have no weight, and equal parameters average to themselves. Read it with
    ``optax.tree.get(opt_state, "ema")``.

    Args:
      decay: d in [0, 1); .999 averages over about the last thousand updates. In bfloat16 it would round to 1: with such
        parameters, pass ``hyperparam_dtype=jnp.float32`` to ``optax.inject_hyperparams``.

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
    if not 0 <= known(decay, otherwise=0) < 1:
        raise ValueError(f"parameter_ema needs a decay in [0, 1), got {decay}; .99 to .9999 are usual.")

    def init(params: Params) -> ParameterEmaState:
        # A copy, not a cast: a state that shares buffers with the parameters could not be donated with them.
        return ParameterEmaState(zero_count(), jax.tree.map(lambda p: jnp.array(p, jnp.float32), params))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        params = require_params("parameter_ema", params)
        count = jnp.asarray(optax.safe_increment(state.count))
        rate = jnp.asarray(decay, jnp.float32)
        weight = (1 - rate) / (1 - rate**count)
        new_params = optax.apply_updates(params, updates)
        ema = jax.tree.map(lambda e, p: e + weight * (p.astype(jnp.float32) - e), state.ema, new_params)
        return updates, ParameterEmaState(count, ema)

    return transformation(init, update)
