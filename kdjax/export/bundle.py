"""A student and everything that using it takes, in one folder: weights, architecture, preprocessing, names, provenance.

The folder holds ``weights.npz``, which NumPy reads without kdjax, a file per format, and ``bundle.json``, which is
sealed and holds the SHA-256 of all others. It appears whole or not at all.
"""

import contextlib
import hashlib
import io
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from kdjax import checkpoints, files, models
from kdjax.export.source import logits_of
from kdjax.extras import extra
from kdjax.models import Network
from kdjax.types import Normalisation, Weights

DESCRIPTION, WEIGHTS = "bundle.json", "weights.npz"


class Bundle(NamedTuple):
    """A student that was read back; it can teach, too, since it is a :class:`kdjax.teacher.TrainedNetwork`.

    Attributes:
      directory: where it lies.
      network: its architecture.
      weights: parameters and statistics.
      normalisation: of its input pixels.
      class_names: one per logit.
      description: what ``bundle.json`` says: preprocessing, signature, metrics, formats and their checks, provenance.
    """

    directory: Path
    network: Network
    weights: Weights
    normalisation: Normalisation
    class_names: tuple[str, ...]
    description: Mapping[str, Any]


_compiled = jax.jit(logits_of, static_argnums=(0, 1))


def load(directory: str | os.PathLike[str], *, network: Network | None = None) -> Bundle:
    """Reads a bundle back, after checking the digest of each of its files.

    Args:
      directory: of the bundle.
      network: the network, if it is not one of kdjax's own.

    Raises:
      ValueError: if there is no bundle, a file of it is missing or altered, or it is of another network.
    """
    home = Path(directory)
    try:
        there = files.read_sealed(home / DESCRIPTION)
    except FileNotFoundError:
        raise ValueError(
            f"{home} is no bundle ({DESCRIPTION} is missing): make one with kdjax.export."
        ) from None
    except files.Damaged as error:
        raise ValueError(f"{error} Export the student again.") from None
    for name, digest in there["files"].items():
        if not (home / name).is_file():
            raise ValueError(f"{home / name} is missing; export the student again.")
        if hashlib.sha256((home / name).read_bytes()).hexdigest() != digest:
            raise ValueError(f"{home / name} is not the file that was exported; export the student again.")
    shape = tuple(there["image_shape"])
    if network is None:
        network = models.from_linen(models.from_description(there["network"]), shape)
    elif different := files.differences(there["network"], files.json_ready(dict(network.description))):
        raise ValueError(f"{home} holds the weights of another network ({different}).")
    normalisation = Normalisation(tuple(there["normalisation"]["mean"]), tuple(there["normalisation"]["std"]))
    weights = _read_weights(home / WEIGHTS, network.weight_shapes)
    return Bundle(home, network, weights, normalisation, tuple(there["class_names"]), there)


def predict(
    bundle: Bundle,
    images: Sequence[str | os.PathLike[str]] | UInt8[np.ndarray, "batch height width channels"],
) -> Float[np.ndarray, "batch classes"]:
    """Probabilities of the classes, by the bundle's own preprocessing.

    Args:
      bundle: of :func:`load`.
      images: files, or pixels of the bundle's image shape.

    Raises:
      ValueError: if a file is no image, or pixels have another shape or type.
    """
    shape = tuple(bundle.description["image_shape"])
    pixels = images if isinstance(images, np.ndarray) else read_images(bundle, images)
    if pixels.dtype != np.uint8 or pixels.shape[1:] != shape:
        raise ValueError(
            f"this student takes uint8 pixels of shape [batch, {', '.join(map(str, shape))}], got {pixels.dtype} of "
            f"shape {list(pixels.shape)}; give files to have them resized."
        )
    logits = _compiled(bundle.network, bundle.normalisation, bundle.weights, jnp.asarray(pixels))
    return np.asarray(jax.nn.softmax(logits))


@extra("data")
def read_images(
    bundle: Bundle, paths: Sequence[str | os.PathLike[str]]
) -> UInt8[np.ndarray, "batch height width channels"]:
    """Image files as the pixels that the student was trained on: upright, opaque, resized, grey or colour.

    Raises:
      ValueError: if a file is no image; the message names it.
    """
    from kdjax.data import photos

    height, width, channels = bundle.description["image_shape"]
    if channels not in (1, 3):
        raise ValueError(f"this student takes {channels} channels, and photos have 1 or 3; give it pixels.")
    resize = {"cover": photos.fit, "stretch": photos.stretch}[bundle.description["preprocessing"]["resize"]]
    found = []
    for path in paths:
        try:
            image, _ = photos.read(Path(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}.") from None
        image = resize(image.convert("L" if channels == 1 else "RGB"), (height, width))
        found.append(np.asarray(image).reshape(height, width, channels))
    return np.stack(found)


def write_weights(path: Path, weights: Weights) -> None:
    """Writes parameters and statistics by their path, as in ``params/Dense_0/kernel``."""
    stream, arrays = io.BytesIO(), checkpoints.named_arrays(weights._asdict())
    np.savez(stream, allow_pickle=False, **arrays)
    files.write_bytes(path, stream.getvalue())


def _read_weights(path: Path, shapes: Weights) -> Weights:
    """Weights of these shapes; a ValueError if the file holds others."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no .npz of plain arrays ({error}).") from error
    wanted = {name: leaf.shape for name, leaf in checkpoints.named_leaves(shapes._asdict()).items()}
    if different := files.differences({name: array.shape for name, array in arrays.items()}, wanted):
        raise ValueError(f"{path} holds the weights of another network ({different}).")
    values = [jnp.asarray(arrays[name]) for name in wanted]
    return Weights(**jax.tree.unflatten(jax.tree.structure(shapes._asdict()), values))


@contextlib.contextmanager
def written_whole(directory: Path) -> Iterator[Path]:
    """A new folder to write a bundle into, which takes the place of ``directory`` if nothing is raised.

    Raises:
      ValueError: if ``directory`` exists and is no bundle.
    """
    check_output(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        yield partial
        partial.chmod(0o755)
        if directory.exists():
            shutil.rmtree(directory)
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_output(directory: Path) -> None:
    """Refuses to write over what is no bundle."""
    empty = not directory.exists() or (directory.is_dir() and not any(directory.iterdir()))
    if not empty and not (directory / DESCRIPTION).is_file():
        raise ValueError(f"{directory} holds something that is no bundle; name a new directory.")
