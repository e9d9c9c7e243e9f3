"""Corruptions against their definitions in SciPy and Pillow, attacks against closed forms, sums against themselves."""

import dataclasses
import functools
import io
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, special

from kdjax import data, evaluate, models, parallel, robustness
from kdjax.models import layers
from kdjax.types import Outputs

NAMES = tuple(robustness.CORRUPTIONS)
KEY = jax.random.key(7)
STRENGTH_OF_NOTHING = {
    "gaussian_noise": 0.0,
    "gaussian_blur": 0.0,
    "contrast": 1.0,
    "occlusion": 0.0,
    "translation": 0,
}


def pictures(n=16, height=12, width=9, channels=3, seed=0):
    """Smooth pictures with some detail, uint8."""
    rng = np.random.default_rng(seed)
    coarse = ndimage.zoom(rng.uniform(0, 1, (n, 4, 3, channels)), (1, height / 4, width / 3, 1), order=1)
    fine = rng.uniform(0, 1, coarse.shape)
    return np.rint(255 * (0.7 * coarse + 0.3 * fine)).astype(np.uint8)


def unit(images):
    return jnp.asarray(images, jnp.float32) / 255


def keys(n):
    return data.example_keys(KEY, jnp.arange(n))


# Corruptions.


def extended(name):
    """The corruption with severity 1 for no strength, so 2 to 6 for its five."""
    corruption = robustness.CORRUPTIONS[name]
    strengths = (STRENGTH_OF_NOTHING.get(name, 100), *corruption.strengths)
    return dataclasses.replace(corruption, strengths=strengths)


@functools.cache
def compiled(name):
    """One program for all tests of a corruption."""
    corruption = extended(name)
    return corruption if corruption.on_host else jax.jit(corruption)


DIGITS = unit(pictures(16, 8, 8, 1))


@pytest.mark.parametrize("name", NAMES)
def test_severities_grow_and_pixels_stay_in_range(name):
    distance = []
    for severity in range(2, 7):
        found = np.asarray(compiled(name)(DIGITS, severity, KEY))
        assert found.shape == DIGITS.shape
        assert found.dtype == np.float32
        assert found.min() >= 0
        assert found.max() <= 1
        distance.append(np.square(found - np.asarray(DIGITS)).sum((1, 2, 3)))
    assert (np.diff(np.mean(distance, 1)) > 0).all()
    if name in ("gaussian_noise", "gaussian_blur", "contrast"):
        assert (np.diff(distance, axis=0) > 0).all()  # of every single image


@pytest.mark.parametrize("name", STRENGTH_OF_NOTHING)
def test_no_strength_changes_nothing_and_one_program_serves_all(name):
    traced = []

    @jax.jit
    def corrupt(images, severity, key):
        traced.append(severity)
        return extended(name)(images, severity, key)

    np.testing.assert_allclose(corrupt(DIGITS, 1, KEY), DIGITS, atol=1e-7)
    assert not np.array_equal(corrupt(DIGITS, 2, KEY), DIGITS)
    assert len(traced) == 1


@pytest.mark.parametrize("name", ["gaussian_noise", "occlusion", "translation"])
def test_the_key_alone_decides(name):
    first = np.asarray(compiled(name)(DIGITS, 3, KEY))
    assert np.array_equal(first, compiled(name)(DIGITS, 3, KEY))
    assert not np.array_equal(first, compiled(name)(DIGITS, 3, jax.random.key(8)))


def test_gaussian_noise_has_its_deviation():
    images = jnp.full((4, 64, 64, 2), 0.5)
    noise = np.asarray(robustness.gaussian_noise(images, 0.1, keys(4))) - 0.5
    assert noise.std() == pytest.approx(0.1, rel=0.02)
    assert abs(noise.mean()) < 0.002
    assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.04


@pytest.mark.parametrize("shape", [(8, 8, 1), (32, 20, 3), (3, 2, 1), (1, 5, 2)])
def test_gaussian_blur_is_scipys(shape):
    images = pictures(2, 32, 20, 3)[:, : shape[0], : shape[1], : shape[2]] / 255
    blur = jax.jit(robustness.gaussian_blur)
    for sigma in (0.4, 0.6, 0.7, 0.8, 1.0):
        wanted = ndimage.gaussian_filter(images, (0, sigma, sigma, 0), mode="nearest", truncate=4.0)
        np.testing.assert_allclose(blur(jnp.asarray(images, jnp.float32), sigma), wanted, atol=2e-6)


