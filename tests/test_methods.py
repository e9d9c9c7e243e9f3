"""Every arm of distill: complete, weighted as its table says, and with heads that all learn."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import common
from experiments.common import arms, methods
from kdjax import losses, models, parallel
from kdjax.types import Outputs

ROWS, CLASSES, STEPS = 8, 5, 240
LABELS = np.arange(24) % CLASSES


def shown(seed: int, channels: tuple[int, ...], *, rows: int = ROWS) -> Outputs:
    """What a small network of three stages might return."""
    rng = np.random.default_rng(seed)
    features = {}
    for stage, (size, width) in enumerate(zip((8, 8, 4, 2), channels, strict=True)):
        x = jnp.asarray(rng.normal(size=(rows, size, size, width)), jnp.float32)
        features[f"stage{stage}"] = jax.nn.relu(x)
        if stage:
            features[f"preactivation{stage}"] = x
    features["embedding"] = features["stage3"].mean((1, 2))
    return Outputs(jnp.asarray(2 * rng.normal(size=(rows, CLASSES)), jnp.float32), features)


STUDENT, TEACHER = shown(0, (4, 4, 6, 8)), shown(1, (4, 6, 6, 10))
EQUAL = shown(2, (4, 4, 6, 8))  # a teacher of the student's widths


def hard(outputs, batch):
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(outputs.logits, batch["label"]))


def arm(name, teacher=TEACHER, student=STUDENT, **options):
    kd = {"hard_weight": 0.1, "soft_weight": 0.9, "temperature": 4.0}
    return common.make_arm(
        name,
        student=student,
        teacher=teacher,
        steps=STEPS,
        labels=LABELS,
        hard=hard,
        **({"weights": {}, "kd": kd} | options),
    )


def batch_at(step, features, teacher=TEACHER):
    label = jnp.arange(ROWS) % CLASSES
    batch = {"label": label, "position": jnp.arange(ROWS) * 2, "step": jnp.int32(step)}
    return (
        batch | {"teacher_logits": teacher.logits} | {f"teacher_{f}": teacher.features[f] for f in features}
    )


def terms(arm, step=100, teacher=TEACHER, params=None, state=None, student=STUDENT):
    """The weighted terms of an arm on one device, and the heads' state afterwards."""
    batch = batch_at(step, arm.features, teacher)

    def run(student):
        found = dict(arm.objective(student, batch))
        kept = state
        if arm.heads is not None:
            apply = models.apply_fn(arm.heads)
            more, kept = apply(params, state, (student, batch), train=True, key=jax.random.key(0))
            found |= more
        return found, kept

    one = jax.vmap(run, axis_name=parallel.AXIS)(jax.tree.map(lambda x: x[None], student))
    return jax.tree.map(lambda x: x[0], one)


def begun(arm, teacher=TEACHER):
    if arm.heads is None:
        return None, None
    return arms.companion_initialiser(arm.heads, STUDENT, batch_at(0, arm.features, teacher))(0)


def teacher_for(name):
    return EQUAL if name == "fsp" else TEACHER  # FSP compares channels with channels


@pytest.mark.parametrize("name", methods.METHODS)
def test_everything_that_can_learn_does(name):
    made, teacher = arm(name, teacher_for(name)), teacher_for(name)
    params, state = begun(made, teacher)

    def loss(student, params):
        return sum(terms(made, 10, teacher, params, state, student)[0].values())

    value, (to_student, to_companions) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(STUDENT, params)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(to_student))
    assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(to_student))
    for path, leaf in jax.tree.leaves_with_path(to_companions):
        assert np.any(leaf != 0), f"{jax.tree_util.keystr(path)} receives no gradient"


@pytest.mark.parametrize("name", methods.METHODS)
def test_table_names_weight_and_source(name):
    method = methods.METHODS[name]
    assert method.weight > 0
    assert len(method.source) > 5
    assert method.when in ("always", "warm_up", "first")
    assert method.features in arms.CHOICES
    if name != "rkd":
        assert callable(getattr(losses, name))


def test_every_loss_is_an_arm_or_says_why_not():
    source = Path(methods.__file__).read_text(encoding="utf-8") + Path(arms.__file__).read_text(
        encoding="utf-8"
    )
    used = set(re.findall(r"losses\.([a-z_]+)", source))
    public = {
        n for n in dir(losses) if n.islower() and not n.startswith("_") and callable(getattr(losses, n))
    }
    assert public - used == set(methods.ELSEWHERE)
    assert set(methods.ELSEWHERE) <= public


