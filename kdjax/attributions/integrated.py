"""Integrated gradients, at a fixed number of nodes or as many as each example needs."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree

ScoreFn: TypeAlias = Callable[..., Array]
"""``score_fn(inputs)``, or ``score_fn(inputs, targets)`` where targets are given: one number per example."""

UNIT = {"cpu": 64, "default": 512}
"""Gradients that :func:`adaptive_integrated_gradients` computes at once: what fits a CPU's cache or fills a device."""


_NODES_AT_ONCE = {"cpu": 1, "default": 8}  # nodes per gradient; more are not faster on a CPU


class Attributions(NamedTuple):
    """The contribution of every input value to a score, and the completeness residual of their sum."""

    values: PyTree  # of the inputs' structure and shapes; signed, in units of the score
    difference: Float[Array, " batch"]  # score of the input minus that of its baseline
    residual: Float[Array, " batch"]  # sum of all values minus the difference; 0 for the exact integral
    nodes: Int[Array, " batch"]  # gradients computed

    @property
    def relative_residual(self) -> Float[Array, " batch"]:
        """|residual| / |difference|."""
        return jnp.abs(self.residual) / jnp.maximum(jnp.abs(self.difference), jnp.finfo(jnp.float32).tiny)


def quadrature(num_steps: int, rule: str) -> tuple[Float[np.ndarray, " nodes"], Float[np.ndarray, " nodes"]]:
    """Nodes in [0, 1] and their weights, which sum to 1.

    Gauss–Legendre is exact for polynomials of degree 2·num_steps - 1 and best for smooth scores. Where ReLUs put kinks
    into the path, the error of every rule falls like one over the nodes, and the equal steps of the midpoint and
    trapezoid rules do as well.

    Raises:
      ValueError: if there are too few nodes for the rule, or the rule is unknown.
    """
    fewest = 2 if rule == "trapezoid" else 1
    if num_steps < fewest:
        raise ValueError(
            f"the {rule} rule needs num_steps of {fewest} or more, got {num_steps}; 50 is usual."
        )
    if rule == "midpoint":
        return (np.arange(num_steps) + 0.5) / num_steps, np.full(num_steps, 1 / num_steps)
    if rule == "gauss_legendre":
        nodes, weights = np.polynomial.legendre.leggauss(num_steps)
        return (nodes + 1) / 2, weights / 2
    if rule == "trapezoid":
        weights = np.full(num_steps, 1 / (num_steps - 1))
        weights[[0, -1]] /= 2
        return np.linspace(0, 1, num_steps), weights
    raise ValueError(f"rule needs to be 'midpoint', 'gauss_legendre' or 'trapezoid', got {rule!r}.")


def integrated_gradients(
    score_fn: ScoreFn,
    inputs: PyTree,
    baselines: PyTree = None,
    *,
    targets: PyTree | None = None,
    num_steps: int = 50,
    rule: str = "midpoint",
) -> Attributions:
    r"""Attributes a score to the input values, along the straight path from a baseline.

    .. math:: a_i = (x_i - x'_i) \int_0^1 \frac{\partial f}{\partial x_i}\big(x' + \alpha (x - x')\big) \, d\alpha,
              \qquad \sum_i a_i = f(x) - f(x')

    Pure and traceable: call it inside a jitted function that takes the network's variables. (Called from Python, it
    compiles its loop over nodes again for each new ``score_fn``.)

    Args:
      score_fn: one number per example that depends on no other example: a network in evaluation mode. For the logit
        of a class, :func:`class_score` of the network.
      inputs: float32 [batch, ...], normalised as the network expects; or a pytree of such arrays, such as a dict of an
        image and a spectrum, whose contributions sum to the difference together.
      baselines: start of the paths, like the inputs, or one number; zero by default, the mean image if inputs are
        normalised. With one more leading axis, attributions are averaged over several; uniform noise gives expected
        gradients.
      targets: second argument of ``score_fn``, such as labels.
      num_steps: gradients per path.
      rule: of :func:`quadrature`.

    Raises:
      ValueError: for inputs without examples or without a gradient, baselines of another shape, too few nodes, a score
        that is not one floating-point number per example; and for a NaN, unless traced.

    References:
      Sundararajan, Taly, Yan, `Axiomatic Attribution for Deep Networks <https://arxiv.org/abs/1703.01365>`_, 2017,
      section 3. Erion et al., `Improving performance of deep learning models with axiomatic attribution priors
      <https://arxiv.org/abs/1906.10670>`_, 2021, for several baselines.
    """
    score = check_score(score_fn, inputs, targets)

    def gradient(points):
        return jax.grad(lambda x: jnp.sum(score(x)))(points)

    return _integrate(score, gradient, inputs, baselines, num_steps, rule)


