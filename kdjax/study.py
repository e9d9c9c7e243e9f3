"""A study: finished arms, what else is measured of them, and their result as JSON, figure, report and table.

Arms are ``{name: [one finished run per seed]}``. Slow measurements are cached beside the runs, by weights and options.
"""

import functools
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import (
    checkpoints,
    data,
    evaluate,
    files,
    flatness,
    report,
    results,
    robustness,
    saliency,
    significance,
)
from kdjax.callbacks import bar
from kdjax.models import Network
from kdjax.run import Trained, evaluation_batch_size
from kdjax.types import Normalisation

Arms = Mapping[str, Sequence[Trained]]

TABLE = ("accuracy", "best_accuracy", "loss", "f1", "ece", "agreement")  # metrics that the terminal shows
CURVES = {"loss": "training_loss", "validation_accuracy": "validation_accuracy"}
REPEATS, CALLS = 15, 20  # of a latency: repeats that are reported, each the mean of calls
DELTA = 0.01  # accuracies nearer than this are equivalent


class Study(NamedTuple):
    """What a study is about, for its result.

    Attributes:
      name: of the experiment.
      question: that it answers.
      baseline: the arm that the others are compared with.
      metrics: what the terminal shows; the first is tested.
      scaled_down: what is smaller than in the publication it follows.
      tested: the arms to compare with the baseline; all by default.
      drawn: the arms whose curves are kept and drawn; all by default.
    """

    name: str
    question: str
    baseline: str
    metrics: Sequence[str] = TABLE
    scaled_down: str = ""
    tested: Sequence[str] | None = None
    drawn: Collection[str] | None = None


def conclude(
    study: Study,
    workdir: Path,
    dataset: data.Dataset,
    arms: Arms,
    *,
    settings: Mapping[str, Any],
    seconds: float,
    notes: Sequence[str] = (),
    output: str | os.PathLike[str] | None = None,
    **measured: Any,
) -> dict[str, Any]:
    """Writes results.json, figure.png and report.html of finished arms, and prints the table and what was found.

    Args:
      study: what it is about.
      workdir: to write into.
      dataset: what was learnt; its notes and class names become part of the result.
      arms: arm → one finished run per seed.
      settings: that decide the numbers.
      seconds: of the whole study.
      notes: for the reader of the result.
      output: also write the result to this file, and its figure beside it.
      **measured: further fields of the result, such as ``robustness``, ``flatness`` and ``costs``.
    """
    seeds = {arm: [run.seed for run in runs] for arm, runs in arms.items()}
    weak = weak_teachers(arms, "scratch" if "scratch" in arms else study.baseline)
    totals = {arm: _total([run.sums for run in runs]) for arm, runs in arms.items()}
    result = results.make(
        study.name,
        question=study.question,
        flags=settings,
        seeds=seeds[study.baseline],
        arm_seeds={arm: s for arm, s in seeds.items() if s != seeds[study.baseline]},
        arms={
            arm: {m: [run.metrics[m] for run in runs] for m in runs[0].metrics} for arm, runs in arms.items()
        },
        curves={
            arm: {
                name: [[record.get(m) for record in run.history] for run in runs]
                for m, name in CURVES.items()
            }
            for arm, runs in arms.items()
            if runs[0].history and (study.drawn is None or arm in study.drawn)
        },
        comparisons=_comparisons(study, arms),
        calibration={arm: evaluate.reliability(sums) for arm, sums in totals.items()},
        confusion={arm: sums["confusion"].astype(int).tolist() for arm, sums in totals.items()},
        wall_clock_s=seconds,
        scaled_down=study.scaled_down,
        notes=[*notes, *weak, *dataset.notes, *_of_trainings(arms)],
        class_names=list(dataset.class_names),
        **measured,
    )
    publish(workdir, result, metrics=study.metrics)
    if output and jax.process_index() == 0:
        results.write(output, result)
        report.save_figure(Path(output).with_suffix(".png"), result)
    for note in weak:
        _say(f"note: {note}")
    _say(f"Checkpoints, results.json, figure.png and report.html are in {workdir}/.")
    return result


