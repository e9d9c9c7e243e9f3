"""A trained student written as a bundle, with each format checked against JAX before it counts."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from kdjax import checkpoints, data, files, results
from kdjax.export import bundle, checks, litert, onnx, stablehlo
from kdjax.export.checks import Limits
from kdjax.export.source import Source, function_of, logits_of, ranges_of
from kdjax.quantisation import Quantised
from kdjax.teacher import TrainedNetwork

DEFAULT = Limits()


class Format(NamedTuple):
    """How a student becomes a file, and the file a function again.

    Attributes:
      file: its name in the bundle.
      convert: a student → the bytes of the file.
      opened: the bytes → a function of ``batch_size`` uint8 images that returns logits.
      any_batch: whether a file can take any number of images.
      quantised: whether its accuracy is checked, not its logits.
    """

    file: str
    convert: Callable[[Source], bytes]
    opened: Callable[[bytes], Callable[[np.ndarray], np.ndarray]]
    any_batch: bool
    quantised: bool = False


FORMATS: Mapping[str, Format] = {
    "stablehlo": Format("student.stablehlo", stablehlo.convert, stablehlo.opened, any_batch=True),
    "litert": Format("student.tflite", litert.convert, litert.opened, any_batch=False),
    "litert_int8": Format(
        "student_int8.tflite", litert.convert_int8, litert.opened, any_batch=False, quantised=True
    ),
    "onnx": Format("student.onnx", onnx.convert, onnx.opened, any_batch=True),
}
"""Every format by name."""

CALIBRATION = 500
"""Training images whose ranges int8 activations are given, and fewer where there are fewer."""


def write(
    directory: str | os.PathLike[str],
    student: TrainedNetwork,
    dataset: data.Dataset,
    *,
    formats: Sequence[str] = (),
    batch_size: int | None = None,
    metrics: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    limits: Limits = DEFAULT,
) -> bundle.Bundle:
    """Writes a student as a bundle, which replaces an earlier bundle in the directory.

    A format that differs from JAX by more than the limits on a thousand images raises an error, and then nothing is
    written at all.

    Args:
      directory: of the bundle.
      student: a trained network, such as :class:`kdjax.run.Trained`.
      dataset: after :func:`kdjax.data.split`, with the classes and images of the student.
      formats: names of :data:`FORMATS`.
      batch_size: images per call; by default any number where the format allows it, and 1 elsewhere.
      metrics: to be kept with it, such as those of its run.
      provenance: where it comes from, such as command, commit and teacher, as JSON.
      limits: of the checks.

    Raises:
      ValueError: if there is no such format, the network cannot be written in it or fails its check, the data set is of
        other images, or the directory holds something else.
      ModuleNotFoundError: if a package of a format is missing; the message names the extra.
    """
    home = Path(directory)
    bundle.check_output(home)
    _check(student, dataset, formats, batch_size)
    images, labels = checks.images_of(dataset)
    function, calibration = function_of(student), dataset.images[dataset.splits["train"][:CALIBRATION]]
    answer = jax.jit(functools.partial(logits_of, student.network, student.normalisation, student.weights))
    reference = checks.run(answer, images, min(len(images), 250))
    with bundle.written_whole(home) as partial:
        described = {}
        for name in formats:
            made = FORMATS[name]
            size = batch_size if batch_size is not None else None if made.any_batch else 1
            try:
                content = made.convert(
                    Source(function, dataset.image_shape, size, calibration, ranges_of(student))
                )
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            found = checks.compare(checks.run(made.opened(content), images, size or 250), reference, labels)
            if wrong := checks.verdict(found, limits, quantised=made.quantised):
                raise ValueError(f"{name} is not exported: {wrong}.")
            files.write_bytes(partial / made.file, content)
            described[name] = {"file": made.file, "batch_size": size, "bytes": len(content), "checked": found}
        bundle.write_weights(partial / bundle.WEIGHTS, student.weights)
        written = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(partial.iterdir())
        }
        description = _description(student, dataset) | {
            "metrics": dict(metrics or {}),
            "provenance": dict(provenance or {}),
            "exported": {"limits": dataclasses.asdict(limits), **results.environment()},
            "formats": described,
            "files": written,
        }
        files.write_sealed(partial / bundle.DESCRIPTION, description)
    return bundle.load(home, network=student.network)


def _description(student: TrainedNetwork, dataset: data.Dataset) -> dict[str, Any]:
    """What using a student takes to know, whatever the formats."""
    return {
        "network": dict(student.network.description),
        "parameters": student.network.num_parameters,
        "weights": checkpoints.digest_tree(student.weights),
        "image_shape": list(dataset.image_shape),
        "normalisation": student.normalisation._asdict(),
        "preprocessing": {
            "decode": "EXIF orientation applied, transparency on white, the first of several frames",
            "colour": "grey" if dataset.image_shape[2] == 1 else "RGB",
            "resize": data.resize_of(dataset.name),
            "filter": "Lanczos",
        },
        "class_names": list(dataset.class_names),
        "signature": {
            "image": {"dtype": "uint8", "shape": ["batch", *dataset.image_shape], "range": [0, 255]},
            "logits": {"dtype": "float32", "shape": ["batch", dataset.num_classes]},
        },
        "data": {
            "name": dataset.name,
            "licence": data.licence_of(dataset.name),
            "splits": {name: len(ids) for name, ids in dataset.splits.items()},
        },
    }


def summary(written: bundle.Bundle) -> list[str]:
    """One line per format of a bundle: its file, size, and how it was checked."""
    lines = []
    for name, form in written.description["formats"].items():
        found = form["checked"]
        said = f"{form['file']} ({form['bytes'] / 1e3:,.1f} kB)"
        if FORMATS[name].quantised:
            lost = 100 * checks.accuracy_lost(found)
            said += (
                f", the class of JAX on {found['agreement']:.1%} of {found['images']:,} images, {lost:.1f} points of "
                f"accuracy lost on {found['test_images']:,} test images"
            )
        else:
            said += f", {found['difference']:.1g} of the range of JAX's logits apart on {found['images']:,} images"
        lines.append(f"{name}: {said}")
    return lines


def _check(
    student: TrainedNetwork, dataset: data.Dataset, formats: Sequence[str], batch_size: int | None
) -> None:
    """Refuses what can be refused before anything is computed."""
    for name in formats:
        if name not in FORMATS:
            raise ValueError(f"formats={name} is not known; there are {', '.join(FORMATS)}.")
        if batch_size not in (None, 1) and not FORMATS[name].any_batch:
            raise ValueError(f"batch_size={batch_size}: a file of {name} takes one image; use batch_size=1.")
        if isinstance(student.network, Quantised) and not FORMATS[name].quantised:
            raise ValueError(
                f"formats={name} is of floats, and this student was trained to compute in integers; use litert_int8."
            )
    if student.network.image_shape != dataset.image_shape:
        raise ValueError(
            f"the student takes images of shape {student.network.image_shape}, {dataset.name} has "
            f"{dataset.image_shape}; give the data set that it was trained on."
        )
    classes = student.network.output_shapes.logits.shape[-1]
    if classes != dataset.num_classes:
        raise ValueError(
            f"the student has {classes} classes, {dataset.name} has {dataset.num_classes}; give the data set that it "
            "was trained on."
        )
