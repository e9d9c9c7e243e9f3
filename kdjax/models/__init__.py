"""Networks that return logits and named features, with their initialisation and ``apply`` function.

::

    module = models.build("resnet20", num_classes=10)
    params, model_state = models.init(module, (32, 32, 3), seed=0)
    apply_fn = models.apply_fn(module)
    outputs, model_state = apply_fn(params, model_state, images, train=True, key=key)
    outputs.logits, outputs.features["stage2"], outputs.features["embedding"]

Every network has the feature "embedding", the input of its last layer, and "stage1", "stage2" and so on, its feature
maps (or hidden layers). :func:`apply_fn` also takes any other linen module whose ``__call__(x, *, train)`` returns
:class:`kdjax.types.Outputs`; initialise such a module with its own ``module.init``. :mod:`kdjax.models.layers` chooses
how convolutions and pooling are computed.
"""

import dataclasses
import difflib
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from kdjax.models import layers, rows_first
from kdjax.models.cnn import DigitsCnn, KerasCnn, MalariaCnn
from kdjax.models.mlp import Mlp
from kdjax.models.mobilenet import MobileNetV2
from kdjax.models.recurrent import RowGru
from kdjax.models.resnet import ResNet
from kdjax.models.wideresnet import WideResNet
from kdjax.types import ApplyFn, ModelState, Params, Weights

MODELS: dict[str, Callable[..., nn.Module]] = {
    "keras_teacher": functools.partial(KerasCnn, widths=(256, 512)),
    "keras_student": functools.partial(KerasCnn, widths=(16, 32)),
    "malaria_teacher": functools.partial(MalariaCnn, widths=(4, 8), hidden=16),
    "malaria_student": functools.partial(MalariaCnn, widths=(2, 4), hidden=8),
    "hinton_teacher": functools.partial(Mlp, widths=(1200, 1200), dropout=0.5, input_dropout=0.2),
    "hinton_student": functools.partial(Mlp, widths=(800, 800)),
    "mlp": Mlp,
    "gru_teacher": functools.partial(RowGru, units=150),
    "gru_student": RowGru,
    "digits_teacher": functools.partial(DigitsCnn, width=32, dropout=0.3),
    "digits_student": functools.partial(DigitsCnn, width=4),
    "resnet8": functools.partial(ResNet, depth=8),
    "resnet14": functools.partial(ResNet, depth=14),
    "resnet20": functools.partial(ResNet, depth=20),
    "resnet32": functools.partial(ResNet, depth=32),
    "resnet56": functools.partial(ResNet, depth=56),
    "resnet8_w50": functools.partial(ResNet, depth=8, channels=(8, 8, 16, 32)),
    "resnet8_w25": functools.partial(ResNet, depth=8, channels=(4, 4, 8, 16)),
    "resnet8x4": functools.partial(ResNet, depth=8, channels=(32, 64, 128, 256)),
    "resnet32x4": functools.partial(ResNet, depth=32, channels=(32, 64, 128, 256)),
    "wrn_16_2": functools.partial(WideResNet, depth=16, width=2),
    "wrn_40_1": functools.partial(WideResNet, depth=40, width=1),
    "wrn_40_2": functools.partial(WideResNet, depth=40, width=2),
    "mobilenet_v2": MobileNetV2,
    **{f"mobilenet_v2_cut{n}": functools.partial(MobileNetV2, removed=n) for n in range(3, 18, 2)},
    "mobilenet_v2_w25": functools.partial(MobileNetV2, width=0.25),  # for a CPU
    "mobilenet_v2_w25_cut5": functools.partial(MobileNetV2, width=0.25, removed=5),
}
"""Every network by name; :func:`build` takes the fields of its module as overrides."""

_NETWORKS: tuple[Any, ...] = (
    *(DigitsCnn, KerasCnn, MalariaCnn, Mlp, MobileNetV2),
    *(ResNet, RowGru, WideResNet),
)


