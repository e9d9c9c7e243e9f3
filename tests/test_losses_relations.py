"""Relational losses against the original authors' values, against their laws, and with the batch cut over devices."""

from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from kdjax import parallel
from kdjax.losses import relations

GOLDENS = np.load(Path(__file__).parent / "goldens" / "loss_goldens.npz")
ROWS = arrays.arrays(np.float32, (4, 3), elements=st.floats(-10, 10, width=32, allow_subnormal=False))


class Row(NamedTuple):
    """A loss and which laws hold for it."""

    loss: object
    zero_at_equality: bool = True
    any_order: bool = True
    any_scale: bool = False  # of the student
    any_origin: bool = False  # of the student
    per_example: bool = False


LOSSES = {
    "rkd_distance": Row(relations.rkd_distance, any_scale=True, any_origin=True),
    "rkd_angle": Row(relations.rkd_angle, any_scale=True, any_origin=True),
    "pkt": Row(relations.pkt, any_scale=True),
    "similarity_preserving": Row(relations.similarity_preserving, any_scale=True),
    "correlation_congruence": Row(relations.correlation_congruence, any_order=False),
    "correlation_distance": Row(relations.correlation_distance, per_example=True),
    "correlation_distance_ranks": Row(
        partial(relations.correlation_distance, temperature=2.0, rank_weight=0.5), per_example=True
    ),
    "info_nce": Row(relations.info_nce, zero_at_equality=False, any_scale=True),
    "cka": Row(relations.cka, any_scale=True, any_origin=True),
}
GATHERED = [name for name, row in LOSSES.items() if not row.per_example]


def pair(rows=4, dims=5, seed=0):
    student, teacher = np.random.default_rng(seed).normal(size=(2, rows, dims)).astype(np.float32)
    return jnp.asarray(student), jnp.asarray(teacher)


def value(name, student, teacher, **options):
    """The loss, or the mean of a per-example one, with a name for each that hypothesis can show."""
    return jnp.mean(LOSSES[name].loss(jnp.asarray(student), jnp.asarray(teacher), **options))


@cache
def compiled(name, argnums=0):
    """Value and gradient under jit; hypothesis and the tests of one shape share the program."""
    return jax.jit(jax.value_and_grad(partial(value, name), argnums=argnums))


def rkd(student, teacher):
    return 25 * relations.rkd_distance(student, teacher) + 50 * relations.rkd_angle(student, teacher)


