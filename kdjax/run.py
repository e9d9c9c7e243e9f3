"""Training a student, from a data set to measured weights on disk.

::

    dataset = data.split(data.from_arrays(images, labels))
    teacher = run.train(large, methods.labels(), dataset, Recipe(epochs=30), directory="runs/teacher")
    student = run.train(small, methods.kd() + methods.crd(), dataset, Recipe(epochs=60), teacher=teacher)
    student.metrics["accuracy"]

With a directory a run can be killed at any moment: the same call continues it, and a finished run is read back.
:func:`make_trainer` compiles once for many seeds; :func:`train_many` trains many seeds or settings in one program.
"""

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kdjax import checkpoints, data, evaluate, files, methods, models, parallel, pipeline, vmapped
from kdjax import recipe as recipes
from kdjax import teacher as teachers
from kdjax import train as train_loop
from kdjax.callbacks import Callback, RunId, bar
from kdjax.methods import Method
from kdjax.models import Network
from kdjax.recipe import Machine, Recipe
from kdjax.teacher import TeacherSignal, TrainedNetwork
from kdjax.types import Normalisation, Outputs, Weights

_HERE = Machine()

Init = Callable[[int, train_loop.TrainState], train_loop.TrainState]
"""``(seed, state) -> state`` that a run starts from."""


