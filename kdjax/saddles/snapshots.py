"""Snapshots of teachers in training: a repository on disk, the choice among them, and their mean."""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from kdjax import checkpoints, files
from kdjax.saddles.scores import Rule, SaddleScore, gated_rule
from kdjax.types import Params


class Entry(NamedTuple):
    """A snapshot without its weights; see :func:`entries`."""

    teacher: str
    step: int
    score: SaddleScore


class Snapshot(NamedTuple):
    """A state of a teacher during training, with its score."""

    teacher: str
    step: int
    score: SaddleScore
    params: Params


Identity = Mapping[str, Any] | None

_Item = TypeVar("_Item", Entry, Snapshot)

_MARKER = "repository.json"
_FORMAT = "kdjax saddles 2"


def _opened(path: Any) -> ValueError | OSError | None:
    """Creates or checks the repository, on the first process; returns the error, if any."""
    if jax.process_index():
        return None
    try:
        if (path / _MARKER).exists():
            _repository(path)
        elif path.exists() and any(path.iterdir()):
            return ValueError(
                f"{path} holds other files and is not a repository of saddles: choose a new directory or an empty one."
            )
        else:
            files.write_sealed(path / _MARKER, {"format": _FORMAT})
    except (ValueError, OSError) as error:
        return error
    return None


def _repository(directory: Any) -> Any:
    """The path of a repository in this version's format; raises a ValueError otherwise."""
    path = files.as_path(directory)
    if not (path / _MARKER).exists():
        raise ValueError(
            f"{directory} is not a repository of saddles ({_MARKER} is missing): pass the directory given to add."
        )
    if (found := files.read_sealed(path / _MARKER)["format"]) != _FORMAT:
        raise ValueError(f"the format of {directory} is {found!r}, and this version reads {_FORMAT!r}.")
    return path


def _teachers(path: Any) -> list[Any]:
    return sorted((entry for entry in path.iterdir() if entry.is_dir()), key=lambda entry: entry.name)


def _manifest(step_path: Any, identity: Identity) -> dict[str, Any]:
    try:
        return files.read_sealed(step_path / "manifest.json", identity=identity)
    except OSError as error:
        raise ValueError(f"{step_path} is damaged, its manifest cannot be read: remove it.") from error


def _score(meta: dict[str, Any]) -> SaddleScore:
    return SaddleScore(**{name: jnp.float32(value) for name, value in meta["score"].items()})


def add(
    directory: str | os.PathLike,
    teacher: str,
    step: int,
    params: Params,
    score: SaddleScore,
    *,
    identity: Identity = None,
) -> None:
    """Adds a snapshot to a repository, which is created if missing.

    The snapshot is written atomically to ``<directory>/<teacher>/step_00000012`` by :mod:`kdjax.checkpoints`. Add in
    the order of training: an existing snapshot of the same step is replaced, and later ones of the same teacher, left
    by a run that was resumed from an earlier step, are removed. With several processes, all of them call this.

    Args:
      directory: of the repository; new, empty, or made by this function.
      teacher: name of the teacher: letters, digits, ``_`` and ``-``.
      step: of its training.
      params: any pytree of arrays; to store BatchNorm statistics too, ``{"params": params, **model_state}``.
      score: of these parameters.
      identity: what identifies the teacher's run (data, settings, seed), as JSON.

    Raises:
      ValueError: if the directory holds other files, the name is invalid, or the score is of several points.
      OSError: if the files could not be written.
    """
    if not re.fullmatch(r"[\w-]+", teacher):
        raise ValueError(f"a teacher's name must consist of letters, digits, '_' and '-', got {teacher!r}.")
    if any(np.ndim(value) for value in score):
        raise ValueError("add needs the score of one point: index the stacked scores with jax.tree.map.")
    path = files.as_path(directory)
    checkpoints.raise_together(_opened(path), doing="opening the repository of saddles")
    meta = {"score": {name: float(value) for name, value in score._asdict().items()}}
    checkpoints.save(path / teacher, step, {"params": params}, meta=meta, identity=identity, keep=sys.maxsize)


def entries(directory: str | os.PathLike, *, identity: Identity = None) -> list[Entry]:
    """Lists the snapshots of a repository by teacher and step, with their scores, without reading weights.

    Args:
      directory: of the repository.
      identity: that every snapshot must have been added with; None accepts any.

    Raises:
      ValueError: if there is no repository, it is empty, or a score has changed since it was written.
      kdjax.files.Mismatch: if a snapshot was added with another identity.
    """
    path = _repository(directory)
    found = []
    for folder in _teachers(path):
        for step_path in sorted(folder.iterdir(), key=lambda entry: (len(entry.name), entry.name)):
            if match := re.fullmatch(r"step_(\d{8,})", step_path.name):
                found.append(
                    Entry(folder.name, int(match[1]), _score(_manifest(step_path, identity)["meta"]))
                )
    if not found:
        raise ValueError(f"the repository {directory} is empty: fill it with add while a teacher trains.")
    return found


