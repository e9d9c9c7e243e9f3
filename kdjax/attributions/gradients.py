"""Input gradients that a loss can train through."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from kdjax.attributions.integrated import check_inputs


def trainable_input_gradients(
    score_fn: Callable[..., Array], params: PyTree, inputs: PyTree, *constants: Any
) -> PyTree:
    """The gradient of each example's score by its own inputs, differentiable with respect to the weights.

    The backward pass with cotangent v differentiates the score's gradient along v: forward over reverse mode.
    ``jax.grad`` of ``jax.grad`` would be reverse over reverse, whose second-order convolutions are slow on a CPU inside
    a loop, where :func:`kdjax.train.fit` trains.

    Matching a student's map (gradient times input) to a teacher's, as in :func:`kdjax.losses.attribution_map`::

        def score(params, images, labels):
            return jnp.take_along_axis(network(params, images), labels[:, None], axis=-1)

        def loss(params, images, labels, teacher_map):
            slope = attributions.trainable_input_gradients(score, params, images, labels)
            own = losses.attribution_map(slope * images)
            return jnp.mean(losses.map_distance(own, losses.attribution_map(teacher_map)))

    Args:
      score_fn: ``score_fn(params, inputs, *constants)``, of any shape; its sum is differentiated. Use layers of
        :mod:`kdjax.models.layers`, whose gradients have forward derivatives, or JAX's own.
      params: a pytree of floating-point arrays.
      inputs: what to differentiate by first: an array [batch, ...] or a pytree of them.
      constants: anything else, such as labels, BatchNorm statistics and keys. No gradient reaches them.

    References:
      Drucker, Le Cun, `Improving generalization performance using double backpropagation
      <https://doi.org/10.1109/72.165600>`_, 1992; Pearlmutter, `Fast exact multiplication by the Hessian
      <https://doi.org/10.1162/neco.1994.6.1.147>`_, 1994; maps as a loss: Ross, Hughes, Doshi-Velez, `Right for the
      Right Reasons <https://arxiv.org/abs/1703.03717>`_, 2017.
    """

    def gradients(wanted, params, inputs, *constants):
        return jax.grad(lambda p, x: jnp.sum(score_fn(p, x, *constants)), wanted)(params, inputs)

    slope = jax.custom_vjp(functools.partial(gradients, 1))

    def backward(saved, v):
        params, inputs, *constants = saved
        _, tangents = jax.jvp(lambda x: gradients((0, 1), params, x, *constants), (inputs,), (v,))
        return *tangents, *[None] * len(constants)

    slope.defvjp(lambda *arguments: (slope(*arguments), arguments), backward)
    return slope(params, check_inputs(inputs), *constants)
