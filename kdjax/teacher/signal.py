"""How a teacher reaches the student: by cached answers, or by running in the step on the student's own images."""

import functools
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from kdjax import checkpoints, data
from kdjax.models import Network
from kdjax.teacher import cache
from kdjax.types import Batch, Normalisation, Outputs, Weights

MODES = ("centre", "views", "online")
VIEW_SEED = 20_231  # of the stored views; part of every cache's header


@runtime_checkable
class TrainedNetwork(Protocol):
    """A network with its weights, and the normalisation of the pixels that it was trained under."""

    @property
    def network(self) -> Network:
        """The network."""
        ...

    @property
    def weights(self) -> Weights:
        """Its weights."""
        ...

    @property
    def normalisation(self) -> Normalisation:
        """Of its input pixels."""
        ...


class TeacherSignal(NamedTuple):
    """What a student is given of a teacher; batches hold ``teacher_NAME`` for every name here.

    Attributes:
      answers: name → rows ``[examples, views, ...]``, cached; None where the teacher runs in the step.
      shapes: of the logits and features of a batch.
      views: stored views of each image; the student is shown one of them.
      online: ``(weights, pixels) -> {name: rows}``, for images in [0, 255].
      weights: of the teacher that runs in the step.
      maps: names of answers that are maps of the unaugmented image, to be cropped and mirrored with it.
      identity: tells this signal from others, as JSON.
    """

    answers: Mapping[str, np.ndarray] | None
    shapes: Outputs
    views: int = 1
    online: cache.TeacherFn | None = None
    weights: Weights | None = None
    maps: tuple[str, ...] = ()
    identity: Mapping[str, Any] = {}

    @property
    def mode(self) -> str:
        """How the teacher is asked: one of :data:`MODES`."""
        return "online" if self.answers is None else "views" if self.views > 1 else "centre"


def answers(
    teacher: TrainedNetwork,
    dataset: data.Dataset,
    *,
    mode: str = "centre",
    features: Sequence[str] = (),
    directory: str | os.PathLike[str] | None = None,
    move: Mapping[str, Any] | None = None,
    views: int = 8,
    **options: Any,
) -> TeacherSignal:
    """Asks a teacher about every image of a data set.

    Args:
      teacher: a trained network.
      dataset: after :func:`kdjax.data.split`.
      mode: ``centre``, the unaugmented image, cached once; ``views``, cached augmentations, of which the student gets
        one; or ``online``, in the step, the student's own augmented image.
      features: of the teacher to return beside its logits. Caches with features are float16.
      directory: of the cache; not needed online.
      move: ``padding`` and ``flip`` of the stored views.
      views: stored views per image, in the mode ``views``.
      **options: of :func:`precompute`, such as ``devices`` and ``progress``.

    Returns:
      The signal; cached answers are verified on a sample.

    Raises:
      ValueError: if there is no such mode, or the directory holds the answers of another teacher or data set.
    """
    if mode not in MODES:
        raise ValueError(f"a teacher is asked in one of the modes {', '.join(MODES)}, got {mode!r}.")
    if lacking := [name for name in features if name not in teacher.network.output_shapes.features]:
        raise ValueError(
            f"{teacher.network.name} has no feature {lacking[0]}; it has "
            f"{', '.join(teacher.network.output_shapes.features) or 'none'}. Maps are made by teacher.explain."
        )
    own = teacher.normalisation._asdict()
    identity = {"weights": checkpoints.digest_tree(teacher.weights), "normalisation": own, "mode": mode}
    identity |= {"views": views if mode == "views" else 1, "features": list(features)}
    shapes = teacher.network.output_shapes

    def ask(weights: Weights, images: Array) -> dict[str, Array]:
        outputs, _ = teacher.network.apply(*weights, data.normalise(images, **own), train=False)
        return {"logits": outputs.logits} | {name: outputs.features[name] for name in features}

    if mode == "online":
        return TeacherSignal(None, shapes, online=ask, weights=teacher.weights, identity=identity)
    if directory is None:
        raise ValueError(f"the mode {mode!r} caches answers: pass directory=, or use mode='online'.")
    settings: dict[str, Any] = {"normalisation": [list(values) for values in teacher.normalisation]}
    if features:
        settings["features"] = list(features)
    view_fn = None
    if mode == "views":
        settings["stored_view"] = moved = {**(move or {"padding": 0, "flip": False}), "seed": VIEW_SEED}
        view_fn = functools.partial(data.stored_view, **moved)

    options = {"view_fn": view_fn, "views": views if view_fn else 1, "settings": settings, **options}
    options["dtype"] = "float16" if features else "float32"
    cached = cache.precompute(directory, ask, teacher.weights, dataset.images, **options)
    cache.verify(cached, ask, teacher.weights, dataset.images, view_fn=view_fn)
    return TeacherSignal(cached.arrays, shapes, views=options["views"], identity=identity)


