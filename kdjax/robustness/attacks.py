"""Noise on a network's weights, and adversarial attacks on its images.

The attacks are white-box: they follow the network's own gradient, in reverse mode, since kdjax's convolutions have no
forward mode. Where that gradient is uninformative, they overestimate the robustness.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from kdjax import data
from kdjax.types import ApplyFn, ModelState, Params, Scalar

WEIGHT_NOISE = (0.02, 0.05, 0.1, 0.2, 0.4)
"""Relative standard deviations for :func:`perturb_weights`, our own choice: from hardly noticeable to harmful."""

EPSILONS = (2.0, 4.0, 8.0, 16.0)
"""Sizes of attacks in grey levels of 255; 8 is usual for CIFAR-10 (Madry et al. 2018, section 5)."""

PGD_STEPS, PGD_STEP_SIZE = 20, 0.25
"""Steps of PGD, and the size of each as a part of epsilon: Madry et al. 2018, section 5."""


def perturb_weights(params: Params, sigma: Scalar, key: Key[Array, ""]) -> Params:
    """Multiplies every parameter by ``1 + sigma * normal``, a model of analogue hardware.

    The same key gives the same directions at every ``sigma``. BatchNorm's statistics are no parameters.
    """
    leaves, treedef = jax.tree.flatten(params)
    if not leaves:
        return params
    # One draw for all leaves: a separate draw for each would take half a second each to compile.
    ends = np.cumsum([leaf.size for leaf in leaves])
    noise = jnp.split(jax.random.normal(key, (ends[-1],)), ends[:-1])
    noisy = [
        (leaf * (1 + sigma * n.reshape(leaf.shape))).astype(leaf.dtype)
        for leaf, n in zip(leaves, noise, strict=True)
    ]
    return jax.tree.unflatten(treedef, noisy)


def attack(
    apply_fn: ApplyFn,
    params: Params,
    model_state: ModelState,
    images: Array,
    label: Array,
    start: Array,
    *,
    epsilon: Scalar,
    steps: int | Int[Array, ""],
    step_size: Scalar,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Array:
    """Projected gradient descent: steps along the sign of the loss's gradient, each projected back.

    From the images, one step of ``epsilon`` is the fast gradient sign method (FGSM); from ``images + epsilon *
    offset(keys, images)`` it is PGD.

    Args:
      apply_fn: the network; called with ``train=False``, so BatchNorm uses its stored statistics.
      params: its parameters.
      model_state: its statistics.
      images: [batch, height, width, channels] in [0, 1].
      label: true classes, which the attack moves away from.
      start: the images of the first step.
      epsilon: largest change of a pixel, on the scale [0, 1].
      steps: number of steps.
      step_size: of each step, on the scale [0, 1].
      mean: of the normalisation that the network expects, through which the gradient is taken.
      std: of the normalisation.

    Returns:
      The images of the last step, within ``epsilon`` of the given ones in every pixel, and in [0, 1].

    References:
      Goodfellow et al., `Explaining and Harnessing Adversarial Examples <https://arxiv.org/abs/1412.6572>`_, 2015,
      section 4. Madry et al., `Towards Deep Learning Models Resistant to Adversarial Attacks
      <https://arxiv.org/abs/1706.06083>`_, 2018, section 2.1; 20 steps of epsilon / 4 in section 5.
    """
    loss = functools.partial(_margin, apply_fn, params, model_state, label=label, mean=mean, std=std)
    lowest, highest = jnp.clip(images - epsilon, 0, 1), jnp.clip(images + epsilon, 0, 1)

    def step(_, x):
        return jnp.clip(x + step_size * jnp.sign(jax.grad(loss)(x)), lowest, highest)

    return jax.lax.fori_loop(0, steps, step, jnp.clip(start, lowest, highest))


def offset(keys: Key[Array, " batch"], images: Array) -> Array:
    """The random start of PGD: uniform in [-1, 1] per pixel, in units of epsilon."""
    return jax.vmap(lambda key: jax.random.uniform(key, images.shape[1:], minval=-1, maxval=1))(keys)


def _margin(
    apply_fn: ApplyFn,
    params: Params,
    model_state: ModelState,
    images: Array,
    *,
    label: Array,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Array:
    """Sum over the batch of the margin m, where the cross-entropy is log(1 + exp(m)).

    The cross-entropy increases with m, so both gradients have the same signs. But where the network is confident the
    gradient of the cross-entropy rounds to zero, and an attack that follows it stands still.
    """
    inputs = data.normalise(255 * images, mean=mean, std=std)
    logits = apply_fn(params, model_state, inputs, train=False, key=None)[0].logits.astype(jnp.float32)
    true = jax.nn.one_hot(label, logits.shape[-1], dtype=bool)
    others = jax.nn.logsumexp(jnp.where(true, -jnp.inf, logits), axis=-1)
    return jnp.sum(others - jnp.sum(jnp.where(true, logits, 0), axis=-1))
