"""The arms of ``experiments.distill``: every loss of the library as it was published, with its weight and its source.

An arm minimises the labels' cross-entropy and one *term* (or several, joined by "+" in ``--method``). A term is a
function of what student and teacher show, or, where it has parameters or a memory of its own, a linen module that is
trained beside the student and then thrown away.

Where comparisons disagree, weights are those of the CRD benchmark (Tian et al., 2020, RepDistiller: "CRD benchmark"
below), 240 epochs on CIFAR-100. Stages of training are given there in epochs; here they are the same share of a run.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kdjax import losses
from kdjax.models import heads
from kdjax.parallel import AXIS
from kdjax.types import Batch


class Seen(NamedTuple):
    """What one network shows of a batch: its scores, and the features that the term asked for, in order."""

    logits: Float[Array, "batch classes"]
    features: tuple[Array, ...]


Term = Callable[[Seen, Seen, Batch], Float[Array, ""]]


def over(loss: Callable[..., Array], **options: Any) -> Term:
    """A term: the loss of each pair of features, averaged over the batch, summed over the pairs."""

    def term(student, teacher, batch):
        pairs = zip(student.features, teacher.features, strict=True)
        return sum((jnp.mean(loss(s, t, **options)) for s, t in pairs), jnp.zeros(()))

    return term


def on_logits(loss: Callable[..., Array], **options: Any) -> Term:
    """A term: the loss of the scores, averaged over the batch."""
    return lambda student, teacher, batch: jnp.mean(loss(student.logits, teacher.logits, **options))


def on_labels(loss: Callable[..., Array], **options: Any) -> Term:
    """A term: the loss of the student's scores and the labels, averaged over the batch."""
    return lambda student, teacher, batch: jnp.mean(loss(student.logits, batch["label"], **options))


def on_both(loss: Callable[..., Array], **options: Any) -> Term:
    """A term: the loss of the scores of both networks and the labels, averaged over the batch."""
    return lambda student, teacher, batch: jnp.mean(
        loss(student.logits, teacher.logits, batch["label"], **options)
    )


def flow(student: Seen, teacher: Seen, batch: Batch) -> Float[Array, ""]:
    """FSP over each pair of consecutive maps."""
    pairs = [tuple(zip(seen.features[:-1], seen.features[1:], strict=True)) for seen in (student, teacher)]
    return sum((jnp.mean(losses.fsp(s, t)) for s, t in zip(*pairs, strict=True)), jnp.zeros(()))


def boundary_weights(maps: Sequence[Array]) -> list[float]:
    """Heo's weights of n maps, shallowest first: 2^(i + 1 - n) / 1000."""
    return [2.0 ** (i + 1 - len(maps)) / 1000 for i in range(len(maps))]


def top_k(student: Seen, teacher: Seen, batch: Batch, *, k: int = 5, temperature: float = 4.0) -> Array:
    """As if only the k largest of the teacher's probabilities had been stored."""
    chances = jax.nn.softmax(teacher.logits.astype(jnp.float32) / temperature)
    stored, classes = jax.lax.top_k(chances, min(k, chances.shape[-1]))
    return jnp.mean(losses.top_k_kl(student.logits, stored, classes, temperature=temperature))


class NoisyTeacher(nn.Module):
    """Distillation from scores that are perturbed anew in every step for half of the examples."""

    @nn.compact
    def __call__(self, student: Seen, teacher: Seen, batch: Batch, *, train: bool) -> Array:
        """The soft loss at temperature 4."""
        noisy = losses.noisy_teacher(teacher.logits, self.make_rng("dropout"), deviation=0.1, probability=0.5)
        return jnp.mean(losses.soft_target_kl(student.logits, noisy, temperature=4.0))


class Hints(nn.Module):
    """Each map of the student through a regressor."""

    @nn.compact
    def __call__(self, student: Seen, teacher: Seen, batch: Batch, *, train: bool) -> Array:
        """The sum over the maps."""
        total = jnp.zeros(())
        for s, t in zip(student.features, teacher.features, strict=True):
            total += jnp.mean(losses.hint(heads.Regressor(t.shape[-1], axis_name=AXIS)(s, train=train), t))
        return total