def test_scratch_and_kd_are_what_they_are_called():
    found, _ = terms(arm("scratch"))
    np.testing.assert_allclose(found.pop("hard"), hard(STUDENT, batch_at(0, ())), rtol=1e-6)
    assert not found
    found, _ = terms(arm("kd"))
    soft = losses.soft_target_kl(STUDENT.logits, TEACHER.logits, temperature=4.0).mean()
    np.testing.assert_allclose(found["soft"], 0.9 * soft, rtol=1e-6)
    np.testing.assert_allclose(found["hard"], 0.1 * hard(STUDENT, batch_at(0, ())), rtol=1e-6)


def test_terms_carry_their_weights():
    found, _ = terms(arm("attention_transfer"))
    pairs = [(STUDENT.features[f"stage{i}"], TEACHER.features[f"stage{i}"]) for i in (1, 2, 3)]
    want = 1000 * sum(losses.attention_transfer(s, t).mean() for s, t in pairs)
    np.testing.assert_allclose(found["attention_transfer"], want, rtol=1e-5)
    other, _ = terms(arm("attention_transfer", weights={"attention_transfer": 10.0}))
    np.testing.assert_allclose(other["attention_transfer"], want / 100, rtol=1e-5)
    np.testing.assert_allclose(other["hard"], hard(STUDENT, batch_at(0, ())), rtol=1e-6)


def test_a_sum_of_methods_is_the_sum_of_their_terms():
    made = arm("rkd+kd+hint")
    params, state = begun(made)
    found, _ = terms(made, params=params, state=state)
    assert found.keys() == {"hard", "soft", "rkd", "hint"}
    alone, _ = terms(arm("rkd"))
    np.testing.assert_allclose(found["rkd"], alone["rkd"], rtol=1e-5)
    np.testing.assert_allclose(found["hard"], alone["hard"], rtol=1e-6)
    kd, _ = terms(arm("kd"))
    np.testing.assert_allclose(found["soft"], kd["soft"] / 0.9, rtol=1e-6)


def test_a_first_stage_is_alone_and_then_gone():
    made = arm("fsp+kd", EQUAL)
    first, later = (terms(made, step, EQUAL)[0] for step in (29, 30))
    assert first["fsp"] > 0
    assert first["hard"] == first["soft"] == 0
    assert later["fsp"] == 0
    assert min(later["hard"], later["soft"]) > 0


def test_a_warm_up_rises_over_twenty_of_240_epochs():
    made = arm("dkd")
    at = [float(terms(made, step)[0]["dkd"]) for step in (0, 9, 19, 200)]
    np.testing.assert_allclose(np.array(at) / at[-1], [1 / 20, 10 / 20, 1, 1], rtol=1e-5)


def test_crd_remembers_the_examples_it_saw():
    made = arm("crd")
    params, state = begun(made)
    _, after = terms(made, params=params, state=state)
    before, now = (s["memory"]["crd"]["crd"] for s in (state, after))
    moved = np.flatnonzero(np.any(np.asarray(before.student != now.student), axis=1))
    np.testing.assert_array_equal(moved, np.arange(ROWS) * 2)
    assert float(before.student_z) == 0 < float(now.student_z)
    assert before.student.shape == (len(LABELS), 128)


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices; conftest.py simulates them on a CPU")
@pytest.mark.parametrize("name", ["rkd", "dist", "similarity_preserving", "ofd", "hint"])
def test_two_devices_see_the_whole_batch(name):
    made = arm(name)
    params, state = begun(made)
    whole, _ = terms(made, params=params, state=state)

    def run(student, batch):
        batch = batch | {"step": jnp.int32(100)}
        found = dict(made.objective(student, batch))
        if made.heads is not None:
            apply = models.apply_fn(made.heads)
            found |= apply(params, state, (student, batch), train=True, key=jax.random.key(0))[0]
        return jax.lax.pmean(found, parallel.AXIS)

    batch = batch_at(100, made.features)
    del batch["step"]
    halves = jax.tree.map(lambda x: x.reshape(2, ROWS // 2, *x.shape[1:]), (STUDENT, batch))
    parts = jax.pmap(run, axis_name=parallel.AXIS, devices=jax.devices()[:2])(*halves)
    for term, value in whole.items():
        np.testing.assert_allclose(parts[term][0], value, rtol=2e-4, atol=1e-5)


def test_fewer_stages_and_unequal_maps_are_named():
    two = Outputs(TEACHER.logits, {k: v for k, v in TEACHER.features.items() if not k.endswith("3")})
    with pytest.raises(ValueError, match=r"attention_transfer compares stages.*teacher stage1, stage2\."):
        arm("attention_transfer", two)
    with pytest.raises(ValueError, match="fsp cannot compare these networks"):
        arm("fsp", TEACHER)