class Trained(NamedTuple):
    """A finished run.

    Attributes:
      arm: the name of its arm in a study.
      seed: of initialisation and order.
      network: what was trained.
      normalisation: of its input pixels.
      fitted: last and best weights, history and notes.
      metrics: on the split that was asked for; ``best_NAME`` of the epoch that was best in validation.
      sums: the totals from which the metrics of the last epoch follow.
      seconds: that this process spent on it.
    """

    arm: str
    seed: int
    network: Network
    normalisation: Normalisation
    fitted: train_loop.Fitted
    metrics: dict[str, float]
    sums: dict[str, np.ndarray]
    seconds: float = 0.0

    @property
    def weights(self) -> Weights:
        """Those of the last epoch."""
        return self.fitted.last

    @property
    def history(self) -> list[dict[str, float]]:
        """One record per epoch."""
        return self.fitted.history

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of its numbers should know."""
        return self.fitted.notes


def train(
    network: Network,
    method: Method,
    dataset: data.Dataset,
    recipe: Recipe,
    *,
    teacher: TrainedNetwork | TeacherSignal | None = None,
    seed: int = 0,
    directory: str | os.PathLike[str] | None = None,
    callbacks: Sequence[Callback] = (),
) -> Trained:
    """Trains a network and measures it on the test split.

    Args:
      network: of :func:`kdjax.models.from_linen`, ``from_nnx`` or ``from_equinox``.
      method: what it minimises; see :mod:`kdjax.methods`.
      dataset: after :func:`kdjax.data.split`.
      recipe: how it is trained.
      teacher: a trained network. It is asked in the step where the recipe augments images or there is no directory;
        otherwise once, and its answers are cached in the directory. Or a signal, of :func:`kdjax.teacher.answers`.
      seed: of initialisation and order.
      directory: of checkpoints and the finished network; None keeps nothing on disk.
      callbacks: what happens meanwhile; see :mod:`kdjax.callbacks`.

    Raises:
      ValueError: if these do not fit together, or the directory holds another run.
      kdjax.train.NonFiniteLoss: if a loss or weight becomes NaN or infinite.
    """
    signal = _signal(teacher, network, method, dataset, recipe, directory)
    return make_trainer(network, method, dataset, recipe, teacher=signal)(
        seed, directory, callbacks=callbacks
    )


def make_trainer(
    network: Network,
    method: Method,
    dataset: data.Dataset,
    recipe: Recipe,
    *,
    teacher: TeacherSignal | None = None,
    machine: Machine = _HERE,
    split: str = "test",
) -> Callable[..., Trained]:
    """Builds a function that trains one seed; its programs are compiled once for all seeds.

    Args:
      network: what to train.
      method: what it minimises.
      dataset: after :func:`kdjax.data.split`.
      recipe: how it is trained.
      teacher: of :func:`kdjax.teacher.answers`.
      machine: devices, steps per dispatch, and time between checkpoints.
      split: that the final metrics are measured on; with "validation" the test split is never read.

    Returns:
      ``(seed, directory=None, *, arm="student", callbacks=(), settings={}, init=None) -> Trained``. The directory ends
      with ``checkpoints/``, ``summary_SPLIT.json``, ``weights/`` and ``network.json``. A finished run is read back
      where these are whole and were written for the same arm, seed, network, method, recipe, data, teacher and ``settings``,
      which is whatever else decides its numbers, such as what ``init``, ``(seed, state) -> state``, starts it from.
    """
    plan = _plan(network, method, dataset, recipe, teacher, machine)
    step = train_loop.make_train_step(
        method.student(network.apply),
        plan.bound.objective,
        plan.tx,
        heads=None if plan.bound.heads is None else models.apply_fn(plan.bound.heads),
        record=method.record,
        axis_name=parallel.AXIS,
    )
    compiled = parallel.data_parallel(
        train_loop.make_run(step, plan.train_batch, second=method.second_batch),
        replicated=2,
        devices=plan.devices,
        donate_first=True,
    )
    new_heads = None if plan.bound.heads is None else _head_initialiser(plan)
    sums_on = {name: _evaluator(plan, name) for name in {"validation", split}}

    def weights_of(state: train_loop.TrainState) -> Weights:
        if recipe.ema:
            state = state._replace(params=optax.tree.get(state.opt_state, "ema"))
        return train_loop.weights_of(state) if new_heads is None else train_loop.student_of(state)

    def validate(params, model_state):
        scores = evaluate.summarise(sums_on["validation"](params, model_state))
        return {name: scores[name] for name in ("accuracy", "loss")}

    def new_state(seed: int, init: Init | None) -> train_loop.TrainState:
        params, model_state = network.init(seed)
        if new_heads is not None:
            head_params, head_state = new_heads(seed)
            params = {"student": params, "heads": head_params}
            model_state = {"student": model_state, "heads": head_state}
        state = method.init(seed, train_loop.init_state(params, model_state, plan.tx, seed=seed))
        return state if init is None else init(seed, state)

    def trainer(
        seed: int,
        directory: str | os.PathLike[str] | None = None,
        *,
        arm: str = "student",
        callbacks: Sequence[Callback] = (),
        settings: Mapping[str, Any] | None = None,
        init: Init | None = None,
    ) -> Trained:
        start = time.monotonic()
        home = None if directory is None else Path(directory)
        identity = {"arm": arm, "seed": seed, **plan.identity, "settings": dict(settings or {})}
        feed = _feed(plan, seed)
        with _watched(RunId(arm, seed), callbacks, plan.steps, feed.steps_per_epoch) as (
            between,
            progress,
            finish,
        ):
            fitted = train_loop.fit(
                compiled,
                parallel.replicate(new_state(seed, init), plan.devices),
                feed,
                epochs=recipe.epochs,
                evaluate=validate,
                evaluate_every=recipe.evaluate_every,
                weights_of=weights_of,
                directory=None if home is None else home / "checkpoints",
                identity=identity,
                save_every_s=machine.save_every_s,
                between=between,
                progress=progress,
            )
            finish(fitted.history[-1])

        def measure() -> dict[str, Any]:
            sums, best = (sums_on[split](*weights) for weights in (fitted.last, fitted.best))
            of_best = evaluate.summarise(best)
            return {
                "split": split,
                "metrics": evaluate.summarise(sums)
                | {f"best_{name}": of_best[name] for name in ("accuracy", "loss")},
                "sums": {name: np.asarray(value).tolist() for name, value in sums.items()},
                "best_epoch": fitted.best_epoch,
                "history": fitted.history,
            }

        if home is None:
            found = measure()
        else:
            found = files.cached(
                home / f"summary_{split}.json",  # a sweep measures one teacher on both splits
                measure,
                identity={**identity, "split": split, "weights": checkpoints.digest_tree(fitted.last)},
                writes=jax.process_index() == 0,
            )
            save(home, network, dataset, fitted.last, step=plan.steps, summary=found, identity=identity)
        sums = {name: np.asarray(value) for name, value in found["sums"].items()}
        return Trained(
            *(arm, seed, network, plan.normalisation, fitted, found["metrics"], sums),
            seconds=time.monotonic() - start,
        )

    return trainer


def train_many(
    network: Network,
    method: Method,
    dataset: data.Dataset,
    recipe: Recipe,
    *,
    teacher: TrainedNetwork | TeacherSignal | None = None,
    seeds: Sequence[int],
    directory: str | os.PathLike[str] | None = None,
    many: "Many | None" = None,
) -> list[Trained]:
    """Trains one student per seed, all in one compiled program, and measures each on the test split.

    Args:
      network: what to train.
      method: what each minimises; without heads. An objective of your own reads ``batch["settings"][name]``.
      dataset: after :func:`kdjax.data.split`.
      recipe: of every student.
      teacher: as in :func:`train`.
      seeds: of initialisation and order; a seed may stand here several times with different settings.
      directory: ends with ``checkpoints/`` of all, and a numbered directory for each student that has not diverged.
      many: settings that differ between students, their names, and how the program runs.

    Returns:
      One outcome per student; one that diverged has a loss that is not finite (:func:`kdjax.vmapped.diverged_at`).
    """
    start, many = time.monotonic(), many or Many()
    home = None if directory is None else Path(directory)
    signal = _signal(teacher, network, method, dataset, recipe, directory)
    plan = _plan(network, method, dataset, recipe, signal, many.machine)
    if plan.bound.heads is not None:
        raise ValueError("train_many cannot train methods with heads; train one seed after the other.")
    own = {name: np.asarray(values, np.float32) for name, values in many.settings.items()}
    plan = plan._replace(resident=plan.resident | {"settings": parallel.replicate(own, plan.devices)})

    def batch_with_settings(resident, index, key):
        return {**plan.train_batch(resident, index, key), "settings": resident["settings"]}

    step = train_loop.make_train_step(network.apply, plan.bound.objective, plan.tx, axis_name=parallel.AXIS)
    compiled = parallel.data_parallel(
        vmapped.make_run(train_loop.make_run(step, batch_with_settings), form=many.form),
        replicated=2,
        devices=plan.devices,
        donate_first=True,
    )
    sums_on = {
        name: _evaluator(plan, name, transform=vmapped.over_weights) for name in ("validation", "test")
    }

    def weights_of(states: train_loop.TrainState) -> Weights:
        averaged = optax.tree.get(states.opt_state, "ema") if recipe.ema else states.params
        return Weights(averaged, states.model_state)

    def validate(params, model_state):
        found = [evaluate.summarise(s) for s in vmapped.unstack(sums_on["validation"](params, model_state))]
        return {name: [one[name] for one in found] for name in ("accuracy", "loss")}

    states = {s: train_loop.init_state(*network.init(s), plan.tx, seed=s) for s in set(seeds)}
    feeds = {s: _feed(plan, s) for s in set(seeds)}
    whole = {"arm": many.arm, **plan.identity, "settings": dict(many.identity)}
    students = {"seeds": list(seeds), "students": {name: values.tolist() for name, values in own.items()}}
    with bar(many.arm, total=plan.steps, unit="step") as meter:

        def progress(done: int, record: Mapping[str, Any]) -> None:
            meter.update(done)
            shown = {k: np.nanmean(v) for k, v in record.items() if k in ("loss", "validation_accuracy")}
            meter.set_postfix({f"mean {k}": f"{v:.4g}" for k, v in shown.items()})

        fitted = vmapped.fit(
            compiled,
            parallel.replicate(vmapped.stack([states[seed] for seed in seeds]), plan.devices),
            vmapped.feed([feeds[seed] for seed in seeds]),
            epochs=recipe.epochs,
            evaluate=validate,
            evaluate_every=recipe.evaluate_every,
            weights_of=weights_of,
            directory=None if home is None else home / "checkpoints",
            identity=whole | students,
            save_every_s=many.machine.save_every_s,
            progress=progress,
        )
    last, best = (vmapped.stack([getattr(one, which) for one in fitted]) for which in ("last", "best"))
    sums, of_best = (vmapped.unstack(sums_on["test"](*weights)) for weights in (last, best))
    found = []
    for k, (one, totals, best_totals) in enumerate(zip(fitted, sums, of_best, strict=True)):
        metrics, scores = evaluate.summarise(totals), evaluate.summarise(best_totals)
        metrics |= {f"best_{name}": scores[name] for name in ("accuracy", "loss")}
        if home is not None and vmapped.diverged_at(one) is None:
            which = {"seed": seeds[k], "student": {name: values[k].item() for name, values in own.items()}}
            summary = {"split": "test", "metrics": metrics}
            options = {"step": plan.steps, "summary": summary, "identity": whole | which}
            save(home / str(k), network, dataset, one.last, **options)
        found.append(Trained(many.arm, seeds[k], network, plan.normalisation, one, metrics, totals))
    seconds = (time.monotonic() - start) / len(seeds)
    return [one._replace(seconds=seconds) for one in found]


class Many(NamedTuple):
    """What :func:`train_many` may be told beside the seeds.

    Attributes:
      settings: name → one number per student, read by an objective as ``batch["settings"][name]``.
      arm: name of all of them together.
      identity: whatever else decides their numbers, as JSON.
      form: "vmap" or "map"; see :func:`kdjax.vmapped.make_run`.
      machine: devices, steps per dispatch, and time between checkpoints.
    """

    settings: Mapping[str, Sequence[float]] = {}
    arm: str = "student"
    identity: Mapping[str, Any] = {}
    form: str = "vmap"
    machine: Machine = _HERE


# Finished networks on disk


def save(
    directory: Path,
    network: Network,
    dataset: data.Dataset,
    weights: Weights,
    *,
    step: int,
    summary: Mapping[str, Any],
    identity: Mapping[str, Any],
) -> None:
    """Leaves a finished network in a directory so that :func:`load` can take it up, as a teacher for instance.

    ``weights/`` are written where they are not there whole; ``network.json`` says what using them needs: architecture,
    normalisation, class names, how good it was on which split, and the digest of the weights.
    """
    assert dataset.normalisation is not None
    checkpoints.save(directory / "weights", step, weights, meta={}, identity=identity)
    description = {
        "arm": identity["arm"],
        "seed": identity["seed"],
        "network": dict(network.description),
        "class_names": list(dataset.class_names),
        "image_shape": list(dataset.image_shape),
        "mean": list(dataset.normalisation.mean),
        "std": list(dataset.normalisation.std),
        "split": summary["split"],
        "metrics": summary["metrics"],
        "weights": checkpoints.digest_tree(weights),
    }
    if jax.process_index() == 0:
        files.write_sealed(directory / "network.json", description, identity=identity)


def describe(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``network.json`` says of the finished run in a directory.

    Raises:
      ValueError: if there is no finished run, or the file is damaged.
    """
    try:
        return files.read_sealed(Path(directory) / "network.json")
    except FileNotFoundError:
        raise ValueError(
            f"{directory} holds no finished network (network.json is missing); name the directory of a finished run, "
            "such as runs/one/teacher/0 or runs/one/kd/0."
        ) from None
    except files.Damaged as error:
        raise ValueError(f"{error} Start the run that trained it again, which repairs it.") from error


