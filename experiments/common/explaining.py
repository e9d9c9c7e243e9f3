"""Where a teacher looks, as columns: integrated gradients of every training image, and attention in its stages."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.tasks import Task
from experiments.common.teachers import Teacher, filled
from kdjax import attributions, checkpoints, data, losses, models, teacher, train
from kdjax.types import Batch

VARIANTS = ("aligned", "misaligned", "noise")
ROWS = 512  # of a file, and as many examples are explained together: a kill loses no more


class Explained(NamedTuple):
    """Maps of the training images among all images of a task; rows of the others are zero."""

    columns: dict[str, np.ndarray]  # map, uint8[examples, 1, height, width, 1]; attention_<stage>, float16
    nodes: np.ndarray  # gradients that each training image took
    residual: np.ndarray  # relative, of each


def explained_by(
    task: Task,
    source: Teacher,
    *,
    directory: Path,
    stages: Sequence[str] = (),
    bound: float = 0.05,
    first: int = 16,
    most: int = 256,
    label: str = "maps",
) -> Explained:
    """Fills and verifies the columns of where a teacher looks: to each training image's true label.

    Args:
      task: the data set, of whose training images maps are made.
      source: the trained teacher.
      directory: where the columns are stored.
      stages: of the teacher, whose attention maps are stored too.
      bound: as ``first`` and ``most`` of :func:`kdjax.attributions.adaptive_integrated_gradients`.
      first: as there.
      most: as there.
      label: of the progress bar.
    """
    apply_fn, ids = models.apply_fn(source.module), task.split["train"]
    images, labels = task.source.images[ids], task.source.labels[ids].astype(np.int32)

    def answers(weights: train.Weights, batch):
        inputs = data.normalise(batch["image"], mean=source.mean, std=source.std)
        score = attributions.class_score(lambda x: apply_fn(*weights, x, train=False)[0].logits)
        found = attributions.adaptive_integrated_gradients(
            score, inputs, targets=batch["label"], tolerance=bound, min_nodes=first, max_nodes=most
        )
        rows = attributions.quantised(attributions.importance(found.values))
        rows |= {"nodes": found.nodes, "residual": found.relative_residual}
        if stages:
            features = apply_fn(*weights, inputs, train=False)[0].features
            for stage in stages:
                maps = losses.attention_map(features[stage])
                rows[f"attention_{stage}"] = maps.reshape(*features[stage].shape[:3], 1)
        return rows

    def with_labels(images, index, view):
        del view
        return {"image": images, "label": jnp.asarray(labels)[index]}

    settings = {
        "normalisation": [list(source.mean), list(source.std)],
        "integrated_gradients": {"bound": bound, "first": first, "most": most},
        "labels": checkpoints.digest_tree(labels),
        "stages": list(stages),
    }
    stored = filled(
        directory,
        answers,
        source.weights,
        images,
        label=label,
        settings=settings,
        view_fn=with_labels,
        dtype="float16",
        batch_size=ROWS,
        chunk_size=ROWS,
        devices=task.devices,
    )
    maps = {name: rows for name, rows in stored.arrays.items() if rows.ndim > 2}
    # Not the nodes: an example at the very bound may take twice as many where numbers are rounded otherwise.
    teacher.verify(
        stored._replace(arrays=maps), answers, source.weights, images, view_fn=with_labels, num_samples=32
    )
    columns = {}
    for name, rows in maps.items():
        columns[name] = np.zeros((len(task.source.images), *rows.shape[1:]), rows.dtype)
        columns[name][ids] = rows
    nodes, residual = (stored.arrays[name][:, 0] for name in ("nodes", "residual"))
    return Explained(columns, nodes, residual.astype(np.float32))


def overlaid(**options: Any) -> Callable[[Batch, jax.Array], jax.Array]:
    """What blends some of a batch's images with their teacher's maps: ``blend`` of :class:`Taught`.

    ``options`` are those of :func:`kdjax.attributions.random_overlay`; by default as published.
    """
    return lambda batch, keys: attributions.random_overlay(
        batch["image"], batch["teacher_map"], keys, **options
    )


def pictures(task: Task, explained: Explained, *, count: int = 4) -> list[dict[str, Any]]:
    """The first training images and their maps, the field ``overlays`` of a result."""
    source, maps = task.source, explained.columns["map"]
    return [
        {
            "title": f"{source.class_names[source.labels[i]]}: what the teacher's score of it rests on",
            "image": source.images[i].tolist(),
            "map": (maps[i, 0, :, :, 0] / 255).round(3).tolist(),
        }
        for i in task.split["train"][:count]
    ]


def disturbed(column: np.ndarray, ids: np.ndarray, *, variant: str, seed: int) -> np.ndarray:
    """A column as a study of where its value comes from needs it, in the rows ``ids``.

    ``aligned`` is the column itself. ``misaligned`` gives each image the row of another one, drawn at random: what is
    read back by index after it was written in the order of a shuffled loader. ``noise`` keeps each row's values and
    puts them in random places: the statistics of a row without what it says.
    """
    if variant not in VARIANTS:
        raise ValueError(f"a column may be {', '.join(VARIANTS)}, got {variant!r}.")
    if variant == "aligned":
        return column
    random, rows = np.random.default_rng(seed), column[ids]
    if variant == "misaligned":
        rows = rows[random.permutation(len(rows))]
    else:
        rows = random.permuted(rows.reshape(*rows.shape[:2], -1), axis=-1).reshape(rows.shape)
    column = column.copy()
    column[ids] = rows
    return column
