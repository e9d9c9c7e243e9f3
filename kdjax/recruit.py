"""Teachers that keep the saddles they pass, and regions for students made of them: what SPRKD starts from."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kdjax import curvature, data, files, methods, run, saddles, train
from kdjax import teacher as teachers
from kdjax.callbacks import Callback, RunId
from kdjax.models import Network
from kdjax.recipe import Machine, Recipe
from kdjax.types import Params

NUM_MATVECS = 16  # Hessian-vector products per snapshot
SCORED_IMAGES = 128  # training images on which snapshots are scored
RULES: dict[str, saddles.Rule] = {
    "magnitude": saddles.magnitude_rule,
    "ratio": saddles.ratio_rule,
    "both": saddles.both_rule,
    "extreme": saddles.extreme_rule,
    "gated": saddles.gated_rule,
    # No bound on the gradient, whose scale is that of the loss and of the network.
    "strong": functools.partial(saddles.gated_rule, max_gradient_norm=float("inf")),
}
"""What counts as a strong saddle."""


class SnapshotTeacher(NamedTuple):
    """A finished teacher, and where its snapshots lie.

    Attributes:
      trained: the teacher.
      repository: of its snapshots.
      name: of the teacher in the repository.
      identity: of its snapshots.
    """

    trained: run.Trained
    repository: Path
    name: str
    identity: dict[str, Any]


class Region(NamedTuple):
    """Student-shaped parameters to start from.

    Attributes:
      params: the parameters.
      steps: of the snapshots that they are made of.
      strong: whether the rule found a strong saddle for each teacher.
    """

    params: Params
    steps: list[int]
    strong: bool


class SaddleSnapshots(Callback):
    """Scores and keeps the parameters after every dispatch; see :func:`kdjax.saddles.add`."""

    def __init__(self, repository: Path, name: str, score: Callable[..., Any], identity: Mapping[str, Any]):
        self._add = functools.partial(saddles.add, repository, name, identity=dict(identity))
        self._score = score

    def on_dispatch(self, run: RunId, state: train.TrainState, step: int) -> train.TrainState:
        """Adds a snapshot; the training goes on unchanged."""
        params = jax.tree.map(np.asarray, state.params)
        self._add(step, params, self._score(params, step))
        return state


def make_snapshot_trainer(
    network: Network,
    dataset: data.Dataset,
    recipe: Recipe,
    *,
    machine: Machine,
    split: str = "test",
) -> Callable[..., SnapshotTeacher]:
    """Builds ``(seed, directory, callbacks=()) -> SnapshotTeacher``: trains a teacher that keeps snapshots.

    Args:
      network: of the teacher, without batch statistics.
      dataset: after :func:`kdjax.data.split`.
      recipe: of the teacher.
      machine: ``steps_per_dispatch`` lie between two snapshots.
      split: on which the finished teacher is measured.
    """
    score = make_scorer(network, dataset)
    trainer = run.make_trainer(network, methods.labels(), dataset, recipe, machine=machine, split=split)
    made_from = run.identity_of(network, dataset, recipe, machine)

    def train_one(seed: int, directory: Path, callbacks: Sequence[Callback] = ()) -> SnapshotTeacher:
        repository, name, identity = directory / "saddles", f"teacher{seed}", {"seed": seed, **made_from}
        keep = SaddleSnapshots(repository, name, score, identity)
        trained = trainer(seed, directory / "teacher", arm="weak_teacher", callbacks=[*callbacks, keep])
        _check_complete(directory, identity)
        return SnapshotTeacher(trained, repository, name, identity)

    return train_one


def _check_complete(directory: Path, identity: dict[str, Any]) -> None:
    """Refuses the snapshots of a finished teacher if one is missing, damaged or another teacher's."""
    try:
        found = [entry.step for entry in saddles.entries(directory / "saddles", identity=identity)]
        listed = files.cached(
            directory / "snapshots.json", lambda: found, identity=identity, writes=jax.process_index() == 0
        )
        if missing := sorted(set(listed) - set(found)):
            raise ValueError(f"of the snapshots in {directory}/saddles those of steps {missing} are missing.")
    except ValueError as error:
        raise ValueError(f"{error} Delete {directory} to train this teacher again.") from error


def make_scorer(network: Network, dataset: data.Dataset) -> Callable[[Params, int], saddles.SaddleScore]:
    """Builds ``(params, seed) -> score`` on a sample of the training images, without dropout."""

    def objective(outputs, batch):
        return {"hard": methods.cross_entropy(outputs, batch)}

    loss = curvature.evaluation_loss(network.apply, objective)
    ids = np.random.default_rng(0).permutation(dataset.splits["train"])[:SCORED_IMAGES]
    batch = {
        "image": data.normalise(jnp.asarray(dataset.images[ids]), **dataset.normalisation._asdict()),
        "label": jnp.asarray(dataset.labels[ids]),
    }

    @jax.jit
    def score(params, batch, seed):
        value, slope = jax.value_and_grad(loss)(params, batch, {})
        start = curvature.random_like(jax.random.key(seed), params)
        multiply = curvature.hessian(loss, params, batch, {})
        ends = curvature.extreme_eigenpairs(multiply, start, num_matvecs=NUM_MATVECS, top=2, bottom=2)
        pairs = [jnp.concatenate([getattr(end, name) for end in ends]) for name in ("values", "residuals")]
        return saddles.score_saddle(*pairs, gradient_norm=optax.tree.norm(slope), loss=value)

    return lambda params, seed: jax.tree.map(np.asarray, score(params, batch, seed))


