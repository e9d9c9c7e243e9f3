"""What is learnt: a data set with the examples that one run uses, their split, and their arrays on the devices."""

import functools
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import data, models, parallel
from kdjax.types import Outputs


class Task(NamedTuple):
    """A data set as one run sees it: the examples it uses, their split, and their arrays on the devices."""

    source: data.Dataset
    split: dict[str, np.ndarray]
    arrays: dict[str, jax.Array]  # image uint8, label and position int32, on every device
    mean: tuple[float, ...]
    std: tuple[float, ...]
    devices: list[jax.Device]
    perturbed: np.ndarray  # ids of the training examples that were given a wrong label
    source_digest: str
    notes: tuple[str, ...] = ()  # what a reader of the result should know about the data

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What tells a run on these data, split in this way, from one on others."""
        return data.fingerprint(self.source, self.split, source_digest=self.source_digest)


def make_task(
    dataset: str,
    *,
    data_dir: str | None,
    devices: int | None = None,
    num_train: int | None = None,
    num_validation: int | None = None,
    label_noise: float = 0.0,
    by_group: bool = True,
    image_size: Sequence[str] | None = None,
    skip_broken: bool = False,
    clip: bool = False,
) -> Task:
    """Loads a data set, keeps the examples that the run will use, and puts them on the devices.

    Images of one patient never lie on both sides of a split, unless ``by_group`` is false. ``image_size`` is the value
    of the flag, height and width. ``clip`` takes what is there where there are fewer images than asked for. What is odd
    about the data is printed once, and becomes the task's notes.
    """
    size = None if image_size is None else _image_size(image_size)
    source = data.load(dataset, data_dir=data_dir, image_size=size, skip_broken=skip_broken)
    named = by_group and not dataset.lower().endswith(
        ".npz"
    )  # whose examples have no names, hence no patients
    pattern = data.GROUP_PATTERNS.get(source.name.partition(":")[0]) if named else None
    split = data.split_ids(source, groups=data.groups_of(source, pattern) if pattern else None)
    split["train"] = _sample(split["train"], num_train, "--num_train", clip)
    split["validation"] = _sample(split["validation"], num_validation, "--num_validation", clip)
    used = np.sort(np.concatenate(list(split.values())))
    source = data.subset(source, used)
    split = {name: np.searchsorted(used, ids) for name, ids in split.items()}
    notes = (*source.notes, *data.split_notes(source, split))
    for note in notes:
        _print_once(note)
    perturbed = np.zeros(0, np.int64)
    if label_noise:
        source, perturbed = data.with_label_noise(source, split["train"], fraction=label_noise, seed=0)
    mean, std = data.channel_statistics(source.images[split["train"]])
    local = parallel.local_devices(devices)
    position = np.full(
        len(source.images), -1, np.int32
    )  # among the training examples: CRD's memory has a row for each
    position[split["train"]] = np.arange(len(split["train"]))
    arrays = {"image": source.images, "label": source.labels, "position": position}
    arrays = parallel.replicate(arrays, local)
    return Task(source, split, arrays, mean, std, local, perturbed, data.digest(source), notes)


def build(name: str, task: Task, **fields: Any) -> Any:
    """The network ``name`` for this task's classes; a ValueError if it does not take this task's images.

    Batch normalisation takes its statistics over all devices, so that their number changes nothing.
    """
    network = models.build(name, num_classes=task.source.num_classes, **fields)
    if hasattr(network, "axis_name"):
        network = network.clone(axis_name=parallel.AXIS)
    models.init(network, task.source.images.shape[1:], seed=0)
    return network


def shown(network: Any, task: Task) -> Outputs:
    """Shapes of what a network returns of two images of this task; nothing is computed."""
    images = jax.ShapeDtypeStruct((2, *task.source.images.shape[1:]), jnp.float32)
    return jax.eval_shape(lambda x: network.init_with_output(jax.random.key(0), x, train=False)[0], images)


def _image_size(sides: Sequence[str]) -> tuple[int, int]:
    if len(sides) != 2 or not all(side.strip().isdecimal() and int(side) for side in sides):
        raise ValueError(
            f"--image_size={','.join(sides)} must be HEIGHT,WIDTH in pixels, as in --image_size=32,32."
        )
    return int(sides[0]), int(sides[1])


@functools.cache  # a run makes several tasks of the same data
def _print_once(note: str) -> None:
    if jax.process_index() == 0:
        print(f"note: {note}", file=sys.stderr, flush=True)


def _sample(ids: np.ndarray, count: int | None, flag: str, clip: bool) -> np.ndarray:
    """``count`` of the ids, the same every time; a smaller sample is part of a larger one."""
    if count is None or (clip and count > len(ids)):
        return ids
    if not 1 <= count <= len(ids):
        raise ValueError(f"{flag}={count} is not between 1 and the {len(ids)} examples of that split.")
    return np.sort(np.random.default_rng(0).permutation(ids)[:count])
