"""The teacher as columns of the data set: what it says of every example, computed once and addressed by index.

A column is a function of the unaugmented image, or of one of a few stored views of it. Row ``i`` belongs to image
``i``, in order, the tail included:

    columns = precompute(directory, fn, variables, images, settings={"teacher": "resnet20"})
    arrays = jax.device_put(columns.arrays)
    batch |= gather(arrays, batch["index"])  # in a jitted step: adds "teacher_logits"

The directory holds ``header.json``, with digests of the teacher and the images, and chunks of rows. A chunk's SHA-256
covers the header, its number and its bytes and stands in its file name, so that one rename writes and seals it: a
changed byte, a chunk of another teacher and a chunk in another place are all refused. A killed ``precompute`` starts
again at the chunks that are missing or damaged.
"""

import hashlib
import io
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from kdjax import checkpoints, files

TeacherFn = Callable[[PyTree, PyTree], dict[str, Array]]
ViewFn = Callable[[Array, Array, Array], PyTree]

_HEADER = "header.json"
_FORMAT = 1


class TeacherCache(NamedTuple):
    """A teacher's stored outputs; ``arrays[name]`` has shape ``[examples, views, ...]``."""

    header: dict[str, Any]
    arrays: dict[str, np.ndarray]


def describe(variables: PyTree, images: np.ndarray, *, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a column depends on: digests of the teacher and the images, and the settings.

    Args:
      variables: the teacher's parameters and statistics.
      images: all images, by index.
      settings: whatever else decides the rows and cannot be hashed: names, normalisation, how views are made.
    """
    taken = {"teacher", "images"} & settings.keys()
    if taken:
        raise ValueError(
            f"settings may not use the names {sorted(taken)}, which describe fills in: rename them."
        )
    pixels = hashlib.sha256(f"{images.dtype}{list(images.shape)}".encode())
    for start in range(0, len(images), 4096):  # in pieces, so that a memory map is not read whole
        pixels.update(np.ascontiguousarray(images[start : start + 4096]).reshape(-1).view(np.uint8).data)
    digests = {"teacher": checkpoints.digest_tree(variables), "images": pixels.hexdigest()}
    return digests | dict(settings)


def precompute(
    directory: str | os.PathLike,
    fn: TeacherFn,
    variables: PyTree,
    images: np.ndarray,
    *,
    settings: Mapping[str, Any],
    views: int = 1,
    view_fn: ViewFn | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    batch_size: int | None = None,
    chunk_size: int = 4096,
    devices: Sequence[jax.Device] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TeacherCache:
    """Computes the columns that are not there yet and returns all of them, verified.

    Nothing is computed or compiled if all are there. With several processes each computes every so-many-th chunk into
    a directory they all see, and all return together.

    Args:
      directory: where to keep these columns and no others.
      fn: ``fn(variables, images) -> {name: rows}``, pure; it sees what ``view_fn`` returns. Rows in a dict within get
        joined names: ``{"features": {"block1": rows}}`` is the column ``features/block1``.
      variables: the teacher's parameters and statistics, passed to ``fn`` and hashed.
      images: all images by index, ``[examples, height, width, channels]``.
      settings: what else decides the rows, as in :func:`describe`.
      views: how many views of each image to store.
      view_fn: ``view_fn(images, index, view) -> inputs``, pure in the example's index and the view's number (an int32
        scalar), traced; by default the images as they are. Inputs may be a pytree with rows, such as images and labels.
      dtype: how floating columns are stored.
      batch_size: rows per call of the teacher, rounded up to a multiple of the devices. By default 64 on a CPU, where
        larger buffers are mapped anew on every call, and 512 elsewhere.
      chunk_size: rows per file. What a directory was begun with stays.
      devices: this process's devices to use; by default all of them.
      progress: called as ``progress(rows_done, rows)`` after every chunk.

    Raises:
      ValueError: if the directory holds other columns, or the teacher returns a NaN or an infinity. Logits may be -inf
        for masked classes, but not for all of an example.
      OSError: if a chunk could not be written.
    """
    batch_size = (64 if jax.default_backend() == "cpu" else 512) if batch_size is None else batch_size
    _check_arguments(images, views, view_fn, dtype, batch_size, chunk_size)
    path = files.as_path(directory)
    wanted = files.json_ready(describe(variables, images, settings=settings))
    layout = {"examples": len(images), "views": views, "dtype": dtype, "chunk_size": chunk_size}
    process, processes = jax.process_index(), jax.process_count()
    error, chunks, header = None, {}, {}
    try:
        header = _begin(path, wanted, layout, lambda: _column_specs(fn, view_fn, variables, images, dtype))
        mine = _numbers(header["layout"], process=process, processes=processes)
        chunks = _read_chunks(path, header, mine, refuse=False)
        missing = [number for number in mine if number not in chunks]
        if missing:
            teacher = _Teacher(fn, view_fn, variables, batch_size, header["layout"], devices)
            rows = sum(len(_rows_of(chunk)) for chunk in chunks.values())
            total = rows + sum(
                stop - start for start, stop in (_bounds(header["layout"], n) for n in missing)
            )
            for number in missing:
                chunks[number] = teacher.rows(images, number)
                _write_chunk(path, header, number, chunks[number])
                rows += len(_rows_of(chunks[number]))
                if progress is not None:
                    progress(rows, total)
    except Exception as problem:  # kept, not swallowed: the other processes must hear of it first
        error = problem
    checkpoints.raise_together(error, doing="filling the teacher's columns")
    if processes > 1:
        chunks = _read_chunks(path, header, _numbers(header["layout"]), refuse=True)
    return TeacherCache(header, _join(header, chunks))


def load(directory: str | os.PathLike, *, header: Mapping[str, Any]) -> TeacherCache:
    """Reads columns that :func:`precompute` completed, every byte verified.

    Args:
      directory: where they are.
      header: what they must have been made from, as :func:`describe` returns it; a part of it checks that part.

    Raises:
      ValueError: if they are damaged, incomplete, absent, or made from something else.
    """
    path = files.as_path(directory)
    if not (path / _HEADER).exists():
        raise ValueError(f"there are no teacher columns in {directory}: run teacher.precompute on it first.")
    stored = files.read_sealed(path / _HEADER)
    header = files.json_ready(dict(header))
    _compare(path, {name: stored["made_from"].get(name) for name in header}, header)
    return TeacherCache(
        stored, _join(stored, _read_chunks(path, stored, _numbers(stored["layout"]), refuse=True))
    )


def gather(
    arrays: Mapping[str, Array | np.ndarray],
    index: Int[Array, "*batch"],
    view: int | Int[Array, "*batch"] = 0,
) -> dict[str, Array]:
    """Gathers the rows of a batch, to be merged into it.

    Args:
      arrays: ``columns.arrays``, best on the device.
      index: which examples; must be within range, which traced code cannot check.
      view: which stored view, one for all or one for each.

    Returns:
      ``{"teacher_<name>": rows}``.
    """
    return {f"teacher_{name}": jnp.asarray(array)[index, view] for name, array in arrays.items()}


def verify(
    columns: TeacherCache,
    fn: TeacherFn,
    variables: PyTree,
    images: np.ndarray,
    *,
    view_fn: ViewFn | None = None,
    num_samples: int = 64,
    seed: int = 0,
    min_cosine: float = 0.999,
    max_error: float = 0.05,
) -> float:
    """Recomputes a random sample of rows and refuses columns that belong to other images or another order.

    The cosine of a row with its recomputation alone would pass rows that share a large offset, and images of one class
    under a confident teacher. So the distance between the two is also measured against the spread between rows, for
    every row, and for the median row down to a spread of a thousandth of the rows' size. Rounding on another device
    passes all three. A few rows swapped among many are found only if ``num_samples`` reaches them; on disk, the digests
    guard those.

    Args:
      columns: as :func:`precompute` or :func:`load` returned them.
      fn: as for :func:`precompute`; also ``variables``, ``images`` and ``view_fn``.
      variables: the teacher's parameters and statistics.
      images: all images by index.
      view_fn: how views are made.
      num_samples: rows to recompute, each of one image and one view.
      seed: which rows.
      min_cosine: least cosine between a stored and a recomputed row.
      max_error: largest distance between them, in root mean square distances of a row from the sample's mean.

    Returns:
      The smallest cosine found.
    """
    layout = columns.header["layout"]
    if layout["examples"] != len(images):
        raise ValueError(f"these columns have {layout['examples']} rows and there are {len(images)} images.")
    index, view = _sample(len(images), layout["views"], num_samples, seed)
    recomputed = jax.jit(lambda *args: _apply_each(fn, view_fn, *args))(
        variables, np.asarray(images[index]), index.astype(np.int32), view.astype(np.int32)
    )
    worst = 1.0
    for name, stored in columns.arrays.items():
        rows = [
            np.asarray(x, np.float64).reshape(len(index), -1) for x in (stored[index, view], recomputed[name])
        ]
        # A class that both mask agrees; one that only one of them masks is far off.
        masked = np.isneginf(rows).all(axis=0)
        rows = [np.where(masked, 0, np.maximum(x, -1e30)) for x in rows]
        problem, cosine = _disagreement(*rows, min_cosine=min_cosine, max_error=max_error)
        worst = min(worst, float(np.min(cosine)))
        if problem is not None:
            row, reason = problem
            raise ValueError(
                f"teacher_{name} is not this teacher's output on these images: at index {index[row]}, view "
                f"{view[row]}, {reason} (cosine {cosine[row]:.4f}). The columns belong to other images or to "
                "another order: delete their directory and fill them again."
            )
    return worst


# Computing rows


class _Teacher:
    """Rows of one chunk at a time, by all of this process's devices and one compilation."""

    def __init__(self, fn, view_fn, variables, batch_size, layout, devices):
        self.layout = layout
        devices = list(devices or jax.local_devices())
        rows = min(batch_size, layout["chunk_size"], layout["examples"])
        self.shape = (len(devices), math.ceil(rows / len(devices)))
        # Once to every device: an uncommitted tree would travel again with each batch.
        replicated = jax.sharding.NamedSharding(
            jax.sharding.Mesh(np.array(devices), ("devices",)), jax.sharding.PartitionSpec()
        )
        self.variables = jax.device_put(variables, replicated)
        self.step = jax.pmap(
            lambda *args: _apply(fn, view_fn, *args), in_axes=(None, 0, 0, None), devices=devices
        )

    def rows(self, images: np.ndarray, number: int) -> dict[str, np.ndarray]:
        """All views of one chunk, checked and as they will be stored."""
        start, stop = _bounds(self.layout, number)
        pieces = [self._view(images, start, stop, view) for view in range(self.layout["views"])]
        chunk = {}
        for name in pieces[0]:
            array = np.stack([piece[name] for piece in pieces], axis=1)
            chunk[name] = _stored(array, name, start, self.layout["dtype"])
        return chunk

    def _view(self, images: np.ndarray, start: int, stop: int, view: int) -> dict[str, np.ndarray]:
        size = math.prod(self.shape)
        parts = []
        for first in range(start, stop, size):
            index = np.minimum(np.arange(first, first + size), stop - 1).astype(np.int32)
            batch = np.asarray(images[first : min(first + size, stop)])
            batch = np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), axis=0)])
            sharded = (x.reshape(self.shape + x.shape[1:]) for x in (batch, index))
            parts.append(self.step(self.variables, *sharded, np.int32(view)))
        host = jax.device_get(parts)  # once per chunk: the devices are never waiting for the host
        return {
            name: np.concatenate([part[name].reshape(size, *part[name].shape[2:]) for part in host])[
                : stop - start
            ]
            for name in host[0]
        }


