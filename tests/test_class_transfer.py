"""The study of teachers of other classes: its arms, what it refuses, and a run of it."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import cli
from kdjax import data, losses, results

ROOT = Path(__file__).resolve().parent.parent
LOW, HIGH = ["zero", "one", "two", "three", "four"], ["five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="module")
def study(alone):
    with alone("experiments.class_transfer") as module:
        yield module


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The digits from 0 to 4 and those from 5 to 9, as two data sets, and a map between them."""
    home = tmp_path_factory.mktemp("digits")
    digits = data.load("digits")
    for name, names, first in (("low", LOW, 0), ("high", HIGH, 5)):
        ids = np.flatnonzero((digits.labels >= first) & (digits.labels < first + 5))
        labels = np.asarray(names)[digits.labels[ids] - first]
        np.savez(home / f"{name}.npz", images=digits.images[ids], labels=labels)
    with open(home / "map.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [
                ("teacher_class", "classes"),
                ("six", "zero"),
                ("seven", "one two"),
                ("eight", "three"),
                ("nine", "four"),
            ]
        )
    return home


def command(files, workdir, *more):
    return (
        f"--dataset={files / 'low.npz'}",
        f"--teacher_dataset={files / 'high.npz'}",
        f"--class_map={files / 'map.csv'}",
        f"--workdir={workdir}",
        *("--student=mlp", "--teacher=mlp", "--num_train=60", "--nosmoke", "--split=validation"),
        *more,
    )


QUICK = (
    *("--seeds=0,1", "--epochs=2", "--batch_size=20", "--evaluate_every=1", "--teacher_epochs=2"),
    *(
        "--teacher_padding=0",
        "--noteacher_flip",
        "--padding=1",
        "--noflip",
        "--views=2",
        "--teacher_batch_size=50",
    ),
    *("--teacher_learning_rate=0.01", "--teacher_keep=1"),
)


@pytest.mark.once
@pytest.mark.usefixtures("undrawn")
def test_every_kind_of_arm_by_two_workers(study, start, files, tmp_path):
    arms = ["scratch", "names", "least_squares", "blm", "blm_plus", "blm_logits", "probe", "vkd", "refilled"]
    arms += [
        "probe@random",
        "vkd@random",
        "finetuned",
        "kd@same_classes",
        "probe@smoothed_0.1",
        "probe@epoch_1",
    ]
    given = command(files, tmp_path / "run", f"--arms={','.join(arms)}", "--jobs=2", *QUICK)
    program = [sys.executable, "-m", "experiments.class_transfer", *given]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    found = results.read(tmp_path / "run" / "results.json")
    teachers = [f"{name}_probed_teacher" for name in ("full", "random", "smoothed_0.1", "epoch_1")]
    assert list(found["arms"]) == [*teachers[:2], "same_classes_teacher", *teachers[2:], *arms]
    pairs = {tuple(pair) for pair in found["plan"][-1]["primary"]}
    assert pairs >= {
        ("names", "scratch"),
        ("finetuned", "scratch"),
        ("vkd", "vkd@random"),
        ("probe", "probe@random"),
        ("probe@smoothed_0.1", "probe"),
        ("probe@epoch_1", "probe"),
    }
    assert ("probe@random", "scratch") not in pairs
    full = found["arms"]["full_probed_teacher"]
    assert min(full["agreement_right"] + full["agreement_wrong"]) > 0.95  # but for rounding in the cache
    for name in teachers:
        assert 0 < found["arms"][name]["class_separation"][0] < 1
        assert found["arms"][name]["own_accuracy"][0] <= 1
    for name in arms:
        values = found["arms"][name]
        share = full["accuracy"][0]
        by_parts = [
            share * right + (1 - share) * wrong
            for right, wrong in zip(values["agreement_right"], values["agreement_wrong"], strict=True)
        ]
        if name in ("probe", "vkd", "refilled"):  # whose own teacher is the probed one
            np.testing.assert_allclose(by_parts, values["agreement"], atol=0.02)
    assert found["arms"]["finetuned"]["loss"] != found["arms"]["scratch"]["loss"]
    again = start(study, *command(files, tmp_path / "run", "--arms=scratch,probe", *QUICK))
    assert list(again["arms"]) == ["full_probed_teacher", "scratch", "probe"]
    for name in ("scratch", "probe"):  # read back
        assert again["arms"][name] == found["arms"][name]


@pytest.mark.once
@pytest.mark.usefixtures("undrawn")
def test_knowledge_of_some_classes_is_measured_on_them(study, start, files, tmp_path):
    more = ("--arms=scratch,blm", "--classes=one,four", *QUICK)
    found = start(study, *command(files, tmp_path / "run", *more))
    confusion = np.asarray(found["confusion"]["blm"], float)  # of both seeds, on the same examples
    each = np.diag(confusion) / confusion.sum(1)
    names = found["class_names"]
    chosen = [names.index("one"), names.index("four")]
    values = found["arms"]["blm"]
    np.testing.assert_allclose(np.mean(values["accuracy_one"]), each[chosen[0]])
    np.testing.assert_allclose(np.mean(values["accuracy_chosen"]), each[chosen].mean())
    np.testing.assert_allclose(np.mean(values["accuracy_other"]), np.delete(each, chosen).mean())


