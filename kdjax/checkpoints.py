"""Checkpoints of a whole run: written by Orbax, committed by one rename, verified on every restore.

A step is a directory ``step_00000012`` with Orbax's files under ``arrays/`` and a ``manifest.json``: the caller's
``meta`` and a SHA-256 of every array and of every file. Orbax alone restores wrong values from a flipped bit without
a word; here the files are checked before Orbax opens them and the arrays after it has read them, so a step is
restored exactly or not at all. A step that fails is named in a warning, and the one before it is used.

    save(directory, step, state, meta={"epoch": 3})
    restored = restore(directory, jax.eval_shape(init))  # Restored(step, tree, meta), or None in a new directory

With several processes every one of them calls both functions, on a directory they all see.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from kdjax import files

_STEP = re.compile(r"step_(\d{8,})")
_MANIFEST = "manifest.json"
_FORMAT = 2


class Restored(NamedTuple):
    """What :func:`restore` found."""

    step: int
    tree: PyTree
    meta: dict[str, Any]


class _Damaged(Exception):
    """A step's files are not what was saved."""


def save(
    directory: str | os.PathLike,
    step: int,
    tree: PyTree,
    *,
    meta: dict[str, Any],
    identity: Mapping[str, Any] | None = None,
    keep: int = 2,
) -> None:
    """Saves a run's state so that it is found whole or not at all.

    A kill at any moment leaves the earlier steps as they were. The step just saved becomes the newest: later ones, left
    by a run that was rewound, are removed, and so are leftovers of interrupted saves.

    Args:
      directory: where steps are kept, one run each; made if missing. With several processes they must all see it.
      step: training step, at least 0. A step that is there already is replaced.
      tree: arrays and Python numbers, replicated over processes. Typed PRNG keys are refused.
      meta: anything JSON can hold; returned by :func:`restore`.
      identity: what the run is made from and which one it is (data, settings, arm, seed), as JSON; :func:`restore` can
        then tell it from another run's.
      keep: how many steps to keep, this one included.

    Raises:
      ValueError: for something that cannot be saved, or a state that differs between processes.
      OSError: if the files could not be written; nothing of them is left behind.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"save needs step >= 0 and keep >= 1, got step={step} and keep={keep}.")
    arrays = named_arrays(tree)
    meta, owner = files.json_ready(meta), files.json_ready(dict(identity or {}))
    if jax.process_count() > 1 and not _identical(json.dumps([step, meta, owner]) + digest_tree(arrays)):
        raise ValueError(
            f"the state of step {step} differs between processes, so no single checkpoint describes the run: "
            "give every process the same seed and average gradients and statistics over all of them."
        )
    error = None
    try:
        if jax.process_index() == 0:
            _write(files.as_path(directory), step, arrays, meta, owner, keep)
    except Exception as problem:  # raised once every process knows
        error = problem
    raise_together(error, doing="saving a checkpoint")


def restore(
    directory: str | os.PathLike,
    target: PyTree,
    *,
    step: int | None = None,
    identity: Mapping[str, Any] | None = None,
) -> Restored | None:
    """Restores the newest step that is exactly what was saved.

    Args:
      directory: where :func:`save` wrote.
      target: the state's structure, as arrays or ``jax.ShapeDtypeStruct``. A leaf comes back as what stands here: on
        the target's devices, as a NumPy array, or as a Python number.
      step: one step to restore instead of the newest; then damage is an error.
      identity: what :func:`save` must have been given; None takes any.

    Returns:
      The step, its tree and its meta, or None if no step was saved yet.

    Raises:
      ValueError: if the saved state has another structure, shape or dtype than ``target``; if steps are there but all
        are damaged; if ``step`` is not there.
      kdjax.files.Mismatch: if a step was saved with another identity; the message says what differs.
    """
    path = files.as_path(directory)
    steps = _steps(path)
    if jax.process_count() > 1 and not _identical(json.dumps(steps)):
        raise ValueError(
            f"the processes see different checkpoints in {directory}: use a directory on storage that all share."
        )
    if step is not None:
        if step not in steps:
            raise ValueError(f"there is no step {step} in {directory}; there are {sorted(steps)}.")
        steps = [step]
    damaged = []
    for candidate in steps:
        problem, loaded = _try_read(path / _name(candidate), target, identity)
        if problem is None:
            return Restored(candidate, *loaded)
        damaged.append(f"{path / _name(candidate)}: {problem}")
        if len(damaged) < len(steps):
            warnings.warn(f"damaged checkpoint, using the one before it: {damaged[-1]}", stacklevel=2)
    if not damaged:
        return None
    raise ValueError(
        f"no checkpoint left to restore, each is damaged ({'; '.join(damaged)}): copy it back from a backup, "
        "or delete the directory to start again."
    )


def digest_tree(tree: PyTree) -> str:
    """Returns one SHA-256 over the paths, dtypes, shapes and bytes of a tree, whatever the order of its dicts."""
    lines = sorted(f"{name} {_digest_array(value)}" for name, value in named_arrays(tree).items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def raise_together(error: BaseException | None, *, doing: str) -> None:
    """Raises if any process has an error, so that none is left waiting for one that gave up; also a barrier."""
    everyone_fine = jax.process_count() == 1 or bool(np.all(_gather(error is None)))
    if error is not None:
        raise error
    if not everyone_fine:
        raise RuntimeError(f"another process failed while {doing}; its own message says why.")


# Trees and arrays


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves by path, as in ``params/Dense_0/kernel``; a ValueError if two have one name."""
    leaves, taken = {}, set()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "value"
        if (alias := name.replace("/", ".")) in taken:  # Orbax joins keys by dots and would mix the two up
            raise ValueError(f"two leaves are called {name!r}: rename one of them.")
        leaves[name] = leaf
        taken.add(alias)
    for name in leaves:
        if any(parent in leaves for parent in itertools.accumulate(name.split("/")[:-1], "{}/{}".format)):
            raise ValueError(f"{name!r} lies below another leaf's name: rename one of them.")
    return leaves


