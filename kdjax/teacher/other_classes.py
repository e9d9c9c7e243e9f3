"""A teacher of other classes than the student's: its answers, put into the student's classes.

::

    signal = answers(teacher, dataset, features=["embedding"], directory="runs/answers")
    signal = in_classes(signal, dataset, "blm_plus", temperature=4.0)  # logits of the classes of the data set
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kdjax import checkpoints, data, losses
from kdjax.representations import Probe, linear_probe
from kdjax.teacher import cache
from kdjax.teacher.signal import TeacherSignal
from kdjax.types import Outputs, Weights


def translate(
    signal: TeacherSignal,
    logits_of: Callable[[Mapping[str, Any]], Array],
    *,
    features: Sequence[str] = (),
    made_from: Any,
) -> TeacherSignal:
    """Replaces a teacher's logits by a function of its answers, as where its classes are not the student's.

    Args:
      signal: of :func:`answers` or :func:`from_file`, cached or online.
      logits_of: ``{name: rows [n, ...]} -> logits [n, classes]``, pure; it is given the logits and every feature of the
        signal, in float16 where they are cached so.
      features: those that the student is given.
      made_from: what decides the function, as JSON; part of the identity of runs.

    Returns:
      The signal with the new logits, float32.
    """

    def translated(said: Mapping[str, Any]) -> dict[str, Array]:
        return {"logits": jnp.asarray(logits_of(said), jnp.float32)}

    kept, ask = {name: signal.shapes.features[name] for name in features}, signal.online
    logits = jax.eval_shape(translated, {"logits": signal.shapes.logits, **_asked_features(signal)})["logits"]
    changes: dict[str, Any] = {"shapes": Outputs(logits, kept)}
    if signal.answers is not None:
        rows, views = signal.answers["logits"].shape[:2]
        flat = {name: x.reshape(rows * views, *x.shape[2:]) for name, x in signal.answers.items()}
        new = np.asarray(translated(flat)["logits"]).reshape(rows, views, -1)
        changes["answers"] = {"logits": new} | {name: signal.answers[name] for name in features}
    elif ask is not None:

        def online(weights: Weights, images: Array) -> dict[str, Array]:
            said = cache.named(ask(weights, images))
            return translated(said) | {name: said[name] for name in features}

        changes["online"] = online
    identity = {**signal.identity, "translated": made_from, "features": list(features)}
    return signal._replace(**changes, maps=(), identity=identity)


WAYS = ("least_squares", "blm", "blm_plus", "blm_logits", "probe")
"""What :func:`in_classes` learns from labels."""


def in_classes(
    signal: TeacherSignal,
    dataset: data.Dataset,
    way: str,
    *,
    temperature: float,
    top_k: int = 3,
    features: Sequence[str] = (),
    fitted_to: TeacherSignal | None = None,
) -> TeacherSignal:
    """A teacher's answers in the classes of a data set, by what is learnt from its training labels.

    Args:
      signal: of the teacher.
      dataset: of the student.
      way: ``least_squares``, ``blm`` or ``blm_plus``, a map of classes; ``blm_logits``, weights of logits; ``probe``, a
        linear classifier on the feature "embedding". See :func:`kdjax.losses.least_squares_class_map`,
        :func:`~kdjax.losses.bayesian_class_map`, :func:`~kdjax.losses.bayesian_logit_weights` and :func:`probe_of`.
      temperature: of the loss that compares the answers.
      top_k: of ``blm_plus``.
      features: of the teacher that the student is given.
      fitted_to: cached answers to learn from; those of ``signal`` by default.

    Raises:
      ValueError: if there is no such way, or there are no cached answers to learn from.
    """
    if way not in WAYS:
        raise ValueError(f"answers are put into other classes by {', '.join(WAYS)}, got {way!r}.")
    fitted_to = fitted_to or signal
    if way == "probe":
        return through_probe(signal, probe_of(fitted_to, dataset), features=features)
    logits, labels = map(jnp.asarray, _about(fitted_to, dataset, "train", "logits"))
    classes: dict[str, Any] = {"num_classes": dataset.num_classes}
    if way == "blm_logits":
        weights = losses.bayesian_logit_weights(logits, labels, **classes)
        return through_weights(signal, weights, features=features)
    if way == "least_squares":
        matrix = losses.least_squares_class_map(logits, labels, **classes)
    else:
        plus: dict[str, Any] = {"smoothing": 0.0, "top_k": top_k} if way == "blm_plus" else {}
        matrix = losses.bayesian_class_map(logits, labels, **classes, **plus)
    return through_map(signal, matrix, temperature=temperature, features=features)


def probe_of(signal: TeacherSignal, dataset: data.Dataset) -> Probe:
    """A linear classifier of a data set on a teacher's embeddings; see :func:`kdjax.representations.linear_probe`.

    Raises:
      ValueError: if the signal is not cached, or lacks the feature "embedding".
    """
    rows, labels = _about(signal, dataset, "train", "embedding")
    validation = _about(signal, dataset, "validation", "embedding")
    return linear_probe(rows, labels, num_classes=dataset.num_classes, validation=validation)


def _about(
    signal: TeacherSignal, dataset: data.Dataset, split: str, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """An answer about the unaugmented images of a split, and their labels."""
    if signal.answers is None or name not in signal.answers:
        there = "no cached answers" if signal.answers is None else ", ".join(signal.answers)
        raise ValueError(
            f"the teacher's {name} of the training images is learnt from, and the signal has {there}: "
            f"ask for it, answers(..., features=['embedding'], directory=...)."
        )
    ids = dataset.splits[split]
    return np.asarray(signal.answers[name][ids, 0], np.float32), dataset.labels[ids]


def through_map(
    signal: TeacherSignal,
    matrix: Float[Any, "sources classes"],
    *,
    temperature: float,
    features: Sequence[str] = (),
) -> TeacherSignal:
    """A teacher's answers through a map of classes; see :func:`kdjax.losses.map_classes`.

    Args:
      signal: of the teacher.
      matrix: of :func:`kdjax.losses.class_map`, :func:`~kdjax.losses.bayesian_class_map` or
        :func:`~kdjax.losses.least_squares_class_map`.
      temperature: of the loss that compares the answers.
      features: of the teacher that the student is given.

    Raises:
      ValueError: if the matrix is no map of the teacher's classes, or leaves a class of the student without one.
    """
    classes = np.shape(matrix)[-1]
    losses.check_class_map(matrix, num_teacher_classes=signal.shapes.logits.shape[-1], num_classes=classes)
    matrix = jnp.asarray(matrix)

    def logits_of(said: Mapping[str, Any]) -> Array:
        return losses.map_classes(jnp.asarray(said["logits"], jnp.float32), matrix, temperature=temperature)

    made_from = {"map": checkpoints.digest_tree(matrix), "temperature": temperature}
    return translate(signal, logits_of, features=features, made_from=made_from)


def through_weights(
    signal: TeacherSignal, weights: Float[Any, "sources classes"], *, features: Sequence[str] = ()
) -> TeacherSignal:
    """A teacher's logits times the weights of :func:`kdjax.losses.bayesian_logit_weights`; otherwise as a map."""
    weights = jnp.asarray(weights, jnp.float32)
    made_from = {"weights": checkpoints.digest_tree(weights)}
    return translate(signal, lambda said: said["logits"] @ weights, features=features, made_from=made_from)


