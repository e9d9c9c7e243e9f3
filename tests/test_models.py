"""Networks and layers against linen, lax and torchvision, and parameter counts against arithmetic."""

import functools
import hashlib
import re
import runpy
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from kdjax import models
from kdjax.models import layers, mobilenet
from kdjax.types import Outputs

SHAPES = {
    "malaria": (32, 32, 3),
    "digits": (8, 8, 1),
    "resnet": (32, 32, 3),
    "wrn": (32, 32, 3),
    "mobilenet": (32, 32, 3),
}
SMALL = {
    "keras_teacher": {"widths": (8, 12)},
    "hinton_teacher": {"widths": (24, 20)},
    "hinton_student": {"widths": (16, 16)},
}
few = settings(max_examples=4, deadline=None, derandomize=True)


def image_shape(name):
    return SHAPES.get(re.match("[a-z]+", name)[0], (28, 28, 1))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@functools.cache
def small(name, **overrides):
    """A network that tests share, compiled once per shape, and its first parameters and state."""
    module = models.build(name, num_classes=3, **SMALL.get(name, {}), **overrides)
    apply = jax.jit(models.apply_fn(module), static_argnames="train")
    return apply, *models.init(module, image_shape(name), seed=0)


def shapes_of(module, shape):
    """Shapes of parameters and state, without drawing them."""
    state = jax.eval_shape(
        functools.partial(module.init, train=False), jax.random.key(0), jnp.zeros((1, *shape))
    )
    return state.pop("params"), state


def native_conv(x, kernel, *, strides, padding, groups=1):
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


def value_and_gradients(function, *arrays):
    """The function's value and the pull-back of a cotangent, compiled as in a training step."""

    @jax.jit
    def run(*arrays):
        y, pull = jax.vjp(function, *arrays)
        return y, pull(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    return run(*arrays)


def assert_same(function, reference, *arrays, rtol=1e-5):
    """Equal in value and in every gradient, up to rounding of sums as large as the largest entry."""
    got, want = value_and_gradients(function, *arrays), value_and_gradients(reference, *arrays)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * max(1e-6, float(jnp.max(jnp.abs(b)))))


# Layers

CONVS = {  # one case for each form on a CPU
    "one_channel": ((2, 9, 8, 1), (3, 3, 5), (2, 2), "SAME"),
    "patches": ((2, 8, 8, 3), (3, 3, 4), (1, 1), "SAME"),
    "patches_valid": ((3, 7, 9, 4), (3, 2, 6), (1, 2), "VALID"),
    "native": ((2, 6, 6, 16), (3, 3, 17), (1, 1), "SAME"),
    "native_strided": ((2, 7, 6, 16), (3, 3, 20), (2, 2), "SAME"),
    "wide": ((2, 5, 5, 66), (3, 3, 8), (2, 1), "SAME"),
    "pointwise": ((2, 5, 6, 16), (1, 1, 7), (1, 1), "SAME"),
    "pointwise_strided": ((2, 5, 6, 16), (1, 1, 7), (2, 2), "VALID"),
    "stride_beyond_window": ((2, 9, 9, 3), (2, 2, 4), (3, 3), "VALID"),
}


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("case", CONVS)
def test_conv_equals_lax(case, chunked, monkeypatch):
    if chunked:
        monkeypatch.setattr(layers, "CHUNK_BYTES", 1)
    shape, (height, width, features), strides, padding = CONVS[case]
    options = {"strides": strides, "padding": padding}
    x, kernel = normal(0, *shape), normal(1, height, width, shape[-1], features)
    assert_same(
        functools.partial(layers.conv, **options), functools.partial(native_conv, **options), x, kernel
    )


sizes = st.integers(1, 9)
steps = st.tuples(st.integers(1, 3), st.integers(1, 3))


@few
@given(
    st.integers(1, 5),
    sizes,
    sizes,
    st.sampled_from([1, 2, 16]),
    steps,
    steps,
    st.sampled_from(["SAME", "VALID"]),
)
def test_conv_equals_lax_in_any_shape(batch, height, width, channels, window, strides, padding):
    height, width = max(height, window[0]), max(width, window[1])
    options = {"strides": strides, "padding": padding}
    x, kernel = normal(0, batch, height, width, channels), normal(1, *window, channels, 3)
    assert_same(
        functools.partial(layers.conv, **options), functools.partial(native_conv, **options), x, kernel
    )


