"""Hessian-vector and Gauss-Newton-vector products."""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from kdjax.curvature.vectors import check_arrays, check_structure, structure_of, widen
from kdjax.types import ApplyFn, Batch, ModelState, Params

# Products in full float32 where a GPU or TPU would round their factors to 10 or 7 bits; otherwise a Krylov method finds
# the curvature of the rounding. Code that sets its own precision or a narrow dtype is not affected.
_full_precision = functools.partial(jax.default_matmul_precision, "float32")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["rule", "structure"]
)
@dataclasses.dataclass(frozen=True)
class Operator:
    """A symmetric matrix as its product with a vector: call it on a pytree like the parameters.

    It is itself a pytree, so it can be an argument of a jitted function, which compiles once for all operators with the
    same loss and array shapes. Vectors are float32 (or float64).

    Attributes:
      rule: ``(arrays, vector) -> product``.
      arrays: data of the rule.
      structure: of the vectors.
    """

    rule: Callable[..., Any]
    arrays: PyTree
    structure: Hashable

    def __call__(self, vector: PyTree) -> PyTree:
        """The product of the matrix with the vector.

        Raises:
          ValueError: if the vector does not match the parameters.
        """
        check_structure("an operator", vector, self.structure)  # type: ignore[arg-type]
        return _multiply(self, widen(vector))


def hessian(
    loss: Callable[..., Array],
    params: Params,
    *arguments: PyTree,
    axis_name: str | None = None,
) -> Operator:
    r"""The Hessian of a loss at fixed parameters, for many products.

    The gradient is linearised once and its tangent map reused, so a product does not evaluate the gradient again. The
    activations stay in memory as long as the operator lives.

    The loss must be a deterministic function of its arguments. Freeze BatchNorm statistics and dropout first;
    otherwise this is another function's Hessian. :func:`evaluation_loss` builds such a loss from a network. Derivatives
    do not see the curvature at the kinks of ReLU and max-pooling; claims about curvature are safer with smooth
    activations.

    Args:
      loss: ``(params, *arguments) -> scalar``. Pass arrays as arguments rather than in its closure, and the same
        function every time: it is then compiled once, and no data stay in the compilation cache.
      params: pytree of floating-point arrays; widened to float32 if they are narrower.
      *arguments: of the loss, such as the batch.
      axis_name: mapped axis whose devices hold equal parts of the batch; products are averaged over it. Under
        ``shard_map`` this is correct with ``check_vma=False``, as in :mod:`kdjax.parallel`.

    Returns:
      The operator. A non-finite loss or gradient makes NaN in the products.

    Raises:
      ValueError: if there are no parameters, or integers among them.

    References:
      Pearlmutter, Fast exact multiplication by the Hessian, 1994.

    Examples:
      >>> multiply = hessian(lambda x: x[0] ** 2 * x[1], jnp.array([3.0, 2.0]))
      >>> multiply(jnp.array([1.0, 0.0])).tolist()
      [4.0, 6.0]
    """
    return _operator(_Hessian(loss), params, arguments, axis_name)


def gauss_newton(
    model: Callable[..., PyTree],
    loss: Callable[..., Array],
    params: Params,
    *arguments: PyTree,
    axis_name: str | None = None,
) -> Operator:
    r"""The generalised Gauss-Newton matrix :math:`J^\top H_{out} J`: the Hessian without the curvature of the network.

    Positive semi-definite where the loss is convex in the outputs, as cross-entropy and squared error are; for these it
    is also the Fisher matrix. J v is computed by reverse mode alone, as the transpose of the transpose, since the
    convolutions of :mod:`kdjax.models` have no forward rule.

    Args:
      model: ``(params, *arguments) -> outputs``, an array or a pytree of them; return no more than the loss needs.
      loss: ``(outputs, *arguments) -> scalar``, a mean over examples.
      params: pytree of floating-point arrays.
      *arguments: of both functions.
      axis_name: mapped axis to average products over.

    Returns:
      The operator.

    Raises:
      ValueError: as :func:`hessian`.

    References:
      Schraudolph, Fast curvature matrix-vector products for second-order gradient descent, 2002. The double transpose
      is that of Townsend, A new trick for calculating Jacobian vector products, 2017.
    """
    return _operator(_GaussNewton(model, loss), params, arguments, axis_name)


def hvp(loss: Callable[..., Array], params: Params, vector: PyTree, *arguments: PyTree) -> PyTree:
    """One Hessian-vector product from scratch; for several at the same parameters use :func:`hessian`.

    Args:
      loss: as for :func:`hessian`.
      params: pytree of floating-point arrays.
      vector: like the parameters.
      *arguments: of the loss.

    Returns:
      H v, like the parameters, in float32 or wider.

    Raises:
      ValueError: as :func:`hessian`, and if the vector does not match the parameters.
    """
    params = _checked(params)
    return Operator(_FromScratch(_Hessian(loss)), (params, arguments), structure_of(params))(vector)


def evaluation_loss(
    apply_fn: ApplyFn, objective: Callable[[Any, Batch], Mapping[str, Array]]
) -> Callable[[Params, Batch, ModelState], Array]:
    """The loss of a network in evaluation mode: stored BatchNorm statistics, no dropout.

    Build it once and pass the same function at every checkpoint, ``hessian(loss, params, batch, model_state)``.

    Args:
      apply_fn: the network.
      objective: the terms of the loss from outputs and batch, as for :func:`kdjax.train.make_train_step`.

    Returns:
      ``(params, batch, model_state) -> scalar``, the sum of the terms; the network's input is ``batch["image"]``.
    """

    def loss(params: Params, batch: Batch, model_state: ModelState) -> Array:
        outputs, _ = apply_fn(params, model_state, batch["image"], train=False)
        return jnp.asarray(sum(objective(outputs, batch).values()))

    return loss


# Each kind of matrix computes one product from scratch, and its tangent map for many.


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
        # It is linear already; linearising computes once what does not depend on the vector.
        zeros = jax.tree.map(jnp.zeros_like, params)
        return jax.linearize(lambda v: self.multiply(params, arguments, v), zeros)[1]


class _Kept(NamedTuple):
    """Product by a stored tangent map."""

    axis_name: str | None

    def __call__(self, tangent_map, vector):
        # After differentiation: the transpose of a mean over devices is a sum over them.
        product = tangent_map(vector)
        return product if self.axis_name is None else jax.lax.pmean(product, self.axis_name)


class _FromScratch(NamedTuple):
    """Product that evaluates the gradient too."""

    kind: _Hessian

    def __call__(self, arrays, vector):
        params, arguments = arrays
        return self.kind.multiply(params, arguments, vector)


def _checked(params: Params) -> Params:
    params = widen(params)
    check_arrays("a product", params)
    return params


def _operator(
    kind: _Hessian | _GaussNewton, params: Params, arguments: tuple, axis_name: str | None
) -> Operator:
    params = _checked(params)
    return Operator(_Kept(axis_name), _linearise(kind, params, arguments), structure_of(params))


@functools.partial(jax.jit, static_argnums=0)
def _linearise(kind, params, arguments):
    with _full_precision():
        return kind.linearise(params, arguments)


@jax.jit
def _multiply(operator, vector):
    with _full_precision():
        return operator.rule(operator.arrays, vector)
