"""Layers with rows first and images last, against XLA's own, linen's and the same layers in NHWC."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from kdjax import models
from kdjax.models import layers, rows_first

IMAGES = 8  # the smallest batch in this layout


def arrays(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def native(x, kernel, strides, pads):
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def mine(x, kernel, strides, pads):
    return rows_first.to_nhwc(rows_first.conv(rows_first.from_nhwc(x), kernel, strides, pads))


def measured(form, x, kernel):
    """Value, gradients, and a product of the Hessian of a smooth loss."""

    def loss(arrays):
        return jnp.sum(jnp.tanh(form(*arrays)) ** 2)

    slope = jax.grad(loss)
    return form(x, kernel), slope((x, kernel)), jax.jvp(slope, ((x, kernel),), ((x + 1, kernel - 1),))[1]


def assert_same(a, b, tolerance=1e-4):
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance * float(jnp.max(jnp.abs(other))), rtol=0)


@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    window=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.sampled_from(["SAME", "VALID"]),
    channels=st.sampled_from([1, 2, 3, 8]),
    features=st.sampled_from([1, 2, 3, 8]),
)
@settings(max_examples=16, deadline=None)
def test_any_convolution_is_xlas(size, window, strides, padding, channels, features):
    size = tuple(map(max, size, window))  # a window fits
    x, kernel = arrays((IMAGES, *size, channels), (*window, channels, features))
    pads = tuple(lax.padtype_to_pads(size, window, strides, padding))
    options = {"strides": strides, "pads": pads}

    def slopes(form):
        return jax.jit(jax.value_and_grad(lambda arrays: jnp.sum(jnp.tanh(form(*arrays, **options)) ** 2)))

    assert_same(slopes(mine)((x, kernel)), slopes(native)((x, kernel)))


# A ResNet's: the stem, stride 1, stride 2, the shortcut; PyTorch's padding of a strided one; torn-off edges; heights
# that two and four rows at once do not divide; strides along one axis; a 1 x 1 kernel beside the images.
@pytest.mark.parametrize(
    ("shape", "kernel", "strides", "pads"),
    [
        ((32, 16, 16, 3), (3, 3, 3, 16), (1, 1), ((1, 1), (1, 1))),
        ((32, 8, 8, 16), (3, 3, 16, 16), (1, 1), ((1, 1), (1, 1))),
        ((32, 8, 8, 16), (3, 3, 16, 32), (2, 2), ((0, 1), (0, 1))),
        ((32, 8, 8, 16), (3, 3, 16, 32), (2, 2), ((1, 1), (1, 1))),
        ((32, 8, 8, 16), (1, 1, 16, 32), (2, 2), ((0, 0), (0, 0))),
        ((8, 9, 7, 2), (3, 3, 2, 3), (1, 1), ((-1, 2), (3, -2))),
        ((8, 9, 7, 8), (3, 3, 8, 9), (1, 1), ((-1, 2), (3, -2))),
        ((8, 7, 5, 8), (3, 3, 8, 8), (1, 1), ((1, 1), (1, 1))),
        ((8, 7, 5, 8), (3, 3, 8, 8), (1, 1), ((0, 0), (0, 0))),
        ((8, 2, 4, 8), (3, 3, 8, 8), (1, 1), ((1, 1), (1, 1))),
        ((8, 7, 7, 8), (3, 4, 8, 8), (1, 3), ((1, 1), (1, 1))),
        ((8, 7, 7, 8), (3, 4, 8, 8), (3, 1), ((1, 1), (1, 1))),
        ((8, 4, 4, 2), (1, 1, 2, 3), (2, 2), ((1, 1), (1, 1))),
    ],
)
def test_these_convolutions_are_xlas(shape, kernel, strides, pads):
    x, kernel = arrays(shape, kernel)
    forms = [functools.partial(form, strides=strides, pads=pads) for form in (mine, native)]
    assert_same(*(jax.jit(functools.partial(measured, form))(x, kernel) for form in forms))


@pytest.mark.parametrize(("channels", "stride"), [(2, 1), (8, 1), (2, 2)])
def test_reverse_over_reverse(channels, stride):
    """As a penalty on input gradients asks for. JAX transposes the loops: what they carry needs to be linear."""
    x, kernel = arrays((IMAGES, 5, 4, channels), (3, 3, channels, 3))

    def penalty(form, x, kernel):
        def loss(x):
            return jnp.sum(jnp.tanh(form(x, kernel, (stride, stride), ((1, 1), (1, 1)))))

        return jnp.sum(jax.grad(loss)(x) ** 2)

    assert_same(*(jax.grad(functools.partial(penalty, form), (0, 1))(x, kernel) for form in (mine, native)))


def test_several_networks_at_once():
    x, kernel = arrays((IMAGES, 5, 4, 2), (4, 3, 3, 2, 3))
    pads = ((1, 1), (1, 1))

    def slope(form, kernel):
        return jax.grad(lambda kernel: jnp.sum(jnp.tanh(form(x, kernel, (2, 2), pads))))(kernel)

    assert_same(*(jax.vmap(functools.partial(slope, form))(kernel) for form in (mine, native)))


@pytest.mark.parametrize("size", [4, 8])
def test_winograds_rounding_is_close_to_that_of_plain_sums(size):
    """Against float64; the largest error of four rows at once is a few times that of XLA's own convolution."""
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(8, size, size, 64)), rng.normal(size=(3, 3, 64, 8))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    exact = np.einsum("nhwcij,ijcf->nhwf", windows, kernel)
    narrow = (jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32), (1, 1), ((1, 1), (1, 1)))
    error, plain = (np.max(np.abs(form(*narrow) - exact)) / np.max(np.abs(exact)) for form in (mine, native))
    assert error < 2e-6
    assert error < 8 * plain


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_summed_in_float32(dtype):
    x, kernel = (a.astype(dtype) for a in arrays((16, 8, 8, 8), (3, 3, 8, 4)))
    pads = ((1, 1), (1, 1))
    y, pull_back = jax.vjp(lambda x, kernel: mine(x, kernel, (1, 1), pads), x, kernel)
    exact, exactly = jax.vjp(
        lambda x, kernel: native(x, kernel, (1, 1), pads), x.astype(jnp.float32), kernel.astype(jnp.float32)
    )
    found = (y, *pull_back(jnp.ones_like(y)))
    assert {a.dtype for a in found} == {jnp.dtype(dtype)}
    wanted = (exact, *exactly(jnp.ones_like(exact)))
    assert_same([a.astype(jnp.float32) for a in found], wanted, 2 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize(("window", "strides", "padding"), [(2, 2, "VALID"), (2, 1, "SAME"), (3, 2, "SAME")])
def test_pooling_is_that_of_nhwc_and_ties_go_to_the_first(window, strides, padding):
    x = jnp.round(arrays((IMAGES, 7, 6, 3))[0])  # many ties

    def slope(turn, back):
        def pooled(x):
            return back(layers.max_pool(turn(x), window, strides=strides, padding=padding))

        return pooled(x), jax.grad(lambda x: jnp.sum(pooled(x) ** 2))(x)

    ours = slope(rows_first.from_nhwc, rows_first.to_nhwc)
    theirs = slope(lambda x: x, lambda x: x)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("rows", [True, False])
def test_batch_norm_is_linens(train, dtype, rows):
    turn, back = (rows_first.from_nhwc, rows_first.to_nhwc) if rows else (lambda x: x, lambda x: x)
    (x,) = arrays((16, 5, 4, 3))
    norm = layers.BatchNorm(use_running_average=not train, momentum=0.9, dtype=dtype)
    variables = {
        "params": {"scale": jnp.array([1.0, 2.0, 3.0]), "bias": jnp.array([0.0, 1.0, -1.0])},
        "batch_stats": {"mean": jnp.array([0.1, 0.2, 0.3]), "var": jnp.array([1.0, 2.0, 0.5])},
    }
    linens = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=dtype)
    y, state = norm.apply(variables, turn(3 * x + 1), mutable=["batch_stats"])
    want, wanted_state = linens.apply(variables, 3 * x + 1, mutable=["batch_stats"])
    assert y.dtype == want.dtype
    np.testing.assert_allclose(
        back(y).astype(jnp.float32), want.astype(jnp.float32), atol=1e-5 if dtype is None else 0.05
    )
    norm_init, linens_init = (jax.eval_shape(n.init, jax.random.key(0), x) for n in (norm, linens))
    assert norm_init == linens_init
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), state, wanted_state)


