"""Scores and rules against hand-worked spectra, a repository that notices damage, students that compute the same."""

import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdjax import files, models, saddles
from kdjax.models import DigitsCnn, MalariaCnn, Mlp
from kdjax.saddles import Entry, Snapshot, score_saddle, select_weights

KEY = jax.random.key(0)
# Jitted, since each operation on its own would be a program to compile.
RULES = {
    "magnitude": jax.jit(saddles.magnitude_rule),
    "ratio": jax.jit(saddles.ratio_rule),
    "both": jax.jit(saddles.both_rule),
    "extreme": jax.jit(saddles.extreme_rule),
    "gated": jax.jit(saddles.gated_rule),
}
compiled_score = jax.jit(score_saddle)


def score(eigenvalues=(-4.0, -1.0, 2.0, 8.0), residuals=None, *, gradient_norm=0.0, loss=1.0):
    eigenvalues = np.asarray(eigenvalues, np.float32)
    residuals = np.zeros_like(eigenvalues) if residuals is None else np.asarray(residuals, np.float32)
    return compiled_score(eigenvalues, residuals, gradient_norm=gradient_norm, loss=loss)


def assert_trees_equal(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


class TestScore:
    def test_of_a_spectrum_worked_by_hand(self):
        found = score((8.0, -1.0, -4.0, 2.0), (0.1, 0.2, 0.3, 0.4), gradient_norm=0.5, loss=2.0)
        wanted = {
            "lambda_min": -4, "residual": 0.3, "lambda_max": 8, "negative_sum": -5, "positive_sum": 10,
            "negative_curvature_ratio": 0.5, "gradient_norm": 0.5, "loss": 2,
        }  # fmt: skip
        assert found._asdict() == pytest.approx(wanted)
        assert {(x.dtype, x.shape) for x in found} == {(jnp.dtype(jnp.float32), ())}

    def test_nan_passes_no_rule(self):
        diverged = score((np.nan, 1.0), gradient_norm=0.0)
        assert np.isnan(diverged.negative_curvature_ratio)
        assert not any(rule(diverged) for rule in RULES.values())

    @pytest.mark.parametrize(
        ("values", "wanted"),
        [((1, 2), 0), ((0, 0), 0), ((-3, -1), np.inf), ((-3, 0), np.inf), ((-1, 4), 0.25)],
    )
    def test_negative_curvature_ratio(self, values, wanted):
        assert score(values).negative_curvature_ratio == wanted

    def test_a_flat_spectrum_is_no_saddle(self):
        assert not any(rule(score((0.0, 0.0))) for rule in RULES.values())

    @settings(deadline=None, max_examples=20)
    @given(exponent=st.integers(-20, 20), seed=st.integers(0, 99))
    def test_the_ratio_does_not_change_with_scale(self, exponent, seed):
        values, factor = np.sort(np.random.default_rng(seed).normal(size=4)), 2.0**exponent
        plain, scaled = score(values), score(factor * values)
        assert scaled.negative_curvature_ratio == pytest.approx(plain.negative_curvature_ratio)
        assert scaled.negative_sum == pytest.approx(factor * plain.negative_sum)

    def test_under_jit_and_vmap(self):
        values = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
        each = [score(v, abs(v) / 9, gradient_norm=0.01) for v in values]
        stacked = jax.vmap(partial(compiled_score, loss=1.0, gradient_norm=0.01))(values, abs(values) / 9)
        plain = score_saddle(values[0], abs(values[0]) / 9, loss=1.0, gradient_norm=0.01)
        np.testing.assert_allclose(stacked, np.array(each).T, rtol=1e-5)
        np.testing.assert_allclose(plain, each[0], rtol=1e-5)
        for rule in RULES.values():
            found = rule(stacked)
            assert found.dtype == bool
            assert found.tolist() == [bool(rule(s)) for s in each]


class TestRules:
    @pytest.mark.parametrize(
        ("values", "passed"),
        [
            ((-4, -3, 1, 20), {"magnitude", "extreme"}),  # 7 ≥ 7; 7 < 8.4; 4 > 1
            ((-2, -1, 3, 4), {"ratio", "extreme", "gated"}),  # 3 < 7; 3 ≥ 2.8
            ((-9, 1, 2, 10), {"magnitude", "ratio", "both", "extreme", "gated"}),
            ((-1, 5, 10, 20), set()),  # -1 is not below -1
            ((-8, -7, -2, -1), {"magnitude", "ratio", "both", "gated"}),  # a maximum
            ((1, 2, 3, 4), set()),
        ],
    )
    def test_worked_by_hand(self, values, passed):
        assert {name for name, rule in RULES.items() if rule(score(values))} == passed

    def test_certificate_needs_an_interval_below_zero(self):
        for residual, wanted in [(0.5, True), (1.0, False), (2.0, False)]:
            found = score((-1.0, 2.0), (residual, 0.0))
            assert saddles.certified(found) == saddles.gated_rule(found) == wanted
            assert saddles.extreme_rule(found)

    def test_certificate_holds_for_any_approximate_pair(self):
        rng = np.random.default_rng(0)
        for _ in range(50):
            matrix = np.diag(rng.normal(size=5) + 1)
            vector = rng.normal(size=5)
            vector /= np.linalg.norm(vector)
            value = vector @ matrix @ vector - rng.uniform(0, 2)  # a bad estimate, with its true residual
            residual = np.linalg.norm(matrix @ vector - value * vector)
            assert not saddles.certified(score((value,), (residual,))) or np.min(matrix) < 0

    def test_a_large_gradient_is_no_saddle(self):
        assert saddles.gated_rule(score(gradient_norm=0.02))
        assert not saddles.gated_rule(score(gradient_norm=0.03))
        assert saddles.gated_rule(score(gradient_norm=0.03), max_gradient_norm=0.1)

    @settings(deadline=None, max_examples=20)
    @given(
        values=st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=4),
        more=st.floats(0, 20, width=32),
        gradient_norm=st.floats(0, 0.04),
    )
    def test_more_negative_curvature_never_weakens_a_saddle(self, values, more, gradient_norm):
        values = sorted(values)
        weak = score(values, gradient_norm=gradient_norm)
        strong = score([min(values[0], 0) - more, *values[1:]], gradient_norm=gradient_norm)
        for name, rule in RULES.items():
            assert not rule(weak) or rule(strong), name

    @settings(deadline=None, max_examples=20)
    @given(values=st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=4), more=st.floats(0, 5))
    def test_a_higher_threshold_never_makes_a_saddle(self, values, more):
        found = score(values)
        for rule, name, value in [
            (saddles.magnitude_rule, "beta", 7.0),
            (saddles.ratio_rule, "alpha", 0.4),
        ]:
            assert rule(found, **{name: value}) or not rule(found, **{name: value + more})


