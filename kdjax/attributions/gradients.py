"""What stands beside integrated gradients: plain gradients, and averages over noisy inputs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from kdjax.attributions.integrated import ScoreFn, check_inputs, check_score


def input_gradients(score_fn: ScoreFn, inputs: PyTree, *, targets: PyTree | None = None) -> PyTree:
    """The gradient of each example's score by its own inputs; arguments and errors as in integrated_gradients.

    References:
      Simonyan, Vedaldi, Zisserman, `Deep Inside Convolutional Networks <https://arxiv.org/abs/1312.6034>`_, 2014.
    """
    score = check_score(score_fn, inputs, targets)
    return jax.grad(lambda x: jnp.sum(score(x)))(inputs)


def trainable_input_gradients(
    score_fn: Callable[..., Array], params: PyTree, inputs: PyTree, *constants: Any
) -> PyTree:
    """:func:`input_gradients` as a term of a loss: what is made of them can be differentiated with respect to weights.

    For a cotangent v of these gradients that takes the derivative of the score's gradient as the inputs move along v:
    forward over reverse mode. ``jax.grad`` of :func:`input_gradients` would be reverse over reverse, of which the
    second-order convolutions have no fast form on a CPU within a loop, where :func:`kdjax.train.fit` trains.

    A student is drawn to a teacher's map so, times the input, as in :func:`kdjax.losses.attribution_map`::

        def score(params, images, labels):
            return jnp.take_along_axis(network(params, images), labels[:, None], axis=-1)

        def loss(params, images, labels, teacher_map):
            slope = attributions.trainable_input_gradients(score, params, images, labels)
            own = losses.attribution_map(slope * images)
            return jnp.mean(losses.map_distance(own, losses.attribution_map(teacher_map)))

    Args:
      score_fn: ``score_fn(params, inputs, *constants)``, of any shape: what is differentiated is its sum. Of layers
        from :mod:`kdjax.models.layers`, whose gradients can be differentiated forwards, or of JAX's own.
      params: a pytree of floating-point arrays.
      inputs: what to differentiate by first: an array [batch, ...] or a pytree of them.
      constants: anything else, such as labels, batch statistics and keys. No gradient reaches them.

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
        _, moved = jax.jvp(lambda x: gradients((0, 1), params, x, *constants), (inputs,), (v,))
        return *moved, *[None] * len(constants)

    slope.defvjp(lambda *arguments: (slope(*arguments), arguments), backward)
    return slope(params, check_inputs(inputs), *constants)


def gradient_times_input(score_fn: ScoreFn, inputs: PyTree, *, targets: PyTree | None = None) -> PyTree:
    """Integrated gradients from zero with one node, at the input itself; exact where the score is linear.

    References:
      Shrikumar et al., `Not Just a Black Box <https://arxiv.org/abs/1605.01713>`_, 2016.
    """
    return jax.tree.map(jnp.multiply, inputs, input_gradients(score_fn, inputs, targets=targets))


def smoothgrad(
    attribute: Callable[[PyTree], PyTree],
    inputs: PyTree,
    key: Key[Array, ""],
    *,
    num_samples: int = 50,
    sigma: float = 0.15,
    squared: bool = False,
) -> PyTree:
    """The mean of an attribution over Gaussian noise on the inputs.

    With :func:`input_gradients` it is SmoothGrad, with integrated gradients SmoothGrad-IG::

        smoothgrad(lambda x: integrated_gradients(score_fn, x, num_steps=20).values, inputs, key)

    Args:
      attribute: from inputs to their attributions.
      inputs: a batch, of one array or a pytree of them.
      key: of the noise.
      num_samples: noisy copies of each input.
      sigma: standard deviation of the noise, as a share of the range of each example's values in each array.
      squared: average squares instead, which do not cancel.

    Raises:
      ValueError: if there are no samples, sigma is negative, or the inputs are no batch of floating-point numbers.

    References:
      Smilkov et al., `SmoothGrad <https://arxiv.org/abs/1706.03825>`_, 2017; squares: Hooker et al., `A Benchmark for
      Interpretability Methods <https://arxiv.org/abs/1806.10758>`_, 2019.
    """
    if num_samples < 1 or sigma < 0:
        raise ValueError(
            f"smoothgrad needs a sample or more and a sigma of 0 or more, got {num_samples} and {sigma}."
        )
    inputs = check_inputs(inputs)
    leaves, structure = jax.tree.flatten(inputs)

    def disturbed(x, key):
        rest = tuple(range(1, x.ndim))
        width = jnp.max(x, axis=rest, keepdims=True) - jnp.min(x, axis=rest, keepdims=True)
        return x + sigma * width * jax.random.normal(key, x.shape, x.dtype)

    def add(total, number):
        keys = jax.random.split(jax.random.fold_in(key, number), len(leaves))
        found = attribute(jax.tree.unflatten(structure, map(disturbed, leaves, keys)))
        return jax.tree.map(lambda t, x: t + (x**2 if squared else x), total, found), None

    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, inputs), jnp.arange(num_samples))
    return jax.tree.map(lambda x: x / num_samples, total)
