r"""Saddles that teachers pass: how to tell one, where to keep it, and how a student starts from it.

The method is SPRKD (Dewan, arXiv 2607.23346): a teacher is not imitated, it shows where its loss has saddles, and the
student is put near them and descends from there.

* :func:`score_saddle`: a spectrum, as ``kdjax.curvature`` or any other code computes it, as a dozen numbers.
* :func:`magnitude_rule`, :func:`ratio_rule`, :func:`both_rule`, :func:`extreme_rule`: what was published as a strong
  saddle. :func:`gated_rule`: what this library recommends. :func:`certified`: whether any curvature is negative.
* :func:`add`, :func:`entries`, :func:`read`: a repository of snapshots, one directory per teacher.
* :func:`choose`, :func:`aggregate`: one snapshot per teacher, and the mean over teachers.
* :func:`recruit`: the teacher's parameters in the student's shapes.

Scores and rules are pure: they work under ``jax.jit`` and ``jax.vmap``, and rules also on scores stacked along any
axes. The others run on the host.
"""

import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from kdjax import checkpoints, files
from kdjax.types import ModelState, Params, Scalar

Sums: TypeAlias = Literal["extreme", "density"]
"""Which sums a rule compares: of the few extreme eigenvalues, as published, or of the whole spectrum."""


class SaddleScore(NamedTuple):
    """What the curvature says of one point; see :func:`score_saddle`. NaN where it was not measured."""

    lambda_min: jax.Array  # float32[], as all of them: the smallest eigenvalue found
    residual: jax.Array  # ‖Hv - λv‖ of its pair: an eigenvalue lies that near
    lambda_max: jax.Array  # the largest
    extreme_negative: jax.Array  # sum of the negative ones among the few extreme eigenvalues, 0 or below
    extreme_positive: jax.Array  # sum of the positive ones among them
    density_negative: jax.Array  # sum of all negative eigenvalues, estimated from the density, 0 or below
    density_positive: jax.Array  # sum of all positive ones
    negative_share: jax.Array  # |negative| over |negative| + positive of the density, in [0, 1]
    strength: (
        jax.Array
    )  # |lambda_min| / lambda_max; 0 without a negative eigenvalue, infinite without a positive
    gradient_norm: jax.Array
    loss: jax.Array


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


Rule: TypeAlias = Callable[[SaddleScore], Array]
"""Whether a score is that of a strong saddle, elementwise."""

_Item = TypeVar("_Item", Entry, Snapshot)

# Scores