def snapshot(teacher, step, *, loss=1.0, strong=True, seed=None, width=3):
    rng = np.random.default_rng(100 * step + len(teacher) if seed is None else seed)
    params = {
        "dense": {
            "kernel": rng.normal(size=(2, width)).astype(np.float32),
            "bias": np.ones(width, np.float32),
        }
    }
    return Snapshot(teacher, step, score((-1.0 if strong else 1.0, 2.0), loss=loss), params)


def add(directory, item):
    saddles.add(directory, item.teacher, item.step, item.params, item.score)


class TestRepository:
    def test_what_was_added_is_read(self, tmp_path):
        wanted = [snapshot("a", 3), snapshot("a", 200_000_000), snapshot("b", 1, loss=0.1)]
        for item in wanted:
            add(tmp_path / "new", item)
        listed = saddles.entries(tmp_path / "new")
        assert [entry[:2] for entry in listed] == [item[:2] for item in wanted]
        for entry, item in zip(listed, wanted, strict=True):
            np.testing.assert_array_equal(entry.score, item.score)  # NaN where not measured
            like = jax.eval_shape(lambda tree=item.params: tree)
            assert_trees_equal(saddles.read(tmp_path / "new", entry.teacher, entry.step, like), item)

    def test_a_rewound_teacher_replaces_what_it_repeats(self, tmp_path):
        for step, loss in [(1, 1.0), (2, 1.0), (3, 1.0), (2, 0.5)]:
            add(tmp_path, snapshot("a", step, loss=loss))
        assert [(e.step, float(e.score.loss)) for e in saddles.entries(tmp_path)] == [(1, 1), (2, 0.5)]

    def test_a_flipped_byte_of_the_weights_is_refused_and_the_scores_are_still_listed(self, tmp_path):
        item = snapshot("a", 1)
        add(tmp_path, item)
        largest = max((tmp_path / "a").rglob("arrays/**/d/*"), key=lambda path: path.stat().st_size)
        data = bytearray(largest.read_bytes())
        data[len(data) // 2] ^= 1
        largest.write_bytes(data)
        assert len(saddles.entries(tmp_path)) == 1
        with pytest.raises(ValueError, match="has changed since it was saved"):
            saddles.read(tmp_path, "a", 1, item.params)

    def test_a_changed_score_is_refused(self, tmp_path):
        add(tmp_path, snapshot("a", 1, loss=0.25))
        manifest = tmp_path / "a" / "step_00000001" / "manifest.json"
        manifest.write_text(manifest.read_text().replace("0.25", "0.20"))
        with pytest.raises(ValueError, match="is damaged"):
            saddles.entries(tmp_path)
        manifest.unlink()
        with pytest.raises(ValueError, match="manifest cannot be read"):
            saddles.entries(tmp_path)

    def test_snapshots_of_another_run_are_refused(self, tmp_path):
        item, mine = snapshot("a", 1), {"data": {"train": 90}, "seed": 0}
        saddles.add(tmp_path, item.teacher, item.step, item.params, item.score, identity=mine)
        assert len(saddles.entries(tmp_path, identity=mine)) == len(saddles.entries(tmp_path)) == 1
        saddles.read(tmp_path, "a", 1, item.params, identity=mine)
        other = {"data": {"train": 100}, "seed": 0}
        for look in (saddles.entries, partial(saddles.read, teacher="a", step=1, like=item.params)):
            with pytest.raises(files.Mismatch, match=r"another run \(data\.train 90 there and 100 here\)"):
                look(tmp_path, identity=other)

    def test_other_directories(self, tmp_path):
        item = snapshot("a", 1)
        for look in (saddles.entries, partial(saddles.read, teacher="a", step=1, like=item.params)):
            with pytest.raises(ValueError, match="is not a repository of saddles"):
                look(tmp_path / "missing")
        (tmp_path / "thesis.txt").write_text("precious")
        with pytest.raises(ValueError, match="holds other files and is not a repository"):
            add(tmp_path, item)
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]

    def test_empty_and_of_another_version(self, tmp_path):
        files.write_sealed(tmp_path / "repository.json", {"format": "kdjax saddles 2"})
        with pytest.raises(ValueError, match="is empty: fill it with add"):
            saddles.entries(tmp_path)
        with pytest.raises(ValueError, match="there is no teacher 'a'"):
            saddles.read(tmp_path, "a", 1, {})
        files.write_sealed(tmp_path / "repository.json", {"format": "kdjax saddles 9"})
        for call in (lambda: saddles.entries(tmp_path), lambda: add(tmp_path, snapshot("a", 1))):
            with pytest.raises(ValueError, match="'kdjax saddles 9', and this version reads"):
                call()

    def test_arguments(self, tmp_path):
        item = snapshot("a", 1)
        for name in ("", "../a", "a.b"):
            with pytest.raises(ValueError, match="a teacher's name"):
                saddles.add(tmp_path, name, 1, item.params, item.score)
        stacked = jax.tree.map(lambda x: jnp.stack([x, x]), item.score)
        with pytest.raises(ValueError, match="the score of one point"):
            saddles.add(tmp_path, "a", 1, item.params, stacked)
        add(tmp_path, item)
        with pytest.raises(ValueError, match="there is no step 2"):
            saddles.read(tmp_path, "a", 2, item.params)
        with pytest.raises(ValueError, match="holds another model"):
            saddles.read(tmp_path, "a", 1, {"kernel": jnp.ones(3)})