def build(name: str, *, num_classes: int, **overrides: Any) -> nn.Module:
    """Builds a network by name.

    Args:
      name: a key of :data:`MODELS`.
      num_classes: number of logits.
      **overrides: values for the module's fields, such as ``width`` or ``dtype``.

    Returns:
      A linen module whose ``__call__(x, *, train)`` returns :class:`kdjax.types.Outputs`.

    Raises:
      ValueError: if there is no such network or field, or ``num_classes`` is below 1.
    """
    if name not in MODELS:
        close = difflib.get_close_matches(name, MODELS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(sorted(MODELS))}."
        raise ValueError(f"there is no model {name!r}: {hint}")
    if num_classes < 1:
        raise ValueError(f"a model needs at least one class, got num_classes={num_classes}.")
    constructor: Any = MODELS[name]
    fields = [f.name for f in dataclasses.fields(getattr(constructor, "func", constructor))]
    allowed = [f for f in fields if f not in ("num_classes", "parent", "name")]
    for field in overrides:
        if field not in allowed:
            raise ValueError(f"the model {name!r} has no field {field!r}; it has {', '.join(allowed)}.")
    return constructor(num_classes=num_classes, **overrides)


def describe(module: nn.Module) -> dict[str, Any]:
    """Describes a network in JSON: its class and its fields; :func:`from_description` builds it again.

    ``axis_name`` is left out: it concerns the training of a network, not its function.
    """
    fields = (f.name for f in dataclasses.fields(module) if f.name not in ("parent", "name", "axis_name"))
    return {"class": type(module).__name__} | {name: _plain(name, getattr(module, name)) for name in fields}


def from_description(description: Mapping[str, Any]) -> nn.Module:
    """Builds the network that :func:`describe` described.

    Raises:
      ValueError: if it is not one of this package's networks, or of a version with other fields.
    """
    known = {network.__name__: network for network in _NETWORKS}
    fields = {name: value for name, value in description.items() if name != "class"}
    if description.get("class") not in known:
        raise ValueError(
            f"the network is a {description.get('class')}, which is not one of kdjax.models "
            f"({', '.join(known)}): build it yourself and restore its weights with kdjax.checkpoints.restore."
        )
    values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in fields.items()}
    try:
        return known[description["class"]](**values | {"dtype": getattr(jnp, values["dtype"])})
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"the network {dict(description)} is of another version of kdjax: {error}."
        ) from error


def name_of(module: nn.Module) -> str:
    """The name of a network in :data:`MODELS`, whatever its dtype; the name of its class if it has none."""
    wanted: dict[str, Any] = describe(module) | {"dtype": "float32"}
    classes = wanted.get("num_classes", 1)
    return next((n for n in MODELS if describe(build(n, num_classes=classes)) == wanted), wanted["class"])


def _plain(name: str, value: Any) -> Any:
    """The value of a field in JSON; values of other types, in a user's own network, by their ``repr``."""
    if name == "dtype":
        return jnp.dtype(value).name
    if isinstance(value, tuple):
        return list(value)
    return value if isinstance(value, bool | int | float | str | None) else repr(value)


def apply_fn(module: nn.Module) -> ApplyFn:
    """A linen module as a pure function of parameters, state and inputs; see :class:`kdjax.types.ApplyFn`.

    Compiled for a CPU, a network whose class says ``takes_rows_first = True`` is given its images in the layout of
    :mod:`kdjax.models.rows_first`, if there are enough of them; on other platforms and outside of ``jit`` they stay as
    they are. Outputs don't show which.
    """

    def apply(
        params: Params, model_state: ModelState, inputs: PyTree, *, train: bool, key: jax.Array | None = None
    ) -> tuple[Any, ModelState]:
        arguments = (params, model_state, inputs, key)

        def native(params, model_state, inputs, key):
            variables = {"params": params, **model_state}
            if not train:
                return module.apply(variables, inputs, train=False), model_state
            rngs = None if key is None else {"dropout": key}
            try:
                return module.apply(variables, inputs, train=True, rngs=rngs, mutable=list(model_state))
            except flax.errors.InvalidRngError as error:
                raise ValueError(
                    f"{type(module).__name__} has dropout, so training needs randomness: "
                    "call apply_fn(..., train=True, key=jax.random.key(step))."
                ) from error

        def on_cpu(params, model_state, inputs, key):
            return native(params, model_state, rows_first.from_nhwc(inputs), key)

        compiled = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(arguments))
        takes_rows_first = getattr(module, "takes_rows_first", False) and not layers.only_native()
        if not compiled or not takes_rows_first or not rows_first.suits(inputs):
            return native(*arguments)
        return jax.lax.platform_dependent(*arguments, cpu=on_cpu, default=native)

    return apply