def _apply(
    fn: TeacherFn, view_fn: ViewFn | None, variables: PyTree, images: Array, index: Array, view: Array
):
    return named(fn(variables, images if view_fn is None else view_fn(images, index, view)))


def _apply_each(
    fn: TeacherFn, view_fn: ViewFn | None, variables: PyTree, images: Array, index: Array, view: Array
):
    """As `_apply`, with a view for every image."""
    if view_fn is not None:
        one = jax.vmap(lambda image, i, v: jax.tree.map(lambda x: x[0], view_fn(image[None], i[None], v)))
        images = one(images, index, view)
    return named(fn(variables, images))


def named(rows: Any) -> dict[str, Any]:
    """The arrays of a dict, and of what it nests, by their paths."""
    if not isinstance(rows, Mapping):
        raise ValueError(
            f"the teacher's fn must return a dict of arrays, {{'logits': logits}}, got {type(rows).__name__}."
        )
    found = jax.tree_util.tree_leaves_with_path(rows)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): array for path, array in found}
    if len(named) < len(found):
        raise ValueError(
            f"the teacher's fn names two outputs alike once nested names are joined: {sorted(named)}."
        )
    return named


def _stored(array: np.ndarray, name: str, start: int, dtype: str) -> np.ndarray:
    """The rows in their stored type; refuses what is not a finite number there, but for classes masked by -inf."""
    stored = array
    if jnp.issubdtype(array.dtype, jnp.floating):
        with np.errstate(over="ignore"):
            stored = array.astype(dtype)
        bad, dead = ~np.isfinite(stored), np.zeros(array.shape, bool)
        if "logits" in name:
            dead |= (array <= jnp.finfo(array.dtype).min / 2).all(axis=-1, keepdims=True)
            bad = bad & ~np.isneginf(array) | dead
        if bad.any():
            index, view, *_ = place = tuple(np.argwhere(bad)[0])
            advice = "the teacher has diverged or its input is bad"
            if dead[place]:
                advice = "it masks every class of that example, which leaves nothing to learn"
            elif np.isfinite(array[place]):
                advice = "store it with dtype='float32'"
            raise ValueError(
                f"the teacher's {name} at index {start + index}, view {view}, is {array[place]}: {advice}."
            )
    return stored


