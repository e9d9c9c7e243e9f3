"""What a network's embeddings and logits keep of its images: tight classes, information, a linear classifier on top.

* :func:`class_separation`: how tight the clusters of the classes are, which label smoothing tightens.
* :func:`mutual_information`: how much a logit says about which image it is of.
* :func:`linear_probe`: a linear classifier on frozen embeddings. :func:`kdjax.models.probed` makes a network of both.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float

from kdjax.extras import extra

BLOCK = 2**22
"""Numbers in an array that :func:`mutual_information` fills at once, 32 MiB; more only where one image takes more."""


def class_separation(embeddings: np.ndarray | Array, labels: np.ndarray | Array) -> float:
    r"""How close the embeddings of a class are to each other, by their angles.

    .. math:: R^2 = 1 - \bar d_\text{within} / \bar d_\text{total}

    Both are mean cosine distances (1 - cosine) of ordered pairs, an example with itself among them: of one class for
    the first, of any two classes or one for the second. Classes weigh the same, however many examples they have: the
    means are over the pairs of a class, or of two classes, and then over these.

    Args:
      embeddings: ``[examples, width]``; their lengths do not matter.
      labels: classes, integers ``[examples]``. Classes without an example are left out.

    Returns:
      From 0, where all classes have one mean direction, to 1, where each class is a single direction of its own. Of
      embeddings that know nothing of the classes it is about ``(1 - 1 / classes) / examples_per_class``.

    Raises:
      ValueError: for other shapes, fewer than two classes, an embedding without a direction, or a single direction.

    References:
      Kornblith, Chen, Lee, Norouzi, `Why Do Better Loss Functions Lead to Less Transferable Features?
      <https://arxiv.org/abs/2010.16402>`_, 2021. Müller, Kornblith, Hinton, `When Does Label Smoothing Help?
      <https://arxiv.org/abs/1906.02629>`_, 2019, section 2, plot what it measures.
    """
    vectors, labels = _checked("class_separation", embeddings, labels)
    lengths = np.linalg.norm(vectors, axis=1)
    if lost := int((~np.isfinite(lengths) | (lengths == 0)).sum()):
        raise ValueError(
            f"class_separation compares directions, and {lost} embeddings are zero or not finite."
        )
    classes, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"class_separation needs examples of at least two classes, got only {classes[0]}.")
    units = vectors / lengths[:, None]
    means = np.zeros((len(classes), units.shape[1]))
    np.add.at(means, place, units)
    means /= counts[:, None]
    # The mean cosine distance of unit vectors is their variance. As a sum of squares it keeps its digits where clusters
    # are tight, which 1 - |mean|^2 does not.
    spread = np.bincount(place, np.square(units - means[place]).sum(1)) / counts
    within, between = spread.mean(), np.square(means - means.mean(0)).sum(1).mean()
    if within + between < 1e-24:  # of rounding
        raise ValueError("class_separation is undefined where all embeddings point in one direction.")
    return float(between / (within + between))


def mutual_information(values: np.ndarray | Array) -> float:
    r"""Information between an image and a number that a network returns for random augmentations of it, in nats.

    .. math:: \hat I = \frac1{NL} \sum_{i, l} \Big[ \log p_i(x_{il}) - \log \frac1N \sum_j p_j(x_{il}) \Big], \qquad
              p_i = \mathcal N(\mu_i, \sigma^2)

    The values of each image are taken for Gaussian, with a mean of its own and a variance that all images share, both
    estimated from the values. It is at most :math:`\log N`: the image is one of N, equally likely, and at best a value
    tells which. Where all images of k equally frequent classes collapse to k points it is :math:`\log k`. Compare
    networks on equally many images and augmentations only.

    The paper takes the difference of the logits of two classes, ``logits[..., a] - logits[..., b]``, for 300 training
    images of each, under random crops and mirroring, with means of five augmentations and one value per image in the
    sum; here all values are. As there, the values that give the means are judged by them, so the variance is too small
    and the estimate too large if augmentations are few.

    Args:
      values: ``[images, augmentations]``, at least two augmentations.

    Returns:
      The estimate. Values that are far from Gaussian, or vary much for few images only, can bring it below 0.

    Raises:
      ValueError: for other shapes, or values that are not finite.

    References:
      Müller, Kornblith, Hinton, `When Does Label Smoothing Help? <https://arxiv.org/abs/1906.02629>`_, 2019, section 4
      and appendix A.2, in its third version; an earlier one lacks the factors 1 / N, and its bound does not hold.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or values.shape[0] < 1 or values.shape[1] < 2 or not np.isfinite(values).all():
        raise ValueError(
            "mutual_information needs finite values [images, augmentations] of at least two augmentations, got shape "
            f"{values.shape}{'' if np.isfinite(values).all() else ' with NaN or infinity'}."
        )
    images, means = len(values), values.mean(1)
    variance = np.square(values - means[:, None]).mean()
    if variance == 0:  # the limit: a value leaves only the images that share it
        _, shared = np.unique(means, return_counts=True)
        return float(np.log(images) - shared @ np.log(shared) / images)
    step, total = max(1, BLOCK // values.size), 0.0
    for start in range(0, images, step):
        distances = np.square(values[start : start + step, :, None] - means) / (2 * variance)
        nearest = distances.min(-1, keepdims=True)
        total += np.sum(np.log(np.exp(nearest - distances).mean(-1, keepdims=True)) - nearest)
    # The first term of the sum is -1/2 on average, by the definition of the variance.
    return float(-0.5 - total / values.size)


class Probe(NamedTuple):
    """A linear classifier: ``logits = embeddings @ kernel + bias``.

    Attributes:
      kernel: float32[width, classes].
      bias: float32[classes].
      strength: of the L2 penalty it was fitted with.
      validation_accuracy: fraction of the validation examples.
    """

    kernel: Float[np.ndarray, "width classes"]
    bias: Float[np.ndarray, " classes"]
    strength: float
    validation_accuracy: float


def linear_probe(
    embeddings: np.ndarray | Array,
    labels: np.ndarray | Array,
    *,
    num_classes: int,
    validation: tuple[np.ndarray | Array, np.ndarray | Array],
    strengths: Sequence[float] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0),
) -> Probe:
    """Fits multinomial logistic regression to the embeddings of a frozen network.

    It minimises the mean cross-entropy in nats plus half the strength times the sum of the squared weights, which are
    those of features of mean 0 and variance 1 on the training examples; the bias is free. Kernel and bias of the result
    take the embeddings as they are. Needs scikit-learn, of the extra ``data``.

    Args:
      embeddings: ``[examples, width]``, of the training split.
      labels: classes, integers ``[examples]``.
      num_classes: number of logits; every class needs an example.
      validation: embeddings and labels by which the strength is chosen.
      strengths: of the L2 penalty, positive.

    Returns:
      The probe of the highest validation accuracy; of equal ones the most strongly penalised.

    Raises:
      ValueError: for other shapes, a class without a training example, a label that is no class, or no strengths.
      ModuleNotFoundError: without scikit-learn.
    """
    if num_classes < 2 or not strengths or min(strengths) <= 0:
        raise ValueError(
            "linear_probe needs at least two classes and one positive strength or more, got "
            f"num_classes={num_classes} and strengths={tuple(strengths)}."
        )
    train, labels = _checked("linear_probe", embeddings, labels, num_classes=num_classes)
    held, truth = _checked("linear_probe's validation", *validation, num_classes=num_classes)
    if held.shape[1] != train.shape[1]:
        raise ValueError(
            f"linear_probe needs validation embeddings as wide as those of training, {train.shape[1]}, got "
            f"{held.shape[1]}."
        )
    if missing := np.flatnonzero(np.bincount(labels, minlength=num_classes) == 0).tolist():
        raise ValueError(f"linear_probe needs a training example of every class, got none of {missing}.")
    with extra("data"):
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler

    scaler: Any = StandardScaler().fit(train)
    standard, found = scaler.transform(train), []
    model: Any = LogisticRegression(
        max_iter=1000, warm_start=True
    )  # starts at the weights of the last strength
    for strength in sorted(strengths, reverse=True):
        # Of two classes scikit-learn fits the difference of the two columns, whose square is twice the sum of theirs.
        scale = 2 if num_classes == 2 else 1
        model.set_params(C=scale / (strength * len(train))).fit(standard, labels)
        columns, bias = model.coef_.T, model.intercept_
        if num_classes == 2:
            columns, bias = columns * [-0.5, 0.5], bias * [-0.5, 0.5]
        kernel = columns / scaler.scale_[:, None]
        bias = (bias - scaler.mean_ @ kernel).astype(np.float32)
        kernel = kernel.astype(np.float32)
        accuracy = float(np.mean((held @ kernel + bias).argmax(1) == truth))
        found.append(Probe(kernel, bias, float(strength), accuracy))
    return max(found, key=lambda probe: probe.validation_accuracy)  # the first of equal ones


def _checked(
    who: str, embeddings: np.ndarray | Array, labels: np.ndarray | Array, *, num_classes: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings in float64, and labels; refuses other shapes, and labels that are no class."""
    embeddings, labels = np.asarray(embeddings), np.asarray(labels)
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{who} needs embeddings [examples, width] and integer labels [examples], got shapes {embeddings.shape} "
            f"and {labels.shape} of {labels.dtype}."
        )
    if not embeddings.size:
        raise ValueError(f"{who} needs at least one example, got embeddings of shape {embeddings.shape}.")
    if num_classes is not None and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(
            f"{who} has labels from {labels.min()} to {labels.max()}, and {num_classes} classes are numbered from 0."
        )
    return embeddings.astype(np.float64), labels
