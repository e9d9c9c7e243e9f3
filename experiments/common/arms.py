"""Arms of an experiment, put together from the table of methods: what is minimised, by whom, and what it needs."""

import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.common.methods import METHODS, Contrast, Method, Seen
from kdjax import losses, train
from kdjax.parallel import AXIS
from kdjax.types import Batch, Outputs

BASIC = ("scratch", "kd")
"""The arms beside METHODS: labels alone, and Hinton's distillation, whose weights are flags."""

WARM_UP = 20 / 240  # share of a run over which a term's weight rises to its value
FIRST = 30 / 240  # share of a run in which such a term is alone, and after which it is gone


def _stages(features: Mapping[str, Any], prefix: str = "stage") -> tuple[str, ...]:
    """The maps after (or before the ReLU of) the stages, shallowest first."""
    names = (name for name, x in features.items() if name.startswith(prefix) and x.ndim == 4)
    return tuple(sorted(name for name in names if name != "stage0"))


def _middle(features: Mapping[str, Any]) -> tuple[str, ...]:
    stages = _stages(features)
    return stages[len(stages) // 2 :][:1]


CHOICES: dict[str, Callable[[Mapping[str, Any]], tuple[str, ...]]] = {
    "none": lambda features: (),
    "stages": _stages,
    "last": lambda features: _stages(features)[-1:],
    "middle": _middle,
    "chain": lambda features: ("stage0",) * ("stage0" in features) + _stages(features),
    "preactivations": lambda features: _stages(features, "preactivation"),
    "embedding": lambda features: ("embedding",),
    "reviewed": lambda features: (*_stages(features), "embedding"),
    "answers": lambda features: (*_stages(features, "preactivation"), "embedding"),
}
"""Which features a term sees, by the names that the networks give them."""


class Arm(NamedTuple):
    """What a trainer needs to follow an arm."""

    objective: train.Objective
    companions: nn.Module | None
    features: tuple[str, ...]  # of the teacher, that batches must hold


class Terms(nn.Module):
    """The terms of an arm that are modules, each with its weight, as one module."""

    parts: tuple[tuple[str, Callable[..., nn.Module], Callable], ...]

    @nn.compact
    def __call__(self, inputs: tuple[Outputs, Batch], *, train: bool) -> dict[str, Array]:
        """Returns the weighted terms of ``(outputs, batch)``."""
        outputs, batch = inputs
        found = {}
        for name, make, weigh in self.parts:
            student, teacher, weight = weigh(outputs, batch)
            value = make(name=name)(student, teacher, batch, train=train)
            if isinstance(value, tuple):  # what the companion alone learns from is not the student's affair
                value, found[f"{name}_companion"] = value
            found[name] = weight * value
        return found


def check_methods(names: Sequence[str], *, weights: Sequence[str], mixup: bool) -> dict[str, float]:
    """Refuses arms that there are not; returns the weights that ``--weights`` sets."""
    known = (*BASIC, *METHODS)
    for name in names:
        for part in name.split("+"):
            if part not in known or (part == "scratch" and name != part):
                close = difflib.get_close_matches(part, known, 1)
                hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}."
                raise ValueError(f"--method={name}: there is no arm {part}; {hint}")
            if mixup and part in METHODS and METHODS[part].labels:
                raise ValueError(
                    f"--method={name} reads one label per image, and --mixup blends two; use --mixup=0."
                )
    found = {}
    for item in weights:
        name, _, value = item.partition("=")
        try:
            found[name] = float(value)
        except ValueError as error:
            raise ValueError(f"--weights={item} must be NAME=NUMBER, such as hint=50.") from error
        if name not in METHODS:
            raise ValueError(f"--weights={item}: there is no method {name}; kd has --soft_weight.")
    return found