def test_contrast_is_its_formula():
    images = pictures(3) / 255
    for severity, factor in enumerate((0.75, 0.5, 0.4, 0.3, 0.15), 1):
        mean = images.mean((1, 2), keepdims=True)
        found = robustness.CORRUPTIONS["contrast"](jnp.asarray(images, jnp.float32), severity, KEY)
        np.testing.assert_allclose(found, (images - mean) * factor + mean, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_pillows_byte_for_byte(channels):
    images = pictures(2, channels=channels)
    for severity, quality in enumerate((80, 65, 58, 50, 40), 1):
        found = np.asarray(robustness.CORRUPTIONS["jpeg"](unit(images), severity, KEY))
        for image, seen in zip(images, found, strict=True):
            stored = io.BytesIO()
            Image.fromarray(image.squeeze()).save(stored, "JPEG", quality=quality)
            wanted = np.asarray(Image.open(stored)).reshape(image.shape)
            assert np.array_equal(np.rint(255 * seen).astype(np.uint8), wanted)


@pytest.mark.parametrize("size", [8, 32])
def test_occlusion_covers_a_square_of_the_stated_side(size):
    images = jnp.zeros((64, size, size, 2))
    cover, covered = jax.jit(robustness.CORRUPTIONS["occlusion"]), []
    for severity in range(1, 6):
        found = np.asarray(cover(images, severity, KEY))
        side = severity * size // 8
        assert set(np.unique(found)) <= {0, 0.5}
        mask = found[..., 0] > 0
        assert np.array_equal(mask, found[..., 1] > 0)
        assert (mask.any(2).sum(1) == side).all()
        assert (mask.any(1).sum(1) == side).all()
        assert (mask.sum((1, 2)) == side**2).all()
        covered.append(mask)
    for smaller, larger in itertools.pairwise(covered):
        assert (larger | ~smaller).all()
    corners = covered[2].any(2).argmax(1)
    assert {0, size - 3 * size // 8} <= set(corners) if size == 8 else len(set(corners)) > 10


def test_translation_moves_a_marked_pixel():
    images = np.zeros((64, 9, 11, 1), np.float32)
    images[:, 4, 5] = 1
    move = jax.jit(functools.partial(robustness.translation, fill=0.25))
    for pixels in (1, 3):
        found = np.asarray(move(images, pixels, keys(64)))
        moves = {tuple((np.argwhere(x == 1)[0] - (4, 5)).tolist()) for x in found[..., 0]}
        assert moves == {(pixels, 0), (-pixels, 0), (0, pixels), (0, -pixels)}
        filled = (found[..., 0] == 0.25).sum((1, 2))
        assert set(filled.tolist()) == {pixels * 9, pixels * 11}
    assert (np.asarray(move(images, 20, keys(64))) == 0.25).all()


def test_a_severity_without_a_strength_is_refused():
    with pytest.raises(ValueError, match="severities 1 to 5, got 6"):
        robustness.CORRUPTIONS["contrast"](unit(pictures(2)), 6, KEY)


def test_jpeg_refuses_two_channels():
    with pytest.raises(ValueError, match="1 or 3 channels, got 2"):
        robustness.jpeg(unit(pictures(2, channels=2)), 80)


# Weights.


def test_weight_noise_is_relative_and_nothing_at_zero():
    params = {"a": jnp.full((200, 50), 2.0), "b": jnp.full((200, 50), -3.0), "zero": jnp.zeros(3)}
    same = robustness.perturb_weights(params, 0.0, KEY)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, same, params)))
    noisy = robustness.perturb_weights(params, 0.1, KEY)
    assert not noisy["zero"].any()
    a, b = (np.asarray(noisy[name] / params[name]) - 1 for name in "ab")
    assert a.std() == pytest.approx(0.1, rel=0.03)
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.05
    twice = robustness.perturb_weights(params, 0.2, KEY)
    np.testing.assert_allclose(twice["a"] - 2, 2 * (noisy["a"] - 2), atol=1e-5)


