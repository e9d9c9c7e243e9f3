"""A teacher of other classes: its answers in the student's classes, cached and online, from a network and a file."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import softmax

from kdjax import data, losses, methods, models, pipeline, representations, run, train
from kdjax import teacher as teachers
from kdjax.models.mlp import Mlp
from kdjax.recipe import Recipe
from kdjax.types import Normalisation, Weights

SHAPE, SOURCES, CLASSES = (8, 8, 1), 5, 3


class Teacher(NamedTuple):
    network: models.Network
    weights: Weights
    normalisation: Normalisation


@pytest.fixture(scope="module")
def loaded():
    images = np.random.default_rng(0).integers(0, 256, (60, *SHAPE), np.uint8)
    return data.from_arrays(images, np.arange(60) % CLASSES, class_names=("ant", "bee", "cow"))


@pytest.fixture(scope="module")
def dataset(loaded):
    return data.split(loaded, num_train=20)


@pytest.fixture(scope="module")
def teacher():
    network = models.from_linen(Mlp(num_classes=SOURCES, widths=(8,)), SHAPE)
    return Teacher(network, Weights(*network.init(0)), Normalisation((0.5,), (0.2,)))


@pytest.fixture(scope="module")
def signal(teacher, dataset, tmp_path_factory):
    return teachers.answers(
        teacher, dataset, features=["embedding"], directory=tmp_path_factory.mktemp("answers")
    )


@pytest.fixture(scope="module")
def matrix():
    rows = np.random.default_rng(1).dirichlet(np.ones(CLASSES), SOURCES)
    return (rows / rows.sum(1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def probe():
    random = np.random.default_rng(2)
    kernel = random.normal(size=(8, CLASSES)).astype(np.float32)
    return representations.Probe(kernel, random.normal(size=CLASSES).astype(np.float32), 1e-3, 0.5)


def close(a, b, tolerance=1e-4):
    np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=tolerance, atol=tolerance)


def test_a_map_sends_softened_probabilities_on(signal, matrix):
    found = teachers.through_map(signal, matrix, temperature=4.0)
    given = signal.answers["logits"][:, 0].astype(np.float64)
    close(softmax(found.answers["logits"][:, 0] / 4, axis=-1), softmax(given / 4, axis=-1) @ matrix)
    assert found.shapes.logits.shape == (2, CLASSES)
    assert (list(found.answers), found.shapes.features, found.answers["logits"].dtype) == (
        ["logits"],
        {},
        np.float32,
    )


def test_weights_and_a_probe_are_linear(signal, matrix, probe):
    logits = signal.answers["logits"][:, 0].astype(np.float64)
    close(teachers.through_weights(signal, matrix).answers["logits"][:, 0], logits @ matrix)
    embeddings = signal.answers["embedding"][:, 0].astype(np.float64)
    found = teachers.through_probe(signal, probe, features=["embedding"])
    close(found.answers["logits"][:, 0], embeddings @ probe.kernel + probe.bias, 2e-3)
    np.testing.assert_array_equal(found.answers["embedding"], signal.answers["embedding"])


def test_every_stored_view_is_translated(teacher, dataset, matrix, tmp_path):
    move = {"padding": 1, "flip": True}
    views = teachers.answers(teacher, dataset, mode="views", views=3, move=move, directory=tmp_path)
    found = teachers.through_weights(views, matrix)
    assert (found.mode, found.views, found.answers["logits"].shape) == (
        "views",
        3,
        (len(dataset.images), 3, 3),
    )
    close(found.answers["logits"], views.answers["logits"].astype(np.float64) @ matrix)


def test_online_and_cached_answers_are_the_same(teacher, dataset, signal, matrix, probe):
    online = teachers.answers(teacher, dataset, mode="online", features=["embedding"])
    pixels = jnp.asarray(dataset.images[:6], jnp.float32)
    for way in (
        lambda s: teachers.through_map(s, matrix, temperature=2.0),
        lambda s: teachers.through_weights(s, matrix, features=["embedding"]),
        lambda s: teachers.through_probe(s, probe),
    ):
        cached, asked = way(signal), way(online)
        assert asked.mode == "online"
        rows = asked.online(asked.weights, pixels)
        assert rows.keys() == cached.answers.keys()
        for name, values in rows.items():
            close(values, cached.answers[name][:6, 0].astype(np.float64), 5e-3)  # cached in float16


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.full((SOURCES, CLASSES), 0.5), "sum to one"),
        (np.full((SOURCES + 1, CLASSES), 1 / CLASSES), "5"),
        (np.eye(CLASSES)[[0, 1, 1, 0, 1]], "for every student class, got none for .2"),
    ],
)
def test_what_is_no_map_of_these_classes_is_refused(signal, matrix, message):
    with pytest.raises(ValueError, match=message):
        teachers.through_map(signal, matrix, temperature=1.0)


def test_signals_of_different_maps_are_different_runs(signal, matrix):
    other = matrix[:, [1, 0, 2]]
    ways = [
        teachers.through_map(signal, matrix, temperature=1.0),
        teachers.through_map(signal, matrix, temperature=2.0),
        teachers.through_map(signal, other, temperature=1.0),
        teachers.through_weights(signal, matrix),
        teachers.through_weights(signal, matrix, features=["embedding"]),
        signal,
    ]
    assert len({str(way.identity) for way in ways}) == len(ways)


class TestLearntWays:
    """Each is what the losses say of the unaugmented training images, whichever form the student is given."""

    @pytest.mark.parametrize("way", teachers.WAYS)
    def test_are_learnt_from_the_training_labels_alone(self, signal, dataset, way):
        found = teachers.in_classes(signal, dataset, way, temperature=2.0, top_k=2)
        ids = dataset.splits["train"]
        logits, labels = jnp.asarray(signal.answers["logits"][ids, 0], jnp.float32), dataset.labels[ids]
        options = {"num_classes": CLASSES}
        learners = {
            "least_squares": lambda: losses.least_squares_class_map(logits, jnp.asarray(labels), **options),
            "blm": lambda: losses.bayesian_class_map(logits, jnp.asarray(labels), **options),
            "blm_plus": lambda: losses.bayesian_class_map(
                logits, jnp.asarray(labels), **options, smoothing=0.0, top_k=2
            ),
            "blm_logits": lambda: losses.bayesian_logit_weights(logits, jnp.asarray(labels), **options),
            "probe": lambda: representations.linear_probe(
                signal.answers["embedding"][ids, 0].astype(np.float32),
                labels,
                **options,
                validation=(
                    signal.answers["embedding"][dataset.splits["validation"], 0].astype(np.float32),
                    dataset.labels[dataset.splits["validation"]],
                ),
            ),
        }
        learnt = learners[way]()
        if way == "probe":
            expected = teachers.through_probe(signal, learnt)
        elif way == "blm_logits":
            expected = teachers.through_weights(signal, learnt)
        else:
            expected = teachers.through_map(signal, learnt, temperature=2.0)
        close(found.answers["logits"], expected.answers["logits"].astype(np.float64))
        shuffled = dataset._replace(
            labels=np.where(np.isin(np.arange(len(dataset.labels)), ids), dataset.labels, 0)
        )
        if way != "probe":  # which chooses its penalty on validation
            again = teachers.in_classes(signal, shuffled, way, temperature=2.0, top_k=2)
            assert again.identity == found.identity

    def test_views_and_a_teacher_in_the_step_learn_from_cached_answers(self, teacher, signal, dataset):
        online = teachers.answers(teacher, dataset, mode="online", features=["embedding"])
        found = teachers.in_classes(online, dataset, "blm", temperature=2.0, fitted_to=signal)
        cached = teachers.in_classes(signal, dataset, "blm", temperature=2.0)
        rows = found.online(found.weights, jnp.asarray(dataset.images[:4], jnp.float32))["logits"]
        close(rows, cached.answers["logits"][:4, 0].astype(np.float64), 2e-2)
        with pytest.raises(ValueError, match="no cached answers"):
            teachers.in_classes(online, dataset, "blm", temperature=2.0)

    def test_what_cannot_be_learnt_is_refused(self, teacher, dataset, signal, tmp_path):
        with pytest.raises(ValueError, match="least_squares, blm, blm_plus, blm_logits, probe, got 'names'"):
            teachers.in_classes(signal, dataset, "names", temperature=1.0)
        logits = teachers.answers(teacher, dataset, directory=tmp_path)
        with pytest.raises(ValueError, match="embedding of the training images"):
            teachers.in_classes(logits, dataset, "probe", temperature=1.0)


class TestSomeClasses:
    def test_the_others_have_no_soft_loss_and_no_gradient(self, signal, dataset, matrix):
        found = teachers.about_classes(teachers.through_weights(signal, matrix), dataset, ["bee"])
        ids = dataset.splits["train"]
        chosen = dataset.labels[ids] == 1
        answers = jnp.asarray(found.answers["logits"][ids, 0])
        student = jax.random.normal(jax.random.key(0), answers.shape)

        def loss(logits):
            return losses.soft_target_kl(logits, answers, temperature=4.0)

        np.testing.assert_array_equal(np.asarray(loss(student))[~chosen], 0)
        assert (np.asarray(loss(student))[chosen] > 0).all()
        gradient = np.asarray(jax.grad(lambda logits: jnp.sum(loss(logits)))(student))
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[~chosen], 0)
        rest = np.setdiff1d(np.arange(len(dataset.images)), ids)  # of other splits all is kept
        assert np.isfinite(found.answers["logits"][rest]).all()

    def test_must_be_classes_of_the_data_and_cached(self, signal, teacher, dataset, matrix):
        mapped = teachers.through_weights(signal, matrix)
        with pytest.raises(ValueError, match="has no class cat; it has ant, bee, cow"):
            teachers.about_classes(mapped, dataset, ["bee", "cat"])
        online = teachers.answers(teacher, dataset, mode="online")
        with pytest.raises(ValueError, match="mode centre"):
            teachers.about_classes(online, dataset, ["bee"])
        assert np.isfinite(mapped.answers["logits"]).all()  # the signal that was given is as it was


def test_a_file_may_be_of_other_classes_where_that_is_asked_for(loaded, dataset, matrix, tmp_path):
    logits = np.random.default_rng(3).normal(size=(60, SOURCES)).astype(np.float32)
    np.savez(tmp_path / "answers.npz", logits=logits, example_ids=loaded.example_ids)
    with pytest.raises(ValueError, match=r"must be \[n, 3\], got \[60, 5\]"):
        teachers.from_file(tmp_path / "answers.npz", dataset, loaded=loaded)
    signal = teachers.from_file(tmp_path / "answers.npz", dataset, loaded=loaded, other_classes=True)
    found = teachers.through_weights(signal, matrix)
    row_of = {name: row for row, name in enumerate(loaded.example_ids.tolist())}
    rows = [row_of[name] for name in dataset.example_ids.tolist()]
    close(found.answers["logits"][:, 0], logits[rows].astype(np.float64) @ matrix)


def test_a_student_learns_from_mapped_answers(signal, dataset, matrix):
    network = models.from_linen(Mlp(num_classes=CLASSES, widths=(4,)), SHAPE)
    mapped = teachers.through_map(signal, matrix, temperature=4.0)
    trained = run.train(network, methods.kd(), dataset, Recipe(epochs=2, batch_size=10), teacher=mapped)
    assert {"accuracy", "agreement"} <= trained.metrics.keys()
    batch = pipeline.make_batches(dataset, Recipe(), methods.kd(), mapped)[1](
        pipeline.resident(dataset, mapped), jnp.arange(4)
    )
    close(batch["teacher_logits"], mapped.answers["logits"][:4, 0].astype(np.float64))


def test_weights_of_a_network_of_other_classes_start_all_but_the_last_layer():
    def state(classes, seed):
        network = models.from_linen(models.build("resnet8_w25", num_classes=classes), (8, 8, 3))
        params, model_state = network.init(seed)

        return train.init_state(params, model_state, optax.sgd(0.1), seed=seed)

    before, there = state(3, 0), state(7, 1)
    with pytest.raises((TypeError, ValueError), match="shape"):
        jax.eval_shape(lambda: jax.tree.map(jnp.add, before.params, there.params))
    found = methods.start_at(there.params, there.model_state, other_classes=True)(0, before)
    for path, leaf in jax.tree_util.tree_leaves_with_path(found.params):
        own, theirs = (dict(jax.tree_util.tree_leaves_with_path(s.params))[path] for s in (before, there))
        last = "Dense" in jax.tree_util.keystr(path)
        np.testing.assert_array_equal(leaf, own if last else theirs)
    jax.tree.map(np.testing.assert_array_equal, found.model_state, there.model_state)
    jax.tree.map(np.testing.assert_array_equal, found.opt_state, before.opt_state)
