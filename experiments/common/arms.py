"""Arms of an experiment, put together from the table of methods: what is minimised, by whom, and what it needs."""

import difflib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.common.methods import METHODS, Contrast, Method, Seen
from kdjax import losses, train
from kdjax.data.batches import MAX_SEED
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
    heads: nn.Module | None
    features: tuple[str, ...]  # of the teacher, that batches must hold


class Terms(nn.Module):
    """The terms of an arm that are modules, each with its weight, as one module.

    Attributes:
      parts: the methods.
      labels: of the training examples, for the one that remembers them.
      share: how much of its weight a term has, by its ``when`` and the step.
    """

    parts: tuple["_Part", ...]
    labels: np.ndarray
    share: Callable[[str, Array], Any]

    @nn.compact
    def __call__(self, inputs: tuple[Outputs, Batch], *, train: bool) -> dict[str, Array]:
        """Returns the weighted terms of ``(outputs, batch)``."""
        outputs, batch = inputs
        found = {}
        for part in self.parts:
            make: Any = part.method.term
            module = make(labels=self.labels, name=part.name) if make is Contrast else make(name=part.name)
            value = module(*part.seen(outputs, batch), batch, train=train)
            if isinstance(value, tuple):  # what the head alone learns from is not the student's affair
                value, found[f"{part.name}_companion"] = value
            found[part.name] = part.weight * self.share(part.method.when, batch["step"]) * value
        return found


def check_methods(names: Sequence[str], *, weights: Sequence[str], mixup: bool) -> dict[str, float]:
    """Refuses arms that there are not, and weights of others; returns the weights that ``--weights`` sets."""
    known = (*BASIC, *METHODS)
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"--method={','.join(names)} must name one or more different arms, such as scratch,kd."
        )
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
        if name not in METHODS:
            raise ValueError(f"--weights={item}: there is no method {name}; kd has --soft_weight.")
        try:
            weight = float(value)
        except ValueError:
            weight = math.nan
        if not 0 <= weight < math.inf:
            raise ValueError(
                f"--weights={item} must be NAME=NUMBER with a number from 0 on, such as hint=50."
            )
        if name in found:
            raise ValueError(f"--weights={','.join(weights)} has two weights of {name}.")
        if not any(name in arm.split("+") for arm in names):
            raise ValueError(f"--weights={item}: no arm of --method={','.join(names)} has {name}.")
        found[name] = weight
    return found


def seeds_of(values: Sequence[str]) -> list[int]:
    """What ``--seeds`` names; a ValueError unless they are different numbers that fit into 32 bits."""
    try:
        seeds = [int(seed) for seed in values]
    except ValueError as error:
        raise ValueError(f"--seeds={','.join(values)} must be whole numbers, such as 0,1,2.") from error
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0 or max(seeds) > MAX_SEED:
        raise ValueError(
            f"--seeds={','.join(values)} must be different numbers from 0 to {MAX_SEED}, such as 0,1,2."
        )
    return seeds


def check_arms(wanted: Sequence[str], there: Sequence[str], *, baseline: str | None = None) -> None:
    """Refuses a list of ``--arms`` that names one that is not there, or lacks the one that all are compared with."""
    unknown = [name for name in wanted if name not in there]
    if unknown or (wanted and baseline is not None and baseline not in wanted):
        what = (
            f"there is no arm {unknown[0]!r}"
            if unknown
            else f"{baseline}, which all are compared with, is missing"
        )
        raise ValueError(f"--arms={','.join(wanted)}: {what}; there are {', '.join(there)}.")


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
    parts = [_part(part, student, teacher, weights) for part in names if part in METHODS]
    staged = any(part.method.when == "first" for part in parts)
    if len(names) > 1:
        hard_weight, soft_weight = 1.0, 1.0
    elif name == "kd":
        hard_weight, soft_weight = kd["hard_weight"], kd["soft_weight"]
    else:
        hard_weight, soft_weight = parts[0].method.hard if parts else 1.0, 0.0
    share = functools.partial(_share, steps=steps, staged=staged)

    def objective(outputs, batch):
        now = share("always", batch["step"])
        terms = {"hard": hard_weight * now * hard(outputs, batch)}
        if "kd" in names:
            soft = losses.soft_target_kl(
                outputs.logits, batch["teacher_logits"], temperature=kd["temperature"]
            )
            terms["soft"] = soft_weight * now * jnp.mean(soft)
        for part in parts:
            if not isinstance(part.method.term, type):
                weight = part.weight * share(part.method.when, batch["step"])
                terms[part.name] = weight * part.method.term(*part.seen(outputs, batch), batch)
        return terms

    modules = tuple(part for part in parts if isinstance(part.method.term, type))
    features = tuple(sorted({name for part in parts for name in part.of_teacher}))
    arm = Arm(objective, Terms(modules, labels, share) if modules else None, features)
    _try(name, arm, student, teacher)
    return arm


