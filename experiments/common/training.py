"""How a network is trained, whatever it is trained on: a recipe, and the function of a seed that follows it."""

import contextlib
import functools
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common.arms import companion_initialiser
from experiments.common.launching import alone, bar, say
from experiments.common.tasks import Task, shown
from kdjax import checkpoints, data, evaluate, files, models, parallel, teacher, train, transforms
from kdjax.types import ApplyFn, Batch

OPTIMIZERS = {
    "adam": lambda recipe, rate: optax.adamw(rate, weight_decay=recipe.weight_decay),
    "sgd": lambda recipe, rate: optax.chain(
        optax.add_decayed_weights(recipe.weight_decay), optax.sgd(rate, momentum=recipe.momentum)
    ),
}
SCHEDULES = {
    "constant": lambda rate, steps: optax.constant_schedule(rate),
    "cosine": lambda rate, steps: optax.cosine_decay_schedule(rate, steps),
    # 150, 180 and 210 of 240 epochs: the schedule of the CRD benchmark, at any length
    "step": lambda rate, steps: optax.piecewise_constant_schedule(
        rate, {round(steps * part): 0.1 for part in (0.625, 0.75, 0.875)}
    ),
}


LEAST_RATE = 1e-12  # of a learning rate flag: at 0 nothing is learnt, and yet it is reported


class Recipe(NamedTuple):
    """How a network is trained, whatever it is trained on."""

    epochs: int
    batch_size: int
    learning_rate: float
    optimizer: str = "adam"
    schedule: str = "constant"
    weight_decay: float = 0.0
    momentum: float = 0.9
    ema: float = 0.0  # decay of the averaged parameters that are evaluated; 0 evaluates the last ones
    accumulate: int = 1  # batches per update
    padding: int = 0  # pixels of the random crop
    flip: bool = False
    mixup: float = 0.0
    max_norm: float = 0.0  # of the incoming weights of a unit; 0 leaves them free
    evaluate_every: int = 1
    steps_per_dispatch: int = 32
    save_every_s: float = 60.0


Move = Callable[[jax.Array, jax.Array], jax.Array]  # (images, keys) -> images cropped and flipped


class Taught(NamedTuple):
    """How a teacher reaches the student: by stored columns, or by running in the step on the student's own input."""

    columns: Mapping[str, np.ndarray] | None = None  # [examples, views, ...] each
    views: int = 1
    online: teacher.TeacherFn | None = None  # of normalised images
    weights: train.Weights | None = None
    maps: tuple[str, ...] = ()  # columns that are maps of the one stored view: they move with their image
    choose: Callable[[Batch, jax.Array, Move], jax.Array] | None = (
        None  # each example's key, by what it would show
    )
    blend: Callable[[Batch, jax.Array], jax.Array] | None = None  # pixels, from the moved batch and its keys
    identity: Mapping[str, Any] = {}  # of the teacher and of how it is asked


def make_optimizer(recipe: Recipe, *, steps: int) -> optax.GradientTransformation:
    """The recipe's Optax chain for a run of ``steps`` batches."""
    updates = steps // recipe.accumulate
    tx = OPTIMIZERS[recipe.optimizer](recipe, SCHEDULES[recipe.schedule](recipe.learning_rate, updates))
    if recipe.max_norm:
        tx = optax.chain(tx, transforms.max_norm(recipe.max_norm))
    if recipe.ema:
        tx = optax.chain(tx, transforms.parameter_ema(recipe.ema))
    return optax.MultiSteps(tx, recipe.accumulate).gradient_transformation() if recipe.accumulate > 1 else tx


