"""Many trainings of one network in one compiled program."""

import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdjax import data, evaluate, parallel, vmapped
from kdjax import train as train_loop
from kdjax.callbacks import bar
from kdjax.methods import Method
from kdjax.models import Network
from kdjax.recipe import Machine, Recipe
from kdjax.run import plan as plans
from kdjax.run.finished import HERE, Trained, metrics_of, save
from kdjax.teacher import TeacherSignal, TrainedNetwork


class Many(NamedTuple):
    """Options of :func:`train_many`.

    Attributes:
      settings: name → one number per student, which an objective reads as ``batch["settings"][name]``.
      arm: name of all of them together.
      identity: whatever else decides their numbers, as JSON.
      mapping: "vmap" or "map"; see :func:`kdjax.vmapped.make_run`.
      watch_test: measure the test split at every validation too, for the records of the history (``test_accuracy``,
        ``test_loss``); it chooses nothing.
      machine: devices, steps per dispatch, and time between checkpoints.
    """

    settings: Mapping[str, Sequence[float]] = {}
    arm: str = "student"
    identity: Mapping[str, Any] = {}
    mapping: str = "vmap"
    watch_test: bool = False
    machine: Machine = HERE


def train_many(
    network: Network,
    method: Method,
    dataset: data.Dataset,
    recipe: Recipe,
    *,
    teacher: TrainedNetwork | TeacherSignal | None = None,
    seeds: Sequence[int],
    directory: str | os.PathLike[str] | None = None,
    many: Many | None = None,
) -> list[Trained]:
    """Trains one student per seed, all in one compiled program, and measures each on the test split.

    Args:
      network: what to train.
      method: what each minimises. An objective of your own reads ``batch["settings"][name]``.
      dataset: after :func:`kdjax.data.split`.
      recipe: of every student.
      teacher: as in :func:`kdjax.run.train`.
      seeds: of initialisation and order; a seed may occur several times, with different settings.
      directory: ends with ``checkpoints/`` of all, and a numbered directory for each student that has not diverged.
      many: settings that differ between students, their names, and how the program runs.

    Returns:
      One outcome per student; one that diverged has a loss that is not finite (:func:`kdjax.vmapped.diverged_at`).
    """
    start, many = time.monotonic(), many or Many()
    home = None if directory is None else Path(directory)
    signal = plans.signal_of(teacher, network, method, dataset, recipe, directory)
    plan = plans.make_plan(network, method, dataset, recipe, signal, many.machine)
    decides = dict(many.identity) | ({"watch_test": True} if many.watch_test else {})
    identity = {"arm": many.arm, **plan.identity, "settings": decides}
    own = {name: np.asarray(values, np.float32) for name, values in many.settings.items()}
    sums_on = {
        name: plans.evaluator(plan, name, transform=vmapped.over_weights) for name in ("validation", "test")
    }
    watched = {"": sums_on["validation"]} | ({"test_": sums_on["test"]} if many.watch_test else {})
    fitted = _fit(_with_settings(plan, own), many, seeds, home, identity, watched)
    last, best = (vmapped.stack([getattr(one, which) for one in fitted]) for which in ("last", "best"))
    sums, of_best = (vmapped.unstack(sums_on["test"](*weights)) for weights in (last, best))
    found = []
    for k, (seed, one) in enumerate(zip(seeds, fitted, strict=True)):
        metrics = metrics_of(sums[k], of_best[k])
        if home is not None and vmapped.diverged_at(one) is None:
            which = {"seed": seed, "student": {name: values[k].item() for name, values in own.items()}}
            summary = {"split": "test", "metrics": metrics}
            options = {"step": plan.steps, "summary": summary, "identity": identity | which}
            save(home / str(k), network, dataset, one.last, **options)
        found.append(Trained(many.arm, seed, network, dataset.normalisation, one, metrics, sums[k]))
    seconds = (time.monotonic() - start) / len(seeds)
    return [one._replace(seconds=seconds) for one in found]


def _with_settings(plan: plans.Plan, settings: Mapping[str, np.ndarray]) -> plans.Plan:
    """The plan with each student's settings in its batches."""

    def train_batch(resident, index, key):
        return {**plan.train_batch(resident, index, key), "settings": resident["settings"]}

    resident = plan.resident | {"settings": parallel.replicate(dict(settings), plan.devices)}
    return plan._replace(resident=resident, train_batch=train_batch)


def _fit(
    plan: plans.Plan,
    many: Many,
    seeds: Sequence[int],
    home: Path | None,
    identity: Mapping[str, Any],
    watched: Mapping[str, Callable[..., Any]],
) -> list[train_loop.Fitted]:
    """Trains all students, or reads them back; ``watched`` has the sums of a split by the prefix of its scores."""
    initialise = plans.make_initialiser(plan)
    states = {seed: initialise(seed) for seed in set(seeds)}
    feeds = {seed: plans.feed(plan, seed) for seed in set(seeds)}
    settings = {name: np.asarray(values).tolist() for name, values in plan.resident["settings"].items()}

    def validate(params, model_state):
        scores = {}
        for prefix, sums_on in watched.items():
            found = [evaluate.summarise(sums) for sums in vmapped.unstack(sums_on(params, model_state))]
            scores |= {prefix + name: [one[name] for one in found] for name in ("accuracy", "loss")}
        return scores

    with bar(many.arm, total=plan.steps, unit="step") as meter:

        def progress(done: int, record: Mapping[str, Any]) -> None:
            meter.update(done)
            means = {k: np.nanmean(v) for k, v in record.items() if k in ("loss", "validation_accuracy")}
            meter.set_postfix({f"mean {k}": f"{v:.4g}" for k, v in means.items()})

        return vmapped.fit(
            plans.compiled(plan, vmapped.make_run(plans.make_run(plan), mapping=many.mapping)),
            parallel.replicate(vmapped.stack([states[seed] for seed in seeds]), plan.devices),
            vmapped.feed([feeds[seed] for seed in seeds]),
            epochs=plan.recipe.epochs,
            evaluate=validate,
            evaluate_every=plan.recipe.evaluate_every,
            weights_of=functools.partial(plans.weights_of, plan),
            directory=None if home is None else home / "checkpoints",
            identity={**identity, "seeds": list(seeds), "students": settings},
            save_every_s=plan.machine.save_every_s,
            progress=progress,
        )
