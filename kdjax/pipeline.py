"""Batches, made in the compiled step: gather, augment, ask the teacher, normalise; once each, in this order."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kdjax import data, teacher
from kdjax.methods import Method
from kdjax.recipe import Recipe
from kdjax.types import Batch

Move = Callable[[jax.Array, jax.Array], jax.Array]  # (images, keys) -> images, cropped and mirrored
MakeBatch = Callable[..., Batch]


def resident(dataset: data.Dataset, signal: teacher.TeacherSignal | None) -> dict[str, Any]:
    """The arrays that batches are made of, to be put on every device.

    ``position`` numbers the training examples, for methods that remember each of them; -1 for others.
    """
    train = dataset.splits["train"]
    position = (
        jnp.full(len(dataset.images), -1, jnp.int32).at[train].set(jnp.arange(len(train), dtype=jnp.int32))
    )
    arrays = {"image": dataset.images, "label": dataset.labels, "position": position}
    answers, weights = (None, None) if signal is None else (signal.answers, signal.weights)
    return {"data": arrays, "answers": answers, "teacher": weights}


def make_batches(
    dataset: data.Dataset, recipe: Recipe, method: Method, signal: teacher.TeacherSignal | None
) -> tuple[MakeBatch, MakeBatch]:
    """Builds ``(resident, index, key) -> batch`` for training and ``(resident, index) -> batch`` for evaluation.

    Args:
      dataset: after :func:`kdjax.data.split`.
      recipe: for the augmentation.
      method: for what it does to crops and images.
      signal: of the teacher, if there is one.
    """
    own = dataset.normalisation._asdict()
    moves = {"padding": recipe.padding, "flip": recipe.flip}
    views = 1 if signal is None else signal.views

    def move(images, keys):
        return data.crop_and_flip(images, keys, **moves)

    def answered(resident, batch, view):
        return batch if signal is None else teacher.attach(signal, resident["answers"], batch, view)

    def finished(resident, batch):
        if signal is not None:
            batch = teacher.attach_online(signal, resident["teacher"], batch)
        return {**batch, "image": data.normalise(batch["image"], **own)}

    def cropped(batch, keys):
        if method.crop is not None:
            keys = method.crop(batch, keys, move)
        side = batch["image"].shape[1]
        moved = {"image": move(batch["image"], keys)}
        for name in () if signal is None else signal.maps:
            moved[f"teacher_{name}"] = move_map(batch[f"teacher_{name}"], keys, move, side=side)
        return {**batch, **moved}, keys

    def train_batch(resident, index, key):
        batch = data.gather(resident["data"], index)
        example_key, mixup_key = jax.random.split(key)
        keys = data.example_keys(example_key, index)
        view = jnp.zeros_like(index)
        if views > 1:
            view = jax.vmap(lambda k: jax.random.randint(k, (), 0, views))(keys)
            batch["image"] = data.stored_view(batch["image"], index, view, seed=teacher.VIEW_SEED, **moves)
        batch = answered(resident, batch, view)
        if views == 1:
            batch, keys = cropped(batch, keys)
        if method.blend is not None:
            batch["image"] = method.blend(batch, keys)
        if recipe.mixup:
            images = batch["image"].astype(jnp.float32)
            batch["image"], batch["partner"], batch["share"] = data.mixup(
                images, mixup_key, alpha=recipe.mixup
            )
        return finished(resident, batch)

    def evaluation_batch(resident, index):
        return finished(resident, answered(resident, data.gather(resident["data"], index), 0))

    return train_batch, evaluation_batch


def move_map(maps: jax.Array, keys: jax.Array, move: Move, *, side: int) -> jax.Array:
    """Crops and mirrors maps with their images.

    Args:
      maps: ``[batch, height, width, channels]``, whose height divides that of the images.
      keys: of each image's crop.
      move: of the images.
      side: height of the images. Smaller maps are enlarged, moved, and averaged back.
    """
    times = side // maps.shape[1]
    if times == 1:
        return move(maps, keys)
    large = jnp.repeat(jnp.repeat(maps.astype(jnp.float32), times, axis=1), times, axis=2)
    cells = move(large, keys).reshape(len(maps), maps.shape[1], times, maps.shape[2], times, -1)
    return jnp.mean(cells, axis=(2, 4))