def init(module: nn.Module, image_shape: Sequence[int], *, seed: int) -> tuple[Params, ModelState]:
    """Initialises one of this package's networks with NumPy, since compiling ``module.init`` takes up to 30 seconds.

    **Only for the networks of** :mod:`kdjax.models`, which use linen's default initialisers. A module's own
    initialisers are ignored: initialise any other module with ``module.init(key, x, train=False)``.

    Kernels are normal, truncated at two standard deviations, with variance 1 / fan-in (LeCun); biases and means are 0,
    scales and variances 1. Each array has its own random stream, derived from the seed and its path, so its values do
    not depend on other layers, the platform or the version of JAX.

    Args:
      module: a network of :func:`build`.
      image_shape: height, width and channels.
      seed: any integer.

    Returns:
      Parameters (float32) and model state, ``{}`` where the network keeps none.

    Raises:
      ValueError: if the images do not fit the network, or an array has a name whose distribution is not known.
    """
    abstract = {"params": (shapes := shapes_of(module, image_shape)).params, **shapes.model_state}
    model_state = jax.tree.map_with_path(functools.partial(_initial, seed=seed), abstract)
    return model_state.pop("params"), model_state


def shapes_of(module: nn.Module, image_shape: Sequence[int]) -> Weights:
    """Shapes of what :func:`init` returns.

    Raises:
      ValueError: if the images do not fit the network.
    """
    shape = tuple(image_shape)
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"image_shape needs to be (height, width, channels), all positive, got {shape}.")
    variables = dict(
        jax.eval_shape(
            functools.partial(module.init, train=False),
            jax.random.key(0),
            jnp.zeros((1, *shape), jnp.float32),
        )
    )
    return Weights(variables.pop("params"), variables)


def count_parameters(params: Params) -> int:
    """Number of trainable parameters."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def _initial(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct, *, seed: int) -> Float[Array, "..."]:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    last = name.rpartition("/")[2]
    if last in ("bias", "mean"):
        return jnp.zeros(leaf.shape, leaf.dtype)
    if last in ("scale", "var"):
        return jnp.ones(leaf.shape, leaf.dtype)
    if last != "kernel":
        raise ValueError(
            f"init knows kernel, bias, scale, mean and var, but not {name!r}: "
            "initialise this module with module.init(key, x, train=False)."
        )
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], "little")
    values = _truncated_normal(np.random.Philox(key=key), int(np.prod(leaf.shape)))
    scale = np.sqrt(1 / np.prod(leaf.shape[:-1])) / TRUNCATED_STD
    return jnp.asarray((scale * values).reshape(leaf.shape), leaf.dtype)


TRUNCATED_STD = 0.87962566103423978
"""Standard deviation of a standard normal variable truncated to [-2, 2]."""


def _truncated_normal(generator: np.random.Philox, count: int) -> np.ndarray:
    """Standard normal numbers within [-2, 2], by rejection from raw bits.

    NumPy guarantees the same raw bits in every version, but not the same values of ``Generator.normal``.
    """
    kept, missing = [], count
    while missing > 0:
        raw = generator.random_raw(2 * (2 * missing + 16))  # six in ten are kept
        place, height = ((raw >> np.uint64(11)) * 2.0**-53).reshape(2, -1)
        place = 4 * place - 2
        kept.append(place[height < np.exp(-(place**2) / 2)][:missing])
        missing -= len(kept[-1])
    return np.concatenate(kept) if kept else np.zeros(0)


from kdjax.models.network import Network as Network  # noqa: E402, needs the functions above
from kdjax.models.network import from_equinox as from_equinox  # noqa: E402
from kdjax.models.network import from_linen as from_linen  # noqa: E402
from kdjax.models.network import from_nnx as from_nnx  # noqa: E402
from kdjax.models.probed import probed as probed  # noqa: E402
