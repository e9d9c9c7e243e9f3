"""A teacher's answers for every example: computed once, stored by example index, verified when they are read.

Answers are functions of the unaugmented image, or of a few stored views of it. Row ``i`` belongs to image ``i``, in
order, the last incomplete batch included:

    cached = precompute(directory, fn, variables, images, settings={"teacher": "resnet20"})
    arrays = jax.device_put(cached.arrays)
    batch |= gather(arrays, batch["index"])  # in a jitted step: adds "teacher_logits"

The directory holds ``header.json``, with digests of the teacher and the images, and chunks of rows. A chunk's file name
holds the SHA-256 of the header, the chunk's number and its bytes, so one rename writes and seals it: a changed byte, a
chunk of another teacher and a chunk in another place are all refused. A killed ``precompute`` continues with the chunks
that are missing or damaged. It is no checkpoint of :mod:`kdjax.checkpoints`, since chunks are written, resumed and
sealed one by one, by several processes, while a checkpoint is saved and restored as a whole.
"""

import hashlib
import io
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from kdjax import checkpoints, files

TeacherFn = Callable[[PyTree, PyTree], dict[str, Array]]
ViewFn = Callable[[Array, Array, Array], PyTree]

MIN_COSINE = 0.999  # between a stored and a recomputed row
MAX_ERROR = 0.05  # distance between them, in root mean square distances of a row from the sample's mean

_HEADER = "header.json"
_FORMAT = 1


class TeacherCache(NamedTuple):
    """Cached answers; ``arrays[name]`` has shape ``[examples, views, ...]``."""

    header: dict[str, Any]
    arrays: dict[str, np.ndarray]


