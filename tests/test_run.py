"""The contract of a run: what a directory means, what is refused, what callbacks see, and many runs at once."""

import json

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from kdjax import data, methods, models, run
from kdjax import teacher as teachers
from kdjax.callbacks import Callback
from kdjax.recipe import Machine, Recipe
from kdjax.types import Weights

CLASSES, SHAPE = 3, (4, 4, 1)
RECIPE = Recipe(epochs=3, batch_size=8, learning_rate=0.01)  # of 4 steps, in 2 dispatches
MACHINE = Machine(steps_per_dispatch=2, save_every_s=0.0)
KD, AVERAGED = methods.kd() + methods.hint(student=("map",), teacher=("map",)), Recipe(2, 8, ema=0.9)
TRACED = []

# One network alone and among many is to round alike, which XLA unoptimised does not.
pytestmark = pytest.mark.usefixtures("optimised_module")


def counted(outputs, batch):
    """Cross-entropy with the labels, by a student's own weight if it has one; counts how often it is traced."""
    TRACED.append(1)
    weight = batch.get("settings", {}).get("weight", 1.0)
    return {"hard": weight * methods.cross_entropy(outputs, batch)}


LABELS = methods.objective(counted)


class Net(nn.Module):
    """A network of the user's, with dropout and statistics."""

    width: int = 6

    @nn.compact
    def __call__(self, x, *, train):
        hidden = nn.BatchNorm(use_running_average=not train)(nn.Dense(self.width)(x.reshape(len(x), -1)))
        hidden = nn.Dropout(0.2, deterministic=not train)(nn.relu(hidden))
        return nn.Dense(CLASSES)(hidden), {"map": hidden[:, None, None]}


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
            return self.outer(self.dropout(hidden)), {"map": hidden[:, None, None]}

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
            return self.outer(self.dropout(hidden, key=key)), {"map": hidden[None, None]}

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


def make_dataset(**options):
    labels = np.arange(64) % CLASSES
    images = np.random.default_rng(0).integers(0, 100, (64, *SHAPE)) + 70 * labels[:, None, None, None]
    whole = data.from_arrays(images.astype(np.uint8), labels, class_names=("a", "b", "c"))
    return data.split(whole, **{"num_train": 32, **options})


@pytest.fixture(scope="module")
def dataset():
    return make_dataset()


@pytest.fixture(scope="module")
def network():
    return NETWORKS["linen"]()


@pytest.fixture(scope="module")
def trainer(network, dataset):
    """Learns from the labels; compiled once for this module."""
    return run.make_trainer(network, LABELS, dataset, RECIPE, machine=MACHINE)


@pytest.fixture(scope="module")
def teacher(trainer, tmp_path_factory):
    """A directory, and the finished run in it."""
    home = tmp_path_factory.mktemp("teacher")
    return home, trainer(7, home, arm="teacher")


@pytest.fixture(scope="module")
def signal(teacher, dataset, tmp_path_factory):
    home = tmp_path_factory.mktemp("answers")
    return teachers.answers(teacher[1], dataset, features=("map",), directory=home)


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

    @pytest.mark.parametrize("stop_after", [1, 4, 5])
    def test_a_stopped_run_ends_bitwise_equal(self, trainer, teacher, tmp_path, stop_after):
        with pytest.raises(KeyboardInterrupt):
            trainer(7, tmp_path, arm="teacher", callbacks=[Events(stop_after)])
        events = Events()
        assert_same(trainer(7, tmp_path, arm="teacher", callbacks=[events]), teacher[1])
        # What a callback raises comes before the checkpoint of its dispatch.
        assert events.names.count("progress") == 7 - stop_after

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
        method = methods.labels() if what == "method" else LABELS
        seen = make_dataset(label_noise=0.2) if what == "data" else dataset
        recipe = Recipe(epochs=3, batch_size=8, learning_rate=0.02) if what == "recipe" else RECIPE
        answers = signal if what == "teacher" else None
        another = run.make_trainer(other, method, seen, recipe, teacher=answers, machine=MACHINE)
        with pytest.raises(ValueError, match=rf"\b{what}\."):
            another(7, teacher[0], arm="teacher")

    def test_the_test_split_is_not_read_for_validation(self, network, dataset, tmp_path):
        unread = dataset._replace(splits={n: ids for n, ids in dataset.splits.items() if n != "test"})
        trainer = run.make_trainer(network, methods.labels(), unread, RECIPE, split="validation")
        trained = trainer(0, tmp_path)
        assert trained.metrics["accuracy"] == trained.history[-1]["validation_accuracy"]
        assert run.describe(tmp_path)["split"] == "validation"