SNAPSHOTS = [
    snapshot("b", 5, loss=0.3),
    snapshot("a", 9, loss=0.1, strong=False),
    snapshot("a", 3, loss=0.2),
    snapshot("a", 1, loss=0.9),
    snapshot("b", 2, loss=np.nan),
]


def mean(*items):
    return jax.tree.map(lambda *leaves: np.mean(np.stack(leaves), 0), *[item.params for item in items])


class TestAggregate:
    def test_mean_of_the_lowest_strong_saddles(self):
        chosen = saddles.choose(SNAPSHOTS)
        assert [item[:2] for item in chosen] == [("a", 3), ("b", 5)]
        got = saddles.aggregate(chosen)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), got, mean(*chosen))

    def test_controls(self):
        last = [item[:2] for item in saddles.choose(SNAPSHOTS, which="last")]
        assert last == [("a", 9), ("b", 5)]
        b, a9, a3, a1, b2 = SNAPSHOTS
        # The mean of teachers' means, so that one with few snapshots counts as much.
        wanted = jax.tree.map(lambda x, y: (x + y) / 2, mean(a9, a3, a1), mean(b, b2))
        got = saddles.aggregate(SNAPSHOTS)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), got, wanted)

    def test_random_is_drawn_by_the_key_for_each_teacher(self):
        drawn = [
            tuple(item.step for item in saddles.choose(SNAPSHOTS, which="random", key=jax.random.key(seed)))
            for seed in (*range(40), *range(40))
        ]
        assert drawn[:40] == drawn[40:]
        assert set(drawn) == {(a, b) for a in (1, 3, 9) for b in (2, 5)}
        shuffled = saddles.choose(SNAPSHOTS[::-1], which="random", key=jax.random.key(0))
        assert tuple(item.step for item in shuffled) == drawn[0]

    def test_rule_is_the_callers_and_entries_are_enough(self):
        listed = [Entry(*item[:3]) for item in SNAPSHOTS]
        chosen = saddles.choose(listed, rule=lambda found: found.loss > 0.25)
        assert [entry[:2] for entry in chosen] == [("a", 1), ("b", 5)]

    def test_one_snapshot_comes_back_and_types_stay(self):
        item = snapshot("a", 1)
        assert_trees_equal(saddles.aggregate([item]), item.params)
        half = item._replace(params=jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), item.params))
        assert_trees_equal(saddles.aggregate([half, half._replace(teacher="b")]), half.params)

    def test_errors(self):
        for call in (saddles.choose, saddles.aggregate):
            with pytest.raises(ValueError, match="there is no snapshot"):
                call([])
        with pytest.raises(ValueError, match="none of the 1 snapshots of teacher 'c' is a strong saddle"):
            saddles.choose([*SNAPSHOTS, snapshot("c", 1, strong=False)])
        with pytest.raises(ValueError, match="needs a key"):
            saddles.choose(SNAPSHOTS, which="random")
        message = "'b' at step 5 and of 'c' at step 1 differ in dense/bias, dense/kernel: aggregate them sep"
        with pytest.raises(ValueError, match=message):
            saddles.aggregate([*SNAPSHOTS, snapshot("c", 1, width=4)])
        other = snapshot("c", 1)._replace(params=(jnp.ones(1),))
        with pytest.raises(ValueError, match="networks of the same shapes"):
            saddles.aggregate([*SNAPSHOTS, other])