def score_saddle(
    eigenvalues: Float[Array | np.ndarray, " pairs"],
    residuals: Float[Array | np.ndarray, " pairs"],
    *,
    gradient_norm: Scalar,
    loss: Scalar,
    nodes: Float[Array | np.ndarray, "probes order"] | None = None,
    weights: Float[Array | np.ndarray, "probes order"] | None = None,
    num_parameters: int | None = None,
) -> SaddleScore:
    r"""Sums up the curvature at a point.

    Strength and negative share do not change with a factor on the loss or on the parameters. Both weigh an eigenvalue
    by its size. The share of eigenvalues below zero does not, and few Lanczos steps cannot tell it, since most
    eigenvalues of a network lie next to zero.

    Args:
      eigenvalues: from both ends of the Hessian's spectrum, in any order; the published code takes four.
      residuals: :math:`\lVert Hv - \lambda v \rVert_2` of each.
      gradient_norm: 2-norm of the gradient at the same parameters, on the same data.
      loss: there.
      nodes: of the quadrature of the eigenvalue density; without them the fields of the density are NaN.
      weights: of the nodes, of sum 1 for each probe.
      num_parameters: rows of the Hessian, which turn a mean over the spectrum into a sum.

    Returns:
      The score, in float32. May be used under ``jax.jit`` and ``jax.vmap``.

    Raises:
      ValueError: if there is no eigenvalue, or only a part of nodes, weights and num_parameters.

    References:
      Dewan, SPRKD, arXiv 2607.23346, 2026. Ghorbani et al., `An Investigation into Neural Net Optimization via Hessian
      Eigenvalue Density <https://arxiv.org/abs/1901.10159>`_, 2019, section 2, for nodes and weights.

    Examples:
      >>> score = score_saddle(jnp.array([-1.0, 4.0]), jnp.zeros(2), gradient_norm=0.0, loss=2.3)
      >>> float(score.strength)
      0.25
    """
    eigenvalues, residuals = _float32(eigenvalues), _float32(residuals)
    if not eigenvalues.size:
        raise ValueError("score_saddle needs at least one eigenvalue, got none: compute both ends.")
    given = [x is not None for x in (nodes, weights, num_parameters)]
    if any(given) and not all(given):
        raise ValueError(
            "score_saddle needs nodes, weights and num_parameters together: pass all three, or none of them."
        )
    first = jnp.argmin(eigenvalues)
    lowest, highest = eigenvalues[first], jnp.max(eigenvalues)
    if nodes is None or weights is None or num_parameters is None:
        negative = positive = share = jnp.full((), jnp.nan, jnp.float32)
    else:
        nodes, weights = _float32(nodes), _float32(weights)
        low, high = (jnp.mean(jnp.sum(weights * jnp.maximum(x, 0), -1)) for x in (-nodes, nodes))
        share = low / jnp.where(low + high > 0, low + high, 1)
        negative, positive = -low * num_parameters, high * num_parameters
    below = jnp.maximum(-lowest, 0)
    strength = jnp.where(highest > 0, below / jnp.where(highest > 0, highest, 1), jnp.inf)
    return SaddleScore(
        lambda_min=lowest,
        residual=residuals[first],
        lambda_max=highest,
        extreme_negative=jnp.sum(jnp.minimum(eigenvalues, 0)),
        extreme_positive=jnp.sum(jnp.maximum(eigenvalues, 0)),
        density_negative=negative,
        density_positive=positive,
        negative_share=share,
        # NaN stays NaN, as it does in the other fields.
        strength=jnp.where(below == 0, 0, jnp.where(jnp.isnan(lowest), lowest, strength)),
        gradient_norm=_float32(gradient_norm),
        loss=_float32(loss),
    )


# Rules


def magnitude_rule(
    score: SaddleScore, *, beta: Scalar = 7.0, sums: Sums = "extreme"
) -> Bool[Array, "*batch"]:
    r"""Published: :math:`|\sum \lambda^-| \ge \beta`.

    It depends on the scale of the loss and of the parameters, and looks neither at the gradient nor at convergence.

    Args:
      score: of one point, or of several stacked.
      beta: threshold.
      sums: over the extreme eigenvalues, as published, or over all of them, from the density.

    References:
      Dewan, SPRKD, arXiv 2607.23346, 2026.
    """
    return -_sums(score, sums)[0] >= beta


def ratio_rule(score: SaddleScore, *, alpha: Scalar = 0.4, sums: Sums = "extreme") -> Bool[Array, "*batch"]:
    r"""Published: :math:`|\sum \lambda^-| \ge \alpha \sum \lambda^+`, and some curvature is negative.

    Args:
      score: of one point, or of several stacked.
      alpha: threshold.
      sums: as in :func:`magnitude_rule`.

    References:
      Dewan, SPRKD, arXiv 2607.23346, 2026. Without the second condition, a flat point would be a saddle.
    """
    negative, positive = _sums(score, sums)
    return (-negative >= alpha * positive) & (negative < 0)


def both_rule(
    score: SaddleScore, *, beta: Scalar = 7.0, alpha: Scalar = 0.4, sums: Sums = "extreme"
) -> Bool[Array, "*batch"]:
    """Published: :func:`magnitude_rule` and :func:`ratio_rule` at once."""
    return magnitude_rule(score, beta=beta, sums=sums) & ratio_rule(score, alpha=alpha, sums=sums)


def extreme_rule(score: SaddleScore, *, share: Scalar = 0.05) -> Bool[Array, "*batch"]:
    r"""Published: :math:`\lambda_{max} > 0` and :math:`\lambda_{min} < -0.05 \, \lambda_{max}`.

    Args:
      score: of one point, or of several stacked.
      share: of the largest eigenvalue, which the smallest must exceed in size.

    References:
      Dewan, SPRKD, arXiv 2607.23346, 2026.
    """
    return (score.lambda_max > 0) & (score.lambda_min < -share * score.lambda_max)


