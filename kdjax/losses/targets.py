"""Targets from mixed labels, several teachers or stored top-k predictions; losses with labels and for segmentation.

:func:`mixup_targets` and :func:`cutmix_targets` return **probabilities**, for ``optax.losses.softmax_cross_entropy``.
The functions that start from a teacher return **logits**, to pass as ``teacher_logits``. No gradient reaches the
teacher. The losses are :func:`privileged`, and :func:`dice` and :func:`lovasz` for segmentation; each returns one value
per example.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from kdjax.losses._checks import NonNegative, Share, Temperature, checked
from kdjax.losses.logits import (
    _labelled,
    _live,
    _normalise,
    _one_hot,
    label_smoothing_cross_entropy,
    soft_target_cross_entropy,
)


@checked
def mixup_targets(
    labels: Int[Array, " batch"],
    partner: Int[Array, " batch"],
    share: Share | Float[Array, " batch"],
    *,
    num_classes: int,
) -> Float[Array, "batch classes"]:
    r"""Mixup: label probabilities of images that were blended in pairs.

    .. math:: \lambda \, e_{y_i} + (1 - \lambda) \, e_{y_{\pi(i)}}

    Args:
      labels: of the unblended images, 0 to classes - 1; a void label, negative, adds nothing to a row.
      partner: π(i), the index in the batch of the image that each was blended with.
      share: λ of the first image, one for the batch or one per example, as :func:`kdjax.data.mixup` returns it.
      num_classes: length of a row.

    Returns:
      One row of probabilities per example, for the hard loss; the teacher's logits of the blended image are the soft
      target.

    References:
      Zhang et al., `mixup: Beyond Empirical Risk Minimization <https://arxiv.org/abs/1710.09412>`_, 2018, section 2;
      λ from Beta(α, α), α .1 to .4 on ImageNet, 1 on CIFAR.
    """
    share = jnp.broadcast_to(share, labels.shape)[:, None].astype(jnp.float32)
    one_hot = jnp.where(labels[:, None] < num_classes, _one_hot(labels, num_classes), jnp.nan)
    return share * one_hot + (1 - share) * one_hot[partner]


@checked
def cutmix_targets(
    labels: Int[Array, " batch"],
    partner: Int[Array, " batch"],
    kept: Bool[Array, "height width"] | Bool[Array, "batch height width"],
    *,
    num_classes: int,
) -> Float[Array, "batch classes"]:
    r"""CutMix: label probabilities of images into which a patch of another was pasted.

    .. math:: \lambda \, e_{y_i} + (1 - \lambda) \, e_{y_{\pi(i)}}, \quad \lambda = \text{share of positions kept}

    The share is counted from the mask, so a box that was clipped at the border counts correctly.

    Args:
      labels: of the images before pasting, 0 to classes - 1; a void label, negative, adds nothing to a row.
      partner: π(i), the index in the batch of the image that each patch came from.
      kept: true where the first image remains; one mask for the batch, or one per example.
      num_classes: length of a row.

    Returns:
      One row of probabilities per example.

    References:
      Yun et al., `CutMix <https://arxiv.org/abs/1905.04899>`_, 2019, section 3.1; box area uniform, in half of the
      batches on CIFAR.
    """
    share = jnp.mean(kept, axis=(-2, -1), dtype=jnp.float32)
    return mixup_targets(labels, partner, share, num_classes=num_classes)


@checked
def noisy_teacher(
    teacher_logits: Float[Array, "*batch scores"],
    key: Key[Array, ""],
    *,
    deviation: NonNegative,
    probability: Share = 1.0,
) -> Float[Array, "*batch scores"]:
    r"""Noisy teacher: the teacher's logits times random factors near one, for a random part of the examples.

    .. math:: t' = (1 + \xi) \odot t, \quad \xi_k \sim \mathcal N(0, \sigma^2)

    With a new key every step it acts like an ensemble of slightly different teachers and regularises the student.

    Args:
      teacher_logits: logits of the teacher.
      key: randomness of this step.
      deviation: σ ≥ 0 of the factor; 0 changes nothing.
      probability: of perturbing an example, 0 to 1.

    Returns:
      Teacher logits, float32, constant under differentiation.

    Raises:
      ValueError: if an option is out of range.

    References:
      Sau, Balasubramanian, `Deep Model Compression: Distilling Knowledge from Noisy Teachers
      <https://arxiv.org/abs/1610.09650>`_, 2016, with σ and the share of examples as settings.
    """
    logits = _live(jax.lax.stop_gradient(teacher_logits))
    noise_key, chosen_key = jax.random.split(key)
    chosen = jax.random.bernoulli(chosen_key, probability, (*logits.shape[:-1], 1))
    noise = deviation * jax.random.normal(noise_key, logits.shape) * logits
    return logits + jnp.where(chosen & ~jnp.isneginf(logits), noise, 0)


@checked
def average_logits(
    teacher_logits: Float[Array, "teachers *batch scores"],
    *,
    weights: Float[Array, " teachers"] | Float[Array, "teachers *batch"] | None = None,
) -> Float[Array, "*batch scores"]:
    r"""Ensemble distillation: weighted mean of the teachers' logits, the geometric mean of their predictions.

    .. math:: \sum_m w_m t_m, \quad \sum_m w_m = 1

    One teacher that gives a class a very low logit, or masks it, can veto it; with :func:`average_probabilities` one
    teacher can propose it.

    Args:
      teacher_logits: logits, teachers along the first axis.
      weights: one per teacher, or one per teacher and example; normalised here to sum to one, equal by default.

    Returns:
      Teacher logits, float32, constant under differentiation.

    References:
      Hinton, Vinyals, Dean, `Distilling the Knowledge in a Neural Network <https://arxiv.org/abs/1503.02531>`_,
      2015, section 1, which names both means.
    """
    logits = _live(jax.lax.stop_gradient(teacher_logits))
    shares = jnp.exp(_log_weights(logits, weights))
    return jnp.sum(jnp.where(shares == 0, 0, shares * logits), axis=0)


@checked
def average_probabilities(
    teacher_logits: Float[Array, "teachers *batch classes"],
    *,
    weights: Float[Array, " teachers"] | Float[Array, "teachers *batch"] | None = None,
    temperature: Temperature = 1.0,
) -> Float[Array, "*batch classes"]:
    r"""Ensemble distillation: logits whose softmax is the weighted mean of the teachers' predictions.

    .. math:: T \log \sum_m w_m \, \sigma(t_m / T), \quad \sum_m w_m = 1

    With :func:`~kdjax.losses.logits.soft_target_kl` at the same temperature, the gradient is that of the weighted sum
    of the KL divergences from each teacher, at the cost of one.

    Args:
      teacher_logits: logits, teachers along the first axis.
      weights: one per teacher, or one per teacher and example; normalised here to sum to one, equal by default.
      temperature: T > 0 at which the predictions are averaged; pass the same T to the loss.

    Returns:
      Teacher logits, float32, constant under differentiation; at T = 1 the log of the mean probability.

    Raises:
      ValueError: if the temperature is not above 0.

    References:
      Hinton, Vinyals, Dean, `Distilling the Knowledge in a Neural Network <https://arxiv.org/abs/1503.02531>`_,
      2015, section 1; You et al., Learning from Multiple Teacher Networks, 2017, section 3.1.
    """
    log_p = _normalise(_live(jax.lax.stop_gradient(teacher_logits)) / temperature)
    return temperature * jax.nn.logsumexp(log_p + _log_weights(log_p, weights), axis=0)


@checked
def confidence_weights(
    teacher_logits: Float[Array, "teachers *batch classes"], labels: Int[Array, "*batch"]
) -> Float[Array, "teachers *batch"]:
    r"""Confidence-aware weights (CA-MKD) of several teachers, lower for a larger cross-entropy with the label.

    .. math:: w_m = \frac{1}{M - 1} \left(1 - \frac{\exp \mathcal L_m}{\sum_j \exp \mathcal L_j}\right)

    Args:
      teacher_logits: logits, teachers along the first axis.
      labels: the class of each example, 0 to classes - 1; void if negative.

    Returns:
      Weights that sum to one over the teachers, between 0 and 1 / (M - 1), for :func:`average_probabilities` or
      :func:`average_logits`; 1 for a single teacher, and equal ones where the label is void.

    References:
      Zhang, Chen, Wang, `Confidence-Aware Multi-Teacher Knowledge Distillation <https://arxiv.org/abs/2201.00007>`_,
      2022, as in the authors' code, which also divides the weighted sum of divergences by M. Default weight of that
      sum there: 1.
    """
    teachers, classes = teacher_logits.shape[0], teacher_logits.shape[-1]
    if teachers == 1:
        return jnp.ones((1, *labels.shape), jnp.float32)
    log_p = _normalise(_live(jax.lax.stop_gradient(teacher_logits)))
    right = jnp.broadcast_to(_one_hot(labels, classes), log_p.shape)
    # Finite, so that two teachers that mask the right class get equal weights.
    surprise = jnp.minimum(-jnp.sum(jnp.where(right, log_p, 0), axis=-1), jnp.finfo(jnp.float32).max)
    surprise = jnp.where(labels[None] < classes, surprise, jnp.nan)
    return (1 - jax.nn.softmax(surprise, axis=0)) / (teachers - 1)


@checked
def spread_top_k(
    teacher_probabilities: Float[Array, "*batch k"],
    teacher_classes: Int[Array, "*batch k"],
    *,
    num_classes: int,
    temperature: Temperature = 1.0,
) -> Float[Array, "*batch classes"]:
    """Top-k distillation: logits of a teacher of which only the k largest probabilities are stored.

    The missing probability is spread evenly; :func:`~kdjax.losses.logits.top_k_kl` leaves open how it is divided.

    Args:
      teacher_probabilities: of the stored classes, from the teacher's softmax at the temperature.
      teacher_classes: the class of each stored probability, all different within an example.
      num_classes: length of a row, at least k.
      temperature: of the stored probabilities; pass the same T to the loss.

    Returns:
      Logits whose softmax at that temperature holds the stored probabilities, and equal ones elsewhere; -inf where no
      probability is left. Float32, constant under differentiation.

    Raises:
      ValueError: if the temperature is not above 0, or k exceeds the number of classes.
    """
    k = teacher_classes.shape[-1]
    if k > num_classes:
        raise ValueError(f"spread_top_k needs k of at most {num_classes}, the number of classes, got {k}.")
    stored = jax.lax.stop_gradient(teacher_probabilities).astype(jnp.float32)
    residual = jnp.maximum(1 - jnp.sum(stored, axis=-1, keepdims=True), 0)
    even = jnp.broadcast_to(residual / max(num_classes - k, 1), (*stored.shape[:-1], num_classes))
    return temperature * jnp.log(jnp.put_along_axis(even, teacher_classes, stored, -1, inplace=False))


@checked
def privileged(
    student_logits: Float[Array, "*batch classes"],
    teacher_logits: Float[Array, "*batch classes"],
    labels: Int[Array, "*batch"],
    *,
    soft_weight: Share = 0.5,
    temperature: Temperature = 1.0,
) -> Float[Array, "*batch"]:
    r"""Generalised distillation: labels, and the softened predictions of a teacher with privileged inputs.

    .. math:: (1 - \lambda) \, H(e_y, \sigma(s)) + \lambda \, H(\sigma(t / T), \sigma(s))

    with H(p, q) the cross-entropy. The teacher was trained on privileged inputs (a sharper image, another modality,
    later notes) that are not available at test time. As in the paper only the teacher is softened and there is no
    factor T² (the authors' code for MNIST has one). To soften both, use :func:`~kdjax.losses.logits.soft_target_kl`.

    Args:
      student_logits: logits of the student, from its own inputs.
      teacher_logits: logits of the teacher, from the privileged inputs; constant under differentiation.
      labels: the class of each example, 0 to classes - 1; void if negative.
      soft_weight: λ, the imitation parameter, from 0 (labels only) to 1 (teacher only).
      temperature: T > 0, of the teacher's softmax.

    Returns:
      One value per example, in nats; not zero at student = teacher.

    Raises:
      ValueError: if an option is out of range.

    References:
      Lopez-Paz, Bottou, Schölkopf, Vapnik, `Unifying distillation and privileged information
      <https://arxiv.org/abs/1511.03643>`_, 2016, section 4, with the objective of section 2.
      There λ from 0 to 1 and T from 1 to 50 are searched.
    """
    student = _labelled(student_logits, labels)
    hard = label_smoothing_cross_entropy(student, labels, smoothing=0.0)
    soft = soft_target_cross_entropy(student, _live(teacher_logits) / temperature)
    return (1 - soft_weight) * hard + soft_weight * soft


@checked
def dice(
    student_logits: Float[Array, "*batch height width classes"],
    target_probabilities: Float[Array, "*batch height width classes"],
) -> Float[Array, "*batch"]:
    r"""Dice loss: one minus the soft Dice overlap of each class with its target, averaged over the classes.

    .. math:: \frac1C \sum_c \left(1 - \frac{2 \sum_x p g + 1}{\sum_x p^2 + \sum_x g^2 + 1}\right)
              = \frac1C \sum_c \frac{\sum_x (p - g)^2}{\sum_x p^2 + \sum_x g^2 + 1}

    computed in the second form, without cancellation. It is zero where the student equals the target, for soft targets
    too, so the target may be a teacher's softmax. A position whose target is zero for every class, as
    ``jax.nn.one_hot`` gives for a void label, is left out, and so is a class that is masked everywhere.

    Args:
      student_logits: logits at every position.
      target_probabilities: one-hot labels, or a teacher's probabilities; constant under differentiation.

    Returns:
      One value from 0 to 1 per example (image).

    References:
      Milletari, Navab, Ahmadi, `V-Net <https://arxiv.org/abs/1606.04797>`_, 2016, section 3, there without the 1,
      which defines the value of absent classes and bounds the gradient.
    """
    g = jax.lax.stop_gradient(target_probabilities).astype(jnp.float32)
    void = jnp.sum(g, axis=-1, keepdims=True) == 0
    scores = jnp.where(void, -jnp.inf, _live(student_logits))
    live, p = jnp.any(~jnp.isneginf(scores), axis=(-3, -2)), _softmax(scores)
    apart, student, target = (jnp.sum(jnp.square(x), axis=(-3, -2)) for x in (p - g, p, g))
    each = jnp.where(live, apart / (student + target + 1.0), 0)
    return jnp.sum(each, axis=-1) / jnp.maximum(jnp.sum(live, axis=-1), 1)


@checked
def lovasz(
    student_logits: Float[Array, "*batch height width classes"], labels: Int[Array, "*batch height width"]
) -> Float[Array, "*batch"]:
    r"""Lovász-softmax: surrogate of one minus the intersection over union, averaged over the classes present.

    .. math:: \frac{1}{|C_y|} \sum_{c \in C_y} \sum_i m^c_{(i)}
              \left[J_c(\{(1), \dots, (i)\}) - J_c(\{(1), \dots, (i - 1)\})\right]

    with errors m = 1 - p_c where the label is c and p_c elsewhere, in decreasing order (1), (2), …, and J_c(S) the
    Jaccard loss of class c if exactly the positions S were wrong. At probabilities 0 and 1 it equals the Jaccard loss.
    Positions with a void label, below 0, are left out.

    This is the per-image form. For that of a whole batch reshape the batch into the height:
    ``lovasz(s.reshape(1, -1, *s.shape[2:]), y.reshape(1, -1, y.shape[2]))``. To distil, pass the teacher's argmax as
    labels.

    Args:
      student_logits: logits at every position.
      labels: the class at every position; void if negative.

    Returns:
      One value from 0 to 1 per example (image); zero where every position is right with probability 1.

    References:
      Berman, Rannen Triki, Blaschko, `The Lovász-Softmax loss <https://arxiv.org/abs/1705.08790>`_, 2018, section 3,
      equation 9 and algorithm 1.
    """
    shape = (*labels.shape[:-2], -1, student_logits.shape[-1])
    p = _softmax(_labelled(student_logits, labels))
    truth = _one_hot(labels, shape[-1]).astype(jnp.float32)
    p, truth = (jnp.swapaxes(x.reshape(shape), -1, -2) for x in (p, truth))
    void = jnp.sum(truth, axis=-2, keepdims=True) == 0
    error = jnp.where(truth > 0, 1 - p, jnp.where(void, 0, p))
    constant = jax.lax.stop_gradient(error), truth
    weight = jax.lax.platform_dependent(*constant, cpu=_searched_steps, default=_sorted_steps)
    present = jnp.any(truth > 0, axis=-1)
    each = jnp.where(present, jnp.sum(error * weight, axis=-1), 0)
    return jnp.sum(each, axis=-1) / jnp.maximum(jnp.sum(present, axis=-1), 1)


def _softmax(scores: Float[Array, "*batch classes"]) -> Float[Array, "*batch classes"]:
    """Softmax; zero, with a gradient of zero, for classes at -inf, even where all are."""
    none = jnp.isneginf(jnp.max(scores, axis=-1, keepdims=True))
    return jnp.where(none, 0, jax.nn.softmax(jnp.where(none, 0, scores)))


def _sorted_steps(
    error: Float[Array, "*batch positions"], truth: Float[Array, "*batch positions"]
) -> Float[Array, "*batch positions"]:
    """Increment of the Jaccard loss at each position, if positions go wrong one by one in decreasing order of error.

    Errors are non-negative, so their bits, read as integers, have the same order. Integers sort faster, since there is
    no NaN to handle.
    """
    order = jnp.argsort(-jax.lax.bitcast_convert_type(error, jnp.int32), axis=-1, stable=False)
    steps = jnp.diff(_jaccard_losses(jnp.take_along_axis(truth, order, axis=-1)), axis=-1)
    return jnp.put_along_axis(jnp.zeros_like(truth), order, steps, -1, inplace=False)


def _searched_steps(
    error: Float[Array, "*batch positions"], truth: Float[Array, "*batch positions"]
) -> Float[Array, "*batch positions"]:
    """As `_sorted_steps`, in half the time on a CPU, which sorts keys alone much faster than keys with indices.

    The truth is stored in the last bit of the error. The rank of each position is found by search; positions of equal
    keys share their steps evenly.
    """
    bits = jax.lax.bitcast_convert_type(error, jnp.int32)
    keys = -(bits & ~1 | truth.astype(jnp.int32)).reshape(-1, error.shape[-1])
    ordered = jax.lax.sort(keys, is_stable=False)
    loss = _jaccard_losses((ordered & 1).astype(jnp.float32))
    first, last = (
        jax.vmap(functools.partial(jnp.searchsorted, side=side))(ordered, keys) for side in ("left", "right")
    )
    above, below = (jnp.take_along_axis(loss, place, axis=-1) for place in (first, last))
    return ((below - above) / (last - first)).reshape(error.shape)


def _jaccard_losses(truth: Float[Array, "*batch positions"]) -> Float[Array, "*batch counts"]:
    """The Jaccard loss if the first 0, 1, 2, … of the given positions were wrong."""
    size = jnp.sum(truth, axis=-1, keepdims=True)
    hits = jnp.cumsum(truth, axis=-1)
    misses = 1 + jax.lax.broadcasted_iota(hits.dtype, hits.shape, hits.ndim - 1) - hits
    return jnp.concatenate([jnp.zeros_like(size), 1 - (size - hits) / (size + misses)], axis=-1)


def _log_weights(
    logits: Float[Array, "teachers *batch classes"],
    weights: Float[Array, " teachers"] | Float[Array, "teachers *batch"] | None,
) -> Float[Array, "teachers ..."]:
    """Logs of the teachers' weights, scaled to sum to one, with the axes of the logits."""
    if weights is None:
        weights = jnp.ones(logits.shape[:1])
    weights = jax.lax.stop_gradient(weights).astype(jnp.float32)
    log_weights = jnp.log(weights / jnp.sum(weights, axis=0, keepdims=True))
    return log_weights.reshape(weights.shape + (1,) * (logits.ndim - weights.ndim))