def check_recipe(task: Task, recipe: Recipe, *, of: str = "the students'") -> None:
    """Raises a ValueError if the recipe would never update a weight, or its optimizer refuses a setting."""
    batches = max(len(task.split["train"]) // recipe.batch_size, 1) * recipe.epochs
    if batches < recipe.accumulate:
        raise ValueError(
            f"--accumulate={recipe.accumulate} takes more batches for one update than {of} whole training has, which "
            f"is {batches}; use --accumulate={batches} or less, or more epochs."
        )
    make_optimizer(recipe, steps=batches)


VIEW_SEED = 20_231  # of the stored views; part of every column's header


def make_batches(task: Task, recipe: Recipe, taught: Taught) -> tuple[Callable, Callable]:
    """Builds what turns indices into batches inside the step: one function for training, one for evaluation."""
    move = {"padding": recipe.padding, "flip": recipe.flip}

    def pixels(batch):
        return batch | {"image": data.normalise(batch["image"], mean=task.mean, std=task.std)}

    def with_columns(resident, batch, view):
        if taught.columns is not None:
            batch |= teacher.gather(resident["columns"], batch["index"], view)
        return batch

    def with_teacher(resident, batch):
        if taught.online is not None:
            batch = teacher.online(taught.online, resident["teacher"], batch)
        return batch

    def moved(images, keys):
        return data.crop_and_flip(images, keys, **move)

    def train_batch(resident, index, key):
        batch = data.gather(resident["data"], index)
        example_key, mixup_key = jax.random.split(key)
        keys = data.example_keys(example_key, index)
        view = jnp.zeros_like(index)
        if taught.views > 1:
            view = jax.vmap(lambda k: jax.random.randint(k, (), 0, taught.views))(keys)
            batch["image"] = data.stored_view(batch["image"], index, view, seed=VIEW_SEED, **move)
        batch = with_columns(resident, batch, view)
        if taught.views == 1:
            if taught.choose is not None:
                keys = taught.choose(batch, keys, moved)
            side = batch["image"].shape[1]
            batch["image"] = moved(batch["image"], keys)
            for name in taught.maps:
                batch[name] = moved_map(batch[name], keys, moved, side=side)
        if taught.blend is not None:
            batch["image"] = taught.blend(batch, keys)
        batch = pixels(batch)
        if recipe.mixup:
            batch["image"], batch["partner"], batch["share"] = data.mixup(
                batch["image"], mixup_key, alpha=recipe.mixup
            )
        return with_teacher(resident, batch)

    def evaluation_batch(resident, index):
        batch = pixels(data.gather(resident["data"], index))
        return with_teacher(resident, with_columns(resident, batch, 0))

    return train_batch, evaluation_batch


def moved_map(maps: jax.Array, keys: jax.Array, move: Move, *, side: int) -> jax.Array:
    """Maps of any size that divides the images' ``side``, moved as these are; small ones by parts of a position."""
    times = side // maps.shape[1]
    if times == 1:
        return move(maps, keys)
    large = jnp.repeat(jnp.repeat(maps.astype(jnp.float32), times, axis=1), times, axis=2)
    cells = move(large, keys).reshape(len(maps), maps.shape[1], times, maps.shape[2], times, -1)
    return jnp.mean(cells, axis=(2, 4))


Watcher = Callable[[str, Mapping[str, float]], None]
_watchers: list[Watcher] = []


@contextlib.contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Calls ``watcher(label, record)`` after every epoch of every training within.

    This is how a sweep stops what leads nowhere and how TensorBoard is fed, without trainers or experiments knowing of
    them. What the watcher raises ends the training; its checkpoints stay. The record is the epoch's in the history and
    its ``step``. A training that is continued, or was finished before, begins with the newest record that it had.
    """
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


@contextlib.contextmanager
def tensorboard(directory: Path) -> Iterator[None]:
    """Writes what is trained within for TensorBoard: ``<arm>/<seed>`` under ``directory``, a point per epoch.

    A training that is continued begins another file; its first entry voids what the files before it hold from its step
    on (``purge_step``), so that no point is there twice.

    Raises:
      ValueError: if tensorboardX is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ValueError("--tensorboard needs tensorboardX: pip install 'kdjax[tensorboard]'.") from error
    writers: dict[str, SummaryWriter] = {}  # of the training under way; at most one

    def close() -> None:
        while writers:
            writers.popitem()[1].close()

    def write(label: str, record: Mapping[str, float]) -> None:
        if jax.process_index() > 0:
            return
        step = int(record["step"])
        if label not in writers:
            close()
            arm, seed = label.rsplit(", seed ", 1)
            # Files are named by the second, in which a training may be stopped and continued; the later would
            # overwrite the earlier.
            writers[label] = SummaryWriter(
                str(directory / arm / seed), purge_step=step, filename_suffix=f".{step:09d}"
            )
        for name in sorted(record.keys() - {"epoch", "step"}):
            tag = name.replace("validation_", "validation/") if "validation" in name else f"training/{name}"
            writers[label].add_scalar(tag, record[name], step)
        writers[label].flush()  # before the checkpoint of this epoch, so that none is missing after a kill

    with watched(write):
        try:
            yield
        finally:
            close()


@contextlib.contextmanager
def shelf(store: str | None, own: Path, task: Task, **decides: Any) -> Iterator[Path]:
    """The directory ``own``; or one in ``store`` that all runs share whose data and ``decides`` are equal.

    It is held while it is filled, so that what two runs need at the same time is computed by one of them.
    """
    directory = own
    if store is not None:
        directory = Path(store) / files.digest_json({"data": task.fingerprint, **decides})[:16]
    with alone(directory.with_name(f"{directory.name}.lock")):
        yield directory


class Trained(NamedTuple):
    """One finished training run."""

    module: Any
    fitted: train.Fitted
    metrics: dict[str, float]  # on the split that was asked for; best_...: of the epoch best in validation
    sums: dict[str, np.ndarray]  # from which the metrics of the last epoch follow
    seconds: float

    @property
    def weights(self) -> train.Weights:
        """Those of the last epoch."""
        return self.fitted.last

    @property
    def history(self) -> list[dict[str, float]]:
        """One record per epoch."""
        return self.fitted.history

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader of its numbers should know."""
        return self.fitted.notes


def identity_of(task: Task, module: Any, recipe: Recipe) -> dict[str, Any]:
    """What decides a training, beside its objective, its teacher and its seed."""
    return {
        "data": task.fingerprint,
        "normalisation": [list(task.mean), list(task.std)],
        "network": models.describe(module),
        "recipe": recipe._replace(save_every_s=0)._asdict(),
    }


def make_trainer(
    task: Task,
    module: Any,
    objective: train.Objective,
    recipe: Recipe,
    taught: Taught | None = None,
    heads: Any = None,
    *,
    split: str = "test",
    wrap: Callable[[optax.GradientTransformation], optax.GradientTransformation] = lambda tx: tx,
    begin: Callable[[int, train.TrainState], train.TrainState] = lambda seed, state: state,
    record: Callable[[Any, Any], Mapping[str, jax.Array]] = lambda before, after: {},
    second: bool = False,
    between: Callable[[int, train.TrainState, int], train.TrainState] = lambda seed, state, step: state,
    sees: Callable[[ApplyFn], ApplyFn] = lambda apply_fn: apply_fn,
) -> Callable[..., Trained]:
    """Builds ``(seed, directory, label, settings={}) -> Trained``; its programs are compiled once for all seeds.

    The directory ends with ``checkpoints/``, ``summary_<split>.json``, ``weights/`` and ``network.json``. A finished
    run is read back, not run again, where these are whole and were written for this label, seed, network, recipe, data,
    teacher and ``settings`` (whatever else decides its numbers). ``heads`` is a module of further terms, as
    :func:`experiments.common.arms.make_arm` makes it. The final metrics are measured on ``split``: with ``validation``
    nothing is ever asked of the test split.

    ``wrap`` puts a transformation around the recipe's optimizer, ``begin(seed, state)`` returns the state that a run
    starts from, ``between(seed, state, step)`` the one that it goes on with after a dispatch, ``record`` and ``second``
    are those of :func:`kdjax.train.make_train_step` and ``make_run``. ``sees`` makes of the student what the objective
    is shown in training, with further features.
    """
    taught = taught or Taught()
    apply_fn = models.apply_fn(module)
    parallel.check_batch_size(recipe.batch_size, task.devices)
    train_batch, evaluation_batch = make_batches(task, recipe, taught)
    resident = {"data": task.arrays, "columns": taught.columns, "teacher": taught.weights}
    resident = parallel.replicate(resident, task.devices)
    steps = max(len(task.split["train"]) // recipe.batch_size, 1) * recipe.epochs
    tx = wrap(make_optimizer(recipe, steps=steps))
    step = train.make_train_step(
        sees(apply_fn),
        objective,
        tx,
        heads=None if heads is None else models.apply_fn(heads),
        record=record,
        axis_name=parallel.AXIS,
    )
    run = parallel.data_parallel(
        train.make_run(step, train_batch, second=second),
        replicated=2,
        devices=task.devices,
        donate_first=True,
    )

    def weights_of(state: train.TrainState) -> train.Weights:
        if recipe.ema:
            state = state._replace(params=optax.tree.get(state.opt_state, "ema"))
        return train.weights_of(state) if heads is None else train.student_of(state)

    if heads is not None:
        batch = example_batch(train_batch, resident)
        init_companions = companion_initialiser(heads, shown(module, task), batch)
    sums_on = {
        name: make_evaluator(task, apply_fn, evaluation_batch, resident, name)
        for name in {"validation", split}
    }

    def validate(params, model_state):
        scores = evaluate.summarise(sums_on["validation"](params, model_state))
        return {name: scores[name] for name in ("accuracy", "loss")}

    def trainer(seed: int, directory: Path, label: str, settings: Mapping[str, Any] | None = None) -> Trained:
        start = time.monotonic()
        identity = {"run": label, "seed": seed, **identity_of(task, module, recipe)}
        identity |= {"teacher": dict(taught.identity), "settings": dict(settings or {})}
        params, model_state = models.init(module, task.source.images.shape[1:], seed=seed)
        if heads is not None:
            more, kept = init_companions(seed)
            params = {"student": params, "heads": more}
            model_state = {"student": model_state, "heads": kept}
        state = begin(seed, train.init_state(params, model_state, tx, seed=seed))
        state = parallel.replicate(state, task.devices)
        feed = data.resident_feed(
            resident,
            task.split["train"],
            seed=seed,
            batch_size=recipe.batch_size,
            steps_per_dispatch=recipe.steps_per_dispatch,
            rows_of=parallel.process_rows,
        )

        watched_epoch = 0.0

        def watch(record: Mapping[str, float]) -> None:
            nonlocal watched_epoch
            if record and record["epoch"] > watched_epoch:
                watched_epoch = record["epoch"]
                for watcher in _watchers:
                    watcher(label, {**record, "step": record["epoch"] * feed.steps_per_epoch})

        with bar(label, total=steps, unit="step") as meter:

            def progress(done: int, record: Mapping[str, float]) -> None:
                meter.update(done)
                meter.set_postfix(
                    {k: f"{v:.4g}" for k, v in record.items() if k in ("loss", "validation_accuracy")}
                )
                watch(record)

            fitted = train.fit(
                run,
                state,
                feed,
                epochs=recipe.epochs,
                evaluate=validate,
                evaluate_every=recipe.evaluate_every,
                weights_of=weights_of,
                directory=directory / "checkpoints",
                identity=identity,
                save_every_s=recipe.save_every_s,
                between=functools.partial(between, seed),
                progress=progress,
            )
        newest = fitted.history[-1]
        watch(newest)
        say(f"{label}: loss {newest['loss']:.4g}, validation accuracy {newest['validation_accuracy']:.2%}")

        def measure() -> dict[str, Any]:
            sums, best = (sums_on[split](*weights) for weights in (fitted.last, fitted.best))
            metrics, of_best = evaluate.summarise(sums), evaluate.summarise(best)
            return {
                "split": split,
                "metrics": metrics | {f"best_{name}": of_best[name] for name in ("accuracy", "loss")},
                "sums": {name: np.asarray(value).tolist() for name, value in sums.items()},
                "best_epoch": fitted.best_epoch,
                "history": fitted.history,
            }

        found = files.cached(
            directory / f"summary_{split}.json",  # a sweep asks one teacher about both splits
            measure,
            identity={**identity, "split": split, "weights": checkpoints.digest_tree(fitted.last)},
            writes=jax.process_index() == 0,
        )
        save_network(directory, task, module, fitted.last, step=steps, summary=found, identity=identity)
        sums = {name: np.asarray(value) for name, value in found["sums"].items()}
        return Trained(module, fitted, found["metrics"], sums, time.monotonic() - start)

    return trainer


def save_network(
    directory: Path,
    task: Task,
    module: Any,
    weights: train.Weights,
    *,
    step: int,
    summary: Mapping[str, Any],
    identity: Mapping[str, Any],
) -> None:
    """Leaves a finished network in a directory so that it can be used by itself, as a teacher for instance.

    ``weights/`` are written where they are not there whole; ``network.json`` says what using them needs: architecture,
    preprocessing, class names, how good it was on which split, and the digest of the weights.
    """
    checkpoints.save(directory / "weights", step, weights, meta={}, identity=identity)
    description = {
        "network": models.describe(module),
        "class_names": list(task.source.class_names),
        "image_shape": list(task.source.images.shape[1:]),
        "mean": list(task.mean),
        "std": list(task.std),
        "split": summary["split"],
        "metrics": summary["metrics"],
        "weights": checkpoints.digest_tree(weights),
    }
    if jax.process_index() == 0:
        files.write_sealed(directory / "network.json", description, identity=identity)


def example_batch(train_batch: Callable, resident: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch of two, as the train step sees it."""
    index = jax.ShapeDtypeStruct((2,), jnp.int32)
    return jax.eval_shape(train_batch, resident, index, jax.random.key(0)) | {
        "step": jax.ShapeDtypeStruct((), jnp.int32)
    }


def make_evaluator(
    task: Task, apply_fn: Any, evaluation_batch: Callable, resident: Any, split: str, **options: Any
) -> Callable:
    """Sums over one split."""
    ids = task.split[split]
    size = batch_size_for(task, len(ids))
    return evaluate.make_evaluator(
        apply_fn, evaluation_batch, resident, ids, batch_size=size, devices=task.devices, **options
    )


def batch_size_for(task: Task, num_examples: int) -> int:
    """Size of few, equal batches of at most about a thousand: little padding, bounded memory."""
    shards = len(task.devices) * jax.process_count()
    return math.ceil(num_examples / math.ceil(num_examples / 1000) / shards) * shards


def check_disk(task: Task, workdir: Path, runs: Mapping[Any, int], *, column_bytes: int) -> None:
    """Raises a ValueError if the disk has less room than the runs' checkpoints and columns will need.

    The workdir need not be there yet. ``runs`` maps a network to how many of it are trained. A run keeps two
    checkpoints of parameters, two moments and the best parameters, and its final weights; one more is there while it is
    written. ``column_bytes`` is what a teacher's stored columns take.
    """
    shape = task.source.images.shape[1:]
    parameters = sum(
        n * models.count_parameters(models.init(module, shape, seed=0)[0]) for module, n in runs.items()
    )
    needed = 4 * 13 * parameters + column_bytes + 2**24
    there = next(path for path in (workdir.absolute(), *workdir.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ValueError(
            f"this run needs about {needed / 2**20:.0f} MiB in {workdir}, the disk has {free / 2**20:.0f} MiB left; "
            "free some space, or name a --workdir on another disk; --teacher_mode=online stores no columns."
        )
