"""A study: its result, what it measures of finished arms, and the sentences that say what its tests say."""

import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from kdjax import (
    data,
    evaluate,
    flatness,
    methods,
    models,
    representations,
    results,
    run,
    significance,
    study,
)
from kdjax.recipe import Machine, Recipe
from kdjax.study import measures
from kdjax.train import Fitted
from kdjax.types import Weights

SHAPE, CLASSES = (4, 4, 1), 3


class Net(nn.Module):
    """Two layers."""

    @nn.compact
    def __call__(self, x):
        hidden = nn.relu(nn.Dense(6)(x.reshape(len(x), -1)))
        return nn.Dense(CLASSES)(hidden)


@pytest.fixture(scope="module")
def dataset():
    labels = np.arange(96) % CLASSES
    images = np.random.default_rng(0).integers(0, 100, (96, *SHAPE)) + 70 * labels[:, None, None, None]
    whole = data.from_arrays(images.astype(np.uint8), labels, class_names=("a", "b", "c"))
    return data.split(whole, num_train=48)._replace(notes=("a note of the data",))


@pytest.fixture(scope="module")
def network():
    return models.from_linen(Net(), SHAPE)


@pytest.fixture(scope="module")
def trainer(network, dataset):
    machine = Machine(devices=1, steps_per_dispatch=6)
    return run.make_trainer(network, methods.labels(), dataset, Recipe(2, 8, 1e-2), machine=machine)


@pytest.fixture(scope="module")
def arms(trainer):
    """Three students, the same program under another name, and one teacher that learnt nothing."""
    found = {
        "scratch": [trainer(seed, arm="scratch") for seed in range(3)],
        "kd": [trainer(seed, arm="kd") for seed in (3, 4, 5)],
        "teacher": [trainer(6, arm="teacher")],
    }
    found["teacher"][0].metrics["accuracy"] = 0.0
    return found


def runs(**accuracies):
    """Arms of nothing but accuracies."""

    def one(accuracy, seed):
        return run.Trained("", seed, None, None, None, {"accuracy": accuracy}, {})

    return {name: [one(a, seed) for seed, a in enumerate(own)] for name, own in accuracies.items()}


class TestResult:
    @pytest.fixture(scope="class")
    @classmethod
    def concluded(cls, dataset, arms, tmp_path_factory):
        home = tmp_path_factory.mktemp("study")
        noted = arms["kd"][0].fitted._replace(notes=("resumed elsewhere",))
        finished = {**arms, "kd": [arms["kd"][0]._replace(fitted=noted), *arms["kd"][1:]]}
        about = study.Study("mine", "Does it help?", "scratch", metrics=("accuracy", "loss"), drawn=("kd",))
        costs = {name: {"parameters": 1, "latency_ms": [1.0]} for name in arms}
        result = study.conclude(
            *(about, home / "run", dataset, finished),
            settings={"epochs": 2},
            seconds=3.0,
            notes=["a note of the study"],
            output=home / "mine.json",
            costs=costs,
        )
        return home, result

    def test_holds_every_number_of_every_seed(self, concluded, arms):
        home, result = concluded
        written = results.read(home / "run" / "results.json")
        assert written == results.read(home / "mine.json")
        assert written["arms"] == result["arms"]
        for arm, finished in arms.items():
            for metric, values in result["arms"][arm].items():
                assert values == [one.metrics[metric] for one in finished]
        assert (result["seeds"], result["arm_seeds"]) == ([0, 1, 2], {"kd": [3, 4, 5], "teacher": [6]})
        assert result["flags"] == {"epochs": 2}
        assert set(result["curves"]) == {"kd"}
        curve = result["curves"]["kd"]["training_loss"]
        assert curve == [[record["loss"] for record in one.history] for one in arms["kd"]]

    def test_compares_each_arm_of_students_with_the_baseline(self, concluded, arms):
        (found,) = concluded[1]["comparisons"]
        a, b = ([one.metrics["accuracy"] for one in arms[name]] for name in ("kd", "scratch"))
        assert (found["a"], found["b"], found["metric"]) == ("kd", "scratch", "accuracy")
        assert found["difference"] == pytest.approx(np.mean(a) - np.mean(b))

    def test_adds_up_what_the_seeds_saw(self, concluded, arms):
        want = sum(np.asarray(one.sums["confusion"]) for one in arms["scratch"])
        assert concluded[1]["confusion"]["scratch"] == want.astype(int).tolist()
        assert set(concluded[1]["calibration"]) == set(arms)

    def test_collects_the_notes_and_writes_the_files(self, concluded):
        home, result = concluded
        first, weak, *others = result["notes"]
        assert first == "a note of the study"
        assert weak.startswith("The arm teacher is less accurate than scratch: 0.00% (n = 1)")
        assert others == ["a note of the data", "kd, seed 3: resumed elsewhere"]
        names = {path.name for path in home.rglob("*") if path.is_file()}
        assert names == {
            "results.json",
            "figure.png",
            "report.html",
            "plan.json",
            "mine.json",
            "mine.png",
        } | {f"{number}.json" for number in range(3)}

    def test_holds_the_answers_to_every_test_example(self, concluded, arms, dataset):
        _, result = concluded
        assert result["examples"] == {"train": 48, "test": len(dataset.splits["test"])}
        for arm, finished in arms.items():
            answers = results.correct_of(result, arm)
            assert answers.shape == (len(finished), len(dataset.splits["test"]))
            if arm != "teacher":  # whose accuracy is made up here
                np.testing.assert_allclose(
                    answers.mean(1), [one.metrics["accuracy"] for one in finished], rtol=1e-6
                )