def named_arrays(tree: PyTree) -> dict[str, np.ndarray]:
    """The leaves of a tree as NumPy arrays, by path, as in ``params/Dense_0/kernel``.

    Raises:
      ValueError: if two leaves have one name, or one is no array.
    """
    arrays = {}
    for name, leaf in named_leaves(tree).items():
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ValueError(
                f"{name!r} is a typed PRNG key, which does not serialise: keep a seed and a counter and use "
                "jax.random.fold_in, or store jax.random.key_data(key)."
            )
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            raise ValueError(f"{name!r} is split over processes: replicate it before saving.")
        array = np.asarray(leaf)
        if array.dtype.kind in "OSUMm":
            raise ValueError(
                f"{name!r} is a {type(leaf).__name__}, not a number or an array: move it to meta."
            )
        arrays[name] = array
    return arrays


def _digest_array(array: np.ndarray) -> str:
    digest = hashlib.sha256(f"{array.dtype.name}{list(array.shape)}".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _like(target: Any, value: np.ndarray) -> Any:
    """The value as the kind of leaf that the target is."""
    if isinstance(target, np.generic):
        return value[()]
    if isinstance(target, bool | int | float | complex):
        return type(target)(value.item())
    if isinstance(target, np.ndarray) or jnp.asarray(value).dtype != value.dtype:  # jax would halve 64 bits
        return value
    if getattr(target, "weak_type", False) and not value.shape:  # a strong one would compile differently
        return jnp.array(value.item())
    sharding = getattr(target, "sharding", None)
    if sharding is None or len(sharding.device_set) == 1:
        # Uncommitted, as a fresh array would be: a committed one could not meet arrays that live on all devices.
        return jnp.array(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


# One step on disk


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _steps(path: Any) -> list[int]:
    """Committed steps, newest first."""
    if not path.exists():
        return []
    found = (_STEP.fullmatch(entry.name) for entry in path.iterdir())
    return sorted((int(match[1]) for match in found if match), reverse=True)


def _write(
    path: Any,
    step: int,
    arrays: dict[str, np.ndarray],
    meta: dict[str, Any],
    identity: dict[str, Any],
    keep: int,
) -> None:
    """Writes beside the steps, renames, then tidies up."""
    final, temporary, old = (path / f"{_name(step)}{end}" for end in ("", ".tmp", ".old"))
    described = {
        name: {"shape": list(array.shape), "dtype": array.dtype.name, "sha256": _digest_array(array)}
        for name, array in arrays.items()
    }
    if _holds(final, described, meta, identity):
        return
    size = sum(array.nbytes for array in arrays.values())
    with _removed_on_failure(temporary), files.explained(f"save step {step} to {path}", size):
        path.mkdir(parents=True, exist_ok=True)
        for entry in path.iterdir():
            if entry.name.startswith("step_") and entry.suffix in (".tmp", ".old"):
                entry.rmtree()
        temporary.mkdir()
        _reserve(temporary, size)
        nested = _nest({name: array for name, array in arrays.items() if array.size})
        if nested:
            _orbax()[0](temporary / "arrays", nested)
        body = {
            "format": _FORMAT,
            "step": step,
            "meta": meta,
            "arrays": described,
            "files": _file_digests(temporary),
        }
        files.write_sealed(temporary / _MANIFEST, body, identity=identity)
        if final.exists():
            final.rename(old)
        temporary.rename(final)
    steps = _steps(path)
    for other in steps:
        if other > step or other in [s for s in steps if s <= step][keep:]:
            (path / _name(other)).rmtree()
    if old.exists():
        old.rmtree()


def _holds(final: Any, described: dict[str, Any], meta: dict[str, Any], identity: dict[str, Any]) -> bool:
    """Whether this very state is already there, undamaged."""
    try:
        manifest = _checked_manifest(final, identity) if final.exists() else {}
    except (_Damaged, files.Mismatch):
        return False
    return manifest.get("arrays") == described and manifest.get("meta") == meta


@contextlib.contextmanager
def _removed_on_failure(path: Any) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError):
        if path.exists():
            path.rmtree()
        raise


def _reserve(directory: Any, size: int) -> None:
    """Fails early on a full disk: Orbax's own failure is a page of tracebacks from its threads."""
    if not hasattr(os, "posix_fallocate") or "://" in os.fspath(directory) or not size:
        return
    probe = os.path.join(os.fspath(directory), "reserved")
    with open(probe, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    os.remove(probe)


def _nest(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The same arrays as nested dicts, which any Orbax reader opens without this module."""
    nested: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, last = name.split("/")
        functools.reduce(lambda tree, key: tree.setdefault(key, {}), parents, nested)[last] = array
    return nested


def _file_digests(step_path: Any) -> dict[str, str]:
    digests = {}
    for entry in sorted(step_path.iterdir()):
        if entry.is_dir():
            digests |= {f"{entry.name}/{name}": digest for name, digest in _file_digests(entry).items()}
        else:
            digests[entry.name] = hashlib.sha256(entry.read_bytes()).hexdigest()
    return digests


def _checked_manifest(step_path: Any, identity: Mapping[str, Any] | None) -> dict[str, Any]:
    """The manifest, once every file it lists has been found unchanged."""
    try:
        manifest = files.read_sealed(step_path / _MANIFEST, identity=identity)
        if manifest["format"] != _FORMAT:
            raise ValueError(f"its format is {manifest['format']}, and this version reads {_FORMAT}.")
        for name, digest in manifest["files"].items():
            if hashlib.sha256((step_path / name).read_bytes()).hexdigest() != digest:
                raise ValueError(f"{name} has changed since it was saved")
    except files.Mismatch as error:
        raise files.Mismatch(
            f"{error} Use what it was written with, move {step_path.parent} away or delete it to start anew, or choose "
            "another directory."
        ) from error
    except (ValueError, OSError) as error:
        raise _Damaged(str(error)) from error
    return manifest


def _try_read(step_path: Any, target: PyTree, identity: Mapping[str, Any] | None) -> tuple[str | None, Any]:
    """What is wrong with a step on any process, or None and its tree and meta."""
    problem, manifest, arrays = None, {}, {}
    try:
        manifest = _checked_manifest(step_path, identity)
        _check_structure(step_path, manifest["arrays"], target)
        arrays = _read_arrays(step_path, manifest["arrays"])
    except _Damaged as error:
        problem = str(error)
    if jax.process_count() > 1 and not np.all(_gather(problem is None)):
        problem = problem or "another process could not verify it"
    if problem is not None:
        return problem, None
    leaves = [_like(leaf, arrays[name]) for name, leaf in named_leaves(target).items()]
    return None, (jax.tree.unflatten(jax.tree.structure(target), leaves), manifest["meta"])


def _check_structure(step_path: Any, saved: dict[str, Any], target: PyTree) -> None:
    """Refuses before reading: Orbax would cast a float32 to a bfloat16 without a word."""
    wanted = {}
    for name, leaf in named_leaves(target).items():
        typed = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        wanted[name] = f"{typed.dtype.name}{list(typed.shape)}"
    found = {name: f"{array['dtype']}{array['shape']}" for name, array in saved.items()}
    differences = [
        f"{name} is {found.get(name, 'missing')} there and {wanted.get(name, 'missing')} here"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ValueError(
            f"{step_path} holds another model or optimizer than this run's ({'; '.join(differences[:3])}{more}): "
            "use the options it was written with, or choose another directory."
        )


def _read_arrays(step_path: Any, described: dict[str, Any]) -> dict[str, np.ndarray]:
    """All arrays of a step, each compared with its digest."""
    # jnp.dtype, because NumPy alone does not know "bfloat16" by name.
    arrays = {name: np.empty(a["shape"], jnp.dtype(a["dtype"])) for name, a in described.items()}
    nested = _nest({name: array for name, array in arrays.items() if array.size})
    if nested:
        arrays |= named_leaves(_orbax()[1](step_path / "arrays", nested))
    for name, array in arrays.items():
        if _digest_array(array) != described[name]["sha256"]:
            raise _Damaged(f"array {name} is not the one that was saved")
    return arrays


@functools.cache
def _orbax() -> tuple[Callable, Callable]:
    """Save and restore of nested dicts of NumPy arrays by this process alone: 25 ms, where device arrays take 50."""
    import orbax.checkpoint as ocp

    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"kdjax{here}"
    )
    options = alone if jax.process_count() > 1 else ocp.options.MultiprocessingOptions()
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    checkpointer = ocp.Checkpointer(handler, multiprocessing_options=options)

    def write(path: Any, nested: PyTree) -> None:
        checkpointer.save(path, args=ocp.args.PyTreeSave(nested))

    def read(path: Any, nested: PyTree) -> PyTree:
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), nested)
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(item=nested, restore_args=as_numpy))

    return write, read


# Processes


def _gather(value: Any) -> np.ndarray:
    """The values of all processes, stacked."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(np.asarray(value, np.uint8)))


def _identical(text: str) -> bool:
    """Whether every process passed the same text."""
    digests = _gather(np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8))
    return bool(np.all(digests == digests[0]))
