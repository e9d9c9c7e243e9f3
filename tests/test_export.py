"""Exported students say what JAX says, or are not written; bundles come back whole or are refused."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from kdjax import data, export, models
from kdjax.export import checks, litert, onnx, stablehlo, writing
from kdjax.models import Network, layers
from kdjax.types import Normalisation, Weights

RNG = np.random.default_rng(0)
COLOUR = Normalisation((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
GREY = Normalisation((0.4,), (0.3,))


class Student(NamedTuple):
    """What an export needs of a finished run."""

    network: Network
    weights: Weights
    normalisation: Normalisation


def with_statistics(weights: Weights) -> Weights:
    """Weights whose batch statistics and biases are not those of a new network, so that folding them matters."""
    rng = np.random.default_rng(1)

    def drawn(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/").rpartition("/")[2]
        if name in ("mean", "bias"):
            return jnp.asarray(rng.normal(0, 0.1, leaf.shape), jnp.float32)
        return (
            jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32) if name in ("var", "scale") else leaf
        )

    return jax.tree.map_with_path(drawn, weights)


def student_of(name: str, shape: tuple[int, int, int], classes: int = 10) -> Student:
    network = models.from_linen(models.build(name, num_classes=classes), shape)
    weights = with_statistics(Weights(*network.init(0)))
    return Student(network, weights, COLOUR if shape[2] == 3 else GREY)


def dataset_of(shape: tuple[int, int, int] = (8, 8, 1), n: int = 60, classes: int = 10) -> data.Dataset:
    images = RNG.integers(0, 256, (n, *shape), np.uint8)
    return data.split(data.from_arrays(images, np.arange(n) % classes))


def source_of(student: Student, batch_size: int | None = 1, calibration: Any = None) -> export.Source:
    return export.Source(export.function_of(student), student.network.image_shape, batch_size, calibration)


def expected(student: Student, images: np.ndarray) -> np.ndarray:
    """Logits by the way that a training evaluates, which does not go through kdjax.export."""
    pixels = data.normalise(jnp.asarray(images), **student.normalisation._asdict())
    return np.asarray(student.network.apply(*student.weights, pixels, train=False)[0].logits)


STUDIES = {
    "digits_teacher": (8, 8, 1),
    "digits_student": (8, 8, 1),
    "keras_student": (28, 28, 1),
    "hinton_student": (28, 28, 1),
    "gru_student": (28, 28, 1),
    "malaria_teacher": (32, 32, 3),
    "malaria_student": (32, 32, 3),
    "resnet8": (32, 32, 3),
    "resnet8_w50": (32, 32, 3),
    "resnet20": (32, 32, 3),
    "wrn_16_2": (32, 32, 3),
    "mobilenet_v2_w25": (32, 32, 3),
    "mobilenet_v2_w25_cut5": (32, 32, 3),
}


@pytest.mark.parametrize("name", STUDIES)
def test_every_network_of_a_study_becomes_a_litert_file_that_equals_jax(name):
    student, images = student_of(name, STUDIES[name]), RNG.integers(0, 256, (6, *STUDIES[name]), np.uint8)
    content = litert.convert(source_of(student))
    found, wanted = checks.run(litert.opened(content), images, 1), expected(student, images)
    assert np.abs(found - wanted).max() <= 1e-5 * np.ptp(wanted)


@pytest.mark.parametrize("name", STUDIES)
def test_a_stablehlo_file_takes_any_number_of_images(name):
    shape = STUDIES[name]
    student, images = student_of(name, shape), RNG.integers(0, 256, (5, *shape), np.uint8)
    answer = stablehlo.opened(stablehlo.convert(source_of(student, None)))
    wanted = expected(student, images)
    for some in (slice(0, 1), slice(0, 5)):
        np.testing.assert_allclose(answer(images[some]), wanted[some], atol=1e-5 * np.ptp(wanted))


def test_batch_normalisation_is_folded_into_the_convolutions_of_a_litert_file():
    student = student_of("resnet8_w25", (32, 32, 3))
    content = litert.convert(source_of(student))
    ops = [name for name, _ in litert.operations(content)]
    assert ops.count("CONV_2D") == 9  # seven of 3x3, and two shortcuts
    assert ops.count("MUL") + ops.count("SUB") <= 2, "only the normalisation of pixels multiplies"


@pytest.mark.parametrize("name", ["resnet8_w25", "mobilenet_v2_w25_cut5", "digits_student"])
def test_an_int8_file_computes_no_convolution_and_no_product_in_float(name):
    shape = STUDIES.get(name, (32, 32, 3))
    student, images = student_of(name, shape), RNG.integers(0, 256, (64, *shape), np.uint8)
    content = litert.convert_int8(source_of(student, 1, images))
    for operation, kinds in litert.operations(content):
        if operation in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "ADD", "MEAN", "MAX_POOL_2D"):
            assert "float32" not in kinds, (operation, kinds)
    assert litert.inputs_of(content) == {"image": ((1, *shape), "uint8")}
    wanted, found = expected(student, images), checks.run(litert.opened(content), images, 1)
    assert np.abs(found - wanted).max() <= 0.1 * np.ptp(wanted)  # 256 levels of a few layers


def test_within_native_forms_a_network_lowers_to_xlas_own_operations_on_a_cpu():
    student = student_of("resnet8_w25", (32, 32, 3))
    images = jax.ShapeDtypeStruct((64, 32, 32, 3), jnp.float32)

    def lowered():
        apply = jax.jit(lambda x: student.network.apply(*student.weights, x, train=False)[0].logits)
        return apply.lower(images).as_text()

    assert "while" in lowered(), "compiled for a CPU, it has loops over rows"
    with layers.native_forms():
        native = lowered()
    assert native.count("stablehlo.convolution") == 9
    assert "while" not in native
    assert "while" in lowered(), "outside again, it has the forms of the platform"


class Lengths(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(x.reshape(len(x), -1))


def test_a_network_that_reads_the_number_of_images_is_refused_for_any_number_and_taken_for_one():
    network = models.from_linen(Lengths(), (8, 8, 1))
    student = Student(network, Weights(*network.init(0)), GREY)
    with pytest.raises(ValueError, match=r"x.shape\[0\] in place of len\(x\).*batch_size=1"):
        stablehlo.convert(source_of(student, None))
    images = RNG.integers(0, 256, (1, 8, 8, 1), np.uint8)
    answer = stablehlo.opened(stablehlo.convert(source_of(student)))
    np.testing.assert_allclose(answer(images), expected(student, images), atol=1e-5)


def nnx_network() -> Network:
    from flax import nnx

    class Small(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(64, 16, rngs=rngs)
            self.norm = nnx.BatchNorm(16, rngs=rngs)
            self.last = nnx.Linear(16, 10, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.relu(self.norm(self.first(x.reshape(x.shape[0], -1)))))

    return models.from_nnx(Small, (8, 8, 1))


def equinox_network() -> Network:
    import equinox as eqx

    class Small(eqx.Module):
        first: eqx.nn.Linear
        last: eqx.nn.Linear

        def __init__(self, key):
            one, two = jax.random.split(key)
            self.first, self.last = eqx.nn.Linear(64, 16, key=one), eqx.nn.Linear(16, 10, key=two)

        def __call__(self, x):
            return self.last(jax.nn.gelu(self.first(x.reshape(-1))))

    return models.from_equinox(Small, (8, 8, 1))


@pytest.mark.parametrize("make", [nnx_network, equinox_network])
def test_networks_of_other_frameworks_are_exported_checked_and_read_back(make, tmp_path):
    network = make()
    student = Student(network, Weights(*network.init(3)), GREY)
    bundle = export.write(
        tmp_path / "b", student, dataset_of(), formats=["stablehlo", "litert", "litert_int8"]
    )
    assert bundle.description["formats"]["litert"]["checked"]["difference"] <= 1e-6
    images = dataset_of().images[:5]
    again = export.load(tmp_path / "b", network=network)
    wanted = jax.nn.softmax(jnp.asarray(expected(student, images)))
    np.testing.assert_allclose(export.predict(again, images), wanted, atol=1e-6)
    with pytest.raises(ValueError, match=r"not one of kdjax\.models"):
        export.load(tmp_path / "b")


# The bundle


@pytest.fixture
def bundle(tmp_path) -> export.Bundle:
    return export.write(
        tmp_path / "student",
        student_of("digits_student", (8, 8, 1)),
        dataset_of(n=1200),
        formats=["litert"],
        metrics={"split": "test", "accuracy": 0.5},
        provenance={"arm": "kd"},
    )


def test_a_bundle_comes_back_and_predicts_the_same(bundle):
    student, images = student_of("digits_student", (8, 8, 1)), RNG.integers(0, 256, (9, 8, 8, 1), np.uint8)
    again = export.load(bundle.directory)
    wanted = jax.nn.softmax(jnp.asarray(expected(student, images)))
    np.testing.assert_allclose(export.predict(again, images), wanted, atol=1e-6)
    said = again.description
    assert again.class_names == tuple("0123456789")
    assert said["metrics"] == {"split": "test", "accuracy": 0.5}
    assert said["provenance"] == {"arm": "kd"}
    assert said["formats"]["litert"]["checked"]["images"] == checks.IMAGES
    assert said["formats"]["litert"]["checked"]["test_images"] == len(dataset_of(n=1200).splits["test"])
    assert set(said["files"]) == {"weights.npz", "student.tflite"}
    names = np.load(bundle.directory / "weights.npz").files
    assert "params/Dense_0/kernel" in names, "NumPy alone can read the weights, by name"


@pytest.mark.parametrize("name", ["weights.npz", "student.tflite"])
def test_a_missing_or_altered_file_of_a_bundle_is_named_and_refused(bundle, name):
    path = bundle.directory / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is not the file that was exported"):
        export.load(bundle.directory)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing"):
        export.load(bundle.directory)


def test_an_altered_description_is_refused(bundle):
    path = bundle.directory / "bundle.json"
    sealed = json.loads(path.read_text())
    sealed["body"]["class_names"].reverse()
    path.write_text(json.dumps(sealed))
    with pytest.raises(ValueError, match=r"bundle.json is damaged.*Export the student again"):
        export.load(bundle.directory)
    path.unlink()
    with pytest.raises(ValueError, match="is no bundle"):
        export.load(bundle.directory)


def test_a_bundle_replaces_a_bundle_and_nothing_else(bundle, tmp_path):
    student = student_of("digits_student", (8, 8, 1))
    again = export.write(bundle.directory, student, dataset_of(n=1200))
    assert again.description["formats"] == {}
    assert not (bundle.directory / "student.tflite").exists()
    other = tmp_path / "photos"
    other.mkdir()
    (other / "me.jpg").write_text("")
    with pytest.raises(ValueError, match="holds something that is no bundle"):
        export.write(other, student, dataset_of())
    assert [path.name for path in other.iterdir()] == ["me.jpg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "student"], (
        "nothing partial is left"
    )


def test_a_format_that_fails_its_check_leaves_nothing(tmp_path, monkeypatch):
    student, dataset = student_of("digits_student", (8, 8, 1)), dataset_of()

    def wrong(source):
        return litert.convert(source._replace(function=lambda x: source.function(x) * 1.01))

    spoilt = {**export.FORMATS, "litert": export.FORMATS["litert"]._replace(convert=wrong)}
    monkeypatch.setattr(writing, "FORMATS", spoilt)
    with pytest.raises(
        ValueError, match=r"litert is not exported: a logit differs from JAX's by .*on 60 images"
    ):
        export.write(tmp_path / "student", student, dataset, formats=["stablehlo", "litert"])
    assert list(tmp_path.iterdir()) == []


def test_the_verdict_on_an_int8_file_is_about_accuracy():
    labels = np.repeat([0, 1], 50)
    right, limits = np.eye(2)[labels], export.Limits(accuracy_drop=0.02)
    flipped = right.copy()
    flipped[:3] = flipped[:3, ::-1]
    found = export.compare(flipped, right, labels)
    assert (found["agreement"], found["accuracy"], found["accuracy_jax"]) == (0.97, 0.97, 1.0)
    assert checks.verdict(found, limits, quantised=True).startswith("it loses 3.0 points of accuracy")
    assert checks.verdict(export.compare(flipped, flipped, labels), limits, quantised=True) == ""
    assert "not finite" in checks.verdict(
        export.compare(right * np.nan, right, labels), limits, quantised=True
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"formats": ["tflite"]}, r"formats=tflite is not known; there are stablehlo, litert"),
        ({"formats": ["litert"], "batch_size": 4}, "litert takes one image; use batch_size=1"),
        ({"dataset": dataset_of((9, 9, 1))}, r"takes images of shape \(8, 8, 1\)"),
        ({"dataset": dataset_of(classes=5)}, "has 10 classes, arrays has 5"),
        ({"formats": ["litert_int8"], "dataset": dataset_of(n=20)}, "calibration images are too few"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, change, said):
    options: dict[str, Any] = {"dataset": dataset_of(), **change}
    dataset = options.pop("dataset")
    with pytest.raises(ValueError, match=said):
        export.write(tmp_path / "student", student_of("digits_student", (8, 8, 1)), dataset, **options)
    assert list(tmp_path.iterdir()) == []


class Sorted(nn.Module):
    """A network with an operation that LiteRT lacks."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(jnp.linalg.qr(x[..., 0])[1].reshape(x.shape[0], -1))