def certified(score: SaddleScore) -> Bool[Array, "*batch"]:
    r"""Whether there is negative curvature for certain: :math:`\lambda_{min} + \lVert Hv - \lambda v \rVert_2 < 0`.

    A symmetric matrix has an eigenvalue within the residual of an approximate pair, so that one of them is negative
    even if Lanczos had not converged. Combine a published rule with it as ``ratio_rule(score) & certified(score)``. It
    speaks of the data of the Hessian only: negative curvature of a small batch need not be that of the whole set.

    Args:
      score: of one point, or of several stacked.

    References:
      Parlett, The Symmetric Eigenvalue Problem, 1998, theorem 4.5.1.
    """
    return score.lambda_min + score.residual < 0


def gated_rule(
    score: SaddleScore,
    *,
    min_strength: Scalar = 0.3,
    max_gradient_norm: Scalar = 0.02,
    lipschitz: Scalar | None = None,
) -> Bool[Array, "*batch"]:
    r"""A strong saddle as this library means it: strong, stationary and certified.

    * Strong: :math:`|\lambda_{min}| \ge s_0 \lambda_{max}`.
    * Stationary: curvature promises a larger decrease than the gradient,
      :math:`\frac{2}{3} |\lambda_{min}|^3 / \rho^2 > \lVert g \rVert^2 / (2 \lVert H \rVert_2)`, where the
      Hessian's Lipschitz constant :math:`\rho` is known, which changes with no scale; otherwise the gradient's norm is
      below a bound, which does.
    * Certified, as in :func:`certified`: a value that has not converged passes no rule.

    Args:
      score: of one point, or of several stacked.
      min_strength: :math:`s_0`.
      max_gradient_norm: bound of the gradient's norm, not used with lipschitz.
      lipschitz: :math:`\rho`, such as :math:`\lVert (H(\theta + hv) - H(\theta)) v \rVert_2 / h` along the eigenvector
        v of the smallest eigenvalue.

    References:
      Nesterov, Polyak, Cubic regularization of Newton method and its global performance, 2006, for the decrease along
      negative curvature; the bound .02 of the gradient is that of Dewan, SPRKD, arXiv 2607.23346, 2026.
    """
    if lipschitz is None:
        stationary = score.gradient_norm <= max_gradient_norm
    else:
        # The roots of both sides, multiplied out: no power overflows, and a quadratic, of constant 0, divides nothing.
        below = jnp.maximum(-score.lambda_min, 0)
        bend = jnp.sqrt(below) * jnp.sqrt(jnp.maximum(below, score.lambda_max))
        stationary = (2 / 3**0.5) * below * bend > score.gradient_norm * lipschitz
    return (score.strength >= min_strength) & stationary & certified(score)


# Repository


def add(directory: str | os.PathLike, teacher: str, step: int, params: Params, score: SaddleScore) -> None:
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
    checkpoints.save(path / teacher, step, {"params": params}, meta=meta, keep=sys.maxsize)


def entries(directory: str | os.PathLike) -> list[Entry]:
    """Lists the snapshots of a repository by teacher and step, with their scores; no weights are read.

    Args:
      directory: of the repository.

    Raises:
      ValueError: if there is no repository or nothing in it, or a score has changed since it was written.
    """
    path = _repository(directory)
    found = []
    for folder in _teachers(path):
        for step_path in sorted(folder.iterdir(), key=lambda entry: (len(entry.name), entry.name)):
            if match := re.fullmatch(r"step_(\d{8,})", step_path.name):
                found.append(Entry(folder.name, int(match[1]), _score(_manifest(step_path)["meta"])))
    if not found:
        raise ValueError(f"the repository {directory} is empty: fill it with add while a teacher trains.")
    return found