@few
@given(st.integers(1, 3), sizes, sizes, st.integers(1, 4), steps, steps, st.sampled_from(["SAME", "VALID"]))
def test_depthwise_equals_grouped_convolution(batch, height, width, channels, window, strides, padding):
    height, width = max(height, window[0]), max(width, window[1])
    options = {"strides": strides, "padding": padding}
    x, kernel = normal(0, batch, height, width, channels), normal(1, *window, 1, channels)
    native = functools.partial(native_conv, groups=channels, **options)
    assert_same(functools.partial(layers.depthwise_conv, **options), native, x, kernel)


@few
@given(
    st.integers(1, 3),
    sizes,
    sizes,
    st.integers(1, 3),
    steps,
    steps,
    st.sampled_from(["SAME", "VALID"]),
    st.booleans(),
)
def test_max_pool_equals_linen_and_gives_ties_to_the_first(
    b, height, width, c, window, strides, padding, ties
):
    height, width = max(height, window[0]), max(width, window[1])
    x = normal(0, b, height, width, c)
    x = jnp.round(x) if ties else x
    options = {"strides": strides, "padding": padding}
    native = functools.partial(nn.max_pool, window_shape=window, **options)
    assert_same(lambda x: layers.max_pool(x, window, **options), native, x)


def test_max_pool_gradient_of_equal_values_by_hand():
    gradient = jax.grad(lambda x: layers.max_pool(x, 2, strides=2).sum())(jnp.ones((1, 4, 4, 1)))
    np.testing.assert_array_equal(gradient[0, :, :, 0], np.tile([[1, 0], [0, 0]], (2, 2)))


def test_max_pool_strides_default_to_one():
    assert layers.max_pool(normal(0, 1, 4, 5, 2), 2).shape == nn.max_pool(normal(0, 1, 4, 5, 2), (2, 2)).shape


@pytest.mark.parametrize("channels", [1, 3, 16])
def test_gradients_are_the_same_inside_a_loop(channels):
    x, kernel = normal(0, 4, 6, 6, channels), normal(1, 3, 3, channels, 4)

    def loss(kernel):
        return jnp.sum(layers.max_pool(layers.conv(x, kernel, strides=2), 2) ** 2)

    def descend(kernel, _):
        return kernel - 1e-3 * jax.grad(loss)(kernel), None

    looped = jax.jit(lambda kernel: lax.scan(descend, kernel, length=3)[0])(kernel)
    for _ in range(3):
        kernel, _ = descend(kernel, None)
    np.testing.assert_allclose(looped, kernel, rtol=1e-5, atol=1e-6)


def convolutions_in(jaxpr):
    """Every convolution of a program, inner programs included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            yield equation
        for inner in jax.tree.leaves(
            equation.params, is_leaf=lambda p: hasattr(p, "jaxpr") or hasattr(p, "eqns")
        ):
            if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                yield from convolutions_in(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("channels", [1, 3, 16, 80])
def test_cpu_gradients_hold_no_convolution_that_is_slow_in_loops(channels):
    """Only forward convolutions, with undilated images and a kernel of the window's size, are allowed."""
    x, kernel, dy = normal(0, 2, 8, 8, channels), normal(1, 3, 3, channels, 16), normal(2, 2, 8, 8, 16)
    options = {"strides": (1, 1), "pads": ((1, 1), (1, 1))}
    dx = jax.make_jaxpr(functools.partial(layers._cpu_conv_dx, **options))(x, kernel, dy)
    dw = jax.make_jaxpr(functools.partial(layers._cpu_conv_dw, **options))(x, kernel, dy)
    assert list(convolutions_in(dw.jaxpr)) == []
    for found in convolutions_in(dx.jaxpr):
        assert set(found.params["lhs_dilation"]) == set(found.params["rhs_dilation"]) == {1}
        assert found.params["dimension_numbers"] == lax.conv_dimension_numbers(
            x.shape, kernel.shape, ("NHWC", "HWIO", "NHWC")
        )


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_a_depthwise_gradient_pads_once(strides):
    """Padding each of the nine slices fuses with the ReLUs around them, which is slow: see benchmarks.layers."""
    x, kernel = normal(0, 2, 8, 8, 4), normal(1, 3, 3, 1, 4)
    options = {"strides": strides, "pads": ((1, 1), (1, 1))}
    dy = layers._cpu_depthwise(x, kernel, **options)
    dx = jax.make_jaxpr(functools.partial(layers._cpu_depthwise_dx, **options))(x, kernel, dy)
    assert [str(equation.primitive) for equation in dx.jaxpr.eqns].count("pad") == 1