# Networks: each has hidden layers in order, the widths of teacher and student, and an image shape.
NETWORKS = {
    "mlp": (lambda a, b, c: Mlp(3, (a, b, c)), (6, 5, 4), (4, 3, 2), (2, 2, 1)),
    "cnn": (lambda a, b, c: MalariaCnn(2, (a, b), c), (4, 6, 5), (2, 3, 4), (8, 8, 3)),
    "digits": (lambda a, b: DigitsCnn(3, a), (4, 8), (2, 4), (4, 6, 1)),
}
each_network = pytest.mark.parametrize("name", NETWORKS)


@cache
def network(name, *, teacher=True):
    """A network compiled on a few images, and its parameters, NumPy's so that nothing else is compiled."""
    build, *widths, shape = NETWORKS[name]
    module = build(*widths[not teacher])
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(3, *shape)), jnp.float32)
    params = jax.eval_shape(partial(module.init, train=False), KEY, images)["params"]
    params = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)
    apply = jax.jit(lambda p: module.apply({"params": p}, images, train=False).logits)
    return apply, params


def take(params, indices):
    """Parameters whose i-th hidden layer has the channels ``indices[i]``, -1 for a dead one; an oracle for selection.

    A dead channel has zero incoming and outgoing weights.
    """
    names = list(params)  # sorted, and so Conv before Dense
    found, before = {}, None
    for name, chosen in zip(names, [*indices, None], strict=True):
        kernel, bias = (np.asarray(params[name][key]) for key in ("kernel", "bias"))
        if before is not None:
            old, picked = before
            parts = kernel.reshape(*kernel.shape[:-2], -1, old, kernel.shape[-1])[..., picked, :].copy()
            parts[..., picked < 0, :] = 0
            kernel = parts.reshape(*kernel.shape[:-2], -1, kernel.shape[-1])
        if chosen is not None:
            before = kernel.shape[-1], np.asarray(chosen)
            kernel, bias = kernel[..., chosen].copy(), bias[list(chosen)]
            kernel[..., before[1] < 0] = 0
            bias = np.where(before[1] < 0, 0, bias)
        found[name] = {"kernel": kernel, "bias": bias}
    return found


