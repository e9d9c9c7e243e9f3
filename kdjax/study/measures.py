"""What else is measured of finished runs; kept beside them, and not measured again for equal weights and options."""

import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kdjax import checkpoints, data, evaluate, files, flatness, representations, results, robustness, saliency
from kdjax.callbacks import bar
from kdjax.models import Network
from kdjax.run import Trained, evaluation_batch_size
from kdjax.study.notes import Arms
from kdjax.types import Normalisation, Outputs, Weights

REPEATS, CALLS = 15, 20  # of a latency: repeats that are reported, each the mean of calls


def logits_of(
    run: Trained, dataset: data.Dataset, *, split: str = "test"
) -> Float[np.ndarray, "examples classes"]:
    """A run's logits of every example of a split, in the order of ``dataset.splits[split]``."""
    ids = dataset.splits[split]
    index, valid = data.evaluation_index(ids, batch_size=evaluation_batch_size(len(ids), 1))
    weights = jax.device_put(jax.device_get(run.weights), jax.local_devices()[0])
    look = functools.partial(_looked, run.network, run.normalisation, (), weights)
    return np.stack([look(dataset.images[rows]).logits for rows in index])[valid > 0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _looked(
    network: Network, normalisation: Normalisation, names: tuple[str, ...], weights: Weights, images: Array
) -> Outputs:
    """A network's logits, and those of its features that are named."""
    inputs = data.normalise(images, **normalisation._asdict())
    outputs, _ = network.apply(weights.params, weights.model_state, inputs, train=False)
    return Outputs(outputs.logits, {name: outputs.features[name] for name in names})


def agreement_of(
    dataset: data.Dataset,
    arms: Arms,
    directory: Path,
    *,
    predicted: Int[np.ndarray, " examples"],
    split: str = "test",
) -> dict[str, dict[str, list[float]]]:
    """How often each run predicts what its teacher predicts, where that is right and where it is wrong.

    A student that only becomes more accurate agrees more where the teacher is right; one that learns from the teacher
    also shares its errors (Stanton et al., `Does Knowledge Distillation Really Work?
    <https://arxiv.org/abs/2106.05945>`_, 2021).

    Args:
      dataset: of the students.
      arms: arm → finished runs.
      directory: where each run's predictions are kept; those of :func:`answers_of` are the same.
      predicted: the classes that the teacher predicts, in the order of ``dataset.splits[split]``.
      split: of the examples.

    Returns:
      arm → ``agreement_right`` and ``agreement_wrong``, shares of the examples that the teacher classifies
      rightly and wrongly → one per run. Without such examples the fraction is 1.
    """
    labels = dataset.labels[dataset.splits[split]]
    parts = {"agreement_right": predicted == labels, "agreement_wrong": predicted != labels}
    return {
        arm: {
            name: [float(np.mean(own[part] == predicted[part])) if part.any() else 1.0 for own in runs]
            for name, part in parts.items()
        }
        for arm, runs in predictions_of(dataset, arms, directory, split=split).items()
    }


def denoising_of(dataset: data.Dataset, arms: Arms, directory: Path) -> dict[str, dict[str, list[float]]]:
    """What each run predicts for the training images that were given a wrong label.

    Args:
      dataset: of the students, with mislabelled examples.
      arms: arm → finished runs.
      directory: where each run's predictions are kept.

    Returns:
      arm → ``corrected`` and ``memorised``, the shares of these images whose true and whose wrong label is predicted →
      one per run.

    Raises:
      ValueError: if no training image has a wrong label.
    """
    if not len(dataset.mislabelled):
        raise ValueError(f"no training image of {dataset.name} was given a wrong label: use label_noise.")
    wrong = dataset._replace(splits={**dataset.splits, "mislabelled": dataset.mislabelled})
    said = dataset.labels[dataset.mislabelled]
    return {
        arm: {
            "corrected": [float(np.mean(own == dataset.true_labels)) for own in runs],
            "memorised": [float(np.mean(own == said)) for own in runs],
        }
        for arm, runs in predictions_of(wrong, arms, directory, split="mislabelled").items()
    }


def exaggeration_of(
    dataset: data.Dataset,
    arms: Arms,
    directory: Path,
    *,
    teacher: Float[np.ndarray, "examples classes"],
    split: str = "test",
) -> dict[str, dict[str, list[float]]]:
    """How much surer than its teacher each run becomes, where that becomes surer: :func:`kdjax.evaluate.exaggeration`.

    Args:
      dataset: of the students.
      arms: arm → finished runs.
      directory: where each run's number is kept.
      teacher: its logits, in the order of ``dataset.splits[split]``.
      split: of the examples.

    Returns:
      arm → ``exaggeration`` → one per run.
    """

    def measure(run: Trained) -> dict[str, float]:
        return {"exaggeration": evaluate.exaggeration(logits_of(run, dataset, split=split), teacher)}

    decides = {"data": dataset.fingerprint, "split": split, "teacher": checkpoints.digest_tree(teacher)}
    return of_every_run(arms, directory, decides, measure, label="exaggeration")


def embeddings_of(run: Trained, dataset: data.Dataset, *, crops: int = 16) -> dict[str, float]:
    """What a network's embeddings and logits keep of the validation images of its own data set.

    Returns:
      ``mutual_information``, nats, of the difference of two logits for random crops of the images of the two classes
      with most images; ``class_separation``, without embeddings that are zero, and not where it is undefined. See
      :mod:`kdjax.representations`.
    """
    ids = dataset.splits["validation"]
    labels, weights = dataset.labels[ids], jax.device_put(jax.device_get(run.weights), jax.local_devices()[0])
    look = functools.partial(_looked, run.network, run.normalisation, ("embedding",), weights)
    parts = np.array_split(dataset.images[ids], max(len(ids) // 500, 1))
    vectors = np.concatenate([look(part).features["embedding"] for part in parts])
    first, second = np.argsort(-np.bincount(labels, minlength=2), kind="stable")[:2]
    pair = jnp.asarray(dataset.images[ids[np.isin(labels, (first, second))]])

    def margin(crop: int) -> Array:
        keys = data.example_keys(jax.random.key(crop), jnp.arange(len(pair)))
        logits = look(data.crop_and_flip(pair, keys, padding=4, flip=True)).logits
        return logits[:, first] - logits[:, second]

    found = {
        "mutual_information": representations.mutual_information(
            np.stack([margin(n) for n in range(crops)], 1)
        )
    }
    turned = np.linalg.norm(vectors, axis=1) > 0
    with contextlib.suppress(ValueError):
        found["class_separation"] = representations.class_separation(vectors[turned], labels[turned])
    return found


def with_class_accuracy(run: Trained, dataset: data.Dataset, classes: Sequence[str]) -> Trained:
    """Adds to a run's metrics the accuracy of each of some classes, their mean, and the mean of the other classes.

    They are ``accuracy_NAME``, ``accuracy_chosen`` and, if there are others, ``accuracy_other``.
    """
    _, recall, _ = evaluate.per_class(run.sums)
    chosen = np.isin(dataset.class_names, list(classes))
    found = {f"accuracy_{name}": float(recall[dataset.class_names.index(name)]) for name in classes}
    found["accuracy_chosen"] = float(recall[chosen].mean())
    if not chosen.all():
        found["accuracy_other"] = float(recall[~chosen].mean())
    return run._replace(metrics=run.metrics | found)


def answers_of(
    dataset: data.Dataset, arms: Arms, directory: Path, *, split: str = "test"
) -> dict[str, list[str]]:
    """Whether every run is right on each example of a split, packed: arm → one text per run.

    :func:`kdjax.results.correct_of` unpacks them, in the order of ``dataset.splits[split]``.
    """
    labels = dataset.labels[dataset.splits[split]]
    found = predictions_of(dataset, arms, directory, split=split)
    return {arm: [results.pack(predicted == labels) for predicted in runs] for arm, runs in found.items()}


def predictions_of(
    dataset: data.Dataset, arms: Arms, directory: Path, *, split: str = "test"
) -> dict[str, list[np.ndarray]]:
    """The class that every run predicts for each example of a split: arm → int[examples] per run."""

    def measure(run: Trained) -> dict[str, Any]:
        return {"predicted": logits_of(run, dataset, split=split).argmax(-1).tolist()}

    decides = {"data": dataset.fingerprint, "split": split, "measure": "predicted"}
    found = of_every_run(arms, directory, decides, measure, label="answers")
    return {arm: [np.asarray(one) for one in answers["predicted"]] for arm, answers in found.items()}


def robustness_of(
    dataset: data.Dataset, arms: Arms, directory: Path, *, split: str = "test", **options: Any
) -> dict[str, dict[str, list[float]]]:
    """Accuracy of every run under corruptions, weight noise and attacks: arm → perturbation → one per run.

    ``options`` are those of :func:`kdjax.robustness.make_evaluator`, such as ``epsilons``.
    """
    ids, devices = dataset.splits[split], options.pop("devices", None) or jax.local_devices()
    size = evaluation_batch_size(len(ids), len(devices) * jax.process_count())

    @functools.cache  # by network; none is built where all numbers are there
    def evaluator(network: Network, normalisation: Normalisation) -> Callable[..., dict[str, float]]:
        return robustness.make_evaluator(
            network.apply,
            dataset.images[ids],
            dataset.labels[ids],
            **normalisation._asdict(),
            batch_size=size,
            devices=devices,
            **options,
        )

    def measure(run: Trained) -> dict[str, float]:
        return evaluator(run.network, run.normalisation)(*run.weights, jax.random.key(0))

    decides = {"data": dataset.fingerprint, "split": split}
    # Of named functions, such as corruptions, the names.
    decides |= {name: sorted(o) if isinstance(o, Mapping) else o for name, o in options.items()}
    return of_every_run(arms, directory, decides, measure, label="robustness")


def flatness_of(dataset: data.Dataset, arms: Arms, directory: Path, **options: Any) -> dict[str, Any]:
    """:func:`kdjax.flatness.make_measure` of every run: arm → measure → one per run."""
    measure = flatness.make_measure(dataset, **options)
    return of_every_run(arms, directory, [dataset.fingerprint, options], measure, label="flatness")


def densities_of(dataset: data.Dataset, arms: Arms, directory: Path, **options: Any) -> dict[str, Any]:
    """:func:`kdjax.flatness.make_density` of the first run of each arm."""
    measure = flatness.make_density(dataset, **options)
    return _of_first_run(arms, directory, [dataset.fingerprint, options], measure)


def surfaces_of(dataset: data.Dataset, arms: Arms, directory: Path, **options: Any) -> dict[str, Any]:
    """:func:`kdjax.flatness.make_surface` of the first run of each arm."""
    measure = flatness.make_surface(dataset, **options)
    return _of_first_run(arms, directory, [dataset.fingerprint, options], measure)


def saliency_of(
    dataset: data.Dataset, arms: Arms, directory: Path, *, teacher_of: Mapping[int, Trained], **options: Any
) -> dict[str, dict[str, list[float]]]:
    """:func:`kdjax.saliency.make_measure` of every run, with the teacher of its seed: arm → measure → one per run."""
    digests = {seed: checkpoints.digest_tree(teacher.weights) for seed, teacher in teacher_of.items()}
    # One for each teacher, whose own maps it computes once.
    distinct = {id(teacher): teacher for teacher in teacher_of.values()}
    measures = {key: saliency.make_measure(dataset, teacher, **options) for key, teacher in distinct.items()}

    def measure(run: Trained) -> dict[str, float]:
        return measures[id(teacher_of[run.seed])](run)

    decides = [dataset.fingerprint, digests, options]
    return of_every_run(arms, directory, decides, measure, label="saliency")


def with_metrics(
    arms: Arms, measured: Mapping[str, Mapping[str, Sequence[float]]]
) -> dict[str, list[Trained]]:
    """Adds numbers of :func:`of_every_run` to the metrics of the runs."""
    return {
        arm: [
            run._replace(metrics=run.metrics | {name: values[i] for name, values in measured[arm].items()})
            for i, run in enumerate(runs)
        ]
        for arm, runs in arms.items()
    }


def costs_of(arms: Arms) -> dict[str, dict[str, Any]]:
    """Parameters of each arm's network, and milliseconds per image, compiled and warm, on one device."""
    found, known = {}, {}
    for arm, (run, *_) in arms.items():
        if run.network not in known:
            known[run.network] = {"parameters": run.network.num_parameters, "latency_ms": _latency(run)}
        found[arm] = known[run.network]
    return found


def of_every_run(
    arms: Arms, directory: Path, options: Any, measure: Callable[[Any], dict[str, Any]], *, label: str
) -> dict[str, dict[str, list[Any]]]:
    """Numbers about every run, as arm → name → one per run.

    Args:
      arms: arm → finished runs.
      directory: where each run's numbers are kept.
      options: what decides the numbers beside the weights, the data among it, as JSON.
      measure: run → its numbers by name.
      label: of the progress bar.
    """
    found: dict[str, dict[str, list[Any]]] = {}
    with bar(label, total=sum(map(len, arms.values())), unit="network") as meter:
        for arm, runs in arms.items():
            scores = []
            for number, run in enumerate(runs):
                scores.append(_cached(directory / arm / f"{number}.json", run, options, measure))
                meter.update()
            found[arm] = {name: [score[name] for score in scores] for name in scores[0]}
    return found


def _of_first_run(arms: Arms, directory: Path, options: Any, measure: Callable[[Any], Any]) -> dict[str, Any]:
    return {arm: _cached(directory / arm / "0.json", runs[0], options, measure) for arm, runs in arms.items()}


def _cached(path: Path, run: Trained, options: Any, measure: Callable[[Any], Any]) -> Any:
    """The measurement of these weights with these options: read back, or made now."""
    identity = {"weights": checkpoints.digest_tree(run.weights), "options": options}
    return files.cached(path, lambda: measure(run), identity=identity, writes=jax.process_index() == 0)


def _latency(run: Trained) -> list[float]:
    image = jnp.zeros((1, *run.network.image_shape), jnp.float32)
    answer = jax.jit(lambda w, x: run.network.apply(w.params, w.model_state, x, train=False)[0].logits)
    weights = jax.device_put(jax.device_get(run.weights), jax.local_devices()[0])
    jax.block_until_ready(answer(weights, image))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(CALLS):
            answer(weights, image).block_until_ready()
        times.append(round(1000 * (time.perf_counter() - start) / CALLS, 5))
    return times


def pictures(dataset: data.Dataset, maps: np.ndarray, *, count: int = 4) -> list[dict[str, Any]]:
    """The first training images and their maps ``[examples, 1, height, width, 1]``: ``overlays`` of a result."""
    return [
        {
            "title": f"{dataset.class_names[dataset.labels[i]]}: integrated gradients of the teacher's score",
            "image": dataset.images[i].tolist(),
            "map": (maps[i, 0, :, :, 0] / 255).round(3).tolist(),
        }
        for i in dataset.splits["train"][:count]
    ]


# A Hessian-vector product and a loss, in gradients: experiments/results/benchmarks/escape.json
HVP, EVALUATION = 1.5, 1 / 3


def with_costs(run: Trained, *, targets: Sequence[float], steps_per_epoch: int) -> Trained:
    """Adds what a run cost in gradients, and when its validation loss first came below each target, to its metrics.

    A run that never reaches a target has ``reached`` 0, and ``steps_to`` and ``paid_to`` of the whole run. Its method
    must record :func:`kdjax.methods.cost`.

    Args:
      run: a finished run.
      targets: of the validation loss.
      steps_per_epoch: batches of an epoch.
    """
    metrics = dict(run.metrics)
    for name in ("events", "hvps", "evaluations"):
        metrics[name] = round(steps_per_epoch * sum(record[name] for record in run.history))
    paid = np.cumsum(
        [steps_per_epoch * (1 + HVP * r["hvps"] + EVALUATION * r["evaluations"]) for r in run.history]
    )
    metrics["gradient_equivalents"] = float(paid[-1])
    for target in targets:
        reached = [i for i, record in enumerate(run.history) if record["validation_loss"] <= target]
        at = reached[0] if reached else len(run.history) - 1
        metrics[f"reached_{target:g}"] = float(bool(reached))
        metrics[f"steps_to_{target:g}"] = float(steps_per_epoch * (at + 1))
        metrics[f"paid_to_{target:g}"] = float(paid[at])
    return run._replace(metrics=metrics)
