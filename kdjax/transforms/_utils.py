"""Shared by the transformations: argument checks, random keys, Hessians, and arithmetic on trees."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from kdjax import curvature
from kdjax.curvature.krylov import check_num_matvecs
from kdjax.curvature.vectors import check_arrays, is_known, size_of, structure_of, widen
from kdjax.types import Params

ValueFn = Callable[[Params], Array]
"""The loss as a function of the parameters alone; a ``jax.tree_util.Partial`` where its data change."""


class Draws:
    """A key or seed as a state stores it: raw, since typed keys do not serialise."""

    def __init__(self, key: Array | int):
        key = as_key(key)
        self._impl, self.data = jax.random.key_impl(key), jax.random.key_data(key)

    def init(self) -> Array:
        """The raw key, as a new array that may be donated."""
        return jnp.array(self.data)

    def draw(self, data: Array, count: Array) -> Array:
        """The key of draw number ``count``."""
        return jax.random.fold_in(jax.random.wrap_key_data(data, impl=self._impl), count)


def as_key(key: Array | int) -> Array:
    """A typed key from a typed key, a raw key or an integer seed."""
    dtype, shape = jnp.result_type(key), jnp.shape(key)
    if not shape and jnp.issubdtype(dtype, jnp.integer):
        return jax.random.key(key)
    if not shape and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return jnp.asarray(key)
    if len(shape) == 1 and dtype == jnp.uint32:
        return jax.random.wrap_key_data(jnp.asarray(key))
    raise ValueError(f"key must be one key or an integer seed, got {dtype}{list(shape)}: write key=0.")


def transformation(init: Callable, update: Callable) -> optax.GradientTransformationExtraArgs:
    """A transformation of two functions that passes a tree without arrays through, as ``optax.partition`` makes."""

    def update_unless_empty(updates, state, params=None, **extra_args):
        if not jax.tree.leaves(updates):
            return updates, state
        return update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update_unless_empty)


def rate_at(learning_rate: optax.ScalarOrSchedule, count: Array) -> Any:
    """The learning rate at a step, from a number or a schedule."""
    return learning_rate(count) if callable(learning_rate) else learning_rate


def zero_count() -> Array:
    """int32[], zero."""
    return jnp.zeros((), jnp.int32)


def nan() -> Array:
    """float32[], NaN."""
    return jnp.full((), jnp.nan, jnp.float32)


def known(value: Any, otherwise: float) -> float:
    """The option as a float; ``otherwise`` for None, schedules and traced numbers, which cannot be checked yet."""
    return otherwise if value is None or callable(value) or not is_known(value) else float(value)


def static_sizes(what: str, **values: Any) -> list[int | None]:
    """Options that set array shapes, as Python integers; a ValueError if they are traced or not integers.

    Their defaults are None, since inject_hyperparams would trace a number.
    """
    for name, value in values.items():
        if value is not None and not (
            is_known(value) and jnp.issubdtype(jnp.result_type(value), jnp.integer)
        ):
            raise ValueError(
                f"{what} needs {name} as an integer known at compile time, since it sets array sizes, got {value}: "
                f"with optax.inject_hyperparams write static_args={tuple(values)}."
            )
    return [None if value is None else int(value) for value in values.values()]


def matvecs(given: int | None, params: Params) -> int:
    """The number of Hessian-vector products: as given, by default 16 or the number of parameters, if that is less."""
    return min(16, size_of(params)) if given is None else given


def check_period(what: str, period: Any) -> None:
    """Raises a ValueError if the period is known to be below 1."""
    if known(period, otherwise=1) < 1:
        raise ValueError(f"{what} needs a period of 1 step or more, got {period}.")


def check_positive(what: str, *, zero: bool = False, **values: Any) -> None:
    """Raises a ValueError if a number is known not to be positive (or zero, if allowed)."""
    for name, value in values.items():
        number = known(value, otherwise=1)
        if not (number > 0 or (zero and number == 0)):
            raise ValueError(f"{what} needs {name} {'of 0 or more' if zero else 'above 0'}, got {value}.")


def check_params(what: str, params: Params, num_matvecs: int | None = None) -> None:
    """Raises a ValueError unless the parameters are floating and there are at least ``num_matvecs`` of them.

    A tree without arrays passes: ``optax.tree.map_params`` calls ``init`` with a placeholder to find the parameters in
    the state.
    """
    if not jax.tree.leaves(params):
        return
    check_arrays(what, params)
    if num_matvecs is not None:
        check_num_matvecs(what, num_matvecs, size_of(params))


def check_like(what: str, params: Params, **trees: Params) -> None:
    """Raises a ValueError unless the named trees have the structure and shapes of the parameters."""
    if not jax.tree.leaves(params):
        return
    for name, tree in trees.items():
        wanted, got = jax.tree.structure(params), jax.tree.structure(tree)
        if wanted != got:
            raise ValueError(
                f"{what} needs a {name} with the structure of the parameters, {wanted}, got {got}: make it with "
                "kdjax.saddles.select_weights."
            )
        pairs = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(tree), strict=True)
        for (path, param), leaf in pairs:
            if jnp.shape(param) != jnp.shape(leaf):
                raise ValueError(
                    f"{what} needs {name}{jax.tree_util.keystr(path)} of shape {jnp.shape(param)} like the "
                    f"parameter, got {jnp.shape(leaf)}: make it with kdjax.saddles.select_weights."
                )


def stored(params: Params, tree: Params) -> Params:
    """A float32 copy of the tree for the state; the placeholder itself under ``optax.tree.map_params``."""
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32), tree) if jax.tree.leaves(params) else params


def require_loss(what: str, params: Params | None, value_fn: ValueFn | None) -> tuple[Params, ValueFn]:
    """Parameters and loss; a ValueError if one is missing or a mask hides parameters."""
    if params is None or value_fn is None:
        missing = "the current parameters" if params is None else "the loss as a function of the parameters"
        raise ValueError(
            f"{what} needs {missing}: call update(updates, state, params, value_fn=...), where value_fn(params) is "
            "the loss on the current batch, as kdjax.train.make_train_step does."
        )
    whole = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    if any(isinstance(x, optax.MaskedNode) for x in whole):
        raise ValueError(
            f"{what} calls value_fn with its own parameters, and optax.masked hides some of them: let the loss close "
            "over the frozen parameters."
        )
    return params, value_fn


def require_params(what: str, params: Params | None) -> Params:
    """The parameters, or a ValueError."""
    if params is None:
        raise ValueError(f"{what} needs the current parameters: call update(updates, state, params).")
    return params


def as_partial(function: ValueFn) -> jax.tree_util.Partial:
    """The loss as a pytree: its arrays become arguments of a compiled program, its function the cache key."""
    return function if isinstance(function, jax.tree_util.Partial) else jax.tree_util.Partial(function)


def value_at(params: Params, loss: ValueFn) -> Array:
    """The loss at the parameters; a module-level function, so that programs with it compile once."""
    return loss(params)


def mean_over(axis_name: str | None, tree: Any) -> Any:
    """The mean over a mapped axis, if one is named."""
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def is_traced(tree: Any) -> bool:
    """Whether any array is traced, as inside a compiled function."""
    return not all(map(is_known, jax.tree.leaves(tree)))


def hessian_at(value_fn: ValueFn, params: Params, axis_name: str | None) -> curvature.Operator:
    """The Hessian of the loss at float32 parameters; products are averaged over devices after differentiation."""
    if not is_traced(params):
        return curvature.hessian(value_at, params, as_partial(value_fn), axis_name=axis_name)
    # Traced values that the loss closes over would leak into the cache of another compiled function.
    with jax.default_matmul_precision("float32"):
        _, tangent_map = jax.linearize(jax.grad(value_fn), params)
    return curvature.Operator(_Averaged(axis_name), tangent_map, structure_of(params))


class _Averaged(NamedTuple):
    axis_name: str | None

    def __call__(self, tangent_map, vector):
        return mean_over(self.axis_name, tangent_map(vector))


def inner(a: Params, b: Params) -> Float[Array, ""]:
    """The sum of products of two trees, in float32 or wider."""
    return jnp.asarray(optax.tree.vdot(widen(a), widen(b)))


def added(params: Params, updates: Params) -> Params:
    """Parameters plus updates, in float32 or wider."""
    return jax.tree.map(lambda p, u: p + u, widen(params), widen(updates))


def length_scale(params: Params) -> Float[Array, ""]:
    """The 2-norm of all parameters, at least 1 so that zero can be left: the unit of relative lengths."""
    return jnp.maximum(optax.tree.norm(widen(params)), 1)


def scaled(tree: Params, length: Any) -> Params:
    """The tree scaled to a 2-norm; zeros stay zeros."""
    norm = optax.tree.norm(tree)
    factor = length / jnp.where(norm > 0, norm, 1)
    return jax.tree.map(lambda x: (factor * x).astype(x.dtype), tree)


def cast_like(tree: Params, like: Params) -> Params:
    """The tree in the dtypes of another."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def where(condition: Array, new: Params, old: Params) -> Params:
    """One tree or the other, bit for bit."""
    return jax.tree.map(functools.partial(jnp.where, condition), new, old)


def finite_or_infinite(values: Array) -> Array:
    """Losses as float32, infinite where not finite, so that they never win a comparison."""
    values = values.astype(jnp.float32)
    return jnp.where(jnp.isfinite(values), values, jnp.inf)
