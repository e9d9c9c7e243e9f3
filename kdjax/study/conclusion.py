"""The result of a study: JSON, figure, report, and the table on the terminal."""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from kdjax import data, evaluate, report, results, significance
from kdjax.callbacks import say
from kdjax.study.notes import Arms, accuracies

TABLE = ("accuracy", "best_accuracy", "loss", "f1", "ece", "agreement")  # metrics that the terminal shows
CURVES = {"loss": "training_loss", "validation_accuracy": "validation_accuracy"}


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
        say(f"note: {note}")
    say(f"Checkpoints, results.json, figure.png and report.html are in {workdir}/.")
    return result


def publish(workdir: Path, result: Mapping[str, Any], *, metrics: Sequence[str]) -> None:
    """Writes a result, its figure and its report into the workdir, and prints its table and what was found."""
    if jax.process_index() == 0:
        results.write(workdir / "results.json", result)
        report.save_figure(workdir / "figure.png", result)
        report.page({result["name"]: result}, path=workdir / "report.html")
    say(f"\n{report.markdown_table(result, metrics=metrics)}\n")
    say(report.finding(result))


def weak_teachers(arms: Arms, baseline: str) -> list[str]:
    """A sentence for each kind of teacher that is less accurate than the baseline."""

    def found(arm: str) -> tuple[float, str]:
        values = accuracies(arms[arm])
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
