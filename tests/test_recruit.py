"""Teachers that keep their saddles, the regions made of them, and SPRKD as a method."""

import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import data, methods, models, parallel, recruit, saddles, train
from kdjax.recipe import Machine, Recipe

SHAPE = (4, 4, 1)
RECIPE = Recipe(epochs=1, batch_size=8, learning_rate=2e-3)  # of 4 steps, in 2 dispatches
MACHINE = Machine(devices=1, steps_per_dispatch=2)


class Net(nn.Module):
    """A teacher of 12 hidden units, a student of 4."""

    width: int = 12

    @nn.compact
    def __call__(self, x, *, train):
        hidden = nn.relu(nn.Dense(self.width)(x.reshape(len(x), -1)))
        return nn.Dense(3)(nn.Dropout(0.3, deterministic=not train)(hidden))


@pytest.fixture(scope="module")
def dataset():
    labels = np.arange(64) % 3
    images = np.random.default_rng(0).integers(0, 100, (64, *SHAPE)) + 70 * labels[:, None, None, None]
    whole = data.from_arrays(images.astype(np.uint8), labels, class_names=("a", "b", "c"))
    return data.split(whole, num_train=32)


@pytest.fixture(scope="module")
def network():
    return models.from_linen(Net(), SHAPE)


@pytest.fixture(scope="module")
def trainer(network, dataset):
    return recruit.make_snapshot_trainer(network, dataset, RECIPE, machine=MACHINE, split="validation")


@pytest.fixture(scope="module")
def trained(trainer, tmp_path_factory):
    """Two teachers, of seeds 3 and 4."""
    home = tmp_path_factory.mktemp("teachers")
    return [trainer(seed, home / str(seed)) for seed in (3, 4)]


@pytest.fixture(scope="module")
def student():
    return models.from_linen(Net(4), SHAPE).init(0)[0]


def assert_equal(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, wanted)


class TestSnapshots:
    def test_every_dispatch_leaves_one(self, trained):
        for teacher, seed in zip(trained, (3, 4), strict=True):
            own = [(entry.teacher, entry.step) for entry in saddles.entries(teacher.repository)]
            assert own == [(f"teacher{seed}", 2), (f"teacher{seed}", 4)]
            last = saddles.read(teacher.repository, teacher.name, 4, teacher.trained.weights.params)
            jax.tree.map(np.testing.assert_array_equal, last.params, teacher.trained.weights.params)

    def test_are_scored_on_training_images_without_dropout(self, network, dataset, trained):
        params = trained[0].trained.weights.params
        score = saddles.entries(trained[0].repository)[-1].score
        ids, (mean, std) = dataset.splits["train"], dataset.normalisation
        images = (dataset.images[ids] / 255 - np.float32(mean)) / np.float32(std)
        logits = network.apply(params, {}, jnp.asarray(images, jnp.float32), train=False)[0].logits
        loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, dataset.labels[ids]).mean()
        np.testing.assert_allclose(score.loss, loss, rtol=1e-5)
        assert score.lambda_min < 0 < score.lambda_max

    @pytest.mark.parametrize(
        ("harm", "said"),
        [
            (
                lambda own, other: shutil.rmtree(own / "saddles/teacher3/step_00000002"),
                r"steps \[2\] are missing",
            ),
            (lambda own, other: shutil.rmtree(own / "saddles"), "is no[t a]* repository"),
            (
                lambda own, other: shutil.copytree(
                    other / "saddles/teacher4", own / "saddles/teacher3", dirs_exist_ok=True
                ),
                "seed 4 there and 3 here",
            ),
        ],
    )
    def test_that_are_not_whole_or_of_another_teacher_are_refused(
        self, trained, trainer, tmp_path, harm, said
    ):
        own, other = tmp_path / "own", trained[1].repository.parent
        shutil.copytree(trained[0].repository.parent, own)
        assert trainer(3, own).identity == trained[0].identity
        harm(own, other)
        with pytest.raises(ValueError, match=f"{said}.*Delete .* to train this teacher again"):
            trainer(3, own)


class TestRegion:
    def make(self, teachers, like, which, **options):
        options = {"rule": "strong", "resize": "crop", "seed": 0, **options}
        return recruit.region_of(teachers, like, which=which, **options)

    def test_is_the_mean_over_teachers_in_the_shapes_of_the_student(self, trained, student):
        region = self.make(trained, student, "last")
        weights = (teacher.trained.weights.params for teacher in trained)
        mean = jax.tree.map(lambda a, b: (np.asarray(a) + np.asarray(b)) / 2, *weights)
        assert_equal(region.params, saddles.select_weights(mean, student, form="crop"))
        assert (region.steps, region.strong) == ([4, 4], True)

    def test_may_be_the_average_of_all_snapshots_of_a_teacher(self, trained, student):
        region = self.make(trained[:1], student, "average")
        like = trained[0].trained.weights.params
        both = (saddles.read(trained[0].repository, trained[0].name, step, like).params for step in (2, 4))
        mean = jax.tree.map(lambda a, b: (a + b) / 2, *both)
        assert_equal(region.params, saddles.select_weights(mean, student, form="crop"))
        assert region.steps == [2, 4]

    def test_may_be_of_a_random_snapshot(self, trained, student):
        seeds = [self.make(trained[:1], student, "random", seed=seed).steps for seed in range(8)]
        assert sorted({step for (step,) in seeds}) == [2, 4]
        assert self.make(trained[:1], student, "random", seed=0).steps == seeds[0]

    def test_takes_the_strongest_saddle_where_none_is_strong_and_says_so(self, trained, student, monkeypatch):
        found = saddles.entries(trained[0].repository)
        strongest = max(found, key=lambda e: float(e.score.negative_curvature_ratio)).step
        monkeypatch.setitem(recruit.RULES, "never", lambda score: score.loss < 0)
        region = self.make(trained[:1], student, "saddle", rule="never", resize="select")
        assert (region.steps, region.strong) == ([strongest], False)
        monkeypatch.setitem(recruit.RULES, "always", lambda score: score.loss > 0)
        region = self.make(trained[:1], student, "saddle", rule="always", resize="select")
        assert region.strong
        assert len(region.steps) == 1


