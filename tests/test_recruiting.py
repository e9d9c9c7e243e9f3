"""The saddle study: the regions that students start from, and the whole command in small."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import common
from experiments.common import recruiting
from kdjax import models, results, saddles

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def task():
    return common.make_task("digits", data_dir=None, devices=1, num_train=128)


@pytest.fixture(scope="module")
def watch(task):
    recipe = common.Recipe(epochs=1, batch_size=32, learning_rate=2e-3, steps_per_dispatch=2)
    return recruiting.make_watcher(task, "digits_student", recipe, split="validation")


@pytest.fixture(scope="module")
def watched(watch, tmp_path_factory):
    directory = tmp_path_factory.mktemp("watched")
    return [watch(seed, directory / str(seed)) for seed in (3, 4)]


def student(task):
    return models.init(models.build("digits_student", num_classes=10, width=2), (8, 8, 1), seed=0)[0]


class TestWatching:
    def test_leaves_a_scored_snapshot_after_every_dispatch(self, task, watched):
        for one, seed in zip(watched, (3, 4), strict=True):
            entries = saddles.entries(one.repository)
            assert [(entry.teacher, entry.step) for entry in entries] == [
                (f"teacher{seed}", 2),
                (f"teacher{seed}", 4),
            ]
            last = saddles.read(one.repository, one.name, 4, one.teacher.weights.params)
            jax.tree.map(np.testing.assert_array_equal, last.params, one.teacher.weights.params)

    def test_scores_are_of_the_loss_without_dropout(self, task, watched):
        module, params = watched[0].teacher.module, watched[0].teacher.weights.params
        score = recruiting.make_scorer(task, module)(params, 0)
        ids = np.random.default_rng(0).permutation(task.split["train"])[: recruiting.SCORED_IMAGES]
        images = (task.source.images[ids] / 255 - np.float32(task.mean)) / np.float32(task.std)
        logits = models.apply_fn(module)(params, {}, jnp.asarray(images, jnp.float32), train=False)[0].logits
        loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, task.source.labels[ids]).mean()
        np.testing.assert_allclose(score.loss, loss, rtol=1e-5)
        assert score.lambda_min < 0 < score.lambda_max


class TestSnapshotsOfAFinishedTeacher:
    @pytest.mark.parametrize(
        ("harm", "said"),
        [
            (
                lambda own, other: shutil.rmtree(own / "saddles/teacher3/step_00000002"),
                r"steps \[2\] are missing",
            ),
            (lambda own, other: shutil.rmtree(own / "saddles"), "is no repository"),
            (
                lambda own, other: shutil.copytree(
                    other / "saddles/teacher4", own / "saddles/teacher3", dirs_exist_ok=True
                ),
                "seed 4 there and 3 here",
            ),
        ],
    )
    def test_that_are_not_all_there_and_its_own_are_refused(self, watched, watch, tmp_path, harm, said):
        own, other = tmp_path / "own", watched[1].repository.parent
        shutil.copytree(watched[0].repository.parent, own)
        assert watch(3, own).identity == watched[0].identity
        harm(own, other)
        with pytest.raises(ValueError, match=f"{said}.*Delete .* to train this teacher again"):
            watch(3, own)


class TestRegion:
    def test_is_the_mean_over_teachers_in_the_students_shapes(self, task, watched):
        like = student(task)
        region = recruiting.region_of(watched, like, which="last", rule="strong", form="crop", seed=0)
        mean = jax.tree.map(
            lambda a, b: (np.asarray(a) + np.asarray(b)) / 2, *(one.teacher.weights.params for one in watched)
        )
        want = saddles.select_weights(mean, like, form="crop")
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), region.params, want)
        assert (region.steps, region.strong) == ([4, 4], True)

    def test_of_one_teacher_all_its_snapshots_may_be_averaged(self, task, watched):
        like = student(task)
        region = recruiting.region_of(watched[:1], like, which="average", rule="strong", form="crop", seed=0)
        snapshots = [
            saddles.read(watched[0].repository, watched[0].name, step, watched[0].teacher.weights.params)
            for step in (2, 4)
        ]
        mean = jax.tree.map(lambda a, b: (a + b) / 2, *(snapshot.params for snapshot in snapshots))
        want = saddles.select_weights(mean, like, form="crop")
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), region.params, want)

    def test_without_a_strong_saddle_the_strongest_stands_in_and_is_said(self, task, watched, monkeypatch):
        monkeypatch.setitem(recruiting.RULES, "never", lambda score: score.loss < 0)
        region = recruiting.region_of(
            watched[:1], student(task), which="saddle", rule="never", form="select", seed=0
        )
        strengths = {
            e.step: float(e.score.negative_curvature_ratio) for e in saddles.entries(watched[0].repository)
        }
        assert (region.steps, region.strong) == ([max(strengths, key=strengths.__getitem__)], False)


def test_what_was_spent_is_counted_whichever_form_spends_it():
    params = {"w": jnp.ones(20)}

    def loss(p):
        return jnp.sum(p["w"] ** 4) - jnp.sum(p["w"] ** 2)

    escape = recruiting.Escape(period=1, negative_curvature_ratio=0.0)
    forms = {
        "published": recruiting.as_published(params),
        "escapes": recruiting.with_escapes(None, escape),
        "perturbations": recruiting.with_perturbations(None, escape),
        "none": lambda tx: tx,
    }
    for name, wrap in forms.items():
        run = _one_device(wrap(optax.sgd(0.0)), params, loss)
        assert run["hvps"] == (16 if name in ("published", "escapes") else 0), name
        assert (run["evaluations"] > 0) == (name == "perturbations") or name in ("published", "escapes")
        assert run["events"] in (0, 1)


def _one_device(tx, params, loss):
    def update(params):
        state = tx.init(params)
        _, after = tx.update(jax.grad(loss)(params), state, params, value_fn=loss)
        return recruiting.spent(state, after)

    mapped = jax.pmap(update, axis_name="batch", devices=jax.devices()[:1])
    found = mapped(jax.tree.map(lambda x: x[None], params))
    return {name: float(value[0]) for name, value in found.items()}


def launch(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.sprkd_malaria", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": ""},
        capture_output=True,
        text=True,
        timeout=500,
    )


class TestCommand:
    @pytest.mark.once
    def test_in_small(self, tmp_path):
        command = [
            "--dataset=digits",
            "--teacher=digits_teacher",
            "--student=digits_student",
            "--smoke",
            "--arms=scratch,kd_strong,sprkd,from_saddle",
            "--weak_epochs=1",
            "--period=2",
            "--measure=validation",
            f"--workdir={tmp_path / 'run'}",
        ]
        done = launch(*command)
        assert done.returncode == 0, done.stderr
        found = results.read(tmp_path / "run" / "results.json")
        assert set(found["arms"]) == {
            *("scratch", "kd_strong", "sprkd", "from_saddle"),
            *("weak_teacher", "strong_teacher"),
        }
        runs = found["arms"]["sprkd"]
        per_epoch = 256 // 64
        assert all(value % 16 in (0, 1) for value in runs["hvps"])  # and one to certify with
        for paid, hvps, losses in zip(
            runs["gradient_equivalents"], runs["hvps"], runs["evaluations"], strict=True
        ):
            assert paid == pytest.approx(2 * per_epoch + 1.5 * hvps + losses / 3)
        assert found["arms"]["scratch"]["gradient_equivalents"] == [2 * per_epoch] * 3
        assert set(found["flatness"]) == {"scratch", "kd_strong", "sprkd", "from_saddle"}
        assert any("McNemar" in note for note in found["notes"])

    @pytest.mark.parametrize(
        ("flag", "said"),
        [
            ("--arms=scratch,sprkdd", "no arm 'sprkdd'"),
            ("--arms=sprkd", "scratch, which all are compared with, is missing"),
            ("--student=mlp", "layers"),
        ],
    )
    def test_refuses_before_any_work(self, tmp_path, flag, said):
        done = launch(
            "--dataset=digits",
            "--teacher=digits_teacher",
            "--student=digits_student",
            f"--workdir={tmp_path / 'run'}",
            flag,
        )
        assert done.returncode == 2
        assert said in done.stderr
        assert not (tmp_path / "run").exists()
