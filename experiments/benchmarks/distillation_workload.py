"""What frameworks that distil are given alike, and whether they compute alike."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments.benchmarks.distillation_baselines import BATCH_SIZE, CACHED, ONLINE
from kdjax import data, models

PACKAGES = {
    "keras_jax": ["keras"],
    "keras_tensorflow": ["keras", "tensorflow-cpu"],
    "keras_torch": ["keras", "torch"],
    "torch": ["torch"],
    "torch_compile": ["torch"],
}


def write(path: Path, dataset: str, data_dir: str | None, *, steps: int) -> str:
    """Writes images and weights for so many steps; returns the name of the data set."""
    loaded = data.load(dataset, data_dir=data_dir)
    if loaded.images.shape[1:] != (28, 28, 1) or loaded.num_classes != 10:
        raise ValueError(
            f"this benchmark needs 28x28x1 images of 10 classes, {loaded.name} has {loaded.images.shape[1:]} of "
            f"{loaded.num_classes}; use --dataset=mnist or fashion_mnist."
        )
    ids = data.split_ids(loaded)["train"]
    if len(ids) < steps * BATCH_SIZE:
        raise ValueError(f"{steps} steps need {steps * BATCH_SIZE} training images, there are {len(ids)}.")
    ids = np.random.default_rng(0).permutation(ids)[: steps * BATCH_SIZE]
    mean, std = data.channel_statistics(loaded.images[ids])
    arrays = {"images": loaded.images[ids], "labels": loaded.labels[ids], "mean": mean, "std": std}
    for seed, name in enumerate(("teacher", "student")):
        params, _ = models.init(models.build(f"keras_{name}", num_classes=10), (28, 28, 1), seed=seed)
        arrays |= {
            f"{name}/{layer}/{leaf}": x for layer, leaves in params.items() for leaf, x in leaves.items()
        }
    np.savez(path, allow_pickle=False, **{name: np.asarray(x) for name, x in arrays.items()})
    return loaded.name


def check_losses(losses: Mapping[str, Mapping[str, Sequence[float]]]) -> float:
    """Refuses to compare frameworks that do not compute the same; returns the largest relative difference found.

    The first loss knows the forward passes, the next two also the gradients and the optimiser. Cached answers must give
    the losses of the teacher in the step.
    """
    reference, worst = dict(next(iter(losses.values()))), 0.0
    reference[CACHED] = reference[ONLINE]
    for worker, arms in losses.items():
        for arm, values in arms.items():
            differences = [abs(a / b - 1) for a, b in zip(values, reference[arm], strict=True)]
            if differences[0] > 1e-4 or max(differences) > 2e-3:
                raise ValueError(
                    f"{worker} does other work: its {arm} losses are {values}, not {reference[arm]}."
                )
            worst = max(worst, *differences)
    return worst
