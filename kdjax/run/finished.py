"""Finished trainings, and their networks on disk."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from kdjax import checkpoints, data, evaluate, files, methods, models, parallel
from kdjax import train as train_loop
from kdjax.models import Network
from kdjax.recipe import Machine, Recipe
from kdjax.run import plan as plans
from kdjax.types import Normalisation, Weights

HERE = Machine()


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


def metrics_of(last: Mapping[str, Any], best: Mapping[str, Any]) -> dict[str, float]:
    """Metrics from the totals of the last weights, with accuracy and loss of the best weights as ``best_NAME``."""
    scores = evaluate.summarise(best)
    return evaluate.summarise(last) | {f"best_{name}": scores[name] for name in ("accuracy", "loss")}


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

    ``weights/`` are written unless they are there already, and whole. ``network.json`` says what using them needs:
    architecture, normalisation, class names, metrics and their split, and the digest of the weights.
    """
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
    """What ``network.json`` says of the finished run in a directory, and as ``identity`` what the run was made from.

    Raises:
      ValueError: if there is no finished run, or the file is damaged.
    """
    path = Path(directory) / "network.json"
    try:
        return files.read_sealed(path) | {"identity": files.identity_of(path)}
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
    machine: Machine = HERE,
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
    own = dataset._replace(normalisation=Normalisation(tuple(there["mean"]), tuple(there["std"])))
    return measured(there["arm"], there["seed"], network, found.tree, own, split=split, machine=machine)


def measured(
    arm: str,
    seed: int,
    network: Network,
    weights: Weights,
    dataset: data.Dataset,
    *,
    split: str = "test",
    machine: Machine = HERE,
) -> Trained:
    """A network whose weights are there already, measured on a split, as a run without a history.

    Args:
      arm: its name in a study.
      seed: of its training.
      network: whose weights they are.
      weights: parameters and statistics.
      dataset: after :func:`kdjax.data.split`; with the normalisation that the network was trained under.
      split: to measure it on.
      machine: devices.
    """
    recipe = Recipe(batch_size=len(parallel.local_devices(machine.devices)) * jax.process_count())
    plan = plans.make_plan(network, methods.labels(), dataset, recipe, None, machine)
    weights = parallel.replicate(weights, plan.devices)
    sums = plans.evaluator(plan, split)(*weights)
    fitted = train_loop.Fitted(weights, weights, 0, [])
    scores = evaluate.summarise(sums)
    return Trained(arm, seed, network, dataset.normalisation, fitted, scores, sums)


def _check_fits(directory: Any, there: Mapping[str, Any], dataset: data.Dataset) -> None:
    """Refuses a network that was trained for other classes or images than those of the data set."""
    name, theirs, ours = dataset.name, there["class_names"], list(dataset.class_names)
    if len(theirs) != len(ours):
        raise ValueError(
            f"the network in {directory} has {len(theirs)} classes, {name} has {len(ours)}; soft targets need the same "
            "classes, so train a teacher on this data set."
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
