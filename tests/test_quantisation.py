"""Fake quantisation computes what an integer runtime computes; networks with it train, and are exported as they are."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from kdjax import data, export, methods, models, quantisation, run
from kdjax.export import checks, litert
from kdjax.export.source import ranges_of
from kdjax.models import Network
from kdjax.quantisation import graph
from kdjax.recipe import Recipe
from kdjax.types import Weights
from tests.test_export import COLOUR, GREY, Student, with_statistics

RNG = np.random.default_rng(0)


def student_of(module: Any, shape: tuple[int, int, int]) -> Student:
    network = models.from_linen(module, shape)
    return Student(network, with_statistics(Weights(*network.init(0))), COLOUR if shape[2] == 3 else GREY)


def pixels_of(student: Student, count: int = 32) -> tuple[np.ndarray, jax.Array]:
    raw = RNG.integers(0, 256, (count, *student.network.image_shape), np.uint8)
    return raw, data.normalise(jnp.asarray(raw), **student.normalisation._asdict())


def logits(network: Network, weights: Weights, images: jax.Array) -> np.ndarray:
    return np.asarray(jax.jit(lambda w, x: network.apply(*w, x, train=False)[0].logits)(weights, images))


RANGES = st.tuples(
    st.floats(-100, 100, width=32), st.floats(0, 100, width=32), st.sampled_from([2, 4, 8])
).filter(lambda r: r[1] > 1e-3)


class TestFakeQuantise:
    @settings(deadline=None)  # the first call compiles
    @given(RANGES, st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=30))
    def test_values_lie_on_a_grid_that_holds_zero_and_no_nearer_one_is_left_out(self, given, values):
        low, width, bits = given
        x = jnp.asarray(values, jnp.float32)
        y = np.asarray(quantisation.fake_quantise(x, low, low + width, bits=bits), np.float64)
        scale, zero = (float(v) for v in quantisation.grid(low, low + width, bits=bits))
        grid = (np.arange(2**bits) - zero) * scale
        assert np.abs(grid).min() == 0
        distance = np.abs(y[:, None] - grid).min(1)
        assert (distance <= 1e-5 * max(scale, np.abs(grid).max())).all()
        nearest = np.abs(np.asarray(x, np.float64)[:, None] - grid).min(1)
        assert (np.abs(y - np.asarray(x)) <= nearest + 1e-5 * max(scale, np.abs(grid).max())).all()

    def test_gradients_pass_within_the_range_and_no_further(self):
        x = jnp.array([-3.0, -0.9, 0.0, 0.4, 1.9, 5.0])
        gradient = jax.grad(lambda x: jnp.sum(quantisation.fake_quantise(x, -1.0, 2.0) * jnp.arange(1.0, 7)))(
            x
        )
        np.testing.assert_array_equal(gradient, [0, 2, 3, 4, 5, 0])
        low, high = jax.grad(lambda r: jnp.sum(quantisation.fake_quantise(x, *r)))((-1.0, 2.0))
        assert (low, high) == (0, 0), "ranges follow the data, not the loss"

    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_a_kernel_has_a_scale_per_output_channel(self, bits):
        kernel = jnp.asarray(RNG.normal(size=(3, 3, 4, 5)) * np.array([1, 10, 100, 1e-3, 0]), jnp.float32)
        found = np.asarray(quantisation.fake_quantise_kernel(kernel, bits=bits))
        most = 2 ** (bits - 1) - 1
        for channel in range(4):
            own, rounded = np.asarray(kernel)[..., channel], found[..., channel]
            scale = np.abs(own).max() / most
            np.testing.assert_allclose(rounded / scale, np.round(rounded / scale), atol=1e-4)
            assert np.abs(own - rounded).max() <= 0.501 * scale
        assert np.abs(found[..., 4]).max() == 0
        gradient = jax.grad(lambda k: jnp.sum(quantisation.fake_quantise_kernel(k, bits=bits)))(kernel)
        np.testing.assert_array_equal(gradient, np.ones_like(gradient))


class TestGraph:
    def points(self, module, shape):
        return student_of(module, shape).network, quantisation.network._graph(
            models.from_linen(module, shape), 2
        ).points

    def test_a_residual_network_folds_to_what_litert_has(self):
        module = models.build("resnet8_w25", num_classes=10)
        _, points = self.points(module, (16, 16, 3))
        block = ("conv", "conv", "conv", "add")  # two of 3x3 and the shortcut
        assert points == ("images", "conv", "conv", "conv", "add", *block, *block, "mean", "dense")

    def test_one_input_channel_is_what_runtimes_call_depthwise(self):
        _, points = self.points(models.build("digits_student", num_classes=10), (8, 8, 1))
        assert points == ("images", "depthwise", "conv", "dense")

    def test_relu6_is_part_of_its_convolution(self):
        module = models.build("mobilenet_v2_w25", num_classes=10, removed=15)
        student = student_of(module, (16, 16, 3))
        traced = quantisation.network._graph(student.network, 2)
        limits = {step.limits for step in traced.steps if step.kind in ("conv", "depthwise")}
        assert limits == {None, (0.0, 6.0)}

    def test_folding_follows_the_order_of_the_operations(self):
        affine = [("mul", 2.0, False), ("add", 3.0, False), ("sub", 1.0, True), ("div", 4.0, False)]
        factor, offset = graph.folded(affine)
        x = 5.0
        np.testing.assert_allclose(factor * x + offset, (1 - (2 * x + 3)) / 4)

    def test_what_has_no_counterpart_is_named(self):
        with pytest.raises(ValueError, match=r"no rule for mul of .*, with batch normalisation behind them"):
            self.points(models.build("wrn_16_2", num_classes=10), (16, 16, 3))

        class Attentive(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = nn.Dense(4)(x.reshape(len(x), -1))
                return nn.Dense(3)(x * nn.softmax(x))

        with pytest.raises(ValueError, match="no rule for"):
            self.points(Attentive(), (4, 4, 1))


CASES = {
    "resnet8_w25": (16, 16, 3),
    "digits_student": (8, 8, 1),
    "malaria_student": (12, 12, 3),
    "mobilenet_v2_w25_cut15": (16, 16, 3),
    "mlp": (6, 6, 1),
}


def case(name: str) -> Student:
    if name == "mobilenet_v2_w25_cut15":
        return student_of(models.build("mobilenet_v2_w25", num_classes=10, removed=15), CASES[name])
    fields = {"widths": (20, 10)} if name == "mlp" else {}
    return student_of(models.build(name, num_classes=10, **fields), CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_without_rounding_it_is_the_network_itself(name, monkeypatch):
    student = case(name)
    _, images = pixels_of(student)
    network = quantisation.quantised(student.network)
    weights = network.calibrated(student.weights, images)
    for rounding in ("fake_quantise", "fake_quantise_kernel"):
        monkeypatch.setattr(quantisation.network, rounding, lambda x, *_, **__: x)
    wanted = logits(student.network, student.weights, images)
    np.testing.assert_allclose(logits(network, weights, images), wanted, atol=2e-5 * np.ptp(wanted))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", CASES)
def test_the_int8_file_computes_what_jax_computes_to_a_unit_or_two(name, bits):
    student = case(name)
    raw, images = pixels_of(student)
    network = quantisation.quantised(student.network, weight_bits=bits)
    weights = network.calibrated(student.weights, images)
    learnt = {
        "low": 0.8 * weights.model_state["ranges"]["low"],
        "high": 0.9 * weights.model_state["ranges"]["high"],
    }
    weights = weights._replace(
        model_state={**weights.model_state, "ranges": learnt}
    )  # that no calibration finds
    quantised = Student(network, weights, student.normalisation)
    source = export.Source(export.function_of(quantised), network.image_shape, 1, raw, ranges_of(quantised))
    found = checks.run(litert.opened(litert.convert_int8(source)), raw, 1)
    wanted = logits(network, weights, images)
    unit = float(quantisation.grid(learnt["low"][-1], learnt["high"][-1])[0])
    assert np.abs(found - wanted).max() <= 3.01 * unit
    assert np.abs(found - logits(student.network, student.weights, images)).max() > 5 * unit, (
        "float is elsewhere"
    )


@pytest.fixture(scope="module")
def trained() -> tuple[data.Dataset, run.Trained]:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 100, (240, 8, 8, 1), np.uint8), np.arange(240) % 4
    images[np.arange(240), 2 * labels] += 120  # each class has a bright row
    dataset = data.split(data.from_arrays(images, labels))
    network = models.from_linen(models.build("digits_student", num_classes=4), (8, 8, 1))
    recipe = Recipe(epochs=15, batch_size=16, learning_rate=5e-3)
    return dataset, run.train(network, methods.labels(), dataset, recipe)


def test_it_trains_from_float_weights_by_any_method_on_logits_and_is_exported_as_trained(trained, tmp_path):
    dataset, teacher = trained
    ids = dataset.splits["train"]
    images = data.normalise(jnp.asarray(dataset.images[ids]), **dataset.normalisation._asdict())
    network = quantisation.quantised(teacher.network, weight_bits=4)
    weights = network.calibrated(teacher.weights, images)
    recipe = Recipe(epochs=3, batch_size=16, learning_rate=1e-3)
    signal = run.plan.signal_of(teacher, network, methods.kd(), dataset, recipe, None)
    make = run.make_trainer(network, methods.kd(), dataset, recipe, teacher=signal)
    student = make(0, init=methods.start_at(*weights))
    before, after = weights.model_state["ranges"], student.weights.model_state["ranges"]
    assert np.abs(np.asarray(after["high"]) - before["high"]).max() > 1e-4, "ranges follow the batches"
    assert student.metrics["accuracy"] >= 0.9
    bundle = export.write(tmp_path / "student", student, dataset, formats=["litert_int8"])
    checked = bundle.description["formats"]["litert_int8"]["checked"]
    assert checked["agreement"] >= 0.98
    assert checked["difference"] <= 3 / 255
    again = export.load(tmp_path / "student", network=network)
    np.testing.assert_allclose(
        export.predict(again, dataset.images[:8]), export.predict(bundle, dataset.images[:8]), atol=1e-6
    )
    with pytest.raises(ValueError, match=r"formats=litert is of floats.*use litert_int8"):
        export.write(tmp_path / "other", student, dataset, formats=["litert"])


def test_statistics_of_batch_normalisation_stay_and_ranges_are_those_of_all_devices():
    student = case("resnet8_w25")
    _, images = pixels_of(student, 16)
    network = quantisation.quantised(student.network, momentum=0.5)
    weights = network.calibrated(student.weights, images[:4])

    def updated(count: int) -> Any:
        devices = jax.local_devices()[:count]
        shards = images.reshape(count, -1, *images.shape[1:])
        step = jax.pmap(
            lambda x: network.apply(*weights, x, train=True)[1], axis_name="batch", devices=devices
        )
        return jax.tree.map(lambda x: np.asarray(x[0]), step(shards))

    one, two = updated(1), updated(2)
    jax.tree.map(
        np.testing.assert_array_equal,
        one["batch_stats"],
        jax.device_get(student.weights.model_state["batch_stats"]),
    )
    for edge in ("low", "high"):
        np.testing.assert_allclose(one["ranges"][edge], two["ranges"][edge], rtol=1e-4, atol=1e-4)
    at_images = 0.5 * weights.model_state["ranges"]["high"][0] + 0.5 * images.max()
    np.testing.assert_allclose(one["ranges"]["high"][0], at_images, rtol=1e-6)


@pytest.mark.parametrize("options", [{"weight_bits": 1}, {"weight_bits": 9}, {"momentum": 1.0}])
def test_bad_options_are_refused(options):
    student = case("digits_student")
    with pytest.raises(ValueError, match="must be from 2 to 8"):
        quantisation.quantised(student.network, **options)