@pytest.mark.parametrize(
    ("accuracy", "said"), [(0.8, ["The arm teacher is less accurate than scratch: 80.00%"]), (0.9, [])]
)
def test_a_teacher_worse_than_the_labels_alone_is_noted(accuracy, said):
    notes = study.weak_teachers(runs(teacher=[accuracy], scratch=[0.8, 0.9]), "scratch")
    assert [note[: len(start)] for note, start in zip(notes, said, strict=True)] == said
    assert all("(n = 1) against 85.00% (n = 2)" in note for note in notes)


class TestMeasures:
    def test_are_kept_until_weights_or_options_change(self, arms, tmp_path):
        asked = []

        def measure(one):
            asked.append((one.arm, one.seed))
            return {"norm": float(jnp.linalg.norm(one.weights.params["Dense_0"]["kernel"]))}

        def of(arms, **options):
            return study.of_every_run(arms, tmp_path, options, measure, label="norm")

        first = of(arms)
        assert set(first["scratch"]) == {"norm"}
        assert [len(first[name]["norm"]) for name in arms] == [3, 3, 1]
        assert asked == [(arm, one.seed) for arm, finished in arms.items() for one in finished]
        asked.clear()
        assert of(arms) == first
        assert asked == []
        other = {**arms, "scratch": [*arms["scratch"][:2], arms["kd"][0]]}
        with pytest.warns(UserWarning, match=r"weights .* there and .*computed again"):
            assert of(other)["scratch"]["norm"][2] == first["kd"]["norm"][0]
        assert asked == [("kd", 3)]
        with pytest.warns(UserWarning, match="options"):
            of({"teacher": arms["teacher"]}, split="validation")
        assert asked == [("kd", 3), ("teacher", 6)]

    def test_of_flatness_are_those_of_the_library_and_of_surfaces_the_first_run(
        self, dataset, arms, tmp_path
    ):
        own = {"scratch": arms["scratch"][:2]}
        found = study.flatness_of(dataset, own, tmp_path / "flatness", num_images=16, num_matvecs=6)
        measure = flatness.make_measure(dataset, num_images=16, num_matvecs=6)
        assert found["scratch"]["lambda_max"] == [measure(one)["lambda_max"] for one in own["scratch"]]
        surface = study.surfaces_of(dataset, own, tmp_path / "surfaces", num_images=16, points=3)["scratch"]
        assert surface == flatness.make_surface(dataset, num_images=16, points=3)(own["scratch"][0])

    def test_of_costs_count_parameters_and_time_every_network_once(self, arms, network, monkeypatch):
        timed = []
        monkeypatch.setattr(measures, "REPEATS", 3)
        latency = measures._latency
        monkeypatch.setattr(measures, "_latency", lambda one: timed.append(one) or latency(one))
        found = study.costs_of(arms)
        assert set(found) == set(arms)
        assert found["scratch"]["parameters"] == network.num_parameters == 16 * 6 + 6 + 6 * 3 + 3
        assert len(found["kd"]["latency_ms"]) == 3
        assert all(value > 0 for value in found["kd"]["latency_ms"])
        assert len(timed) == 1