def load(
    directory: str | os.PathLike[str],
    dataset: data.Dataset,
    *,
    network: Network | None = None,
    split: str = "test",
    machine: Machine = _HERE,
    **fields: Any,
) -> Trained:
    """Takes up a network that an earlier run trained, and measures it on a split.

    Args:
      directory: of a finished run.
      dataset: whose classes and image shape it must have.
      network: the network, if it is not one of kdjax's own.
      split: to measure it on.
      machine: devices.
      **fields: other values of the fields of one of kdjax's own networks, such as ``dtype``.

    Raises:
      ValueError: if there is none, or it is of other classes, images or another network.
    """
    there = describe(directory)
    _check_fits(directory, there, dataset)
    if network is None:
        module: Any = models.from_description(there["network"]).clone(**fields)
        network = models.from_linen(module, dataset.image_shape)
    elif different := files.differences(there["network"], files.json_ready(dict(network.description))):
        raise ValueError(f"{directory} holds the weights of another network ({different}).")
    found = checkpoints.restore(Path(directory) / "weights", Weights(*network.init(0)))
    if found is None or checkpoints.digest_tree(found.tree) != there["weights"]:
        raise ValueError(
            f"{directory}/weights does not hold the weights that network.json beside it is about; start the run that "
            "trained it again, which repairs them."
        )
    normalisation = Normalisation(tuple(there["mean"]), tuple(there["std"]))
    seen = dataset._replace(normalisation=normalisation)
    plan = _plan(
        network, methods.labels(), seen, Recipe(epochs=1, batch_size=_devices(machine)[1]), None, machine
    )
    weights = parallel.replicate(found.tree, plan.devices)
    sums = _evaluator(plan, split)(*weights)
    fitted = train_loop.Fitted(weights, weights, 0, [])
    return Trained(
        there["arm"], there["seed"], network, normalisation, fitted, evaluate.summarise(sums), sums
    )