def make_arm(
    name: str,
    *,
    student: Outputs,
    teacher: Outputs,
    steps: int,
    labels: np.ndarray,
    hard: Callable[[Any, Batch], Array],
    weights: Mapping[str, float],
    kd: Mapping[str, float],
) -> Arm:
    """Puts an arm together and tries it on shapes.

    Args:
      name: of a method, or of several joined by "+", which then have weight 1 for the labels and 1 for kd.
      student: shapes of what it returns.
      teacher: likewise.
      steps: of a whole run, for the terms that have stages.
      labels: of the training examples, in the order of ``batch["position"]``.
      hard: loss of the labels.
      weights: of terms, instead of the table's.
      kd: ``hard_weight``, ``soft_weight`` and ``temperature`` of the arm "kd".

    Raises:
      ValueError: if the two networks do not show what the method compares.
    """
    names = name.split("+")
    parts = {part: METHODS[part] for part in names if part in METHODS}
    has_first = any(method.when == "first" for method in parts.values())
    if len(names) > 1:
        hard_weight, soft_weight = 1.0, 1.0
    elif name == "kd":
        hard_weight, soft_weight = kd["hard_weight"], kd["soft_weight"]
    else:
        hard_weight, soft_weight = parts[name].hard if parts else 1.0, 0.0

    def scale(step, when):
        if when == "warm_up":
            return jnp.minimum((step + 1) / max(WARM_UP * steps, 1), 1.0)
        alone_now = step < FIRST * steps
        if when == "first":
            return jnp.where(alone_now, 1.0, 0.0)
        return jnp.where(alone_now, 0.0, 1.0) if has_first else 1.0

    chosen = {part: _chosen(part, method, student, teacher) for part, method in parts.items()}

    def seen(part, outputs, batch):
        of_student, of_teacher = chosen[part]
        return (
            Seen(outputs.logits, tuple(outputs.features[name] for name in of_student)),
            Seen(batch["teacher_logits"], tuple(batch[f"teacher_{name}"] for name in of_teacher)),
            weights.get(part, parts[part].weight) * scale(batch["step"], parts[part].when),
        )

    def objective(outputs, batch):
        terms = {"hard": hard_weight * scale(batch["step"], "always") * hard(outputs, batch)}
        if "kd" in names:
            soft = losses.soft_target_kl(
                outputs.logits, batch["teacher_logits"], temperature=kd["temperature"]
            )
            terms["soft"] = soft_weight * scale(batch["step"], "always") * jnp.mean(soft)
        for part, method in parts.items():
            if not isinstance(method.term, type):
                s, t, weight = seen(part, outputs, batch)
                terms[part] = weight * method.term(s, t, batch)
        return terms

    modules = []
    for part, method in parts.items():
        if isinstance(method.term, type):
            make = functools.partial(Contrast, labels=labels) if method.term is Contrast else method.term
            modules.append((part, make, functools.partial(seen, part)))
    features = tuple(sorted({name for _, of_teacher in chosen.values() for name in of_teacher}))
    arm = Arm(objective, Terms(tuple(modules)) if modules else None, features)
    _try(name, arm, student, teacher)
    return arm


def init_companions(
    module: nn.Module, outputs: Any, batch: Mapping[str, Any], *, seed: int
) -> tuple[Any, Any]:
    """Parameters and state of an arm's companions.

    Args:
      module: the arm's companions.
      outputs: shapes of what the student returns of a batch.
      batch: shapes of the batch.
      seed: of the run.
    """
    zeros = jax.tree.map(lambda x: jnp.zeros((1, *x.shape), x.dtype), (outputs, dict(batch)))
    rngs: Any = dict(zip(("params", "dropout"), jax.random.split(jax.random.key(seed)), strict=True))
    # Mapped over one device's worth, since companions reduce over the devices' axis.
    init = jax.vmap(lambda inputs: module.init(rngs, inputs, train=True), axis_name=AXIS)
    state = jax.tree.map(lambda x: x[0], dict(jax.jit(init)(zeros)))
    return state.pop("params", {}), state


def _chosen(
    name: str, method: Method, student: Outputs, teacher: Outputs
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the features that a method compares; a ValueError if a network has none, or their numbers differ."""
    kinds = (method.features, method.of_teacher or method.features)
    found = tuple(CHOICES[kind](seen.features) for kind, seen in zip(kinds, (student, teacher), strict=True))
    if method.features != "none" and (not all(found) or len(found[0]) != len(found[1])):
        raise ValueError(
            f"--method={name} compares {method.features.replace('_', ' ')} of both networks: the student has "
            f"{', '.join(found[0]) or 'none'}, the teacher {', '.join(found[1]) or 'none'}. Choose networks of as many "
            "stages, such as two of the resnet or wrn families, or a method on logits or embeddings."
        )
    return found[0], found[1]


def _try(name: str, arm: Arm, student: Outputs, teacher: Outputs) -> None:
    """Traces the arm on shapes, so that what does not fit is found before anything is trained."""
    rows = student.logits.shape[0]
    batch = {
        "label": jax.ShapeDtypeStruct((rows,), jnp.int32),
        "position": jax.ShapeDtypeStruct((rows,), jnp.int32),
        "step": jax.ShapeDtypeStruct((), jnp.int32),
        "teacher_logits": teacher.logits,
    } | {f"teacher_{key}": teacher.features[key] for key in arm.features}

    def run(outputs, batch):
        terms = arm.objective(outputs, batch)
        if arm.companions is not None:
            rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
            terms |= arm.companions.init_with_output(rngs, (outputs, batch), train=True)[0]
        return terms

    lifted = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), (student, batch))
    try:
        jax.eval_shape(jax.vmap(run, axis_name=AXIS), *lifted)
    except (TypeError, ValueError) as error:
        shapes = {key: x.shape[1:] for key, x in student.features.items()}
        theirs = {key: teacher.features[key].shape[1:] for key in arm.features}
        raise ValueError(
            f"--method={name} cannot compare these networks ({str(error).splitlines()[0]}). The student's features: "
            f"{shapes}; of the teacher's it takes {theirs}."
        ) from error
