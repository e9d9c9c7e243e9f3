"""What stands beside integrated gradients: plain gradients, and averages over noisy inputs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from kdjax.attributions.integrated import ScoreFn, check_score


def input_gradients(
    score_fn: ScoreFn, inputs: Float[Array, "batch ..."], *, targets: PyTree | None = None
) -> Float[Array, "batch ..."]:
    """The gradient of each example's score by its own inputs; arguments and errors as in integrated_gradients.

    References:
      Simonyan, Vedaldi, Zisserman, `Deep Inside Convolutional Networks <https://arxiv.org/abs/1312.6034>`_, 2014.
    """
    score = check_score(score_fn, inputs, targets)
    return jax.grad(lambda x: jnp.sum(score(x)))(inputs)


def trainable_input_gradients(
    score_fn: Callable[..., Array], params: PyTree, inputs: Float[Array, "batch ..."], *constants: Any
) -> Float[Array, "batch ..."]:
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
      inputs: what to differentiate by first.
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
    return slope(params, inputs, *constants)


def gradient_times_input(
    score_fn: ScoreFn, inputs: Float[Array, "batch ..."], *, targets: PyTree | None = None
) -> Float[Array, "batch ..."]:
    """Integrated gradients from zero with one node, at the input itself; exact where the score is linear.

    References:
      Shrikumar et al., `Not Just a Black Box <https://arxiv.org/abs/1605.01713>`_, 2016.
    """
    return inputs * input_gradients(score_fn, inputs, targets=targets)


def smoothgrad(
    attribute: Callable[[Float[Array, "batch ..."]], Float[Array, "batch ..."]],
    inputs: Float[Array, "batch ..."],
    key: Key[Array, ""],
    *,
    num_samples: int = 50,
    sigma: float = 0.15,
    squared: bool = False,
) -> Float[Array, "batch ..."]:
    """The mean of an attribution over Gaussian noise on the inputs.

    With :func:`input_gradients` it is SmoothGrad, with integrated gradients SmoothGrad-IG::

        smoothgrad(lambda x: integrated_gradients(score_fn, x, num_steps=20).values, inputs, key)

    Args:
      attribute: from inputs to their attributions.
      inputs: a batch.
      key: of the noise.
      num_samples: noisy copies of each input.
      sigma: standard deviation of the noise, as a share of the range of each example's values.
      squared: average squares instead, which do not cancel.

    Raises:
      ValueError: if there are no samples or sigma is negative.

    References:
      Smilkov et al., `SmoothGrad <https://arxiv.org/abs/1706.03825>`_, 2017; squares: Hooker et al., `A Benchmark for
      Interpretability Methods <https://arxiv.org/abs/1806.10758>`_, 2019.
    """
    if num_samples < 1 or sigma < 0:
        raise ValueError(
            f"smoothgrad needs a sample or more and a sigma of 0 or more, got {num_samples} and {sigma}."
        )
    flat = inputs.reshape(inputs.shape[0], -1)
    width = (jnp.max(flat, axis=-1) - jnp.min(flat, axis=-1)).reshape(-1, *(1,) * (inputs.ndim - 1))

    def add(total, number):
        noise = jax.random.normal(jax.random.fold_in(key, number), inputs.shape, inputs.dtype)
        found = attribute(inputs + sigma * width * noise)
        return total + (found**2 if squared else found), None

    return jax.lax.scan(add, jnp.zeros_like(inputs), jnp.arange(num_samples))[0] / num_samples
