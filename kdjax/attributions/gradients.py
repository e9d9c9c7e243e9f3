"""What stands beside integrated gradients: plain gradients, and averages over noisy inputs."""

from collections.abc import Callable

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
