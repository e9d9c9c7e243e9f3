"""Layers and networks to time, as functions from a carry to a carry, of the library's forms or of XLA's own."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from kdjax import models
from kdjax.models import layers, rows_first
from kdjax.models.cnn import MalariaCnn
from kdjax.types import Outputs

LAYERS = {  # name: (layer, input, kernel, strides, padding); ours of "rows" has its rows first, as in a network
    "conv first student": ("conv", (64, 28, 28, 1), (3, 3, 1, 16), 2, "SAME"),
    "conv second student": ("conv", (64, 14, 14, 16), (3, 3, 16, 32), 2, "SAME"),
    "conv malaria": ("rows", (64, 32, 32, 3), (3, 3, 3, 4), 1, "VALID"),
    "conv 16 to 16": ("rows", (64, 32, 32, 16), (3, 3, 16, 16), 1, "SAME"),
    "conv 16 to 32 strided": ("rows", (64, 32, 32, 16), (3, 3, 16, 32), 2, "SAME"),
    "conv 64 to 64": ("rows", (64, 8, 8, 64), (3, 3, 64, 64), 1, "SAME"),
    "conv 1x1": ("conv", (64, 16, 16, 96), (1, 1, 96, 24), 1, "SAME"),
    "depthwise": ("depthwise", (32, 16, 16, 96), (3, 3, 1, 96), 1, "SAME"),
    "depthwise between ReLUs": ("between", (32, 16, 16, 96), (3, 3, 1, 96), 1, "SAME"),
    "pool 2x2": ("pool", (64, 28, 28, 16), (2, 2), 2, "VALID"),
    "pool 2x2 overlapping": ("pool", (64, 14, 14, 16), (2, 2), 1, "SAME"),
}
NETWORKS = {  # name: (model, batch, image, classes, whether it trains)
    "keras_student step": ("keras_student", 64, (28, 28, 1), 10, True),
    "malaria_teacher step": ("malaria_teacher", 64, (32, 32, 3), 2, True),
    "malaria_student step": ("malaria_student", 64, (32, 32, 3), 2, True),
    "digits_teacher step": ("digits_teacher", 64, (8, 8, 1), 10, True),
    "resnet8 step": ("resnet8", 64, (32, 32, 3), 10, True),
    "resnet8 step of 128": ("resnet8", 128, (32, 32, 3), 10, True),
    "resnet20 step": ("resnet20", 64, (32, 32, 3), 10, True),
    "resnet8x4 step": ("resnet8x4", 64, (32, 32, 3), 100, True),
    "wrn_16_2 step": ("wrn_16_2", 64, (32, 32, 3), 100, True),
    "mobilenet_v2 step": ("mobilenet_v2", 64, (32, 32, 3), 10, True),
    "mobilenet_v2_w25 step": ("mobilenet_v2_w25", 64, (32, 32, 3), 10, True),
    "keras_teacher forward": ("keras_teacher", 64, (28, 28, 1), 10, False),
}


class LinenMalaria(nn.Module):
    """The network and the parameters of ``kdjax.models.cnn.MalariaCnn``, of Flax's layers with the channels last."""

    like: MalariaCnn

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> Outputs:
        """Scores images."""
        first, second = (nn.Dropout(rate, deterministic=not train) for rate in self.like.dropout)
        for width in self.like.widths:
            x = nn.relu(nn.Conv(width, (3, 3), padding="VALID")(x))
        x = first(nn.max_pool(x, (2, 2), (2, 2))).reshape(x.shape[0], -1)
        x = second(nn.relu(nn.Dense(self.like.hidden)(x)))
        return Outputs(nn.Dense(self.like.num_classes)(x), {})


@contextlib.contextmanager
def native_forms() -> Iterator[None]:
    """While a function is traced in here, the layers of :mod:`kdjax.models.layers` are XLA's own."""
    with (
        mock.patch.object(layers, "_conv", layers._native_conv),
        mock.patch.object(layers, "_depthwise", layers._native_depthwise),
        mock.patch.object(layers, "_max_pool", layers._native_max_pool),
        mock.patch.object(rows_first, "suits", return_value=False),
    ):
        yield


def layer_case(
    layer: str, shape: tuple[int, ...], kernel: tuple[int, ...], strides: int, padding: str, *, native: bool
):
    """``(carry) -> carry`` that runs a layer forward and backward, and its carry."""
    key, options = jax.random.key(0), {"strides": strides, "padding": padding}
    x = jax.random.normal(key, shape)
    if layer == "rows" and not native:  # XLA's own has the channels last, as a user of Flax would
        x = rows_first.from_nhwc(x)
    if layer == "pool":
        return (
            lambda x: x + 1e-6 * jax.grad(lambda x: jnp.sum(layers.max_pool(x, kernel, **options) ** 2))(x)
        ), x

    def between(x, kernel, **options):
        return nn.relu6(layers.depthwise_conv(nn.relu6(x), kernel, **options))

    form = {
        "conv": layers.conv,
        "depthwise": layers.depthwise_conv,
        "between": between,
        "rows": layers.conv,
    }[layer]

    def run(carry):
        gradients = jax.grad(lambda carry: jnp.mean(form(*carry, **options) ** 2))(carry)
        return jax.tree.map(lambda a, b: a - 1e-3 * b, carry, gradients)

    return run, (x, 0.1 * jax.random.normal(key, kernel))


def network_case(
    name: str,
    batch: int,
    shape: tuple[int, ...],
    classes: int,
    trains: bool,
    *,
    native: bool,
    axis_name: str | None = None,
):
    """``(carry) -> carry`` that takes a step of Adam, or only scores a batch, and its carry.

    Gradients and statistics are averaged over the devices of ``axis_name``, as :mod:`kdjax.train` does.
    """
    module = models.build(name, num_classes=classes)
    if native and isinstance(module, MalariaCnn):
        module = LinenMalaria(module)
    if hasattr(module, "axis_name"):
        module = module.clone(axis_name=axis_name)
    params, model_state = models.init(module, shape, seed=0)
    apply, tx = models.apply_fn(module), optax.adam(1e-3)
    x, y = jax.random.normal(jax.random.key(1), (batch, *shape)), jnp.arange(batch) % classes

    def step(carry):
        params, opt_state, model_state, count, x = carry
        key = jax.random.fold_in(jax.random.key(0), count)

        def loss(params):
            outputs, updated = apply(params, model_state, x, train=True, key=key)
            return jnp.mean(
                optax.losses.softmax_cross_entropy_with_integer_labels(outputs.logits, y)
            ), updated

        gradients, model_state = jax.grad(loss, has_aux=True)(params)
        if axis_name is not None:
            gradients, model_state = jax.lax.pmean((gradients, model_state), axis_name)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, model_state, count + 1, x

    def score(carry):
        params, model_state, x = carry
        return params, model_state, x + 1e-6 * jnp.sum(apply(params, model_state, x, train=False)[0].logits)

    if trains:
        return step, (params, tx.init(params), model_state, jnp.zeros((), jnp.int32), x)
    return score, (params, model_state, x)
