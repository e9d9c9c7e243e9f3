"""Teachers: trained or taken up again, and brought to the student by columns or in the step."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.launching import bar
from experiments.common.tasks import Task
from experiments.common.training import VIEW_SEED, Recipe, Taught, Trained, make_batches, make_evaluator
from kdjax import checkpoints, data, evaluate, files, models, parallel, teacher, train


class Teacher(NamedTuple):
    """A trained network with the normalisation it was trained under."""

    name: str  # in models.MODELS
    module: Any
    weights: train.Weights
    mean: tuple[float, ...]
    std: tuple[float, ...]
    metrics: dict[str, float]
    sums: dict[str, np.ndarray]  # on the test split, from which the metrics follow
    history: list[dict[str, float]]


def train_teacher(
    task: Task, name: str, module: Any, trainer: Callable[..., Trained], seed: int, directory: Path
) -> Teacher:
    """Trains a teacher and leaves beside its weights what :func:`load_teacher` needs to take it up again.

    Args:
      task: what to learn.
      name: of the network in ``models.MODELS``.
      module: the network.
      trainer: built by :func:`make_trainer` for it.
      seed: of initialisation and order.
      directory: of this teacher.
    """
    trained = trainer(seed, directory, f"teacher, seed {seed}")
    description = {
        "model": name,
        "num_classes": task.source.num_classes,
        "class_names": list(task.source.class_names),
        "image_shape": list(task.source.images.shape[1:]),
        "mean": list(task.mean),
        "std": list(task.std),
    }
    if jax.process_index() == 0:
        files.write_json(directory / "network.json", description)
    return Teacher(
        name, module, trained.weights, task.mean, task.std, trained.metrics, trained.sums, trained.history
    )


def load_teacher(task: Task, directory: str, *, split: str = "test", **fields) -> Teacher:
    """Takes up a teacher that an earlier run trained, and measures it on a split of this task.

    Raises:
      ValueError: if there is none, or it tells other classes apart or takes other images than this task has.
    """
    path = Path(directory)
    if not (path / "network.json").exists():
        raise ValueError(
            f"--teacher_dir={directory} holds no finished teacher (network.json is missing); name a directory such as "
            "runs/one/teacher/0 of a run whose teacher is trained."
        )
    there = json.loads((path / "network.json").read_text())
    if there["num_classes"] != task.source.num_classes:
        raise ValueError(
            f"the teacher in {directory} tells {there['num_classes']} classes apart, {task.source.name} has "
            f"{task.source.num_classes}; soft targets need the same classes, so train a teacher on this data set."
        )
    shape = tuple(there["image_shape"])
    if shape != task.source.images.shape[1:]:
        raise ValueError(
            f"the teacher in {directory} takes images of shape {shape}, {task.source.name} has "
            f"{task.source.images.shape[1:]}; resize the data, or train a teacher on this data set."
        )
    module = models.build(there["model"], num_classes=there["num_classes"], **fields)
    found = checkpoints.restore(path / "weights", train.Weights(*models.init(module, shape, seed=0)))
    if found is None:
        raise ValueError(f"--teacher_dir={directory} holds no weights; start the run that trained it again.")
    apply_fn, weights = models.apply_fn(module), parallel.replicate(found.tree, task.devices)
    mean, std = tuple(there["mean"]), tuple(there["std"])
    _, evaluation_batch = make_batches(task._replace(mean=mean, std=std), Recipe(1, 1, 0.0), Taught())
    sums = make_evaluator(task, apply_fn, evaluation_batch, {"data": task.arrays}, split)(*weights)
    return Teacher(there["model"], module, weights, mean, std, evaluate.summarise(sums), sums, [])


def taught_by(
    task: Task,
    source: Teacher,
    recipe: Recipe,
    *,
    mode: str,
    views: int,
    directory: Path,
    features: Sequence[str] = (),
    label: str = "columns",
) -> Taught:
    """Makes a teacher's answers reach the student: filled columns, verified, or the teacher itself in the step.

    Args:
      task: the data set, whose every image the teacher is asked about.
      source: the trained teacher.
      recipe: of the student, for the augmentation of stored views.
      mode: ``centre``, ``views`` or ``online``.
      views: stored views per image in the mode ``views``.
      directory: where the columns are stored.
      features: of the teacher that the student learns from beside the logits. Stored maps are float16.
      label: of the progress bar.
    """
    own = {"mean": source.mean, "std": source.std}
    apply_fn = models.apply_fn(source.module)

    def told(outputs):
        return {"logits": outputs.logits} | {name: outputs.features[name] for name in features}

    if mode == "online":

        def answer(weights: train.Weights, inputs):
            # The student's normalisation undone and the teacher's applied, so that both see the same picture.
            pixels = 255 * (inputs * jnp.float32(task.std) + jnp.float32(task.mean))
            outputs, _ = apply_fn(*weights, data.normalise(pixels, **own), train=False)
            return told(outputs)

        return Taught(online=answer, weights=source.weights)

    def answers(weights: train.Weights, images):
        outputs, _ = apply_fn(*weights, data.normalise(images, **own), train=False)
        return told(outputs)

    settings: dict[str, Any] = {"normalisation": [list(source.mean), list(source.std)]}
    if features:
        settings["features"] = list(features)
    view_fn: teacher.ViewFn | None = None
    if mode == "views":
        move = {"padding": recipe.padding, "flip": recipe.flip, "seed": VIEW_SEED}
        settings["stored_view"] = move

        def stored_view(images, index, view):
            return data.stored_view(images, index, view, **move)

        view_fn = stored_view

    images = task.source.images
    columns = filled(
        directory,
        answers,
        source.weights,
        images,
        label=label,
        settings=settings,
        views=views if view_fn else 1,
        view_fn=view_fn,
        dtype="float16" if features else "float32",
        devices=task.devices,
    )
    teacher.verify(columns, answers, source.weights, images, view_fn=view_fn)
    return Taught(columns=columns.arrays, views=views if view_fn else 1)


def filled(
    directory: Path,
    answers: teacher.TeacherFn,
    weights: train.Weights,
    images: np.ndarray,
    *,
    label: str,
    **options: Any,
) -> teacher.Columns:
    """:func:`kdjax.teacher.fill` with a progress bar of that label."""
    with bar(label, total=len(images), unit="image") as meter:

        def progress(done: int, total: int) -> None:
            meter.update(done - meter.n)

        return teacher.fill(directory, answers, weights, images, progress=progress, **options)