@pytest.mark.parametrize(
    ("golden", "loss", "inputs"),
    [
        ("rkd_d25_a50", rkd, "embedding_{}"),
        ("pkt", relations.pkt, "embedding_{}"),
        ("similarity_preserving_last", relations.similarity_preserving, "features_{}_2"),
        ("correlation_congruence", relations.correlation_congruence, "embedding_{}"),
    ],
)
def test_equals_the_authors(golden, loss, inputs):
    student, teacher = (jnp.asarray(GOLDENS[inputs.format(who)]) for who in ("student", "teacher"))
    with jax.default_matmul_precision("highest"):
        got, gradient = jax.jit(jax.value_and_grad(loss))(student, teacher)
    np.testing.assert_allclose(got, GOLDENS[f"{golden}/loss"], rtol=2e-5 if golden == "pkt" else 1e-5)
    wanted = GOLDENS[f"{golden}/grad_0"]
    np.testing.assert_allclose(gradient, wanted, atol=2e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("name", LOSSES)
class TestLaws:
    @settings(deadline=None, max_examples=10)
    @given(student=ROWS, teacher=ROWS, order=st.permutations(range(4)))
    def test_not_negative_finite_and_blind_to_the_order(self, name, student, teacher, order):
        loss, gradient = compiled(name)(student, teacher)
        assert loss >= -1e-6
        assert np.isfinite(loss)
        assert np.isfinite(gradient).all()
        if LOSSES[name].any_order:
            order = np.array(order)
            again, _ = compiled(name)(student[order], teacher[order])
            np.testing.assert_allclose(again, loss, rtol=1e-3, atol=1e-4)

    def test_zero_at_equality(self, name):
        student, _ = pair()
        loss = value(name, student, student)
        assert (loss == 0) == LOSSES[name].zero_at_equality

    def test_blind_to_the_students_scale_and_origin_where_said(self, name):
        student, teacher = pair()
        shift = jnp.array([[1.0, -2.0, 3.0, 0.5, 0.0]])
        loss, scaled, shifted = (
            compiled(name, (0, 1))(s, teacher)[0] for s in (student, 3 * student, student + shift)
        )
        assert np.isclose(scaled, loss, rtol=1e-4) == LOSSES[name].any_scale
        assert np.isclose(shifted, loss, rtol=1e-4) == LOSSES[name].any_origin

    def test_no_gradient_reaches_the_teacher(self, name):
        np.testing.assert_array_equal(compiled(name, (0, 1))(*pair())[1][1], 0)

    @pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
    def test_half_precision_is_computed_in_float32(self, name, dtype):
        student, teacher = (x.astype(dtype) for x in pair())
        loss = value(name, student, teacher)
        assert loss.dtype == jnp.float32
        np.testing.assert_array_equal(
            loss, value(name, student.astype(jnp.float32), teacher.astype(jnp.float32))
        )

    def test_jitted_and_vmapped_equal_plain(self, name):
        student, teacher = (jnp.stack(pairs) for pairs in zip(pair(), pair(seed=1), strict=True))
        plain = [value(name, s, t) for s, t in zip(student, teacher, strict=True)]
        np.testing.assert_allclose(
            jax.jit(jax.vmap(partial(value, name)))(student, teacher), plain, rtol=1e-4
        )

    @pytest.mark.parametrize(
        "student",
        [
            np.zeros((4, 3)),
            np.ones((4, 3)) * 1e4 / 3,
            np.array([[1, 2, 3], [1, 2, 3], [0, 0, 0], [4, 1, 2]]),
            np.array([[1e4, -1e4, 0], [-1e4, 1e4, 0], [1e-30, 0, 0], [1e4, -1e4, 0]]),
        ],
        ids=["zero", "equal", "duplicates", "saturated"],
    )
    def test_degenerate_batches_are_finite(self, name, student):
        student, teacher = student.astype(np.float32), np.array(pair(4, 3)[1])
        for s, t in [(student, teacher), (teacher, student), (student, student)]:
            loss, gradient = compiled(name)(s, t)
            assert np.isfinite(loss)
            assert np.isfinite(gradient).all()

    @pytest.mark.parametrize("shape", [(1, 4), (3, 1), (1, 1)])
    def test_one_example_or_one_dimension(self, name, shape):
        if name.startswith("correlation_distance") and shape[1] == 1:
            pytest.skip("a prediction over one class is refused")
        loss, gradient = compiled(name)(*pair(*shape))
        assert np.isfinite(loss)
        assert np.isfinite(gradient).all()


def test_a_sum_over_consecutive_examples_depends_on_their_order():
    student, teacher = pair()
    order = jnp.array([0, 2, 1, 3])
    loss = relations.correlation_congruence(student, teacher)
    assert not np.isclose(relations.correlation_congruence(student[order], teacher[order]), loss, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "implementation"), [*((name, "pmap") for name in GATHERED), ("pkt", "shard_map")]
)
def test_cut_over_two_devices_all_is_as_of_the_whole(name, implementation):
    inputs, teacher = pair(6, 5)
    params, tangent = jnp.split(jax.random.normal(jax.random.key(0), (10, 5)), 2)

    def loss(params, inputs, teacher, **options):
        return LOSSES[name].loss(jnp.tanh(inputs @ params), teacher, **options)

    def step(params, tangent, inputs, teacher, axis_name=None):
        options = {} if axis_name is None else {"axis_name": axis_name}
        gradient = partial(jax.value_and_grad(loss), inputs=inputs, teacher=teacher, **options)
        (value, gradient), (_, curvature) = jax.jvp(gradient, (params,), (tangent,))
        return value, gradient, curvature

    def mapped(*arguments):
        value, *rest = step(*arguments, axis_name=parallel.AXIS)
        return value, *jax.lax.pmean(rest, parallel.AXIS)

    wanted = jax.jit(step)(params, tangent, inputs, teacher)
    spread = parallel.data_parallel(
        mapped, replicated=2, devices=jax.devices()[:2], implementation=implementation
    )
    for got, whole in zip(spread(params, tangent, inputs, teacher), wanted, strict=True):
        np.testing.assert_allclose(got, whole, rtol=1e-4, atol=1e-4 * np.abs(whole).max())
    parts = zip(jnp.split(jnp.tanh(inputs @ params), 2), jnp.split(teacher, 2), strict=True)
    per_shard = np.mean([compiled(name)(s, t)[0] for s, t in parts])
    assert not np.isclose(per_shard, wanted[0], rtol=1e-3)