def _check_fits(directory: Any, there: Mapping[str, Any], dataset: data.Dataset) -> None:
    """Refuses a network that was trained for other classes or images than those of the data set."""
    name, theirs, ours = dataset.name, there["class_names"], list(dataset.class_names)
    if len(theirs) != len(ours):
        raise ValueError(
            f"the network in {directory} tells {len(theirs)} classes apart, {name} has {len(ours)}; soft targets need "
            "the same classes, so train a teacher on this data set."
        )
    numbers = list(map(str, range(len(ours))))  # names of classes without names
    if theirs != ours and numbers not in (theirs, ours):
        first = next(i for i in range(len(ours)) if theirs[i] != ours[i])
        raise ValueError(
            f"class {first} of the network in {directory} is {theirs[first]!r}, and {ours[first]!r} in {name}; soft "
            "targets need the same classes in the same order, so train a teacher on this data set."
        )
    shape = tuple(there["image_shape"])
    if shape != dataset.image_shape:
        raise ValueError(
            f"the network in {directory} takes images of shape {shape}, {name} has {dataset.image_shape}; resize the "
            "data, or train a teacher on this data set."
        )


# What one training and many have in common


class _Plan(NamedTuple):
    """Everything that does not depend on the seed."""

    network: Network
    bound: methods.Bound
    dataset: data.Dataset
    recipe: Recipe
    machine: Machine
    devices: list[jax.Device]
    resident: dict[str, Any]  # on every device
    train_batch: Callable[..., Any]
    evaluation_batch: Callable[..., Any]
    tx: optax.GradientTransformation
    steps: int
    identity: dict[str, Any]

    @property
    def normalisation(self) -> Normalisation:
        assert self.dataset.normalisation is not None
        return self.dataset.normalisation


