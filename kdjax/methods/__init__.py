"""Distillation methods, ready to train with: losses with their published weights and their heads.

Methods add up::

    method = methods.labels() + methods.kd(soft_weight=1.0) + methods.crd()
    student = run.train(network, method, dataset, recipe, teacher=teacher)

Each function is one paper and takes its weight first. Where sources disagree, the default is that of the CRD benchmark
(Tian et al., 2020, RepDistiller), which trains for 240 epochs on CIFAR-100; a stage of so many epochs there takes the
same share of a run here. Methods on features look for the names that kdjax's networks use ("stage1",
"preactivation1", "embedding"). For your own network, name the features:
``hint(student=("block2",), teacher=("layer2",))``. For your own loss, write a function
``(outputs, batch) -> {name: scalar}`` and pass it to :func:`objective`.
"""

import dataclasses
import difflib
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from kdjax import losses, train
from kdjax.methods import learned
from kdjax.methods.images import attention_matching as attention_matching
from kdjax.methods.images import common_stages as common_stages
from kdjax.methods.images import ig_overlay as ig_overlay
from kdjax.methods.images import map_matching as map_matching
from kdjax.methods.images import saliency_crop as saliency_crop
from kdjax.methods.images import saliency_dim as saliency_dim
from kdjax.methods.images import unit_distance as unit_distance
from kdjax.methods.method import ALWAYS, Features, Select, View
from kdjax.methods.method import FIRST_STAGE as FIRST_STAGE
from kdjax.methods.method import WARM_UP as WARM_UP
from kdjax.methods.method import Bound as Bound
from kdjax.methods.method import Method as Method
from kdjax.methods.method import Schedule as Schedule
from kdjax.methods.method import Term as Term
from kdjax.methods.method import bind as bind
from kdjax.methods.method import cross_entropy as cross_entropy
from kdjax.methods.method import head_initialiser as head_initialiser
from kdjax.methods.saddles import EscapeOptions as EscapeOptions
from kdjax.methods.saddles import cost as cost
from kdjax.methods.saddles import perturbations as perturbations
from kdjax.methods.saddles import sprkd as sprkd
from kdjax.methods.saddles import sprkd_paper as sprkd_paper
from kdjax.methods.saddles import start_at as start_at
from kdjax.methods.saddles import towards as towards
from kdjax.options import option
from kdjax.parallel import AXIS
from kdjax.types import Batch

# Selections of features.


def stages(features: Features) -> tuple[str, ...]:
    """The maps after the stages, shallowest first."""
    return _maps(features, "stage")


def last_stage(features: Features) -> tuple[str, ...]:
    """The map after the last stage."""
    return stages(features)[-1:]