class TestRkd:
    def test_angles_equal_those_of_the_differences(self):
        def angles(rows):
            difference = rows[None].astype(np.float64) - rows[:, None]
            norm = np.linalg.norm(difference, axis=-1, keepdims=True)
            unit = difference / np.where(norm > 0, norm, 1)
            return np.einsum("ijd,ikd->ijk", unit, unit)

        student, teacher = (np.array(x) + 100 for x in pair(5, 3))
        student[1] = student[0]
        error = np.abs(angles(student) - angles(teacher))
        wanted = np.where(error < 1, error**2 / 2, error - 0.5).mean()
        got = relations.rkd_angle(jnp.asarray(student), jnp.asarray(teacher))
        np.testing.assert_allclose(got, wanted, rtol=1e-4)

    def test_anchors_a_few_at_a_time_change_nothing(self, monkeypatch):
        arguments = pair(7)
        wanted = compiled("rkd_angle")(*arguments)
        monkeypatch.setattr(relations, "_ANGLES_AT_ONCE", 3 * 7**2)
        got = jax.jit(jax.value_and_grad(relations.rkd_angle))(*arguments)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), got, wanted)

    def test_a_large_batch_needs_neither_the_differences_nor_all_angles_at_once(self):
        shapes = [jax.ShapeDtypeStruct((256, 512), jnp.float32)] * 2
        compiled = jax.jit(jax.grad(relations.rkd_angle)).lower(*shapes).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 4 * 256**3


class TestCorrelationDistance:
    def test_is_one_minus_pearson_of_the_predictions(self):
        student, teacher = pair(3, 6)
        p, q = jax.nn.softmax(student / 2), jax.nn.softmax(teacher / 2)
        wanted = [1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)]
        got = relations.correlation_distance(student, teacher, temperature=2.0)
        np.testing.assert_allclose(got, wanted, rtol=1e-5)

    def test_the_rank_term_tends_to_spearman(self):
        student, teacher = pair(3, 6)
        ranks = [np.argsort(np.argsort(x, axis=1), axis=1) for x in (student, teacher)]
        wanted = [1 - np.corrcoef(a, b)[0, 1] for a, b in zip(*ranks, strict=True)]
        student, teacher = 1e4 * student, 1e4 * teacher  # any difference is far beyond the width of the step
        plain = relations.correlation_distance(student, teacher, temperature=1e4)
        got = relations.correlation_distance(student, teacher, temperature=1e4, rank_weight=1.0)
        np.testing.assert_allclose(got - plain, wanted, rtol=1e-3)

    def test_is_one_value_per_example(self):
        student, teacher = pair(3, 6)
        loss = relations.correlation_distance(student, teacher)
        np.testing.assert_allclose(
            jax.vmap(relations.correlation_distance)(student, teacher), loss, rtol=1e-5
        )


def test_info_nce_of_indistinguishable_teachers_is_log_of_the_batch():
    student, _ = pair(8)
    np.testing.assert_allclose(relations.info_nce(student, jnp.ones((8, 5))), np.log(8), rtol=1e-6)


