"""The contract of a run: what a directory means, what is refused, what callbacks see, and many runs at once."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest

from kdjax import data, methods, models, run
from kdjax import teacher as teachers
from kdjax.callbacks import Callback
from kdjax.recipe import Machine, Recipe

CLASSES, SHAPE = 3, (4, 4, 1)
RECIPE = Recipe(epochs=3, batch_size=8, learning_rate=0.01)
MACHINE = Machine(steps_per_dispatch=2, save_every_s=0.0)


class Net(nn.Module):
    """A network of the user's, with dropout and statistics."""

    width: int = 6

    @nn.compact
    def __call__(self, x, *, train):
        hidden = nn.BatchNorm(use_running_average=not train)(nn.Dense(self.width)(x.reshape(len(x), -1)))
        hidden = nn.Dropout(0.2, deterministic=not train)(nn.relu(hidden))
        return nn.Dense(CLASSES)(hidden), {"hidden": hidden}


def nnx_net():
    from flax import nnx

    class NnxNet(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.Linear(16, 6, rngs=rngs)
            self.norm = nnx.BatchNorm(6, rngs=rngs)
            self.dropout = nnx.Dropout(0.2, rngs=rngs)
            self.outer = nnx.Linear(6, CLASSES, rngs=rngs)

        def __call__(self, x):
            hidden = nnx.relu(self.norm(self.inner(x.reshape(len(x), -1))))
            return self.outer(self.dropout(hidden)), {"hidden": hidden}

    return models.from_nnx(NnxNet, SHAPE)


def equinox_net():
    eqx = pytest.importorskip("equinox")

    class EquinoxNet(eqx.Module):
        inner: eqx.nn.Linear
        outer: eqx.nn.Linear
        dropout: eqx.nn.Dropout

        def __init__(self, key):
            first, second = jax.random.split(key)
            self.inner, self.outer = eqx.nn.Linear(16, 6, key=first), eqx.nn.Linear(6, CLASSES, key=second)
            self.dropout = eqx.nn.Dropout(0.2)

        def __call__(self, x, *, key=None):
            hidden = jax.nn.relu(self.inner(x.reshape(-1)))
            return self.outer(self.dropout(hidden, key=key)), {"hidden": hidden}

    return models.from_equinox(EquinoxNet, SHAPE)


NETWORKS = {"linen": lambda: models.from_linen(Net(), SHAPE), "nnx": nnx_net, "equinox": equinox_net}


class Events(Callback):
    """Keeps what a run called; raises after a number of dispatches."""

    def __init__(self, stop_after=None):
        self.seen, self.stop_after = [], stop_after

    @property
    def names(self):
        return [name for name, *_ in self.seen]

    def on_start(self, run, steps):
        self.seen.append(("start", run, steps))

    def on_dispatch(self, run, state, step):
        self.seen.append(("dispatch", run, step))
        return state

    def on_progress(self, run, steps, record):
        self.seen.append(("progress", run, steps))
        if self.names.count("progress") == self.stop_after:
            raise KeyboardInterrupt

    def on_epoch(self, run, record):
        self.seen.append(("epoch", run, record))

    def on_end(self, run, record):
        self.seen.append(("end", run, record))


def make_dataset(seed=0, **options):
    rng = np.random.default_rng(seed)
    labels = np.arange(64) % CLASSES
    images = rng.integers(0, 100, (64, *SHAPE)) + 70 * labels[:, None, None, None]
    return data.split(data.from_arrays(images.astype(np.uint8), labels), **options)


@pytest.fixture(scope="module")
def dataset():
    return make_dataset()


@pytest.fixture(scope="module")
def network():
    return NETWORKS["linen"]()


@pytest.fixture(scope="module")
def trainer(network, dataset):
    """Learns from the labels; compiled once for this module."""
    return run.make_trainer(network, methods.labels(), dataset, RECIPE, machine=MACHINE)


@pytest.fixture(scope="module")
def teacher(trainer, tmp_path_factory):
    """A finished run, in ``teacher.home``."""
    home = tmp_path_factory.mktemp("teacher")
    return home, trainer(7, home, arm="teacher")


@pytest.fixture(scope="module")
def signal(teacher, dataset, tmp_path_factory):
    home = tmp_path_factory.mktemp("answers")
    return teachers.answers(teacher[1], dataset, features=("hidden",), directory=home)


def assert_same(a, b):
    jax.tree.map(
        np.testing.assert_array_equal, (a.fitted.last, a.fitted.best), (b.fitted.last, b.fitted.best)
    )
    assert (a.history, a.metrics, a.fitted.best_epoch) == (b.history, b.metrics, b.fitted.best_epoch)


class TestDirectory:
    def test_nothing_is_written_without_one_and_the_numbers_are_the_same(
        self, trainer, teacher, tmp_path, monkeypatch
    ):
        monkeypatch.chdir(tmp_path)
        assert_same(trainer(7, arm="teacher"), teacher[1])
        assert [*tmp_path.iterdir()] == []

    def test_holds_what_is_documented(self, teacher, network):
        home, trained = teacher
        names = {"checkpoints", "weights", "network.json", "summary_test.json"}
        assert names <= {path.name for path in home.iterdir()}
        there = run.describe(home)
        assert (there["arm"], there["seed"], there["split"]) == ("teacher", 7, "test")
        assert there["metrics"] == trained.metrics
        assert there["network"] == json.loads(json.dumps(dict(network.description)))

    def test_a_finished_run_is_read_back(self, trainer, teacher):
        events = Events()
        assert_same(trainer(7, teacher[0], arm="teacher", callbacks=[events]), teacher[1])
        assert events.names == ["start", "epoch", "end"]

    def test_a_lost_summary_and_lost_weights_are_made_again(self, trainer, tmp_path):
        first = trainer(1, tmp_path)
        (tmp_path / "summary_test.json").unlink()
        (tmp_path / "network.json").unlink()
        assert_same(trainer(1, tmp_path), first)
        assert run.describe(tmp_path)["metrics"] == first.metrics

    @pytest.mark.parametrize("stop_after", [1, 4, 9])
    def test_a_stopped_run_ends_bitwise_equal(self, trainer, teacher, tmp_path, stop_after):
        with pytest.raises(KeyboardInterrupt):
            trainer(7, tmp_path, arm="teacher", callbacks=[Events(stop_after)])
        events = Events()
        assert_same(trainer(7, tmp_path, arm="teacher", callbacks=[events]), teacher[1])
        assert 0 < events.names.count("progress") < 9 + (stop_after == 1)

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"arm": "kd"}, "arm 'teacher' there and 'kd' here"),
            ({"seed": 8}, "seed 7 there and 8 here"),
            ({"settings": {"temperature": 3}}, "settings.temperature missing there and 3 here"),
        ],
    )
    def test_another_run_is_refused(self, trainer, teacher, options, said):
        with pytest.raises(ValueError, match=said):
            trainer(**({"seed": 7, "directory": teacher[0], "arm": "teacher"} | options))

    @pytest.mark.parametrize("what", ["method", "data", "recipe", "network", "teacher"])
    def test_what_decides_the_numbers_is_part_of_the_run(self, network, dataset, signal, teacher, what):
        other = models.from_linen(Net(width=5), SHAPE) if what == "network" else network
        method = methods.labels(0.5) if what == "method" else methods.labels()
        seen = make_dataset(label_noise=0.2) if what == "data" else dataset
        recipe = Recipe(epochs=3, batch_size=8, learning_rate=0.02) if what == "recipe" else RECIPE
        answers = signal if what == "teacher" else None
        another = run.make_trainer(other, method, seen, recipe, teacher=answers, machine=MACHINE)
        with pytest.raises(ValueError, match=what.replace("method", "hard_weight|method")):
            another(7, teacher[0], arm="teacher")

    def test_the_test_split_is_not_read_for_validation(self, network, dataset, tmp_path):
        unread = dataset._replace(splits={n: ids for n, ids in dataset.splits.items() if n != "test"})
        trainer = run.make_trainer(network, methods.labels(), unread, RECIPE, split="validation")
        trained = trainer(0, tmp_path)
        assert trained.metrics["accuracy"] == trained.history[-1]["validation_accuracy"]
        assert run.describe(tmp_path)["split"] == "validation"


