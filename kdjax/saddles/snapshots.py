"""States that teachers passed: a repository of them, and from many to one."""

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
    """A state that a teacher passed while it was trained."""

    teacher: str
    step: int
    score: SaddleScore
    params: Params


Identity = Mapping[str, Any] | None

_Item = TypeVar("_Item", Entry, Snapshot)

_MARKER = "repository.json"
_FORMAT = "kdjax saddles 1"


def _opened(path: Any) -> ValueError | OSError | None:
    """Makes the repository or checks that it is one, on the first process; what is wrong, if anything."""
    if jax.process_index():
        return None
    try:
        if (path / _MARKER).exists():
            _repository(path)
        elif path.exists() and any(path.iterdir()):
            return ValueError(
                f"{path} holds files that are no repository of saddles: choose a new directory or an empty one."
            )
        else:
            files.write_sealed(path / _MARKER, {"format": _FORMAT})
    except (ValueError, OSError) as error:
        return error
    return None


def _repository(directory: Any) -> Any:
    """Its path, if it is a repository that this version reads."""
    path = files.as_path(directory)
    if not (path / _MARKER).exists():
        raise ValueError(
            f"{directory} is no repository of saddles, {_MARKER} is missing: pass the directory given to add."
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
    """Adds a snapshot to a repository, which is made if there is none.

    It lies in ``<directory>/<teacher>/step_00000012``, as :mod:`kdjax.checkpoints` writes it, and is whole or absent.
    Add in the order of training: a step that is there already is replaced, and later ones of the same teacher, left by
    a run that was rewound, are removed. With several processes every one of them calls this.

    Args:
      directory: of the repository; new, empty, or made by this function.
      teacher: name of the teacher: letters, digits, ``_`` and ``-``.
      step: of its training.
      params: any pytree of arrays; to keep batch statistics with them, ``{"params": params, **model_state}``.
      score: of this very point.
      identity: what the teacher's run is made from and which one it is (data, settings, seed), as JSON.

    Raises:
      ValueError: if the directory holds other files, the name is no name, or the score is one of several points.
      OSError: if the files could not be written.
    """
    if not re.fullmatch(r"[\w-]+", teacher):
        raise ValueError(f"a teacher's name needs to be letters, digits, '_' and '-', got {teacher!r}.")
    if any(np.ndim(value) for value in score):
        raise ValueError("add needs the score of one point: take it out of the stack with jax.tree.map.")
    path = files.as_path(directory)
    checkpoints.raise_together(_opened(path), doing="opening the repository of saddles")
    meta = {"score": {name: float(value) for name, value in score._asdict().items()}}
    checkpoints.save(path / teacher, step, {"params": params}, meta=meta, identity=identity, keep=sys.maxsize)


def entries(directory: str | os.PathLike, *, identity: Identity = None) -> list[Entry]:
    """Lists the snapshots of a repository by teacher and step, with their scores; no weights are read.

    Args:
      directory: of the repository.
      identity: what every snapshot must have been added with; None takes any.

    Raises:
      ValueError: if there is no repository or nothing in it, or a score has changed since it was written.
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
    """Reads one snapshot, which is exactly what was added.

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
    assert restored is not None  # with a step, it is there or an error
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
      snapshots: or entries, whose scores are enough: choose among :func:`entries`, then :func:`read` what was chosen.
      which: "saddle", the strong saddle of lowest loss; and its controls, "last", the latest step, and "random".
      rule: what a strong saddle is, such as ``functools.partial(ratio_rule, alpha=0.5)``.
      key: of the draw, for "random".

    Raises:
      ValueError: if there is no snapshot, a teacher has no strong saddle, or "random" has no key.

    References:
      Dewan, SPRKD, arXiv 2607.23346, 2026.
    """
    if which not in ("saddle", "last", "random"):
        raise ValueError(
            f"which must be 'saddle', 'last', 'random' or, to aggregate, 'average', got {which!r}."
        )
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


def aggregate(
    snapshots: Sequence[Snapshot],
    *,
    which: Literal["saddle", "last", "random", "average"] = "saddle",
    rule: Rule = gated_rule,
    key: Key[Array, ""] | None = None,
) -> Params:
    """The approximated saddle region: the mean over teachers of one snapshot each.

    Hidden units may be permuted without changing a network, so the mean of teachers that were initialised differently
    need not lie near any saddle: let them start from the same weights, or aggregate one teacher at a time.

    Args:
      snapshots: of one or more teachers.
      which: as in :func:`choose`, or "average", the mean over all snapshots of a teacher, another control.
      rule: as in :func:`choose`.
      key: as in :func:`choose`.

    Returns:
      Parameters, in the types that they have; means are taken in float32 or wider.

    Raises:
      ValueError: as :func:`choose`, or if the parameters differ in structure or shapes.

    References:
      Dewan, SPRKD, arXiv 2607.23346, 2026.
    """
    groups = _by_teacher(snapshots)
    _check_alike(snapshots)
    if which == "average":
        means = [_mean([item.params for item in own]) for own in groups.values()]
    else:
        means = [item.params for item in choose(snapshots, which=which, rule=rule, key=key)]
    return jax.tree.map(lambda x, like: x.astype(jnp.result_type(like)), _mean(means), snapshots[0].params)


def _by_teacher(snapshots: Sequence[_Item]) -> dict[str, list[_Item]]:
    """Teachers in the order of their names, each one's snapshots in that of their steps."""
    if not snapshots:
        raise ValueError("there is no snapshot to choose from: read some of a repository first.")
    groups: dict[str, list[_Item]] = {}
    for item in sorted(snapshots, key=lambda item: (item.teacher, item.step)):
        groups.setdefault(item.teacher, []).append(item)
    return groups


def _check_alike(snapshots: Sequence[Snapshot]) -> None:
    """Raises unless all snapshots hold the same arrays."""
    first, *others = ((item, shapes_of(item.params)) for item in snapshots)
    for item, shapes in others:
        differing = sorted(
            name for name in first[1].keys() | shapes.keys() if first[1].get(name) != shapes.get(name)
        )
        if differing or jax.tree.structure(item.params) != jax.tree.structure(first[0].params):
            raise ValueError(
                f"aggregate needs networks of one shape, and those of teacher {first[0].teacher!r} at step "
                f"{first[0].step} and of {item.teacher!r} at step {item.step} differ"
                f"{' in ' + ', '.join(differing[:3]) if differing else ''}: aggregate them apart."
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