def describe(variables: PyTree, images: np.ndarray, *, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what cached answers depend on: digests of the teacher and the images, and the settings.

    Args:
      variables: the teacher's parameters and statistics.
      images: all images, by index.
      settings: what else determines the rows: names, normalisation, how views are made.
    """
    reserved = {"teacher", "images"} & settings.keys()
    if reserved:
        raise ValueError(f"settings may not use the reserved names {sorted(reserved)}: rename them.")
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
    """Computes the chunks that are missing, and returns the answers for all examples.

    Nothing is computed or compiled if all chunks exist. Several processes share the chunks, write to one directory that
    all of them see, and return together.

    Args:
      directory: of this cache alone.
      fn: ``fn(variables, images) -> {name: rows}``, pure; its images are what ``view_fn`` returns. Nested names are
        joined: ``{"features": {"block1": rows}}`` is stored as ``features/block1``.
      variables: the teacher's parameters and statistics, passed to ``fn`` and hashed.
      images: all images by index, ``[examples, height, width, channels]``.
      settings: what else determines the rows, as in :func:`describe`.
      views: how many views of each image to store.
      view_fn: ``view_fn(images, index, view) -> inputs``, pure in the example's index and the view's number (an int32
        scalar), traced; by default the images as they are. Inputs may be a pytree with rows, such as images and labels.
      dtype: of stored floating-point answers.
      batch_size: rows per call of the teacher, rounded up to a multiple of the devices. By default 64 on a CPU, where
        larger buffers are mapped anew on every call, and 512 elsewhere.
      chunk_size: rows per file. A directory keeps the size that it was begun with.
      devices: this process's devices to use; by default all of them.
      progress: called as ``progress(rows_done, rows)`` after every chunk.

    Raises:
      ValueError: if the directory holds another cache, or the teacher returns NaN or infinity. Logits may be -inf for
        masked classes, but not for all classes of an example.
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
        header = _begin(path, wanted, layout, lambda: _specs(fn, view_fn, variables, images, dtype))
        mine = _numbers(header["layout"], process=process, processes=processes)
        chunks = _read_chunks(path, header, mine, refuse=False)
        missing = [number for number in mine if number not in chunks]
        if missing:
            teacher = _Teacher(fn, view_fn, variables, batch_size, header["layout"], devices)
            total = _num_rows(header, mine)
            for number in missing:
                chunks[number] = teacher.rows(images, number)
                _write_chunk(path, header, number, chunks[number])
                if progress is not None:
                    progress(_num_rows(header, chunks), total)
    except Exception as problem:  # raised below, after the other processes have been told
        error = problem
    checkpoints.raise_together(error, doing="computing the teacher's answers")
    if processes > 1:
        chunks = _read_chunks(path, header, _numbers(header["layout"]), refuse=True)
    return TeacherCache(header, _join(header, chunks))


def load(directory: str | os.PathLike, *, header: Mapping[str, Any]) -> TeacherCache:
    """Reads a cache that :func:`precompute` completed, every byte verified.

    Args:
      directory: of the cache.
      header: what it must have been computed from, as :func:`describe` returns it; a part of it checks that part.

    Raises:
      ValueError: if it is damaged, incomplete, absent, or was computed from something else.
    """
    path = files.as_path(directory)
    if not (path / _HEADER).exists():
        raise ValueError(f"there are no cached answers in {directory}: run teacher.precompute first.")
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
      arrays: ``cached.arrays``, best on the device.
      index: of the examples; must be in range, which traced code cannot check.
      view: which stored view, one for all or one for each.

    Returns:
      ``{"teacher_<name>": rows}``.
    """
    return {f"teacher_{name}": jnp.asarray(array)[index, view] for name, array in arrays.items()}


def verify(
    cached: TeacherCache,
    fn: TeacherFn,
    variables: PyTree,
    images: np.ndarray,
    *,
    view_fn: ViewFn | None = None,
    num_samples: int = 64,
    seed: int = 0,
) -> float:
    """Recomputes a random sample of rows, and refuses answers for other images or in another order.

    The cosine of a row with its recomputation is not enough: it would pass rows with a large common offset, and images
    of one class under a confident teacher. So their distance is also compared with the spread between rows, for every
    row, and for the median row down to a spread of a thousandth of the rows' size. Rounding on another device passes.
    A few swapped rows are found only if they are sampled; on disk, the digests find them.

    Args:
      cached: from :func:`precompute` or :func:`load`.
      fn: as for :func:`precompute`; also ``variables``, ``images`` and ``view_fn``.
      variables: the teacher's parameters and statistics.
      images: all images by index.
      view_fn: how views are made.
      num_samples: rows to recompute, each of one image and one view.
      seed: which rows.

    Returns:
      The smallest cosine found.
    """
    layout = cached.header["layout"]
    if layout["examples"] != len(images):
        raise ValueError(f"the cache has {layout['examples']} rows and there are {len(images)} images.")
    index, view = _sample(len(images), layout["views"], num_samples, seed)
    recomputed = jax.jit(lambda *args: _apply_each(fn, view_fn, *args))(
        variables, np.asarray(images[index]), index.astype(np.int32), view.astype(np.int32)
    )
    worst = 1.0
    for name, stored in cached.arrays.items():
        rows = [
            np.asarray(x, np.float64).reshape(len(index), -1) for x in (stored[index, view], recomputed[name])
        ]
        # A class that both mask agrees; a class that only one masks is far off.
        masked = np.isneginf(rows).all(axis=0)
        rows = [np.where(masked, 0, np.maximum(x, -1e30)) for x in rows]
        problem, cosine = _disagreement(*rows)
        worst = min(worst, float(np.min(cosine)))
        if problem is not None:
            row, reason = problem
            raise ValueError(
                f"teacher_{name} is not this teacher's output on these images: at index {index[row]}, view "
                f"{view[row]}, {reason} (cosine {cosine[row]:.4f}). The answers belong to other images or to "
                "another order: delete their directory and compute them again."
            )
    return worst


# Computing rows


class _Teacher:
    """Computes one chunk at a time on all of this process's devices, with one compilation."""

    def __init__(self, fn, view_fn, variables, batch_size, layout, devices):
        self.layout = layout
        devices = list(devices or jax.local_devices())
        rows = min(batch_size, layout["chunk_size"], layout["examples"])
        self.shape = (len(devices), math.ceil(rows / len(devices)))
        # Replicated once: an uncommitted tree would be copied again with each batch.
        replicated = jax.sharding.NamedSharding(
            jax.sharding.Mesh(np.array(devices), ("devices",)), jax.sharding.PartitionSpec()
        )
        self.variables = jax.device_put(variables, replicated)
        self.step = jax.pmap(
            lambda *args: _apply(fn, view_fn, *args), in_axes=(None, 0, 0, None), devices=devices
        )

    def rows(self, images: np.ndarray, number: int) -> dict[str, np.ndarray]:
        """All views of one chunk, checked and in their stored type."""
        start, stop = _bounds(self.layout, number)
        pieces = [self._view(images, start, stop, view) for view in range(self.layout["views"])]
        arrays = {name: np.stack([piece[name] for piece in pieces], axis=1) for name in pieces[0]}
        return {name: _stored(array, name, start, self.layout["dtype"]) for name, array in arrays.items()}

    def _view(self, images: np.ndarray, start: int, stop: int, view: int) -> dict[str, np.ndarray]:
        size = math.prod(self.shape)
        parts = []
        for first in range(start, stop, size):
            index = np.minimum(np.arange(first, first + size), stop - 1).astype(np.int32)
            batch = np.asarray(images[first : min(first + size, stop)])
            batch = np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), axis=0)])
            sharded = (x.reshape(self.shape + x.shape[1:]) for x in (batch, index))
            parts.append(self.step(self.variables, *sharded, np.int32(view)))
        host = jax.device_get(parts)  # once per chunk, so that the devices never wait for the host
        rows = jax.tree.map(lambda *x: np.concatenate([a.reshape(size, *a.shape[2:]) for a in x]), *host)
        return {name: array[: stop - start] for name, array in rows.items()}


