"""Augmentation: what moves, by how much, how often; and that it belongs to the example, not to its place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from kdjax import data

KEY = jax.random.key(0)


def images(n=64, size=8, channels=1):
    return jnp.asarray(np.random.default_rng(0).integers(1, 256, (n, size, size, channels)), jnp.uint8)


def keys(n=64, key=KEY):
    return data.example_keys(key, jnp.arange(n))


def crop(images, keys, padding=2):
    return data.crop_and_flip(images, keys, padding=padding, flip=False)


def flip(images, keys):
    return data.crop_and_flip(images, keys, padding=0, flip=True)


class TestCrop:
    def test_every_result_is_one_of_the_shifts(self):
        original, moved = images(), crop(images(), keys())
        padded = np.pad(original, ((0, 0), (2, 2), (2, 2), (0, 0)))
        shifts = set()
        for i in range(64):
            found = [
                (r, c)
                for r in range(5)
                for c in range(5)
                if (padded[i, r : r + 8, c : c + 8] == np.asarray(moved[i])).all()
            ]
            assert len(found) == 1
            shifts.add(found[0])
        assert len(shifts) > 15  # of 25

    def test_shifts_are_uniform(self):
        dot = jnp.zeros((4000, 5, 5, 1), jnp.uint8).at[:, 2, 2].set(1)
        moved = np.asarray(crop(dot, keys(4000)))[..., 0]
        counts = moved.reshape(len(moved), -1).sum(0)
        assert stats.chisquare(counts).pvalue > 1e-3

    def test_zero_padding_changes_nothing(self):
        np.testing.assert_array_equal(crop(images(), keys(), 0), images())

    def test_refuses_a_negative_padding(self):
        with pytest.raises(ValueError, match="0 or more pixels, got -1"):
            crop(images(), keys(), -1)


class TestFlip:
    def test_mirrors_about_half(self):
        flipped = np.asarray(flip(images(1000), keys(1000)))
        mirrored = (flipped == np.asarray(images(1000))[:, :, ::-1]).all((1, 2, 3))
        same = (flipped == np.asarray(images(1000))).all((1, 2, 3))
        assert (mirrored | same).all()
        assert stats.binomtest(int(mirrored.sum()), 1000).pvalue > 1e-3

    def test_is_independent_of_the_crop(self):
        dot = jnp.zeros((2000, 5, 5, 1), jnp.uint8).at[:, 2, 2].set(1)
        row = np.asarray(crop(dot, keys(2000)))[..., 0].sum(2).argmax(1)
        marked = jnp.zeros((2000, 1, 2, 1), jnp.uint8).at[:, 0, 0].set(1)
        flipped = np.asarray(flip(marked, keys(2000)))[:, 0, 1, 0]
        table = np.array([[((row == r) & (flipped == f)).sum() for r in range(5)] for f in (0, 1)])
        assert stats.chi2_contingency(table).pvalue > 1e-3


def test_depends_on_the_example_not_on_its_place():
    order = jnp.asarray(np.random.default_rng(1).permutation(64))

    def augment(index):
        return data.crop_and_flip(images()[index], data.example_keys(KEY, index), padding=2, flip=True)

    np.testing.assert_array_equal(augment(order), augment(jnp.arange(64))[order])


def test_a_map_moves_with_its_image():
    pair = jnp.concatenate([images(), images()[..., ::-1] // 2], -1)
    moved = data.crop_and_flip(pair, keys(), padding=2, flip=True)
    apart = [data.crop_and_flip(x, keys(), padding=2, flip=True) for x in (pair[..., :1], pair[..., 1:])]
    np.testing.assert_array_equal(moved, jnp.concatenate(apart, -1))


class TestStoredView:
    def view(self, index, view, seed=7):
        return data.stored_view(images()[index], index, view, seed=seed, padding=2, flip=True)

    def test_view_0_is_the_image_itself(self):
        np.testing.assert_array_equal(self.view(jnp.arange(64), 0), images())

    def test_is_the_same_whenever_it_is_asked_for(self):
        index = jnp.array([3, 17, 3, 60])
        views = jnp.array([1, 2, 2, 1])
        one_by_one = jnp.concatenate([self.view(index[i : i + 1], views[i]) for i in range(4)])
        np.testing.assert_array_equal(jax.jit(self.view)(index, views), one_by_one)

    def test_differs_by_view_and_by_seed(self):
        first = self.view(jnp.arange(64), 1)
        assert not (first == self.view(jnp.arange(64), 2)).all()
        assert not (first == self.view(jnp.arange(64), 1, seed=8)).all()


class TestMixup:
    def test_blends_pairs_with_one_share(self):
        x = data.normalise(images(), mean=(0.5,), std=(0.2,))
        blend, partner, share = data.mixup(x, KEY, alpha=1.0)
        np.testing.assert_allclose(blend, share * x + (1 - share) * x[partner], atol=1e-6)
        assert sorted(partner.tolist()) == list(range(64))

    def test_share_follows_the_beta_distribution(self):
        x = jnp.zeros((2, 1, 1, 1))
        shares = jax.vmap(lambda k: data.mixup(x, k, alpha=0.4)[2])(jax.random.split(KEY, 2000))
        assert stats.kstest(np.asarray(shares), stats.beta(0.4, 0.4).cdf).pvalue > 1e-3

    def test_refuses_alpha_0(self):
        with pytest.raises(ValueError, match="alpha above 0"):
            data.mixup(jnp.zeros((2, 1, 1, 1)), KEY, alpha=0.0)


def test_normalised_images_have_the_statistics_of_the_set():
    x = np.random.default_rng(0).integers(0, 256, (40, 6, 6, 3), np.uint8)
    mean, std = data.channel_statistics(x)
    np.testing.assert_allclose(mean, (x / 255).mean((0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(std, (x / 255).std((0, 1, 2)), rtol=1e-9)
    z = np.asarray(data.normalise(jnp.asarray(x), mean=mean, std=std), np.float64)
    np.testing.assert_allclose(z.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(z.std((0, 1, 2)), 1, atol=1e-5)


def test_a_constant_channel_is_centred_and_left_at_its_scale():
    mean, std = data.channel_statistics(np.full((2, 3, 3, 1), 51, np.uint8))
    assert (mean, std) == (pytest.approx((0.2,)), (1.0,))
