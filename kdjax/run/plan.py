"""What a training is made of before there is a seed, and what can be refused by then."""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kdjax import data, evaluate, methods, models, parallel, pipeline
from kdjax import recipe as recipes
from kdjax import teacher as teachers
from kdjax import train as train_loop
from kdjax.methods import Method
from kdjax.models import Network
from kdjax.recipe import Machine, Recipe
from kdjax.teacher import TeacherSignal, TrainedNetwork
from kdjax.types import Outputs, Weights


class Plan(NamedTuple):
    """Everything of a training that does not depend on the seed."""

    network: Network
    method: Method
    bound: methods.Bound
    dataset: data.Dataset
    recipe: Recipe
    machine: Machine
    devices: list[jax.Device]
    resident: dict[str, Any]  # on every device
    train_batch: Callable[..., Any]
    evaluation_batch: Callable[..., Any]
    tx: optax.GradientTransformation
    identity: dict[str, Any]

    @property
    def steps(self) -> int:
        """Of the whole training."""
        return recipes.num_steps(self.recipe, len(self.dataset.splits["train"]))


def make_plan(
    network: Network,
    method: Method,
    dataset: data.Dataset,
    recipe: Recipe,
    signal: TeacherSignal | None,
    machine: Machine,
) -> Plan:
    """Binds a method to its networks and data, and puts the data on the devices.

    Raises:
      ValueError: if these do not fit together.
    """
    if not dataset.splits:
        raise ValueError("this data set has no splits: call kdjax.data.split(dataset).")
    devices = parallel.local_devices(machine.devices)
    parallel.check_batch_size(recipe.batch_size, devices)
    num_train = len(dataset.splits["train"])
    recipes.check(recipe, num_train)
    asked = {} if signal is None else {"shapes": signal.shapes, "mode": signal.mode, "maps": signal.maps}
    bound = check(network, method, dataset, recipe, **asked)
    _check_has(bound, signal)
    train_batch, evaluation_batch = pipeline.make_batches(dataset, recipe, method, signal)
    identity = {
        **identity_of(network, dataset, recipe, machine),
        "method": method.description,
        "teacher": {} if signal is None else dict(signal.identity),
    }
    return Plan(
        *(network, method, bound, dataset, recipe, machine, devices),
        resident=parallel.replicate(pipeline.resident(dataset, signal), devices),
        train_batch=train_batch,
        evaluation_batch=evaluation_batch,
        tx=method.optimizer(recipes.make_optimizer(recipe, steps=recipes.num_steps(recipe, num_train))),
        identity=identity,
    )


def identity_of(network: Network, dataset: data.Dataset, recipe: Recipe, machine: Machine) -> dict[str, Any]:
    """What decides a training beside its method, its teacher and its seed, as JSON."""
    return {
        "data": dataset.fingerprint,
        "normalisation": [list(values) for values in dataset.normalisation],
        "network": dict(network.description),
        "recipe": dataclasses.asdict(recipe),
        "steps_per_dispatch": machine.steps_per_dispatch,
    }


def signal_of(
    teacher: TrainedNetwork | TeacherSignal | None,
    network: Network,
    method: Method,
    dataset: data.Dataset,
    recipe: Recipe,
    directory: str | os.PathLike[str] | None,
) -> TeacherSignal | None:
    """The answers of a teacher that a method asks for: cached where images stay as they are, in the step elsewhere."""
    if teacher is None or isinstance(teacher, TeacherSignal):
        return teacher
    shapes = teacher.network.output_shapes
    bound = methods.bind(method, network.output_shapes, shapes, steps=1, labels=dataset.labels)
    asked: dict[str, Any] = {"features": bound.teacher_features}
    if directory is None or recipe.augments or recipe.mixup:
        return teachers.answers(teacher, dataset, mode="online", **asked)
    return teachers.answers(teacher, dataset, directory=Path(directory) / "teacher_answers", **asked)


# What is refused