def companion_initialiser(
    module: nn.Module, outputs: Any, batch: Mapping[str, Any]
) -> Callable[[int], tuple[Any, Any]]:
    """Builds ``seed -> (parameters, state)`` of an arm's heads; compiled once.

    Args:
      module: the arm's heads.
      outputs: shapes of what the student returns of a batch.
      batch: shapes of the batch.
    """
    zeros = jax.tree.map(lambda x: jnp.zeros((1, *x.shape), x.dtype), (outputs, dict(batch)))

    @jax.jit
    def init(keys):
        rngs: Any = {"params": keys[0], "dropout": keys[1]}
        # Mapped over one device's worth, since heads reduce over the devices' axis.
        variables = jax.vmap(lambda inputs: module.init(rngs, inputs, train=True), axis_name=AXIS)(zeros)
        return jax.tree.map(lambda x: x[0], dict(variables))

    def initialise(seed: int) -> tuple[Any, Any]:
        state = dict(init(jax.random.split(jax.random.key(seed))))
        return state.pop("params", {}), state

    return initialise


class _Part(NamedTuple):
    """A method within an arm, with the features of either network that it compares."""

    name: str
    method: Method
    weight: float
    of_student: tuple[str, ...]
    of_teacher: tuple[str, ...]

    def seen(self, outputs: Outputs, batch: Batch) -> tuple[Seen, Seen]:
        """What it sees of the student and of the teacher."""
        return (
            Seen(outputs.logits, tuple(outputs.features[name] for name in self.of_student)),
            Seen(batch["teacher_logits"], tuple(batch[f"teacher_{name}"] for name in self.of_teacher)),
        )


def _share(when: str, step: Array, *, steps: int, staged: bool) -> Array | float:
    """How much of its weight a term has at a step; ``staged``: another of the arm has the first stage to itself."""
    if when == "warm_up":
        return jnp.minimum((step + 1) / max(WARM_UP * steps, 1), 1.0)
    first = step < FIRST * steps
    if when == "first":
        return jnp.where(first, 1.0, 0.0)
    return jnp.where(first, 0.0, 1.0) if staged else 1.0


def _part(name: str, student: Outputs, teacher: Outputs, weights: Mapping[str, float]) -> _Part:
    """A method and what it compares; a ValueError if a network does not have it, or their numbers differ."""
    method = METHODS[name]
    kinds = (method.features, method.of_teacher or method.features)
    ours, theirs = (CHOICES[k](seen.features) for k, seen in zip(kinds, (student, teacher), strict=True))
    if method.features != "none" and (not ours or len(ours) != len(theirs)):
        raise ValueError(
            f"--method={name} compares {method.features} of both networks: the student has "
            f"{', '.join(ours) or 'none'}, the teacher {', '.join(theirs) or 'none'}. Choose networks of as many "
            "stages, such as two of the resnet or wrn families, or a method on logits or embeddings."
        )
    return _Part(name, method, weights.get(name, method.weight), ours, theirs)


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
        if arm.heads is not None:
            rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
            terms |= arm.heads.init_with_output(rngs, (outputs, batch), train=True)[0]
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