class TestMakeTrainer:
    def test_seeds_share_one_program(self, network, dataset):
        traced = []

        def counted(outputs, batch):
            traced.append(1)
            return {"hard": methods.cross_entropy(outputs, batch)}

        trainer = run.make_trainer(network, methods.objective(counted), dataset, RECIPE, machine=MACHINE)
        first = trainer(0)
        count = len(traced)
        assert trainer(1).metrics != first.metrics
        assert len(traced) == count

    def test_a_run_starts_from_what_init_returns(self, trainer):
        seen = []

        def init(seed, state):
            seen.append(seed)
            return state._replace(params=jax.tree.map(np.zeros_like, state.params))

        assert trainer(2, init=init).history[0]["loss"] == pytest.approx(np.log(CLASSES), rel=0.3)
        assert seen == [2]

    def test_averaged_weights_are_those_that_are_kept(self, network, dataset):
        trained = run.train(network, methods.labels(), dataset, Recipe(epochs=1, batch_size=8, ema=0.999))
        fresh = network.init(0)[0]
        far = jax.tree.map(lambda a, b: np.abs(a - b).max(), trained.weights.params, fresh)
        assert max(jax.tree.leaves(far)) < 1e-4  # six steps of Adam would have moved each weight by 6e-3

    def test_data_without_splits_are_refused(self, network):
        whole = data.from_arrays(np.zeros((8, *SHAPE), np.uint8), np.arange(8) % 2)
        with pytest.raises(ValueError, match=r"call kdjax\.data\.split"):
            run.train(network, methods.labels(), whole, RECIPE)