def _column_specs(fn, view_fn, variables, images, dtype) -> dict[str, Any]:
    """Names, row shapes and stored types, without computing anything."""
    batch = jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype)
    index, view = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    rows = jax.eval_shape(lambda *args: _apply(fn, view_fn, *args), variables, batch, index, view)
    if not rows or any(x.shape[:1] != (1,) for x in rows.values()):
        raise ValueError(
            "the teacher's fn must return a dict of arrays with one row per image: {'logits': logits}."
        )
    return {
        name: {
            "shape": list(x.shape[1:]),
            "dtype": dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype.name,
        }
        for name, x in sorted(rows.items())
    }


def _sample(examples: int, views: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct indices in order, as a memory map likes them, and a view for each."""
    random = np.random.default_rng(seed)
    index = np.sort(random.choice(examples, size=min(count, examples), replace=False))
    return index, random.integers(views, size=len(index))


def _disagreement(
    stored: np.ndarray, recomputed: np.ndarray, *, min_cosine: float, max_error: float
) -> tuple[tuple[int, str] | None, np.ndarray]:
    """The worst row and why it fails, or None; and the cosine of every row."""

    def norm(rows):
        return np.linalg.norm(rows, axis=-1)

    size = math.sqrt(np.mean(norm(recomputed) ** 2))
    spread = math.sqrt(np.mean(norm(recomputed - recomputed.mean(axis=0)) ** 2))
    error = norm(stored - recomputed)
    scale = np.maximum(norm(stored) * norm(recomputed), np.finfo(np.float64).tiny)
    # The direction of a row near zero is rounding; its error still counts.
    cosine = np.where(norm(recomputed) > spread / 2, np.sum(stored * recomputed, axis=-1) / scale, 1.0)
    worst = int(np.argmax(error))
    if np.min(cosine) < min_cosine:
        worst = int(np.argmin(cosine))
        return (worst, f"the cosine is below {min_cosine}"), cosine
    if error[worst] > max_error * max(spread, size / 10):
        return (
            worst,
            f"the row is off by {error[worst] / max(spread, size / 10):.2g} of the rows' spread",
        ), cosine
    if np.median(error) > 2 * max_error * max(spread, size / 1000):
        return (worst, "and in most sampled rows, the row is no closer than another example's"), cosine
    return None, cosine


# Files


def _begin(
    path: Any, wanted: dict[str, Any], layout: dict[str, Any], specs: Callable[[], dict]
) -> dict[str, Any]:
    """The directory's header: the one there if it fits, else a new one by process 0."""
    header = None
    if (path / _HEADER).exists():
        try:
            header = files.read_sealed(path / _HEADER)
        except ValueError as error:
            warnings.warn(
                f"{error} It is written anew, and chunks that do not fit it are recomputed.", stacklevel=3
            )
    if header is not None:
        layout = layout | {"chunk_size": header["layout"]["chunk_size"]}
        _compare(path, header["made_from"] | header["layout"], wanted | layout)
        return header
    # The same on every process, so none needs to wait for the file.
    header = {"format": _FORMAT, "made_from": wanted, "layout": layout, "columns": specs()}
    if jax.process_index() == 0:
        with files.explained(f"begin the teacher's columns in {path}", 4096):
            path.mkdir(parents=True, exist_ok=True)
            files.write_sealed(path / _HEADER, header)
    return header


def _compare(path: Any, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuses columns that were made from something else."""
    if different := files.differences(stored, wanted):
        raise files.Mismatch(
            f"the teacher's columns in {path} were made from something else ({different}): delete that directory to "
            "compute them again, or choose another one."
        )


def _rows_of(chunk: dict[str, np.ndarray]) -> np.ndarray:
    return next(iter(chunk.values()))


def _bounds(layout: Mapping[str, Any], number: int) -> tuple[int, int]:
    start = number * layout["chunk_size"]
    return start, min(start + layout["chunk_size"], layout["examples"])


def _numbers(layout: Mapping[str, Any], *, process: int = 0, processes: int = 1) -> range:
    """Which chunks there are, or which of them are one process's."""
    return range(process, math.ceil(layout["examples"] / layout["chunk_size"]), processes)


def _seal(header: Mapping[str, Any], number: int, data: bytes) -> str:
    """What ties a chunk to its header and its place; part of its file name."""
    return hashlib.sha256(f"{files.digest_json(header)} {number} ".encode() + data).hexdigest()


def _files(path: Any, number: int) -> list[Any]:
    """All files that begin as this chunk's do: whole, left over, or of other columns."""
    return sorted(path.glob(f"chunk_{number:05d}-*"))


def _read_chunks(
    path: Any, header: dict[str, Any], numbers: range, *, refuse: bool
) -> dict[int, dict[str, np.ndarray]]:
    """The good chunks among those asked for; others are refused, or named and left out."""
    chunks, bad = {}, []
    for number in numbers:
        for file in _files(path, number):
            data = file.read_bytes()
            if file.name == f"chunk_{number:05d}-{_seal(header, number, data)}.npz":
                with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                    chunks[number] = {name: arrays[f"teacher_{name}"] for name in header["columns"]}
            elif file.suffix == ".npz":
                bad.append(file)
    bad = [file for file in bad if int(file.name[6:11]) not in chunks]
    if bad and not refuse:
        warnings.warn(
            f"damaged, or of other columns, and computed again: {[str(f) for f in bad]}", stacklevel=3
        )
    if refuse and len(chunks) < len(numbers):
        there = sum(stop - start for start, stop in (_bounds(header["layout"], number) for number in chunks))
        damage = f", {[file.name for file in bad]} damaged or of other columns" if bad else ""
        raise ValueError(
            f"only {there} of {header['layout']['examples']} rows of the teacher's columns are in {path}{damage}: "
            "run the same fill again, which computes what is missing."
        )
    return chunks


def _write_chunk(path: Any, header: dict[str, Any], number: int, chunk: dict[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    named: dict[str, Any] = {f"teacher_{name}": array for name, array in chunk.items()}
    np.savez(buffer, **named)
    data = buffer.getvalue()
    name = f"chunk_{number:05d}-{_seal(header, number, data)}.npz"
    stale = [file for file in _files(path, number) if file.name != name]
    with files.explained(f"write rows of the teacher's columns to {path}", len(data)):
        path.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path / name, data)
    for file in stale:
        file.unlink(missing_ok=True)  # a killed process's half of this very file was just written over


def _join(header: dict[str, Any], chunks: dict[int, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {
        name: np.concatenate([chunks[number][name] for number in sorted(chunks)])
        for name in header["columns"]
    }


def _check_arguments(images, views, view_fn, dtype, batch_size, chunk_size) -> None:
    if getattr(images, "ndim", 0) < 2 or not len(images):
        raise ValueError(
            f"images must be an array [examples, ...] with at least one, got {np.shape(images)}."
        )
    if min(views, batch_size, chunk_size) < 1:
        raise ValueError(
            f"views, batch_size and chunk_size must be at least 1, got {views}, {batch_size} and {chunk_size}."
        )
    if views > 1 and view_fn is None:
        raise ValueError(
            f"{views} views need a view_fn that makes them; without one all would be the same image."
        )
    if dtype not in ("float32", "float16"):
        raise ValueError(f"dtype must be 'float32' or 'float16', got {dtype!r}.")