# Attacks.

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def linear(params, model_state, inputs, *, train, key=None):
    """Two classes, by a plane through the images."""
    assert not train
    score = jnp.einsum("bhwc,hwc->b", inputs, params)
    return Outputs(jnp.stack([-score, score], -1), {}), model_state


def plane(shape=(12, 9, 3), seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def scores(params, images):
    logits = linear(params, {}, data.normalise(255 * images, mean=MEAN, std=STD), train=False)[0].logits
    return np.asarray(logits[:, 1] - logits[:, 0], np.float64)


def fgsm(apply_fn, params, state, images, label, *, epsilon):
    how = {"epsilon": epsilon, "steps": 1, "step_size": epsilon, "mean": MEAN, "std": STD}
    return robustness.attack(apply_fn, params, state, images, label, images, **how)


def pgd(apply_fn, params, state, images, label, key, *, epsilon, steps):
    how = {"epsilon": epsilon, "steps": steps, "step_size": epsilon / 4, "mean": MEAN, "std": STD}
    start = images + epsilon * robustness.offset(data.example_keys(key, jnp.arange(len(images))), images)
    return robustness.attack(apply_fn, params, state, images, label, start, **how)


@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_attack_on_a_plane_has_its_closed_form(attack):
    images = 0.3 + 0.4 * unit(pictures(8))  # far enough from 0 and 1
    label, w, epsilon = jnp.arange(8) % 2, plane(), 0.05
    run = fgsm if attack == "fgsm" else functools.partial(pgd, key=KEY, steps=9)
    found = jax.jit(functools.partial(run, linear, epsilon=epsilon))(w, {}, images, label)
    sign = 1 - 2 * np.asarray(label)[:, None, None, None]  # class 0 is pushed up, class 1 down
    np.testing.assert_allclose(found - images, epsilon * sign * np.sign(w)[None], atol=1e-6)
    # the margin falls by epsilon times the 1-norm of the weights in pixels, 2 w / std
    fall = np.abs(2 * np.asarray(w) / np.asarray(STD)).sum() * epsilon
    np.testing.assert_allclose((scores(w, found) - scores(w, images)) * sign.ravel(), fall, rtol=1e-4)


def test_attack_finds_its_way_where_the_loss_rounds_to_zero():
    images, w = 0.3 + 0.4 * unit(pictures(8)), 100 * plane()
    label = jnp.asarray(scores(w, images) > 0).astype(jnp.int32)
    loss = lambda s: np.log1p(np.exp(-np.abs(s)))  # noqa: E731
    assert loss(scores(w, images).astype(np.float32)).max() == 0
    found = fgsm(linear, w, {}, images, label, epsilon=0.01)
    np.testing.assert_allclose(np.abs(found - images), 0.01, atol=1e-6)


class SmallNet(nn.Module):
    """A convolution with kdjax's own gradient, BatchNorm, and a layer of four logits."""

    @nn.compact
    def __call__(self, x, *, train):
        x = layers.Conv(6, 3, strides=2)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.5)(x))
        return Outputs(nn.Dense(4)(x.reshape(len(x), -1)), {})


@functools.cache
def small_net():
    """A network whose statistics are not the initial ones, and data of which it knows most."""
    module = SmallNet()
    params, state = models.init(module, (12, 9, 3), seed=0)
    images = pictures(24)
    apply_fn = models.apply_fn(module)
    rng = np.random.default_rng(2)
    state = jax.tree.map(lambda x: x + jnp.asarray(rng.uniform(0, 0.5, x.shape), x.dtype), state)
    label = logits_of(apply_fn, params, state, unit(images)).argmax(-1).astype(np.int32)
    label[::8] = (label[::8] + 1) % 4
    return apply_fn, params, state, images, label


@functools.partial(jax.jit, static_argnums=0)
def logits_jit(apply_fn, params, state, images):
    return apply_fn(params, state, data.normalise(255 * images, mean=MEAN, std=STD), train=False)[0].logits


