"""Losses between the scores of two networks: what the teacher says of every class, not only of the right one.

All of them take logits before the softmax, student first, return one value per example and compute in float32.
Soft losses carry the factor T², which keeps their gradient on one scale as the temperature varies, so that a weight
chosen at one temperature stays meaningful at another.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kdjax.types import Scalar


def soft_target_kl(
    student_logits: Float[Array, "*batch classes"],
    teacher_logits: Float[Array, "*batch classes"],
    *,
    temperature: Scalar = 1.0,
) -> Float[Array, "*batch"]:
    r"""Divergence of the student from the teacher's softened predictions.

    .. math:: T^2 \, \mathrm{KL}(\sigma(t / T) \,\|\, \sigma(s / T))

    Args:
      student_logits: unnormalised scores of the student.
      teacher_logits: unnormalised scores of the teacher; constant under differentiation.
      temperature: softening T > 0. At 1 the teacher's probabilities are matched; as T grows the loss tends to half
        the mean squared difference of the centred logits.

    Returns:
      One non-negative value per example, in nats times T²; zero where both predict the same. Reduce with ``jnp.mean``.

    Raises:
      ValueError: if the temperature is a Python number that is not positive.

    References:
      Hinton, Vinyals, Dean, `Distilling the Knowledge in a Neural Network <https://arxiv.org/abs/1503.02531>`_,
      2015, sections 2 and 2.1. Default there: T 2.5 to 20, soft weight .9 or more.

    Examples:
      >>> import jax.numpy as jnp
      >>> student, teacher = jnp.array([[2.0, 0.0, 0.0]]), jnp.array([[0.0, 2.0, 0.0]])
      >>> soft_target_kl(student, teacher, temperature=4.0).shape
      (1,)
      >>> float(soft_target_kl(teacher, teacher, temperature=4.0)[0])
      0.0
    """
    if isinstance(temperature, (int, float)) and temperature <= 0:
        raise ValueError(
            f"soft_target_kl needs a temperature above 0, got {temperature}; the field uses 1 to 20."
        )
    student = jax.nn.log_softmax(student_logits.astype(jnp.float32) / temperature)
    teacher = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_logits).astype(jnp.float32) / temperature)
    return temperature**2 * _divergence(teacher, student)


def _divergence(
    log_p: Float[Array, "*batch classes"], log_q: Float[Array, "*batch classes"]
) -> Float[Array, "*batch"]:
    """KL(p‖q) of normalised log-probabilities, as a sum of terms p (d + e^-d - 1) with d = log p - log q.

    Unlike the terms of the usual Σ p d these are never negative and do not cancel, which keeps the digits of float32 at
    high temperatures. Where p and q are far apart e^-d may overflow, and p d - p + q, its equal, takes over.
    """
    p, q, d = jnp.exp(log_p), jnp.exp(log_q), log_p - log_q
    near = jnp.abs(d) < 0.1
    small = jnp.where(near, d, 0)
    terms = jnp.where(near, p * (small + jnp.expm1(-small)), p * jnp.where(p > 0, d, 0) - p + q)
    return jnp.sum(terms, axis=-1)
