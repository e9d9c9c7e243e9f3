"""Saddle point recruitment in an experiment: teachers that leave snapshots, the regions made of them, and the arms."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common.objectives import scratch
from experiments.common.tasks import Task
from experiments.common.teachers import Teacher, train_teacher
from experiments.common.training import Recipe, identity_of, make_trainer
from kdjax import curvature, data, files, models, parallel, saddles, train, transforms
from kdjax.types import Params

NUM_MATVECS = 16  # of every look at a spectrum
SCORED_IMAGES = 128  # training images on which a teacher's snapshots are scored
RULES: dict[str, saddles.Rule] = {
    "magnitude": saddles.magnitude_rule,
    "ratio": saddles.ratio_rule,
    "both": saddles.both_rule,
    "extreme": saddles.extreme_rule,
    "gated": saddles.gated_rule,
    # No bound on the gradient, whose scale is that of the loss and of the network.
    "strong": functools.partial(saddles.gated_rule, max_gradient_norm=float("inf")),
}


class Watched(NamedTuple):
    """A teacher, and where its snapshots lie."""

    teacher: Teacher
    repository: Path
    name: str  # in the repository
    identity: dict[str, Any]  # of its snapshots


class Region(NamedTuple):
    """Student-shaped parameters, and how they came about."""

    params: Params
    steps: list[int]  # of the snapshots that it is made of
    strong: bool  # whether the rule found all of them; if not, one is the strongest that there was


def make_watcher(task: Task, name: str, recipe: Recipe, *, split: str = "test") -> Callable[..., Watched]:
    """Builds ``(seed, directory) -> Watched``: trains a teacher, and scores and keeps its state after every dispatch.

    Args:
      task: what to learn.
      name: of the teacher's network.
      recipe: of the teacher; ``steps_per_dispatch`` lie between two snapshots.
      split: on which the finished teacher is measured.
    """
    module = models.build(name, num_classes=task.source.num_classes)
    score = make_scorer(task, module)
    repository = Path()  # of the teacher under way

    made_from = identity_of(task, module, recipe)  # once, and not after every dispatch

    def identity(seed: int) -> dict[str, Any]:
        return {"run": "weak teacher", "seed": seed, **made_from}

    def keep(seed: int, state: train.TrainState, step: int) -> train.TrainState:
        params = jax.tree.map(np.asarray, state.params)
        saddles.add(repository, f"teacher{seed}", step, params, score(params, step), identity=identity(seed))
        return state

    trainer = make_trainer(task, module, scratch, recipe, split=split, between=keep)

    def watch(seed: int, directory: Path) -> Watched:
        nonlocal repository
        repository = directory / "saddles"
        trained = train_teacher(task, name, module, trainer, seed, directory / "teacher")
        _check_complete(directory, identity(seed))
        return Watched(trained, repository, f"teacher{seed}", identity(seed))

    return watch


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


def make_scorer(task: Task, module: Any) -> Callable[[Params, int], saddles.SaddleScore]:
    """Builds ``(params, seed) -> score`` on a sample of the training images, without dropout."""
    loss = curvature.evaluation_loss(models.apply_fn(module), scratch)
    ids = np.random.default_rng(0).permutation(task.split["train"])[:SCORED_IMAGES]
    batch = {
        "image": data.normalise(jnp.asarray(task.source.images[ids]), mean=task.mean, std=task.std),
        "label": jnp.asarray(task.source.labels[ids]),
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
    teachers: Sequence[Watched],
    student: Params,
    *,
    which: str,
    rule: str,
    form: str,
    seed: int,
) -> Region:
    """The approximated saddle region of some teachers, in the shapes of a student.

    Where the rule finds no strong saddle of a teacher, the snapshot whose negative curvature is strongest stands in.
    """
    chosen: list[saddles.Snapshot] = []
    found = True
    for watched in teachers:
        listed = saddles.entries(watched.repository, identity=watched.identity)
        own = [entry for entry in listed if entry.teacher == watched.name]
        read = functools.partial(
            saddles.read,
            watched.repository,
            watched.name,
            like=watched.teacher.weights.params,
            identity=watched.identity,
        )
        if which == "average":
            kept = own
        elif which == "saddle" and not any(bool(RULES[rule](entry.score)) for entry in own):
            kept, found = [max(own, key=lambda entry: float(entry.score.negative_curvature_ratio))], False
        else:
            kind: Any = which
            kept = saddles.choose(own, which=kind, rule=RULES[rule], key=jax.random.key(seed))
        chosen += [read(entry.step) for entry in kept]
    params = saddles.aggregate(chosen)
    shape: Any = form
    return Region(
        saddles.select_weights(params, student, form=shape), [snapshot.step for snapshot in chosen], found
    )


class Escape(NamedTuple):
    """How the recommended form looks for ways down; see :func:`kdjax.transforms.sprkd`."""

    period: int = 100
    escape_radius: float = 0.3
    perturbation_radius: float = 0.01
    negative_curvature_ratio: float = 0.1
    budget: int = 20


def with_escapes(
    region: Params | None, escape: Escape
) -> Callable[[optax.GradientTransformation], optax.GradientTransformation]:
    """The recommended form around an optimizer: smooth approach where there is a region, certified escapes."""

    def wrap(base):
        return transforms.sprkd(
            base,
            key=jax.random.key(0),
            num_matvecs=NUM_MATVECS,
            region=region,
            axis_name=parallel.AXIS,
            **escape._asdict(),
        )

    return wrap


def with_perturbations(
    region: Params | None, escape: Escape
) -> Callable[[optax.GradientTransformation], optax.GradientTransformation]:
    """The recommended form without its eigensteps: perturbations of the same length, kept if the loss falls."""

    def wrap(base):
        noise = transforms.perturb(
            period=escape.period, key=jax.random.key(0), radius=escape.perturbation_radius
        )
        parts = [base, transforms.accept_if_better(noise, axis_name=parallel.AXIS)]
        return optax.chain(*parts, *([] if region is None else [transforms.approach_region(region)]))

    return wrap


def as_published(region: Params) -> Callable[[optax.GradientTransformation], optax.GradientTransformation]:
    """The published form: approach by l·T, then eigensteps and perturbations that are kept if the loss falls."""

    def wrap(base):
        trial = optax.chain(
            transforms.negative_eigenstep(
                period=20, key=jax.random.key(0), num_matvecs=NUM_MATVECS, axis_name=parallel.AXIS
            ),
            transforms.perturb(period=20, key=jax.random.key(1), sigma=0.1**0.5),
        )
        return optax.chain(
            base,
            transforms.accept_if_better(trial, axis_name=parallel.AXIS),
            transforms.approach_region(region, form="published"),
        )

    return wrap


def towards(region: Params) -> Callable[[int, train.TrainState], train.TrainState]:
    """Lets a run of a wrapped optimizer, compiled for any region of these shapes, approach this one."""
    copied = jax.tree.map(lambda x: np.asarray(x, np.float32), region)

    def begin(seed: int, state: train.TrainState) -> train.TrainState:
        del seed
        return state._replace(opt_state=optax.tree.set(state.opt_state, region=copied))

    return begin


def spent(before: optax.OptState, after: optax.OptState) -> Mapping[str, jax.Array]:
    """What one update has accepted, and cost: Hessian-vector products and losses, whichever form has made it."""

    def total(state):
        def one(name):
            return optax.tree.get(state, name, jnp.zeros((), jnp.int32))

        accepted = optax.tree.get(state, "events", one("accepted"))
        return {"events": accepted, "hvps": one("hvps"), "evaluations": one("evaluations")}

    return jax.tree.map(lambda new, old: (new - old).astype(jnp.float32), total(after), total(before))