def _apply(fn, view_fn, variables: PyTree, images: Array, index: Array, view: Array) -> dict[str, Array]:
    return named(fn(variables, images if view_fn is None else view_fn(images, index, view)))


def _apply_each(fn, view_fn, variables: PyTree, images: Array, index: Array, view: Array) -> dict[str, Array]:
    """As `_apply`, with one view number per image."""
    if view_fn is not None:
        one = jax.vmap(lambda image, i, v: jax.tree.map(lambda x: x[0], view_fn(image[None], i[None], v)))
        images = one(images, index, view)
    return named(fn(variables, images))


def named(rows: Any) -> dict[str, Any]:
    """The arrays of a nested dict, named by their paths."""
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
    """Rows in their stored type; refuses numbers that are not finite there, except -inf for masked classes."""
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


def _specs(fn, view_fn, variables, images, dtype) -> dict[str, Any]:
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
    """Distinct sorted indices, fast to read from a memory map, and a view for each."""
    random = np.random.default_rng(seed)
    index = np.sort(random.choice(examples, size=min(count, examples), replace=False))
    return index, random.integers(views, size=len(index))


def _disagreement(stored: np.ndarray, recomputed: np.ndarray) -> tuple[tuple[int, str] | None, np.ndarray]:
    """The worst row and why it fails, or None; and the cosines of all rows."""

    def norm(rows):
        return np.linalg.norm(rows, axis=-1)

    size = math.sqrt(np.mean(norm(recomputed) ** 2))
    spread = math.sqrt(np.mean(norm(recomputed - recomputed.mean(axis=0)) ** 2))
    error = norm(stored - recomputed)
    scale = np.maximum(norm(stored) * norm(recomputed), np.finfo(np.float64).tiny)
    # The direction of a row near zero is rounding; its error still counts.
    cosine = np.where(norm(recomputed) > spread / 2, np.sum(stored * recomputed, axis=-1) / scale, 1.0)
    worst = int(np.argmax(error))
    if np.min(cosine) < MIN_COSINE:
        return (int(np.argmin(cosine)), f"the cosine is below {MIN_COSINE}"), cosine
    relative = error[worst] / max(spread, size / 10, np.finfo(np.float64).tiny)
    if relative > MAX_ERROR:
        return (worst, f"the row is off by {relative:.2g} of the rows' spread"), cosine
    if np.median(error) > 2 * MAX_ERROR * max(spread, size / 1000):
        return (worst, "and in most sampled rows, the row is no closer than another example's"), cosine
    return None, cosine