def embedded(name, params, seed):
    """The student's parameters among dead channels at random places, in the teacher's shapes."""
    _, wide, narrow, _ = NETWORKS[name]
    rng = np.random.default_rng(seed)
    places = []
    for m, p in zip(wide, narrow, strict=True):
        indices = np.full(m, -1)
        indices[np.sort(rng.choice(m, p, replace=False))] = np.arange(p)
        places.append(indices)
    return take(params, places)


def spectral(kernel):
    return np.linalg.norm(np.reshape(kernel, (-1, kernel.shape[-1])), 2)


class TestRecruit:
    @each_network
    @pytest.mark.parametrize("form", ["select", "crop"])
    def test_equal_shapes_are_the_identity(self, name, form):
        _, params = network(name)
        like = jax.eval_shape(lambda: params)
        assert_trees_equal(select_weights(params, like, form=form), params)

    @each_network
    @settings(deadline=None, max_examples=5)
    @given(seed=st.integers(0, 999))
    def test_a_student_of_all_live_channels_computes_what_the_teacher_does(self, name, seed):
        apply, student = network(name, teacher=False)
        teacher = embedded(name, student, seed)
        got = select_weights(teacher, student)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), got, student)
        np.testing.assert_allclose(apply(got), network(name)[0](teacher), rtol=1e-4, atol=1e-4)

    @each_network
    @settings(deadline=None, max_examples=5)
    @given(seed=st.integers(0, 999))
    def test_permuted_channels_give_the_same_function(self, name, seed):
        rng = np.random.default_rng(seed)
        apply, params = network(name)
        small, student = network(name, teacher=False)
        permuted = take(params, [rng.permutation(m) for m in NETWORKS[name][1]])
        same, plain, other = (
            select_weights(permuted, params),
            select_weights(params, student),
            select_weights(permuted, student),
        )
        np.testing.assert_allclose(apply(same), apply(params), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(small(other), small(plain), rtol=1e-4, atol=1e-4)

    @each_network
    def test_kernels_keep_the_spectral_norm(self, name):
        _, params = network(name)
        _, student = network(name, teacher=False)
        scaled = select_weights(params, student)
        for layer, arrays in scaled.items():
            kernel, whole = np.asarray(arrays["kernel"]), np.asarray(params[layer]["kernel"])
            assert spectral(kernel) == pytest.approx(spectral(whole), rel=1e-5)
            assert np.all(np.isin(arrays["bias"], params[layer]["bias"]))

    def test_channels_of_largest_norm_in_their_order(self):
        kernel, after = np.diag([5.0, 1, 4, 3]), np.array([[1.0], [9], [0.5], [4]])  # products 5, 9, 2, 12
        teacher, student = chain(4, 4, 1), chain(4, 2, 1)
        teacher["Dense_0"] = {"kernel": kernel, "bias": np.arange(4.0)}
        teacher["Dense_1"]["kernel"] = after
        got = select_weights(teacher, student)
        np.testing.assert_allclose(got["Dense_0"]["kernel"], kernel[:, [1, 3]] * 5 / 3, rtol=1e-6)
        np.testing.assert_array_equal(got["Dense_0"]["bias"], [1, 3])
        factor = np.linalg.norm(after) / np.linalg.norm(after[[1, 3]])
        np.testing.assert_allclose(got["Dense_1"]["kernel"], factor * after[[1, 3]], rtol=1e-6)

    def test_factors_between_relu_layers_do_not_change_what_is_kept(self):
        _, params = network("mlp")
        _, student = network("mlp", teacher=False)
        first, second, *others = params
        scaled = {
            first: {key: 8 * x for key, x in params[first].items()},
            second: params[second] | {"kernel": params[second]["kernel"] / 8},
        } | {name: params[name] for name in others}
        plain, other = select_weights(params, student), select_weights(scaled, student)
        for name, factor in [(first, 8), (second, 1 / 8)]:
            wanted = factor * np.asarray(plain[name]["kernel"])
            np.testing.assert_allclose(other[name]["kernel"], wanted, rtol=1e-5)

    @pytest.mark.parametrize("form", ["select", "crop"])
    def test_published_pair(self, form):
        (teacher, _), (student, _) = (
            models.init(models.build(f"malaria_{role}", num_classes=2), (32, 32, 3), seed=0)
            for role in ("teacher", "student")
        )
        assert models.count_parameters(teacher) == 25_546
        got = select_weights(teacher, student, form=form)
        assert models.count_parameters(got) == 6_430
        assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, student)

    def test_centre_crop_and_padding(self):
        narrow, wide = jnp.arange(1.0, 6), jnp.arange(12.0).reshape(3, 4)
        got = select_weights({"a": narrow, "b": wide}, {"a": jnp.ones(8), "b": jnp.ones((5, 2))}, form="crop")
        np.testing.assert_array_equal(got["a"], [0, 1, 2, 3, 4, 5, 0, 0])
        np.testing.assert_array_equal(got["b"], [[0, 0], [1, 2], [5, 6], [9, 10], [0, 0]])

    def test_types_are_the_students(self):
        _, params = network("mlp")
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
        for form in ("select", "crop"):
            assert {x.dtype for x in jax.tree.leaves(select_weights(params, like, form=form))} == {
                jnp.dtype(jnp.bfloat16)
            }