def test_depthwise_and_sizes_are_those_of_nhwc():
    x, kernel = arrays((16, 5, 4, 3), (3, 3, 1, 3))
    y = layers.depthwise_conv(rows_first.from_nhwc(x), kernel)
    np.testing.assert_allclose(rows_first.to_nhwc(y), layers.depthwise_conv(x, kernel), atol=1e-6)
    np.testing.assert_allclose(layers.global_mean(y), layers.global_mean(rows_first.to_nhwc(y)), atol=1e-6)
    assert layers.size(y) == (5, 4)
    assert layers.channels(y) == 3


@pytest.mark.parametrize(
    ("batch", "images"),
    [(1, None), (7, None), (8, 8), (96, 32), (100, 25), (127, 127), (131, None), (512, 32)],
)
def test_batches_are_cut_into_groups_of_about_32(batch, images):
    assert rows_first.images_per_group(batch) == images
    x = jnp.arange(batch * 6.0).reshape(batch, 1, 2, 3)
    if images is None:
        with pytest.raises(ValueError, match="can't be cut"):
            rows_first.from_nhwc(x)
    else:
        assert rows_first.from_nhwc(x).shape == (batch // images, 1, 3, 2, images)
        np.testing.assert_array_equal(rows_first.to_nhwc(rows_first.from_nhwc(x)), x)


class TestNetworks:
    """What a user sees of a network does not depend on how its maps lie."""

    @pytest.mark.parametrize(
        ("name", "fields"),
        [
            ("resnet8", {"channels": (4, 4, 8, 8)}),
            ("wrn_16_2", {"depth": 10, "width": 1}),
            ("malaria_student", {"dropout": (0.5, 0.5)}),
        ],
    )
    def test_outputs_gradients_and_statistics(self, monkeypatch, name, fields):
        module = models.build(name, num_classes=3, **fields)
        params, state = models.init(module, (16, 16, 3), seed=0)
        apply, (x,) = models.apply_fn(module), arrays((IMAGES, 16, 16, 3))

        def loss(params):
            outputs, new = apply(params, state, x, train=True, key=jax.random.key(0))
            sums = [jnp.mean(feature**2) for feature in outputs.features.values()]
            return jnp.mean(outputs.logits**2) + sum(sums), (outputs, new)

        found = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        monkeypatch.setattr(rows_first, "suits", lambda x: False)
        wanted = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, wanted)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-3)

    def lowered(self, name, batch, platform):
        module = models.build(name, num_classes=3)
        params, state = models.init(module, (32, 32, 3), seed=0)
        apply, x = models.apply_fn(module), jnp.zeros((batch, 32, 32, 3))

        def loss(params):
            return jnp.mean(apply(params, state, x, train=True, key=jax.random.key(0))[0].logits ** 2)

        traced = jax.jit(jax.value_and_grad(loss)).trace(params)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    @pytest.mark.parametrize("name", ["resnet8", "malaria_student"])
    def test_the_layout_is_chosen_when_compiled(self, name):
        cpu, tpu = (self.lowered(name, 8, platform) for platform in ("cpu", "tpu"))
        assert "stablehlo.convolution" not in cpu
        assert "stablehlo.while" in cpu
        assert "stablehlo.convolution" in tpu
        assert "stablehlo.while" not in tpu

    def test_a_few_images_stay_as_they_are(self):
        assert "stablehlo.convolution" in self.lowered("resnet8", 2, "cpu")

    def test_shards_of_devices(self):
        module = models.build("resnet8", num_classes=3, channels=(4, 4, 8, 8), axis_name="devices")
        params, state = models.init(module, (8, 8, 3), seed=0)
        apply, (x,) = models.apply_fn(module), arrays((2, IMAGES, 8, 8, 3))

        def logits(x):
            return apply(params, state, x, train=True)

        sharded = jax.pmap(logits, axis_name="devices")(x)
        whole = jax.jit(models.apply_fn(module.clone(axis_name=None)), static_argnames="train")(
            params, state, x.reshape(-1, 8, 8, 3), train=True
        )
        np.testing.assert_allclose(sharded[0].logits.reshape(-1, 3), whole[0].logits, atol=1e-5)
        for one, other in zip(jax.tree.leaves(sharded[1]), jax.tree.leaves(whole[1]), strict=True):
            np.testing.assert_allclose(np.asarray(one)[0], np.asarray(other), atol=1e-5)


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
    (x,) = arrays((IMAGES, 32, 32, 3), seed=1)
    outputs, _ = jax.jit(models.apply_fn(module), static_argnames="train")(params, state, x, train=False)
    logits, features = Linen().apply({"params": params}, x)
    np.testing.assert_allclose(outputs.logits, logits, atol=1e-5)
    assert_same([outputs.features[name] for name in ("stage1", "stage2", "embedding")], list(features))