def test_cka_ignores_rotations_and_is_one_minus_the_similarity():
    student, teacher = pair(6, 5)
    rotation, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (5, 5)))
    loss = relations.cka(student, teacher)
    np.testing.assert_allclose(relations.cka(student @ rotation, teacher), loss, rtol=1e-4)
    x, y = (np.asarray(a - a.mean(0, keepdims=True), np.float64) for a in (student, teacher))
    norms = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    np.testing.assert_allclose(loss, 1 - np.linalg.norm(y.T @ x) ** 2 / norms, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, t: relations.info_nce(s, t, temperature=0), "info_nce needs a temperature above 0, got 0"),
        (lambda s, t: relations.correlation_distance(s, t, temperature=-1), "temperature above 0, got -1"),
        (
            lambda s, t: relations.init_crd_memory(jax.random.key(0), examples=0, dims=3),
            "at least one example",
        ),
        (
            lambda s, t: relations.crd_candidates(jax.random.key(0), jnp.arange(2), negatives=0, examples=4),
            "a negative and two examples",
        ),
    ],
)
def test_refuses_what_it_cannot_use(call, message):
    with pytest.raises(ValueError, match=message):
        call(*pair())


def crd_goldens():
    """Inputs of the golden step, with the embeddings that the authors learn in front of the loss."""

    def embed(features, who):
        rows = features @ GOLDENS[f"crd_embed_{who}_weight"].T + GOLDENS[f"crd_embed_{who}_bias"][None]
        return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)

    banks = (jnp.asarray(GOLDENS[f"crd_memory_{who}"]) for who in ("student", "teacher"))
    memory = relations.CrdMemory(*banks, jnp.zeros(()), jnp.zeros(()))
    return embed, memory, jnp.asarray(GOLDENS["crd_indices"])