def publish(workdir: Path, result: Mapping[str, Any], *, metrics: Sequence[str]) -> None:
    """Writes a result, its figure and its report into the workdir, and prints its table and what was found."""
    if jax.process_index() == 0:
        results.write(workdir / "results.json", result)
        report.save_figure(workdir / "figure.png", result)
        report.page({result["name"]: result}, path=workdir / "report.html")
    _say(f"\n{report.markdown_table(result, metrics=metrics)}\n")
    _say(report.finding(result))


def weak_teachers(arms: Arms, baseline: str) -> list[str]:
    """A sentence for each kind of teacher that is less accurate than the baseline."""

    def found(arm: str) -> tuple[float, str]:
        values = _accuracies(arms[arm])
        return sum(values) / len(values), f"{sum(values) / len(values):.2%} (n = {len(values)})"

    own, said = found(baseline)
    return [
        f"The arm {arm} is less accurate than {baseline}: {found(arm)[1]} against {said}. Students cannot be expected "
        "to gain from it; train it longer, or on more images."
        for arm in arms
        if arm.endswith("teacher") and found(arm)[0] < own
    ]


def _of_trainings(arms: Arms) -> list[str]:
    """Notes of the runs, such as that one was resumed on another machine: each once, with the runs it is about."""
    whose: dict[str, list[str]] = {}
    for arm, runs in arms.items():
        for run in runs:
            for note in run.notes:
                whose.setdefault(note, []).append(f"{arm}, seed {run.seed}")
    return [f"{'; '.join(names)}: {note}" for note, names in whose.items()]


def _total(sums: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: np.sum([np.asarray(run[name]) for run in sums], axis=0) for name in sums[0]}


def _comparisons(study: Study, arms: Arms) -> list[dict[str, Any]]:
    found, metric, baseline = [], study.metrics[0], study.baseline
    for arm in arms if study.tested is None else study.tested:
        if arm in (baseline, "teacher") or min(len(arms[arm]), len(arms[baseline])) < 3:
            continue
        a, b = ([run.metrics[metric] for run in arms[key]] for key in (arm, baseline))
        found.append({"metric": metric, "a": arm, "b": baseline, **significance.welch(a, b)._asdict()})
    return found


# What else is measured of finished runs


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
    dataset: data.Dataset, arms: Arms, directory: Path, *, teacher: Trained, **options: Any
) -> dict[str, dict[str, list[float]]]:
    """:func:`kdjax.saliency.make_measure` of every run: arm → measure → one per run."""
    measure = saliency.make_measure(dataset, teacher, **options)
    decides = [dataset.fingerprint, checkpoints.digest_tree(teacher.weights), options]
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
    arms: Arms, directory: Path, options: Any, measure: Callable[[Any], dict[str, float]], *, label: str
) -> dict[str, dict[str, list[float]]]:
    """Numbers about every run, as arm → name → one per run.

    Args:
      arms: arm → finished runs.
      directory: where each run's numbers are kept.
      options: what decides the numbers beside the weights, the data among it, as JSON.
      measure: run → its numbers by name.
      label: of the progress bar.
    """
    found: dict[str, dict[str, list[float]]] = {}
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


# Notes: tests as sentences


def welch_note(a: str, b: str, arms: Arms) -> str:
    """Welch's test of the accuracies of two arms, and the interval of their differences seed by seed.

    Two students of one seed share their first weights and the order of images, which widens the first interval and not
    the second.
    """
    ours, theirs = _accuracies(arms[a]), _accuracies(arms[b])
    found = significance.welch(ours, theirs)
    paired = significance.t_interval((100 * np.subtract(ours, theirs)).tolist())
    return (
        f"{a} against {b}: {100 * found.difference:+.2f} points of accuracy (95 % interval {100 * found.low:+.2f} to "
        f"{100 * found.high:+.2f}, p = {found.p:.2g}, Welch, not corrected; {paired.low:+.2f} to {paired.high:+.2f} "
        "seed by seed)."
    )