# Files


def _begin(
    path: Any, wanted: dict[str, Any], layout: dict[str, Any], specs: Callable[[], dict]
) -> dict[str, Any]:
    """Returns the directory's header: the existing one if it matches, else a new one, written by process 0."""
    header = None
    if (path / _HEADER).exists():
        try:
            header = files.read_sealed(path / _HEADER)
        except ValueError as error:
            warnings.warn(
                f"{error} It is written again, and chunks that do not match it are recomputed.", stacklevel=3
            )
    if header is not None:
        layout = layout | {"chunk_size": header["layout"]["chunk_size"]}
        _compare(path, header["made_from"] | header["layout"], wanted | layout)
        return header
    # Equal on every process, so none waits for the file.
    header = {"format": _FORMAT, "made_from": wanted, "layout": layout, "columns": specs()}
    if jax.process_index() == 0:
        with files.explained(f"begin a cache of answers in {path}", 4096):
            path.mkdir(parents=True, exist_ok=True)
            files.write_sealed(path / _HEADER, header)
    return header


def _compare(path: Any, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuses a cache that was computed from something else."""
    if different := files.differences(stored, wanted):
        raise files.Mismatch(
            f"the cached answers in {path} were computed from something else ({different}): delete that directory to "
            "compute them again, or choose another one."
        )


def _num_rows(header: Mapping[str, Any], numbers: Iterable[int]) -> int:
    return sum(stop - start for start, stop in (_bounds(header["layout"], number) for number in numbers))


def _bounds(layout: Mapping[str, Any], number: int) -> tuple[int, int]:
    start = number * layout["chunk_size"]
    return start, min(start + layout["chunk_size"], layout["examples"])


def _numbers(layout: Mapping[str, Any], *, process: int = 0, processes: int = 1) -> range:
    """The numbers of all chunks, or of one process's."""
    return range(process, math.ceil(layout["examples"] / layout["chunk_size"]), processes)


def _seal(header: Mapping[str, Any], number: int, data: bytes) -> str:
    """Digest that ties a chunk to its header and its number; part of its file name."""
    return hashlib.sha256(f"{files.digest_json(header)} {number} ".encode() + data).hexdigest()


def _files(path: Any, number: int) -> list[Any]:
    """All files of this chunk's number: whole, left over, or of another cache."""
    return sorted(path.glob(f"chunk_{number:05d}-*"))


def _read_chunks(
    path: Any, header: dict[str, Any], numbers: range, *, refuse: bool
) -> dict[int, dict[str, np.ndarray]]:
    """Reads the chunks that match the header; others are refused, or named in a warning and left out."""
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
            f"damaged, or of another cache, and computed again: {[str(f) for f in bad]}", stacklevel=3
        )
    if refuse and len(chunks) < len(numbers):
        damage = f", {[file.name for file in bad]} damaged or of another cache" if bad else ""
        raise ValueError(
            f"only {_num_rows(header, chunks)} of {header['layout']['examples']} rows of cached answers are in "
            f"{path}{damage}: run the same precompute again, which computes the missing ones."
        )
    return chunks


def _write_chunk(path: Any, header: dict[str, Any], number: int, chunk: dict[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    named: dict[str, Any] = {f"teacher_{name}": array for name, array in chunk.items()}
    np.savez(buffer, **named)
    data = buffer.getvalue()
    name = f"chunk_{number:05d}-{_seal(header, number, data)}.npz"
    stale = [file for file in _files(path, number) if file.name != name]
    with files.explained(f"write cached answers to {path}", len(data)):
        path.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path / name, data)
    for file in stale:
        file.unlink(missing_ok=True)  # missing if it was a half of this very file, which was just replaced


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
            f"{views} views need a view_fn that makes them; otherwise all would be the same image."
        )
    if dtype not in ("float32", "float16"):
        raise ValueError(f"dtype must be 'float32' or 'float16', got {dtype!r}.")
