"""The study of integrated gradients: its table of arms, and a run of it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import cli
from kdjax import data, models, results

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def study(alone):
    with alone("experiments.ig_cifar10") as module:
        flags.FLAGS(["test", "--workdir=unused"])
        yield module


def parts(arm):
    """What a method consists of, and how its answers are perturbed."""
    method, perturbed = arm
    return {term.name for term in method.terms} | method.settings.keys(), perturbed


def test_each_factor_has_the_four_pairs_that_differ_in_it_alone(study):
    names = {"kd": "soft", "ig": "ig_overlay", "at": "attention_matching"}
    for factor, pairs in study.FACTORS.items():
        assert len({name for pair in pairs for name in pair}) == 8
        for without, with_it in pairs:
            (before, _), (after, perturbed) = (
                parts(study.ARMS[arm](("stage1",))) for arm in (without, with_it)
            )
            assert after - before == {names[factor]}
            assert perturbed == {}


def test_a_control_differs_from_its_arm_in_what_is_perturbed(study):
    for arm, make in study.ARMS.items():
        name, _, how = arm.partition("/")
        method, perturbed = make(("stage1", "stage2"))
        assert method.description == study.ARMS[name](("stage1", "stage2"))[0].description
        assert set(perturbed.values()) == ({how} if how else set())
        assert perturbed.keys() <= {"logits", *method.teacher_features}


def test_the_weights_of_labels_and_teacher_sum_to_one(study):
    with flagsaver.flagsaver(soft_weight=0.25):
        method, _ = study.ARMS["kd"](())
    assert (method.hard_weight, method.terms[0].weight) == (0.75, 0.25)


def test_more_students_are_of_three_arms(study):
    images = np.zeros((60, 8, 8, 1), np.uint8)
    dataset = data.split(data.from_arrays(images, np.arange(60) % 3))
    teacher = models.from_linen(models.build("resnet8", num_classes=3), (8, 8, 1))
    with flagsaver.flagsaver(arms=["kd", "scratch"], more_students=["mlp"]):
        found = study.students_of(dataset, teacher.output_shapes)
    assert list(found) == ["scratch", "kd", "scratch (mlp)", "kd (mlp)", "kd+ig (mlp)"]
    assert len({network for network, _ in found.values()}) == 2
    with flagsaver.flagsaver(arms=["at"], student="mlp"), pytest.raises(ValueError, match="no stage"):
        study.students_of(dataset, teacher.output_shapes)


def test_a_run_knows_how_its_teacher_is_trained(study):
    settings = cli.settings("experiments.ig_cifar10")
    assert {
        "teacher",
        "teacher_dir",
        "teacher_epochs",
        "teacher_num_train",
        "ig_tolerance",
    } <= settings.keys()
    assert not {"arms", "more_students", "workdir", "jobs"} & settings.keys()  # these may change


@pytest.mark.once
def test_from_the_command_line_by_two_workers(tmp_path):
    command = [
        sys.executable,
        "-m",
        "experiments.ig_cifar10",
        f"--workdir={tmp_path / 'run'}",
        "--smoke",
        "--jobs=2",
    ]
    command += [
        "--dataset=digits",
        "--teacher=digits_teacher",
        "--student=digits_student",
        "--split=validation",
    ]
    command += ["--arms=scratch,kd+match,at/misaligned", "--more_students=mlp", "--teacher_seeds=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    found = results.read(tmp_path / "run" / "results.json")
    students = ["scratch", "at/misaligned", "kd+match", "scratch (mlp)", "kd (mlp)", "kd+ig (mlp)"]
    assert list(found["arms"]) == ["teacher", *students]
    assert found["arm_seeds"]["teacher"] == [0, 1]
    assert found["seeds"] == [0, 2, 1]  # students took turns among the teachers
    for arm in students:
        assert all(-1 <= value <= 1 for value in found["arms"][arm]["map_correlation"])
        assert len(set(found["arms"][arm]["loss"])) == 3
    assert [c["a"] for c in found["comparisons"]] == ["at/misaligned", "kd+match"]
    assert "costs" not in found