def read(directory: str | os.PathLike, teacher: str, step: int, like: Params) -> Snapshot:
    """Reads one snapshot, which is exactly what was added.

    Args:
      directory: of the repository.
      teacher: as in :func:`entries`.
      step: as in :func:`entries`.
      like: the structure of the parameters, as arrays or ``jax.ShapeDtypeStruct``.

    Raises:
      ValueError: if there is no such repository or snapshot, any byte of it has changed, or the parameters have another
        structure than ``like``.
    """
    path = _repository(directory)
    teachers = [folder.name for folder in _teachers(path)]
    if teacher not in teachers:
        raise ValueError(f"there is no teacher {teacher!r} in {directory}; there are {teachers}.")
    restored = checkpoints.restore(path / teacher, {"params": like}, step=step)
    assert restored is not None  # with a step, it is there or an error
    return Snapshot(teacher, step, _score(restored.meta), restored.tree["params"])


# From many snapshots to one


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


# From teacher to student


def recruit(
    teacher_params: Params,
    student_params: Params,
    *,
    form: Literal["select", "crop"] = "select",
    rescale: bool = True,
    order: Sequence[str] | None = None,
) -> Params:
    r"""Gives the parameters of a teacher the shapes of a student, layer by layer.

    * ``"select"`` keeps the channels of largest :math:`\lVert w_{in} \rVert_2 \lVert w_{out} \rVert_2`, in their order,
      and cuts the same ones out of the layer after, also where a flatten lies between: its rows are (height, width,
      channel). As this commutes with whatever acts on each channel, ReLU and pooling included, a student with room for
      all channels that are not zero computes what the teacher does. Then each kernel, as a matrix of fan-in times
      outputs, gets the teacher's spectral norm: the largest factor by which a layer stretches its input. A part of a
      matrix never has a larger one than the whole, so kernels only grow; and channels with neither incoming nor
      outgoing weights do not count in it, as they would in a mean over weights or filters, so that where only such
      channels are left out, nothing is rescaled. Biases and normalisation stay as they are: they belong to the scale
      that this restores.
    * ``"crop"``, as published, takes the centre of each array, and puts zeros around it where the student is larger. It
      ignores which channel a row belongs to, and rescales nothing.

    With equal shapes both are the identity.

    Args:
      teacher_params: of linen's Dense, Conv and normalisation layers, one after the other. Residual sums, which keep
        channels of several layers in step, do not show in parameters, and "select" breaks them.
      student_params: whose shapes and types are wanted, as arrays or ``jax.ShapeDtypeStruct``; same layers, same names.
      form: "select" or "crop".
      rescale: whether "select" gives kernels the teacher's spectral norm.
      order: for "select", all layers as paths such as "Conv_0" or "block/Dense_0", from input to output. By default,
        linen's own names in the order of their numbers, Conv before Dense, and the n-th normalisation layer after the
        n-th of these.

    Returns:
      The student's parameters.

    Raises:
      ValueError: naming the layers, if the networks differ in depth, in inputs, or (for "select") in classes; if a
        layer is of another kind, or of a student wider than its teacher; or if the order cannot be told.

    References:
      Dewan, SPRKD, arXiv 2607.23346, 2026, for "crop". Xu et al., `Initializing Models with Larger Ones
      <https://arxiv.org/abs/2311.18823>`_, 2024, select channels at equal distances. Li et al., `Pruning Filters for
      Efficient ConvNets <https://arxiv.org/abs/1608.08710>`_, 2017, rank them by norm. Yoshida, Miyato, `Spectral Norm
      Regularization <https://arxiv.org/abs/1705.10941>`_, 2017, for a convolution's norm as that of the matrix.
    """
    return recruit_with_state(
        (teacher_params, {}), (student_params, {}), form=form, rescale=rescale, order=order
    )[0]


