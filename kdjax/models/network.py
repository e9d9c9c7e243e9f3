"""Networks of any framework as two pure functions, ready to train, distil from, and save."""

import dataclasses
import functools
import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend import core

from kdjax import models, parallel
from kdjax.models import layers
from kdjax.types import ApplyFn, ModelState, Outputs, Params, Weights


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A network without its weights.

    Attributes:
      init: ``seed -> (params, model_state)``.
      apply: ``(params, model_state, inputs, *, train, key) -> (Outputs, model_state)``.
      image_shape: height, width and channels of its inputs.
      description: plain JSON that tells it from other networks; part of the identity of every run.
      name: for tables and messages.
      weight_shapes: shapes of what ``init`` returns.
    """

    init: Callable[[int], tuple[Params, ModelState]]
    apply: ApplyFn
    image_shape: tuple[int, ...]
    description: Mapping[str, Any]
    name: str
    weight_shapes: Weights

    @functools.cached_property
    def output_shapes(self) -> Any:  # Outputs of jax.ShapeDtypeStruct
        """Shapes of what it returns for a batch of two images; computes nothing."""
        images = jax.ShapeDtypeStruct((2, *self.image_shape), jnp.float32)
        apply: Any = self.apply
        return jax.eval_shape(lambda w, x: apply(*w, x, train=False)[0], self.weight_shapes, images)

    @property
    def num_parameters(self) -> int:
        """Number of trainable numbers."""
        return models.count_parameters(self.weight_shapes.params)

    @functools.cached_property
    def multiply_adds(self) -> int:
        """Multiplications with an addition in convolutions and matrix products, for the logits of one image."""
        image = jax.ShapeDtypeStruct((1, *self.image_shape), jnp.float32)
        apply: Any = self.apply
        with layers.native_forms():
            traced = jax.make_jaxpr(lambda w, x: apply(*w, x, train=False)[0].logits)(
                self.weight_shapes, image
            )
        return _multiply_adds(traced.jaxpr)


def from_linen(module: nn.Module, image_shape: Sequence[int]) -> Network:
    """A Flax linen module as a network.

    Its ``__call__(x)``, or ``__call__(x, *, train)``, returns logits, ``(logits, features)`` or
    :class:`kdjax.types.Outputs`. Batch normalisation of kdjax's own networks takes its statistics over all devices.

    Args:
      module: one of :func:`kdjax.models.build`, or your own.
      image_shape: height, width and channels.

    Raises:
      ValueError: if it does not take such images.
    """
    shape = tuple(image_shape)
    if type(module).__module__.startswith("kdjax.models."):
        if hasattr(module, "axis_name"):
            module = module.clone(axis_name=parallel.AXIS)
        return Network(
            lambda seed: models.init(module, shape, seed=seed),
            models.apply_fn(module),
            shape,
            models.describe(module),
            models.name_of(module),
            models.shapes_of(module, shape),
        )
    takes_train = "train" in inspect.signature(type(module).__call__).parameters

    def call(params, model_state, inputs, *, train, key=None):
        options: dict[str, Any] = {"train": train} if takes_train else {}
        variables = {"params": params, **model_state}
        if not train:
            return as_outputs(module.apply(variables, inputs, **options)), model_state
        rngs = {} if key is None else {"dropout": key}
        outputs, updated = module.apply(variables, inputs, rngs=rngs, mutable=list(model_state), **options)
        return as_outputs(outputs), updated

    def init(seed) -> tuple[Params, ModelState]:
        options: dict[str, Any] = {"train": False} if takes_train else {}
        variables = dict(module.init(jax.random.key(seed), jnp.zeros((1, *shape), jnp.float32), **options))
        return variables.pop("params", {}), variables

    # Without optimisation: optimised, compiling this takes longer than a short run.
    compiled = jax.jit(init, compiler_options={"xla_backend_optimization_level": 0})
    shapes = Weights(*jax.eval_shape(init, jnp.uint32(0)))
    description = models.describe(module) | {"source": _digest(type(module), shapes)}
    return Network(
        lambda seed: compiled(jnp.uint32(seed)), call, shape, description, type(module).__name__, shapes
    )


def from_nnx(build: Callable[[Any], Any], image_shape: Sequence[int]) -> Network:
    """A Flax NNX module as a network.

    Args:
      build: ``nnx.Rngs -> nnx.Module``. Calling the module with images returns logits, ``(logits, features)`` or
        :class:`kdjax.types.Outputs`.
      image_shape: height, width and channels.
    """
    from flax import nnx

    shape = tuple(image_shape)
    graph, *template = nnx.split(build(nnx.Rngs(0)), nnx.Param, nnx.RngState, ...)

    def init(seed: int) -> tuple[Params, ModelState]:
        _, params, _, statistics = nnx.split(build(nnx.Rngs(seed)), nnx.Param, nnx.RngState, ...)
        return nnx.to_pure_dict(params), {"statistics": nnx.to_pure_dict(statistics)}

    def states(params, model_state):
        filled = []
        for like, values in zip((template[0], template[2]), (params, model_state["statistics"]), strict=True):
            state = jax.tree.map(lambda x: x, like)
            nnx.replace_by_pure_dict(state, values)
            filled.append(state)
        return filled[0], template[1], filled[1]

    def call(params, model_state, inputs, *, train, key=None):
        module = nnx.merge(graph, *states(params, model_state), copy=True)
        module.train() if train else module.eval()
        if key is not None:
            nnx.reseed(module, default=key, dropout=key)
        outputs = as_outputs(module(inputs))
        statistics = nnx.state(module, nnx.Not(nnx.Any(nnx.Param, nnx.RngState)))
        return outputs, {"statistics": nnx.to_pure_dict(statistics)} if train else model_state

    return _described(init, call, shape, build)


def from_equinox(build: Callable[[jax.Array], Any], image_shape: Sequence[int]) -> Network:
    """An Equinox module without state as a network.

    Args:
      build: ``key -> eqx.Module``. Calling the module with one image returns its logits, ``(logits, features)`` or
        :class:`kdjax.types.Outputs`; it is mapped over the batch. A module that takes ``key=`` gets one in training.
      image_shape: height, width and channels.
    """
    import equinox as eqx

    shape = tuple(image_shape)
    template, static = eqx.partition(build(jax.random.key(0)), eqx.is_inexact_array)
    structure = jax.tree.structure(template)
    takes_key = "key" in inspect.signature(type(build(jax.random.key(0))).__call__).parameters

    def init(seed: int) -> tuple[Params, ModelState]:
        arrays, _ = eqx.partition(build(jax.random.key(seed)), eqx.is_inexact_array)
        paths = jax.tree_util.tree_leaves_with_path(arrays)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}, {}

    names = list(init(0)[0])

    def call(params, model_state, inputs, *, train, key=None):
        module = eqx.combine(jax.tree.unflatten(structure, [params[name] for name in names]), static)
        module = eqx.nn.inference_mode(module, not train)
        if takes_key and train and key is not None:
            outputs = jax.vmap(lambda x, k: module(x, key=k))(inputs, jax.random.split(key, len(inputs)))
        else:
            outputs = jax.vmap(module)(inputs)
        return as_outputs(outputs), model_state

    return _described(init, call, shape, build)


def as_outputs(found: Any) -> Outputs:
    """What a network returned as :class:`Outputs`."""
    if isinstance(found, Outputs):
        return found
    if isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping):
        return Outputs(found[0], dict(found[1]))
    if isinstance(found, jax.Array) and found.ndim == 2:
        return Outputs(found, {})
    raise ValueError(
        "a network returns logits [batch, classes], (logits, features) with features by name, or "
        f"kdjax.types.Outputs; this one returned {jax.tree.map(jnp.shape, found)}."
    )


def _multiply_adds(jaxpr: Any) -> int:
    """Those of a program and of what it calls."""
    total = 0
    for eqn in jaxpr.eqns:
        size = math.prod(eqn.outvars[0].aval.shape) if eqn.outvars else 0
        if eqn.primitive.name == "conv_general_dilated":
            kernel, features = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec[0]
            total += size * math.prod(kernel) // kernel[features]
        elif eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += size * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
        else:
            inner = sum(map(_multiply_adds, core.jaxprs_in_params(eqn.params)))
            total += inner * eqn.params.get("length", 1) if eqn.primitive.name == "scan" else inner
    return total


def _described(init: Any, call: Any, shape: tuple[int, ...], build: Callable[..., Any]) -> Network:
    name = getattr(build, "__name__", type(build).__name__)
    shapes = Weights(*jax.eval_shape(lambda: init(0)))
    return Network(init, call, shape, {"class": name, "source": _digest(build, shapes)}, name, shapes)


def _digest(code: Any, shapes: Weights) -> str:
    """Tells a user's network from another of the same name: by its source, and by the shapes of its parameters."""
    try:
        source = inspect.getsource(code)
    except (OSError, TypeError):  # typed into an interpreter
        source = getattr(code, "__qualname__", type(code).__qualname__)
    return hashlib.sha256(f"{source}{jax.tree.map(jnp.shape, shapes)}".encode()).hexdigest()[:16]
