"""Losses on the logits of two networks.

All take logits before the softmax: the student's, then the teacher's, then labels. They compute in float32 and return
one value per example, except :func:`dist`, which also correlates over the batch and returns one value for it. Soft
losses carry the factor T², which keeps the size of their gradient as the temperature varies, so that a weight chosen at
one temperature still fits at another.

Logits may be as large as ±1e4: all computation is on log-probabilities, so values and gradients stay finite. A logit of
-inf masks its class, and a negative label is void; see :mod:`kdjax.losses`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kdjax.losses._checks import Probability, Share, Temperature, checked
from kdjax.types import Scalar


@checked
def soft_target_kl(
    student_logits: Float[Array, "*batch classes"],
    teacher_logits: Float[Array, "*batch classes"],
    *,
    temperature: Temperature = 1.0,
) -> Float[Array, "*batch"]:
    r"""Knowledge distillation (KD): KL divergence of the student from the teacher's softened predictions.

    .. math:: T^2 \, \mathrm{KL}(\sigma(t / T) \,\|\, \sigma(s / T))

    Args:
      student_logits: logits of the student.
      teacher_logits: logits of the teacher; constant under differentiation.
      temperature: T > 0. As T grows the loss tends to half the mean squared difference of the centred logits.

    Returns:
      One non-negative value per example, in nats times T²; zero where both predict the same. Reduce with ``jnp.mean``.

    Raises:
      ValueError: if the temperature is not above 0.

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
    student, teacher = _log_softmax(student_logits, teacher_logits, temperature)
    return temperature**2 * _divergence(teacher, student)


@checked
def soft_target_cross_entropy(
    student_logits: Float[Array, "*batch classes"],
    teacher_logits: Float[Array, "*batch classes"],
    *,
    temperature: Temperature = 1.0,
) -> Float[Array, "*batch"]:
    r"""Knowledge distillation (KD) as a cross-entropy: the student's, under the teacher's softened predictions.

    .. math:: -T^2 \sum_k \sigma(t / T)_k \log \sigma(s / T)_k

    Equals :func:`soft_target_kl` plus T² times the entropy of the teacher's softened predictions: the same gradient,
    but not zero at student = teacher.

    Args:
      student_logits: logits of the student.
      teacher_logits: logits of the teacher; constant under differentiation.
      temperature: T > 0.

    Returns:
      One value per example, at least T² times the teacher's entropy.

    Raises:
      ValueError: if the temperature is not above 0.

    References:
      Hinton, Vinyals, Dean, `Distilling the Knowledge in a Neural Network <https://arxiv.org/abs/1503.02531>`_,
      2015, section 2, where this is the form of the soft loss. Default there: T 2.5 to 20, soft weight .9 or more.
    """
    student, teacher = _log_softmax(student_logits, teacher_logits, temperature)
    return temperature**2 * _cross_entropy(jnp.exp(teacher), student)


@checked
def squared_logits(
    student_logits: Float[Array, "*batch scores"], teacher_logits: Float[Array, "*batch scores"]
) -> Float[Array, "*batch"]:
    r"""Logit matching: mean squared difference of the logits over the classes.

    .. math:: \frac{1}{C} \sum_k (s_k - t_k)^2

    Unlike the losses on probabilities, it changes when a constant is added to all logits of an example. The mean is
    over the classes that neither network masks.

    Args:
      student_logits: logits of the student.
      teacher_logits: logits of the teacher; constant under differentiation.

    Returns:
      One non-negative value per example, in squared logits.

    References:
      Ba, Caruana, `Do Deep Nets Really Need to be Deep? <https://arxiv.org/abs/1312.6184>`_, 2014, section 2.2;
      Kim et al., `Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge Distillation
      <https://arxiv.org/abs/2105.08919>`_, 2021, section 4.
    """
    student, teacher = _live(student_logits), _live(jax.lax.stop_gradient(teacher_logits))
    live = ~(jnp.isneginf(student) | jnp.isneginf(teacher))
    difference = jnp.where(live, student - teacher, 0)
    return jnp.sum(jnp.square(difference), axis=-1) / jnp.maximum(jnp.sum(live, axis=-1), 1)


