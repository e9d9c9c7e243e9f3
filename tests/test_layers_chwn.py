"""Convolutions with the images last, against XLA's own with its own gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from kdjax import models
from kdjax.models import layers_chwn


def native(x, kernel):
    order = ("CHWN", "HWIO", "CHWN")
    return lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=order)


def arrays(channels, features, window, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (channels, 7, 6, 5), (*window, channels, features)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


# One and several features, a window that is not square.
@pytest.mark.parametrize(
    ("channels", "features", "window"), [(2, 3, (3, 3)), (8, 2, (3, 3)), (1, 1, (2, 4)), (3, 2, (1, 1))]
)
def test_values_gradients_and_curvature_are_those_of_a_convolution(channels, features, window):
    x, kernel = arrays(channels, features, window)

    def measured(form):
        def loss(arrays):
            return jnp.sum(jnp.tanh(form(*arrays)) ** 2)

        slope = jax.grad(loss)
        return form(x, kernel), slope((x, kernel)), jax.jvp(slope, ((x, kernel),), ((x, kernel),))[1]

    mine, theirs = jax.jit(lambda: measured(layers_chwn.conv))(), jax.jit(lambda: measured(native))()
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_bfloat16_stays_bfloat16_and_is_summed_wider():
    x, kernel = (a.astype(jnp.bfloat16) for a in arrays(8, 2, (3, 3)))
    y, gradient = layers_chwn.conv(x, kernel), jax.grad(lambda k: jnp.sum(layers_chwn.conv(x, k)))(kernel)
    assert y.dtype == gradient.dtype == jnp.bfloat16
    exact = native(x.astype(jnp.float32), kernel.astype(jnp.float32))
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2**-7, atol=1e-3)


def test_pooling_takes_the_largest_and_drops_what_fills_no_window():
    x = arrays(2, 1, (1, 1))[0]
    rows_first = jnp.transpose(x, (3, 1, 2, 0))
    want = jnp.transpose(nn.max_pool(rows_first, (2, 2), (2, 2)), (3, 1, 2, 0))
    np.testing.assert_array_equal(layers_chwn.max_pool(x, 2), want)
    assert layers_chwn.max_pool(x, 2).shape == (2, 3, 3, 5)


def test_the_malaria_network_is_what_linen_makes_of_its_layers():
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(2, (3, 3), padding="VALID")(x))
            first = x
            x = nn.max_pool(nn.relu(nn.Conv(4, (3, 3), padding="VALID")(x)), (2, 2), (2, 2))
            second, x = x, x.reshape(x.shape[0], -1)
            x = nn.relu(nn.Dense(8)(x))
            return nn.Dense(2)(x), (first, second, x)

    module = models.build("malaria_student", num_classes=2)
    params, state = models.init(module, (32, 32, 3), seed=0)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 32, 32, 3)), jnp.float32)
    outputs, _ = models.apply_fn(module)(params, state, x, train=False)
    logits, features = Linen().apply({"params": params}, x)
    np.testing.assert_allclose(outputs.logits, logits, atol=1e-5)
    for name, feature in zip(("stage1", "stage2", "embedding"), features, strict=True):
        np.testing.assert_allclose(outputs.features[name], feature, atol=1e-5)
