"""Integrated gradients, with a fixed number of nodes or as many as an example needs."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

ScoreFn: TypeAlias = Callable[..., Array]
"""``score_fn(inputs)``, or ``score_fn(inputs, targets)`` where targets are given: one number per example."""

UNIT = {"cpu": 64, "default": 512}
"""Gradients that :func:`adaptive_integrated_gradients` takes at once: what caches hold, and what fills a device."""


class Attributions(NamedTuple):
    """What every input value contributes to a score, and how well the contributions add up."""

    values: Float[Array, "..."]  # of the inputs' shape; signed, in units of the score
    difference: Float[Array, "*classes batch"]  # score of the input minus that of its baseline
    residual: Float[
        Array, "*classes batch"
    ]  # sum of the values minus the difference; 0 for the exact integral
    nodes: Int[Array, " batch"]  # gradients that were taken

    @property
    def relative_residual(self) -> Float[Array, "*classes batch"]:
        """The size of the residual over that of the difference."""
        return jnp.abs(self.residual) / jnp.maximum(jnp.abs(self.difference), jnp.finfo(jnp.float32).tiny)


def quadrature(num_steps: int, rule: str) -> tuple[Float[np.ndarray, " nodes"], Float[np.ndarray, " nodes"]]:
    """Nodes in [0, 1] and their weights, which add up to 1.

    Gauss–Legendre is exact for polynomials of degree 2·num_steps - 1 and best for smooth scores. Where ReLUs put kinks
    into the path, every rule's error falls like one over the nodes, and equal steps, as the midpoint and the trapezoid
    rule take, do as well.

    Raises:
      ValueError: if there are too few nodes for the rule, or it has another name.
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
    inputs: Shaped[Array, "batch ..."],
    baselines: Float[Array, "..."] | None = None,
    *,
    targets: PyTree | None = None,
    num_steps: int = 50,
    rule: str = "midpoint",
    chunk_size: int | None = None,
) -> Attributions:
    r"""Attributes a score to the input values, along the straight path from a baseline.

    .. math:: a_i = (x_i - x'_i) \int_0^1 \frac{\partial f}{\partial x_i}\big(x' + \alpha (x - x')\big) \, d\alpha,
              \qquad \sum_i a_i = f(x) - f(x')

    Pure and traceable: call it inside a jitted function that is handed the network's variables, where one loop over
    the nodes is compiled. (Called from Python, that loop is compiled anew for each new ``score_fn``.)

    Args:
      score_fn: one number per example, of which one example's depends on no other: a network in evaluation mode. For
        the logit of a class, :func:`class_score` of the network.
      inputs: float32; normalised, as the network takes them.
      baselines: where the paths begin; zero by default, which is the mean image if inputs are normalised. With one
        more axis in front, the mean over several: uniform noise there gives expected gradients.
      targets: handed to ``score_fn`` beside the inputs, as they are: labels.
      num_steps: gradients per path.
      rule: of :func:`quadrature`.
      chunk_size: nodes of one gradient, which needs as many times the memory. By default 1 on a CPU, where more are not
        faster, and 8 elsewhere.

    Raises:
      ValueError: for inputs without a gradient, baselines of another shape, too few nodes, a score that is not one
        floating-point number per example; and for a NaN, unless traced.

    References:
      Sundararajan, Taly, Yan, `Axiomatic Attribution for Deep Networks <https://arxiv.org/abs/1703.01365>`_, 2017,
      section 3. Erion et al., `Improving performance of deep learning models with axiomatic attribution priors
      <https://arxiv.org/abs/1906.10670>`_, 2021, for several baselines.
    """
    score = check_score(score_fn, inputs, targets)

    def gradient(points):
        return jax.grad(lambda x: jnp.sum(score(x)))(points)

    return _integrate(score, gradient, inputs, baselines, num_steps, rule, chunk_size)