@checked
def dkd(
    student_logits: Float[Array, "*batch classes"],
    teacher_logits: Float[Array, "*batch classes"],
    labels: Int[Array, "*batch"],
    *,
    target_weight: Scalar | Float[Array, "*batch"] = 1.0,
    non_target_weight: Scalar | Float[Array, "*batch"] = 8.0,
    temperature: Temperature = 4.0,
) -> Float[Array, "*batch"]:
    r"""Decoupled knowledge distillation (DKD): separate weights for the target class and for the other classes.

    .. math:: T^2 \left[\alpha \, \mathrm{KL}(b^t \,\|\, b^s) + \beta \, \mathrm{KL}(\hat p^t \,\|\, \hat p^s)\right]

    where :math:`b = (p_y, 1 - p_y)` is the softened prediction of target against rest and :math:`\hat p` the softmax
    over the classes other than the target. With α = 1 and β = 1 - p_y of the teacher on each example it equals
    :func:`soft_target_kl`. With two classes the second term is zero.

    Args:
      student_logits: logits of the student.
      teacher_logits: logits of the teacher; constant under differentiation.
      labels: the target class of each example, 0 to classes - 1; void if negative.
      target_weight: α, one for all examples or one for each; constant under differentiation.
      non_target_weight: β, one for all examples or one for each; constant under differentiation.
      temperature: T > 0.

    Returns:
      One non-negative value per example; zero where both predict the same.

    Raises:
      ValueError: if the temperature is not above 0.

    References:
      Zhao et al., `Decoupled Knowledge Distillation <https://arxiv.org/abs/2203.08679>`_, 2022, section 3. Default
      there on CIFAR-100: α 1, T 4, β 8 (2 or 6 for some pairs), with a linear warm-up over 20 epochs; on ImageNet
      T 1, β .5 or 2.
    """
    student, teacher = _log_softmax(_labelled(student_logits, labels), teacher_logits, temperature)
    is_target = _one_hot(labels, student.shape[-1])
    (student_pair, student_rest), (teacher_pair, teacher_rest) = (
        _target_and_rest(log_p, is_target) for log_p in (student, teacher)
    )
    alpha, beta = jax.lax.stop_gradient((target_weight, non_target_weight))
    target, rest = _divergence(teacher_pair, student_pair), _divergence(teacher_rest, student_rest)
    return temperature**2 * (alpha * target + beta * rest)