def middle_stage(features: Features) -> tuple[str, ...]:
    """The map in the middle."""
    found = stages(features)
    return found[len(found) // 2 :][:1]


def stem_and_stages(features: Features) -> tuple[str, ...]:
    """The maps that FSP compares in pairs: after the stem, if the network has it as a feature, and after the stages."""
    return ("stage0",) * ("stage0" in features) + stages(features)


def preactivations(features: Features) -> tuple[str, ...]:
    """The maps before the ReLU of the stages."""
    return _maps(features, "preactivation")


def embedding(features: Features) -> tuple[str, ...]:
    """The input of the last layer, which maps it to the logits."""
    return ("embedding",) * ("embedding" in features)


def stages_and_embedding(features: Features) -> tuple[str, ...]:
    """The maps after the stages, and the embedding."""
    return (*stages(features), "embedding")


def preactivations_and_embedding(features: Features) -> tuple[str, ...]:
    """The maps before the ReLU of the stages, and the embedding."""
    return (*preactivations(features), "embedding")


def _maps(features: Features, prefix: str) -> tuple[str, ...]:
    names = (name for name, x in features.items() if name.startswith(prefix) and x.ndim == 4)
    return tuple(sorted(name for name in names if name != "stage0"))


# From losses to methods: a term has the name of its loss, and is its mean over the batch.


def _on_logits(
    loss: Callable[..., Array],
    weight: float,
    hard_weight: float = 0.1,
    *,
    teacher: bool = True,
    labels: bool = False,
    schedule: Schedule = ALWAYS,
    **options: Any,
) -> Method:
    """A loss of the student's logits, then of the teacher's and of the labels where it takes these."""

    def term(student: View, of_teacher: View, batch: Batch) -> Array:
        read = [of_teacher.logits] * teacher + [batch["label"]] * labels
        return jnp.mean(loss(student.logits, *read, **options))

    more: dict[str, Any] = {"schedule": schedule, "reads_labels": labels, "teacher_free": not teacher}
    return Method(hard_weight, (Term(loss.__name__, weight, term, **more),))


def _on_features(
    loss: Callable[..., Array], weight: float, student: Select, teacher: Select | None, **options: Any
) -> Method:
    """A loss of each pair of features, summed over the pairs."""

    def term(student: View, teacher: View, batch: Batch) -> Float[Array, ""]:
        pairs = zip(student.features, teacher.features, strict=True)
        return sum((jnp.mean(loss(s, t, **options)) for s, t in pairs), jnp.zeros(()))

    return Method(1.0, (Term(loss.__name__, weight, term, None, student, teacher),))


def _with_head(
    name: str,
    weight: float,
    head: Callable[..., nn.Module],
    student: Select,
    teacher: Select | None,
    schedule: Schedule = ALWAYS,
) -> Method:
    def make(name: str, labels: np.ndarray) -> nn.Module:
        return head(name=name)

    return Method(1.0, (Term(name, weight, None, make, student, teacher, schedule),))


# Labels, and the teacher's logits.


def labels(weight: float = 1.0) -> Method:
    """Cross-entropy with the labels."""
    return Method(weight)


@dataclasses.dataclass(frozen=True)
class KdOptions:
    """Options of :func:`kd`.

    A weight below 0 is a warning, not an error: under wrong labels the best weight of the teacher can be above 1, and
    that of the labels below 0 (Das and Sanghavi, `Understanding Self-Distillation in the Presence of Label Noise
    <https://arxiv.org/abs/2301.13304>`_, 2023).
    """

    temperature: float = option(4.0, "Softening of both logits, above 0.", least=0.0)
    hard_weight: float = option(0.1, "Weight of the labels' cross-entropy in kd.")
    soft_weight: float = option(0.9, "Weight of the teacher's T²-scaled divergence in kd.")

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0; the field uses 1 to 20.")
        if self.hard_weight == self.soft_weight == 0:
            raise ValueError(
                "hard_weight=0 and soft_weight=0 leave kd nothing to learn; one must be above 0."
            )
        for name, whom in (("hard_weight", "labels"), ("soft_weight", "teacher")):
            value = getattr(self, name)
            if not math.isfinite(value):
                raise ValueError(f"{name}={value} must be a finite number.")
            if value < 0:
                said = f"{name}={value:g} is below 0: the student is driven away from the {whom}."
                warnings.warn(said, stacklevel=3)


def kd(temperature: float = 4.0, *, hard_weight: float = 0.1, soft_weight: float = 0.9) -> Method:
    """Knowledge distillation (KD): the T²-scaled divergence from the teacher's softened logits, beside the labels.

    Hinton et al., `Distilling the Knowledge in a Neural Network <https://arxiv.org/abs/1503.02531>`_, 2015.
    """
    KdOptions(temperature, hard_weight, soft_weight)  # raises for values that make no sense
    method = _on_logits(losses.soft_target_kl, soft_weight, hard_weight, temperature=temperature)
    soft = method.terms[0]._replace(name="soft", settings={"temperature": temperature})
    return dataclasses.replace(method, terms=(soft,))


def soft_target_cross_entropy(weight: float = 0.9) -> Method:
    """Cross-entropy with the teacher's probabilities at T = 4. No published weight: as kd."""
    return _on_logits(losses.soft_target_cross_entropy, weight, temperature=4.0)


def squared_logits(weight: float = 0.9) -> Method:
    """Squared distance of logits (Ba and Caruana, 2014). No published weight: as kd."""
    return _on_logits(losses.squared_logits, weight)


def dkd(weight: float = 1.0) -> Method:
    """Decoupled knowledge distillation (DKD) with warm-up (Zhao et al., 2022, on CIFAR-100: 1 and 8 at T = 4)."""
    return _on_logits(losses.dkd, weight, 1.0, labels=True, schedule=WARM_UP)


def dist(weight: float = 2.0) -> Method:
    """DIST, correlations between and within classes (Huang et al., 2022, code: 2, T = 4)."""
    return _on_logits(losses.dist, weight, 1.0, temperature=4.0, axis_name=AXIS)


def logit_standardised_kl(weight: float = 9.0) -> Method:
    """Logit standardisation (Sun et al., 2024: 9, T = 2, labels .1)."""
    return _on_logits(losses.logit_standardised_kl, weight)


def wttm(weight: float = 4.0) -> Method:
    """Weighted transformed teacher matching (Zheng and Yang, 2024, an example in their code: 4, T = 5, labels 1)."""
    return _on_logits(losses.wttm, weight, 1.0)


def confidence_penalty(weight: float = 0.1) -> Method:
    """Confidence penalty, without a teacher (Pereyra et al., 2017, on CIFAR-10: .1)."""
    return _on_logits(losses.confidence_penalty, weight, 1.0, teacher=False)


def teacher_free_kl(weight: float = 0.1) -> Method:
    """Teacher-free distillation (Tf-KD) from a virtual teacher (Yuan et al., 2020, on ImageNet: .1, T = 20)."""
    return _on_logits(losses.teacher_free_kl, weight, 0.9, teacher=False, labels=True)


def jensen_shannon(weight: float = 0.9) -> Method:
    """Jensen–Shannon divergence at T = 4. No published weight: as kd."""
    return _on_logits(losses.jensen_shannon, weight, temperature=4.0)


def top_k_kl(weight: float = 0.9, *, k: int = 5, temperature: float = 4.0) -> Method:
    """KD from the teacher's k largest probabilities alone. No published weight: as kd."""

    def term(student: View, teacher: View, batch: Batch) -> Array:
        chances = jax.nn.softmax(teacher.logits.astype(jnp.float32) / temperature)
        stored, classes = jax.lax.top_k(chances, min(k, chances.shape[-1]))
        return jnp.mean(losses.top_k_kl(student.logits, stored, classes, temperature=temperature))

    return Method(0.1, (Term("top_k_kl", weight, term),))


def label_smoothing_cross_entropy(weight: float = 1.0, *, smoothing: float = 0.1) -> Method:
    """Label smoothing in place of the labels, without a teacher (Szegedy et al., 2016: .1)."""
    loss = losses.label_smoothing_cross_entropy
    method = _on_logits(loss, weight, 0.0, teacher=False, labels=True, smoothing=smoothing)
    return dataclasses.replace(method, terms=(method.terms[0]._replace(settings={"smoothing": smoothing}),))


def correlation_distance(weight: float = 1.0) -> Method:
    """Correlation of student and teacher probabilities at T = 4. No confirmed weight."""
    return _on_logits(losses.correlation_distance, weight, 1.0, temperature=4.0)


def noisy_teacher(weight: float = 0.9) -> Method:
    """KD from logits with Gaussian noise of .1 on half of the examples (Sau, 2016). No published weight: as kd."""
    method = _with_head("noisy_teacher", weight, learned.NoisyTeacher, (), None)
    return dataclasses.replace(method, hard_weight=0.1)


def privileged(weight: float = 1.0) -> Method:
    """Generalised distillation (Lopez-Paz et al., 2016) with soft_weight .5 at T = 4, in place of the labels."""
    return _on_logits(losses.privileged, weight, 0.0, labels=True, soft_weight=0.5, temperature=4.0)


# Feature maps.


def hint(weight: float = 100.0, *, student: Select = middle_stage, teacher: Select | None = None) -> Method:
    """FitNets' hint through a regressor (Romero et al., 2015). CRD benchmark: 100, second stage."""
    return _with_head("hint", weight, learned.Hints, student, teacher)


def attention_transfer(
    weight: float = 1000.0, *, student: Select = stages, teacher: Select | None = None
) -> Method:
    """Attention transfer, AT (Zagoruyko and Komodakis, 2017). CRD benchmark: 1000."""
    return _on_features(losses.attention_transfer, weight, student, teacher)


def factor_transfer(
    weight: float = 200.0, *, student: Select = last_stage, teacher: Select | None = None
) -> Method:
    """Factor transfer, FT (Kim et al., 2018). CRD benchmark: 200."""
    return _with_head("factor_transfer", weight, learned.FactorTransfer, student, teacher)


def nst(weight: float = 50.0, *, student: Select = stages, teacher: Select | None = None) -> Method:
    """Neuron selectivity transfer, NST (Huang and Wang, 2017). CRD benchmark: 50."""
    return _on_features(losses.nst, weight, student, teacher)


def fsp(weight: float = 50.0, *, student: Select = stem_and_stages, teacher: Select | None = None) -> Method:
    """Flow of solution procedure, FSP (Yim et al., 2017). CRD benchmark: 50, in a first stage of its own."""

    def term(student: View, teacher: View, batch: Batch) -> Float[Array, ""]:
        """Over each pair of consecutive maps."""
        pairs = [tuple(zip(v.features[:-1], v.features[1:], strict=True)) for v in (student, teacher)]
        return sum((jnp.mean(losses.fsp(s, t)) for s, t in zip(*pairs, strict=True)), jnp.zeros(()))

    return Method(1.0, (Term("fsp", weight, term, None, student, teacher, FIRST_STAGE),))


def activation_boundary(
    weight: float = 1.0, *, student: Select = preactivations, teacher: Select | None = None
) -> Method:
    """Activation boundaries, AB (Heo et al., 2019). CRD benchmark: Heo's weights, in a first stage of its own."""
    return _with_head("activation_boundary", weight, learned.Boundaries, student, teacher, FIRST_STAGE)


def ofd(weight: float = 1.0, *, student: Select = preactivations, teacher: Select | None = None) -> Method:
    """Overhaul of feature distillation, OFD (Heo et al., 2019), with the weights of the authors' CIFAR-100 code."""
    return _with_head("ofd", weight, learned.Overhaul, student, teacher)


def reviewkd(
    weight: float = 5.0,
    *,
    student: Select = stages_and_embedding,
    teacher: Select | None = preactivations_and_embedding,
) -> Method:
    """Knowledge review, ReviewKD, with warm-up (Chen et al., 2021, for resnet32x4 and resnet8x4: 5)."""
    return _with_head("reviewkd", weight, learned.Review, student, teacher, WARM_UP)


def vid(weight: float = 1.0, *, student: Select = stages, teacher: Select | None = None) -> Method:
    """Variational information distillation, VID (Ahn et al., 2019). CRD benchmark: 1."""
    return _with_head("vid", weight, learned.VariationalInformation, student, teacher)


def mgd(weight: float = 7e-5, *, student: Select = last_stage, teacher: Select | None = None) -> Method:
    """Masked generative distillation, MGD, with masked channels (Yang et al., 2022, on ImageNet: 7e-5)."""
    return _with_head("mgd", weight, learned.MaskedGeneration, student, teacher)


# Relations between the examples of a batch.


def vkd(weight: float = 1.0, *, student: Select = embedding, teacher: Select | None = None) -> Method:
    """VkD: an orthogonal projection of the embedding (Miles et al., 2024: 1)."""
    return _with_head("vkd", weight, learned.OrthogonalProjections, student, teacher)


def rkd(weight: float = 1.0, *, student: Select = embedding, teacher: Select | None = None) -> Method:
    """Relational KD, RKD, distances and angles (Park et al., 2019). CRD benchmark: 25 and 50."""

    def term(student: View, teacher: View, batch: Batch) -> Float[Array, ""]:
        (s,), (t,) = student.features, teacher.features
        return 25 * losses.rkd_distance(s, t, axis_name=AXIS) + 50 * losses.rkd_angle(s, t, axis_name=AXIS)

    return Method(1.0, (Term("rkd", weight, term, None, student, teacher),))


def rkd_distance(
    weight: float = 25.0, *, student: Select = embedding, teacher: Select | None = None
) -> Method:
    """RKD's distances alone (Park et al., 2019: 25)."""
    return _on_features(losses.rkd_distance, weight, student, teacher, axis_name=AXIS)


def rkd_angle(weight: float = 50.0, *, student: Select = embedding, teacher: Select | None = None) -> Method:
    """RKD's angles alone (Park et al., 2019: 50)."""
    return _on_features(losses.rkd_angle, weight, student, teacher, axis_name=AXIS)


def pkt(weight: float = 30000.0, *, student: Select = embedding, teacher: Select | None = None) -> Method:
    """Probabilistic knowledge transfer, PKT (Passalis and Tefas, 2018). CRD benchmark: 30000."""
    return _on_features(losses.pkt, weight, student, teacher, axis_name=AXIS)


def similarity_preserving(
    weight: float = 3000.0, *, student: Select = last_stage, teacher: Select | None = None
) -> Method:
    """Similarity-preserving distillation, SP (Tung and Mori, 2019). CRD benchmark: 3000."""
    return _on_features(losses.similarity_preserving, weight, student, teacher, axis_name=AXIS)


def correlation_congruence(
    weight: float = 0.02, *, student: Select = embedding, teacher: Select | None = None
) -> Method:
    """Correlation congruence, CC (Peng et al., 2019). CRD benchmark: .02."""
    return _with_head("correlation_congruence", weight, learned.Congruence, student, teacher)


def info_nce(weight: float = 1.0, *, student: Select = embedding, teacher: Select | None = None) -> Method:
    """InfoNCE between student and teacher embeddings. No published weight."""
    return _with_head("info_nce", weight, learned.InfoNce, student, teacher)


def cka(weight: float = 1.0, *, student: Select = last_stage, teacher: Select | None = None) -> Method:
    """Centred kernel alignment, CKA (Kornblith et al., 2019). No published weight."""
    return _on_features(losses.cka, weight, student, teacher, axis_name=AXIS)


def refilled(
    weight: float = 25.0,
    *,
    triplet_weight: float = 500.0,
    student: Select = embedding,
    teacher: Select | None = None,
) -> Method:
    """REFILLED, from a teacher of any classes (Ye et al., 2020; code: 1000 and 100, which are 500 and 25 here).

    Triplets have a first stage of their own, in the authors' code half of all epochs; then the teacher's embedding
    classifies by the centres of the batch. The teacher's logits aren't read.
    """

    def triplets(student: View, teacher: View, batch: Batch) -> Float[Array, ""]:
        (s,), (t,) = student.features, teacher.features
        return losses.triplet_relations(s, t, batch["label"], axis_name=AXIS)

    def local(student: View, teacher: View, batch: Batch) -> Float[Array, ""]:
        (t,), label = teacher.features, batch["label"]
        classes = student.logits.shape[-1]
        centres = losses.class_centres(t, label, num_classes=classes, axis_name=AXIS)
        target = losses.centre_logits(t, centres)
        return jnp.mean(losses.local_kl(student.logits, target, label, axis_name=AXIS))

    second = Term("refilled", weight, local, None, student, teacher, reads_labels=True)
    first = Term("refilled_triplets", triplet_weight, triplets, None, student, teacher, FIRST_STAGE, True)
    return Method(1.0, (second, first))


def crd(weight: float = 0.8, *, student: Select = embedding, teacher: Select | None = None) -> Method:
    """Contrastive representation distillation, CRD, with a memory of all examples (Tian et al., 2020: .8)."""

    def make(name: str, labels: np.ndarray) -> nn.Module:
        return learned.ContrastiveMemory(labels=labels, name=name)

    return Method(1.0, (Term("crd", weight, None, make, student, teacher),))


METHODS: dict[str, Callable[..., Method]] = {
    function.__name__: function
    for function in (
        *(
            soft_target_cross_entropy,
            squared_logits,
            dkd,
            dist,
            logit_standardised_kl,
            wttm,
            confidence_penalty,
        ),
        *(teacher_free_kl, jensen_shannon, top_k_kl, label_smoothing_cross_entropy, correlation_distance),
        *(noisy_teacher, privileged, hint, attention_transfer, factor_transfer, nst, fsp),
        *(activation_boundary, ofd, reviewkd, vid, mgd, vkd, rkd, rkd_distance, rkd_angle, pkt),
        *(similarity_preserving, correlation_congruence, info_nce, cka, refilled, crd),
    )
}
"""Methods whose first argument is their weight, by name. Beside them: :func:`labels` and :func:`kd`."""


# Your own loss, your own optimizer, and methods by name.


def objective(function: train.Objective, *, teacher_features: Sequence[str] = ()) -> Method:
    """A method from your own loss.

    Args:
      function: ``(outputs, batch) -> {name: scalar}``, weights included. With a teacher, the batch holds
        ``teacher_logits``, and ``teacher_NAME`` for each of ``teacher_features``.
      teacher_features: names of the teacher's features that it reads.
    """
    named = getattr(function, "__qualname__", type(function).__qualname__)
    return Method(
        objectives=(function,), teacher_features=tuple(teacher_features), settings={"objective": named}
    )


def optimizer(wrap: Callable[[optax.GradientTransformation], optax.GradientTransformation]) -> Method:
    """Wraps the recipe's optimizer in another transformation, such as one of :mod:`kdjax.transforms`."""
    return Method(optimizer=wrap)


_DEFAULT_KD = kd()


def named(name: str, *, kd: Method | None = None, weights: Mapping[str, float] | None = None) -> Method:
    """A method by name, for a command line: ``scratch``, ``kd``, a name of :data:`METHODS`, or several joined by ``+``.

    In a sum, the labels and kd have weight 1 and the other methods their own weight, as in the CRD benchmark.

    Args:
      name: such as ``crd+kd``.
      kd: the method that ``kd`` stands for; in a sum its weights become 1.
      weights: method → weight, in place of the published one.

    Raises:
      ValueError: if there is no such method; the message suggests the likely one.
    """
    parts, weights = name.split("+"), weights or {}
    for part in parts:
        if part not in ("kd", "scratch", *METHODS) or (part == "scratch" and len(parts) > 1):
            raise ValueError(f"{name}: there is no method {part!r}; {_suggestion(part)}")
    own = [METHODS[part](*([weights[part]] if part in weights else [])) for part in parts if part in METHODS]
    if len(parts) == 1:
        return labels() if name == "scratch" else own[0] if own else kd or _DEFAULT_KD
    total = labels()
    if "kd" in parts:
        soft = (kd or _DEFAULT_KD).terms[0]
        total += Method(1.0, (soft._replace(weight=1.0),))
    for method in own:
        total += method
    return total


def _suggestion(name: str) -> str:
    """The methods whose docstring contains this word; otherwise those of the nearest spelling."""
    word = re.compile(rf"\b{re.escape(name.replace('_', ' '))}\b", re.IGNORECASE)
    described = [known for known, function in METHODS.items() if word.search(function.__doc__ or "")]
    close = described or difflib.get_close_matches(name, ("kd", "scratch", *METHODS), 3)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"there are scratch, kd, {', '.join(METHODS)}."