def tost_note(arms: Arms, *, baseline: str) -> str:
    """Which arms two one-sided tests find equivalent to the baseline, in accuracy."""
    plain = _accuracies(arms[baseline])
    others = {name: _accuracies(runs) for name, runs in arms.items() if name != baseline}
    p = {name: significance.equivalence(own, plain, delta=DELTA).p for name, own in others.items()}
    found = ", ".join(f"{name} (p = {value:.2g})" for name, value in p.items() if value < 0.05)
    return (
        f"Equal to {baseline} within {100 * DELTA:g} point of accuracy by two one-sided tests: {found or 'no arm'}; "
        "not shown for the others, which are better, worse or vary too much."
    )


def mcnemar_note(dataset: data.Dataset, arms: Arms, *, baseline: str, split: str) -> str:
    """How many students of each arm differ from the baseline's student of the same seed, by McNemar's test."""
    ids, network = dataset.splits[split], arms[baseline][0].network

    @functools.partial(jax.jit, static_argnums=0)
    def right(normalisation, weights, images, labels):
        inputs = data.normalise(images, **normalisation._asdict())
        outputs, _ = network.apply(weights.params, weights.model_state, inputs, train=False)
        return jnp.argmax(outputs.logits, -1) == labels

    def correct(run: Trained) -> np.ndarray:
        return np.asarray(right(run.normalisation, run.weights, dataset.images[ids], dataset.labels[ids]))

    plain = [correct(run) for run in arms[baseline]]

    def differing(name: str) -> int:
        pairs = zip(map(correct, arms[name]), plain, strict=True)
        return sum(significance.mcnemar(a, b, ids_a=ids, ids_b=ids).mid_p < 0.05 for a, b in pairs)

    counts = ", ".join(f"{name} {differing(name)}" for name in arms if name != baseline)
    return (
        f"Students out of {len(plain)} that differ from that of the same seed of {baseline} by McNemar's test on the "
        f"same images (mid-p below .05): {counts}."
    )


def main_effect_note(factor: str, pairs: Sequence[tuple[str, str]], arms: Arms) -> str:
    """The mean difference in accuracy over pairs of arms that differ in one factor, with its interval over seeds."""
    each = np.mean([np.subtract(_accuracies(arms[b]), _accuracies(arms[a])) for a, b in pairs], axis=0)
    found = significance.t_interval((100 * each).tolist())
    return (
        f"Main effect of {factor} over {len(pairs)} pairs of arms: {found.estimate:+.2f} points of accuracy (95 % "
        f"interval {found.low:+.2f} to {found.high:+.2f} over {len(each)} seeds)."
    )


def comparison_notes(
    arms: Arms, *, pairs: Sequence[tuple[str, str]], factors: Mapping[str, Sequence[tuple[str, str]]]
) -> list[str]:
    """Welch's test of each pair of arms, and the main effect of each factor.

    Args:
      arms: arm → one finished run per seed; tests of an arm that is not there, or has fewer than three, are left out.
      pairs: of arms, as in :func:`welch_note`.
      factors: factor → pairs of arms, as in :func:`main_effect_note`.
    """

    def there(*names: str) -> bool:
        return all(len(arms.get(name, ())) >= 3 for name in names)

    return [welch_note(a, b, arms) for a, b in pairs if there(a, b)] + [
        main_effect_note(factor, among, arms)
        for factor, among in factors.items()
        if there(*(name for pair in among for name in pair))
    ]


def _accuracies(runs: Sequence[Trained]) -> list[float]:
    return [run.metrics["accuracy"] for run in runs]


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)
