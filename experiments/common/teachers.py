"""Teachers: trained or taken up again, and brought to the student by columns or in the step."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
    notes: tuple[str, ...] = ()  # of its training


def train_teacher(
    task: Task, name: str, module: Any, trainer: Callable[..., Trained], seed: int, directory: Path
) -> Teacher:
    """Trains a teacher; :func:`load_teacher` can take it up again.

    Args:
      task: what to learn.
      name: of the network in ``models.MODELS``.
      module: the network.
      trainer: built by :func:`make_trainer` for it.
      seed: of initialisation and order.
      directory: of this teacher.
    """
    trained = trainer(seed, directory, f"teacher, seed {seed}")
    return Teacher(
        name,
        module,
        trained.weights,
        task.mean,
        task.std,
        trained.metrics,
        trained.sums,
        trained.history,
        trained.notes,
    )


def network_in(directory: str) -> dict[str, Any]:
    """What ``network.json`` says of the finished run in a directory; see :func:`save_network`.

    Raises:
      ValueError: if there is no finished run, or the file is damaged.
    """
    try:
        return files.read_sealed(Path(directory) / "network.json")
    except FileNotFoundError:
        raise ValueError(
            f"--teacher_dir={directory} holds no finished network (network.json is missing); name the directory of a "
            "finished run, such as runs/one/teacher/0 or runs/one/kd/0."
        ) from None
    except files.Damaged as error:
        raise ValueError(f"{error} Start the run that trained it again, which repairs it.") from error


def load_teacher(task: Task, directory: str, *, split: str = "test", **fields) -> Teacher:
    """Takes up a network that an earlier run trained, and measures it on a split of this task.

    Raises:
      ValueError: if there is none, or it tells other classes apart or takes other images than this task has.
    """
    there = network_in(directory)
    _check_fits(task, directory, there)
    module: Any = models.from_description(there["network"]).clone(**fields)
    shape = task.source.images.shape[1:]
    found = checkpoints.restore(
        Path(directory) / "weights", train.Weights(*models.init(module, shape, seed=0))
    )
    if found is None or checkpoints.digest_tree(found.tree) != there["weights"]:
        raise ValueError(
            f"{directory}/weights does not hold the weights that network.json beside it is about; start the run that "
            "trained it again, which repairs them."
        )
    apply_fn, weights = models.apply_fn(module), parallel.replicate(found.tree, task.devices)
    mean, std = tuple(there["mean"]), tuple(there["std"])
    _, evaluation_batch = make_batches(task._replace(mean=mean, std=std), Recipe(1, 1, 0.0), Taught())
    sums = make_evaluator(task, apply_fn, evaluation_batch, {"data": task.arrays}, split)(*weights)
    return Teacher(models.name_of(module), module, weights, mean, std, evaluate.summarise(sums), sums, [])


def _check_fits(task: Task, directory: str, there: Mapping[str, Any]) -> None:
    """Refuses a network that was trained for other classes or images than those of the task."""
    name, theirs, ours = task.source.name, there["class_names"], list(task.source.class_names)
    if len(theirs) != len(ours):
        raise ValueError(
            f"the teacher in {directory} tells {len(theirs)} classes apart, {name} has {len(ours)}; soft targets need "
            "the same classes, so train a teacher on this data set."
        )
    numbers = list(map(str, range(len(ours))))  # what classes without names are called
    if theirs != ours and numbers not in (theirs, ours):
        first = next(i for i in range(len(ours)) if theirs[i] != ours[i])
        raise ValueError(
            f"class {first} of the teacher in {directory} is {theirs[first]!r}, and {ours[first]!r} in {name}; soft "
            "targets need the same classes in the same order, so train a teacher on this data set."
        )
    shape = tuple(there["image_shape"])
    if shape != task.source.images.shape[1:]:
        raise ValueError(
            f"the teacher in {directory} takes images of shape {shape}, {name} has {task.source.images.shape[1:]}; "
            "resize the data, or train a teacher on this data set."
        )


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
    identity = {"weights": checkpoints.digest_tree(source.weights), "normalisation": own, "mode": mode}
    identity |= {"views": views if mode == "views" else 1, "features": list(features)}
    apply_fn = models.apply_fn(source.module)

    def told(outputs):
        return {"logits": outputs.logits} | {name: outputs.features[name] for name in features}

    if mode == "online":

        def answer(weights: train.Weights, inputs):
            # The student's normalisation undone and the teacher's applied, so that both see the same picture.
            mean, std = (jnp.float32(values)[None, None, None] for values in (task.mean, task.std))
            pixels = 255 * (inputs * std + mean)
            outputs, _ = apply_fn(*weights, data.normalise(pixels, **own), train=False)
            return told(outputs)

        return Taught(online=answer, weights=source.weights, identity=identity)

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
    return Taught(columns=columns.arrays, views=views if view_fn else 1, identity=identity)


def filled(
    directory: Path,
    answers: teacher.TeacherFn,
    weights: train.Weights,
    images: np.ndarray,
    *,
    label: str,
    **options: Any,
) -> teacher.TeacherCache:
    """:func:`kdjax.teacher.precompute` with a progress bar of that label."""
    with bar(label, total=len(images), unit="image") as meter:

        def progress(done: int, total: int) -> None:
            meter.update(done - meter.n)

        return teacher.precompute(directory, answers, weights, images, progress=progress, **options)
