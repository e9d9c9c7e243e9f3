"""Distillation for regression: squared errors against noisy labels and an imperfect teacher, and their best weights.

Minimising a weighted sum of squared distances to labels and teacher minimises the distance to their weighted mean. The
best weight depends on the errors of the two, in closed form.
"""

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float

from kdjax.losses._checks import NonNegative, checked
from kdjax.types import Scalar


@checked
def squared_error(
    student: Float[Array, "*batch outputs"],
    teacher: Float[Array, "*batch outputs"],
    targets: Float[Array, "*batch outputs"],
    *,
    hard_weight: Scalar | Float[Array, "*batch"] = 0.5,
) -> Float[Array, "*batch"]:
    r"""Regression distillation: weighted sum of the squared errors against labels and teacher.

    .. math:: \frac1D \sum_d \left[a (s_d - y_d)^2 + (1 - a) (s_d - t_d)^2\right]
              = \frac1D \sum_d \left[(s_d - a y_d - (1 - a) t_d)^2 + a (1 - a) (y_d - t_d)^2\right]

    By the second form the student learns the weighted mean a y + (1 - a) t. Its last term does not depend on the
    student and keeps the value above zero wherever labels and teacher differ.

    Args:
      student: outputs of the student.
      teacher: outputs of the teacher; constant under differentiation.
      targets: the labels, which may be noisy.
      hard_weight: a of the labels, one for all examples or one for each; the teacher has 1 - a. It may lie outside 0
        to 1, as that of :func:`best_hard_weight` can.

    Returns:
      One value per example, the mean over its outputs.

    References:
      Hao, A Study of Response-Based Knowledge Distillation and the Effects of Alpha on Model Accuracy, 2023, equation
      7.1; Safaryan, Peste, Alistarh, `Knowledge Distillation Performs Partial Variance Reduction
      <https://arxiv.org/abs/2305.17581>`_, 2023. Default of the first for classifiers: a .1.
    """
    student, targets = student.astype(jnp.float32), targets.astype(jnp.float32)
    teacher = jax.lax.stop_gradient(teacher).astype(jnp.float32)
    hard, soft = (jnp.mean(jnp.square(student - wanted), axis=-1) for wanted in (targets, teacher))
    return hard_weight * hard + (1 - hard_weight) * soft


@checked
def best_hard_weight(
    label_error: NonNegative, teacher_error: NonNegative, *, covariance: Scalar = 0.0
) -> Float[Array, ""]:
    r"""Weight of the labels that minimises the error of the weighted mean of labels and teacher.

    .. math:: a^* = \frac{\tau^2 - c}{\sigma^2 + \tau^2 - 2 c}
              = \arg\min_a \mathbb E \, (a \varepsilon_y + (1 - a) \varepsilon_t)^2,
              \qquad \text{least error} = \frac{\sigma^2 \tau^2 - c^2}{\sigma^2 + \tau^2 - 2 c}

    with errors ε_y of the labels (mean square σ²), ε_t of the teacher (τ²: its variance plus its squared bias) and
    c their mean product. With c = 0 the weights are inversely proportional to the errors. A student that is linear in
    its parameters is linear in its targets too, so the same weight is best for a student of :func:`squared_error`:

    - Least squares: σ² is the error of a student fitted to the labels alone (noise variance times d / n for d
      coefficients and n fixed inputs), τ² that of one fitted to the teacher alone.
    - Stochastic gradient descent with a constant step, in its stationary state: σ² is the mean squared distance of the
      weights from the optimum for the labels, without a teacher; τ² is that of the teacher. The teacher scales the
      variance by a² and moves the mean by 1 - a of the teacher's distance: a partial variance reduction.

    A teacher fitted to the same labels shares their noise, c > 0. Where c > τ² the best weight is negative.

    Args:
      label_error: σ², mean squared error of the labels.
      teacher_error: τ², mean squared error of the teacher.
      covariance: c, mean product of the two errors, at most their geometric mean in absolute value.

    Returns:
      a* for :func:`squared_error`, not confined to 0 to 1; one half where labels and teacher always agree and any
      weight is best.

    References:
      Bates, Granger, The Combination of Forecasts, 1969, on the best linear combination of two estimates; for a
      student of its own teacher Das, Sanghavi, `Understanding Self-Distillation in the Presence of Label Noise
      <https://arxiv.org/abs/2301.13304>`_, 2023, section 3, with a best weight of the teacher above 1; for stochastic
      gradients Safaryan, Peste, Alistarh, `Knowledge Distillation Performs Partial Variance Reduction
      <https://arxiv.org/abs/2305.17581>`_, 2023.
    """
    label_error, teacher_error, covariance = map(jnp.float32, (label_error, teacher_error, covariance))
    apart = label_error + teacher_error - 2 * covariance
    return jnp.where(apart > 0, (teacher_error - covariance) / jnp.where(apart > 0, apart, 1), 0.5)