def through_probe(signal: TeacherSignal, probe: Probe, *, features: Sequence[str] = ()) -> TeacherSignal:
    """The logits of a linear probe of the teacher's feature "embedding"; otherwise as :func:`through_map`."""
    kernel, bias = jnp.asarray(probe.kernel), jnp.asarray(probe.bias)[None]
    made_from = {"probe": checkpoints.digest_tree((kernel, bias))}
    return translate(
        signal, lambda said: said["embedding"] @ kernel + bias, features=features, made_from=made_from
    )


def about_classes(signal: TeacherSignal, dataset: data.Dataset, classes: Collection[str]) -> TeacherSignal:
    """Keeps what a teacher says of the training images of some classes; of the others it says nothing.

    All classes are masked in its logits of the others, which makes a loss of logits zero there.

    Args:
      signal: cached, in the student's classes.
      dataset: whose training images they are.
      classes: names.

    Raises:
      ValueError: if there is no such class, or the teacher runs in the step.
    """
    if unknown := [name for name in classes if name not in dataset.class_names]:
        raise ValueError(
            f"{dataset.name} has no class {unknown[0]}; it has {', '.join(dataset.class_names)}."
        )
    if signal.answers is None:
        raise ValueError(
            "only cached answers can be kept of some classes: ask the teacher in the mode centre."
        )
    ids = dataset.splits["train"]
    rest = ids[~np.isin(np.asarray(dataset.class_names)[dataset.labels[ids]], list(classes))]
    logits = np.array(signal.answers["logits"])
    logits[rest] = -np.inf
    identity = {**signal.identity, "about": sorted(classes)}
    return signal._replace(answers={**signal.answers, "logits": logits}, identity=identity)


def _asked_features(signal: TeacherSignal) -> dict[str, Any]:
    """Shapes of the features that a signal brings."""
    there = signal.identity.get("features", ()) if signal.answers is None else signal.answers
    return {name: signal.shapes.features[name] for name in there if name in signal.shapes.features}