class TestTeachersOfAStudy:
    @pytest.fixture(scope="class")
    @classmethod
    def source(cls, network, dataset, tmp_path_factory):
        recipes = RECIPE, Recipe(epochs=2, batch_size=8, learning_rate=2e-3)
        home = tmp_path_factory.mktemp("study")
        return recruit.make_teachers(
            network, dataset, dataset, recipes, home, machine=MACHINE, split="validation"
        )

    def test_are_trained_once(self, source):
        weak, strong = source.weak(2, 1), source.strong(0)
        assert (weak.trained.arm, weak.trained.seed, len(weak.trained.history)) == ("weak_teacher", 21, 1)
        assert (strong.arm, strong.seed, len(strong.history)) == ("strong_teacher", 0, 2)
        assert source.weak(2, 1) is weak
        assert [entry.step for entry in saddles.entries(weak.repository, identity=weak.identity)] == [2, 4]

    def test_are_asked_about_every_image(self, source, network, dataset):
        images = data.normalise(jnp.asarray(dataset.images), **dataset.normalisation._asdict())
        for which, number, teacher in (
            ("strong", 0, source.strong(0)),
            ("weak", 2, source.weak(2, 0).trained),
        ):
            signal = source.answers(which, number)
            logits = network.apply(*teacher.weights, images, train=False)[0].logits
            np.testing.assert_allclose(signal.answers["logits"][:, 0], logits, rtol=1e-4, atol=1e-5)


def on_one_device(function):
    """Compiled, under the name of the devices' axis; quickly, since it runs a few times."""
    mapped = jax.vmap(function, axis_name=parallel.AXIS)

    def run(*arguments):
        return jax.tree.map(lambda x: x[0], mapped(*jax.tree.map(lambda x: x[None], arguments)))

    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})


class TestMethods:
    def test_what_is_spent_is_counted_whichever_form_spends_it(self):
        params = {"w": jnp.ones(20)}

        def loss(p):
            return jnp.sum(p["w"] ** 4) - jnp.sum(p["w"] ** 2)

        escapes = {"period": 1, "negative_curvature_ratio": 0.0}
        forms = {
            "published": methods.sprkd_paper(params),
            "escapes": methods.sprkd(**{**vars(methods.EscapeOptions()), **escapes}),
            "perturbations": methods.perturbations(period=1),
            "none": methods.labels(),
        }
        for name, method in forms.items():
            tx = method.optimizer(optax.sgd(0.0))

            def update(params, tx=tx):
                state = tx.init(params)
                _, after = tx.update(jax.grad(loss)(params), state, params, value_fn=loss)
                return methods.cost(state, after)

            spent = {key: float(value) for key, value in on_one_device(update)(params).items()}
            assert spent["hvps"] == (16 if name in ("published", "escapes") else 0), name
            assert (spent["evaluations"] > 0) == (name == "perturbations") or name in ("published", "escapes")
            assert spent["events"] in (0, 1)
            assert (method.record is methods.cost) == (name != "none")

    @pytest.mark.parametrize("method", [methods.sprkd, methods.perturbations, methods.sprkd_paper])
    def test_one_program_serves_many_regions(self, method):
        params, wanted = {"w": jnp.zeros(20)}, {"w": np.arange(20.0)}
        tx = method({"w": jnp.full(20, 9.0)}).optimizer(optax.sgd(0.1))
        state = methods.towards(wanted)(0, train.init_state(params, {}, tx, seed=0))
        np.testing.assert_array_equal(optax.tree.get(state.opt_state, "region")["w"], wanted["w"])
        if method is not methods.perturbations:  # of the three the quickest to compile
            return

        @on_one_device
        def step(params, state):
            updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params, value_fn=loss)
            return optax.apply_updates(params, updates), state

        def loss(p):
            return jnp.sum(p["w"] ** 2)

        opt_state = state.opt_state
        for _ in range(10):  # halves the distance
            params, opt_state = step(params, opt_state)
        np.testing.assert_allclose(params["w"], np.arange(20.0) / 2, rtol=1e-4)

    def test_a_student_starts_where_it_is_told_and_its_heads_as_they_would(self):
        given, tx = {"w": jnp.arange(3.0)}, optax.sgd(0.1)
        init = methods.start_at(given)
        alone = init(0, train.init_state({"w": jnp.zeros(3)}, {}, tx, seed=0))
        np.testing.assert_array_equal(alone.params["w"], given["w"])
        assert alone.params["w"] is not given["w"]  # the state is donated
        both = {"student": {"w": jnp.zeros(3)}, "heads": {"v": jnp.ones(2)}}
        found = init(0, train.init_state(both, {}, tx, seed=0)).params
        np.testing.assert_array_equal(found["student"]["w"], given["w"])
        np.testing.assert_array_equal(found["heads"]["v"], np.ones(2))

    def test_refuse_a_region_of_other_shapes(self):
        tx = methods.sprkd({"w": jnp.zeros(30)}).optimizer(optax.sgd(0.1))
        with pytest.raises(ValueError, match="region"):
            tx.init({"w": jnp.zeros(20)})