def test_hessian_vector_products_through_the_gradient_rules_equal_the_native_ones():
    x, kernel, tangent = normal(0, 3, 6, 6, 2), normal(1, 3, 3, 2, 3), normal(2, 3, 3, 2, 3)

    def loss(conv, pool, kernel):
        return jnp.sum(jnp.tanh(pool(conv(x, kernel))) ** 2)

    fast = functools.partial(loss, layers.conv, lambda x: layers.max_pool(x, 2, strides=2))
    plain = functools.partial(
        loss,
        functools.partial(native_conv, strides=(1, 1), padding="SAME"),
        lambda x: nn.max_pool(x, (2, 2), strides=(2, 2)),
    )

    @jax.jit
    def products(kernel, tangent):
        want = jax.jvp(jax.grad(plain), (kernel,), (tangent,))[1]
        forward_over_reverse = jax.jvp(jax.grad(fast), (kernel,), (tangent,))[1]
        linearized = jax.linearize(jax.grad(fast), kernel)[1](tangent)
        reverse_over_reverse = jax.grad(lambda kernel: jnp.vdot(jax.grad(fast)(kernel), tangent))(kernel)
        return want, (forward_over_reverse, linearized, reverse_over_reverse)

    want, others = products(kernel, tangent)
    for got in others:
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * float(jnp.max(jnp.abs(want))))


def test_conv_under_vmap_of_the_kernels():
    x, kernels = normal(0, 2, 6, 6, 3), normal(1, 4, 3, 3, 3, 2)
    mine = jax.grad(lambda kernel: jnp.sum(layers.conv(x, kernel) ** 2))
    native = jax.grad(lambda k: jnp.sum(native_conv(x, k, strides=(1, 1), padding="SAME") ** 2))
    many = jax.jit(jax.vmap(mine))(kernels)
    one = [jax.jit(native)(kernel) for kernel in kernels]
    np.testing.assert_allclose(many, jnp.stack(one), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("mine", "linens"), [
    (layers.Conv(5, 3, strides=2), nn.Conv(5, (3, 3), strides=(2, 2))),
    (layers.Conv(5, (1, 2), padding="VALID", use_bias=False), nn.Conv(5, (1, 2), padding="VALID", use_bias=False)),
    (layers.DepthwiseConv(3), nn.Conv(4, (3, 3), feature_group_count=4)),
])  # fmt: skip
def test_modules_share_parameters_with_linen(mine, linens):
    x = normal(0, 2, 8, 8, 4)
    variables = linens.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, mine.init(jax.random.key(0), x)) == jax.tree.map(jnp.shape, variables)
    assert_same(mine.apply, linens.apply, variables, x)


def test_layers_say_what_does_not_fit():
    x, kernel = jnp.zeros((1, 2, 5, 1)), jnp.zeros((3, 3, 1, 1))
    with pytest.raises(ValueError, match="3x3 window does not fit into a 2x5 map"):
        layers.conv(x, kernel, padding="VALID")
    with pytest.raises(ValueError, match="'SAME' or 'VALID', got 'same'"):
        layers.max_pool(x, 2, padding="same")


# Networks


@pytest.mark.parametrize(
    ("name", "classes", "count"),
    [
        ("keras_teacher", 10, (9 + 1) * 256 + (9 * 256 + 1) * 512 + (7 * 7 * 512 + 1) * 10),
        ("keras_student", 10, (9 + 1) * 16 + (9 * 16 + 1) * 32 + (7 * 7 * 32 + 1) * 10),
        ("malaria_teacher", 2, 25_546),  # the study's
        ("malaria_student", 2, 6_430),
        ("hinton_teacher", 10, 785 * 1200 + 1201 * 1200 + 1201 * 10),
        ("hinton_student", 10, 785 * 800 + 801 * 800 + 801 * 10),
        ("digits_teacher", 10, (9 + 1) * 32 + (9 * 32 + 1) * 64 + (4 * 4 * 64 + 1) * 10),
        ("digits_student", 10, (9 + 1) * 4 + (9 * 4 + 1) * 8 + (4 * 4 * 8 + 1) * 10),
        ("gru_student", 10, 3 * (29 * 50 + 50 * 50) + 50 + 51 * 10),
        ("resnet20", 100, 278_324),  # RepDistiller's
        ("resnet32", 100, 472_756),
        ("resnet56", 100, 861_620),
        ("resnet8x4", 100, 1_233_540),
        ("resnet32x4", 100, 7_433_860),
        ("wrn_16_2", 100, 703_284),
        ("wrn_40_1", 100, 569_780),
        ("wrn_40_2", 100, 2_255_156),
        ("mobilenet_v2", 10, 2_236_682),  # torchvision's, and the study's without the last pieces
        ("mobilenet_v2_cut3", 10, 1_019_402),
        ("mobilenet_v2_cut5", 10, 543_498),
        ("mobilenet_v2_cut7", 10, 306_954),
        ("mobilenet_v2_cut9", 10, 185_738),
        ("mobilenet_v2_cut11", 10, 77_194),
        ("mobilenet_v2_cut13", 10, 40_970),
        ("mobilenet_v2_cut15", 10, 16_042),
        ("mobilenet_v2_cut17", 10, 1_994),
    ],
)
def test_parameter_counts(name, classes, count):
    params, _ = shapes_of(models.build(name, num_classes=classes), image_shape(name))
    assert models.count_parameters(params) == count