def integrated_gradients_of_classes(
    logits_fn: Callable[[Array], Float[Array, "batch classes"]],
    inputs: Shaped[Array, "batch ..."],
    baselines: Float[Array, "..."] | None = None,
    *,
    num_steps: int = 50,
    rule: str = "midpoint",
    chunk_size: int | None = None,
) -> Attributions:
    """The :func:`integrated_gradients` of every class's logit, in an axis in front; one forward pass serves all.

    Args:
      logits_fn: the logits of a batch of inputs.
      inputs: as there, with the other arguments.
      baselines: as there.
      num_steps: as there.
      rule: as there.
      chunk_size: as there.
    """
    _check_inputs(inputs)
    shape = jax.eval_shape(logits_fn, inputs)
    if getattr(shape, "ndim", 0) != 2 or shape.shape[0] != inputs.shape[0]:
        raise ValueError(
            f"logits_fn needs to return [batch, classes] for {inputs.shape[0]} inputs, got {shape}."
        )
    every = jnp.eye(shape.shape[1], dtype=shape.dtype)

    def gradient(points):
        logits, pull = jax.vjp(logits_fn, points)
        return jax.vmap(lambda one: pull(jnp.broadcast_to(one, logits.shape))[0])(every)

    return _integrate(lambda x: logits_fn(x).T, gradient, inputs, baselines, num_steps, rule, chunk_size)