def adaptive_integrated_gradients(
    score_fn: ScoreFn,
    inputs: PyTree,
    baselines: PyTree = None,
    *,
    targets: PyTree | None = None,
    tolerance: float = 0.05,
    min_nodes: int = 16,
    max_nodes: int = 256,
) -> Attributions:
    """:func:`integrated_gradients` by the trapezoid rule, with steps halved until the residual is small.

    All examples start with ``min_nodes`` steps. Those whose relative residual exceeds ``tolerance`` double them, up to
    ``max_nodes``. Halving a step reuses every gradient, and both ends of the path, whose scores the residual needs, are
    nodes: n steps are n + 1 gradients. Each round packs the missing gradients of all examples into full batches, so
    none waits for the slowest example.

    A residual within the tolerance does not bound the error of the map, since errors of pixels cancel in the sum.

    Args:
      score_fn: as in :func:`integrated_gradients`. It is called with rows of several examples and their targets, so it
        may not close over per-example data.
      inputs: as in :func:`integrated_gradients`.
      baselines: one per input.
      targets: a pytree of arrays with a row for each input.
      tolerance: of the relative residual.
      min_nodes: steps of every example.
      max_nodes: most steps of an example, whatever its residual; ``min_nodes`` times a power of two.

    Raises:
      ValueError: as :func:`integrated_gradients`, and for a negative tolerance or numbers of nodes that do not match.
    """
    doublings = max_nodes // max(min_nodes, 1)
    if tolerance < 0 or min_nodes < 1 or max_nodes != doublings * min_nodes or doublings.bit_count() != 1:
        raise ValueError(
            "adaptive_integrated_gradients needs tolerance >= 0 and max_nodes = min_nodes times a power of two, got "
            f"tolerance={tolerance}, min_nodes={min_nodes}, max_nodes={max_nodes}; .05, 16 and 256 are usual."
        )
    inputs = check_inputs(inputs)
    baselines, several = _baselines(baselines, inputs)
    if several:
        raise ValueError(
            "adaptive_integrated_gradients takes one baseline per input: average over several yourself."
        )
    batch = batch_of(inputs)
    _check_rows(targets, batch)
    check_score(score_fn, inputs, targets)
    unit = min(UNIT.get(jax.default_backend(), UNIT["default"]), batch * min_nodes)
    path = _Path(score_fn, inputs, baselines, targets, unit)

    everyone, nothing = jnp.arange(batch), jax.tree.map(jnp.zeros_like, inputs)
    sums, scores = path.add(nothing, everyone, batch, min_nodes + 1, lambda j: j / min_nodes, ends=min_nodes)
    difference = scores[1] - scores[0]

    def measured(sums, steps):
        values = jax.tree.map(lambda d, s: d * s / _as_rows(steps, s), path.delta, sums)
        residual = _total(values) - difference
        return values, residual, jnp.abs(residual) > tolerance * jnp.abs(difference)

    def refine(state):
        sums, steps, now, off = state
        order, count = jnp.argsort(~off, stable=True), jnp.sum(off)
        sums, _ = path.add(sums, order, count, now, lambda j: (j + 0.5) / now)
        steps = jnp.where(off, 2 * steps, steps)
        return sums, steps, 2 * now, off & measured(sums, steps)[2]

    steps = jnp.full(batch, min_nodes)
    state = sums, steps, jnp.asarray(min_nodes), measured(sums, steps)[2]
    sums, steps, _, _ = jax.lax.while_loop(lambda s: jnp.any(s[3]) & (s[2] < max_nodes), refine, state)
    values, residual, _ = measured(sums, steps)
    return _checked(Attributions(values, difference, residual, steps + 1), inputs)


