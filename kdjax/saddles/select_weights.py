"""A teacher's parameters in the shapes of a student of the same depth."""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.saddles.snapshots import shapes_of
from kdjax.types import Params

_Layer: TypeAlias = dict[str, Any]  # arrays or shapes by name: kernel, bias, scale
_Kernel: TypeAlias = tuple[str, np.ndarray, tuple[int, ...]]  # layer, teacher's kernel, student's shape


def select_weights(
    teacher_params: Params,
    student_params: Params,
    *,
    form: Literal["select", "crop"] = "select",
    order: Sequence[str] | None = None,
) -> Params:
    r"""Gives the parameters of a teacher the shapes of a student, layer by layer.

    * ``"select"`` keeps the channels of largest :math:`\lVert w_{in} \rVert_2 \lVert w_{out} \rVert_2`, in their order,
      and the matching inputs of the next layer, also across a flatten, whose rows are (height, width, channel). This
      commutes with whatever acts on each channel, such as ReLU and pooling, so a student with room for all non-zero
      channels computes the teacher's function. Each kernel, as a matrix of fan-in times outputs, is then scaled to the
      teacher's spectral norm: the largest factor by which a layer stretches its input. A submatrix never has a larger
      spectral norm than the matrix, so kernels only grow; and zero channels do not contribute to it, so leaving out
      only zero channels rescales nothing. Biases and normalisation parameters stay as they are.
    * ``"crop"``, as published, takes the centre of each array and pads with zeros where the student is larger. It does
      not match channels between layers and rescales nothing.

    With equal shapes both are the identity.

    Args:
      teacher_params: of linen's Dense, Conv and normalisation layers in sequence. Residual sums, which tie the channels
        of several layers, cannot be seen in the parameters, and "select" breaks them.
      student_params: arrays or ``jax.ShapeDtypeStruct`` of the wanted shapes and types; same layers, same names.
      form: "select" or "crop".
      order: for "select", all layers as paths such as "Conv_0" or "block/Dense_0", from input to output. By default,
        linen's own names in the order of their numbers, Conv before Dense, and the n-th normalisation layer after the
        n-th of these.

    Returns:
      The student's parameters.

    Raises:
      ValueError: naming the layers, if the networks differ in depth, in inputs, or (for "select") in classes; if a
        layer is of another kind or wider than the teacher's; or if the order cannot be inferred.

    References:
      Dewan, SPRKD, arXiv 2607.23346, 2026, for "crop". Xu et al., `Initializing Models with Larger Ones
      <https://arxiv.org/abs/2311.18823>`_, 2024, select channels at equal distances. Li et al., `Pruning Filters for
      Efficient ConvNets <https://arxiv.org/abs/1608.08710>`_, 2017, rank them by norm. Yoshida, Miyato, `Spectral Norm
      Regularization <https://arxiv.org/abs/1705.10941>`_, 2017, for a convolution's norm as that of the matrix.
    """
    if form not in ("select", "crop"):
        raise ValueError(f"form must be 'select' or 'crop', got {form!r}.")
    _check_layers(teacher_params, student_params)
    wanted, treedef = jax.tree_util.tree_flatten_with_path(student_params)
    if form == "crop":
        leaves = map(_crop, jax.tree.leaves(teacher_params), (leaf.shape for _, leaf in wanted))
    else:
        found = _select(_layers(teacher_params), _layers(student_params), order)
        leaves = (found[layer][name] for layer, name in (_address(path) for path, _ in wanted))
    return treedef.unflatten(
        [jnp.asarray(leaf, like.dtype) for leaf, (_, like) in zip(leaves, wanted, strict=True)]
    )


def _address(path: tuple[Any, ...]) -> tuple[str, str]:
    """Layer and name of an array, as in "block/Conv_0", "kernel"."""
    *layer, name = (jax.tree_util.keystr((part,), simple=True) for part in path)
    return "/".join(layer), name