@pytest.mark.parametrize("depth", [8, 14, 20, 32, 56])
def test_resnet_parameters_by_arithmetic(depth):
    def conv(channels, features, size):
        return channels * features * size**2 + 2 * features  # with its batch normalisation

    count, channels = conv(3, 16, 3) + 65 * 10, 16
    for features in (16, 32, 64):
        count += conv(channels, features, 1) if channels != features else 0
        count += conv(channels, features, 3) + ((depth - 2) // 3 - 1) * conv(features, features, 3)
        channels = features
    params, _ = shapes_of(models.build(f"resnet{depth}", num_classes=10), (32, 32, 3))
    assert models.count_parameters(params) == count


DEEP = (
    "resnet32",
    "resnet56",
    "resnet32x4",
    "wrn_40_1",
    "wrn_40_2",
    *(name for name in models.MODELS if name.startswith("mobilenet") and name != "mobilenet_v2_cut13"),
)  # of the families that the others stand for


@pytest.mark.parametrize("name", [n for n in models.MODELS if n not in DEEP])
def test_every_model_trains_and_names_its_features(name):
    module = models.build(name, num_classes=3)
    params, state = shapes_of(module, image_shape(name))
    apply = functools.partial(models.apply_fn(module), train=True)
    x = jnp.zeros((2, *image_shape(name)))
    outputs, after = jax.eval_shape(apply, params, state, x, key=jax.random.key(0))
    assert isinstance(outputs, Outputs)
    assert outputs.logits.shape == (2, 3)
    assert outputs.logits.dtype == jnp.float32
    assert {"embedding", "stage1"} <= outputs.features.keys()
    last = max(layer for layer in params if layer.startswith("Dense"))
    assert outputs.features["embedding"].shape == (2, params[last]["kernel"].shape[0])
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)


@pytest.mark.parametrize("name", ["keras_student", "digits_student", "hinton_student", "gru_student"])
def test_embedding_is_what_the_last_layer_reads(name):
    apply, params, state = small(name)
    outputs, _ = apply(params, state, normal(0, 2, *image_shape(name)), train=False)
    dense = params["Dense_2" if name == "hinton_student" else "Dense_0"]
    want = outputs.features["embedding"] @ dense["kernel"] + dense["bias"].reshape(1, -1)
    np.testing.assert_allclose(outputs.logits, want, rtol=1e-4, atol=1e-5)


def test_keras_student_equals_linens_layers():
    apply, params, state = small("keras_student")
    x = normal(0, 2, 28, 28, 1)
    y = nn.Conv(16, (3, 3), strides=(2, 2)).apply({"params": params["Conv_0"]}, x)
    y = nn.max_pool(nn.leaky_relu(y, 0.2), (2, 2), padding="SAME")
    y = nn.Conv(32, (3, 3), strides=(2, 2)).apply({"params": params["Conv_1"]}, y)
    y = nn.Dense(3).apply({"params": params["Dense_0"]}, y.reshape(2, -1))
    np.testing.assert_allclose(apply(params, state, x, train=False)[0].logits, y, rtol=1e-4, atol=1e-5)


def test_gru_reads_rows_by_the_equations_of_its_paper():
    apply, params, state = small("gru_student")
    images = normal(0, 2, 28, 28, 1)
    outputs, _ = apply(params, state, images, train=False)
    cell = jax.tree.map(lambda x: np.asarray(x, np.float64), params["GRUCell_0"])
    h = np.zeros((2, 50))
    for number in range(28):
        row = np.asarray(images[:, number, :, 0], np.float64)
        read = {gate: row @ cell[f"i{gate}"]["kernel"] + cell[f"i{gate}"]["bias"] for gate in "rzn"}
        reset = 1 / (1 + np.exp(-read["r"] - h @ cell["hr"]["kernel"]))
        update = 1 / (1 + np.exp(-read["z"] - h @ cell["hz"]["kernel"]))
        new = np.tanh(read["n"] + reset * (h @ cell["hn"]["kernel"] + cell["hn"]["bias"]))
        h = (1 - update) * new + update * h
        np.testing.assert_allclose(outputs.features["stage1"][:, number], h, rtol=1e-3, atol=1e-5)