class TestAgreement:
    def test_is_told_apart_by_whether_the_teacher_was_right(self, dataset, arms, tmp_path):
        labels = dataset.labels[dataset.splits["test"]]
        predicted = np.where(np.arange(len(labels)) % 3 == 0, (labels + 1) % CLASSES, labels)
        found = study.agreement_of(dataset, arms, tmp_path, predicted=predicted)
        for arm, finished in arms.items():
            for number, one in enumerate(finished):
                same = study.logits_of(one, dataset).argmax(-1) == predicted
                right = predicted == labels
                assert found[arm]["agreement_right"][number] == same[right].mean()
                assert found[arm]["agreement_wrong"][number] == same[~right].mean()

    def test_of_a_teacher_that_is_always_right_is_accuracy(self, dataset, arms, tmp_path):
        labels = dataset.labels[dataset.splits["test"]]
        found = study.agreement_of(dataset, {"kd": arms["kd"]}, tmp_path, predicted=labels)["kd"]
        np.testing.assert_allclose(found["agreement_right"], [one.metrics["accuracy"] for one in arms["kd"]])
        assert found["agreement_wrong"] == [1.0] * 3


class TestDenoising:
    def test_counts_true_and_wrong_labels_of_the_mislabelled_images(self, dataset, arms, tmp_path):
        train = dataset.splits["train"]
        noisy = data.with_label_noise(dataset, train, fraction=0.5, seed=0)
        found = study.denoising_of(noisy, arms, tmp_path)
        wrong = noisy.mislabelled
        assert len(wrong) == len(train) // 2
        everything = dataset._replace(splits={"test": wrong})
        for arm, finished in arms.items():
            for number, one in enumerate(finished):
                predicted = study.logits_of(one, everything).argmax(-1)
                assert found[arm]["corrected"][number] == (predicted == dataset.labels[wrong]).mean()
                assert found[arm]["memorised"][number] == (predicted == noisy.labels[wrong]).mean()

    def test_needs_a_wrong_label(self, dataset, arms, tmp_path):
        with pytest.raises(ValueError, match="no training image of arrays was given a wrong label"):
            study.denoising_of(dataset, arms, tmp_path)


def test_exaggeration_is_that_of_every_run_against_one_teacher(dataset, arms, tmp_path):
    teacher = study.logits_of(arms["scratch"][0], dataset)
    found = study.exaggeration_of(dataset, arms, tmp_path, teacher=teacher)
    assert found["scratch"]["exaggeration"][0] == pytest.approx(1)
    other = study.logits_of(arms["kd"][1], dataset)
    assert found["kd"]["exaggeration"][1] == evaluate.exaggeration(other, teacher)
    # Another teacher is another question, though it predicts the same classes.
    with pytest.warns(UserWarning, match="computed again"):
        again = study.exaggeration_of(dataset, arms, tmp_path, teacher=2 * teacher)
    assert again["scratch"]["exaggeration"][0] != found["scratch"]["exaggeration"][0]


def test_accuracy_of_chosen_classes_is_over_their_own_examples(dataset, arms):
    (one, *_), labels = arms["kd"], dataset.labels[dataset.splits["test"]]
    right = study.logits_of(one, dataset).argmax(-1) == labels
    each = [right[labels == k].mean() for k in range(CLASSES)]
    found = study.with_class_accuracy(one, dataset, ["c", "a"]).metrics
    assert (found["accuracy_a"], found["accuracy_c"]) == (each[0], each[2])
    assert found["accuracy_chosen"] == pytest.approx((each[0] + each[2]) / 2)
    assert found["accuracy_other"] == each[1]
    assert "accuracy_other" not in study.with_class_accuracy(one, dataset, ["a", "b", "c"]).metrics


