"""Constraints on the parameters."""

import jax
import jax.numpy as jnp
import optax

from kdjax.transforms._utils import known, require_params, transformation
from kdjax.types import Scalar


def max_norm(limit: Scalar) -> optax.GradientTransformationExtraArgs:
    r"""Projects the incoming weights of every unit onto a ball: the weight constraint used with dropout.

    Put it last in a chain, since it constrains ``params + updates``: a weight vector outside the ball is scaled back to
    its surface, :math:`w \leftarrow w \min(1, c / \lVert w \rVert_2)`. A unit is an index of the last axis
    of an array with two axes or more, as in the kernels of dense layers and convolutions; biases and scales are not
    constrained. Units inside the ball keep their update bit for bit.

    Args:
      limit: c, the largest 2-norm of a unit's incoming weights; the dropout paper uses a squared norm of 15.

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
    if not known(limit, otherwise=1) > 0:
        raise ValueError(
            f"max_norm needs a limit above 0, got {limit}; 15 ** 0.5 is the one published for MNIST."
        )

    def update(updates, state, params=None, **extra_args):
        del extra_args
        params = require_params("max_norm", params)

        def constrain(update, param):
            if jnp.ndim(param) < 2:
                return update
            new = (param + update).astype(jnp.float32)
            norm = jnp.sqrt(jnp.sum(new**2, axis=tuple(range(new.ndim - 1)), keepdims=True))
            outside = norm > limit
            back = new * (limit / jnp.where(outside, norm, limit)) - param.astype(jnp.float32)
            return jnp.where(outside, back.astype(update.dtype), update)

        return jax.tree.map(constrain, updates, params), state

    return transformation(lambda params: optax.EmptyState(), update)