class TestMakeTrainer:
    def test_seeds_share_one_program(self, trainer, teacher):
        count = len(TRACED)
        assert trainer(1).history != teacher[1].history
        assert len(TRACED) == count

    def test_a_run_starts_from_what_init_returns(self, trainer):
        seen = []

        def init(seed, state):
            seen.append(seed)
            return state._replace(params=jax.tree.map(np.zeros_like, state.params))

        assert trainer(2, init=init).history[0]["loss"] == pytest.approx(np.log(CLASSES), rel=0.3)
        assert seen == [2]

    def test_data_without_splits_are_refused(self, network):
        whole = data.from_arrays(np.zeros((8, *SHAPE), np.uint8), np.arange(8) % 2)
        with pytest.raises(ValueError, match=r"call kdjax\.data\.split"):
            run.train(network, methods.labels(), whole, RECIPE)


class TestCallbacks:
    def test_are_called_in_order(self, trainer):
        events = Events()
        trained = trainer(3, arm="kd", callbacks=[events])
        assert events.names == ["start", *(["dispatch", "progress"] * 2 + ["epoch"]) * 3, "end"]
        assert events.seen[0][2] == 12
        assert {str(who) for _, who, *_ in events.seen} == {"kd, seed 3"}
        assert [what for name, _, what in events.seen if name == "dispatch"] == [2, 4, 6, 8, 10, 12]
        records = [what for name, _, what in events.seen if name == "epoch"]
        assert [record["step"] for record in records] == [4, 8, 12]
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


@pytest.fixture(scope="module")
def student(network, dataset, teacher, tmp_path_factory):
    """A directory, and the finished student in it."""
    home = tmp_path_factory.mktemp("student")
    return home, run.train(network, KD, dataset, AVERAGED, teacher=teacher[1], directory=home)


class TestTeacher:
    def test_a_network_is_asked_once_where_there_is_a_directory(self, student):
        home, trained = student
        assert (home / "teacher_answers").is_dir()
        assert "agreement" in trained.metrics
        assert {"soft", "hint"} <= set(trained.history[0])

    def test_a_signal_is_the_same_and_averaged_weights_are_kept(self, network, dataset, signal, student):
        states = []

        class Keep(Callback):
            def on_dispatch(self, run, state, step):
                states.append(jax.device_get(state.opt_state))
                return state

        trained = run.train(network, KD, dataset, AVERAGED, teacher=signal, callbacks=[Keep()])
        assert_same(trained, student[1])
        average = optax.tree.get(states[-1], "ema")["student"]
        jax.tree.map(np.testing.assert_array_equal, trained.weights.params, average)

    def test_a_network_is_asked_in_the_step_without_a_directory(self, network, dataset, teacher, student):
        trained = run.train(network, KD, dataset, AVERAGED, teacher=teacher[1])
        soft = ([record["soft"] for record in one.history] for one in (trained, student[1]))
        np.testing.assert_allclose(*soft, rtol=1e-2)  # the cache holds float16

    def test_methods_that_need_one_say_so(self, network, dataset):
        with pytest.raises(ValueError, match="needs a teacher"):
            run.train(network, methods.kd(), dataset, RECIPE)

    def test_cached_answers_that_lack_a_feature_are_refused(self, network, dataset, teacher, tmp_path):
        logits = teachers.answers(teacher[1], dataset, directory=tmp_path)
        with pytest.raises(ValueError, match=r"reads the teacher's map.*answers\(\.\.\., features="):
            run.make_trainer(network, KD, dataset, RECIPE, teacher=logits)

    def test_no_cached_answer_is_about_a_blend(self, network, dataset, signal):
        with pytest.raises(ValueError, match=r"mixup=0\.5 blends images"):
            run.make_trainer(network, KD, dataset, Recipe(batch_size=8, mixup=0.5), teacher=signal)


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

    def test_builds_a_network_of_kdjax_itself(self, dataset, tmp_path):
        module = models.build("hinton_student", num_classes=CLASSES, widths=(5, 5))
        network = models.from_linen(module, SHAPE)
        weights = Weights(*network.init(0))
        summary = {"split": "test", "metrics": {}}
        run.save(
            tmp_path, network, dataset, weights, step=1, summary=summary, identity={"arm": "a", "seed": 3}
        )
        found = run.load(tmp_path, dataset)
        assert (found.network.description, found.arm, found.seed) == (network.description, "a", 3)
        jax.tree.map(np.testing.assert_array_equal, found.weights, weights)

    def test_what_does_not_fit_is_refused(self, network, dataset, teacher, tmp_path):
        with pytest.raises(ValueError, match="holds no finished network"):
            run.load(tmp_path, dataset)
        with pytest.raises(ValueError, match=r"not one of kdjax\.models"):
            run.load(teacher[0], dataset)
        with pytest.raises(ValueError, match="weights of another network"):
            run.load(teacher[0], dataset, network=models.from_linen(Net(width=5), SHAPE))
        fewer = data.split(data.from_arrays(dataset.images, dataset.labels % 2))
        with pytest.raises(ValueError, match=r"has 3 classes, .* has 2"):
            run.load(teacher[0], fewer, network=network)
        with pytest.raises(ValueError, match=r"class 1 of the network .* 'b', and 'c'"):
            run.load(teacher[0], dataset._replace(class_names=("a", "c", "b")), network=network)
        run.load(teacher[0], dataset._replace(class_names=("0", "1", "2")), network=network)  # without names
        small = data.split(
            data.from_arrays(dataset.images[:, :2], dataset.labels, class_names=("a", "b", "c"))
        )
        with pytest.raises(ValueError, match=r"takes images of shape \(4, 4, 1\)"):
            run.load(teacher[0], small, network=network)

    def test_weights_that_are_not_those_it_describes_are_refused(self, trainer, network, dataset, tmp_path):
        for seed in (1, 2):
            trainer(seed, tmp_path / str(seed))
        (tmp_path / "1" / "network.json").replace(tmp_path / "2" / "network.json")
        with pytest.raises(ValueError, match="start the run that trained it again"):
            run.load(tmp_path / "2", dataset, network=network)


