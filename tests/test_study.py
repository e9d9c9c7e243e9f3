"""A study: its result, what it measures of finished arms, and the sentences that say what its tests say."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from kdjax import data, methods, models, results, run, significance, study
from kdjax.recipe import Machine, Recipe
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
        assert result == results.read(home / "run" / "results.json") == results.read(home / "mine.json")
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
        assert names == {"results.json", "figure.png", "report.html", "mine.json", "mine.png"}


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
        measure = study.flatness.make_measure(dataset, num_images=16, num_matvecs=6)
        assert found["scratch"]["lambda_max"] == [measure(one)["lambda_max"] for one in own["scratch"]]
        surface = study.surfaces_of(dataset, own, tmp_path / "surfaces", num_images=16, points=3)["scratch"]
        assert surface == study.flatness.make_surface(dataset, num_images=16, points=3)(own["scratch"][0])

    def test_of_costs_count_parameters_and_time_every_network_once(self, arms, network, monkeypatch):
        timed = []
        monkeypatch.setattr(study, "REPEATS", 3)
        latency = study._latency
        monkeypatch.setattr(study, "_latency", lambda one: timed.append(one) or latency(one))
        found = study.costs_of(arms)
        assert set(found) == set(arms)
        assert found["scratch"]["parameters"] == network.num_parameters == 16 * 6 + 6 + 6 * 3 + 3
        assert len(found["kd"]["latency_ms"]) == 3
        assert all(value > 0 for value in found["kd"]["latency_ms"])
        assert len(timed) == 1


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
    def test_welch_beside_the_interval_of_pairs(self):
        a, b = [0.91, 0.93, 0.92], [0.90, 0.90, 0.905]
        found = significance.welch(a, b)
        said = study.welch_note("kd", "scratch", runs(kd=a, scratch=b))
        assert said.startswith(f"kd against scratch: {100 * found.difference:+.2f} points")
        assert f"p = {found.p:.2g}" in said
        paired = scipy.stats.ttest_rel(a, b).confidence_interval()
        assert f"; {100 * paired.low:+.2f} to {100 * paired.high:+.2f} seed by seed)." in said

    def test_equivalence_needs_more_than_no_difference(self):
        rng = np.random.default_rng(0)
        plain, same, far, wild = (
            rng.normal(m, s, 8) for m, s in ((0.9, 0.002), (0.9, 0.002), (0.95, 0.002), (0.9, 0.1))
        )
        said = study.tost_note(runs(scratch=plain, same=same, far=far, wild=wild), baseline="scratch")
        assert "same (p =" in said
        assert "far" not in said
        assert "wild" not in said
        assert "no arm" in study.tost_note(runs(scratch=plain, far=far), baseline="scratch")

    def test_the_main_effect_is_the_mean_over_pairs_with_an_interval_over_seeds(self):
        own = runs(a=[0.5, 0.6, 0.7], b=[0.51, 0.62, 0.73], c=[0.5, 0.5, 0.5], d=[0.52, 0.53, 0.54])
        said = study.main_effect_note("x", (("a", "b"), ("c", "d")), own)
        found = significance.t_interval([1.5, 2.5, 3.5])
        assert f"{found.estimate:+.2f} points" in said
        assert f"{found.low:+.2f} to {found.high:+.2f} over 3 seeds" in said
        with pytest.raises(KeyError):
            study.main_effect_note("x", (("a", "e"),), own)

    def test_mcnemar_counts_the_seeds_that_differ_on_the_same_images(self, dataset, network):
        def one(seed, constant=False):
            params = jax.tree.map(np.array, network.init(seed)[0])
            if constant:  # answers 0 to everything
                params["Dense_1"]["kernel"][:] = 0
                params["Dense_1"]["bias"][0] = 1
            weights = Weights(params, {})
            return run.Trained(
                "", seed, network, dataset.normalisation, Fitted(weights, weights, 1, []), {}, {}
            )

        own = {
            name: [one(0, name == "other"), one(1, name == "other")] for name in ("scratch", "same", "other")
        }
        ids = dataset.splits["train"]

        def correct(arm, seed):
            x = data.normalise(jnp.asarray(dataset.images[ids]), **dataset.normalisation._asdict())
            logits = network.apply(*own[arm][seed].weights, x, train=False)[0].logits
            return np.argmax(np.asarray(logits), -1) == dataset.labels[ids]

        wanted = sum(
            significance.mcnemar(correct("other", k), correct("scratch", k), ids_a=ids, ids_b=ids).mid_p
            < 0.05
            for k in range(2)
        )
        said = study.mcnemar_note(dataset, own, baseline="scratch", split="train")
        assert f"same 0, other {wanted}." in said


def test_pictures_are_training_images_with_their_maps(dataset):
    maps = np.full((len(dataset.images), 1, 4, 4, 1), 51, np.uint8)
    (picture,) = study.pictures(dataset, maps, count=1)
    first = dataset.splits["train"][0]
    assert picture["title"].startswith(dataset.class_names[dataset.labels[first]])
    assert picture["image"] == dataset.images[first].tolist()
    assert picture["map"] == [[0.2] * 4] * 4
    json.dumps(picture)