def from_file(
    path: str | os.PathLike[str],
    dataset: data.Dataset,
    *,
    loaded: data.Dataset,
    other_classes: bool = False,
) -> TeacherSignal:
    """Reads the answers of a teacher in any framework from an ``.npz``.

    The file holds ``logits [n, classes]``; further arrays ``[n, ...]`` are features by name, such as ``embedding`` or
    ``stage2 [n, height, width, channels]``. To prove which image each row belongs to, it also holds either
    ``example_ids``, those of the data set in any order, or ``images_sha256``, the SHA-256 of the bytes of the uint8
    images ``[n, height, width, channels]`` in the order in which they were loaded.

    Args:
      path: of the file.
      dataset: after :func:`kdjax.data.split`.
      loaded: the same data set before it was split.
      other_classes: whether the logits may be of other classes than the data set's, for :func:`translate`.

    Raises:
      ValueError: if the file is no such file, or its rows belong to other images.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except Exception as error:  # a damaged zip raises nearly anything
        raise ValueError(
            f"{path} is no readable .npz of plain arrays ({error}): write it with numpy.savez."
        ) from error
    if "logits" not in found or not {"example_ids", "images_sha256"} & found.keys():
        raise ValueError(
            f"{path} must hold logits, and example_ids or images_sha256, which say whose they are; it holds "
            f"{', '.join(sorted(found)) or 'nothing'}."
        )
    ids = found.pop("example_ids", loaded.example_ids)
    digest = str(found.pop("images_sha256", ""))
    if digest and digest != hashlib.sha256(np.ascontiguousarray(loaded.images).data).hexdigest():
        raise ValueError(
            f"{path} holds answers about other images than {loaded.name}, or in another order: images_sha256 differs. "
            "Compute it over the uint8 images as they are loaded, or store example_ids."
        )
    row_of = {str(name): row for row, name in enumerate(ids.tolist())}
    missing = [str(name) for name in dataset.example_ids.tolist() if str(name) not in row_of]
    if missing:
        raise ValueError(f"{path} has no answers for {len(missing)} examples, such as {missing[0]}.")
    classes, shape = dataset.num_classes, found["logits"].shape
    if len(shape) != 2 or not (shape[1] == classes or (other_classes and shape[1])):
        wanted = "classes" if other_classes else classes
        raise ValueError(f"logits of {path} must be [n, {wanted}], got {list(shape)}.")
    if wrong := [name for name, rows in found.items() if len(rows) != len(ids)]:
        raise ValueError(f"{wrong[0]} of {path} has {len(found[wrong[0]])} rows for {len(ids)} examples.")
    rows = [row_of[str(name)] for name in dataset.example_ids.tolist()]
    kept = {name: np.asarray(array)[rows][:, None] for name, array in found.items()}
    for name, array in kept.items():
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise ValueError(
                f"{name} of {path} must be finite floats, got {array.dtype} with NaN, infinity or integers."
            )
    shapes: dict[str, Any] = {
        name: jax.ShapeDtypeStruct((2, *x.shape[2:]), jnp.float32) for name, x in kept.items()
    }
    identity = {"answers": checkpoints.digest_tree(kept), "mode": "file"}
    return TeacherSignal(kept, Outputs(shapes.pop("logits"), shapes), identity=identity)


def attach(
    signal: TeacherSignal, arrays: Any, batch: Batch, view: int | Int[Array, " batch"]
) -> dict[str, Array]:
    """Adds the cached answers of a view to a batch, as ``teacher_NAME``.

    Args:
      signal: of the teacher.
      arrays: its answers on the device.
      batch: with ``index``.
      view: which stored view; one for all or one per example.
    """
    found = {} if signal.answers is None else cache.gather(arrays, batch["index"], view)
    return {**batch, **found}


def attach_online(signal: TeacherSignal, weights: Any, batch: Batch) -> dict[str, Array]:
    """Adds what a teacher that runs in the step says of the batch's images, as constants under differentiation."""
    if signal.online is None:
        return dict(batch)
    rows = jax.lax.stop_gradient(cache.named(signal.online(weights, batch["image"])))
    return {**batch, **{f"teacher_{name}": array for name, array in rows.items()}}


PERTURBATIONS: dict[str, Callable[[np.random.Generator, np.ndarray], np.ndarray]] = {
    "misaligned": lambda random, rows: rows[random.permutation(len(rows))],
    "noise": lambda random, rows: random.permuted(rows.reshape(*rows.shape[:2], -1), axis=-1).reshape(
        rows.shape
    ),
}


def perturb(signal: TeacherSignal, dataset: data.Dataset, how: Mapping[str, str]) -> TeacherSignal:
    """Makes a signal a control, which shows whether the content of cached answers helps or their presence.

    Args:
      signal: cached.
      dataset: whose training examples are given perturbed answers.
      how: name of an answer → ``misaligned``, each example is given the row of another one, or ``noise``, the values of
        each row are put in random places. The rows of all maps are exchanged alike. A perturbed map stays where it is
        while its image is cropped and mirrored.

    Raises:
      ValueError: if there is no such perturbation.
    """
    answers, ids = dict(signal.answers or {}), dataset.splits["train"]
    for name, kind in how.items():
        if kind not in PERTURBATIONS:
            raise ValueError(f"answers can be perturbed as {', '.join(PERTURBATIONS)}, got {kind!r}.")
        random, answers[name] = np.random.default_rng(int(name in signal.maps)), answers[name].copy()
        answers[name][ids] = PERTURBATIONS[kind](random, answers[name][ids])
    return signal._replace(
        answers=answers,
        maps=tuple(name for name in signal.maps if name not in how),
        identity={**signal.identity, "perturbed": dict(how)},
    )
