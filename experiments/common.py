"""What every experiment does around its question: one sentence per error, one workdir per run, one recipe for training.

No flags are defined here, so that any experiment may import it, and nothing here decides what is measured.
"""

import contextlib
import errno
import json
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from tqdm import tqdm

from kdjax import (
    checkpoints,
    data,
    evaluate,
    files,
    models,
    parallel,
    report,
    results,
    significance,
    teacher,
    train,
    transforms,
)

# ---------------------------------------------------------------------------------------------- launching

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def launch(main: Callable[[], None]) -> None:
    """Parses the flags and runs ``main``; whatever is wrong with its input becomes one sentence and exit code 2."""

    def guarded(argv: Sequence[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax reports every save at the level of information
        warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
        cache = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
        if not jax.config.values["jax_compilation_cache_dir"]:
            jax.config.update("jax_compilation_cache_dir", f"{cache}/kdjax/xla")
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        try:
            if len(argv) > 1:
                raise ValueError(
                    f"unexpected arguments {argv[1:]}: every option is a flag, as in --workdir=runs/one."
                )
            main()
        except (ValueError, train.NonFiniteLoss) as error:
            _refuse(str(error))
        except ImportError as error:
            _refuse(f"{error}. Install what the experiments need: pip install 'kdjax[experiments]'.")
        except OSError as error:
            if error.errno is None:  # a full sentence already
                _refuse(str(error))
            if error.errno in _FULL_DISK:
                _refuse(f"the disk is full ({error}). Free some space and start the same command again.")
            _refuse(f"{error.strerror or error}: {error.filename or 'no file named'}.")

    app.run(guarded)


def _refuse(sentence: str) -> None:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


def claim_workdir(path: str, settings: Mapping[str, Any]) -> Path:
    """Makes the workdir this run's own, or takes it up again if an equal run was begun there.

    Raises:
      ValueError: if it holds a run with other settings, or files of something else.
    """
    workdir, record = Path(path), Path(path) / "run.json"
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir={path} is a file; name a directory.")
    wanted = json.loads(json.dumps(settings))
    if record.exists():
        there = json.loads(record.read_text())
        other = [key for key in sorted(wanted.keys() | there.keys()) if wanted.get(key) != there.get(key)]
        if other:
            differences = ", ".join(
                f"{key} {there.get(key)!r} there and {wanted.get(key)!r} here" for key in other[:4]
            )
            raise ValueError(
                f"--workdir={path} holds another run ({differences}); name another directory, or delete that one."
            )
    elif workdir.exists() and any(workdir.iterdir()):
        raise ValueError(f"--workdir={path} holds files of something else; name an empty or a new directory.")
    elif jax.process_index() == 0:
        files.write_json(record, wanted)
    _lock(workdir)
    return workdir


_locks: list[Any] = []  # open until the process ends


def _lock(workdir: Path) -> None:
    """Holds the workdir for this process; a ValueError if another one is at work there."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    if jax.process_index() > 0:
        return
    handle = open(workdir / ".lock", "w")  # noqa: SIM115
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        raise ValueError(
            f"--workdir={workdir} is in use by another process; wait for it, or name another directory."
        ) from None
    _locks.append(handle)


# --------------------------------------------------------------------------------------------------- data


class Task(NamedTuple):
    """A data set as one run sees it: the examples it uses, their split, and their arrays on the devices."""

    source: data.Source
    split: dict[str, np.ndarray]
    arrays: dict[str, jax.Array]  # image uint8, label int32, on every device
    mean: tuple[float, ...]
    std: tuple[float, ...]
    devices: list[jax.Device]
    perturbed: np.ndarray  # ids of the training examples that were given a wrong label


def make_task(
    dataset: str,
    *,
    data_dir: str | None,
    devices: int | None = None,
    num_train: int | None = None,
    num_validation: int | None = None,
    label_noise: float = 0.0,
) -> Task:
    """Loads a data set, keeps the examples that the run will use, and puts them on the devices."""
    source = data.load(dataset, data_dir=data_dir)
    pattern = data.GROUP_PATTERNS.get(source.name)  # images of one patient never lie on both sides of a split
    split = data.split_ids(source, groups=data.groups_of(source, pattern) if pattern else None)
    split["train"] = _sample(split["train"], num_train, "--num_train")
    split["validation"] = _sample(split["validation"], num_validation, "--num_validation")
    used = np.sort(np.concatenate(list(split.values())))
    source = data.take(source, used)
    split = {name: np.searchsorted(used, ids) for name, ids in split.items()}
    perturbed = np.zeros(0, np.int64)
    if label_noise:
        source, perturbed = data.with_label_noise(source, split["train"], fraction=label_noise, seed=0)
    mean, std = data.channel_statistics(source.images[split["train"]])
    local = parallel.local_devices(devices)
    arrays = parallel.replicate({"image": source.images, "label": source.labels}, local)
    return Task(source, split, arrays, mean, std, local, perturbed)


def build(name: str, task: Task, **fields: Any) -> Any:
    """The network ``name`` for this task's classes; a ValueError if it does not take this task's images.

    Batch normalisation takes its statistics over all devices, so that their number changes nothing.
    """
    network = models.build(name, num_classes=task.source.num_classes, **fields)
    if hasattr(network, "axis_name"):
        network = network.clone(axis_name=parallel.AXIS)
    models.init(network, task.source.images.shape[1:], seed=0)
    return network


def _sample(ids: np.ndarray, count: int | None, flag: str) -> np.ndarray:
    """``count`` of the ids, the same every time; a smaller sample is part of a larger one."""
    if count is None:
        return ids
    if not 1 <= count <= len(ids):
        raise ValueError(f"{flag}={count} is not between 1 and the {len(ids)} examples of that split.")
    return np.sort(np.random.default_rng(0).permutation(ids)[:count])


# ------------------------------------------------------------------------------------------------ training

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
    evaluate_every: int = 1
    steps_per_dispatch: int = 32
    save_every_s: float = 60.0


class Taught(NamedTuple):
    """How a teacher reaches the student: by stored columns, or by running in the step on the student's own input."""

    columns: Mapping[str, np.ndarray] | None = None  # [examples, views, ...] each
    views: int = 1
    online: teacher.TeacherFn | None = None  # of normalised images
    weights: train.Weights | None = None


def make_optimizer(recipe: Recipe, *, steps: int) -> optax.GradientTransformation:
    """The recipe's Optax chain for a run of ``steps`` batches."""
    updates = steps // recipe.accumulate
    tx = OPTIMIZERS[recipe.optimizer](recipe, SCHEDULES[recipe.schedule](recipe.learning_rate, updates))
    if recipe.ema:
        tx = optax.chain(tx, transforms.parameter_ema(recipe.ema))
    return optax.MultiSteps(tx, recipe.accumulate).gradient_transformation() if recipe.accumulate > 1 else tx


VIEW_SEED = 20_231  # of the stored views; part of every column's header


def make_batches(task: Task, recipe: Recipe, taught: Taught) -> tuple[Callable, Callable]:
    """Builds what turns indices into batches inside the step: one function for training, one for evaluation."""
    move = {"padding": recipe.padding, "flip": recipe.flip}

    def pixels(batch):
        return batch | {"image": data.normalise(batch["image"], mean=task.mean, std=task.std)}

    def with_teacher(resident, batch, view):
        if taught.columns is not None:
            batch |= teacher.take(resident["columns"], batch["index"], view)
        if taught.online is not None:
            batch = teacher.online(taught.online, resident["teacher"], batch)
        return batch

    def train_batch(resident, index, key):
        batch = data.gather(resident["data"], index)
        example_key, mixup_key = jax.random.split(key)
        keys = data.example_keys(example_key, index)
        view = jnp.zeros_like(index)
        if taught.views > 1:
            view = jax.vmap(lambda k: jax.random.randint(k, (), 0, taught.views))(keys)
            batch["image"] = data.stored_view(batch["image"], index, view, seed=VIEW_SEED, **move)
        else:
            batch["image"] = data.crop_and_flip(batch["image"], keys, **move)
        batch = pixels(batch)
        if recipe.mixup:
            batch["image"], batch["partner"], batch["share"] = data.mixup(
                batch["image"], mixup_key, alpha=recipe.mixup
            )
        return with_teacher(resident, batch, view)

    def evaluation_batch(resident, index):
        return with_teacher(resident, pixels(data.gather(resident["data"], index)), 0)

    return train_batch, evaluation_batch


class Trained(NamedTuple):
    """One finished training run."""

    fitted: train.Fitted
    metrics: dict[str, float]  # on the test split: of the last epoch, and with the prefix best_ by validation
    seconds: float


def make_trainer(
    task: Task, module: Any, objective: train.Objective, recipe: Recipe, taught: Taught | None = None
) -> Callable[..., Trained]:
    """Builds ``(seed, directory, label) -> Trained``; its programs are compiled once for all seeds.

    The directory ends with ``checkpoints/`` and ``summary.json``; a run that has both is read back, not run again.
    """
    taught = taught or Taught()
    apply_fn = models.apply_fn(module)
    parallel.check_batch_size(recipe.batch_size, task.devices)
    train_batch, evaluation_batch = make_batches(task, recipe, taught)
    resident = {"data": task.arrays, "columns": taught.columns, "teacher": taught.weights}
    resident = parallel.replicate(resident, task.devices)
    steps = max(len(task.split["train"]) // recipe.batch_size, 1) * recipe.epochs
    tx = make_optimizer(recipe, steps=steps)
    step = train.make_train_step(apply_fn, objective, tx, axis_name=parallel.AXIS)
    run = parallel.data_parallel(
        train.make_run(step, train_batch), replicated=2, devices=task.devices, donate_first=True
    )
    params_of = (
        (lambda state: optax.tree.get(state.opt_state, "ema")) if recipe.ema else lambda state: state.params
    )
    sums_on = {
        name: _evaluator(task, apply_fn, evaluation_batch, resident, name) for name in ("validation", "test")
    }

    def validate(params, model_state):
        scores = evaluate.summarise(sums_on["validation"](params, model_state))
        return {name: scores[name] for name in ("accuracy", "loss")}

    def trainer(seed: int, directory: Path, label: str) -> Trained:
        start = time.monotonic()
        params, model_state = models.init(module, task.source.images.shape[1:], seed=seed)
        state = parallel.replicate(train.init_state(params, model_state, tx, seed=seed), task.devices)
        feed = data.resident_feed(
            resident,
            task.split["train"],
            seed=seed,
            batch_size=recipe.batch_size,
            steps_per_dispatch=recipe.steps_per_dispatch,
            rows_of=parallel.process_rows,
        )

        with bar(label, total=steps, unit="step") as meter:

            def progress(done: int, record: Mapping[str, float]) -> None:
                meter.update(done)
                meter.set_postfix(
                    {k: f"{v:.4g}" for k, v in record.items() if k in ("loss", "validation_accuracy")}
                )

            fitted = train.fit(
                run,
                state,
                feed,
                epochs=recipe.epochs,
                evaluate=validate,
                evaluate_every=recipe.evaluate_every,
                params_of=params_of,
                directory=directory / "checkpoints",
                save_every_s=recipe.save_every_s,
                progress=progress,
            )
        newest = fitted.history[-1]
        say(f"{label}: loss {newest['loss']:.4g}, validation accuracy {newest['validation_accuracy']:.2%}")
        metrics = evaluate.summarise(sums_on["test"](*fitted.last))
        best = evaluate.summarise(sums_on["test"](*fitted.best))
        metrics |= {f"best_{name}": best[name] for name in ("accuracy", "loss")}
        checkpoints.save(directory / "weights", steps, fitted.last, meta={})
        summary = {
            "metrics": metrics,
            "best_epoch": fitted.best_epoch,
            "history": fitted.history,
            "weights": checkpoints.digest_tree(fitted.last),
        }
        if jax.process_index() == 0:
            files.write_json(directory / "summary.json", summary)
        return Trained(fitted, metrics, time.monotonic() - start)

    return trainer


def _evaluator(task: Task, apply_fn: Any, evaluation_batch: Callable, resident: Any, split: str) -> Callable:
    """Sums over one split, in few, equal batches of at most about a thousand: little padding, bounded memory."""
    ids, shards = task.split[split], len(task.devices) * jax.process_count()
    size = math.ceil(len(ids) / math.ceil(len(ids) / 1000) / shards) * shards
    return evaluate.make_evaluator(
        apply_fn, evaluation_batch, resident, ids, batch_size=size, devices=task.devices
    )


def check_disk(task: Task, workdir: Path, runs: Mapping[Any, int]) -> None:
    """Raises a ValueError if the disk has less room than the runs' checkpoints and columns will need.

    ``runs`` maps a network to how many of it are trained. A run keeps two checkpoints of parameters, two moments and
    the best parameters, and its final weights; one more is there while it is written.
    """
    shape = task.source.images.shape[1:]
    parameters = sum(
        n * models.count_parameters(models.init(module, shape, seed=0)[0]) for module, n in runs.items()
    )
    needed = 4 * (13 * parameters + task.source.num_classes * len(task.source.images)) + 2**24
    free = shutil.disk_usage(workdir).free
    if free < needed:
        raise ValueError(
            f"this run needs about {needed / 2**20:.0f} MiB in {workdir}, the disk has {free / 2**20:.0f} MiB left; "
            "free some space, or name a --workdir on another disk."
        )


@contextlib.contextmanager
def bar(label: str, *, total: int, unit: str) -> Iterator[tqdm]:
    """A progress bar on the terminal of the first process; nothing in a log."""
    with tqdm(
        total=total, desc=label, unit=unit, disable=None if jax.process_index() == 0 else True, leave=False
    ) as meter:
        yield meter


def say(text: str) -> None:
    """Prints from the first process alone."""
    if jax.process_index() == 0:
        print(text, flush=True)


# ------------------------------------------------------------------------------------------------ teachers


class Teacher(NamedTuple):
    """A trained network with the normalisation it was trained under."""

    apply_fn: Any
    weights: train.Weights
    mean: tuple[float, ...]
    std: tuple[float, ...]
    metrics: dict[str, float]
    history: list[dict[str, float]]


def train_teacher(
    task: Task, name: str, module: Any, trainer: Callable[..., Trained], seed: int, directory: Path
) -> Teacher:
    """Trains a teacher and leaves beside its weights what :func:`load_teacher` needs to take it up again.

    Args:
      task: what to learn.
      name: of the network in ``models.MODELS``.
      module: the network.
      trainer: built by :func:`make_trainer` for it.
      seed: of initialisation and order.
      directory: of this teacher.
    """
    trained = trainer(seed, directory, f"teacher, seed {seed}")
    description = {
        "model": name,
        "num_classes": task.source.num_classes,
        "class_names": list(task.source.class_names),
        "image_shape": list(task.source.images.shape[1:]),
        "mean": list(task.mean),
        "std": list(task.std),
    }
    if jax.process_index() == 0:
        files.write_json(directory / "network.json", description)
    fitted = trained.fitted
    return Teacher(models.apply_fn(module), fitted.last, task.mean, task.std, trained.metrics, fitted.history)


def load_teacher(task: Task, directory: str, **fields) -> Teacher:
    """Takes up a teacher that an earlier run trained, and measures it on this task.

    Raises:
      ValueError: if there is none, or it tells other classes apart or takes other images than this task has.
    """
    path = Path(directory)
    if not (path / "network.json").exists():
        raise ValueError(
            f"--teacher_dir={directory} holds no finished teacher (network.json is missing); name a directory such as "
            "runs/one/teacher/0 of a run whose teacher is trained."
        )
    there = json.loads((path / "network.json").read_text())
    if there["num_classes"] != task.source.num_classes:
        raise ValueError(
            f"the teacher in {directory} tells {there['num_classes']} classes apart, {task.source.name} has "
            f"{task.source.num_classes}; soft targets need the same classes, so train a teacher on this data set."
        )
    shape = tuple(there["image_shape"])
    if shape != task.source.images.shape[1:]:
        raise ValueError(
            f"the teacher in {directory} takes images of shape {shape}, {task.source.name} has "
            f"{task.source.images.shape[1:]}; resize the data, or train a teacher on this data set."
        )
    module = models.build(there["model"], num_classes=there["num_classes"], **fields)
    found = checkpoints.restore(path / "weights", train.Weights(*models.init(module, shape, seed=0)))
    if found is None:
        raise ValueError(f"--teacher_dir={directory} holds no weights; start the run that trained it again.")
    apply_fn, weights = models.apply_fn(module), parallel.replicate(found.tree, task.devices)
    mean, std = tuple(there["mean"]), tuple(there["std"])
    _, evaluation_batch = make_batches(task._replace(mean=mean, std=std), Recipe(1, 1, 0.0), Taught())
    sums = _evaluator(task, apply_fn, evaluation_batch, {"data": task.arrays}, "test")(*weights)
    return Teacher(apply_fn, weights, mean, std, evaluate.summarise(sums), [])


def taught_by(
    task: Task,
    source: Teacher,
    recipe: Recipe,
    *,
    mode: str,
    views: int,
    directory: Path,
    label: str = "columns",
) -> Taught:
    """Makes a teacher's answers reach the student: filled columns, verified, or the teacher itself in the step.

    Args:
      task: the data set, whose every image the teacher is asked about.
      source: the trained teacher.
      recipe: of the student, for the augmentation of stored views.
      mode: ``centre``, ``views`` or ``online``.
      views: stored views per image in the mode ``views``.
      directory: where the columns are stored.
      label: of the progress bar.
    """
    own = {"mean": source.mean, "std": source.std}
    if mode == "online":

        def answer(weights, inputs):
            # The student's normalisation undone and the teacher's applied, so that both see the same picture.
            pixels = 255 * (inputs * jnp.float32(task.std) + jnp.float32(task.mean))
            outputs, _ = source.apply_fn(*weights, data.normalise(pixels, **own), train=False)
            return {"logits": outputs.logits}

        return Taught(online=answer, weights=source.weights)

    def answers(weights, images):
        outputs, _ = source.apply_fn(*weights, data.normalise(images, **own), train=False)
        return {"logits": outputs.logits}

    settings: dict[str, Any] = {"normalisation": [list(source.mean), list(source.std)]}
    view_fn: teacher.ViewFn | None = None
    if mode == "views":
        move = {"padding": recipe.padding, "flip": recipe.flip, "seed": VIEW_SEED}
        settings["stored_view"] = move

        def stored_view(images, index, view):
            return data.stored_view(images, index, view, **move)

        view_fn = stored_view

    images = task.source.images
    with bar(label, total=len(images), unit="image") as meter:

        def progress(done: int, total: int) -> None:
            meter.update(done - meter.n)

        columns = teacher.fill(
            directory,
            answers,
            source.weights,
            images,
            settings=settings,
            views=views if view_fn else 1,
            view_fn=view_fn,
            devices=task.devices,
            progress=progress,
        )
    teacher.verify(columns, answers, source.weights, images, view_fn=view_fn)
    return Taught(columns=columns.arrays, views=views if view_fn else 1)


# ----------------------------------------------------------------------------------------------- reporting


CURVES = {"loss": "training_loss", "validation_accuracy": "validation_accuracy"}
TABLE = (
    "accuracy",
    "best_accuracy",
    "loss",
    "f1",
    "ece",
    "agreement",
)  # what the terminal shows of the metrics


def conclude(
    workdir: Path,
    name: str,
    *,
    question: str,
    arms: Mapping[str, Sequence[Trained | Teacher]],
    arm_seeds: Mapping[str, Sequence[int]],
    baseline: str,
    wall_clock_s: float,
    settings: Mapping[str, Any],
    scaled_down: str,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes results.json, figure.png and report.html of finished arms, and says in the last lines what was found.

    Args:
      workdir: of the run.
      name: of the experiment.
      question: that it answers.
      arms: arm → one finished training per seed.
      arm_seeds: arm → its seeds; those of the baseline are the result's.
      baseline: the arm that the others are compared with, by Welch's test of test accuracy in the last epoch.
      wall_clock_s: of the whole run.
      settings: every flag.
      scaled_down: what is smaller than in the study that the experiment follows.
      notes: for the reader of the report.
    """
    histories = {
        arm: [t.fitted.history if isinstance(t, Trained) else t.history for t in runs]
        for arm, runs in arms.items()
    }
    result = results.make(
        name,
        question=question,
        flags=settings,
        seeds=list(arm_seeds[baseline]),
        arm_seeds={arm: list(s) for arm, s in arm_seeds.items() if list(s) != list(arm_seeds[baseline])},
        arms={arm: {m: [t.metrics[m] for t in runs] for m in runs[0].metrics} for arm, runs in arms.items()},
        curves={
            arm: {name: [[record.get(m) for record in h] for h in runs] for m, name in CURVES.items()}
            for arm, runs in histories.items()
            if runs[0]
        },
        comparisons=_comparisons(arms, baseline),
        wall_clock_s=wall_clock_s,
        scaled_down=scaled_down,
        notes=list(notes),
    )
    if jax.process_index() == 0:
        results.write(workdir / "results.json", result)
        report.save_figure(workdir / "figure.png", result)
        report.page(result, path=workdir / "report.html", title=name)
    say(f"\n{report.markdown_table(result, metrics=TABLE)}\n")
    say(report.finding(result))
    say(f"Checkpoints, results.json, figure.png and report.html are in {workdir}/.")
    return result


def _comparisons(arms: Mapping[str, Sequence[Trained | Teacher]], baseline: str) -> list[dict[str, Any]]:
    found = []
    for arm, runs in arms.items():
        if arm in (baseline, "teacher") or min(len(runs), len(arms[baseline])) < 3:
            continue
        a, b = ([t.metrics["accuracy"] for t in arms[key]] for key in (arm, baseline))
        found.append({"metric": "accuracy", "a": arm, "b": baseline, **significance.welch(a, b)._asdict()})
    return found


def settings_of(module: Mapping[str, Any], *, apart: Sequence[str]) -> dict[str, Any]:
    """The flags that an experiment defines and that decide its numbers; its ``globals()``, and those that do not."""
    own = {holder.name: holder.value for holder in module.values() if isinstance(holder, flags.FlagHolder)}
    return {name: value for name, value in sorted(own.items()) if name not in apart}