class TestCallbacks:
    def test_are_called_in_order(self, trainer):
        events = Events()
        trained = trainer(3, arm="kd", callbacks=[events])
        steps = len(trained.history) and events.seen[0][2]
        epoch = ["dispatch", "progress"] * (steps // 6) + ["epoch"]
        assert events.names == ["start", *epoch * 3, "end"]
        assert {str(who) for _, who, *_ in events.seen} == {"kd, seed 3"}
        assert [what for name, _, what in events.seen if name == "dispatch"] == [*range(2, steps + 1, 2)]
        records = [what for name, _, what in events.seen if name == "epoch"]
        assert [record["step"] for record in records] == [steps // 3, 2 * steps // 3, steps]
        assert [{k: v for k, v in r.items() if k != "step"} for r in records] == trained.history
        assert events.seen[-1][2] == trained.history[-1]

    def test_end_comes_after_an_exception_too(self, trainer):
        events = Events(stop_after=2)
        with pytest.raises(KeyboardInterrupt):
            trainer(3, callbacks=[events])
        assert (events.names[-1], events.seen[-1][2]) == ("end", {})

    def test_the_state_that_one_returns_goes_on(self, trainer):
        class Zero(Callback):
            def on_dispatch(self, run, state, step):
                return state._replace(params=jax.tree.map(jax.numpy.zeros_like, state.params))

        assert not any(np.any(x) for x in jax.tree.leaves(trainer(3, callbacks=[Zero()]).weights.params))


class TestTeacher:
    KD = methods.kd() + methods.hint(student=("hidden",), teacher=("hidden",))

    @pytest.fixture(scope="class")
    def student(self, network, dataset, teacher, tmp_path_factory):
        home = tmp_path_factory.mktemp("student")
        return home, run.train(network, self.KD, dataset, RECIPE, teacher=teacher[1], directory=home)

    def test_a_network_is_asked_once_where_there_is_a_directory(self, student):
        home, trained = student
        assert (home / "teacher_answers").is_dir()
        assert "agreement" in trained.metrics
        assert {"soft", "hint"} <= {name for name in trained.history[0]}

    def test_a_signal_is_the_same(self, network, dataset, signal, student):
        assert_same(run.train(network, self.KD, dataset, RECIPE, teacher=signal), student[1])

    def test_a_network_is_asked_in_the_step_without_a_directory(self, network, dataset, teacher, student):
        trained = run.train(network, self.KD, dataset, RECIPE, teacher=teacher[1])
        # The cache holds features as float16.
        np.testing.assert_allclose(
            [r["soft"] for r in trained.history], [r["soft"] for r in student[1].history], rtol=1e-2
        )

    def test_methods_that_need_one_say_so(self, network, dataset):
        with pytest.raises(ValueError, match="needs a teacher"):
            run.train(network, methods.kd(), dataset, RECIPE)

    def test_cached_answers_that_lack_a_feature_are_refused(self, network, dataset, teacher, tmp_path):
        logits = teachers.answers(teacher[1], dataset, directory=tmp_path)
        with pytest.raises(ValueError, match=r"reads the teacher's hidden.*answers\(\.\.\., features="):
            run.make_trainer(network, self.KD, dataset, RECIPE, teacher=logits)

    def test_no_cached_answer_is_about_a_blend(self, network, dataset, signal):
        with pytest.raises(ValueError, match=r"mixup=0\.5 blends images"):
            run.make_trainer(network, self.KD, dataset, Recipe(batch_size=8, mixup=0.5), teacher=signal)


@pytest.mark.parametrize("framework", ["nnx", "equinox"])  # linen is that of every other test
def test_networks_of_the_user_train_resume_and_are_taken_up(framework, dataset, tmp_path):
    network = NETWORKS[framework]()
    trainer = run.make_trainer(network, methods.labels(), dataset, RECIPE, machine=MACHINE)
    whole = trainer(0)
    with pytest.raises(KeyboardInterrupt):
        trainer(0, tmp_path, callbacks=[Events(stop_after=4)])
    assert_same(trainer(0, tmp_path), whole)
    again = run.load(tmp_path, dataset, network=NETWORKS[framework]())
    jax.tree.map(np.testing.assert_array_equal, again.weights, whole.weights)


class TestLoad:
    def test_returns_what_was_trained(self, network, dataset, teacher):
        found = run.load(teacher[0], dataset, network=network)
        jax.tree.map(np.testing.assert_array_equal, found.weights, teacher[1].weights)
        assert (found.arm, found.seed, found.normalisation) == ("teacher", 7, dataset.normalisation)
        assert found.metrics.items() <= teacher[1].metrics.items()

    def test_measures_another_split_under_its_own_normalisation(self, network, teacher):
        darker = make_dataset(num_train=16)
        found = run.load(teacher[0], darker, network=network, split="validation")
        assert found.normalisation == teacher[1].normalisation != darker.normalisation
        assert found.metrics["accuracy"] == teacher[1].history[-1]["validation_accuracy"]

    def test_builds_a_network_of_kdjax_itself(self, tmp_path):
        digits = data.split(data.load("digits"), num_train=32)
        network = models.from_linen(models.build("digits_student", num_classes=10), digits.image_shape)
        trained = run.train(
            network, methods.labels(), digits, Recipe(epochs=1, batch_size=16), directory=tmp_path
        )
        found = run.load(tmp_path, digits)
        assert found.network.description == network.description
        assert found.metrics.items() <= trained.metrics.items()

    def test_what_does_not_fit_is_refused(self, network, dataset, teacher, tmp_path):
        with pytest.raises(ValueError, match="holds no finished network"):
            run.load(tmp_path, dataset)
        with pytest.raises(ValueError, match="not one of kdjax.models"):
            run.load(teacher[0], dataset)
        with pytest.raises(ValueError, match="weights of another network"):
            run.load(teacher[0], dataset, network=models.from_linen(Net(width=5), SHAPE))
        fewer = data.split(data.from_arrays(dataset.images, dataset.labels % 2))
        with pytest.raises(ValueError, match="has 3 classes, .* has 2"):
            run.load(teacher[0], fewer, network=network)
        named = data.split(data.from_arrays(dataset.images, dataset.labels, class_names=("a", "b", "c")))
        renamed = named._replace(class_names=("a", "c", "b"))
        run.load(teacher[0], named, network=network)  # the teacher's classes have numbers for names
        trained = run.train(network, methods.labels(), named, Recipe(epochs=1), directory=tmp_path)
        assert trained.metrics
        with pytest.raises(ValueError, match="class 1 of the network .* 'b', and 'c'"):
            run.load(tmp_path, renamed, network=network)
        small = data.split(data.from_arrays(dataset.images[:, :2], dataset.labels))
        with pytest.raises(ValueError, match=r"takes images of shape \(4, 4, 1\)"):
            run.load(teacher[0], small, network=network)

    def test_weights_that_are_not_those_it_describes_are_refused(self, trainer, network, dataset, tmp_path):
        for seed in (1, 2):
            trainer(seed, tmp_path / str(seed))
        (tmp_path / "1" / "network.json").replace(tmp_path / "2" / "network.json")
        with pytest.raises(ValueError, match="start the run that trained it again"):
            run.load(tmp_path / "2", dataset, network=network)


class TestTrainMany:
    def test_each_is_bitwise_the_run_of_its_seed(self, trainer, network, dataset, teacher, tmp_path):
        many = run.Many(mapping="map", machine=MACHINE)
        options = {"seeds": [7, 2], "directory": tmp_path, "many": many}
        both = run.train_many(network, methods.labels(), dataset, RECIPE, **options)
        for trained, alone in zip(both, (teacher[1], trainer(2)), strict=True):
            jax.tree.map(np.testing.assert_array_equal, trained.weights, alone.weights)
            assert (trained.seed, trained.metrics) == (alone.seed, alone.metrics)
            assert trained.history == alone.history
        found = run.load(tmp_path / "1", dataset, network=network)
        assert (found.seed, found.metrics.items() <= both[1].metrics.items()) == (2, True)
        again = run.train_many(network, methods.labels(), dataset, RECIPE, **options)
        for a, b in zip(again, both, strict=True):
            assert_same(a, b)
        with pytest.raises(ValueError, match="seeds"):
            run.train_many(network, methods.labels(), dataset, RECIPE, **options | {"seeds": [7, 3]})

    def test_methods_with_heads_and_averages(self, network, dataset, signal):
        method, recipe = (
            TestTeacher.KD + methods.crd(student=("hidden",), teacher=("hidden",)),
            Recipe(epochs=2, batch_size=8, ema=0.9),
        )
        both = run.train_many(network, method, dataset, recipe, teacher=signal, seeds=range(2))
        alone = run.make_trainer(network, method, dataset, recipe, teacher=signal)
        for trained in both:
            want = alone(trained.seed)
            compared = (trained.history, trained.weights), (want.history, want.weights)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *compared)

    def test_settings_reach_each_student(self, network, dataset):
        def weighted(outputs, batch):
            return {"hard": batch["settings"]["weight"] * methods.cross_entropy(outputs, batch)}

        many = run.Many(settings={"weight": [1.0, 0.5]}, machine=MACHINE)
        method, recipe = methods.objective(weighted), Recipe(epochs=1, batch_size=40, learning_rate=1e-9)
        whole, half = run.train_many(network, method, dataset, recipe, seeds=[0, 0], many=many)
        assert half.history[0]["loss"] == pytest.approx(whole.history[0]["loss"] / 2, rel=1e-5)

    def test_as_many_settings_as_seeds(self, network, dataset):
        many = run.Many(settings={"weight": [1.0, 0.5]})
        with pytest.raises(ValueError, match="'weight' needs one value for each of 3 trainings"):
            run.train_many(network, methods.labels(), dataset, RECIPE, seeds=range(3), many=many)