class FactorTransfer(nn.Module):
    """Translator and paraphraser of one map.

    The paraphraser learns to reconstruct the teacher's map while the student is trained, not before.
    """

    @nn.compact
    def __call__(self, student: Seen, teacher: Seen, batch: Batch, *, train: bool) -> tuple[Array, Array]:
        """The distance of the factors, and what the paraphraser learns from."""
        (s,), (t,) = student.features, teacher.features
        t = jax.lax.stop_gradient(t)
        factors, restored = heads.FactorParaphraser(max(t.shape[-1] // 2, 1))(t)
        translator = heads.FactorTranslator(factors.shape[-1], axis_name=AXIS)
        loss = jnp.mean(losses.factor_transfer(translator(s, train=train), factors))
        return loss, jnp.mean(losses.hint(restored, t))


class Boundaries(nn.Module):
    """Maps before the ReLU, through connectors where channels differ, against the signs of the teacher's."""

    @nn.compact
    def __call__(self, student: Seen, teacher: Seen, batch: Batch, *, train: bool) -> Array:
        """The weighted sum over the maps."""
        total = jnp.zeros(())
        weights = boundary_weights(teacher.features)
        for weight, s, t in zip(weights, student.features, teacher.features, strict=True):
            if s.shape[-1] != t.shape[-1]:
                s = heads.Regressor(t.shape[-1], activation=lambda x: x, axis_name=AXIS)(s, train=train)
            total += 3 * weight * jnp.mean(losses.activation_boundary(s, t))
        return total


class Overhaul(nn.Module):
    """Maps before the ReLU through connectors, against what the teacher's ReLU lets through.

    The margin is what the paper derives from a normalisation before the ReLU, measured: the mean of the teacher's
    negative values in the batch. A residual sum has no normalisation of its own to derive it from.
    """

    @nn.compact
    def __call__(self, student: Seen, teacher: Seen, batch: Batch, *, train: bool) -> Array:
        """The weighted sum over the maps."""
        total = jnp.zeros(())
        weights = boundary_weights(teacher.features)
        for weight, s, t in zip(weights, student.features, teacher.features, strict=True):
            below, count = jnp.minimum(t, 0).sum((0, 1, 2)), (t < 0).sum((0, 1, 2))
            below, count = jax.lax.psum((below, count), AXIS)
            connector = heads.Regressor(t.shape[-1], activation=lambda x: x, axis_name=AXIS)
            margin = below / jnp.maximum(count, 1)
            total += weight * jnp.mean(losses.ofd(connector(s, train=train), t, margin=margin))
        return total


class Review(nn.Module):
    """From the deepest map to the shallowest, each joined with what was seen below it."""

    @nn.compact
    def __call__(self, student: Seen, teacher: Seen, batch: Batch, *, train: bool) -> Array:
        """The sum over the maps; the embeddings are the deepest, as maps of one position."""
        total, mixture = jnp.zeros(()), None
        hidden = min(512, student.features[-1].shape[-1])
        for s, t in reversed(list(zip(student.features, teacher.features, strict=True))):
            s, t = (x[:, None, None] if x.ndim == 2 else x for x in (s, t))
            fusion = heads.ReviewFusion(t.shape[-1], hidden, axis_name=AXIS)
            read, mixture = fusion(s, mixture, train=train)
            total += jnp.mean(losses.reviewkd(read, t))
        return total


class VariationalInformation(nn.Module):
    """A head for each map, that predicts the teacher's."""

    @nn.compact
    def __call__(self, student: Seen, teacher: Seen, batch: Batch, *, train: bool) -> Array:
        """The sum over the maps."""
        total = jnp.zeros(())
        for s, t in zip(student.features, teacher.features, strict=True):
            mean, log_scale = heads.VidHead(t.shape[-1])(s)
            total += jnp.mean(losses.vid(mean, t, log_scale=log_scale))
        return total


class MaskedGeneration(nn.Module):
    """The last map, with channels masked, from which a generator restores the teacher's."""

    @nn.compact
    def __call__(self, student: Seen, teacher: Seen, batch: Batch, *, train: bool) -> Array:
        """The loss of the generated map."""
        (s,), (t,) = student.features, teacher.features
        if s.shape[-1] != t.shape[-1]:
            s = nn.Conv(t.shape[-1], (1, 1))(s)
        masked = losses.mask_channels(self.make_rng("dropout"), s, fraction=0.15)
        return jnp.mean(losses.mgd(heads.Generator(t.shape[-1])(masked), t))


class Congruence(nn.Module):
    """The student's embedding, mapped linearly to the width of the teacher's.

    RepDistiller embeds both in 128 dimensions and trains both maps; two trained maps may meet at zero.
    """

    @nn.compact
    def __call__(self, student: Seen, teacher: Seen, batch: Batch, *, train: bool) -> Array:
        """The loss of the mapped embedding."""
        (s,), (t,) = student.features, teacher.features
        return losses.correlation_congruence(nn.Dense(t.shape[-1])(s), t, axis_name=AXIS)


class InfoNce(nn.Module):
    """The student's embedding, projected to the width of the teacher's."""

    @nn.compact
    def __call__(self, student: Seen, teacher: Seen, batch: Batch, *, train: bool) -> Array:
        """The loss of the projected embedding."""
        (s,), (t,) = student.features, teacher.features
        return losses.info_nce(heads.Embedding(t.shape[-1])(s), t, axis_name=AXIS)


class Contrast(nn.Module):
    """CRD: both embeddings projected by trained layers, and a memory of every training example.

    Attributes:
      labels: of the training examples in the order of ``batch["position"]``; negatives are of other classes.
      dims: of the projections.
      negatives: per example; at most a third of the training examples, the share they are of CIFAR-100's.
    """

    labels: np.ndarray
    dims: int = 128
    negatives: int = 16384

    @nn.compact
    def __call__(self, student: Seen, teacher: Seen, batch: Batch, *, train: bool) -> Array:
        """The loss; in training mode the memory moves."""
        (s,), (t,) = student.features, teacher.features
        examples = len(self.labels)
        memory = self.variable(
            "memory",
            "crd",
            lambda: losses.init_crd_memory(self.make_rng("params"), examples=examples, dims=self.dims),
        )
        key = jax.random.fold_in(self.make_rng("dropout"), jax.lax.axis_index(AXIS))
        candidates = losses.crd_candidates(
            key,
            batch["position"],
            negatives=max(min(self.negatives, examples // 3), 1),
            examples=examples,
            labels=jnp.asarray(self.labels, jnp.int32),
        )
        loss, moved = losses.crd(
            heads.Embedding(self.dims, name="student")(s),
            heads.Embedding(self.dims, name="teacher")(jax.lax.stop_gradient(t)),
            memory.value,
            candidates,
            axis_name=AXIS,
        )
        if train and not self.is_initializing():
            memory.value = moved
        return jnp.mean(loss)


class Method(NamedTuple):
    """One row of the table."""

    weight: float  # of the term
    term: Term | type[nn.Module]
    source: str  # of the weight
    features: str = "none"  # which of the student's: a key of arms.CHOICES
    of_teacher: str | None = None  # which of the teacher's, if others
    hard: float = 1.0  # weight of the labels when the term is alone
    when: str = "always"  # or "warm_up", or "first": alone in a first stage
    labels: bool = False  # whether the term reads them, so that images may not be blended


AS_KD = "as Hinton's: .9 beside .1 for the labels"
METHODS: dict[str, Method] = {
    # between scores
    "soft_target_cross_entropy": Method(
        0.9, on_logits(losses.soft_target_cross_entropy, temperature=4.0), AS_KD, hard=0.1
    ),
    "squared_logits": Method(0.9, on_logits(losses.squared_logits), f"none published; {AS_KD}", hard=0.1),
    "dkd": Method(
        1.0, on_both(losses.dkd), "Zhao 2022 on CIFAR-100: 1 and 8, T 4", when="warm_up", labels=True
    ),
    "dist": Method(2.0, on_logits(losses.dist, temperature=4.0, axis_name=AXIS), "Huang 2022, code: 2, T 4"),
    "logit_standardised_kl": Method(
        9.0, on_logits(losses.logit_standardised_kl), "Sun 2024: 9, T 2; labels .1", hard=0.1
    ),
    "confidence_penalty": Method(
        0.1, lambda s, t, batch: jnp.mean(losses.confidence_penalty(s.logits)), "Pereyra 2017 on CIFAR-10: .1"
    ),
    "teacher_free_kl": Method(
        0.1, on_labels(losses.teacher_free_kl), "Yuan 2020 on ImageNet: .1, T 20", hard=0.9, labels=True
    ),
    "jensen_shannon": Method(
        0.9, on_logits(losses.jensen_shannon, temperature=4.0), f"none published; {AS_KD}", hard=0.1
    ),
    "top_k_kl": Method(0.9, top_k, f"none published; k 5, {AS_KD}", hard=0.1),
    "label_smoothing_cross_entropy": Method(
        1.0,
        on_labels(losses.label_smoothing_cross_entropy, smoothing=0.1),
        "Szegedy 2016: .1",
        hard=0.0,
        labels=True,
    ),
    "correlation_distance": Method(
        1.0, on_logits(losses.correlation_distance, temperature=4.0), "none confirmed; ours"
    ),
    "noisy_teacher": Method(0.9, NoisyTeacher, f"none published; deviation .1, {AS_KD}", hard=0.1),
    "privileged": Method(
        1.0,
        on_both(losses.privileged, soft_weight=0.5, temperature=4.0),
        "Lopez-Paz 2016 searches it; .5 ours",
        hard=0.0,
        labels=True,
    ),
    # between maps
    "hint": Method(100.0, Hints, "CRD benchmark: 100, second stage", "middle"),
    "attention_transfer": Method(1000.0, over(losses.attention_transfer), "CRD benchmark: 1000", "stages"),
    "factor_transfer": Method(200.0, FactorTransfer, "CRD benchmark: 200", "last"),
    "nst": Method(50.0, over(losses.nst), "CRD benchmark: 50", "stages"),
    "fsp": Method(50.0, flow, "CRD benchmark: 50, first stage", "chain", when="first"),
    "activation_boundary": Method(
        1.0, Boundaries, "CRD benchmark: Heo's weights, first stage", "preactivations", when="first"
    ),
    "ofd": Method(1.0, Overhaul, "Heo 2019, CIFAR-100 code", "preactivations"),
    "reviewkd": Method(
        5.0, Review, "Chen 2021 for resnet32x4 and resnet8x4: 5", "reviewed", "answers", when="warm_up"
    ),
    "vid": Method(1.0, VariationalInformation, "CRD benchmark: 1", "stages"),
    "mgd": Method(7e-5, MaskedGeneration, "Yang 2022 on ImageNet: 7e-5", "last"),
    # between relations
    "rkd": Method(
        1.0,
        lambda s, t, batch: (
            25 * losses.rkd_distance(s.features[0], t.features[0], axis_name=AXIS)
            + 50 * losses.rkd_angle(s.features[0], t.features[0], axis_name=AXIS)
        ),
        "CRD benchmark: 25 and 50",
        "embedding",
    ),
    "rkd_distance": Method(25.0, over(losses.rkd_distance, axis_name=AXIS), "Park 2019: 25", "embedding"),
    "rkd_angle": Method(50.0, over(losses.rkd_angle, axis_name=AXIS), "Park 2019: 50", "embedding"),
    "pkt": Method(30000.0, over(losses.pkt, axis_name=AXIS), "CRD benchmark: 30000", "embedding"),
    "similarity_preserving": Method(
        3000.0, over(losses.similarity_preserving, axis_name=AXIS), "CRD benchmark: 3000", "last"
    ),
    "correlation_congruence": Method(0.02, Congruence, "CRD benchmark: .02", "embedding"),
    "info_nce": Method(1.0, InfoNce, "none published; ours", "embedding"),
    "cka": Method(1.0, over(losses.cka, axis_name=AXIS), "none published; ours", "last"),
    "crd": Method(0.8, Contrast, "CRD benchmark: .8", "embedding"),
}
"""Every loss that compares classifiers, by name; "scratch" and "kd", whose weights are flags, are arms beside them."""

ELSEWHERE = {
    "attention_map": "part of attention_transfer",
    "attribution_map": "of attributions, which a batch does not hold",
    "average_logits": "of several teachers at once; here each student has one",
    "average_probabilities": "of several teachers at once",
    "best_hard_weight": "for regression",
    "confidence_weights": "of several teachers at once",
    "cutmix_targets": "targets of an augmentation that distill does not have",
    "dice": "for dense outputs",
    "gradient_match": "of gradients in the input, which a batch does not hold",
    "lovasz": "for dense outputs",
    "map_distance": "part of attention_transfer",
    "masked_mean": "for void labels; a classification data set has none",
    "mask_positions": "what mgd does in detection",
    "mixup_targets": "what --mixup does with the labels",
    "ofd_margin": "for a normalisation right before the ReLU; ofd measures its margin here",
    "spread_top_k": "the other reading of a stored top k; top_k_kl assumes less",
    "squared_error": "for regression",
    "sum_and_count": "for void labels, as masked_mean",
}
"""Why the library's other functions are not arms."""