def test_resnet_features_and_block_by_hand():
    apply, params, state = small("resnet8")
    outputs, _ = apply(params, state, normal(0, 2, 32, 32, 3), train=False)
    features = outputs.features
    for stage, shape in enumerate([(32, 32, 16), (32, 32, 16), (16, 16, 32), (8, 8, 64)]):
        assert features[f"stage{stage}"].shape == (2, *shape)
        if stage:
            np.testing.assert_array_equal(
                features[f"stage{stage}"], nn.relu(features[f"preactivation{stage}"])
            )
    np.testing.assert_allclose(features["embedding"], features["stage3"].mean((1, 2)), rtol=1e-5, atol=1e-6)
    block, scale = params["stage2_block1"], 1 / np.sqrt(1 + 1e-5)  # fresh statistics: normalising only scales
    conv = functools.partial(native_conv, padding=((1, 1), (1, 1)))
    x = features["stage1"]
    y = nn.relu(scale * native_conv(x, block["Conv_0"]["kernel"], strides=(2, 2), padding="SAME"))
    y = scale * conv(y, block["Conv_1"]["kernel"], strides=(1, 1))
    shortcut = scale * x[:, ::2, ::2] @ block["shortcut"]["kernel"][0, 0]
    np.testing.assert_allclose(features["preactivation2"], y + shortcut, rtol=1e-4, atol=1e-4)