def adaptive_integrated_gradients(
    score_fn: ScoreFn,
    inputs: Shaped[Array, "batch ..."],
    baselines: Float[Array, "..."] | None = None,
    *,
    targets: PyTree | None = None,
    bound: float = 0.05,
    first: int = 16,
    most: int = 256,
    unit: int | None = None,
) -> Attributions:
    """:func:`integrated_gradients` by the trapezoid rule, whose steps are halved where the sum is still off.

    All examples take ``first`` steps. Those whose relative residual exceeds ``bound`` take twice as many, and again,
    up to ``most``. Halving reuses every gradient, and both ends of the path, whose scores the residual needs, are
    nodes. In each round the gradients that are missing, of whichever examples, are taken ``unit`` at a time: nothing
    waits for the slowest example of a batch.

    A residual under the bound does not prove a map of that error, since errors of pixels cancel in the sum.

    Args:
      score_fn: as in :func:`integrated_gradients`. It is called with ``unit`` rows, whose targets come with them: it
        may not close over what belongs to a row.
      inputs: as there.
      baselines: one per input.
      targets: a pytree of arrays with a row for each input.
      bound: of the relative residual.
      first: steps of every example.
      most: steps of none exceed this, whatever its residual; ``first`` times a power of two.
      unit: gradients at once; :data:`UNIT` by default, and never more than ``batch * first``.

    Raises:
      ValueError: as there, and for a bound below 0 or steps that do not fit together.
    """
    if bound < 0 or first < 1 or most < first or most % first or (most // first).bit_count() != 1:
        raise ValueError(
            "adaptive integrated gradients need a bound of 0 or more and most = first times a power of two, got "
            f"bound={bound}, first={first}, most={most}; .05, 16 and 256 are usual."
        )
    inputs = _check_inputs(inputs)
    baselines = _baselines(baselines, inputs)
    if baselines.shape != inputs.shape:
        raise ValueError(
            "adaptive integrated gradients take one baseline per input; average several outside."
        )
    check_score(score_fn, inputs, targets)
    unit = min(unit or UNIT.get(jax.default_backend(), UNIT["default"]), len(inputs) * first)
    path = _Path(score_fn, inputs, baselines, targets, unit)

    everyone = jnp.arange(len(inputs))
    sums, scores = path.add(
        jnp.zeros_like(inputs), everyone, len(inputs), first + 1, lambda j: j / first, ends=first
    )
    difference = scores[1] - scores[0]

    def measured(sums, steps):
        values = path.delta * sums / _as_rows(steps, sums)
        residual = jnp.sum(values.reshape(len(values), -1), axis=-1) - difference
        return values, residual, jnp.abs(residual) > bound * jnp.abs(difference)

    def refine(state):
        sums, steps, now, off = state
        order, count = jnp.argsort(~off, stable=True), jnp.sum(off)
        sums, _ = path.add(sums, order, count, now, lambda j: (j + 0.5) / now)
        steps = jnp.where(off, 2 * steps, steps)
        return sums, steps, 2 * now, off & measured(sums, steps)[2]

    steps = jnp.full(len(inputs), first)
    state = sums, steps, jnp.asarray(first), measured(sums, steps)[2]
    sums, steps, _, _ = jax.lax.while_loop(lambda s: jnp.any(s[3]) & (s[2] < most), refine, state)
    values, residual, _ = measured(sums, steps)
    return _checked(Attributions(values, difference, residual, steps + 1))


def class_score(logits_fn: Callable[[Array], Float[Array, "batch classes"]]) -> ScoreFn:
    """The logit of a class, as a score with labels for targets: ``class_score(f)(inputs, labels)``.

    Labels may be the true ones or those that the network predicts, ``jnp.argmax(f(inputs), -1)``.
    """

    def score(inputs: Shaped[Array, "batch ..."], labels: Int[Array, " batch"]) -> Float[Array, " batch"]:
        return jnp.take_along_axis(logits_fn(inputs), labels[:, None], axis=-1)[:, 0]

    return score


class _Path(NamedTuple):
    """The straight paths of a batch, on which gradients are taken in units of examples and nodes."""

    score_fn: ScoreFn
    inputs: Float[Array, "batch ..."]
    baselines: Float[Array, "batch ..."]
    targets: PyTree
    unit: int

    @property
    def delta(self) -> Float[Array, "batch ..."]:
        return self.inputs - self.baselines

    def add(
        self,
        sums: Float[Array, "batch ..."],
        order: Int[Array, " batch"],
        count: Any,
        per_example: Any,
        node_of: Callable[[Array], Array],
        ends: int | None = None,
    ) -> tuple[Float[Array, "batch ..."], Float[Array, "2 batch"]]:
        """Adds the gradients of the first ``count`` examples of an order at ``per_example`` nodes each.

        With ``ends``, the number of the last node, first and last count half, and their scores come back.
        """
        total = count * per_example

        def more(i, carry):
            sums, scores = carry
            place = i * self.unit + jnp.arange(self.unit)
            example = order[jnp.minimum(place // per_example, len(order) - 1)]
            number, valid = place % per_example, place < total
            score, gradient = self._at(example, node_of(number))
            weight = valid.astype(sums.dtype)
            if ends is not None:
                for end, last in enumerate((0, ends)):
                    scores = scores.at[end, example].add(jnp.where(valid & (number == last), score, 0))
                weight = jnp.where((number == 0) | (number == ends), weight / 2, weight)
            return sums.at[example].add(_as_rows(weight, gradient) * gradient), scores

        start = sums, jnp.zeros((2, len(order)), jnp.float32)
        return jax.lax.fori_loop(0, (total + self.unit - 1) // self.unit, more, start)

    def _at(self, example: Array, node: Array) -> tuple[Array, Array]:
        begin, end = self.baselines[example], self.inputs[example]
        score = _with(self.score_fn, jax.tree.map(lambda rows: rows[example], self.targets))
        points = begin + _as_rows(node, end).astype(end.dtype) * (end - begin)
        values, pull = jax.vjp(score, points)
        return values.astype(jnp.float32), pull(jnp.ones_like(values))[0]


def _integrate(score, gradient, inputs, baselines, num_steps, rule, chunk_size) -> Attributions:
    """The loop over nodes, and over baselines where there are several."""
    inputs = _check_inputs(inputs)
    baselines = _baselines(baselines, inputs)
    nodes, weights = quadrature(num_steps, rule)
    default = 1 if jax.default_backend() == "cpu" else 8
    wanted = min(default if chunk_size is None else chunk_size, num_steps)
    if wanted < 1:
        raise ValueError(f"chunk_size needs to be 1 node or more, got {chunk_size}.")
    chunks = -(-num_steps // wanted)
    size = -(-num_steps // chunks)
    rest = chunks * size - num_steps  # of no weight
    nodes, weights = (
        jnp.asarray(np.pad(x, (0, rest)).reshape(chunks, size), inputs.dtype) for x in (nodes, weights)
    )

    reached = score(inputs)

    def from_one(baseline):
        delta = inputs - baseline

        def at(node):
            return gradient(baseline + node * delta)

        def add(total, chunk):
            if size == 1:
                return total + chunk[1][0] * at(chunk[0][0]), None
            return total + jnp.tensordot(chunk[1], jax.vmap(at)(chunk[0]), 1), None

        total = jnp.zeros(jax.eval_shape(gradient, inputs).shape, inputs.dtype)
        total, _ = jax.lax.scan(add, total, (nodes, weights))
        values = jnp.broadcast_to(delta, total.shape) * total
        difference = reached - score(baseline)
        attributed = jnp.sum(values.reshape(*difference.shape, -1), axis=-1)
        return values, difference, attributed - difference

    count = 1
    if baselines.ndim > inputs.ndim:
        count = len(baselines)
        found = jax.tree.map(lambda x: jnp.mean(x, axis=0), jax.lax.map(from_one, baselines))
    else:
        found = from_one(baselines)
    values, difference, residual = found
    return _checked(Attributions(values, difference, residual, jnp.full(len(inputs), count * num_steps)))


# Checks


def _check_inputs(inputs: Array) -> Array:
    if not jnp.issubdtype(jnp.result_type(inputs), jnp.floating) or not jnp.ndim(inputs):
        raise ValueError(
            "attributions need a batch of floating-point inputs, of which there is a gradient, got "
            f"{jnp.result_type(inputs)}{list(jnp.shape(inputs))}: normalise images first, and attribute to embeddings "
            "rather than to tokens."
        )
    return jnp.asarray(inputs)


def _baselines(baselines: Array | None, inputs: Array) -> Array:
    if baselines is None:
        return jnp.zeros_like(inputs)
    if jnp.shape(baselines)[-inputs.ndim :] != inputs.shape or jnp.ndim(baselines) > inputs.ndim + 1:
        raise ValueError(
            f"baselines need the shape of the inputs, {list(inputs.shape)}, or one axis more in front of it, got "
            f"{list(jnp.shape(baselines))}: write jnp.broadcast_to(baseline, inputs.shape) if all share one."
        )
    return jnp.asarray(baselines, inputs.dtype)


def check_score(score_fn: ScoreFn, inputs: Array, targets: PyTree) -> Callable[[Array], Array]:
    """The score as a function of inputs alone, after a look at what it returns."""
    score = _with(score_fn, targets)
    inputs = _check_inputs(inputs)
    shape = jax.eval_shape(score, inputs)
    one_each = isinstance(shape, jax.ShapeDtypeStruct) and shape.shape == inputs.shape[:1]
    if not one_each or not jnp.issubdtype(shape.dtype, jnp.floating):
        raise ValueError(
            f"score_fn needs to return one floating-point number per example, [{inputs.shape[0]}] here, got {shape}: "
            "attributions.class_score(logits_fn) makes one of logits, with labels as targets."
        )
    return score


def _with(score_fn: ScoreFn, targets: PyTree) -> Callable[[Array], Array]:
    return score_fn if targets is None else lambda inputs: score_fn(inputs, targets)


def _checked(found: Attributions) -> Attributions:
    """As it is; refuses what is not finite where that can be seen."""
    if not isinstance(found.residual, Tracer):
        bad: Bool[np.ndarray, "*classes batch"] = ~np.isfinite(np.asarray(found.residual))
        if bad.any():
            raise ValueError(
                f"the scores or gradients of {bad.sum()} of {bad.size} examples are not finite, of the first at index "
                f"{tuple(map(int, np.argwhere(bad)[0]))}: the network has diverged or its input is bad."
            )
    return found


def _as_rows(numbers: Array, like: Array) -> Array:
    """One number per example, to be multiplied with arrays of examples."""
    return numbers.reshape(numbers.shape + (1,) * (like.ndim - numbers.ndim))
