"""What else is known of finished networks beside their accuracy: how they fare when disturbed, and what they cost."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.common.launching import bar
from experiments.common.tasks import Task
from experiments.common.teachers import Teacher
from experiments.common.training import Trained, batch_size_for
from kdjax import checkpoints, files, models, robustness

Arms = Mapping[str, Sequence[Trained | Teacher]]

REPEATS, CALLS = 15, 20  # of a latency: repeats that are reported, each the mean of calls


def robustness_of(
    task: Task, arms: Arms, directory: Path, *, split: str = "test", **options: Any
) -> dict[str, dict[str, list[float]]]:
    """Accuracy of every run of every arm under each disturbance of a split's images.

    Args:
      task: whose split it is.
      arms: arm → finished runs; those of one network share their compiled programs.
      directory: where each run's numbers are kept; they are not computed again for equal weights and options.
      split: the images.
      **options: of :func:`kdjax.robustness.make_evaluator`, such as ``epsilons``.

    Returns:
      Arm → disturbance → one accuracy per run.
    """
    ids = task.split[split]

    @functools.cache  # by network; none is built where all that it would tell is kept
    def evaluator(module: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> Callable:
        return robustness.make_evaluator(
            models.apply_fn(module),
            task.source.images[ids],
            task.source.labels[ids],
            mean=mean,
            std=std,
            batch_size=batch_size_for(task, len(ids)),
            devices=task.devices,
            **options,
        )

    def assess(run: Trained | Teacher) -> dict[str, float]:
        return evaluator(run.module, *normalisation_of(task, run))(*run.weights, jax.random.key(0))

    decides = {"data": task.fingerprint, "split": split}
    # Of named functions, such as corruptions, the names.
    decides |= {name: sorted(o) if isinstance(o, Mapping) else o for name, o in options.items()}
    return of_every_run(arms, directory, decides, assess, label="disturbed networks")


def of_every_run(
    arms: Arms, directory: Path, options: Any, measure: Callable[[Any], dict[str, float]], *, label: str
) -> dict[str, dict[str, list[float]]]:
    """Numbers about every run of every arm, as arm → name → one per run.

    Args:
      arms: arm → finished runs.
      directory: where each run's numbers are kept; they are not computed again for equal weights and options.
      options: what decides the numbers beside the weights, the data among it, as plain JSON.
      measure: run → its numbers by name.
      label: of the progress bar.
    """
    found: dict[str, dict[str, list[float]]] = {}
    with bar(label, total=sum(map(len, arms.values())), unit="network") as meter:
        for arm, runs in arms.items():
            scores = []
            for number, run in enumerate(runs):
                scores.append(kept(directory / arm / f"{number}.json", run, options, measure))
                meter.update()
            found[arm] = {name: [score[name] for score in scores] for name in scores[0]}
    return found


def normalisation_of(task: Task, run: Trained | Teacher) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the pixels that a network was trained under."""
    return (run.mean, run.std) if isinstance(run, Teacher) else (task.mean, task.std)


def kept(path: Path, run: Trained | Teacher, options: Any, measure: Callable[[Any], Any]) -> Any:
    """What an earlier start has kept of these weights and options; or what is measured now, and kept."""
    identity = {"weights": checkpoints.digest_tree(run.weights), "options": options}
    return files.cached(path, lambda: measure(run), identity=identity, writes=jax.process_index() == 0)


def costs_of(task: Task, arms: Arms) -> dict[str, dict[str, Any]]:
    """Parameters of each arm's network, and milliseconds that one image takes it, compiled and warm, on one device."""
    found, known = {}, {}
    image = jnp.zeros((1, *task.source.images.shape[1:]), jnp.float32)
    for arm, (run, *_) in arms.items():
        if run.module not in known:
            known[run.module] = {
                "parameters": models.count_parameters(run.weights.params),
                "latency_ms": _latency(run, image),
            }
        found[arm] = known[run.module]
    return found


def _latency(run: Trained | Teacher, image: jax.Array) -> list[float]:
    apply_fn = models.apply_fn(run.module)
    answer = jax.jit(lambda w, x: apply_fn(w.params, w.model_state, x, train=False)[0].logits)
    weights = jax.device_put(jax.device_get(run.weights), jax.local_devices()[0])
    jax.block_until_ready(answer(weights, image))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(CALLS):
            answer(weights, image).block_until_ready()
        times.append(round(1000 * (time.perf_counter() - start) / CALLS, 5))
    return times