def _layers(params: Params) -> dict[str, _Layer]:
    layers: dict[str, _Layer] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        layer, name = _address(path)
        layers.setdefault(layer, {})[name] = leaf
    return layers


def _check_layers(teacher_params: Params, student_params: Params) -> None:
    """Raises a ValueError unless teacher and student have the same arrays with the same numbers of axes."""
    teacher, student = shapes_of(teacher_params), shapes_of(student_params)
    if only := teacher.keys() ^ student.keys():
        there = {True: "teacher", False: "student"}
        missing = [f"{name} only in the {there[name in teacher]}" for name in sorted(only)]
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"select_weights needs networks with the same layers, but {', '.join(missing[:3])}{more}: "
            "give the student the depth of its teacher."
        )
    for name, shape in teacher.items():
        if len(shape) != len(student[name]):
            raise ValueError(
                f"select_weights needs the same kinds of layers, but {name} is {shape} in the teacher "
                f" and {student[name]} in the student."
            )


def _crop(array: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The centre of an array, with zeros around it where the shape is larger."""
    array = np.asarray(array)
    starts = [max(old - new, 0) // 2 for old, new in zip(array.shape, shape, strict=True)]
    centre = array[tuple(slice(start, start + new) for start, new in zip(starts, shape, strict=True))]
    missing = [new - old for old, new in zip(centre.shape, shape, strict=True)]
    return np.pad(centre, [(m // 2, m - m // 2) for m in missing])


def _select(
    teacher: dict[str, _Layer], student: dict[str, _Layer], order: Sequence[str] | None
) -> dict[str, _Layer]:
    """The teacher's layers in the student's shapes, selected layer by layer."""
    for name, layer in teacher.items():
        _check_kind(name, layer)
    teacher = {
        name: {a: np.asarray(x, np.float64) for a, x in layer.items()} for name, layer in teacher.items()
    }
    blocks = list(_blocks(_ordered(teacher, order), teacher))
    kernels = [(name, teacher[name]["kernel"], student[name]["kernel"].shape) for name, _ in blocks]
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
        part = part * _ratio(_spectral_norm(kernel), _spectral_norm(part))
        found[name] = {a: part if a == "kernel" else x[kept] for a, x in teacher[name].items()}
        found |= {norm: {a: x[kept] for a, x in teacher[norm].items()} for norm in norms}
        if i + 1 < len(kernels):  # a flatten is (height, width, channel)
            rows = (np.arange(positions[i])[:, None] * kernel.shape[-1] + kept).ravel()
    return found


def _check_kind(name: str, layer: _Layer) -> None:
    names = layer.keys()
    shapes = {key: np.shape(array) for key, array in layer.items()}
    width = shapes["kernel"][-1:] if "kernel" in names else next(iter(shapes.values()))
    vectors = all(shape == width for key, shape in shapes.items() if key != "kernel")
    known = names <= {"kernel", "bias"} if "kernel" in names else names <= {"scale", "bias"}
    if not known or not vectors or len(width) != 1 or len(shapes.get("kernel", (0, 0))) < 2:
        raise ValueError(
            f"form='select' supports Dense, Conv and normalisation layers, but {name} holds "
            f"{', '.join(f'{key} {shape}' for key, shape in shapes.items())}: pass form='crop'."
        )


def _ordered(layers: dict[str, _Layer], order: Sequence[str] | None) -> list[str]:
    """Names of the layers from input to output, as given or inferred from linen's names."""
    if order is not None:
        if sorted(order) != sorted(layers):
            raise ValueError(
                f"order must list each layer once, which are {sorted(layers)}, got {list(order)}."
            )
        return list(order)
    kinds: dict[str, list[str]] = {"conv": [], "dense": [], "norm": []}
    for name, layer in layers.items():
        kind = "norm" if "kernel" not in layer else "dense" if layer["kernel"].ndim == 2 else "conv"
        kinds[kind].append(name)
    convs, denses, norms = (sorted(names, key=_number) for names in kinds.values())
    kernels = convs + denses
    plain = all(len({re.sub(r"_\d+$", "", name) for name in names}) <= 1 for names in kinds.values())
    numbered = all(re.search(r"_\d+$", name) for names in kinds.values() for name in names if len(names) > 1)
    counted = len(norms) in (0, len(convs), len(kernels) - 1, len(kernels))
    if not (plain and numbered and counted) or any("/" in name for name in layers):
        raise ValueError(
            f"the order of the layers {sorted(layers)} cannot be inferred from their names: pass order=, their "
            "names from input to output."
        )
    return [name for i, kernel in enumerate(kernels) for name in [kernel, *norms[i : i + 1]]]


def _number(name: str) -> int:
    return int(name.rpartition("_")[2]) if re.search(r"_\d+$", name) else 0


def _blocks(order: list[str], layers: dict[str, _Layer]) -> Iterator[tuple[str, list[str]]]:
    """Each layer with a kernel, and the normalisation layers that follow it."""
    places = [i for i, name in enumerate(order) if "kernel" in layers[name]]
    if not places or places[0] != 0:
        raise ValueError(f"form='select' needs a Dense or Conv layer first, got the order {order}.")
    for start, end in zip(places, [*places[1:], len(order)], strict=True):
        name, *norms = order[start:end]
        channels = layers[name]["kernel"].shape[-1]
        for norm in norms:
            if (got := len(next(iter(layers[norm].values())))) != channels:
                raise ValueError(
                    f"{norm} has {got} channels, but {name} before it has {channels}: pass order=, the names "
                    "of all layers from input to output."
                )
        yield name, norms


def _check_ends(kernels: list[_Kernel]) -> None:
    """Raises a ValueError unless windows, inputs and classes agree and no layer of the student is wider."""
    for name, kernel, wanted in kernels:
        if kernel.shape[:-2] != wanted[:-2]:
            raise ValueError(
                f"{name} has a window of {kernel.shape[:-2]} in the teacher and {wanted[:-2]} in the student: "
                "give both the same."
            )
        if wanted[-1] > kernel.shape[-1]:
            raise ValueError(
                f"{name} has {wanted[-1]} channels in the student and {kernel.shape[-1]} in its teacher: narrow "
                "the student, or pass form='crop', which pads with zeros."
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
    """Inputs of a layer per channel of the layer before: above 1 after a flatten."""
    (old_name, old, narrow), (name, kernel, wanted) = before, layer
    flattened = kernel.ndim == 2 and old.ndim > 2
    positions = kernel.shape[-2] // old.shape[-1] if flattened else 1
    if kernel.shape[-2] != positions * old.shape[-1] or wanted[-2] != positions * narrow[-1]:
        raise ValueError(
            f"{name} takes {kernel.shape[-2]} inputs in the teacher and {wanted[-2]} in the student, which "
            f"do not match the {old.shape[-1]} and {narrow[-1]} channels of {old_name}: form='select' needs layers in "
            "sequence, without groups, on feature maps of one size."
        )
    return positions


def _channels(kernel: np.ndarray, norms: list[_Layer], outgoing: np.ndarray, count: int) -> np.ndarray:
    """Ascending indices of the channels of largest incoming times outgoing 2-norm."""
    channels = kernel.shape[-1]
    norm = np.linalg.norm(kernel.reshape(-1, channels), axis=0)
    norm = norm * np.linalg.norm(outgoing.reshape(-1, channels, outgoing.shape[-1]), axis=(0, 2))
    for layer in norms:
        norm = norm * np.abs(layer.get("scale", 1.0))
    return np.sort(np.argsort(-norm, kind="stable")[:count])


def _spectral_norm(kernel: np.ndarray) -> float:
    """Of the kernel as a matrix of window and inputs times outputs."""
    return float(np.linalg.norm(kernel.reshape(-1, kernel.shape[-1]), 2))


def _ratio(wanted: float, have: float) -> float:
    return wanted / have if have > 0 else 1.0
