"""The small studies, in this process: what they leave, and what their own functions decide."""

import json

import numpy as np
import pytest

from experiments import cli
from kdjax import checkpoints, data, methods, results, run, train
from kdjax.recipe import Machine, Recipe


@pytest.fixture(scope="module")
def hinton_mnist(alone):
    with alone("experiments.hinton_mnist") as study:
        yield study


@pytest.fixture(scope="module")
def mixing_weight(alone):
    with alone("experiments.mixing_weight") as study:
        yield study


class TestHinton:
    @pytest.mark.usefixtures("undrawn")
    def test_holds_the_digit_out_and_corrects_its_bias(
        self, hinton_mnist, start, tmp_path, monkeypatch, capsys
    ):
        network = cli.network
        monkeypatch.setattr(cli, "network", lambda spec, dataset: network(spec, dataset, widths=(24, 20)))
        digits = data.load("digits")
        words = np.array(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
        np.savez(tmp_path / "words.npz", images=digits.images, labels=words[digits.labels])
        command = ("--smoke", f"--dataset={tmp_path / 'words.npz'}", f"--workdir={tmp_path / 'run'}")
        with pytest.raises(ValueError, match="--held_out_class=3 is none of the classes eight, five"):
            start(hinton_mnist, *command, "--held_out_class=3")
        start(hinton_mnist, *command, "--held_out_class=three", "--seeds=4,5")
        found = results.read(tmp_path / "run" / "results.json")
        assert found["class_names"] == sorted(words)
        assert list(found["arms"]) == [
            "teacher",
            "scratch",
            "kd",
            "scratch, no three",
            "kd, no three",
            "scratch, no three, bias corrected",
            "kd, no three, bias corrected",
        ]
        assert found["seeds"] == [4]
        threes = sum(found["confusion"]["teacher"][sorted(words).index("three")])
        assert found["arms"]["scratch, no three"]["errors_on_omitted"] == [
            threes
        ]  # labels alone cannot teach it
        for arm, (shift,) in ((a, m["bias_shift"]) for a, m in found["arms"].items() if "bias_shift" in m):
            matrix = np.array(found["confusion"][arm])
            assert found["arms"][arm]["errors"] == [matrix.sum() - np.trace(matrix)]
            assert np.isfinite(shift)
        assert (tmp_path / "run" / "scratch_no_three" / "4" / "network.json").exists()
        assert "errors" in capsys.readouterr().out


class TestMixingWeight:
    SMALL = ("--smoke", "--hard_weights=0,0.5,1", "--label_noise=0.1", "--seeds=0,1,2")

    def test_leaves_everything_and_takes_up_its_teacher(self, mixing_weight, start, tmp_path, capsys):
        output = tmp_path / "kept.json"
        start(mixing_weight, *self.SMALL, f"--workdir={tmp_path / 'run'}", f"--output={output}")
        found, printed = results.read(output), capsys.readouterr().out
        assert set(found["arms"]) == {"teacher", "chosen", "a = 0", "a = 0.5", "a = 1"}
        (plan,) = found["plan"]
        assert (plan["baseline"], plan["primary"]) == ("a = 1", [["chosen", "a = 1"]])
        assert [(one["a"], one["b"]) for one in found["comparisons"]] == [("chosen", "a = 1")]
        assert found["seeds"] == [0, 1, 2]
        (swept,) = found["swept"]
        assert (swept["name"], swept["values"]) == ("hard_weight", [0, 0.5, 1])
        accuracy = swept["arms"]["student"]["accuracy"]
        assert accuracy == [found["arms"][f"a = {a}"]["accuracy"] for a in ("0", "0.5", "1")]
        assert "validation split chooses a = " in found["notes"][0]
        assert found["notes"][0] in printed
        assert len(json.loads((tmp_path / "run" / "mislabelled.json").read_text())) == 14
        assert "Training labels made wrong: 14 of 100." in found["notes"]
        assert found["flags"]["teacher_label_noise"] == "same"
        for name in ("report.html", "figure.png", "students/0/network.json", "teacher/0/network.json"):
            assert (tmp_path / "run" / name).stat().st_size > 0
        assert len([*(tmp_path / "run" / "students").glob("*/network.json")]) == 9

        taken_up = f"--teacher_dir={tmp_path / 'run' / 'teacher' / '0'}"
        following = (*self.SMALL, f"--workdir={tmp_path / 'next'}", f"--output={output}", taken_up)
        with pytest.raises(ValueError, match=r"kept\.json holds the result of another run, and results stay"):
            start(mixing_weight, *following)
        start(mixing_weight, *following, "--supersedes=Its teacher was taken up.")
        again = results.read(output)
        (history,) = again["supersedes"]
        assert history["why"] == "Its teacher was taken up."
        assert results.read(tmp_path / history["result"])["arms"] == found["arms"]
        for arm in found["arms"].keys() - {"teacher"}:
            assert again["arms"][arm]["accuracy"] == found["arms"][arm]["accuracy"]
        assert (again["flags"]["teacher"], again["flags"]["teacher_epochs"]) == ("digits_teacher", None)
        assert again["flags"]["teacher_label_noise"] is None
        with pytest.raises(ValueError, match=r"holds another run \(.*label_noise 0.1 there and 0.2 here"):
            start(mixing_weight, "--smoke", taken_up, "--label_noise=0.2", f"--workdir={tmp_path / 'next'}")

    @pytest.mark.once
    @pytest.mark.usefixtures("undrawn")
    def test_conditions_are_trained_and_compared_each_by_itself(self, mixing_weight, start, tmp_path):
        conditions = ("", "label_noise=0.3", "label_noise=0.3,teacher_untrained=true", "temperature=1")
        flags = [f"--condition={one}" for one in conditions]
        weights = "--hard_weights=-0.5,0.1,1,1.5"
        start(mixing_weight, "--smoke", weights, "--seeds=0,1,2", *flags, f"--workdir={tmp_path / 'run'}")
        found = results.read(tmp_path / "run" / "results.json")
        prefixes = ["", *(f"{one}, " for one in conditions[1:])]
        arms = ("teacher", "chosen", "a = 0.1", "a = 1")
        assert set(found["arms"]) == {prefix + arm for prefix in prefixes for arm in arms}
        pairs = [[p + "chosen", p + other] for p in prefixes for other in ("a = 1", "a = 0.1")]
        assert found["plan"][0]["primary"] == pairs
        of_noise, of_temperature = (sweep["arms"] for sweep in found["swept"])
        assert list(of_noise) == ["as given", *conditions[1:3]]
        assert list(of_temperature) == ["as given", conditions[3]]
        assert of_noise["as given"] == of_temperature["as given"]
        noisy = of_noise["label_noise=0.3"]
        assert noisy["corrected"][1] == found["arms"]["label_noise=0.3, a = 0.1"]["corrected"]
        assert "corrected" not in found["arms"]["a = 0.1"]
        # Labels alone do not ask the teacher, and the temperature is its own.
        accuracies = {p: found["arms"][p + "a = 1"]["accuracy"] for p in prefixes}
        assert accuracies[prefixes[1]] == accuracies[prefixes[2]] != accuracies[""] == accuracies[prefixes[3]]
        assert found["arms"]["temperature=1, a = 0.1"]["loss"] != found["arms"]["a = 0.1"]["loss"]
        untrained = found["arms"][prefixes[2] + "teacher"]["accuracy"]
        assert untrained[0] < 0.3 < found["arms"]["teacher"]["accuracy"][0]
        # Teachers of equal settings are trained once.
        assert len([*(tmp_path / "run" / "shared").glob("*/0/network.json")]) == 2
        assert any("Weights outside 0 to 1 (-0.5, 1.5)" in note for note in found["notes"])

    @pytest.mark.usefixtures("undrawn")
    def test_lengths_of_one_training_are_trainings_of_these_lengths(self, mixing_weight, start, tmp_path):
        flags = (
            "--num_train=60",
            "--hard_weights=0.5,1",
            "--seeds=3",
            "--schedule=constant",
            "--teacher_epochs=1",
        )
        found = {}
        for epochs, more in ((4, ("--lengths=2", "--evaluate_every=2")), (2, ())):
            home = tmp_path / str(epochs)
            start(mixing_weight, *flags, f"--epochs={epochs}", *more, f"--workdir={home}")
            (found[epochs],) = results.read(home / "results.json")["swept"]
        early, alone = found[4]["arms"]["student, 2 epochs"], found[2]["arms"]["student"]
        assert list(found[4]["arms"]) == ["student", "student, 2 epochs"]
        for metric in ("accuracy", "validation_accuracy"):
            assert early[metric] == alone[metric]
        np.testing.assert_allclose(early["loss"], alone["loss"], rtol=1e-6)
        for lengths, said in (
            ("4", "below --epochs=4"),
            ("3", "multiples of --evaluate_every=2"),
            ("2,2", "rise"),
        ):
            more = (f"--lengths={lengths}", "--evaluate_every=2", "--epochs=4")
            with pytest.raises(ValueError, match=said):
                start(mixing_weight, *flags, *more, f"--workdir={tmp_path / 'bad'}")

    @pytest.mark.parametrize("who", ["same", "clean"])
    def test_the_teacher_sees_the_wrong_labels_of_the_students_or_none(
        self, mixing_weight, start, tmp_path, monkeypatch, who
    ):
        split, loaded = data.split, []

        def stop(network, method, dataset, *_, **__):
            loaded.append(dataset)
            raise InterruptedError

        monkeypatch.setattr(data, "split", lambda *a, **k: loaded.append(split(*a, **k)) or loaded[-1])
        monkeypatch.setattr(run, "make_trainer", stop)
        noise = ("--label_noise=0.05", f"--teacher_label_noise={who}")
        with pytest.raises(InterruptedError):
            start(mixing_weight, *noise, f"--workdir={tmp_path / 'run'}")
        students, teacher = loaded[0], loaded[-1]  # the teacher's is what it is trained on
        seen = dict(zip(teacher.example_ids, teacher.labels, strict=True))
        differ = [i for i, name in enumerate(students.example_ids) if seen[name] != students.labels[i]]
        wrong = students.mislabelled.tolist()
        assert (len(wrong), len(teacher.mislabelled)) == (5, 63 if who == "same" else 0)
        assert differ == ([] if who == "same" else wrong)
        if who == "same":
            shared = set(students.example_ids) & set(teacher.example_ids[teacher.mislabelled])
            assert shared == set(students.example_ids[wrong])

    def test_the_weight_is_chosen_on_validation_and_ties_go_to_the_smaller_loss(self, mixing_weight):
        def trained(test, validation, loss):
            record = {"epoch": 1.0, "loss": 1.0, "validation_accuracy": validation, "validation_loss": loss}
            return student(test=test, **record)

        best, said = mixing_weight.choose(
            {0.0: [trained(0.9, 0.7, 1.0)], 0.5: [trained(0.6, 0.8, 0.4)], 1.0: [trained(0.8, 0.8, 0.5)]}
        )
        assert best == 0.5
        assert "a = 0.5 (accuracy 80.00% there)" in said
        assert "60.00% on average, that of a = 1 80.00%" in said

    def test_a_diverged_student_is_left_out_and_said(self, mixing_weight):
        def trained(loss, seed):
            return student(seed=seed, epoch=1.0, loss=loss)

        nan, inf = float("nan"), float("inf")
        runs = {0.0: [trained(1.0, 5), trained(nan, 6)], 1.0: [trained(inf, 5), trained(inf, 6)]}
        kept, notes = mixing_weight.finite(runs)
        assert {a: [run.seed for run in own] for a, own in kept.items()} == {0.0: [5]}
        assert [note.split(" diverged")[0] for note in notes] == [
            "a = 0, seed 6",
            "a = 1, seed 5",
            "a = 1, seed 6",
        ]

    @pytest.mark.parametrize(
        ("argument", "said"),
        [
            ("--hard_weights=1,0.1", "must rise, with 1 among them"),
            ("--hard_weights=0,0.5", "must rise, with 1 among them"),
            ("--hard_weights=0,half", "must be numbers"),
            ("--hard_weights=0,0,1", "must rise, with 1 among them"),
            ("--label_noise=1", "leaves no right label to learn from"),
            ("--lengths=50", "a cosine schedule of 150 epochs is another than one of 50"),
            ("--condition=label_noise", "'label_noise' of 'label_noise' must be NAME=VALUE with a flag"),
            ("--condition=num_train=50", "must be NAME=VALUE with a flag that can be varied: batch_size"),
            ("--condition=label_noise=2", "'label_noise=2': flag --label_noise=2: 2.0 is not a number in"),
            ("--condition=label_noise=1", "leaves no right label to learn from"),
            ("--condition=teacher_untrained=true,teacher_epochs=2", "--teacher_untrained trains no teacher"),
            ("--seeds=0,1.5", "must be whole numbers"),
            ("--seeds=-1,0", "from 0 to"),
            ("--batch_size=21", "21 does not divide over 2 devices"),
            ("--teacher_batch_size=21", "21 does not divide over 2 devices"),
            ("--teacher_dir=nowhere", "nowhere holds no finished network"),
            (
                "--teacher_label_noise=clean",
                "=clean would change nothing: --label_noise=0 makes no label wrong",
            ),
        ],
    )
    def test_bad_input_is_refused_before_any_work(
        self, mixing_weight, start, tmp_path, monkeypatch, argument, said
    ):
        def work(*_, **__):
            raise AssertionError("training began")

        monkeypatch.setattr(train, "fit", work)
        with pytest.raises(ValueError, match=said):
            start(mixing_weight, f"--workdir={tmp_path / 'run'}", argument)
        assert not (tmp_path / "run").exists()

    def test_flags_that_decide_nothing_beside_a_trained_teacher_are_refused(
        self, mixing_weight, start, tmp_path
    ):
        said = "--teacher=resnet8 and --teacher_epochs=50 would change nothing: --teacher_dir takes up"
        with pytest.raises(ValueError, match=said):
            start(
                mixing_weight,
                *("--teacher_dir=nowhere", "--teacher=resnet8", "--teacher_epochs=50"),
                f"--workdir={tmp_path / 'run'}",
            )


class TestRegressionWeight:
    def test_finds_the_closed_form_and_what_other_weights_cost(self, alone, start, tmp_path):
        with alone("experiments.regression_weight") as study:
            output = tmp_path / "kept.json"
            start(study, "--smoke", f"--output={output}")
            with pytest.raises(ValueError, match="is there already; say with --supersedes why"):
                start(study, "--smoke", f"--output={output}")
        found = results.read(output)["arms"]
        assert len(found) == 16
        rows = [row for name, row in found.items() if name.startswith("least squares, n = 1000")]
        (row,) = rows
        # 979 and 179 degrees of freedom are left: the teacher is so many times worse than the labels.
        assert row["closed_form_weight"] == pytest.approx([979 / (979 + 179)] * 3, rel=1e-5)
        np.testing.assert_allclose(row["best_weight"], row["closed_form_weight"], atol=0.25)
        for own in found.values():
            assert min(own["excess_labels"] + own["excess_usual"]) >= -1e-9


MINE = """
import flax.linen as nn


class Mine(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.classes)(x.reshape(len(x), -1))


def build(num_classes):
    return Mine(num_classes)
"""


def test_a_teacher_of_a_users_own_network_is_taken_up(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    spec, digits = f"{tmp_path / 'mine.py'}:build", data.split(data.load("digits"), num_train=32)
    recipe, home = Recipe(epochs=1, batch_size=16), tmp_path / "run"
    trained = run.train(cli.network(spec, digits), methods.labels(), digits, recipe, directory=home)
    options = {"launch": cli.Launch(workdir="unused"), "settings": {"a": 1}, "machine": Machine()}
    teacher = cli.Teacher(teacher=spec, teacher_dir=str(home))
    found = cli.teachers(teacher, cli.Data(), digits, **options)
    assert (found.to_train, found.settings["teacher"]) == ({}, "Mine")
    assert found.made_from["teacher_weights"] == checkpoints.digest_tree(trained.weights)
    assert found.train(tmp_path)[0].metrics.items() <= trained.metrics.items()
    with pytest.raises(ValueError, match=r"not one of kdjax\.models"):
        cli.teachers(cli.Teacher(teacher_dir=str(home)), cli.Data(), digits, **options)


def student(test=0.0, seed=0, **record):
    """A finished run of one epoch."""
    fitted = train.Fitted(None, None, 1, [record])
    return run.Trained("student", seed, None, None, fitted, {"accuracy": test, "loss": 1.0}, {})


@pytest.mark.usefixtures("undrawn")
def test_the_example_study_compares_its_three_arms(alone, start, tmp_path):
    with alone("experiments.label_smoothing") as study:
        command = ("--smoke", "--num_train=64", "--evaluate_every=2", f"--workdir={tmp_path / 'run'}")
        found = start(study, *command)
    assert list(found["arms"]) == ["teacher", "scratch", "label_smoothing", "kd"]
    assert found["seeds"] == [0, 1, 2]
    pairs = [("kd", "label_smoothing"), ("kd", "scratch"), ("label_smoothing", "scratch")]
    assert [(one["a"], one["b"]) for one in found["comparisons"]] == pairs