def class_score(logits_fn: Callable[[PyTree], Float[Array, "batch classes"]]) -> ScoreFn:
    """The logit of a class, as a score whose targets are labels: ``class_score(f)(inputs, labels)``.

    Labels are integers [batch], the true or the predicted ones, ``jnp.argmax(f(inputs), -1)``. A negative label is
    void: its score and map are zero. A label out of range raises a ValueError, or makes the score NaN if it is traced.

    Raises:
      ValueError: from the score, for logits or labels of another shape or dtype, and for a label out of range.
    """

    def score(inputs: PyTree, labels: ArrayLike) -> Float[Array, " batch"]:
        logits = logits_fn(inputs)
        _check_logits(logits, batch_of(inputs))
        _check_labels(labels, *logits.shape)
        labels = jnp.asarray(labels)
        chosen = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[:, None], axis=-1)[:, 0]
        return jnp.where(labels < 0, 0, chosen)

    return score


class _Path(NamedTuple):
    """The straight paths of a batch; gradients at (example, node) pairs are computed ``unit`` at a time."""

    score_fn: ScoreFn
    inputs: PyTree
    baselines: PyTree
    targets: PyTree
    unit: int

    @property
    def delta(self) -> PyTree:
        return jax.tree.map(jnp.subtract, self.inputs, self.baselines)

    def add(
        self,
        sums: PyTree,
        order: Int[Array, " batch"],
        count: Any,
        per_example: Any,
        node_of: Callable[[Array], Array],
        ends: int | None = None,
    ) -> tuple[PyTree, Float[Array, "2 batch"]]:
        """Adds the gradients of the first ``count`` examples of an order at ``per_example`` nodes each.

        With ``ends``, the index of the last node, the first and last node count half and their scores are returned.
        """
        total = count * per_example

        def more(i, carry):
            sums, scores = carry
            place = i * self.unit + jnp.arange(self.unit)
            example = order[jnp.minimum(place // per_example, len(order) - 1)]
            number, valid = place % per_example, place < total
            score, gradient = self._at(example, node_of(number))
            weight = valid.astype(jnp.float32)
            if ends is not None:
                for end, last in enumerate((0, ends)):
                    scores = scores.at[end, example].add(jnp.where(valid & (number == last), score, 0))
                weight = jnp.where((number == 0) | (number == ends), weight / 2, weight)
            sums = jax.tree.map(
                lambda s, g: s.at[example].add(_as_rows(weight, g).astype(g.dtype) * g), sums, gradient
            )
            return sums, scores

        start = sums, jnp.zeros((2, len(order)), jnp.float32)
        return jax.lax.fori_loop(0, (total + self.unit - 1) // self.unit, more, start)

    def _at(self, example: Array, node: Array) -> tuple[Array, PyTree]:
        begin, end, targets = jax.tree.map(
            lambda rows: jnp.asarray(rows)[example], (self.baselines, self.inputs, self.targets)
        )
        score = _with(self.score_fn, targets)
        points = jax.tree.map(lambda b, e: b + _as_rows(node, e).astype(e.dtype) * (e - b), begin, end)
        values, pull = jax.vjp(score, points)
        return values.astype(jnp.float32), pull(jnp.ones_like(values))[0]


def _integrate(score, gradient, inputs, baselines, num_steps, rule) -> Attributions:
    """The loop over nodes, and over baselines if there are several."""
    inputs = check_inputs(inputs)
    baselines, several = _baselines(baselines, inputs)
    nodes, weights = quadrature(num_steps, rule)
    at_once = _NODES_AT_ONCE.get(jax.default_backend(), _NODES_AT_ONCE["default"])
    chunks = -(-num_steps // min(at_once, num_steps))
    size = -(-num_steps // chunks)
    rest = chunks * size - num_steps  # padding of weight zero
    nodes, weights = (
        jnp.asarray(np.pad(x, (0, rest)).reshape(chunks, size), jnp.result_type(*jax.tree.leaves(inputs)))
        for x in (nodes, weights)
    )

    reached = score(inputs)

    def from_one(baseline):
        delta = jax.tree.map(jnp.subtract, inputs, baseline)

        def at(node):
            return gradient(jax.tree.map(lambda b, d: b + node.astype(d.dtype) * d, baseline, delta))

        def add(total, chunk):
            place, weight = chunk
            if size == 1:
                part = jax.tree.map(lambda g: weight[0].astype(g.dtype) * g, at(place[0]))
            else:
                part = jax.tree.map(
                    lambda g: jnp.tensordot(weight.astype(g.dtype), g, 1), jax.vmap(at)(place)
                )
            return jax.tree.map(jnp.add, total, part), None

        total = jax.tree.map(lambda g: jnp.zeros(g.shape, g.dtype), jax.eval_shape(gradient, inputs))
        total, _ = jax.lax.scan(add, total, (nodes, weights))
        values = jax.tree.map(jnp.multiply, delta, total)
        difference = reached - score(baseline)
        return values, difference, _total(values) - difference

    if several:
        found = jax.tree.map(lambda x: jnp.mean(x, axis=0), jax.lax.map(from_one, baselines))
    else:
        found = from_one(baselines)
    values, difference, residual = found
    taken = jnp.full(batch_of(inputs), (several or 1) * num_steps)
    return _checked(Attributions(values, difference, residual, taken), inputs)


def _total(values: PyTree) -> Array:
    """The sum of all values of each example, over all arrays."""
    sums = jax.tree.map(lambda v: jnp.sum(v, axis=tuple(range(1, v.ndim))), values)
    return functools.reduce(jnp.add, jax.tree.leaves(sums))


# Checks


def batch_of(inputs: PyTree) -> int:
    """The number of examples."""
    return jnp.shape(jax.tree.leaves(inputs)[0])[0]


def check_inputs(inputs: PyTree) -> PyTree:
    """The inputs as JAX arrays; raises a ValueError unless floating-point, with equal numbers of examples."""
    found = jax.tree_util.tree_leaves_with_path(inputs)
    for path, leaf in found or [((), np.zeros(0))]:
        dtype, shape = jnp.result_type(leaf), jnp.shape(leaf)
        if not jnp.issubdtype(dtype, jnp.floating) or not shape or not shape[0]:
            raise ValueError(
                "attributions need a batch of floating-point inputs with at least one example, got "
                f"inputs{jax.tree_util.keystr(path)} of {dtype}{list(shape)}: normalise images first, attribute to "
                "embeddings rather than to tokens, and pass other per-example data as targets."
            )
        if shape[0] != batch_of(inputs):
            raise ValueError(
                f"attributions need equally many examples in each array, got {batch_of(inputs)} and, in "
                f"inputs{jax.tree_util.keystr(path)}, {shape[0]}."
            )
    return jax.tree.map(jnp.asarray, inputs)


def _baselines(baselines: PyTree, inputs: PyTree) -> tuple[PyTree, int]:
    """The baselines, broadcast to the inputs or with one more leading axis; and its length, or 0."""
    if baselines is None or (jax.tree_util.all_leaves([baselines]) and jnp.ndim(baselines) == 0):
        baselines = jax.tree.map(lambda _: 0 if baselines is None else baselines, inputs)
    if jax.tree.structure(baselines) != jax.tree.structure(inputs):
        raise ValueError(
            f"baselines need the structure of the inputs, {jax.tree.structure(inputs)}, got "
            f"{jax.tree.structure(baselines)}."
        )
    pairs = zip(*map(jax.tree.leaves, (baselines, inputs)), strict=True)
    counts = {len(b) for b, x in pairs if jnp.shape(b)[1:] == x.shape and len(b)}

    def fit(path, x, baseline):
        shape = jnp.shape(baseline)
        if shape not in ((), x.shape) and (len(counts) != 1 or shape != (*counts, *x.shape)):
            raise ValueError(
                f"baselines{jax.tree_util.keystr(path)} need the shape of the inputs, {list(x.shape)}, or one more "
                f"leading axis of one length, got {list(shape)}: write jnp.broadcast_to(baseline, inputs.shape) if "
                "all examples share one."
            )
        return jnp.broadcast_to(jnp.asarray(baseline, x.dtype), (*counts, *x.shape))

    return jax.tree_util.tree_map_with_path(fit, inputs, baselines), sum(counts)


def check_score(score_fn: ScoreFn, inputs: PyTree, targets: PyTree) -> Callable[[PyTree], Array]:
    """The score as a function of inputs alone; raises a ValueError unless it returns one number per example."""
    inputs, score = check_inputs(inputs), _with(score_fn, targets)
    batch, shape = batch_of(inputs), jax.eval_shape(score, inputs)
    one_each = isinstance(shape, jax.ShapeDtypeStruct) and shape.shape == (batch,)
    if not one_each or not jnp.issubdtype(shape.dtype, jnp.floating):
        raise ValueError(
            f"score_fn needs to return one floating-point number per example, [{batch}] here, got {shape}: "
            "attributions.class_score(logits_fn) makes one of logits, with labels as targets."
        )
    return score


def _with(score_fn: ScoreFn, targets: PyTree) -> Callable[[PyTree], Array]:
    return score_fn if targets is None else lambda inputs: score_fn(inputs, targets)


def _check_logits(logits: Any, batch: int) -> Any:
    if getattr(logits, "ndim", 0) != 2 or logits.shape[0] != batch:
        raise ValueError(
            f"logits_fn needs to return [batch, classes] for {batch} inputs, got {kind_of(logits)}."
        )
    return logits


def _check_labels(labels: ArrayLike, batch: int, classes: int) -> None:
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer) or jnp.shape(labels) != (batch,):
        raise ValueError(
            f"labels must be integers [{batch}], one per example, got {kind_of(labels)}: write labels.astype(int) "
            "for whole numbers, and labels[:, 0] for a column."
        )
    if not isinstance(labels, Tracer) and (largest := np.asarray(labels).max()) >= classes:
        raise ValueError(
            f"labels must be below {classes}, the number of logits, got {largest}; a negative label is void."
        )


def _check_rows(targets: PyTree, batch: int) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(targets):
        if jnp.shape(leaf)[:1] != (batch,):
            raise ValueError(
                f"adaptive_integrated_gradients needs targets{jax.tree_util.keystr(path)} with a row for each of "
                f"{batch} inputs, got {kind_of(leaf)}."
            )


def kind_of(array: Any) -> str:
    """Dtype and shape of an array, or the name of another type, for error messages."""
    return f"{array.dtype}{list(array.shape)}" if hasattr(array, "shape") else type(array).__name__


def _checked(found: Attributions, inputs: PyTree) -> Attributions:
    """The attributions; raises a ValueError that names the cause if they are known not to be finite."""
    if isinstance(found.residual, Tracer) or (bad := ~np.isfinite(np.asarray(found.residual))).sum() == 0:
        return found
    first = tuple(map(int, np.argwhere(bad)[0]))
    if not all(np.isfinite(np.asarray(x[first[-1]])).all() for x in jax.tree.leaves(inputs)):
        reason = "its input holds a NaN or an infinity"
    elif not np.isfinite(found.difference[first]):
        reason = "the score of it or of its baseline is not finite: check what score_fn returns there"
    else:
        reason = "its scores are finite, but a gradient between them is not, as for a square root at zero"
    raise ValueError(
        f"{bad.sum()} of {bad.size} attributions are not finite, the first at index {first}: {reason}."
    )


def _as_rows(numbers: Array, like: Array) -> Array:
    """One number per example, reshaped to multiply arrays of examples."""
    return numbers.reshape(numbers.shape + (1,) * (like.ndim - numbers.ndim))
