"""Many students in one compiled program: what ``make_trainer`` does for one seed, for many seeds and settings."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optax

from experiments.common.launching import bar
from experiments.common.tasks import Task
from experiments.common.training import (
    Recipe,
    Taught,
    Trained,
    identity_of,
    make_batches,
    make_evaluator,
    make_optimizer,
    save_network,
)
from kdjax import data, evaluate, models, parallel, train, vmapped


def train_many(
    task: Task,
    module: Any,
    objective: train.Objective,
    recipe: Recipe,
    taught: Taught,
    *,
    seeds: Sequence[int],
    settings: Mapping[str, Sequence[float]],
    directory: Path,
    identity: Mapping[str, Any],
    label: str,
    form: str = "vmap",
) -> list[Trained]:
    """Trains one student per entry of ``seeds``, all at once, and measures each on the test split.

    Args:
      task: what to learn.
      module: the student.
      objective: reads its settings as ``batch["settings"][name]``, a scalar.
      recipe: of every student.
      taught: how the teacher reaches them.
      seeds: of initialisation and order; the same seed may stand here with several settings.
      settings: name → one number per student.
      directory: ends with ``checkpoints/`` of all, and a numbered directory for each student that has not diverged,
        with its weights and the ``network.json`` by which it can be used by itself.
      identity: every setting that decides the numbers, to tell this run's files from another's.
      label: of the progress bar.
      form: of :func:`kdjax.vmapped.make_run`.

    Returns:
      One outcome per student; one that diverged has a loss that is not finite (:func:`kdjax.vmapped.diverged_at`).
    """
    start = time.monotonic()
    apply_fn = models.apply_fn(module)
    parallel.check_batch_size(recipe.batch_size, task.devices)
    train_batch, evaluation_batch = make_batches(task, recipe, taught)
    own = {name: np.asarray(values, np.float32) for name, values in settings.items()}
    resident = {"data": task.arrays, "columns": taught.columns, "teacher": taught.weights, "settings": own}
    resident = parallel.replicate(resident, task.devices)
    steps = max(len(task.split["train"]) // recipe.batch_size, 1) * recipe.epochs
    tx = make_optimizer(recipe, steps=steps)

    def batch_with_settings(resident, index, key):
        return train_batch(resident, index, key) | {"settings": resident["settings"]}

    step = train.make_train_step(apply_fn, objective, tx, axis_name=parallel.AXIS)
    run = parallel.data_parallel(
        vmapped.make_run(train.make_run(step, batch_with_settings), form=form),
        replicated=2,
        devices=task.devices,
        donate_first=True,
    )
    sums_on = {
        name: make_evaluator(task, apply_fn, evaluation_batch, resident, name, transform=vmapped.over_weights)
        for name in ("validation", "test")
    }

    def weights_of(states: train.TrainState) -> train.Weights:
        averaged = optax.tree.get(states.opt_state, "ema") if recipe.ema else states.params
        return train.Weights(averaged, states.model_state)

    def validate(params, model_state):
        found = [
            evaluate.summarise(one) for one in vmapped.unstack(sums_on["validation"](params, model_state))
        ]
        return {name: [one[name] for one in found] for name in ("accuracy", "loss")}

    states, feeds = {}, {}
    for seed in set(seeds):
        weights = models.init(module, task.source.images.shape[1:], seed=seed)
        states[seed] = train.init_state(*weights, tx, seed=seed)
        feeds[seed] = data.resident_feed(
            resident,
            task.split["train"],
            seed=seed,
            batch_size=recipe.batch_size,
            steps_per_dispatch=recipe.steps_per_dispatch,
            rows_of=parallel.process_rows,
        )
    whole = {"run": label, **identity_of(task, module, recipe), "teacher": dict(taught.identity)}
    whole |= {"settings": dict(identity)}
    students = {"seeds": list(seeds), "students": {name: values.tolist() for name, values in own.items()}}
    with bar(label, total=steps, unit="step") as meter:

        def progress(done: int, record: Mapping[str, Any]) -> None:
            meter.update(done)
            shown = {k: np.nanmean(v) for k, v in record.items() if k in ("loss", "validation_accuracy")}
            meter.set_postfix({f"mean {k}": f"{v:.4g}" for k, v in shown.items()})

        fitted = vmapped.fit(
            run,
            parallel.replicate(vmapped.stack([states[seed] for seed in seeds]), task.devices),
            vmapped.feed([feeds[seed] for seed in seeds]),
            epochs=recipe.epochs,
            evaluate=validate,
            evaluate_every=recipe.evaluate_every,
            weights_of=weights_of,
            directory=directory / "checkpoints",
            identity=whole | students,
            save_every_s=recipe.save_every_s,
            progress=progress,
        )
    last, best = (vmapped.stack([getattr(one, which) for one in fitted]) for which in ("last", "best"))
    sums, of_best = (vmapped.unstack(sums_on["test"](*weights)) for weights in (last, best))
    metrics = [evaluate.summarise(one) for one in sums]
    for scored, one in zip(metrics, of_best, strict=True):
        scores = evaluate.summarise(one)
        scored |= {f"best_{name}": scores[name] for name in ("accuracy", "loss")}
    for k, (one, scored) in enumerate(zip(fitted, metrics, strict=True)):
        if vmapped.diverged_at(one) is None:
            which = {"seed": seeds[k], "student": {name: values[k].item() for name, values in own.items()}}
            summary = {"split": "test", "metrics": scored}
            save_network(
                directory / str(k),
                task,
                module,
                one.last,
                step=steps,
                summary=summary,
                identity=whole | which,
            )
    seconds = (time.monotonic() - start) / len(seeds)
    return [
        Trained(module, one, scored, totals, seconds)
        for one, scored, totals in zip(fitted, metrics, sums, strict=True)
    ]