def region_of(
    teachers: Sequence[SnapshotTeacher], student: Params, *, which: str, rule: str, resize: str, seed: int
) -> Region:
    """Makes a region of the snapshots of some teachers, in the shapes of a student.

    Where the rule finds no strong saddle of a teacher, its snapshot of strongest negative curvature stands in.

    Args:
      teachers: of one network.
      student: parameters, or their shapes.
      which: of each teacher's snapshots: its strong "saddle", the "last", a "random" one, or the "average" of all.
      rule: what counts as a strong saddle; a key of :data:`RULES`.
      resize: "select" or "crop"; see :func:`kdjax.saddles.select_weights`.
      seed: of the random choice.
    """
    chosen: list[saddles.Snapshot] = []
    found, kind = True, cast(Any, which)
    for teacher in teachers:
        listed = saddles.entries(teacher.repository, identity=teacher.identity)
        own = [entry for entry in listed if entry.teacher == teacher.name]
        if which == "average":
            kept = own
        elif which == "saddle" and not any(bool(RULES[rule](entry.score)) for entry in own):
            kept, found = [max(own, key=lambda e: float(e.score.negative_curvature_ratio))], False
        else:
            kept = saddles.choose(own, which=kind, rule=RULES[rule], key=jax.random.key(seed))
        more = {"like": teacher.trained.weights.params, "identity": teacher.identity}
        chosen += [saddles.read(teacher.repository, teacher.name, entry.step, **more) for entry in kept]
    params = saddles.select_weights(saddles.aggregate(chosen), student, form=cast(Any, resize))
    return Region(params, [snapshot.step for snapshot in chosen], found)


class Teachers(NamedTuple):
    """Weak and strong teachers of a study, trained or read back when they are first asked for.

    Attributes:
      weak: ``(seed, number)`` → a teacher that keeps snapshots, the ``number``-th of a student's seed.
      strong: ``number`` → a finished teacher.
      answers: ``(which, number)`` → the cached answers of the strong teacher ``number``, or of the weak one of a seed.
    """

    weak: Callable[[int, int], SnapshotTeacher]
    strong: Callable[[int], run.Trained]
    answers: Callable[[str, int], teachers.TeacherSignal]


def make_teachers(
    network: Network,
    dataset: data.Dataset,
    asked: data.Dataset,
    recipes: tuple[Recipe, Recipe],
    directory: Path,
    *,
    machine: Machine,
    split: str = "test",
    callbacks: Sequence[Callback] = (),
) -> Teachers:
    """Builds the teachers of a study. Processes that train side by side wait for each other.

    Args:
      network: of all teachers.
      dataset: that they learn.
      asked: whose images they are asked about.
      recipes: of a weak and of a strong teacher.
      directory: of the study.
      machine: of strong teachers. Dispatches of weak ones have 51 steps at most; each leaves a snapshot.
      split: that teachers are measured on.
      callbacks: of their trainings.
    """

    @functools.cache
    def weak_trainer() -> Callable[..., SnapshotTeacher]:
        closer = dataclasses.replace(machine, steps_per_dispatch=min(51, machine.steps_per_dispatch))
        return make_snapshot_trainer(network, dataset, recipes[0], machine=closer, split=split)

    @functools.cache
    def strong_trainer() -> Callable[..., run.Trained]:
        return run.make_trainer(network, methods.labels(), dataset, recipes[1], machine=machine, split=split)

    @functools.cache
    def weak(seed: int, number: int) -> SnapshotTeacher:
        home = directory / "weak" / f"{seed}.{number}"
        with files.lock(f"{home}.lock"):
            return weak_trainer()(10 * seed + number, home, callbacks)

    @functools.cache
    def strong(number: int) -> run.Trained:
        home = directory / "strong" / str(number)
        with files.lock(f"{home}.lock"):
            return strong_trainer()(number, home, arm="strong_teacher", callbacks=callbacks)

    @functools.cache
    def answers(which: str, number: int) -> teachers.TeacherSignal:
        teacher = strong(number) if which == "strong" else weak(number, 0).trained
        home = directory / "teacher_answers" / f"{which}{number}"
        with files.lock(f"{home}.lock"):
            return teachers.answers(teacher, asked, directory=home)

    return Teachers(weak, strong, answers)