def _plan(
    network: Network,
    method: Method,
    dataset: data.Dataset,
    recipe: Recipe,
    signal: TeacherSignal | None,
    machine: Machine,
) -> _Plan:
    if dataset.splits is None or dataset.normalisation is None:
        raise ValueError("this data set has no splits: call kdjax.data.split(dataset).")
    devices, _ = _devices(machine)
    parallel.check_batch_size(recipe.batch_size, devices)
    train_ids = dataset.splits["train"]
    recipes.check(recipe, len(train_ids))
    steps = recipes.num_steps(recipe, len(train_ids))
    asked = {} if signal is None else {"shapes": signal.shapes, "mode": signal.mode, "maps": signal.maps}
    bound = check(network, method, dataset, recipe, **asked)
    _check_has(bound, signal)
    train_batch, evaluation_batch = pipeline.make_batches(dataset, recipe, method, signal)
    identity = {
        "data": dataset.fingerprint,
        "normalisation": [list(values) for values in dataset.normalisation],
        "network": dict(network.description),
        "recipe": dataclasses.asdict(recipe),
        "method": method.description,
        "steps_per_dispatch": machine.steps_per_dispatch,
        "teacher": {} if signal is None else dict(signal.identity),
    }
    return _Plan(
        *(network, bound, dataset, recipe, machine, devices),
        resident=parallel.replicate(pipeline.resident(dataset, signal), devices),
        train_batch=train_batch,
        evaluation_batch=evaluation_batch,
        tx=method.optimizer(recipes.make_optimizer(recipe, steps=steps)),
        steps=steps,
        identity=identity,
    )


