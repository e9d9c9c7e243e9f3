"""Constraints on the parameters."""

import jax
import jax.numpy as jnp
import optax

from kdjax.transforms._utils import known, needs_params, transformation
from kdjax.types import Scalar


def max_norm(limit: Scalar) -> optax.GradientTransformationExtraArgs:
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
    if not known(limit, otherwise=1) > 0:
        raise ValueError(
            f"max_norm needs a limit above 0, got {limit}; 15 ** 0.5 is the one published for MNIST."
        )

    def update(updates, state, params=None, **extra_args):
        del extra_args
        params = needs_params("max_norm", params)

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