@checked
def dist(
    student_logits: Float[Array, "batch classes"],
    teacher_logits: Float[Array, "batch classes"],
    *,
    inter_weight: Scalar = 1.0,
    intra_weight: Scalar = 1.0,
    temperature: Temperature = 1.0,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    r"""DIST: correlation with the teacher, over the classes of each example and over the examples of each class.

    .. math:: T^2 \left[\beta \Big(1 - \frac1B \sum_b \rho(p^s_{b\cdot}, p^t_{b\cdot})\Big)
              + \gamma \Big(1 - \frac1C \sum_c \rho(p^s_{\cdot c}, p^t_{\cdot c})\Big)\right],
              \quad \rho(a, b) = \frac{\langle a - \bar a, b - \bar b\rangle}
              {\|a - \bar a\| \, \|b - \bar b\| + 10^{-8}}

    with p = softmax(z / T). The second term compares examples with each other, so the mean over shards is not the value
    of the whole batch: ``axis_name`` gathers the shards first. A constant row or column (norm below 1e-6) counts as
    uncorrelated and gets no gradient. So a batch of one has γT² as its second term.

    Args:
      student_logits: logits of the student.
      teacher_logits: logits of the teacher; constant under differentiation.
      inter_weight: β, of the correlation over the classes of each example.
      intra_weight: γ, of the correlation over the examples of each class.
      temperature: T > 0.
      axis_name: the mapped axis over which the batch is sharded; every device then returns the value of the whole
        batch, and the mean of the devices' gradients is its gradient.

    Returns:
      One value for the batch, between 0 and 2T²(β + γ).

    Raises:
      ValueError: if the temperature is not above 0.

    References:
      Huang et al., `Knowledge Distillation from A Stronger Teacher <https://arxiv.org/abs/2205.10536>`_, 2022,
      section 3. Default there: β and γ 2 (in the code 1 each and a weight of 2), T 4 on CIFAR-100, 1 on ImageNet.
    """
    student, teacher = _log_softmax(student_logits, teacher_logits, temperature)
    if axis_name is not None:
        student, teacher = (jax.lax.all_gather(p, axis_name, tiled=True) for p in (student, teacher))
    inter, intra = (1 - _mean_correlation(student, teacher, axis=axis) for axis in (1, 0))
    return temperature**2 * (inter_weight * inter + intra_weight * intra)


@checked
def logit_standardised_kl(
    student_logits: Float[Array, "*batch classes"],
    teacher_logits: Float[Array, "*batch classes"],
    *,
    temperature: Temperature = 2.0,
) -> Float[Array, "*batch"]:
    r"""Logit standardisation (LSKD): KL divergence of logits scaled to mean 0 and deviation 1 per example.

    .. math:: T^2 \, \mathrm{KL}(\sigma(\hat t / T) \,\|\, \sigma(\hat s / T)),
              \quad \hat z = \frac{z - \bar z}{10^{-7} + \mathrm{sd}(z)}

    with the unbiased deviation over the classes that are not masked, as in the authors' code (their algorithm 1 divides
    by C). The student matches the relations among the teacher's logits, not their scale. Equal logits become zeros and
    get no gradient.

    Args:
      student_logits: logits of the student.
      teacher_logits: logits of the teacher; constant under differentiation.
      temperature: T > 0, in standard deviations.

    Returns:
      One non-negative value per example; zero where the student's logits are the teacher's, shifted and scaled.

    Raises:
      ValueError: if the temperature is not above 0.

    References:
      Sun et al., `Logit Standardization in Knowledge Distillation <https://arxiv.org/abs/2403.01427>`_, 2024,
      section 4.3. Default in the authors' code: T 2, for some pairs 3, soft weight 9, hard weight .1.
    """
    student, teacher = map(_standardise, _live_pair(student_logits, teacher_logits))
    return soft_target_kl(student, teacher, temperature=temperature)


@checked
def wttm(
    student_logits: Float[Array, "*batch classes"],
    teacher_logits: Float[Array, "*batch classes"],
    *,
    temperature: Temperature = 5.0,
) -> Float[Array, "*batch"]:
    r"""Weighted transformed teacher matching (WTTM): only the teacher is softened, and doubtful examples weigh more.

    .. math:: U \, \mathrm{KL}(\sigma(t / T) \,\|\, \sigma(s)), \quad U = \sum_k \sigma(t)_k^{1/T}

    The weight U of an example is 1 where the teacher is certain and :math:`C^{1 - 1/T}` where it predicts all C classes
    alike. Without it the loss is transformed teacher matching (TTM), ``soft_target_kl(s, t / T)``. Neither has the
    factor T²: the student's own temperature is 1, so its gradient does not shrink as T grows.

    Args:
      student_logits: logits of the student.
      teacher_logits: logits of the teacher; constant under differentiation.
      temperature: T > 0 of the teacher, one over the authors' exponent γ.

    Returns:
      One non-negative value per example, in nats; zero where the student predicts the softened teacher.

    Raises:
      ValueError: if the temperature is not above 0.

    References:
      Zheng, Yang, `Knowledge Distillation Based on Transformed Teacher Matching <https://arxiv.org/abs/2402.11148>`_,
      2024, section 4. In the authors' example T 5 and weight 4 beside hard weight 1.
    """
    student, teacher = _live_pair(student_logits, teacher_logits)
    softened = _normalise(teacher) / temperature
    weight = jnp.sum(jnp.exp(softened), axis=-1)
    return weight * _divergence(_normalise(softened), _normalise(student))


@checked
def confidence_penalty(student_logits: Float[Array, "*batch classes"]) -> Float[Array, "*batch"]:
    r"""Confidence penalty: negative entropy of the prediction.

    .. math:: -H(\sigma(s)) = \sum_k \sigma(s)_k \log \sigma(s)_k

    Plus log C it is the KL divergence of the prediction from the uniform distribution, with the same gradient.

    Args:
      student_logits: logits of the student.

    Returns:
      One value per example, in nats, from -log C (uniform) to 0 (certain).

    References:
      Pereyra et al., `Regularizing Neural Networks by Penalizing Confident Output Distributions
      <https://arxiv.org/abs/1701.06548>`_, 2017, section 3.1. Default there: weight .1 (CIFAR-10) to 2 (language).
    """
    log_p = _normalise(_live(student_logits))
    return -_cross_entropy(jnp.exp(log_p), log_p)


@checked
def teacher_free_kl(
    student_logits: Float[Array, "*batch classes"],
    labels: Int[Array, "*batch"],
    *,
    correct_probability: Probability = 0.99,
    temperature: Temperature = 20.0,
) -> Float[Array, "*batch"]:
    r"""Teacher-free distillation (Tf-KD): a virtual teacher gives the label probability a and spreads the rest evenly.

    .. math:: T^2 \, \mathrm{KL}(u_T \,\|\, \sigma(s / T)),
              \quad u = (a \text{ at } y, \tfrac{1 - a}{C - 1} \text{ elsewhere}),
              \quad u_T \propto u^{1 / T}

    This is :func:`soft_target_kl` with the teacher's logits log u: the paper's formula, times T². The authors' code
    differs: it takes the softmax of u / T, does not soften the student, averages over the classes, and multiplies by up
    to 100.

    Args:
      student_logits: logits of the student.
      labels: the class of each example, 0 to classes - 1; void if negative.
      correct_probability: a, between 0 and 1.
      temperature: T > 0.

    Returns:
      One non-negative value per example.

    Raises:
      ValueError: if the temperature is not above 0, or the probability not between 0 and 1.

    References:
      Yuan et al., `Revisiting Knowledge Distillation via Label Smoothing Regularization
      <https://arxiv.org/abs/1909.11723>`_, 2020, section 4, equations 8 and 9. Default there: a .99, and on ImageNet
      T 20, soft weight .1; in the authors' code for CIFAR-100 T 10 to 40, soft weight .1 or .95 by network.
    """
    student = _labelled(student_logits, labels)
    live = ~jnp.isneginf(student)
    count = jnp.sum(live, axis=-1, keepdims=True)
    right = _one_hot(labels, student.shape[-1]) & (count > 0)
    wrong = (1 - correct_probability) / jnp.maximum(count - 1, 1)
    teacher = jnp.where(right, jnp.log(correct_probability), jnp.where(live, jnp.log(wrong), -jnp.inf))
    return temperature**2 * _divergence(_normalise(teacher / temperature), _normalise(student / temperature))


@checked
def jensen_shannon(
    student_logits: Float[Array, "*batch classes"],
    teacher_logits: Float[Array, "*batch classes"],
    *,
    temperature: Temperature = 1.0,
) -> Float[Array, "*batch"]:
    r"""Jensen-Shannon divergence (JSD) of the softened predictions: symmetric and bounded.

    .. math:: \frac{T^2}{2} \left[\mathrm{KL}(p^t \,\|\, m) + \mathrm{KL}(p^s \,\|\, m)\right],
              \quad m = \tfrac12 (p^s + p^t)

    It is at most T² log 2, where :func:`soft_target_kl` has no bound.

    Args:
      student_logits: logits of the student.
      teacher_logits: logits of the teacher; constant under differentiation.
      temperature: T > 0. As T grows the loss tends to an eighth of the mean squared difference of the centred logits.

    Returns:
      One value per example between 0 and T² log 2; zero where both predict the same.

    Raises:
      ValueError: if the temperature is not above 0.

    References:
      Lin, Divergence measures based on the Shannon entropy, 1991, section 4; for distillation Agarwal et al.,
      `On-Policy Distillation of Language Models <https://arxiv.org/abs/2306.13649>`_, 2024, section 2, with
      teacher's shares of .1, .5 (here) and .9.
    """
    student, teacher = _log_softmax(student_logits, teacher_logits, temperature)
    live = ~jnp.isneginf(student)
    both = jnp.logaddexp(*(jnp.where(live, log_p, 0) for log_p in (student, teacher)))
    middle = jnp.where(live, both - jnp.log(2.0), -jnp.inf)
    return temperature**2 * 0.5 * (_divergence(teacher, middle) + _divergence(student, middle))


@checked
def top_k_kl(
    student_logits: Float[Array, "*batch classes"],
    teacher_probabilities: Float[Array, "*batch k"],
    teacher_classes: Int[Array, "*batch k"],
    *,
    temperature: Temperature = 1.0,
) -> Float[Array, "*batch"]:
    r"""Top-k distillation: KL divergence from a teacher of which only the k largest probabilities are stored.

    .. math:: T^2 \Big[\sum_{j \in K} p^t_j \log \frac{p^t_j}{p^s_j} + r^t \log \frac{r^t}{r^s}\Big],
              \quad r = 1 - \sum_{j \in K} p_j

    All classes that are not stored count as one event, with the residual probability r. The value is a lower bound of
    :func:`soft_target_kl`, and equal to it at k = C; how the student divides r among those classes is free.

    There are two other ways to treat r: to drop it, divide the stored probabilities by their sum; to spread it evenly,
    pass :func:`~kdjax.losses.targets.spread_top_k` to :func:`soft_target_kl`.

    Args:
      student_logits: logits of the student.
      teacher_probabilities: of the stored classes, from the teacher's softmax **at this temperature**; constant under
        differentiation. Where rounding makes the sum exceed 1, r is 0.
      teacher_classes: the class of each stored probability, all different within an example.
      temperature: T > 0.

    Returns:
      One non-negative value per example.

    Raises:
      ValueError: if the temperature is not above 0, or k exceeds the number of classes.

    References:
      Anshumann et al., `Sparse Logit Sampling <https://arxiv.org/abs/2503.16870>`_, 2025, on the bias of a teacher that
      is cut to its top k and rescaled. DistillKit calls the grouped residual "symmetric uniform".
    """
    k, classes = teacher_classes.shape[-1], student_logits.shape[-1]
    if k > classes:
        raise ValueError(f"top_k_kl needs k of at most {classes}, the number of classes, got {k}.")
    teacher = jax.lax.stop_gradient(teacher_probabilities).astype(jnp.float32)
    student = _normalise(_live(student_logits) / temperature)
    kept = jnp.take_along_axis(student, teacher_classes, axis=-1)
    if k < classes:
        stored = jnp.put_along_axis(jnp.zeros(student.shape, bool), teacher_classes, True, -1, inplace=False)
        rest = _log_sum_exp(jnp.where(stored, -jnp.inf, student))
        residual = jnp.maximum(1 - jnp.sum(teacher, axis=-1, keepdims=True), 0)
        kept, teacher = (jnp.concatenate(pair, axis=-1) for pair in ((kept, rest), (teacher, residual)))
    student, teacher = _log_softmax(kept, jnp.log(teacher), 1.0)
    return temperature**2 * _divergence(teacher, student)


@checked
def label_smoothing_cross_entropy(
    student_logits: Float[Array, "*batch classes"], labels: Int[Array, "*batch"], *, smoothing: Share = 0.1
) -> Float[Array, "*batch"]:
    r"""Label smoothing (LSR): cross-entropy with labels of which a share ε is spread evenly over all classes.

    .. math:: -(1 - \varepsilon) \log \sigma(s)_y - \frac{\varepsilon}{C} \sum_k \log \sigma(s)_k

    A teacher trained with it is a worse teacher: its logits of the wrong classes hold less information.

    Args:
      student_logits: logits of the student.
      labels: the class of each example, 0 to classes - 1; void if negative.
      smoothing: ε from 0, which is plain cross-entropy, to 1.

    Returns:
      One positive value per example, in nats.

    Raises:
      ValueError: if the smoothing is outside 0 to 1.

    References:
      Szegedy et al., `Rethinking the Inception Architecture <https://arxiv.org/abs/1512.00567>`_, 2016, section 7,
      ε .1; its effect on distillation: Müller, Kornblith, Hinton, `When Does Label Smoothing Help?
      <https://arxiv.org/abs/1906.02629>`_, 2019, section 4.
    """
    student = _labelled(student_logits, labels)
    live = ~jnp.isneginf(student)
    count = jnp.sum(live, axis=-1, keepdims=True)
    right = _one_hot(labels, student.shape[-1]) & (count > 0)
    smooth = (1 - smoothing) * right + smoothing * live / jnp.maximum(count, 1)
    return _cross_entropy(smooth, _normalise(student))


def _live(logits: Float[Array, "*batch classes"]) -> Float[Array, "*batch classes"]:
    """Logits in float32; a masked class becomes -inf and gets no gradient."""
    lowest = jnp.finfo(logits.dtype).min  # some libraries mask with it, and may add a logit to it
    return jnp.where(logits <= lowest / 2, -jnp.inf, logits.astype(jnp.float32))


def _labelled(
    student: Float[Array, "*batch classes"], labels: Int[Array, "*batch"]
) -> Float[Array, "*batch classes"]:
    """As `_live`; all classes are -inf where the label is void, and NaN where it is C or more."""
    row = labels[..., None]
    live = jnp.where(row < student.shape[-1], _live(student), jnp.nan)
    return jnp.where(row < 0, -jnp.inf, live)


def _one_hot(labels: Int[Array, "*batch"], classes: int) -> Bool[Array, "*batch classes"]:
    return jax.nn.one_hot(labels, classes, dtype=bool)


def _live_pair(
    student: Float[Array, "*batch classes"],
    teacher: Float[Array, "*batch classes"],
    temperature: Scalar = 1.0,
) -> tuple[Float[Array, "*batch classes"], Float[Array, "*batch classes"]]:
    """Both logits over the temperature, -inf for masked classes; the teacher's are constant.

    A class that the student masks is masked for the teacher too. An example without any class left has none for either.
    """
    student, teacher = (_live(x) / temperature for x in (student, jax.lax.stop_gradient(teacher)))
    teacher = jnp.where(jnp.isneginf(student), -jnp.inf, teacher)
    none = jnp.isneginf(jnp.max(teacher, axis=-1, keepdims=True))
    return jnp.where(none, -jnp.inf, student), teacher


def _normalise(logits: Float[Array, "*batch classes"]) -> Float[Array, "*batch classes"]:
    """Log-softmax that keeps -inf, with a gradient of zero, even where all logits are -inf."""
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    shifted = logits - jnp.where(jnp.isneginf(top), 0, top)
    total = jnp.sum(jnp.exp(shifted), axis=-1, keepdims=True)
    return shifted - jnp.log(jnp.where(total == 0, 1, total))


def _log_sum_exp(log_p: Float[Array, "*batch classes"]) -> Float[Array, "*batch 1"]:
    """Log of the sum over the classes; -inf, with a gradient of zero, where all terms are -inf."""
    top = jax.lax.stop_gradient(jnp.max(log_p, axis=-1, keepdims=True))
    top = jnp.where(jnp.isneginf(top), 0, top)
    total = jnp.sum(jnp.exp(log_p - top), axis=-1, keepdims=True)
    return jnp.where(total == 0, -jnp.inf, jnp.log(jnp.where(total == 0, 1, total)) + top)


def _log_softmax(
    student: Float[Array, "*batch classes"], teacher: Float[Array, "*batch classes"], temperature: Scalar
) -> tuple[Float[Array, "*batch classes"], Float[Array, "*batch classes"]]:
    """Log-probabilities of both at a temperature; the teacher's are constant."""
    student, teacher = _live_pair(student, teacher, temperature)
    return _normalise(student), _normalise(teacher)


def _cross_entropy(
    p: Float[Array, "*batch classes"], log_q: Float[Array, "*batch classes"]
) -> Float[Array, "*batch"]:
    """-Σ p log q, where 0 log 0 = 0."""
    return jnp.sum(-p * jnp.where(jnp.isneginf(log_q) & (p == 0), 0, log_q), axis=-1)


def _divergence(
    log_p: Float[Array, "*batch classes"], log_q: Float[Array, "*batch classes"]
) -> Float[Array, "*batch"]:
    """KL(p‖q) of normalised log-probabilities, as a sum of terms p (d + e^-d - 1) with d = log p - log q.

    Unlike the terms of the usual Σ p d these are never negative and do not cancel, which keeps float32 precise at high
    temperatures. For large d, where e^-d may overflow, the equal form p d - p + q is used.
    """
    p, q, d = jnp.exp(log_p), jnp.exp(log_q), log_p - log_q
    near = jnp.abs(d) < 0.1
    small = jnp.where(near, d, 0)
    terms = jnp.where(near, p * (small + jnp.expm1(-small)), p * jnp.where(p > 0, d, 0) - p + q)
    return jnp.sum(terms, axis=-1)


def _target_and_rest(
    log_p: Float[Array, "*batch classes"], is_target: Bool[Array, "*batch classes"]
) -> tuple[Float[Array, "*batch 2"], Float[Array, "*batch classes"]]:
    """Log-probabilities of target against rest, and of the other classes among themselves."""
    others = jnp.where(is_target, -jnp.inf, log_p)
    target = jnp.sum(jnp.where(is_target, log_p, 0), axis=-1, keepdims=True)
    return jnp.concatenate([target, _log_sum_exp(others)], axis=-1), _normalise(others)


def _centre(
    x: Float[Array, "..."], live: Bool[Array, "..."], axis: int
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Deviations from the mean of the live entries along an axis, and their norm; zero where x is masked or constant.

    Constant means up to rounding; the gradient of the norm would be infinite there.
    """
    count = jnp.maximum(jnp.sum(live, axis=axis, keepdims=True), 1)
    mean = jnp.sum(jnp.where(live, x, 0), axis=axis, keepdims=True) / count
    deviation = jnp.where(live, x - mean, 0)
    squares = jnp.sum(jnp.square(deviation), axis=axis, keepdims=True)
    constant = squares <= 1e-12 * jnp.maximum(1, jnp.square(mean))
    norm = jnp.sqrt(jnp.where(constant, 1, squares))
    return jnp.where(constant, 0, deviation), jnp.where(constant, 0, norm)


def _mean_correlation(
    log_p: Float[Array, "rows columns"], log_q: Float[Array, "rows columns"], *, axis: int
) -> Float[Array, ""]:
    """Mean of Pearson's correlations of two predictions along an axis; 0 where either is constant.

    Masked classes are left out, and so are rows and columns that are masked everywhere.
    """
    live = ~jnp.isneginf(log_p)
    (p, p_norm), (q, q_norm) = (_centre(jnp.exp(x), live, axis) for x in (log_p, log_q))
    each = jnp.sum(p * q, axis=axis) / (jnp.squeeze(p_norm * q_norm, axis) + 1e-8)
    return jnp.sum(each) / jnp.maximum(jnp.sum(jnp.any(live, axis=axis)), 1)


def _standardise(logits: Float[Array, "*batch classes"]) -> Float[Array, "*batch classes"]:
    """Logits of mean 0 and unbiased deviation 1 over the classes that are not masked; zeros where all are equal."""
    live = ~jnp.isneginf(logits)
    centred, norm = _centre(logits, live, -1)
    freedom = jnp.maximum(jnp.sum(live, axis=-1, keepdims=True) - 1, 1)
    return jnp.where(live, centred / (1e-7 + norm / jnp.sqrt(freedom)), -jnp.inf)