@pytest.mark.once
@pytest.mark.usefixtures("undrawn")
def test_a_file_of_answers_stands_in_for_the_teacher(study, start, files, tmp_path):
    low = data.load(str(files / "low.npz"))
    random = np.random.default_rng(0)
    given = {
        "logits": random.normal(size=(len(low.images), 7)),
        "embedding": random.normal(size=(len(low.images), 6)),
    }
    np.savez(
        tmp_path / "answers.npz", example_ids=low.example_ids, **{k: v.astype("f4") for k, v in given.items()}
    )
    more = (f"--teacher_answers={tmp_path / 'answers.npz'}", "--arms=scratch,blm_plus,probe,vkd", *QUICK)
    found = start(study, *command(files, tmp_path / "run", *more))
    assert list(found["arms"]) == ["scratch", "blm_plus", "probe", "vkd"]
    assert all(0 <= value <= 1 for value in found["arms"]["vkd"]["agreement_wrong"])
    with pytest.raises(ValueError, match="names of the teacher's classes, and --teacher_answers has none"):
        start(study, *command(files, tmp_path / "other", *more, "--arms=scratch,names"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--arms=names"], "must name different arms, scratch among them"),
        (["--arms=scratch,scratch@random"], "scratch has no teacher"),
        (["--arms=scratch,vkdd"], "no method 'vkdd'"),
        (
            ["--arms=scratch,vkd@best"],
            "no teacher best; write full, random, same_classes, smoothed_0.1 or epoch_4",
        ),
        (["--arms=scratch,vkd@smoothed_2"], "a share between 0 and 1"),
        (["--arms=scratch,vkd@epoch_3"], "keeps the weights of the epochs 1, 2, 4, 8 alone"),
        (["--arms=scratch,kd"], "the teacher's classes are not the student's"),
        (["--arms=scratch,vkd", "--classes=one"], "compares features of all images"),
        (["--arms=scratch,blm", "--classes=six"], "has no class six"),
        (["--arms=scratch,blm", "--classes=one", "--teacher_mode=online"], "--classes needs cached answers"),
        (["--arms=scratch,blm", "--weights=blm=2"], "blm=2 must be a share from 0 to 1"),
        (["--num_train=2"], "leaves no training image of"),
        (["--class_map=missing.csv"], "must be a CSV with the columns teacher_class and classes"),
        (["--teacher_mode=centre", "--views=3"], "caches no augmented views"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    study, start, files, tmp_path, more, message
):
    with pytest.raises(ValueError, match=message):
        start(study, *command(files, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


def test_data_sets_of_two_shapes_are_refused(study, start, files, tmp_path):
    np.savez(tmp_path / "large.npz", images=np.zeros((50, 9, 9, 1), np.uint8), labels=np.arange(50) % 5)
    with pytest.raises(
        ValueError, match=r"images of shape \(8, 8, 1\), .* of \(9, 9, 1\); give both one shape"
    ):
        start(study, *command(files, tmp_path / "run", f"--teacher_dataset={tmp_path / 'large.npz'}"))


@pytest.fixture(scope="module")
def rows(study):
    with open(study.REVIEWED, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class TestNames:
    """The table between CIFAR-100 and CIFAR-10 that is kept beside the study."""

    def test_has_every_class_of_cifar100_once_in_its_superclass(self, rows):
        names = [row["teacher_class"] for row in rows]
        assert len(names) == len(set(names)) == 100
        supers = [row["superclass"] for row in rows]
        assert sorted({supers.count(name) for name in supers}) == [5]

    def test_every_class_of_cifar10_is_meant_and_every_choice_has_a_reason(self, study, rows):
        classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
        assert {name for row in rows for name in row["classes"].split()} == set(classes)
        assert all(bool(row["reason"]) == bool(row["classes"]) for row in rows)
        listed = {
            name: [r["teacher_class"] for r in rows if name in r["classes"].split()] for name in classes
        }
        names = [row["teacher_class"] for row in rows]
        matrix = losses.class_map(listed, teacher_classes=names, classes=classes)
        losses.check_class_map(matrix, num_teacher_classes=100, num_classes=10)
        assert matrix[names.index("pickup_truck")].tolist() == [0, 0.5, 0, 0, 0, 0, 0, 0, 0, 0.5]
        np.testing.assert_allclose(matrix[names.index("rose")], 0.1, rtol=1e-6)  # says nothing about any

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            ([("teacher_class", "classes"), ("six", "zero one two three")], "got none for four"),
            ([("teacher_class", "classes"), ("ten", "zero one two three four")], "got ten"),
            ([("teacher_class", "classes"), ("six", "zero one two three four twelve")], "got twelve"),
            ([("class", "classes"), ("six", "zero")], "with the columns teacher_class and classes"),
        ],
    )
    def test_another_map_is_checked(self, study, files, tmp_path, lines, message):
        with open(tmp_path / "map.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(lines)
        low, high = (data.load(str(files / f"{name}.npz")) for name in ("low", "high"))
        with pytest.raises(ValueError, match=message):
            study.read_class_map(str(tmp_path / "map.csv"), high, low)


def test_a_weight_is_of_a_method_or_the_soft_weight_of_a_map(study):
    with flagsaver.flagsaver():
        flags.FLAGS(
            ["test", "--workdir=unused", "--arms=scratch,blm,probe,hint", "--weights=blm=0.25,hint=7"]
        )
        arms = study.arms_of()
    assert (arms["blm"].method.hard_weight, arms["blm"].method.terms[0].weight) == (0.75, 0.25)
    assert (arms["probe"].method.hard_weight, arms["probe"].method.terms[0].weight) == (0.5, 0.5)
    assert (arms["hint"].method.hard_weight, arms["hint"].method.terms[0].weight) == (1.0, 7.0)


def test_settings_hold_what_decides_and_not_what_may_change(study):
    with flagsaver.flagsaver():
        flags.FLAGS(["test", "--workdir=unused"])
        settings = cli.settings("experiments.class_transfer")
    assert {
        "teacher",
        "teacher_epochs",
        "class_map",
        "classes",
        "top_k",
        "weights",
        "views",
    } <= settings.keys()
    assert not {"arms", "workdir", "jobs", "output"} & settings.keys()