def test_wide_resnet_features_and_block_by_hand():
    apply, params, state = small("wrn_16_2")
    outputs, _ = apply(params, state, normal(0, 2, 32, 32, 3), train=False)
    features, scale = outputs.features, 1 / np.sqrt(1 + 1e-5)  # fresh statistics: normalising only scales
    for stage, shape in enumerate([(32, 32, 16), (32, 32, 32), (16, 16, 64), (8, 8, 128)]):
        assert features[f"stage{stage}"].shape == (2, *shape)
        if stage:
            before = features[f"preactivation{stage}"]
            np.testing.assert_allclose(before, scale * features[f"stage{stage}"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        features["embedding"], nn.relu(features["preactivation3"]).mean((1, 2)), rtol=1e-5, atol=1e-6
    )
    conv = functools.partial(native_conv, padding="SAME")
    kernel = {name: leaf["kernel"] for name, leaf in params.items() if "kernel" in leaf}
    x = nn.relu(
        features["preactivation1"]
    )  # the shortcut leaves from behind the first ReLU where channels change
    y = nn.relu(scale * conv(x, kernel["stage2_block1_in"], strides=(2, 2)))
    x = x[:, ::2, ::2] @ kernel["stage2_block1_shortcut"][0, 0] + conv(
        y, kernel["stage2_block1_out"], strides=(1, 1)
    )
    y = nn.relu(scale * conv(nn.relu(scale * x), kernel["stage2_block2_in"], strides=(1, 1)))
    x = x + conv(y, kernel["stage2_block2_out"], strides=(1, 1))
    np.testing.assert_allclose(features["stage2"], x, rtol=1e-3, atol=1e-3)


GOLDENS = Path(__file__).parent / "goldens"
BLOCK = {  # where torchvision has what a block has
    "Conv_0": "conv.0.0",
    "BatchNorm_0": "conv.0.1",
    "DepthwiseConv_0": "conv.1.0",
    "BatchNorm_1": "conv.1.1",
    "Conv_1": "conv.2",
    "BatchNorm_2": "conv.3",
}
FIRST_BLOCK = {
    "DepthwiseConv_0": "conv.0.0",
    "BatchNorm_0": "conv.0.1",
    "Conv_0": "conv.1",
    "BatchNorm_1": "conv.2",
}
AROUND = {
    "Conv_0": "features.0.0",
    "BatchNorm_0": "features.0.1",
    "Conv_1": "features.18.0",
    "BatchNorm_1": "features.18.1",
    "Dense_0": "classifier.1",
}
LEAF = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def torchvisions_name(module, *inner, leaf):
    if inner:
        stage, block = map(int, re.fullmatch("stage([0-9])_block([0-9])", module).groups())
        piece = (0, 3, 6, 13)[stage - 1] + block
        module = f"features.{piece}.{(FIRST_BLOCK if piece == 1 else BLOCK)[inner[0]]}"
    return f"{AROUND.get(module, module)}.{LEAF[leaf]}"


@pytest.mark.parametrize("removed", [0, 5])
def test_mobilenet_equals_torchvisions(removed):
    golden, draw = np.load(GOLDENS / "mobilenet_v2.npz"), runpy.run_path(GOLDENS / "mobilenet_v2.py")["draw"]

    def fill(path, leaf):
        *modules, last = (part.key for part in path)
        name = torchvisions_name(*modules[1:], leaf=last)
        if leaf.ndim == 4:
            return draw(name, tuple(leaf.shape[axis] for axis in (3, 2, 0, 1))).transpose(2, 3, 1, 0)
        return draw(name, leaf.shape[::-1]).T

    module = models.build("mobilenet_v2_w25", num_classes=10, removed=removed)
    images = draw("images", (2, 3, 16, 16)).transpose(0, 2, 3, 1)
    params, state = models.init(module, images.shape[1:], seed=0)
    variables = jax.tree.map_with_path(fill, {"params": params, **state})
    run = jax.jit(
        functools.partial(module.apply, train=False), compiler_options={"xla_backend_optimization_level": 0}
    )
    outputs = run(variables, images)
    for stage in range(5 if removed == 0 else 4):
        want = golden[f"stage{stage}"]
        np.testing.assert_allclose(outputs.features[f"stage{stage}"], want, rtol=1e-4, atol=1e-4)
        if stage:
            np.testing.assert_array_equal(
                outputs.features[f"preactivation{stage}"], outputs.features[f"stage{stage}"]
            )
    np.testing.assert_allclose(outputs.logits, golden[f"logits_removed{removed}"], rtol=1e-4, atol=1e-4)


def mobilenet_shapes(removed):
    """Outputs and parameters of a MobileNetV2, without computing them."""
    module = models.build("mobilenet_v2", num_classes=3, removed=removed)
    run = functools.partial(module.init_with_output, train=False)
    outputs, variables = jax.eval_shape(run, jax.random.key(0), jnp.zeros((2, 32, 32, 3)))
    shapes = {name: x.shape[1:] for name, x in outputs.features.items()}
    return shapes, jax.tree.map(jnp.shape, variables["params"])


def test_mobilenet_students_are_the_first_pieces_of_the_whole():
    maps = {
        "stage0": (32, 32, 32),
        "stage1": (32, 32, 24),
        "stage2": (16, 16, 32),
        "stage3": (8, 8, 96),
        "stage4": (4, 4, 320),
    }
    features, whole = mobilenet_shapes(0)
    before = {f"preactivation{stage}": maps[f"stage{stage}"] for stage in (1, 2, 3, 4)}
    assert features == {**maps, **before, "embedding": (1280,)}
    for removed, last, channels in [(1, 4, 320), (5, 3, 96), (12, 2, 32), (17, 1, 16)]:
        features, params = mobilenet_shapes(removed)
        assert features["embedding"] == (channels,)
        want = {name: shape for name, shape in maps.items() if int(name[-1]) <= last}
        want[f"stage{last}"] = (*want[f"stage{last}"][:2], channels)
        assert {name: shape for name, shape in features.items() if name.startswith("stage")} == want
        assert params.pop("Dense_0")["kernel"] == (channels, 3)
        assert params == {name: whole[name] for name in params}


def test_mobilenet_trains_every_parameter():
    apply, params, state = small("mobilenet_v2", width=0.1, removed=11)
    x = normal(0, 4, 8, 8, 3)
    loss = jax.jit(jax.grad(lambda p: -nn.log_softmax(apply(p, state, x, train=True)[0].logits)[:, 0].mean()))
    for path, gradient in jax.tree_util.tree_leaves_with_path(loss(params)):
        assert np.all(np.isfinite(gradient)), path
        assert np.any(gradient), path


@pytest.mark.parametrize(
    ("width", "channels"), [(0.25, (8, 8, 8, 8, 16, 24, 40, 80)), (0.75, (24, 16, 24, 24, 48, 72, 120, 240))]
)
def test_mobilenet_channels_are_rounded_as_torchvisions(width, channels):
    rounded = [mobilenet._rounded(c * width) for c in (32, 16, 24, 32, 64, 96, 160, 320)]
    assert tuple(rounded) == channels
    assert mobilenet._rounded(1.3 * 8) == 16  # 8 would lose more than a tenth


def test_batch_statistics_move_by_a_tenth_in_training_only():
    apply, params, state = small("resnet8", channels=(4, 4, 4, 4))
    x = 3 + 2 * normal(0, 8, 12, 12, 3)
    _, after = apply(params, state, x, train=True)
    stem = native_conv(x, params["Conv_0"]["kernel"], strides=(1, 1), padding="SAME")
    stats = after["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(stats["mean"], 0.1 * stem.mean((0, 1, 2)), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * stem.var((0, 1, 2)), rtol=1e-3)
    jax.tree.map(np.testing.assert_array_equal, apply(params, after, x, train=False)[1], after)


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices; conftest.py simulates them on a CPU")
def test_axis_name_makes_statistics_global():
    x = normal(0, 8, 8, 8, 3) + jnp.arange(8.0).reshape(8, 1, 1, 1)
    apply, params, state = small("resnet8", channels=(4, 4, 4, 4))
    whole, after = apply(params, state, x, train=True)

    def sharded(axis_name):
        apply, _, _ = small("resnet8", channels=(4, 4, 4, 4), axis_name=axis_name)
        run = jax.pmap(
            lambda x: apply(params, state, x, train=True), axis_name="batch", devices=jax.devices()[:2]
        )
        return run(x.reshape(2, 4, 8, 8, 3))

    synced, synced_state = sharded("batch")
    np.testing.assert_allclose(synced.logits.reshape(8, 3), whole.logits, rtol=1e-3, atol=1e-3)
    for mine, want in zip(jax.tree.leaves(synced_state), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(mine[0], want, rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(mine[0], mine[1])
    assert np.max(np.abs(sharded(None)[0].logits.reshape(8, 3) - whole.logits)) > 1e-2


@pytest.mark.parametrize("name", ["malaria_student", "digits_teacher", "hinton_teacher"])
def test_dropout_needs_a_key_in_training_only(name):
    apply, params, state = small(name)
    x = normal(0, 2, *image_shape(name))
    with pytest.raises(ValueError, match=r"has dropout.*key=jax\.random\.key"):
        apply(params, state, x, train=True)
    logits = [apply(params, state, x, train=True, key=jax.random.key(k))[0].logits for k in (0, 0, 1)]
    np.testing.assert_array_equal(logits[0], logits[1])
    assert np.any(np.abs(logits[0] - logits[2]) > 1e-4)
    evaluated = [apply(params, state, x, train=False, key=k)[0].logits for k in (None, jax.random.key(1))]
    np.testing.assert_array_equal(*evaluated)


def test_a_network_without_dropout_ignores_the_key():
    apply, params, state = small("digits_student")
    x = normal(0, 2, 8, 8, 1)
    runs = [apply(params, state, x, train=True, key=k) for k in (None, jax.random.key(1))]
    np.testing.assert_array_equal(runs[0][0].logits, runs[1][0].logits)
    assert runs[0][1] == {}


@pytest.mark.parametrize(
    ("name", "fields"), [("keras_student", {}), ("resnet8", {"channels": (4, 16, 16, 4)}), ("mlp", {})]
)
def test_bfloat16_computes_in_bfloat16_from_float32_parameters(name, fields):
    apply, params, state = small(name, dtype=jnp.bfloat16, **fields)
    x = normal(0, 4, *((8, 8, 3) if name == "resnet8" else image_shape(name)))
    assert {leaf.dtype for leaf in jax.tree.leaves((params, state))} == {jnp.dtype("float32")}

    def loss(params):
        outputs, _ = apply(params, state, x, train=True)
        return jnp.mean(outputs.logits**2), outputs

    gradient, outputs = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert outputs.logits.dtype == jnp.float32
    assert {f.dtype for f in outputs.features.values()} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
    reference, _ = small(name, **fields)[0](params, state, x, train=True)
    np.testing.assert_allclose(outputs.logits, reference.logits, atol=0.1)


# Initialisation


@pytest.mark.parametrize("name", ["keras_student", "resnet8"])
def test_init_has_linens_distribution(name):
    module, shape = models.build(name, num_classes=10), image_shape(name)
    mine = dict(zip(("params", "state"), models.init(module, shape, seed=0), strict=True))
    draw = jax.jit(
        functools.partial(module.init, train=False), compiler_options={"xla_backend_optimization_level": 0}
    )
    theirs = draw(jax.random.key(0), jnp.zeros((1, *shape)))
    theirs = {"params": theirs.pop("params"), "state": theirs}
    assert jax.tree.structure(mine) == jax.tree.structure(theirs)
    paths = jax.tree_util.tree_leaves_with_path(mine)
    for (path, a), b in zip(paths, jax.tree.leaves(theirs), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
        if path[-1].key != "kernel":
            np.testing.assert_array_equal(a, b)
            continue
        fan_in = np.prod(a.shape[:-1])
        bound = 2 / np.sqrt(fan_in) / 0.87962566103423978
        assert np.max(np.abs(a)) <= bound * (1 + 1e-6)
        error = 5 / np.sqrt(2 * a.size)
        assert np.std(a) * np.sqrt(fan_in) == pytest.approx(1, abs=error), path
        assert np.std(b) * np.sqrt(fan_in) == pytest.approx(1, abs=error), path
        assert abs(np.mean(a)) * np.sqrt(fan_in * a.size) < 5, path


def test_truncated_normal_moments():
    draws = models._truncated_normal(np.random.Philox(key=1), 200_000)
    density = np.exp(-2) / np.sqrt(2 * np.pi)  # at the cut
    inside = 0.954499736103642
    variance = 1 - 4 * density / inside  # of a normal variable cut at two standard deviations
    fourth = 3 * variance - 2 * 2**3 * density / inside
    assert np.sqrt(variance) == pytest.approx(models.TRUNCATED_STD)
    assert len(draws) == 200_000
    assert np.mean(draws) == pytest.approx(0, abs=0.01)
    assert np.var(draws) == pytest.approx(variance, rel=0.01)
    assert np.mean(draws**4) == pytest.approx(fourth, rel=0.02)


def test_init_is_a_function_of_seed_and_path():
    module = models.build("digits_student", num_classes=10)
    first, second, other = (models.init(module, (8, 8, 1), seed=s)[0] for s in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert not np.array_equal(first["Conv_0"]["kernel"], other["Conv_0"]["kernel"])
    # From the definition. These bits, unlike NumPy's normal numbers, are the same on every platform and version.
    key = int.from_bytes(hashlib.sha256(b"0:params/Conv_0/kernel").digest()[:16], "little")
    uniform = (np.random.Philox(key=key).random_raw(2 * (2 * 36 + 16)) >> np.uint64(11)) / 2**53
    place, height = 4 * uniform[:88] - 2, uniform[88:]
    want = place[height < np.exp(-(place**2) / 2)][:36] / models.TRUNCATED_STD / 3
    np.testing.assert_allclose(first["Conv_0"]["kernel"].ravel(), want, rtol=1e-6)
    wider = models.init(models.build("digits_student", num_classes=7), (8, 8, 1), seed=0)[0]
    np.testing.assert_array_equal(first["Conv_1"]["kernel"], wider["Conv_1"]["kernel"])


def test_init_does_not_run_the_network_which_would_have_to_be_compiled():
    runs = []

    class Recorder(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            del train
            jax.debug.callback(lambda: runs.append(1))
            return Outputs(nn.Dense(2)(x), {})

    models.init(Recorder(), (2, 2, 1), seed=0)
    jax.effects_barrier()
    assert runs == []
    Recorder().init(jax.random.key(0), jnp.zeros((1, 2, 2, 1)), train=False)
    jax.effects_barrier()
    assert runs == [1]


def test_init_names_a_parameter_that_it_does_not_know():
    class Odd(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            del train
            angle = self.param("angle", nn.initializers.zeros, (2,))
            return Outputs(angle, {})

    with pytest.raises(ValueError, match=r"not 'params/angle'.*module\.init"):
        models.init(Odd(), (2, 2, 1), seed=0)


@pytest.mark.parametrize("shape", [(32, 32), (0, 4, 1), (1, 8, 8, 3)])
def test_init_wants_an_image_shape(shape):
    with pytest.raises(ValueError, match=r"\(height, width, channels\)"):
        models.init(models.build("mlp", num_classes=2), shape, seed=0)


def test_init_says_that_images_are_too_small():
    with pytest.raises(ValueError, match="3x3 window does not fit into a 2x2 map"):
        models.init(models.build("malaria_student", num_classes=2), (4, 4, 3), seed=0)


# Names


def test_build_errors_name_the_way_out():
    with pytest.raises(ValueError, match="did you mean 'resnet20'"):
        models.build("resnet-20", num_classes=10)
    with pytest.raises(ValueError, match="there are digits_student, digits_teacher"):
        models.build("xyz", num_classes=10)
    with pytest.raises(ValueError, match="no field 'widht'; it has width, dropout, dtype"):
        models.build("digits_student", num_classes=10, widht=3)
    with pytest.raises(ValueError, match="num_classes=0"):
        models.build("mlp", num_classes=0)
    with pytest.raises(ValueError, match=r"6n \+ 2 layers, got 18"):
        models.build("resnet20", num_classes=10, depth=18)
    with pytest.raises(ValueError, match="got removed=18: write 0 to 17"):
        models.build("mobilenet_v2", num_classes=10, removed=18)
    with pytest.raises(ValueError, match="positive factor, got 0: write 1 or"):
        models.build("mobilenet_v2", num_classes=10, width=0)
    with pytest.raises(ValueError, match="at least one hidden layer"):
        models.build("mlp", num_classes=10, widths=())
    with pytest.raises(ValueError, match="at least one unit, got units=0"):
        models.build("gru_student", num_classes=10, units=0)


def test_overrides_reach_the_module():
    assert models.build("digits_student", num_classes=10, width=6).width == 6
    assert models.build("resnet8", num_classes=10, channels=(32, 64, 128, 256)).depth == 8