def test_an_operation_that_litert_lacks_is_named_with_a_format_that_works():
    network = models.from_linen(Sorted(), (8, 8, 1))
    student = Student(network, Weights(*network.init(0)), GREY)
    with pytest.raises(ValueError, match=r"no counterpart.*\(.*\).*export stablehlo"):
        litert.convert(source_of(student))


def test_what_onnx_needs_is_said_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jax2onnx", None)
    student = student_of("digits_student", (8, 8, 1))
    with pytest.raises(
        ModuleNotFoundError, match=r"jax2onnx is not installed.*pip install --no-deps jax2onnx"
    ):
        onnx.convert(source_of(student))


@pytest.mark.parametrize("name", STUDIES)
def test_an_onnx_file_equals_jax(name):
    pytest.importorskip("jax2onnx", reason="jax2onnx has an installation of its own")
    shape = STUDIES[name]
    student, images = student_of(name, shape), RNG.integers(0, 256, (5, *shape), np.uint8)
    answer = onnx.opened(onnx.convert(source_of(student, None)))
    wanted = expected(student, images)
    np.testing.assert_allclose(answer(images), wanted, atol=1e-5 * np.ptp(wanted))


# Photos


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of photos as phones and scanners leave them: turned by EXIF, grey, transparent."""
    from PIL import Image

    folder = tmp_path / "photos"
    pixels = RNG.integers(0, 256, (40, 60, 3), np.uint8)
    for kind in ("cat", "dog"):
        (folder / kind).mkdir(parents=True)
        picture = Image.fromarray(pixels if kind == "cat" else 255 - pixels)
        turned = Image.Exif()
        turned[0x0112] = 6
        picture.save(folder / kind / "turned.png", exif=turned)
        picture.convert("L").save(folder / kind / "grey.png")
        clear = picture.convert("RGBA")
        clear.putalpha(Image.fromarray(RNG.integers(0, 256, (40, 60), np.uint8)))
        clear.save(folder / kind / "clear.png")
    return folder


def test_photos_are_prepared_as_in_training(photos, tmp_path):
    dataset = data.load(f"folder:{photos}", image_size=(16, 12))
    network = models.from_linen(models.build("resnet8_w25", num_classes=2), (16, 12, 3))
    student = Student(network, with_statistics(Weights(*network.init(0))), COLOUR)
    dataset = (
        data.split(dataset, clip=True)
        if False
        else dataset._replace(
            splits={"train": np.arange(6), "validation": np.arange(0), "test": np.arange(0)}
        )
    )
    bundle = export.write(tmp_path / "student", student, dataset)
    paths = [photos / name for name in dataset.example_ids]
    np.testing.assert_array_equal(export.read_images(bundle, paths), dataset.images)
    wanted = jax.nn.softmax(jnp.asarray(expected(student, dataset.images)))
    np.testing.assert_allclose(export.predict(bundle, paths), wanted, atol=1e-6)


def test_what_is_no_photo_is_named(bundle, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"text.jpg: no image that Pillow knows"):
        export.predict(bundle, [tmp_path / "text.jpg"])
    with pytest.raises(ValueError, match=r"takes uint8 pixels of shape \[batch, 8, 8, 1\]"):
        export.predict(bundle, np.zeros((1, 9, 8, 1), np.uint8))


def test_malaria_cells_are_stretched_and_other_images_cut():
    assert data.resize_of("malaria") == "stretch"
    assert data.resize_of("cifar10") == data.resize_of("photos") == "cover"
    assert data.licence_of("mnist").startswith("CC BY-SA")
