"""The page of a student answers in a browser what JAX answers, on a phone and on a laptop, without a network."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import web
from kdjax import data, export, models
from kdjax.types import Normalisation, Weights
from tests.test_export import Student, dataset_of, student_of

CHROMIUM, NODE = shutil.which("chromium"), shutil.which("node")
there = (web.RUNTIME / "core").is_dir() and (web.HERE / "node_modules" / "playwright-core").is_dir()
WHY = "needs node, chromium and npm ci in experiments/web"
browser = pytest.mark.skipif(not (CHROMIUM and NODE and there), reason=WHY)


def tried(page: Path, **options) -> dict:
    """What a page answers in a browser."""
    command = [str(NODE), str(web.HERE / "try.mjs"), str(CHROMIUM), str(page), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["errors"] == []
    assert found["asked"] == [], "the page asks nothing of a network"
    assert found["ready"]
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> tuple[Path, export.Bundle]:
    """Of a student and a teacher of the digits' size, whose data set one can draw."""
    folder = tmp_path_factory.mktemp("page")
    dataset = dataset_of()._replace(name="digits")
    metrics = {"accuracy": 0.5, "n": 12, "split": "test"}
    bundles = {
        role: export.write(
            folder / role, student_of(name, (8, 8, 1)), dataset, formats=["litert"], metrics=metrics
        )
        for role, name in (("student", "digits_student"), ("teacher", "digits_teacher"))
    }
    (folder / "page.html").write_text(web.build(bundles))
    return folder / "page.html", bundles["student"]


@browser
@pytest.mark.once
@pytest.mark.parametrize(("width", "dark"), [(390, False), (1200, True)])
def test_a_dropped_image_is_answered_as_by_jax_and_a_drawing_too(page, tmp_path, width, dark):
    path, student = page
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "exact.png")
    found = tried(path, width=width, dark=dark, drop=[str(tmp_path / "exact.png")], draw=True)
    dropped, drawn = found["found"]
    np.testing.assert_array_equal(dropped["pixels"], pixels.ravel())
    for answer, role in zip(dropped["answers"], ("student", "teacher"), strict=True):
        bundle = export.load(student.directory.parent / role)
        (wanted,) = export.predict(bundle, pixels[None, :, :, None])
        np.testing.assert_allclose(answer["probabilities"], wanted, atol=1e-5)
        assert answer["latency"] > 0
    assert len(dropped["map"]) == 64
    ink = np.array(drawn["pixels"]).reshape(8, 8)
    assert ink[:, 3:5].mean() > 150, "the stroke stands in the middle, from top to bottom"
    assert ink[:, [0, 7]].max() == 0
    (wanted,) = export.predict(student, ink.astype(np.uint8)[None, :, :, None])
    np.testing.assert_allclose(drawn["answers"][0]["probabilities"], wanted, atol=1e-5)
    assert found["overflow"] <= 0, "nothing is wider than the screen"
    assert "50.0% right on 12 test images" in found["text"]


@browser
@pytest.mark.once
def test_photos_become_the_pixels_that_training_would_have_seen(tmp_path):
    shape = (16, 12, 3)
    network = models.from_linen(models.build("resnet8_w25", num_classes=3), shape)
    student = Student(network, Weights(*network.init(0)), Normalisation((0.5,) * 3, (0.2,) * 3))
    dataset = dataset_of(shape, classes=3)
    bundle = export.write(tmp_path / "student", student, dataset, formats=["litert"])
    (tmp_path / "page.html").write_text(web.build({"student": bundle}))
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 9, 3), np.uint8)).resize(
        (90, 60), Image.Resampling.BICUBIC
    )
    turned = Image.Exif()
    turned[0x0112] = 6
    clear = smooth.convert("RGBA")
    clear.putalpha(Image.fromarray(np.where(np.arange(90) < 45, 255, 0).astype(np.uint8)[None].repeat(60, 0)))
    photos = {
        "turned.png": smooth,
        "grey.png": smooth.convert("L"),
        "clear.png": clear,
        "small.png": smooth.resize((8, 8)),
    }
    for name, photo in photos.items():
        photo.save(tmp_path / name, exif=turned if name == "turned.png" else Image.Exif())
    (tmp_path / "text.png").write_text("no image")
    paths = [str(tmp_path / name) for name in (*photos, "text.png")]
    *found, refused = tried(tmp_path / "page.html", drop=paths)["found"]
    wanted = export.read_images(bundle, paths[:-1])
    for name, one, pixels in zip(photos, found, wanted, strict=True):
        difference = np.abs(np.array(one["pixels"]).reshape(shape) - pixels.astype(int))
        assert difference.max() <= 1, name  # Pillow rounds its weights to 22 bits
    assert refused["problem"].startswith("This is no image that the browser can read")


@pytest.mark.skipif(not there, reason=WHY)
def test_a_page_holds_everything_and_names_what_it_is(page):
    path, _ = page
    text = path.read_text()
    assert "{{" not in text
    assert text.count("<script") == 3
    assert "http://" not in text.split('<script type="application/json"')[0]
    assert "The student has 1,626 parameters" in text
    assert path.stat().st_size < 5e6


def test_without_npm_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(web, "RUNTIME", tmp_path)
    monkeypatch.setattr(web.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"--web needs npm, which comes with Node.js"):
        web.install()


def test_a_class_name_cannot_end_the_script(tmp_path):
    named = data.from_arrays(dataset_of().images, np.array(["</script>", "b"])[np.arange(60) % 2])
    network = models.from_linen(models.build("digits_student", num_classes=2), (8, 8, 1))
    student = Student(network, Weights(*network.init(0)), Normalisation((0.5,), (0.2,)))
    bundle = export.write(tmp_path / "student", student, data.split(named), formats=["litert"])
    runtime = tmp_path / "runtime"
    for name in (
        "core/wasm/litert_wasm_internal.wasm",
        "core/wasm/litert_wasm_internal.js",
        "core/dist/index.js",
        "wasm-utils/dist/index.js",
    ):
        (runtime / name).parent.mkdir(parents=True, exist_ok=True)
        (runtime / name).write_text("export const nothing = 0;")
    text = web.build({"student": bundle}, runtime=runtime)
    assert text.count("</script>") == 3
    assert '"\\u003c/script>"' in text