class TestContrastiveRepresentation:
    @pytest.mark.parametrize("examples_per_candidate", [0, 8])
    def test_equals_the_authors_whichever_way_rows_are_looked_up(self, monkeypatch, examples_per_candidate):
        monkeypatch.setattr(relations, "_DENSE_BELOW", examples_per_candidate)
        embed, memory, candidates = crd_goldens()

        def loss(student):
            teacher = embed(GOLDENS["embedding_teacher"], "teacher")
            values, after = relations.crd(embed(student, "student"), teacher, memory, candidates)
            assert values.shape == (6,)
            return jnp.mean(values), after

        with jax.default_matmul_precision("highest"):
            (got, after), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
                jnp.asarray(GOLDENS["embedding_student"])
            )
        np.testing.assert_allclose(got, GOLDENS["crd/loss"], rtol=1e-5)
        wanted = GOLDENS["crd/grad_0"]
        np.testing.assert_allclose(gradient, wanted, atol=2e-4 * np.abs(wanted).max())
        np.testing.assert_allclose([after.student_z, after.teacher_z], GOLDENS["crd_Z"], rtol=1e-5)
        visited = candidates[:, 0]
        for who in ("student", "teacher"):
            bank = getattr(after, who)
            np.testing.assert_allclose(
                bank[visited], GOLDENS[f"crd_memory_{who}_after"], rtol=1e-4, atol=1e-6
            )
            left = np.setdiff1d(np.arange(200), visited)
            np.testing.assert_array_equal(bank[left], GOLDENS[f"crd_memory_{who}"][left])

    def test_the_second_step_keeps_z_and_takes_schedules_under_jit(self):
        embed, memory, candidates = crd_goldens()
        rows = [embed(GOLDENS[f"embedding_{who}"], who) for who in ("student", "teacher")]
        step = jax.jit(
            lambda memory, temperature: relations.crd(
                *rows, memory, candidates, temperature=temperature, momentum=0.5
            )
        )
        _, memory = step(memory, 0.07)
        second, after = step(memory, 0.1)
        assert (memory.student_z, memory.teacher_z) == (after.student_z, after.teacher_z)
        assert np.isfinite(second).all()
        assert jax.tree.map(jnp.shape, memory) == jax.tree.map(jnp.shape, after)

    def test_cut_over_two_devices_values_gradients_and_memories_are_those_of_the_whole(self):
        embed, memory, candidates = crd_goldens()
        student = jnp.asarray(GOLDENS["embedding_student"])
        teacher = embed(GOLDENS["embedding_teacher"], "teacher")

        def step(scale, memory, student, teacher, candidates, axis_name=None):
            def loss(scale):
                values, after = relations.crd(
                    embed(scale * student, "student"), teacher, memory, candidates, axis_name=axis_name
                )
                return jnp.mean(values), after

            (value, after), gradient = jax.value_and_grad(loss, has_aux=True)(scale)
            if axis_name is not None:
                value, gradient = jax.lax.pmean((value, gradient), axis_name)
            return value, gradient, after

        parts = [x.reshape(2, 3, -1) for x in (student, teacher, candidates)]
        got = jax.pmap(
            partial(step, axis_name="batch"),
            axis_name="batch",
            in_axes=(None, None, 0, 0, 0),
            devices=jax.devices()[:2],
        )(jnp.float32(1), memory, *parts)
        wanted = jax.jit(step)(jnp.float32(1), memory, student, teacher, candidates)
        for device in range(2):
            one = jax.tree.map(lambda x, device=device: x[device], got)
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), one, wanted)

    @pytest.mark.parametrize("scale", [0.0, 1e4])
    def test_embeddings_that_are_not_unit_rows_are_finite(self, scale):
        _, memory, candidates = crd_goldens()
        rows = scale * jax.random.normal(jax.random.key(0), (2, 6, 16))

        def loss(rows):
            values, after = relations.crd(*rows, memory, candidates)
            return jnp.mean(values), after

        (value, after), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(rows)
        assert np.isfinite(value)
        assert value >= 0
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((after, gradient)))

    def test_both_projections_learn_and_the_memory_does_not(self):
        embed, memory, candidates = crd_goldens()
        rows = [embed(GOLDENS[f"embedding_{who}"], who) for who in ("student", "teacher")]

        def loss(student, teacher, memory):
            return jnp.mean(relations.crd(student, teacher, memory, candidates)[0])

        student, teacher, rest = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*rows, memory)
        assert (jnp.abs(student).max(axis=1) > 0).all()
        assert (jnp.abs(teacher).max(axis=1) > 0).all()
        assert not any(x.any() for x in jax.tree.leaves(rest))

    @pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
    def test_half_precision_is_computed_in_float32(self, dtype):
        _, memory, candidates = crd_goldens()
        rows = jax.random.normal(jax.random.key(0), (2, 6, 16)).astype(dtype)
        got = relations.crd(*rows, memory, candidates)
        wanted = relations.crd(*rows.astype(jnp.float32), memory, candidates)
        jax.tree.map(np.testing.assert_array_equal, got, wanted)
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(got))

    @pytest.mark.parametrize(("option", "bad"), [("temperature", 0), ("momentum", 1.5), ("momentum", -0.1)])
    def test_refuses_what_it_cannot_use(self, option, bad):
        embed, memory, candidates = crd_goldens()
        rows = [embed(GOLDENS[f"embedding_{who}"], who) for who in ("student", "teacher")]
        with pytest.raises(ValueError, match=f"{option}.*got {bad}"):
            relations.crd(*rows, memory, candidates, **{option: bad})


class TestCrdMemory:
    def test_starts_with_rows_of_about_unit_norm_and_z_unset(self):
        memory = relations.init_crd_memory(jax.random.key(0), examples=50, dims=64)
        np.testing.assert_allclose(jnp.mean(jnp.sum(memory.student**2, axis=1)), 1, rtol=0.1)
        assert not np.array_equal(memory.student, memory.teacher)
        assert memory.student_z == memory.teacher_z == 0

    @pytest.mark.parametrize("by_class", [False, True])
    def test_candidates_are_the_example_and_evenly_drawn_others(self, by_class):
        index, labels = jnp.array([0, 3, 5, 7]), jnp.array([2, 0, 1, 0, 2, 2, 1, 0])
        others = labels if by_class else None
        drawn = relations.crd_candidates(jax.random.key(0), index, negatives=2000, examples=8, labels=others)
        np.testing.assert_array_equal(drawn[:, 0], index)
        for i, row in zip(index, drawn, strict=True):
            allowed = np.flatnonzero(labels != labels[i]) if by_class else np.setdiff1d(np.arange(8), i)
            found, counts = np.unique(row[1:], return_counts=True)
            np.testing.assert_array_equal(found, allowed)
            np.testing.assert_allclose(counts, 2000 / len(allowed), rtol=0.25)