def check(
    network: Network,
    method: Method,
    dataset: data.Dataset,
    recipe: Recipe,
    *,
    shapes: Outputs | None = None,
    mode: str = "online",
    maps: Sequence[str] = (),
) -> methods.Bound:
    """Binds a method to two networks, and refuses what cannot be trained; nothing is computed.

    Args:
      network: the student.
      method: what it minimises.
      dataset: after :func:`kdjax.data.split`.
      recipe: how it is trained.
      shapes: of what the teacher returns for a batch of two; None without a teacher.
      mode: how it is asked; see :func:`kdjax.teacher.answers`.
      maps: names of cached maps that are cropped and mirrored with their images.

    Raises:
      ValueError: if the networks lack what the method compares, or no cached answer is about an augmented image.
    """
    ids = dataset.splits["train"]
    steps, labels = recipes.num_steps(recipe, len(ids)), dataset.labels[ids]
    bound = methods.bind(method, network.output_shapes, shapes, steps=steps, labels=labels)
    if recipe.mixup and method.reads_labels:
        raise ValueError("this method reads one label per image, and mixup blends two; use mixup=0.")
    if mode == "online" or shapes is None:
        return bound
    if recipe.mixup and (method.terms or method.objectives):
        raise ValueError(
            f"mixup={recipe.mixup} blends images, and no cached answer is about a blend; ask the teacher online in "
            f"place of {mode}, or use mixup=0."
        )
    compared = [name for name in bound.teacher_features if name not in maps and name in shapes.features]
    compared = [name for name in compared if len(shapes.features[name].shape) == 4]
    if recipe.augments and mode != "views" and compared:
        raise ValueError(
            f"the method compares the map {compared[0]}, and that of an unaugmented image does not lie over a cropped "
            "or mirrored one; ask the teacher online or for views, or use padding=0 and flip=False."
        )
    return bound


def _check_has(bound: methods.Bound, signal: TeacherSignal | None) -> None:
    """Refuses a signal that lacks what a method reads."""
    if signal is None:
        return
    there = signal.identity.get("features", ()) if signal.answers is None else signal.answers
    if missing := [name for name in bound.teacher_features if name not in there]:
        raise ValueError(
            f"the method reads the teacher's {missing[0]}, and its answers hold {', '.join(there) or 'logits alone'}: "
            f"ask for it, answers(..., features={list(bound.teacher_features)})."
        )


# The functions of a plan


def make_run(plan: Plan) -> Callable[..., Any]:
    """Builds ``(state, arrays, index) -> (state, metrics)`` of one training."""
    heads = plan.bound.heads
    step = train_loop.make_train_step(
        plan.method.student(plan.network.apply),
        plan.bound.objective,
        plan.tx,
        heads=None if heads is None else models.apply_fn(heads),
        record=plan.method.record,
        axis_name=parallel.AXIS,
    )
    return train_loop.make_run(step, plan.train_batch, second=plan.method.second_batch)


def compiled(plan: Plan, run: Callable[..., Any]) -> Callable[..., Any]:
    """A run that is spread over the plan's devices."""
    return parallel.data_parallel(run, replicated=2, devices=plan.devices, donate_first=True)


def make_initialiser(plan: Plan) -> Callable[[int], train_loop.TrainState]:
    """Builds ``seed -> state`` before the first step."""
    heads, new_heads = plan.bound.heads, None
    if heads is not None:
        shapes = (plan.resident, jax.ShapeDtypeStruct((2,), jnp.int32), jax.random.key(0))
        batch = {**jax.eval_shape(plan.train_batch, *shapes), "step": jax.ShapeDtypeStruct((), jnp.int32)}
        new_heads = methods.head_initialiser(heads, plan.network.output_shapes, batch)

    def initialise(seed: int) -> train_loop.TrainState:
        params, model_state = plan.network.init(seed)
        if new_heads is not None:
            head_params, head_state = new_heads(seed)
            params = {"student": params, "heads": head_params}
            model_state = {"student": model_state, "heads": head_state}
        return plan.method.init(seed, train_loop.init_state(params, model_state, plan.tx, seed=seed))

    return initialise


def weights_of(plan: Plan, state: train_loop.TrainState) -> Weights:
    """The weights of the student to evaluate and keep: averaged ones where the recipe says so."""
    if plan.recipe.ema:
        state = state._replace(params=optax.tree.get(state.opt_state, "ema"))
    return train_loop.weights_of(state) if plan.bound.heads is None else train_loop.student_of(state)


def feed(plan: Plan, seed: int) -> data.Feed:
    """The order of the training examples."""
    return data.resident_feed(
        plan.resident,
        plan.dataset.splits["train"],
        seed=seed,
        batch_size=plan.recipe.batch_size,
        steps_per_dispatch=plan.machine.steps_per_dispatch,
        rows_of=parallel.process_rows,
    )


def evaluator(plan: Plan, split: str, **options: Any) -> Callable[..., dict[str, Any]]:
    """Builds ``(params, model_state) -> sums`` over one split."""
    ids = plan.dataset.splits[split]
    size = evaluation_batch_size(len(ids), len(plan.devices) * jax.process_count())
    batches = {"batch_size": size, "devices": plan.devices}
    return evaluate.make_evaluator(
        plan.network.apply, plan.evaluation_batch, plan.resident, ids, **batches, **options
    )


def evaluation_batch_size(num_examples: int, devices: int) -> int:
    """Size of few, equal batches of at most about a thousand: little padding, bounded memory."""
    return math.ceil(num_examples / math.ceil(num_examples / 1000) / devices) * devices