def test_embeddings_are_measured_on_the_validation_images(dataset):
    network = models.from_linen(models.build("mlp", num_classes=CLASSES, widths=(5,)), SHAPE)
    weights = Weights(*network.init(0))
    one = run.measured("one", 0, network, weights, dataset, split="validation")
    ids = dataset.splits["validation"]
    inputs = data.normalise(jnp.asarray(dataset.images[ids]), **dataset.normalisation._asdict())
    vectors = np.asarray(network.apply(*weights, inputs, train=False)[0].features["embedding"])
    has = np.any(vectors != 0, axis=1)
    assert not has.all()  # a zero embedding has no direction, and does not end a study
    found = study.embeddings_of(one, dataset, crops=4)
    expected = representations.class_separation(vectors[has], dataset.labels[ids][has])
    assert found["class_separation"] == pytest.approx(expected, rel=1e-4)
    assert found["mutual_information"] <= np.log(len(ids))
    dead = one._replace(fitted=one.fitted._replace(last=jax.tree.map(jnp.zeros_like, one.weights)))
    assert study.embeddings_of(dead, dataset, crops=2).keys() == {"mutual_information"}


def test_costs_are_in_gradients_up_to_each_target():
    history = [
        {"validation_loss": 0.9, "events": 0.0, "hvps": 0.0, "evaluations": 0.0},
        {"validation_loss": 0.6, "events": 0.5, "hvps": 4.0, "evaluations": 1.5},
        {"validation_loss": 0.7, "events": 0.0, "hvps": 0.0, "evaluations": 3.0},
    ]
    weights = Weights({}, {})
    one = run.Trained("a", 0, None, None, Fitted(weights, weights, 2, history), {"accuracy": 0.5}, {})
    found = study.with_costs(one, targets=(0.65, 0.1), steps_per_epoch=4).metrics
    epochs = [4.0, 4 * (1 + 1.5 * 4 + 1.5 / 3), 4 * (1 + 3 / 3)]  # of a step: one gradient and what was spent
    assert found["accuracy"] == 0.5
    assert (found["events"], found["hvps"], found["evaluations"]) == (2, 16, 18)
    assert found["gradient_equivalents"] == pytest.approx(sum(epochs))
    assert (found["reached_0.65"], found["steps_to_0.65"]) == (1.0, 8.0)
    assert found["paid_to_0.65"] == pytest.approx(sum(epochs[:2]))
    assert (found["reached_0.1"], found["steps_to_0.1"]) == (0.0, 12.0)
    assert found["paid_to_0.1"] == pytest.approx(sum(epochs))
    assert one.metrics == {"accuracy": 0.5}


