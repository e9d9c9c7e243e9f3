"""What a method is made of, how methods add up, and how they are bound to two networks."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from kdjax import train
from kdjax.parallel import AXIS
from kdjax.types import ApplyFn, Batch, Outputs

Features = Mapping[str, Any]
Select = Callable[[Features], tuple[str, ...]] | Sequence[str]
"""Which features of a network a term compares: names, or a function of all features by name."""


class View(NamedTuple):
    """What a term sees of one network: its logits, and the features it selected, in order."""

    logits: Any  # float[batch, classes]; None without a teacher
    features: tuple[Array, ...]


class Schedule(NamedTuple):
    """How a term's weight changes over a run.

    Attributes:
      share: ``(step, steps) -> share of the weight``.
      alone: whether the term has the first stage to itself: until it is over, all other terms have weight 0.
    """

    share: Callable[[Array, int], Array | float]
    alone: bool = False


_WARM_UP = 20 / 240  # of a run, as the authors of DKD and ReviewKD use for 240 epochs
_FIRST_STAGE = 30 / 240  # of a run, as of FSP and AB in the CRD benchmark

ALWAYS = Schedule(lambda step, steps: 1.0)
WARM_UP = Schedule(lambda step, steps: jnp.minimum((step + 1) / max(_WARM_UP * steps, 1), 1.0))
FIRST_STAGE = Schedule(lambda step, steps: jnp.where(step < _FIRST_STAGE * steps, 1.0, 0.0), alone=True)
_AFTER_FIRST_STAGE = Schedule(lambda step, steps: jnp.where(step < _FIRST_STAGE * steps, 0.0, 1.0))

TermFn = Callable[[View, View, Batch], Float[Array, ""]]


class Term(NamedTuple):
    """One weighted term of a loss.

    Attributes:
      name: in the metrics.
      weight: of the term.
      loss: ``(student, teacher, batch) -> scalar``; None where ``head`` computes it.
      head: ``(name, labels of the training examples) -> linen module`` that is trained beside the student. Called with
        ``(student, teacher, batch, train=)`` it returns the term, or the term and a loss that trains the head alone.
      features: which of the student's features it compares.
      teacher_features: which of the teacher's, if others.
      schedule: of its weight.
      reads_labels: whether it needs one label per image, so that images may not be blended.
      teacher_free: whether it does without a teacher.
      settings: other values that decide its numbers, such as a temperature; part of a run's identity.
    """

    name: str
    weight: float
    loss: TermFn | None = None
    head: Callable[[str, np.ndarray], nn.Module] | None = None
    features: Select = ()
    teacher_features: Select | None = None
    schedule: Schedule = ALWAYS
    reads_labels: bool = False
    teacher_free: bool = False
    settings: Mapping[str, Any] = {}


def _same(value: Any) -> Any:
    return value


def _unchanged(seed: int, state: train.TrainState) -> train.TrainState:
    del seed
    return state


def _nothing(before: optax.OptState, after: optax.OptState) -> dict[str, Array]:
    del before, after
    return {}


@dataclasses.dataclass(frozen=True)
class Method:
    """How a student learns; ``a + b`` does both.

    In a sum the labels are counted once, with that of the two weights which is further from 0.

    Attributes:
      hard_weight: weight of the cross-entropy with the labels.
      terms: the other terms of the loss.
      objectives: a user's own functions ``(outputs, batch) -> {name: scalar}``, weights included.
      teacher_features: names of teacher features that the objectives read as ``batch["teacher_NAME"]``.
      optimizer: wraps the recipe's optimizer.
      init: ``(seed, state) -> state``; changes the state that a run starts from.
      record: further metrics from the optimizer's state before and after a step.
      second_batch: whether the optimizer needs a second batch, ``certify_fn``.
      student: wraps the student for training, for example to return more features.
      crop: ``(batch, keys, move) -> keys``: chooses each image's crop.
      blend: ``(batch, keys) -> images``: changes the cropped images, in [0, 255].
      settings: other values that decide its numbers, as JSON; part of a run's identity.
    """

    hard_weight: float = 0.0
    terms: tuple[Term, ...] = ()
    objectives: tuple[train.Objective, ...] = ()
    teacher_features: tuple[str, ...] = ()
    optimizer: Callable[[optax.GradientTransformation], optax.GradientTransformation] = _same
    init: Callable[[int, train.TrainState], train.TrainState] = _unchanged
    record: Callable[[Any, Any], Mapping[str, Array]] = _nothing
    second_batch: bool = False
    student: Callable[[ApplyFn], ApplyFn] = _same
    crop: Callable[..., Array] | None = None
    blend: Callable[[Batch, Array], Array] | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __add__(self, other: "Method") -> "Method":
        both = [term.name for term in (*self.terms, *other.terms)]
        if len(set(both)) < len(both):
            raise ValueError(f"a sum of methods has each term once, got {', '.join(both)}.")
        if self.crop is not None and other.crop is not None:
            raise ValueError("only one method of a sum can choose the crops of images.")
        return Method(
            hard_weight=max(self.hard_weight, other.hard_weight, key=abs),
            terms=self.terms + other.terms,
            objectives=self.objectives + other.objectives,
            teacher_features=self.teacher_features + other.teacher_features,
            optimizer=lambda tx: other.optimizer(self.optimizer(tx)),
            init=lambda seed, state: other.init(seed, self.init(seed, state)),
            record=lambda before, after: {**self.record(before, after), **other.record(before, after)},
            second_batch=self.second_batch or other.second_batch,
            student=lambda apply_fn: other.student(self.student(apply_fn)),
            crop=self.crop or other.crop,
            blend=_both(self.blend, other.blend),
            settings={**self.settings, **other.settings},
        )

    @property
    def reads_labels(self) -> bool:
        """Whether a term needs one label per image."""
        return any(term.reads_labels for term in self.terms)

    @property
    def description(self) -> dict[str, Any]:
        """Everything that decides its numbers, as JSON: part of the identity of a run."""
        terms = {term.name: {"weight": term.weight, **term.settings} for term in self.terms}
        return {"hard_weight": self.hard_weight, **terms, **self.settings}


def _both(first: Any, second: Any) -> Any:
    """One blend after the other, or the only one."""
    if first is None or second is None:
        return first or second
    return lambda batch, keys: second({**batch, "image": first(batch, keys)}, keys)


class Bound(NamedTuple):
    """A method for two given networks and a given length of training."""

    objective: train.Objective
    heads: nn.Module | None
    teacher_features: tuple[str, ...]  # that batches must hold, as "teacher_NAME"


class _Part(NamedTuple):
    """A term with the names of the features of either network that it compares."""

    term: Term
    student: tuple[str, ...]
    teacher: tuple[str, ...]

    def views(self, outputs: Outputs, batch: Batch) -> tuple[View, View]:
        """What it sees of the student and of the teacher."""
        return (
            View(outputs.logits, tuple(outputs.features[name] for name in self.student)),
            View(batch.get("teacher_logits"), tuple(batch[f"teacher_{name}"] for name in self.teacher)),
        )


class Heads(nn.Module):
    """The terms of a method that have parameters, each with its weight, as one module.

    Attributes:
      parts: the terms.
      labels: of the training examples.
      share: how much of its weight a term has at a step.
    """

    parts: tuple[_Part, ...]
    labels: np.ndarray
    share: Callable[[Schedule, Array], Any]

    @nn.compact
    def __call__(self, inputs: tuple[Outputs, Batch], *, train: bool) -> dict[str, Array]:
        """Returns the weighted terms of ``(outputs, batch)``."""
        outputs, batch = inputs
        found = {}
        for part in self.parts:
            term, make = part.term, part.term.head
            assert make is not None
            value: Any = make(term.name, self.labels)(*part.views(outputs, batch), batch, train=train)
            if isinstance(value, tuple):  # the second trains the head alone, whatever the term's weight
                value, found[f"{term.name}_head"] = value
            found[term.name] = term.weight * self.share(term.schedule, batch["step"]) * value
        return found


def cross_entropy(outputs: Outputs, batch: Batch) -> Float[Array, ""]:
    """Cross-entropy with the labels, averaged; with those of both images where mixup blended two."""
    per_label = optax.losses.softmax_cross_entropy_with_integer_labels
    value = per_label(outputs.logits, batch["label"])
    if "partner" in batch:
        other = per_label(outputs.logits, batch["label"][batch["partner"]])
        value = batch["share"] * value + (1 - batch["share"]) * other
    return jnp.mean(value)


def bind(
    method: Method, student: Outputs, teacher: Outputs | None, *, steps: int, labels: np.ndarray
) -> Bound:
    """Turns a method into an objective and heads, and tries them on shapes.

    Args:
      method: what to minimise.
      student: shapes of what the student returns for a batch.
      teacher: the same of the teacher; None without one.
      steps: batches of the whole run, for terms whose weight changes.
      labels: of the training examples, in the order of ``batch["position"]``.

    Raises:
      ValueError: if the method needs a teacher and there is none, or the networks lack what it compares.
    """
    if not (method.hard_weight or method.terms or method.objectives):
        raise ValueError(
            "this method has nothing to minimise: add methods.labels(), as in labels() + sprkd(region)."
        )
    needing = [term.name for term in method.terms if not term.teacher_free]
    if teacher is None and needing:
        raise ValueError(f"{', '.join(needing)} needs a teacher: pass teacher=.")
    parts = [_part(term, student, teacher or Outputs(jnp.zeros(()), {})) for term in method.terms]
    staged = any(term.schedule.alone for term in method.terms)

    def share(schedule: Schedule, step: Array) -> Array | float:
        if staged and schedule == ALWAYS:  # not "is": linen copies what a module holds
            schedule = _AFTER_FIRST_STAGE
        return schedule.share(step, steps)

    def objective(outputs, batch):
        terms = {}
        if method.hard_weight:
            now = share(ALWAYS, batch["step"])
            terms["hard"] = method.hard_weight * now * cross_entropy(outputs, batch)
        for part in parts:
            if part.term.loss is not None:
                weight = part.term.weight * share(part.term.schedule, batch["step"])
                terms[part.term.name] = weight * part.term.loss(*part.views(outputs, batch), batch)
        for own in method.objectives:
            terms |= own(outputs, batch)
        return terms

    learned = tuple(part for part in parts if part.term.head is not None)
    asked = {name for part in parts for name in part.teacher} | set(method.teacher_features)
    bound = Bound(objective, Heads(learned, labels, share) if learned else None, tuple(sorted(asked)))
    if teacher is not None and not method.objectives:
        _try(method, bound, student, teacher)
    return bound


def head_initialiser(
    heads: nn.Module, outputs: Any, batch: Mapping[str, Any]
) -> Callable[[int], tuple[Any, Any]]:
    """Builds ``seed -> (parameters, state)`` of a method's heads; compiled once.

    Args:
      heads: of :class:`Bound`.
      outputs: shapes of what the student returns for a batch.
      batch: shapes of the batch.
    """
    zeros = jax.tree.map(lambda x: jnp.zeros((1, *x.shape), x.dtype), (outputs, dict(batch)))

    @jax.jit
    def init(keys):
        rngs: Any = {"params": keys[0], "dropout": keys[1]}
        # Mapped over one device's worth, since heads reduce over the devices' axis.
        variables = jax.vmap(lambda inputs: heads.init(rngs, inputs, train=True), axis_name=AXIS)(zeros)
        return jax.tree.map(lambda x: x[0], dict(variables))

    def initialise(seed: int) -> tuple[Any, Any]:
        state = dict(init(jax.random.split(jax.random.key(seed))))
        return state.pop("params", {}), state

    return initialise


def _part(term: Term, student: Outputs, teacher: Outputs) -> _Part:
    """A term with what it compares; a ValueError if a network does not have it, or their numbers differ."""
    select = (term.features, term.features if term.teacher_features is None else term.teacher_features)
    ours, theirs = (
        tuple(s(network.features)) if callable(s) else tuple(s)
        for s, network in zip(select, (student, teacher), strict=True)
    )
    lacking = [f"the student has no {name}" for name in ours if name not in student.features]
    lacking += [f"the teacher has no {name}" for name in theirs if name not in teacher.features]
    if lacking or len(ours) != len(theirs) or (callable(term.features) and not ours):
        what = getattr(term.features, "__name__", "features").replace("_", " ")
        raise ValueError(
            f"{term.name} compares {what} of both networks: the student has {', '.join(ours) or 'none'}, the teacher "
            f"{', '.join(theirs) or 'none'}{'; ' if lacking else ''}{'; '.join(lacking)}. Choose networks of as many "
            "stages, such as two of the resnet or wrn families, a method on logits or embeddings, or name the features "
            "to compare: student=(...), teacher=(...)."
        )
    return _Part(term, ours, theirs)


def _try(method: Method, bound: Bound, student: Outputs, teacher: Outputs) -> None:
    """Traces the method on shapes, so that what does not fit is found before anything is trained."""
    rows = student.logits.shape[0]
    compared = [name for name in bound.teacher_features if name in teacher.features]
    batch = {
        "label": jax.ShapeDtypeStruct((rows,), jnp.int32),
        "position": jax.ShapeDtypeStruct((rows,), jnp.int32),
        "step": jax.ShapeDtypeStruct((), jnp.int32),
        "teacher_logits": teacher.logits,
    } | {f"teacher_{key}": teacher.features[key] for key in compared}

    def run(outputs, batch):
        terms = bound.objective(outputs, batch)
        if bound.heads is not None:
            rngs: Any = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
            terms |= bound.heads.init_with_output(rngs, (outputs, batch), train=True)[0]
        return terms

    lifted = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), (student, batch))
    try:
        jax.eval_shape(jax.vmap(run, axis_name=AXIS), *lifted)
    except (TypeError, ValueError) as error:
        shapes = {key: x.shape[1:] for key, x in student.features.items()}
        theirs = {key: teacher.features[key].shape[1:] for key in compared}
        raise ValueError(
            f"{' + '.join(term.name for term in method.terms)} cannot compare these networks "
            f"({str(error).splitlines()[0]}). The student's features: {shapes}; of the teacher's it takes {theirs}."
        ) from error