def assert_trained_alike(a, b):
    """Bitwise the same weights; their metrics to rounding, since many networks are evaluated by another program."""
    jax.tree.map(
        np.testing.assert_array_equal, (a.fitted.last, a.fitted.best), (b.fitted.last, b.fitted.best)
    )
    for got, want in zip((*a.history, a.metrics), (*b.history, b.metrics), strict=True):
        assert got == pytest.approx(want, rel=1e-5)


class TestTrainMany:
    @pytest.fixture
    def options(self, tmp_path):
        settings = {"weight": [1.0, 1.0, 0.5]}
        many = run.Many(settings, mapping="map", machine=MACHINE)
        return {"seeds": [7, 2, 7], "directory": tmp_path, "many": many}

    def test_each_is_bitwise_the_run_of_its_seed(self, trainer, network, dataset, teacher, options):
        found = run.train_many(network, LABELS, dataset, RECIPE, **options)
        for trained, alone in zip(found, (teacher[1], trainer(2)), strict=False):
            assert_trained_alike(trained, alone)
            assert trained.seed == alone.seed
        assert found[2].history[0]["loss"] < 0.6 * found[0].history[0]["loss"]  # by its weight
        second = run.load(options["directory"] / "1", dataset, network=network)
        assert second.seed == 2
        jax.tree.map(np.testing.assert_array_equal, second.weights, found[1].weights)
        count = len(TRACED)
        for again, before in zip(
            run.train_many(network, LABELS, dataset, RECIPE, **options), found, strict=True
        ):
            assert_same(again, before)
        assert len(TRACED) == count  # read back
        with pytest.raises(ValueError, match="seeds"):
            run.train_many(network, LABELS, dataset, RECIPE, **options | {"seeds": [7, 3, 7]})

    def test_methods_with_heads_and_averages(self, network, dataset, signal, student):
        many = run.Many(mapping="map")
        (trained,) = run.train_many(network, KD, dataset, AVERAGED, teacher=signal, seeds=[0], many=many)
        assert_trained_alike(trained, student[1])

    def test_as_many_settings_as_seeds(self, network, dataset):
        many = run.Many(settings={"weight": [1.0, 0.5]})
        with pytest.raises(ValueError, match="'weight' needs one value for each of 3 trainings"):
            run.train_many(network, LABELS, dataset, RECIPE, seeds=range(3), many=many)