def logits_of(*arguments):
    return np.asarray(logits_jit(*arguments), np.float64)


def loss_of(apply_fn, params, state, images, label):
    logits = logits_of(apply_fn, params, state, images)
    return special.logsumexp(logits, 1) - logits[np.arange(len(label)), label]


@functools.cache
def compiled_attacks():
    return [jax.jit(functools.partial(attack, small_net()[0])) for attack in (fgsm, pgd)]


def attacked(epsilon, *, steps, key):
    """The small network's images after both attacks."""
    _, params, state, images, label = small_net()
    once, often = compiled_attacks()
    given = (params, state, unit(images), label)
    return once(*given, epsilon=epsilon), often(*given, key, epsilon=epsilon, steps=steps)


def test_attacks_on_a_network_stay_in_bounds_and_pgd_is_the_stronger():
    apply_fn, params, state, images, label = small_net()
    x = unit(images)
    weak, strong = attacked(0.03, steps=10, key=KEY)
    for found in (weak, strong):
        assert np.abs(found - x).max() <= 0.03 + 1e-6
        assert found.min() >= 0
        assert found.max() <= 1
    clean, once, often = (loss_of(apply_fn, params, state, z, label).mean() for z in (x, weak, strong))
    assert clean < once < often


def test_attack_is_stopped_at_black_and_white():
    images = jnp.concatenate([jnp.zeros((2, 12, 9, 3)), jnp.ones((2, 12, 9, 3))])
    label = jnp.asarray([0, 1, 0, 1])
    found = fgsm(linear, plane(), {}, images, label, epsilon=0.1)
    values = [np.unique(np.asarray(x)) for x in (found[:2], found[2:])]
    np.testing.assert_allclose(values, [[0, 0.1], [0.9, 1]], atol=1e-6)


# All of it.


def evaluator(batch_size=24, num_devices=1, **options):
    apply_fn, _, _, images, label = small_net()
    small = {"weight_noise": (0.0, 0.3), "draws": 2, "epsilons": (1, 8)}
    return robustness.make_evaluator(
        apply_fn,
        images,
        label,
        mean=MEAN,
        std=STD,
        batch_size=batch_size,
        devices=parallel.local_devices(num_devices),
        **(small | options),
    )


@functools.cache
def three_severities():
    return evaluator(severities=(1, 3, 5), metrics=("accuracy", "loss", "ece"))


@functools.cache
def evaluated(seed=7):
    _, params, state, *_ = small_net()
    return three_severities()(params, state, jax.random.key(seed))


def test_names_and_values_are_plain():
    found = evaluated()
    names = {f"{name}/{severity}" for name in NAMES for severity in (1, 3, 5)}
    names |= {"clean", "mean_corruption", "weight_noise/0", "weight_noise/0.3"}
    names |= {f"{attack}/{epsilon}" for attack in ("fgsm", "pgd") for epsilon in (1, 8)}
    assert found.keys() == names | {f"{name}/{metric}" for name in names for metric in ("loss", "ece")}
    assert all(type(value) is float for value in found.values())


def test_values_are_those_of_their_parts():
    found = evaluated()
    apply_fn, params, state, images, label = small_net()

    def check(name, x):
        accuracy = (logits_of(apply_fn, params, state, x).argmax(1) == label).mean()
        assert found[name] == pytest.approx(accuracy)
        assert found[f"{name}/loss"] == pytest.approx(
            loss_of(apply_fn, params, state, x, label).mean(), rel=1e-4
        )

    check("clean", unit(images))
    image_key, _ = jax.random.split(KEY)
    for name in ("gaussian_noise", "jpeg"):
        corrupted = np.asarray(robustness.CORRUPTIONS[name](unit(images), 5, image_key))
        check(f"{name}/5", jnp.floor(255 * corrupted + 1e-3) / 255)
    weak, strong = attacked(8 / 255, steps=20, key=image_key)
    check("fgsm/8", weak)
    check("pgd/8", strong)
    assert found["weight_noise/0/loss"] == found["clean/loss"]
    assert found["weight_noise/0.3/loss"] != found["clean/loss"]
    mean = np.mean([found[f"{name}/{severity}"] for name in NAMES for severity in (1, 3, 5)])
    assert found["mean_corruption"] == pytest.approx(mean)
    assert found["pgd/8/loss"] > found["fgsm/1/loss"] > found["clean/loss"]


