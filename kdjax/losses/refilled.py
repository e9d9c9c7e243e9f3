"""REFILLED: what a teacher of other classes can say of the student's classes, by its embedding alone.

Two stages, as :func:`kdjax.methods.refilled` trains them. First the student's embedding learns how much nearer the
teacher sees examples of one class than examples of two (:func:`triplet_relations`). Then its logits learn from a
classifier that the teacher's embedding makes: a centre for each class of the student (:func:`class_centres`), and inner
products with the centres as logits (:func:`centre_logits`), compared over the classes of the batch
(:func:`local_kl`)::

    centres = losses.class_centres(batch["teacher_embedding"], labels, num_classes=10)
    target = losses.centre_logits(batch["teacher_embedding"], centres)
    soft = losses.local_kl(outputs.logits, target, labels)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kdjax.losses._checks import Positive, Temperature, checked
from kdjax.losses.logits import _labelled, _one_hot, soft_target_kl
from kdjax.losses.relations import _batches, _centred_gram, _distances, _unit

_TRIPLETS_AT_ONCE = 2**20  # elements per array: 4 MiB, which fits a cache


@checked
def triplet_relations(
    student_embedding: Float[Array, "batch *student_features"],
    teacher_embedding: Float[Array, "batch *teacher_features"],
    labels: Int[Array, " batch"],
    *,
    temperature: Positive = 4.0,
    margin: Positive = 0.2,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    r"""REFILLED's first stage: how much nearer the positive of a triplet is than the negative, by both networks.

    .. math:: \frac{1}{|\mathcal T|} \sum_{(a, p, n) \in \mathcal T} \mathrm{KL}(b(\pi^t_{apn}) \,\|\, b(\pi^s_{apn})),
              \qquad \pi_{apn} = \mathrm{sigmoid}\Big(\frac{d_{an} - d_{ap}}{\tau}\Big)

    with distances d of embeddings of unit norm and :math:`b(\pi) = (\pi, 1 - \pi)`. The triplets are the student's
    semi-hard ones: p is of the class of a, n of another, and :math:`0 < d^s_{an} - d^s_{ap} \le` margin. Which they are
    is constant under differentiation. Invariant to the scale of any embedding.

    Computed for a few anchors at a time, so not all triplets are stored.

    Args:
      student_embedding: pooled features before the classifier.
      teacher_embedding: the same of the teacher, of any width; constant under differentiation.
      labels: the class of each example; an example with a void label, negative, is in no triplet.
      temperature: τ > 0.
      margin: how much farther than the positive a negative may be, above 0 and in units of the unit norm.
      axis_name: gather the batch over this mapped axis. Without it, a device compares only its own B³/n³ triples.

    Returns:
      One non-negative value for the batch; zero where the relations agree, and without a triplet. An embedding of zero,
      which has no direction, is in no triplet.

    Raises:
      ValueError: if an option is not above 0.

    References:
      Ye, Lu, Zhan, `Distilling Cross-Task Knowledge via Relationship Matching
      <https://openaccess.thecvf.com/content_CVPR_2020/html/Ye_Distilling_Cross-Task_Knowledge_via_Relationship_Matching_CVPR_2020_paper.html>`_,
      2020, the first stage, as in the authors' code. Its weight of 1000 is one of 500 here, since it multiplies a mean
      over both entries of b. Until 2020-12 that code took one negative per pair, the nearest beyond the positive or,
      where there is none, the farthest.
    """
    both = _batches(student_embedding, teacher_embedding, axis_name)
    if axis_name is not None:
        labels = jax.lax.all_gather(labels, axis_name, tiled=True)
    known = labels >= 0
    for rows in both:
        known &= ~(jnp.sum(rows**2, axis=1) <= 1e-24)  # also where NaN
    student, teacher = (
        _distances(_centred_gram(_unit(jnp.where(known[:, None], rows, 0))))[0] for rows in both
    )
    same = labels[:, None] == labels[None, :]
    known = known[:, None] & known[None, :]
    positive = same & known & ~jnp.eye(len(labels), dtype=bool)

    def at_anchor(anchor):
        s, t, positive, negative = anchor
        s_gap, t_gap = (d[None, :] - d[:, None] for d in (s, t))  # [positives, negatives]
        semi_hard = ~(s_gap <= 0) & ~(s_gap > margin)  # also where NaN, to be seen
        semi_hard &= positive[:, None] & negative[None, :]
        divergence = _binary_divergence(t_gap / temperature, s_gap / temperature)
        return jnp.sum(jnp.where(semi_hard, divergence, 0)), jnp.sum(semi_hard, dtype=jnp.float32)

    anchors = student, teacher, positive, known & ~same
    at_once = max(_TRIPLETS_AT_ONCE // len(labels) ** 2, 1)
    if at_once >= len(labels):
        sums, counts = jax.vmap(at_anchor)(anchors)
    else:
        sums, counts = jax.lax.map(jax.checkpoint(at_anchor), anchors, batch_size=at_once)
    return jnp.sum(sums) / jnp.maximum(jnp.sum(counts), 1)


@checked
def class_centres(
    embedding: Float[Array, "examples dims"],
    labels: Int[Array, " examples"],
    *,
    num_classes: int,
    axis_name: str | None = None,
) -> Float[Array, "classes dims"]:
    """Unit vectors along the mean embedding of each class.

    Args:
      embedding: usually the teacher's, of a batch or of the whole training set; constant under differentiation.
      labels: the student's class of each example, 0 to classes - 1; a void label, negative, is left out.
      num_classes: the student's classes.
      axis_name: the mapped axis over which the examples are sharded; every device then returns the centres of all.

    Returns:
      One row per class, float32; zero for a class without example.

    References:
      Ye et al., as for :func:`triplet_relations`, with the centres of a batch; since 2020-12 the authors' code takes
      those of the training set. It divides sums by the size of the batch, not of the class, which the norm undoes.
    """
    rows = jax.lax.stop_gradient(embedding).astype(jnp.float32)
    rows = jnp.where(labels[:, None] >= 0, rows, 0)
    of_class = _one_hot(labels, num_classes).astype(jnp.float32)
    sums, counts = jnp.matmul(of_class.T, rows, precision="highest"), jnp.sum(of_class, axis=0)
    if axis_name is not None:
        sums, counts = jax.lax.psum((sums, counts), axis_name)
    return _unit(sums / jnp.maximum(counts, 1)[:, None])


@checked
def centre_logits(
    embedding: Float[Array, "*batch dims"], centres: Float[Array, "classes dims"]
) -> Float[Array, "*batch classes"]:
    """Logits of the classes that have a centre: inner products with the centres.

    The embedding isn't scaled to unit norm: the longer it is, the surer the prediction.

    Args:
      embedding: usually the teacher's.
      centres: as :func:`class_centres` returns them.

    Returns:
      Logits, float32, constant under differentiation; -inf for a class whose centre is zero.
    """
    rows, centres = (jax.lax.stop_gradient(x).astype(jnp.float32) for x in (embedding, centres))
    logits = jnp.matmul(rows, centres.T, precision="highest")
    return jnp.where(jnp.broadcast_to(jnp.any(centres != 0, axis=1), logits.shape), logits, -jnp.inf)


@checked
def local_kl(
    student_logits: Float[Array, "*batch classes"],
    teacher_logits: Float[Array, "*batch classes"],
    labels: Int[Array, "*batch"],
    *,
    temperature: Temperature = 2.0,
    axis_name: str | None = None,
) -> Float[Array, "*batch"]:
    r"""REFILLED's local distillation: KL divergence over those classes only that occur among the labels of the batch.

    .. math:: T^2 \, \mathrm{KL}(\sigma(t_L / T) \,\|\, \sigma(s_L / T)), \qquad L = \{y_1, \dots, y_B\}

    The logits of other classes are left out for both networks. A class that the teacher masks, though it is in the
    batch, has probability zero for it.

    Args:
      student_logits: logits of the student.
      teacher_logits: of the student's classes, usually of :func:`centre_logits`; constant under differentiation.
      labels: the class of each example, 0 to classes - 1; void if negative.
      temperature: T > 0.
      axis_name: the mapped axis over which the batch is sharded; the classes are then those of all devices.

    Returns:
      One non-negative value per example; zero where both predict the same, and where all labels are of one class.

    Raises:
      ValueError: if the temperature is not above 0.

    References:
      Ye et al., as for :func:`triplet_relations`, the second stage. The authors' code has no factor T²: its weight of
      100 at T = 2 is one of 25 here.
    """
    one_hot = _one_hot(labels, student_logits.shape[-1])
    present = jnp.any(one_hot, axis=tuple(range(labels.ndim)), keepdims=True)
    if axis_name is not None:
        present = jax.lax.pmax(present.astype(jnp.int32), axis_name) > 0
    student = _labelled(jnp.where(present, student_logits, -jnp.inf), labels)
    return soft_target_kl(student, teacher_logits, temperature=temperature)


@jax.custom_jvp
def _binary_divergence(a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """KL divergence of two events of probabilities sigmoid(a) and sigmoid(b), precise where these are close."""
    p, change = jax.nn.sigmoid(a), b - a
    near = jnp.abs(change) < 1
    small = jnp.where(near, change, 0)
    difference = jnp.where(near, jnp.log1p(p * jnp.expm1(small)), jax.nn.softplus(b) - jax.nn.softplus(a))
    return difference - p * change


@_binary_divergence.defjvp
def _binary_divergence_tangent(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    """In the second argument; the first is constant."""
    a, b = primals
    return _binary_divergence(a, b), (jax.nn.sigmoid(b) - jax.nn.sigmoid(a)) * tangents[1]