def normalised(width, seed=0):
    """Parameters of two convolutions with batch normalisation, and a dense layer."""
    rng = np.random.default_rng(seed)
    shapes = {
        "Conv_0": {"kernel": (3, 3, 1, width)},
        "BatchNorm_0": {"scale": (width,), "bias": (width,)},
        "Conv_1": {"kernel": (3, 3, width, width)},
        "BatchNorm_1": {"scale": (width,), "bias": (width,)},
        "Dense_0": {"kernel": (width, 2), "bias": (2,)},
    }
    return jax.tree.map(
        lambda shape: rng.uniform(1, 2, shape).astype(np.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


class TestNormalisation:
    def test_parameters_follow_the_channels_and_weigh_in_their_choice(self):
        params = normalised(3)
        params["BatchNorm_0"]["scale"] = np.array([1, 1e-3, 1], np.float32)
        got = select_weights(params, normalised(2))
        kernel, whole = np.asarray(got["Conv_0"]["kernel"]), params["Conv_0"]["kernel"][..., [0, 2]]
        np.testing.assert_allclose(kernel / whole, (kernel / whole).min(), rtol=1e-5)
        for name in ("scale", "bias"):
            np.testing.assert_array_equal(got["BatchNorm_0"][name], params["BatchNorm_0"][name][[0, 2]])

    def test_forms_and_explicit_order(self):
        teacher, student = normalised(3), normalised(2)
        order = ("Conv_0", "BatchNorm_0", "Conv_1", "BatchNorm_1", "Dense_0")
        assert_trees_equal(select_weights(teacher, student, order=order), select_weights(teacher, student))
        for form in ("select", "crop"):
            assert_trees_equal(select_weights(teacher, teacher, form=form), teacher)


def chain(*widths, **others):
    """Dense layers of these widths, all ones, and other layers."""
    return {
        f"Dense_{i}": {"kernel": np.ones((m, n), np.float32), "bias": np.ones(n, np.float32)}
        for i, (m, n) in enumerate(itertools.pairwise(widths))
    } | others


class TestRecruitErrors:
    @pytest.mark.parametrize(
        ("teacher", "student", "message"),
        [
            (
                chain(2, 3, 3, 2),
                chain(2, 3, 2),
                "Dense_2/bias only in the teacher, .*: give the student the depth",
            ),
            (chain(2, 3, 2), chain(2, 4, 2), "Dense_0 has 4 channels in the student and 3 in its teacher"),
            (chain(2, 3, 2), chain(3, 3, 2), "Dense_0 takes 2 inputs in the teacher and 3 in the student"),
            (chain(2, 3, 3), chain(2, 3, 2), "Dense_1, the last layer, has 3 classes in the teacher and 2"),
            (
                chain(2, 4, 2, Embed_0={"embedding": np.ones((5, 2))}),
                chain(2, 4, 2, Embed_0={"embedding": np.ones((5, 2))}),
                "Embed_0 holds embedding",
            ),
            (
                {"Dense_0": {"kernel": np.ones((2, 3, 4)), "bias": np.ones((3, 4))}},
                {"Dense_0": {"kernel": np.ones((2, 3, 4)), "bias": np.ones((3, 4))}},
                r"Dense_0 holds bias \(3, 4\), kernel \(2, 3, 4\): pass form='crop'",
            ),
            (
                {"Conv_0": {"kernel": np.ones((3, 3, 1, 2))}},
                {"Conv_0": {"kernel": np.ones((1, 2))}},
                "same kinds of layers, but Conv_0/kernel is",
            ),
            (
                {"Conv_0": {"kernel": np.ones((5, 5, 1, 2))}},
                {"Conv_0": {"kernel": np.ones((3, 3, 1, 2))}},
                r"Conv_0 has a window of \(5, 5\) in the teacher and \(3, 3\)",
            ),
            (
                {"Conv_0": {"kernel": np.ones((3, 3, 1, 4))}, "Dense_0": {"kernel": np.ones((36, 2))}},
                {"Conv_0": {"kernel": np.ones((3, 3, 1, 2))}, "Dense_0": {"kernel": np.ones((8, 2))}},
                "Dense_0 takes 36 inputs in the teacher and 8 in the student, .* 4 and 2 channels of Conv_0",
            ),
            (
                {"Conv_0": {"kernel": np.ones((3, 3, 1, 4))}, "Conv_1": {"kernel": np.ones((3, 3, 1, 4))}},
                {"Conv_0": {"kernel": np.ones((3, 3, 1, 2))}, "Conv_1": {"kernel": np.ones((3, 3, 1, 4))}},
                "Conv_1 takes 1 inputs .* without groups",
            ),
        ],
    )
    def test_networks_that_do_not_correspond(self, teacher, student, message):
        with pytest.raises(ValueError, match=message):
            select_weights(teacher, student)

    def test_names_that_do_not_tell_the_order(self):
        params, like = normalised(3), normalised(2)
        del params["BatchNorm_1"], like["BatchNorm_1"]
        renamed = [
            {"out" if k == "Dense_1" else k: v for k, v in c.items()}
            for c in (chain(2, 3, 2), chain(2, 2, 2))
        ]
        nested = [{"block": c} for c in (chain(2, 3, 2), chain(2, 2, 2))]
        for teacher, student in [(params, like), renamed, nested]:
            with pytest.raises(ValueError, match=r"cannot be inferred from their names: pass order="):
                select_weights(teacher, student)
        for order, (teacher, student) in [
            (["Conv_0", "Conv_1", "BatchNorm_0", "Dense_0"], (params, like)),
            (["Dense_0", "out"], renamed),
            (["block/Dense_0", "block/Dense_1"], nested),
        ]:
            got = select_weights(teacher, student, order=order)
            assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, student)

    def test_orders(self):
        with pytest.raises(
            ValueError, match=r"order must list each layer once, which are \['Dense_0', 'Dense_1'\]"
        ):
            select_weights(chain(2, 3, 2), chain(2, 2, 2), order=["Dense_0"])
        norm = {"LayerNorm_0": {"scale": np.ones(2)}}
        with pytest.raises(ValueError, match="needs a Dense or Conv layer first"):
            select_weights(chain(2, 3, **norm), chain(2, 3, **norm), order=["LayerNorm_0", "Dense_0"])
        with pytest.raises(ValueError, match="LayerNorm_0 has 2 channels, but Dense_0 before it has 3"):
            select_weights(chain(2, 3, **norm), chain(2, 3, **norm))

    def test_layers_are_ordered_by_number(self):
        """Twelve layers, whose names sort otherwise."""
        teacher, student = chain(*range(20, 7, -1)), chain(20, *range(18, 7, -1), 8)
        assert jax.tree.map(np.shape, select_weights(teacher, student)) == jax.tree.map(np.shape, student)

    def test_an_empty_spectrum(self):
        with pytest.raises(ValueError, match="at least one eigenvalue"):
            score(())