def read(
    directory: str | os.PathLike, teacher: str, step: int, like: Params, *, identity: Identity = None
) -> Snapshot:
    """Reads one snapshot, bit for bit as it was added.

    Args:
      directory: of the repository.
      teacher: as in :func:`entries`.
      step: as in :func:`entries`.
      like: the structure of the parameters, as arrays or ``jax.ShapeDtypeStruct``.
      identity: as in :func:`entries`.

    Raises:
      ValueError: if there is no such repository or snapshot, any byte of it has changed, or the parameters have another
        structure than ``like``.
    """
    path = _repository(directory)
    teachers = [folder.name for folder in _teachers(path)]
    if teacher not in teachers:
        raise ValueError(f"there is no teacher {teacher!r} in {directory}; there are {teachers}.")
    restored = checkpoints.restore(path / teacher, {"params": like}, step=step, identity=identity)
    assert restored is not None  # with a step, restore returns it or raises
    return Snapshot(teacher, step, _score(restored.meta), restored.tree["params"])


def choose(
    snapshots: Sequence[_Item],
    *,
    which: Literal["saddle", "last", "random"] = "saddle",
    rule: Rule = gated_rule,
    key: Key[Array, ""] | None = None,
) -> list[_Item]:
    """Chooses one snapshot of each teacher, in the order of their names.

    Args:
      snapshots: or entries, which hold the scores: choose among :func:`entries`, then :func:`read` the chosen ones.
      which: "saddle", the strong saddle of lowest loss; or a control, "last" for the latest step or "random".
      rule: what counts as a strong saddle, such as ``functools.partial(ratio_rule, alpha=0.5)``.
      key: for "random".

    Raises:
      ValueError: if there is no snapshot, a teacher has no strong saddle, or "random" has no key.

    References:
      Dewan, SPRKD, arXiv 2607.23346, 2026.
    """
    if which not in ("saddle", "last", "random"):
        raise ValueError(f"which must be 'saddle', 'last' or 'random', got {which!r}.")
    if which == "random" and key is None:
        raise ValueError("which='random' needs a key: pass key=jax.random.key(0).")
    chosen = []
    for i, (teacher, own) in enumerate(_by_teacher(snapshots).items()):
        if which == "saddle":
            strong = [item for item in own if rule(item.score) and not np.isnan(item.score.loss)]
            if not strong:
                raise ValueError(
                    f"none of the {len(own)} snapshots of teacher {teacher!r} is a strong saddle: "
                    "leave the teacher out, or pass another rule."
                )
            chosen.append(min(strong, key=lambda item: float(item.score.loss)))
        elif which == "last":
            chosen.append(own[-1])
        else:
            assert key is not None
            chosen.append(own[int(jax.random.randint(jax.random.fold_in(key, i), (), 0, len(own)))])
    return chosen


def aggregate(snapshots: Sequence[Snapshot]) -> Params:
    """The mean over teachers of the mean of each one's snapshots: the approximated saddle region.

    Hidden units may be permuted without changing a network, so the mean of teachers that were initialised differently
    need not lie near any saddle: start them from the same weights, or aggregate one teacher at a time.

    Args:
      snapshots: of one or more teachers, such as :func:`choose` returns; all snapshots of a teacher are a control.

    Returns:
      Parameters in their own dtypes; means are computed in float32 or wider.

    Raises:
      ValueError: if there is no snapshot, or the parameters differ in structure or shapes.

    References:
      Dewan, SPRKD, arXiv 2607.23346, 2026.
    """
    groups = _by_teacher(snapshots)
    _check_alike(snapshots)
    means = [_mean([item.params for item in own]) for own in groups.values()]
    return jax.tree.map(lambda x, like: x.astype(jnp.result_type(like)), _mean(means), snapshots[0].params)


def _by_teacher(snapshots: Sequence[_Item]) -> dict[str, list[_Item]]:
    """Snapshots by teacher, sorted by name and step."""
    if not snapshots:
        raise ValueError("there is no snapshot to choose from: read some from a repository first.")
    groups: dict[str, list[_Item]] = {}
    for item in sorted(snapshots, key=lambda item: (item.teacher, item.step)):
        groups.setdefault(item.teacher, []).append(item)
    return groups


def _check_alike(snapshots: Sequence[Snapshot]) -> None:
    """Raises a ValueError unless all snapshots have the same structure and shapes."""
    first, *others = ((item, shapes_of(item.params)) for item in snapshots)
    for item, shapes in others:
        differing = sorted(
            name for name in first[1].keys() | shapes.keys() if first[1].get(name) != shapes.get(name)
        )
        if differing or jax.tree.structure(item.params) != jax.tree.structure(first[0].params):
            raise ValueError(
                f"aggregate needs networks of the same shapes, but those of teacher {first[0].teacher!r} at step "
                f"{first[0].step} and of {item.teacher!r} at step {item.step} differ"
                f"{' in ' + ', '.join(differing[:3]) if differing else ''}: aggregate them separately."
            )


def shapes_of(tree: Params) -> dict[str, tuple[int, ...]]:
    """The shape of every array by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.shape(leaf) for path, leaf in leaves}


def _mean(trees: Sequence[Params]) -> Params:
    def mean(*leaves):
        wide = jnp.promote_types(jnp.result_type(*leaves), jnp.float32)
        return jnp.mean(jnp.stack([jnp.asarray(leaf, wide) for leaf in leaves]), 0)

    return jax.tree.map(mean, *trees)
