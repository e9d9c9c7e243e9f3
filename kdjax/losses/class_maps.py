"""Maps from a teacher's classes to a student's other classes, and teacher logits through them.

A map is a matrix ``[teacher classes, student classes]`` whose row is P(student class | teacher class): by names
(:func:`class_map`), from counts (:func:`bayesian_class_map`) or by least squares (:func:`least_squares_class_map`).
:func:`map_classes` turns teacher logits into logits of the student's classes, to pass as ``teacher_logits``::

    matrix = losses.bayesian_class_map(teacher_logits, labels, num_classes=10)  # once, on the training images
    target = losses.map_classes(batch["teacher_logits"], matrix, temperature=4.0)
    soft = losses.soft_target_kl(outputs.logits, target, temperature=4.0)
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from kdjax.losses._checks import NonNegative, Temperature, checked
from kdjax.losses.logits import _live, _normalise, _one_hot

ROUNDING = 1e-4  # by which a row may miss one


def class_map(
    teacher_classes_of: Mapping[str, Sequence[str]],
    *,
    teacher_classes: Sequence[str],
    classes: Sequence[str],
    uncovered: str = "even",
) -> Float[np.ndarray, "sources classes"]:
    """A map by names: each teacher class is divided evenly among the student classes that list it.

    Args:
      teacher_classes_of: student class → the teacher classes that mean it, at least one.
      teacher_classes: names of the teacher's classes, in the order of its logits.
      classes: names of the student's classes, in the order of its logits.
      uncovered: of a teacher class that nobody lists: ``even`` divides it among all classes, since it says nothing
        about them; ``drop`` leaves its row zero, and the other teacher classes are renormalised.

    Returns:
      Rows that sum to one; with ``drop`` also rows of zeros.

    Raises:
      ValueError: for unknown or repeated names, a student class without a teacher class, or another ``uncovered``.
    """
    for what, names in (("teacher_classes", teacher_classes), ("classes", classes)):
        if repeated := sorted({name for name in names if list(names).count(name) > 1}):
            raise ValueError(f"class_map needs distinct {what}, got {', '.join(repeated)} more than once.")
    if uncovered not in ("even", "drop"):
        raise ValueError(f"class_map needs uncovered='even' or 'drop', got {uncovered!r}.")
    unknown = [name for name in teacher_classes_of if name not in classes]
    if unknown:
        raise ValueError(
            f"class_map needs student classes, got {', '.join(unknown)}; there are {', '.join(classes)}."
        )
    without = [name for name in classes if not teacher_classes_of.get(name)]
    if without:
        raise ValueError(
            f"class_map needs a teacher class for every student class, got none for {', '.join(without)}."
        )
    place = {name: i for i, name in enumerate(teacher_classes)}
    listed = np.zeros((len(teacher_classes), len(classes)))
    for column, name in enumerate(classes):
        if unknown := [source for source in teacher_classes_of[name] if source not in place]:
            raise ValueError(f"class_map needs teacher classes, got {', '.join(unknown)} for {name}.")
        listed[[place[source] for source in teacher_classes_of[name]], column] = 1
    total = listed.sum(1, keepdims=True)
    rest = np.full_like(listed, 1 / len(classes) if uncovered == "even" else 0.0)
    return np.where(total > 0, listed / np.maximum(total, 1), rest).astype(np.float32)


def check_class_map(matrix: Any, *, num_teacher_classes: int, num_classes: int) -> None:
    """Raises a ValueError if a map is not for these networks, is no map, or leaves a student class without a teacher's.

    Args:
      matrix: of numbers; a row of P(student class | teacher class) for each teacher class, or of zeros to drop it.
      num_teacher_classes: of the teacher's logits.
      num_classes: of the student's logits.
    """
    matrix = np.asarray(matrix)
    if matrix.shape != (num_teacher_classes, num_classes):
        raise ValueError(
            f"a class map needs {num_teacher_classes} rows of the teacher's classes and {num_classes} columns of the "
            f"student's, got {list(matrix.shape)}."
        )
    sums = matrix.sum(1)
    wrong = np.flatnonzero(
        (np.abs(sums - 1) > ROUNDING) & (sums != 0) | (matrix < 0).any(1) | ~np.isfinite(sums)
    )
    if wrong.size:
        raise ValueError(
            f"a class map needs rows of probabilities that sum to one, or rows of zeros; row {wrong[0]} sums to "
            f"{sums[wrong[0]]:.3g} and its least entry is {matrix[wrong[0]].min():.3g}."
        )
    if without := np.flatnonzero(~matrix.any(0)).tolist():
        raise ValueError(
            f"a class map needs a teacher class for every student class, got none for {without}."
        )


@checked
def map_classes(
    teacher_logits: Float[Array, "*batch sources"],
    matrix: Float[Array, "sources classes"],
    *,
    temperature: Temperature = 1.0,
) -> Float[Array, "*batch classes"]:
    r"""Logits of the student's classes whose softmax is the teacher's prediction, sent through a class map.

    .. math:: T \log \sum_k \sigma(t / T)_k \, M_{kc}

    Their softmax is renormalised over the classes that the map covers. An example all of whose probability is on
    dropped teacher classes has no class left, and the losses give it the value zero.

    Args:
      teacher_logits: logits of the teacher's own classes.
      matrix: M, as :func:`class_map` or a fit returns it; see :func:`check_class_map`.
      temperature: T > 0 at which predictions are mapped; pass the same T to the loss.

    Returns:
      Teacher logits of the student's classes, float32, constant under differentiation; -inf without probability.

    Raises:
      ValueError: if the temperature is not above 0.
    """
    p = jnp.exp(_normalise(_live(jax.lax.stop_gradient(teacher_logits)) / temperature))
    mapped = jnp.matmul(p, jax.lax.stop_gradient(matrix).astype(jnp.float32), precision="highest")
    return temperature * jnp.log(mapped)


@checked
def bayesian_class_map(
    teacher_logits: Float[Array, "examples sources"],
    labels: Int[Array, " examples"],
    *,
    num_classes: int,
    smoothing: NonNegative = 1.0,
    top_k: int | None = None,
) -> Float[Array, "sources classes"]:
    r"""Bayesian label mapping (BLM): P(student class | teacher class), from what the teacher says of labelled images.

    .. math:: M_{kc} = \frac{F_{kc} + \lambda / C}{\sum_{c'} F_{kc'} + \lambda}

    with F the number of images of class c that the teacher predicts as k, or, with ``top_k`` (BLM+), the sum of the
    probabilities of k over the images of c for which k is among the teacher's top_k.

    The authors leave λ out of the numerator and normalise the columns too, for a matrix that multiplies logits
    (:func:`bayesian_logit_weights`). This is the row-stochastic half, for probabilities.

    Args:
      teacher_logits: of the student's training images.
      labels: the student's class of each image, 0 to classes - 1; a void label, negative, is not counted.
      num_classes: C.
      smoothing: λ of Laplace; 1 in BLM, 0 in BLM+. A teacher class that is never predicted is divided evenly.
      top_k: None counts the teacher's first choice; the authors sum the probabilities of the first 3 in BLM+.

    Returns:
      Rows that sum to one, float32.

    Raises:
      ValueError: if an option is out of range.

    References:
      Cai, Ye, Feng, Qi, Liu, `Bayesian-guided Label Mapping for Visual Reprogramming
      <https://arxiv.org/abs/2410.24018>`_, 2024, sections 4.2 and 4.3.
    """
    counts = _counts(teacher_logits, labels, num_classes, top_k)
    total = jnp.sum(counts, axis=1, keepdims=True) + smoothing
    return jnp.where(
        total > 0, (counts + smoothing / num_classes) / jnp.where(total > 0, total, 1), 1 / num_classes
    )


@checked
def bayesian_logit_weights(
    teacher_logits: Float[Array, "examples sources"],
    labels: Int[Array, " examples"],
    *,
    num_classes: int,
    smoothing: NonNegative = 1.0,
    top_k: int | None = None,
) -> Float[Array, "sources classes"]:
    r"""Bayesian label mapping as its authors use it: weights for logits, ``teacher_logits @ weights``.

    .. math:: \omega_{kc} = \frac{R_{kc}}{\sum_{k'} R_{k'c}}, \quad R_{kc} = \frac{F_{kc}}{\sum_{c'} F_{kc'} + \lambda}

    Args:
      teacher_logits: of the student's training images.
      labels: the student's class of each image, 0 to classes - 1; a void label, negative, is not counted.
      num_classes: C.
      smoothing: λ of Laplace; 1 in BLM, 0 in BLM+.
      top_k: as for :func:`bayesian_class_map`, which defines F.

    Returns:
      Columns that sum to one, float32; zero for a class that is never predicted or has no image.

    Raises:
      ValueError: if an option is out of range.

    References:
      As for :func:`bayesian_class_map`. The authors' code divides by zero where this has zeros.
    """
    counts = _counts(teacher_logits, labels, num_classes, top_k)
    rows = _divided(counts, jnp.sum(counts, axis=1, keepdims=True) + smoothing)
    return _divided(rows, jnp.sum(rows, axis=0, keepdims=True))


def _divided(a: Array, b: Array) -> Array:
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)


def _counts(teacher_logits: Array, labels: Array, num_classes: int, top_k: int | None) -> Array:
    """How often, or with how much probability, the teacher says each of its classes of images of each class."""
    sources = teacher_logits.shape[1]
    logits = _live(jax.lax.stop_gradient(teacher_logits))
    if top_k is None:
        said = jax.nn.one_hot(jnp.argmax(logits, axis=1), sources)
    elif 1 <= top_k <= sources:
        values, places = jax.lax.top_k(jnp.exp(_normalise(logits)), top_k)
        said = jnp.put_along_axis(jnp.zeros(logits.shape), places, values, 1, inplace=False)
    else:
        raise ValueError(
            f"a class map needs a top_k from 1 to {sources}, the teacher's classes, got {top_k}."
        )
    of_class = _one_hot(labels, num_classes).astype(jnp.float32)
    return jnp.matmul(said.T, of_class, precision="highest")


@checked
def least_squares_class_map(
    teacher_logits: Float[Array, "examples sources"],
    labels: Int[Array, " examples"],
    *,
    num_classes: int,
    temperature: Temperature = 1.0,
    steps: int = 1000,
) -> Float[Array, "sources classes"]:
    r"""The map that brings the teacher's predictions nearest to the labels, among all with rows that sum to one.

    .. math:: \min_{M \ge 0, \, M 1 = 1} \sum_i \lVert \sigma(t_i / T)^\top M - e_{y_i} \rVert^2

    by accelerated projected gradients (FISTA), from the map that divides every class evenly.

    Args:
      teacher_logits: of the student's training images.
      labels: the student's class of each image, 0 to classes - 1; a void label, negative, is left out.
      num_classes: C.
      temperature: T > 0 of the teacher's predictions.
      steps: of the algorithm; each takes time in proportion to sources² x classes.

    Returns:
      Rows that sum to one, float32. Teacher classes that are never likely stay divided evenly.

    Raises:
      ValueError: if the temperature is not above 0.

    References:
      Beck, Teboulle, A Fast Iterative Shrinkage-Thresholding Algorithm, 2009, for the algorithm.
    """
    counted = (labels >= 0)[:, None]
    p = jnp.exp(_normalise(_live(jax.lax.stop_gradient(teacher_logits)) / temperature))
    p = jnp.where(counted, p, 0)
    number = jnp.maximum(jnp.sum(counted), 1)
    square, cross = (
        jnp.matmul(p.T, x, precision="highest") / number
        for x in (p, _one_hot(labels, num_classes).astype(jnp.float32))
    )
    rate = 1 / jnp.maximum(jnp.linalg.eigvalsh(square)[-1], jnp.finfo(jnp.float32).tiny)
    project = jax.vmap(optax.projections.projection_simplex)

    def step(carry, _):
        matrix, ahead, weight = carry
        new = project(ahead - rate * (jnp.matmul(square, ahead, precision="highest") - cross))
        new_weight = (1 + jnp.sqrt(1 + 4 * weight**2)) / 2
        return (new, new + (weight - 1) / new_weight * (new - matrix), new_weight), None

    even = jnp.full((p.shape[1], num_classes), 1 / num_classes)
    (matrix, _, _), _ = jax.lax.scan(step, (even, even, jnp.float32(1)), length=steps)
    return matrix