@checked
def one_shot_hard_weight(
    targets: Float[Array, "examples outputs"],
    teacher: Float[Array, "examples outputs"],
    of_targets: Float[Array, "examples outputs"],
    of_teacher: Float[Array, "examples outputs"],
    *,
    freedom: NonNegative,
    own_freedom: NonNegative | None = None,
) -> Float[Array, ""]:
    r"""The weight of :func:`best_hard_weight`, estimated from two fits to the training examples, without further ones.

    .. math:: \hat a = \frac{\langle e_t, e_t - e_y \rangle}{\lVert e_t - e_y \rVert^2}, \qquad
              e_y = \frac{y - S y}{1 - s}, \qquad e_t = \frac{y - S t - s (y - t)}{1 - s}

    for students that are linear in their targets, with S the matrix from targets to predictions on the same examples
    and s = trace S / n, such as ridge regression on fixed features. A student of labels and teacher is then the
    weighted mean of one that was fitted to the labels and one that was fitted to the teacher. Both errors e are those
    on an example that was left out, by generalised cross-validation. In self-distillation t = S y, and leaving a label
    out changes the teacher too:

    .. math:: e_t = \frac{y - S^2 y}{1 - s} - \frac{(s - s_2) (y - S y)}{(1 - s)^2},
              \qquad s_2 = \mathrm{trace}(S^2) / n

    Args:
      targets: the labels y of the training examples.
      teacher: the teacher's predictions t for them.
      of_targets: predictions S y of the student that was fitted to the labels alone.
      of_teacher: predictions S t of the student that was fitted to the teacher alone.
      freedom: degrees of freedom of the student, trace S; below the number of examples.
      own_freedom: trace of S², where the teacher is the student that was fitted to the labels; None for a teacher that
        saw none of these labels.

    Returns:
      The estimated weight of the labels for :func:`squared_error`, not confined to 0 to 1; one half where both students
      are equal.

    Raises:
      ValueError: if the degrees of freedom are not below the number of examples: there is nothing left to estimate
        from.

    References:
      Golub, Heath, Wahba, Generalized Cross-Validation as a Method for Choosing a Good Ridge Parameter, 1979; Dang,
      Patil, Rinaldo, `Optimal Unconstrained Self-Distillation in Ridge Regression
      <https://arxiv.org/abs/2602.17565>`_, 2026, who tune self-distillation in one shot.
    """
    count = targets.shape[0]
    if not isinstance(freedom, Tracer) and not freedom < count:
        raise ValueError(
            f"one_shot_hard_weight needs degrees of freedom below the {count} examples, got freedom={freedom}: such a "
            "student fits its training examples whatever they are."
        )
    y, t, of_y, of_t = (x.astype(jnp.float32) for x in (targets, teacher, of_targets, of_teacher))
    share = jnp.float32(freedom) / count
    label_error = (y - of_y) / (1 - share)
    if own_freedom is None:
        teacher_error = (y - of_t - share * (y - t)) / (1 - share)
    else:
        lost = (share - jnp.float32(own_freedom) / count) / (1 - share)
        teacher_error = (y - of_t) / (1 - share) - lost * label_error
    apart = teacher_error - label_error
    spread = jnp.sum(apart * apart)  # not the difference of three near sums
    return jnp.where(spread > 0, jnp.sum(teacher_error * apart) / jnp.where(spread > 0, spread, 1), 0.5)
