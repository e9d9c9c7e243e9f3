"""A network as the operations that an integer runtime has: a product, its bias and its activation are one of them.

The network is traced, calls are inlined, and what logits don't need is left out. Then operations on the images fall
into steps: a convolution or dense layer with the factors and biases per channel behind it, which is how a batch
normalisation is folded, and an activation; an addition with its activation; a mean over positions; and whatever moves
values without changing them.
"""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

MOVES = {
    *("reshape", "squeeze", "expand_dims", "transpose", "broadcast_in_dim", "slice", "rev", "copy"),
    *("convert_element_type", "reduce_window_max", "stop_gradient"),
}
"""Operations after which values are on the grid that they were on before."""

AFFINE = {"mul", "add", "sub", "div"}
CALLS = ("call_jaxpr", "fun_jaxpr", "jaxpr")
CONTROL = {"cond", "scan", "while"}


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
    """A value that is known when the network is traced."""

    value: Any


class Node(NamedTuple):
    """One operation: its equation, and where its arguments come from and its results go."""

    eqn: Any
    inputs: tuple[int | Constant, ...]
    outputs: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of the primitive."""
        return self.eqn.primitive.name

    def __call__(self, arguments: Sequence[Any]) -> Sequence[Any]:
        """Computes it."""
        found = self.eqn.primitive.bind(*arguments, **self.eqn.params)
        return found if self.eqn.primitive.multiple_results else [found]


class Step(NamedTuple):
    """Some operations on the images that a runtime has as one.

    Attributes:
      kind: ``conv``, ``depthwise``, ``dense``, ``add``, ``mean`` or ``move``.
      node: the first of them.
      affine: what follows per channel: the operation, where its other argument is from, and whether that is the first.
      limits: of the activation, as 0 and infinity for ReLU; None without one.
      output: of the last of them.
    """

    kind: str
    node: Node
    affine: tuple[tuple[str, int | Constant, bool], ...]
    limits: tuple[float, float] | None
    output: int


class Graph(NamedTuple):
    """A network in steps.

    Attributes:
      weights: where each leaf of the weights is.
      images: where the images are.
      constants: operations on the weights alone, in order.
      steps: operations on the images, in order.
      output: where the logits are.
    """

    weights: tuple[int, ...]
    images: int
    constants: tuple[Node, ...]
    steps: tuple[Step, ...]
    output: int

    @property
    def points(self) -> tuple[str, ...]:
        """Kinds of the steps whose results are rounded, the images first."""
        return ("images", *(step.kind for step in self.steps if step.kind != "move"))


def trace(function: Callable[[Any, Any], Any], weights: Any, images: jax.ShapeDtypeStruct) -> Graph:
    """The steps of ``(weights, images) -> logits``.

    Raises:
      ValueError: if an operation on the images is none of those above; the message names it.
    """
    closed = jax.make_jaxpr(function)(weights, images)
    fresh, nodes = itertools.count(), list[Node]()
    arguments = [next(fresh) for _ in closed.jaxpr.invars]
    (output,) = _inline(closed, arguments, nodes, fresh)
    if isinstance(output, Constant) or not closed.jaxpr.eqns:
        raise ValueError("the logits of this network don't depend on its images.")
    nodes = _live(nodes, output)
    dynamic = {arguments[-1]}
    for node in nodes:
        if dynamic & set(_places(node)):
            dynamic |= set(node.outputs)
    constants = tuple(node for node in nodes if not dynamic & set(node.outputs))
    moving = [node for node in nodes if dynamic & set(node.outputs)]
    made_by = {out: node for node in constants for out in node.outputs}
    steps = tuple(_steps(moving, dynamic, made_by, output))
    return Graph(tuple(arguments[:-1]), arguments[-1], constants, steps, output)


def _inline(
    closed: Any, arguments: Sequence[int | Constant], nodes: list[Node], fresh: Iterator[int]
) -> list[int | Constant]:
    """Appends the operations of a program, and of all that it calls; returns where its results are."""
    places = dict(zip(closed.jaxpr.invars, arguments, strict=True))
    places |= {var: Constant(value) for var, value in zip(closed.jaxpr.constvars, closed.consts, strict=True)}

    def place(atom: Any) -> int | Constant:
        return Constant(atom.val) if isinstance(atom, core.Literal) else places[atom]

    for eqn in closed.jaxpr.eqns:
        inputs = tuple(place(atom) for atom in eqn.invars)
        inner = next((eqn.params[name] for name in CALLS if name in eqn.params), None)
        if inner is not None and eqn.primitive.name not in CONTROL:
            inner = inner if isinstance(inner, core.ClosedJaxpr) else core.ClosedJaxpr(inner, ())
            outputs: Any = _inline(inner, inputs, nodes, fresh)
        else:
            outputs = tuple(next(fresh) for _ in eqn.outvars)
            nodes.append(Node(eqn, inputs, outputs))
        places |= dict(zip(eqn.outvars, outputs, strict=True))
    return [place(atom) for atom in closed.jaxpr.outvars]


def _places(node: Node) -> list[int]:
    return [place for place in node.inputs if not isinstance(place, Constant)]


def _live(nodes: Sequence[Node], output: int | Constant) -> list[Node]:
    """The operations that the output needs."""
    needed, kept = {output}, []
    for node in reversed(nodes):
        if needed & set(node.outputs):
            kept.append(node)
            needed |= set(_places(node))
    return kept[::-1]


def _steps(
    nodes: Sequence[Node], dynamic: set[int], made_by: Mapping[int, Node], output: int | Constant
) -> Iterator[Step]:
    """Operations on the images in steps."""
    uses = Counter(place for node in nodes for place in _places(node)) + Counter([output])
    users = {place: node for node in nodes for place in _places(node)}
    taken: set[int] = set()  # outputs of operations that belong to an earlier step
    for node in nodes:
        if taken & set(node.outputs):
            continue
        kind, affine, limits, at = _kind(node, dynamic), [], None, node.outputs[0]
        while kind != "move" and uses[at] == 1 and at in users:
            after = users[at]
            if limits is None and (factor := _per_channel(after, at, dynamic, made_by)):
                if kind == "add" or (kind == "mean" and after.name not in ("div", "mul")):
                    break
                affine.append(factor)
            elif (bound := _activation(after, at, limits)) is not None:
                limits = bound
            else:
                break
            taken |= set(after.outputs)
            at = after.outputs[0]
        yield Step(kind, node, tuple(affine), limits, at)


def _kind(node: Node, dynamic: set[int]) -> str:
    """What kind of step begins with an operation; a ValueError if none does."""
    moving = [place in dynamic for place in node.inputs]
    if node.name == "conv_general_dilated" and moving == [True, False]:
        options, channels = node.eqn.params, node.eqn.invars[0].aval.shape[-1]
        plain = options["lhs_dilation"] == options["rhs_dilation"] == (1,) * len(options["lhs_dilation"])
        spec = options["dimension_numbers"]
        if plain and (spec.lhs_spec, spec.rhs_spec) == ((0, 3, 1, 2), (3, 2, 0, 1)):
            groups = options["feature_group_count"]
            if groups in (1, channels):
                return (
                    "depthwise" if groups == channels else "conv"
                )  # as runtimes call that of one channel, too
    if node.name == "dot_general" and moving == [True, False]:
        (left, right), batch = node.eqn.params["dimension_numbers"]
        if left == (node.eqn.invars[0].aval.ndim - 1,) and right == (0,) and batch == ((), ()):
            return "dense"
    if node.name == "add" and moving == [True, True]:
        return "add"
    if node.name == "reduce_sum":
        return "mean"
    if node.name in MOVES or (node.name == "pad" and not moving[1]):
        return "move"
    shapes = ", ".join(str(var.aval.str_short()) for var in node.eqn.invars)
    raise ValueError(
        f"fake quantisation has no rule for {node.name} of {shapes}; it knows convolutions in NHWC and dense layers, "
        "with batch normalisation behind them, ReLU, ReLU6, additions, means and max-pooling."
    )


def _per_channel(
    node: Node, at: int, dynamic: set[int], made_by: Mapping[int, Node]
) -> tuple[str, int | Constant, bool] | None:
    """The operation with something that is constant but for the last axis, if it is one."""
    if node.name not in AFFINE:
        return None
    first = node.inputs[0] != at
    other = node.inputs[0 if first else 1]
    if not isinstance(other, Constant) and other in dynamic:
        return None
    shape = node.eqn.invars[0 if first else 1].aval.shape
    if math.prod(shape[:-1]) != 1 and not isinstance(other, Constant):  # broadcast before
        source = made_by.get(other)
        if source is None or source.name != "broadcast_in_dim":
            return None
        inner = source.eqn.invars[0].aval.shape
        last = source.eqn.params["broadcast_dimensions"][-1:] == (len(shape) - 1,)
        if math.prod(inner[:-1]) != 1 or (inner and inner[-1] != 1 and not last):
            return None
        return node.name, source.inputs[0], first
    return None if math.prod(shape[:-1]) != 1 else (node.name, other, first)


def _activation(node: Node, at: int, limits: tuple[float, float] | None) -> tuple[float, float] | None:
    """Limits after an operation that is, or completes, a ReLU or ReLU6; None if it is neither."""
    values = [
        np.asarray(place.value).item()
        for place in node.inputs
        if isinstance(place, Constant) and np.size(place.value) == 1
    ]
    if node.name == "max" and values == [0] and limits is None:
        return 0.0, math.inf
    if node.name == "min" and len(values) == 1 and limits == (0.0, math.inf):
        return 0.0, values[0]
    return None


def folded(affine: Sequence[tuple[str, Any, bool]]) -> tuple[Any, Any]:
    """Factor and offset per channel of ``x -> factor * x + offset``, from operations with known arguments."""
    factor: Any = jnp.ones(1, jnp.float32)
    offset: Any = jnp.zeros(1, jnp.float32)
    for name, value, first in affine:
        value = jnp.ravel(jnp.asarray(value, jnp.float32))
        if name == "mul":
            factor, offset = factor * value, offset * value
        elif name == "add":
            offset = offset + value
        elif name == "sub":
            sign = -1 if first else 1
            factor, offset = sign * factor, sign * (offset - value)
        elif first:
            raise ValueError("fake quantisation has no rule for a constant that is divided by activations.")
        else:
            factor, offset = factor / value, offset / value
    return factor, offset