def _devices(machine: Machine) -> tuple[list[jax.Device], int]:
    """This process's devices, and how many all processes have."""
    devices = parallel.local_devices(machine.devices)
    return devices, len(devices) * jax.process_count()


def _signal(
    teacher: TrainedNetwork | TeacherSignal | None,
    network: Network,
    method: Method,
    dataset: data.Dataset,
    recipe: Recipe,
    directory: str | os.PathLike[str] | None,
) -> TeacherSignal | None:
    """The answers of a trained network that a method asks for: in the step, or cached where images stay as they are."""
    if teacher is None or isinstance(teacher, TeacherSignal):
        return teacher
    bound = methods.bind(
        method, network.output_shapes, teacher.network.output_shapes, steps=1, labels=dataset.labels
    )
    cached = directory is not None and not recipe.augments and not recipe.mixup
    return teachers.answers(
        teacher,
        dataset,
        mode="centre" if cached else "online",
        features=bound.teacher_features,
        directory=Path(directory) / "teacher_answers" if cached and directory is not None else None,
    )


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
    assert dataset.splits is not None
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


def _head_initialiser(plan: _Plan) -> Callable[[int], tuple[Any, Any]]:
    assert plan.bound.heads is not None
    index = jax.ShapeDtypeStruct((2,), jnp.int32)
    batch = dict(jax.eval_shape(plan.train_batch, plan.resident, index, jax.random.key(0)))
    batch |= {"step": jax.ShapeDtypeStruct((), jnp.int32)}
    return methods.head_initialiser(plan.bound.heads, plan.network.output_shapes, batch)


def _feed(plan: _Plan, seed: int) -> data.Feed:
    assert plan.dataset.splits is not None
    return data.resident_feed(
        plan.resident,
        plan.dataset.splits["train"],
        seed=seed,
        batch_size=plan.recipe.batch_size,
        steps_per_dispatch=plan.machine.steps_per_dispatch,
        rows_of=parallel.process_rows,
    )


def _evaluator(plan: _Plan, split: str, **options: Any) -> Callable[..., dict[str, Any]]:
    """``(params, model_state) -> sums`` over one split."""
    assert plan.dataset.splits is not None
    ids = plan.dataset.splits[split]
    size = evaluation_batch_size(len(ids), _devices(plan.machine)[1])
    batches = {"batch_size": size, "devices": plan.devices}
    return evaluate.make_evaluator(
        plan.network.apply, plan.evaluation_batch, plan.resident, ids, **batches, **options
    )


def evaluation_batch_size(num_examples: int, devices: int) -> int:
    """Size of few, equal batches of at most about a thousand: little padding, bounded memory."""
    return math.ceil(num_examples / math.ceil(num_examples / 1000) / devices) * devices


@contextlib.contextmanager
def _watched(run: RunId, callbacks: Sequence[Callback], steps: int, steps_per_epoch: int) -> Iterator[Any]:
    """Calls the callbacks of a run; yields the hooks of :func:`kdjax.train.fit`, and one for the end."""
    newest, last = 0.0, {}

    def between(state: train_loop.TrainState, step: int) -> train_loop.TrainState:
        for callback in callbacks:
            state = callback.on_dispatch(run, state, step)
        return state

    def see(record: Mapping[str, Any]) -> None:
        nonlocal newest
        if record and record["epoch"] > newest:
            newest = record["epoch"]
            for callback in callbacks:
                callback.on_epoch(run, {**record, "step": record["epoch"] * steps_per_epoch})

    def progress(done: int, record: Mapping[str, Any]) -> None:
        for callback in callbacks:
            callback.on_progress(run, done, record)
        see(record)

    def finish(record: Mapping[str, Any]) -> None:
        nonlocal last
        see(record)
        last = record

    for callback in callbacks:
        callback.on_start(run, steps)
    try:
        yield between, progress, finish
    finally:
        for callback in callbacks:
            callback.on_end(run, last)