class TestNotes:
    def test_other_comparisons_are_by_seed_and_corrected_for_their_number(self):
        a, b, c = [0.91, 0.93, 0.92], [0.90, 0.90, 0.905], [0.89, 0.88, 0.9]
        said = study.comparison_notes(
            runs(kd=a, scratch=b, other=c, short=[0.9]),
            pairs=[("kd", "scratch"), ("kd", "other"), ("kd", "short")],
        )
        p = [scipy.stats.ttest_rel(a, x).pvalue for x in (b, c)]
        adjusted = significance.holm({"b": p[0], "c": p[1]})
        low, high = scipy.stats.ttest_rel(a, b).confidence_interval()
        assert said[0] == (
            f"kd against scratch: {100 * np.mean(np.subtract(a, b)):+.2f} points of accuracy (95 % interval "
            f"{100 * low:+.2f} to {100 * high:+.2f}, p = {adjusted['b']:.2g} after Holm's correction for 2, paired t)."
        )
        assert len(said) == 2

    def test_equality_needs_more_than_no_difference(self):
        rng = np.random.default_rng(0)
        plain, far, wild = (rng.normal(m, s, 8) for m, s in ((0.9, 0.002), (0.95, 0.002), (0.9, 0.1)))
        own = runs(scratch=plain, same=plain + rng.normal(0, 0.001, 8), far=far, wild=wild, equal=plain)
        pairs = [(arm, "scratch") for arm in ("same", "far", "wild", "equal")]
        said = study.equivalence_note(own, pairs=pairs, margin=0.01)
        assert "within 1 points of accuracy" in said
        assert "Holm's correction for 3" in said
        assert "same and scratch are equal (difference" in said
        assert "far and scratch are not shown to be" in said
        assert "wild and scratch are not shown to be" in said
        assert said.endswith("Not tested, for want of seeds or spread: equal and scratch.")
        power = [float(value) for value in re.findall(r"power ([\d.]+)\)", said)]
        assert power[0] > 0.9 > 0.1 > power[2]

    def test_the_main_effect_is_the_mean_over_pairs_with_an_interval_over_seeds(self):
        own = runs(a=[0.5, 0.6, 0.7], b=[0.51, 0.62, 0.73], c=[0.5, 0.5, 0.5], d=[0.52, 0.53, 0.54])
        said = study.main_effect_note("x", (("a", "b"), ("c", "d")), own)
        found = significance.t_interval([1.5, 2.5, 3.5])
        assert f"{found.estimate:+.2f} points" in said
        assert f"{found.low:+.2f} to {found.high:+.2f} over 3 seeds" in said
        with pytest.raises(KeyError):
            study.main_effect_note("x", (("a", "e"),), own)

    def test_mcnemar_counts_the_seeds_that_differ_on_the_same_images(self):
        rng = np.random.default_rng(1)
        plain = rng.random((3, 60)) < 0.7
        other = plain.copy()
        other[1, :30] ^= True  # one seed that differs in many, mostly to the worse
        other[1, :30] &= rng.random(30) < 0.1
        own = runs(scratch=[0.7] * 3, other=[0.7] * 3)
        packed = {"scratch": [*map(results.pack, plain)], "other": [*map(results.pack, other)]}
        ids = np.arange(60)
        wanted = sum(
            significance.mcnemar(a, b, ids_a=ids, ids_b=ids).mid_p < 0.05
            for a, b in zip(other, plain, strict=True)
        )
        assert wanted == 1
        pairs = [("other", "scratch"), ("scratch", "scratch")]
        said = study.mcnemar_note(packed, own, pairs=pairs, examples=60)
        assert said.endswith("other and scratch 1 of 3, scratch and scratch 0 of 3.")


class TestPlan:
    def test_is_written_before_the_runs_and_every_change_stays(self, tmp_path):
        about = study.Study("mine", "Does it help?", "scratch", chosen_on="the rate: validation")
        first = study.declare(tmp_path, about, ["scratch", "kd", "teacher"])
        assert study.declare(tmp_path, about, ["scratch", "kd", "teacher"]) == first
        (entry,) = first
        assert entry["primary"] == [["kd", "scratch"]]
        assert (entry["chosen_on"], entry["metric"], entry["margin"]) == (
            "the rate: validation",
            "accuracy",
            None,
        )
        more = study.declare(tmp_path, about, ["scratch", "kd", "hint"])
        assert more[:1] == first
        assert more[1]["primary"] == [["kd", "scratch"], ["hint", "scratch"]]

    def test_only_primary_pairs_among_the_arms_are_compared(self):
        about = study.Study("mine", "?", "scratch", primary=[("kd", "hint"), ("kd", "scratch")])
        assert about.pairs(["scratch", "kd"]) == [("kd", "scratch")]


def test_pictures_are_training_images_with_their_maps(dataset):
    maps = np.full((len(dataset.images), 1, 4, 4, 1), 51, np.uint8)
    (picture,) = study.pictures(dataset, maps, count=1)
    first = dataset.splits["train"][0]
    assert picture["title"].startswith(dataset.class_names[dataset.labels[first]])
    assert picture["image"] == dataset.images[first].tolist()
    assert picture["map"] == [[0.2] * 4] * 4
    json.dumps(picture)