def recruit_with_state(
    teacher: tuple[Params, ModelState],
    student: tuple[Params, ModelState],
    *,
    form: Literal["select", "crop"] = "select",
    rescale: bool = True,
    order: Sequence[str] | None = None,
) -> tuple[Params, ModelState]:
    """As :func:`recruit`, with the running statistics of normalisation layers, whose channels are kept along.

    Channels are compared after normalisation, by incoming weights times ``scale / sqrt(var)``.

    Args:
      teacher: parameters and model state.
      student: parameters and model state, for their shapes and types.
      form: as in :func:`recruit`.
      rescale: as in :func:`recruit`.
      order: as in :func:`recruit`.

    Returns:
      The student's parameters and model state.

    Raises:
      ValueError: as :func:`recruit`.
    """
    if form not in ("select", "crop"):
        raise ValueError(f"form must be 'select' or 'crop', got {form!r}.")
    source, target = ({"params": params, **state} for params, state in (teacher, student))
    _check_layers(source, target)
    wanted, treedef = jax.tree_util.tree_flatten_with_path(target)
    if form == "crop":
        leaves = map(_crop, jax.tree.leaves(source), (leaf.shape for _, leaf in wanted))
    else:
        found = _select(_layers(source), _layers(target), order, rescale)
        leaves = (found[_address(path)[0]][_address(path)[1:]] for path, _ in wanted)
    arrays = [jnp.asarray(leaf, like.dtype) for leaf, (_, like) in zip(leaves, wanted, strict=True)]
    result = treedef.unflatten(arrays)
    return result.pop("params"), result


# Details of scores and of the repository


def _float32(x: Any) -> Array:
    return jnp.asarray(x, jnp.float32)


def _sums(score: SaddleScore, sums: Sums) -> tuple[Array, Array]:
    if sums not in ("extreme", "density"):
        raise ValueError(f"sums must be 'extreme' or 'density', got {sums!r}.")
    if sums == "extreme":
        return score.extreme_negative, score.extreme_positive
    return score.density_negative, score.density_positive


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


def _manifest(step_path: Any) -> dict[str, Any]:
    try:
        return files.read_sealed(step_path / "manifest.json")
    except OSError as error:
        raise ValueError(f"{step_path} is damaged, its manifest cannot be read: remove it.") from error


def _score(meta: dict[str, Any]) -> SaddleScore:
    return SaddleScore(**{name: jnp.float32(value) for name, value in meta["score"].items()})


# Details of aggregation


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
    first, *others = ((item, _shapes(item.params)) for item in snapshots)
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


def _shapes(tree: Params) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.shape(leaf) for path, leaf in leaves}


def _mean(trees: Sequence[Params]) -> Params:
    def mean(*leaves):
        wide = jnp.promote_types(jnp.result_type(*leaves), jnp.float32)
        return jnp.mean(jnp.stack([jnp.asarray(leaf, wide) for leaf in leaves]), 0)

    return jax.tree.map(mean, *trees)


# Details of recruiting. A layer is a dict of NumPy arrays, or of shapes, by address: ("params", "kernel"), ...

_Layer: TypeAlias = dict[tuple[str, ...], Any]
_Kernel: TypeAlias = tuple[
    str, np.ndarray, tuple[int, ...]
]  # name, the teacher's kernel, the student's shape
_KERNEL = ("params", "kernel")


def _address(path: tuple[Any, ...]) -> tuple[str, str, str]:
    """Layer, collection and name of an array, as in "block/Conv_0", "params", "kernel"."""
    collection, *layer, name = (jax.tree_util.keystr((part,), simple=True) for part in path)
    return "/".join(layer), collection, name


def _layers(variables: Mapping[str, Any]) -> dict[str, _Layer]:
    layers: dict[str, _Layer] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        layer, *address = _address(path)
        layers.setdefault(layer, {})[tuple(address)] = leaf
    return layers


def _check_layers(source: Mapping[str, Any], target: Mapping[str, Any]) -> None:
    """Raises unless teacher and student have the same arrays with the same numbers of axes."""
    teacher, student = _shapes(source), _shapes(target)
    if only := teacher.keys() ^ student.keys():
        missing = [
            f"{name.removeprefix('params/')} only in the {'teacher' if name in teacher else 'student'}"
            for name in sorted(only)
        ]
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"recruit needs networks of the same layers, and has {', '.join(missing[:3])}{more}: "
            "give the student the depth of its teacher."
        )
    for name, shape in teacher.items():
        if len(shape) != len(student[name]):
            raise ValueError(
                f"recruit needs the same kinds of layers, and {name.removeprefix('params/')} is {shape} in the teacher "
                f"and {student[name]} in the student."
            )


