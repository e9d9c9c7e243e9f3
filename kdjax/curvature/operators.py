"""Hessians and Gauss-Newton matrices as their products with vectors."""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from kdjax.curvature.vectors import check_arrays, check_structure, select, size_of, structure_of, widen
from kdjax.types import ApplyFn, Batch, ModelState, Params

# Products in full float32 where a GPU or TPU would round their factors to 10 or 7 bits: a Krylov method finds the
# curvature of the rounding otherwise. Whatever names a precision or a narrow dtype itself is left as it is.
_full_precision = functools.partial(jax.default_matmul_precision, "float32")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["rule", "structure"]
)
@dataclasses.dataclass(frozen=True)
class Operator:
    """A symmetric matrix as its product with a vector: call it on a pytree like the parameters.

    It is itself a pytree, so it can be an argument of a jitted function, which compiles once for all operators made
    from the same loss with arrays of the same shapes. Vectors are taken and given in float32 (or float64).

    Attributes:
      rule: ``(arrays, vector) -> product``.
      arrays: what the rule needs beside the vector.
      structure: of the vectors.
    """

    rule: Callable[..., Any]
    arrays: PyTree
    structure: Hashable

    def __call__(self, vector: PyTree) -> PyTree:
        """The product of the matrix with the vector.

        Raises:
          ValueError: if the vector is not like the parameters.
        """
        check_structure("an operator", vector, self.structure)  # type: ignore[arg-type]
        return _multiply(self, widen(vector))


def hessian(
    loss: Callable[..., Array],
    params: Params,
    *arguments: PyTree,
    microbatch: int | None = None,
    axis_name: str | None = None,
    only: str | Sequence[str] | None = None,
) -> Operator:
    r"""The Hessian of a loss at fixed parameters, for many products.

    The gradient is linearised once and its tangent map reused, which saves every product the evaluation of the gradient
    itself. It takes the memory of the activations as long as the operator lives.

    The loss must be a function of its arguments alone and a mean over examples: batch statistics would make the
    Hessian of a batch another thing than the mean over its parts, and dropout would make it another in every product.
    :func:`evaluation_loss` builds one from a network. At the kinks of ReLU and max-pooling there is curvature that no
    derivative sees; claims about curvature are safer with smooth activations.

    Args:
      loss: ``(params, *arguments) -> scalar``. Hand over arrays as arguments rather than in its closure, and the same
        function every time: then it is compiled once, and no data stay in the compilation cache.
      params: pytree of floating-point arrays; widened to float32 if they are narrower.
      *arguments: of the loss. The first is the batch.
      microbatch: examples at a time, for a batch whose activations do not fit in memory: every product then walks the
        leading axis of the batch (of its arrays that have one) in parts weighted by their size, so that a smaller
        last one counts as much as it should. Nothing is kept in between, so each product evaluates the gradient too.
      axis_name: of the mapped axis whose devices hold equal parts of the batch; products are averaged over it. Under
        ``shard_map`` that is right with ``check_vma=False``, as in :mod:`kdjax.parallel`.
      only: restrict the matrix to these parts of the parameters, see :func:`select`. Vectors then have None in place
        of the others.

    Returns:
      The operator. A loss or gradient that is not finite makes NaN in the products.

    Raises:
      ValueError: if there are no parameters, or integers among them, or the batch cannot be cut.

    References:
      Pearlmutter, Fast exact multiplication by the Hessian, 1994.

    Examples:
      >>> multiply = hessian(lambda x: x[0] ** 2 * x[1], jnp.array([3.0, 2.0]))
      >>> multiply(jnp.array([1.0, 0.0])).tolist()
      [4.0, 6.0]
    """
    return _operator(_Hessian(loss), params, arguments, microbatch, axis_name, only, keep=True)


def gauss_newton(
    model: Callable[..., PyTree],
    loss: Callable[..., Array],
    params: Params,
    *arguments: PyTree,
    microbatch: int | None = None,
    axis_name: str | None = None,
    only: str | Sequence[str] | None = None,
) -> Operator:
    r"""The generalised Gauss-Newton matrix :math:`J^\top H_{out} J`: the Hessian without the curvature of the network.

    Positive semi-definite where the loss is convex in the outputs, as cross-entropy and squares are; there it is also
    the Fisher matrix. J v is found from reverse mode alone, as the transpose of the transpose, since the convolutions
    of :mod:`kdjax.models` have no forward rule.

    Args:
      model: ``(params, *arguments) -> outputs``, an array or a pytree of them; return no more than the loss needs.
      loss: ``(outputs, *arguments) -> scalar``, a mean over examples.
      params: as for :func:`hessian`, likewise all that follow.
      *arguments: of both functions.
      microbatch: examples at a time.
      axis_name: of the mapped axis to average over.
      only: restrict the matrix to these parts of the parameters.

    Returns:
      The operator.

    Raises:
      ValueError: as :func:`hessian`.

    References:
      Schraudolph, Fast curvature matrix-vector products for second-order gradient descent, 2002. The double transpose
      is that of Townsend, A new trick for calculating Jacobian vector products, 2017.
    """
    return _operator(_GaussNewton(model, loss), params, arguments, microbatch, axis_name, only, keep=True)