def test_another_key_gives_other_noise_only():
    found, other = evaluated(), evaluated(8)
    for name in ("clean", "gaussian_blur/5", "contrast/5", "jpeg/5", "weight_noise/0", "fgsm/8"):
        assert other[f"{name}/loss"] == found[f"{name}/loss"]
    for name in ("gaussian_noise/5", "occlusion/5", "translation/5", "weight_noise/0.3", "pgd/8"):
        assert other[f"{name}/loss"] != found[f"{name}/loss"]
    evaluated.cache_clear()
    assert evaluated() == found


def test_neither_batches_nor_devices_change_the_answer():
    wanted = evaluated()
    _, params, state, *_ = small_net()
    run = evaluator(10, 2, severities=(5,), metrics=("accuracy", "loss"))  # padded, on two devices
    found = run(params, state, KEY)
    compared = [name for name in found if not name.startswith("mean_corruption")]
    assert {name: found[name] for name in compared} == pytest.approx(
        {name: wanted[name] for name in compared}, rel=1e-4
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"severities": (0,)}, "gaussian_noise has the severities 1 to 5, got 0"),
        ({"epsilons": (300.0,)}, "grey levels between 0 and 255"),
        ({"batch_size": 0}, "does not divide"),
    ],
)
def test_refuses_settings(change, message):
    with pytest.raises(ValueError, match=message):
        evaluator(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((4, 12, 9, 3), np.float32)}, "must be uint8"),
        ({"images": np.zeros((4, 12, 9), np.uint8)}, "must be uint8"),
        ({"labels": np.zeros(3, np.int32)}, "as many labels"),
        ({"mean": (0.5,)}, "each of the 3 channels"),
        (
            {"images": np.zeros((4, 12, 9, 2), np.uint8), "mean": (0.5, 0.5), "std": (1.0, 1.0)},
            "1 or 3 channels",
        ),
    ],
)
def test_refuses_data(change, message):
    given = {"images": np.zeros((4, 12, 9, 3), np.uint8), "labels": np.zeros(4, np.int32)}
    given |= {"mean": MEAN, "std": STD, "batch_size": 4, "devices": parallel.local_devices(1)} | change
    with pytest.raises(ValueError, match=message):
        robustness.make_evaluator(linear, **given)


def test_refuses_a_metric_that_there_is_not():
    images = pictures(4)
    run = robustness.make_evaluator(
        linear,
        images,
        np.zeros(4, np.int32),
        mean=MEAN,
        std=STD,
        batch_size=4,
        devices=parallel.local_devices(1),
        corruptions={},
        metrics=("acuracy",),
    )
    with pytest.raises(ValueError, match="no metric 'acuracy'; there are accuracy, loss"):
        run(plane(), {}, KEY)


# What robustness reads from evaluate.


def test_reliability_gives_the_bins_of_the_calibration_error():
    rng = np.random.default_rng(0)
    logits, label = rng.normal(size=(500, 4)).astype(np.float32) * 2, rng.integers(0, 4, 500).astype(np.int32)
    sums = jax.jit(evaluate.metric_sums)(jnp.asarray(logits), jnp.asarray(label), valid=jnp.ones(500))
    bins = evaluate.reliability(sums)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    inside = np.floor(p.max(1) * evaluate.NUM_BINS) == 9
    assert bins["count"][9] == inside.sum() > 0
    assert bins["confidence"][9] == pytest.approx(p.max(1)[inside].mean(), rel=1e-5)
    assert bins["accuracy"][9] == pytest.approx((p.argmax(1) == label)[inside].mean(), rel=1e-5)
    assert bins["count"][0] == bins["confidence"][0] == bins["accuracy"][0] == 0  # of 4 classes, above 1/4
    gaps = np.abs(np.subtract(bins["confidence"], bins["accuracy"]))
    assert evaluate.summarise(sums)["ece"] == pytest.approx(np.average(gaps, weights=bins["count"]))