def _crop(array: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The centre of an array, with zeros around it where the shape is larger."""
    array = np.asarray(array)
    starts = [max(old - new, 0) // 2 for old, new in zip(array.shape, shape, strict=True)]
    centre = array[tuple(slice(start, start + new) for start, new in zip(starts, shape, strict=True))]
    missing = [new - old for old, new in zip(centre.shape, shape, strict=True)]
    return np.pad(centre, [(m // 2, m - m // 2) for m in missing])


def _select(
    teacher: dict[str, _Layer], student: dict[str, _Layer], order: Sequence[str] | None, rescale: bool
) -> dict[str, _Layer]:
    """The teacher's layers in the student's shapes, their channels chosen one layer after the other."""
    for name, layer in teacher.items():
        _check_kind(name, layer)
    teacher = {
        name: {a: np.asarray(x, np.float64) for a, x in layer.items()} for name, layer in teacher.items()
    }
    blocks = list(_blocks(_ordered(teacher, order), teacher))
    kernels = [(name, teacher[name][_KERNEL], student[name][_KERNEL].shape) for name, _ in blocks]
    _check_ends(kernels)
    positions = [_positions(*pair) for pair in itertools.pairwise(kernels)]
    found: dict[str, _Layer] = {}
    rows = np.arange(kernels[0][1].shape[-2])
    for i, (name, kernel, wanted) in enumerate(kernels):
        norms = blocks[i][1]
        if i + 1 < len(kernels):
            kept = _channels(kernel, [teacher[norm] for norm in norms], kernels[i + 1][1], wanted[-1])
        else:
            kept = np.arange(kernel.shape[-1])
        part = kernel[..., rows, :][..., kept]
        if rescale:
            part = part * _ratio(_spectral_norm(kernel), _spectral_norm(part))
        found[name] = {a: part if a == _KERNEL else x[kept] for a, x in teacher[name].items()}
        found |= {norm: {a: x[kept] for a, x in teacher[norm].items()} for norm in norms}
        if i + 1 < len(kernels):  # a flatten is (height, width, channel)
            rows = (np.arange(positions[i])[:, None] * kernel.shape[-1] + kept).ravel()
    return found


def _check_kind(name: str, layer: _Layer) -> None:
    names = {address[-1] for address in layer}
    shapes = {address[-1]: np.shape(array) for address, array in layer.items()}
    width = shapes["kernel"][-1:] if "kernel" in names else next(iter(shapes.values()))
    vectors = all(shape == width for key, shape in shapes.items() if key != "kernel")
    known = names <= {"kernel", "bias"} if "kernel" in names else names <= {"scale", "bias", "mean", "var"}
    if not known or not vectors or len(width) != 1 or len(shapes.get("kernel", (0, 0))) < 2:
        raise ValueError(
            f"select knows Dense, Conv and normalisation layers, and {name} holds "
            f"{', '.join(f'{key} {shape}' for key, shape in shapes.items())}: pass form='crop'."
        )


def _ordered(layers: dict[str, _Layer], order: Sequence[str] | None) -> list[str]:
    """Names of the layers from input to output, as given or as linen's own names tell."""
    if order is not None:
        if sorted(order) != sorted(layers):
            raise ValueError(
                f"order must hold each layer once, which are {sorted(layers)}, got {list(order)}."
            )
        return list(order)
    kinds: dict[str, list[str]] = {"conv": [], "dense": [], "norm": []}
    for name, layer in layers.items():
        kinds["norm" if _KERNEL not in layer else "dense" if layer[_KERNEL].ndim == 2 else "conv"].append(
            name
        )
    convs, denses, norms = (sorted(names, key=_number) for names in kinds.values())
    kernels = convs + denses
    plain = all(len({re.sub(r"_\d+$", "", name) for name in names}) <= 1 for names in kinds.values())
    numbered = all(re.search(r"_\d+$", name) for names in kinds.values() for name in names if len(names) > 1)
    counted = len(norms) in (0, len(convs), len(kernels) - 1, len(kernels))
    if not (plain and numbered and counted) or any("/" in name for name in layers):
        raise ValueError(
            f"the order of the layers {sorted(layers)} does not show in their names: pass order=, their names from "
            "input to output."
        )
    return [name for i, kernel in enumerate(kernels) for name in [kernel, *norms[i : i + 1]]]


def _number(name: str) -> int:
    return int(name.rpartition("_")[2]) if re.search(r"_\d+$", name) else 0


def _blocks(order: list[str], layers: dict[str, _Layer]) -> Iterator[tuple[str, list[str]]]:
    """Each layer with a kernel, and the normalisation layers on its channels."""
    places = [i for i, name in enumerate(order) if _KERNEL in layers[name]]
    if not places or places[0] != 0:
        raise ValueError(f"select needs a Dense or Conv layer first, got the order {order}.")
    for start, end in zip(places, [*places[1:], len(order)], strict=True):
        name, *norms = order[start:end]
        channels = layers[name][_KERNEL].shape[-1]
        for norm in norms:
            if (got := len(next(iter(layers[norm].values())))) != channels:
                raise ValueError(
                    f"{norm} has {got} channels and {name}, the layer before it, {channels}: pass order=, the names "
                    "of all layers from input to output."
                )
        yield name, norms


def _check_ends(kernels: list[_Kernel]) -> None:
    """Raises unless windows, inputs and classes are the same in both networks, and the student is nowhere wider."""
    for name, kernel, wanted in kernels:
        if kernel.shape[:-2] != wanted[:-2]:
            raise ValueError(
                f"{name} has a window of {kernel.shape[:-2]} in the teacher and {wanted[:-2]} in the student: "
                "give both the same."
            )
        if wanted[-1] > kernel.shape[-1]:
            raise ValueError(
                f"{name} has {wanted[-1]} channels in the student and {kernel.shape[-1]} in its teacher, and select "
                "has none to add: narrow the student, or pass form='crop', which puts zeros there."
            )
    first, kernel, wanted = kernels[0]
    if kernel.shape[-2] != wanted[-2]:
        raise ValueError(
            f"{first} takes {kernel.shape[-2]} inputs in the teacher and {wanted[-2]} in the student: give both "
            "the same images."
        )
    last, kernel, wanted = kernels[-1]
    if kernel.shape[-1] != wanted[-1]:
        raise ValueError(
            f"{last}, the last layer, has {kernel.shape[-1]} classes in the teacher and {wanted[-1]} in the student: "
            "give both the same."
        )


def _positions(before: _Kernel, layer: _Kernel) -> int:
    """How many inputs of a layer come from each channel of the layer before: above 1 after a flatten."""
    (old_name, old, narrow), (name, kernel, wanted) = before, layer
    flattened = kernel.ndim == 2 and old.ndim > 2
    positions = kernel.shape[-2] // old.shape[-1] if flattened else 1
    if kernel.shape[-2] != positions * old.shape[-1] or wanted[-2] != positions * narrow[-1]:
        raise ValueError(
            f"{name} takes {kernel.shape[-2]} inputs in the teacher and {wanted[-2]} in the student, which do not "
            f"follow from the {old.shape[-1]} and {narrow[-1]} channels of {old_name}: select needs layers one "
            "after the other, not in groups, on maps of one size."
        )
    return positions


def _channels(kernel: np.ndarray, norms: list[_Layer], outgoing: np.ndarray, count: int) -> np.ndarray:
    """Rising indices of the channels of largest incoming times outgoing 2-norm."""
    channels = kernel.shape[-1]
    norm = np.linalg.norm(kernel.reshape(-1, channels), axis=0)
    norm = norm * np.linalg.norm(outgoing.reshape(-1, channels, outgoing.shape[-1]), axis=(0, 2))
    for layer in norms:
        arrays = {address[-1]: array for address, array in layer.items()}
        norm = norm * np.abs(arrays.get("scale", 1.0)) / np.sqrt(arrays.get("var", 1.0) + 1e-5)
    return np.sort(np.argsort(-norm, kind="stable")[:count])


def _spectral_norm(kernel: np.ndarray) -> float:
    """Of the kernel as a matrix from its window and inputs to its outputs."""
    return float(np.linalg.norm(kernel.reshape(-1, kernel.shape[-1]), 2))


def _ratio(wanted: float, have: float) -> float:
    return wanted / have if have > 0 else 1.0