def hvp(
    loss: Callable[..., Array],
    params: Params,
    vector: PyTree,
    *arguments: PyTree,
    microbatch: int | None = None,
    axis_name: str | None = None,
    only: str | Sequence[str] | None = None,
) -> PyTree:
    """One product of a Hessian with a vector, from scratch; for several at the same parameters use :func:`hessian`.

    Args:
      loss: as for :func:`hessian`, likewise all but the vector.
      params: pytree of floating-point arrays.
      vector: like the parameters.
      *arguments: of the loss.
      microbatch: examples at a time.
      axis_name: of the mapped axis to average over.
      only: restrict the matrix to these parts of the parameters.

    Returns:
      H v, like the parameters, in float32 or wider.

    Raises:
      ValueError: as :func:`hessian`, and if the vector is not like the parameters.
    """
    return _operator(_Hessian(loss), params, arguments, microbatch, axis_name, only, keep=False)(vector)


def dense_hessian(
    loss: Callable[..., Array],
    params: Params,
    *arguments: PyTree,
    only: str | Sequence[str] | None = None,
    max_parameters: int = 5000,
) -> Float[Array, "n n"]:
    """The Hessian itself, every entry, for a few thousand parameters.

    Args:
      loss: as for :func:`hessian`.
      params: pytree of floating-point arrays.
      *arguments: of the loss.
      only: restrict the matrix to these parts of the parameters.
      max_parameters: refuse more; 5000 take 100 MB in float32, and n times the memory of a gradient to compute.

    Returns:
      The matrix, rows and columns in the order of ``ravel_pytree``; symmetric up to rounding.

    Raises:
      ValueError: if there are too many parameters, none, or integers among them.
    """
    params = widen(params)
    chosen = select(params, only)
    check_arrays("dense_hessian", chosen)
    size = size_of(chosen)
    if size > max_parameters:
        raise ValueError(
            f"dense_hessian would form {size}² entries, {size**2 * 4 / 1e9:.1f} GB: use hessian with "
            f"extreme_eigenpairs or spectral_density, or raise max_parameters, which is {max_parameters}."
        )
    restricted = _Restricted(_Hessian(loss), only if only is None or isinstance(only, str) else tuple(only))
    return _dense(restricted, chosen, params, arguments)


def evaluation_loss(
    apply_fn: ApplyFn, objective: Callable[[Any, Batch], Mapping[str, Array]]
) -> Callable[[Params, Batch, ModelState], Array]:
    """The loss of a network in evaluation mode: stored batch statistics, no dropout, so that it has one Hessian.

    Build it once and hand over the same one at every checkpoint, ``hessian(loss, params, batch, model_state)``.

    Args:
      apply_fn: the network.
      objective: the terms of the loss from outputs and batch, as for :func:`kdjax.train.make_train_step`.

    Returns:
      ``(params, batch, model_state) -> scalar``, the sum of the terms; the network sees ``batch["image"]``.
    """

    def loss(params: Params, batch: Batch, model_state: ModelState) -> Array:
        outputs, _ = apply_fn(params, model_state, batch["image"], train=False)
        return jnp.asarray(sum(objective(outputs, batch).values()))

    return loss


# What kind of matrix: each knows a product from scratch, and how to prepare many.


class _Hessian(NamedTuple):
    loss: Callable[..., Array]

    def multiply(self, params, arguments, vector):
        return jax.jvp(jax.grad(lambda p: self.loss(p, *arguments)), (params,), (vector,))[1]

    def linearise(self, params, arguments):
        return jax.linearize(jax.grad(lambda p: self.loss(p, *arguments)), params)[1]


class _GaussNewton(NamedTuple):
    model: Callable[..., PyTree]
    loss: Callable[..., Array]

    def multiply(self, params, arguments, vector):
        outputs, pull = jax.vjp(lambda p: self.model(p, *arguments), params)
        _, push = jax.vjp(lambda u: pull(u)[0], jax.tree.map(jnp.zeros_like, outputs))
        slope = jax.grad(lambda y: self.loss(y, *arguments))
        return pull(jax.jvp(slope, (outputs,), push(vector))[1])[0]

    def linearise(self, params, arguments):
        # It is linear already; what does not depend on the vector is what linearising computes once.
        zeros = jax.tree.map(jnp.zeros_like, params)
        return jax.linearize(lambda v: self.multiply(params, arguments, v), zeros)[1]


class _Restricted(NamedTuple):
    """A kind of matrix whose parameters are some of those that its functions take."""

    kind: _Hessian | _GaussNewton
    only: str | tuple[str, ...] | None

    def on(self, params):
        """The kind with functions of the chosen parameters alone."""
        if self.only is None:
            return self.kind

        def merged(function):
            def of_chosen(chosen, *arguments):
                whole = jax.tree.map(
                    lambda c, p: p if c is None else c, chosen, params, is_leaf=lambda x: x is None
                )
                return function(whole, *arguments)

            return of_chosen

        first, *others = self.kind
        return type(self.kind)(merged(first), *others)  # type: ignore[arg-type]


class _Kept(NamedTuple):
    """Product by a tangent map that is there already."""

    axis_name: str | None

    def __call__(self, tangent_map, vector):
        return _mean_over(self.axis_name, tangent_map(vector))


class _Walked(NamedTuple):
    """Product from scratch, over the batch in parts."""

    kind: _Restricted
    microbatch: int | None
    axis_name: str | None

    def __call__(self, arrays, vector):
        chosen, params, arguments = arrays
        kind = self.kind.on(params)

        def multiply(arguments):
            return kind.multiply(chosen, arguments, vector)

        product = (
            multiply(arguments) if self.microbatch is None else _walk(multiply, self.microbatch, *arguments)
        )
        return _mean_over(self.axis_name, product)


def _walk(multiply: Callable[[tuple], PyTree], size: int, batch: PyTree, *constants: PyTree) -> PyTree:
    """The mean of products over parts of the batch, each weighted by its length."""
    total = _length(batch)
    rows = total // size * size

    def part(make):  # arrays without a leading axis go to every part as they are
        return (jax.tree.map(lambda x: make(x) if jnp.ndim(x) else x, batch), *constants)

    def add(done, begin):
        product = multiply(part(lambda x: jax.lax.dynamic_slice_in_dim(x, begin, size)))
        return jax.tree.map(lambda d, x: d + x * (size / total), done, product), None

    shapes = jax.eval_shape(multiply, part(lambda x: x[:size]))
    product = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    product, _ = jax.lax.scan(add, product, jnp.arange(0, rows, size))
    if rows < total:
        last = multiply(part(lambda x: x[rows:]))
        product = jax.tree.map(lambda d, x: d + x * ((total - rows) / total), product, last)
    return product


def _operator(kind, params, arguments, microbatch, axis_name, only, *, keep) -> Operator:
    restricted = _Restricted(kind, only if only is None or isinstance(only, str) else tuple(only))
    params = widen(params)
    chosen = select(params, only)
    check_arrays("a product", chosen)
    if microbatch is not None:
        if not arguments or microbatch < 1:
            raise ValueError(
                f"microbatch cuts the first argument after params, got {len(arguments)} arguments and {microbatch} "
                "examples: pass the batch as an argument of the loss, and at least 1."
            )
        microbatch = None if microbatch >= _length(arguments[0]) else microbatch
    if keep and microbatch is None:
        rule, arrays = _Kept(axis_name), _linearise(restricted, chosen, params, arguments)
    else:
        rule, arrays = _Walked(restricted, microbatch, axis_name), (chosen, params, arguments)
    return Operator(rule, arrays, structure_of(chosen))


@functools.partial(jax.jit, static_argnums=0)
def _linearise(restricted, chosen, params, arguments):
    with _full_precision():
        return restricted.on(params).linearise(chosen, arguments)


@jax.jit
def _multiply(operator, vector):
    with _full_precision():
        return operator.rule(operator.arrays, vector)


@functools.partial(jax.jit, static_argnums=0)
def _dense(restricted, chosen, params, arguments):
    flat, unravel = ravel_pytree(chosen)
    with _full_precision():
        loss = restricted.on(params).loss
        return jax.hessian(lambda x: loss(unravel(x), *arguments))(flat)


def _mean_over(axis_name, product):
    # Behind the differentiated function: the transpose of a mean over devices is a sum over them, not a mean.
    return product if axis_name is None else jax.lax.pmean(product, axis_name)


def _length(batch: PyTree) -> int:
    lengths = {jnp.shape(x)[0] for x in jax.tree.leaves(batch) if jnp.ndim(x)}
    if len(lengths) != 1:
        raise ValueError(
            f"microbatch needs a batch whose arrays have one leading axis, got the lengths {sorted(lengths)}: pass the "
            "batch as the first argument after params and what goes with every part behind it."
        )
    return lengths.pop()
