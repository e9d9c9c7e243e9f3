"""The end of an experiment: results.json, a figure, a page, and the last lines on the terminal."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.common.launching import say
from experiments.common.tasks import Task
from experiments.common.teachers import Teacher
from experiments.common.training import Trained
from kdjax import evaluate, report, results, significance

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
    task: Task,
    question: str,
    arms: Mapping[str, Sequence[Trained | Teacher]],
    arm_seeds: Mapping[str, Sequence[int]],
    baseline: str,
    wall_clock_s: float,
    settings: Mapping[str, Any],
    scaled_down: str,
    metrics: Sequence[str] = TABLE,
    notes: Sequence[str] = (),
    output: str | None = None,
    tested: Sequence[str] | None = None,
    drawn: Collection[str] | None = None,
    **optional: Any,
) -> dict[str, Any]:
    """Writes results.json, figure.png and report.html of finished arms, and says in the last lines what was found.

    Args:
      workdir: of the run.
      name: of the experiment.
      task: what was learnt; its notes and the names of its classes stand in the result.
      question: that it answers.
      arms: arm → one finished training per seed.
      arm_seeds: arm → its seeds; those of the baseline are the result's.
      baseline: the arm that the others are compared with, by Welch's test of the first of ``metrics``.
      wall_clock_s: of the whole run.
      settings: every flag.
      scaled_down: what is smaller than in the study that the experiment follows.
      metrics: what the terminal shows; the one that decides comes first.
      notes: for the reader of the report.
      output: file to write the result to as well, and its figure beside it.
      tested: the arms to compare with the baseline; all by default.
      drawn: the arms whose curves are kept and drawn; all by default. More than a few hide each other.
      **optional: further fields of the result, such as ``robustness`` and ``costs``.
    """
    weak = weak_teachers(arms, "scratch" if "scratch" in arms else baseline)
    totals = {arm: _total([run.sums for run in runs]) for arm, runs in arms.items()}
    result = results.make(
        name,
        question=question,
        flags=settings,
        seeds=list(arm_seeds[baseline]),
        arm_seeds={arm: list(s) for arm, s in arm_seeds.items() if list(s) != list(arm_seeds[baseline])},
        arms={arm: {m: [t.metrics[m] for t in runs] for m in runs[0].metrics} for arm, runs in arms.items()},
        curves={
            arm: {name: [[record.get(m) for record in t.history] for t in runs] for m, name in CURVES.items()}
            for arm, runs in arms.items()
            if runs[0].history and (drawn is None or arm in drawn)
        },
        comparisons=_comparisons(arms, baseline, metrics[0], arms if tested is None else tested),
        calibration={arm: evaluate.reliability(sums) for arm, sums in totals.items()},
        confusion={arm: sums["confusion"].astype(int).tolist() for arm, sums in totals.items()},
        wall_clock_s=wall_clock_s,
        scaled_down=scaled_down,
        notes=[*notes, *weak, *task.notes, *_of_trainings(arms, arm_seeds)],
        class_names=list(task.source.class_names),
        **optional,
    )
    publish(workdir, result, metrics=metrics)
    if output and jax.process_index() == 0:
        results.write(output, result)
        report.save_figure(Path(output).with_suffix(".png"), result)
    for note in weak:
        say(f"note: {note}")
    say(f"Checkpoints, results.json, figure.png and report.html are in {workdir}/.")
    return result


def weak_teachers(arms: Mapping[str, Sequence[Trained | Teacher]], baseline: str) -> list[str]:
    """A sentence for each kind of teacher that is less accurate than students that learnt without one."""

    def found(arm: str) -> tuple[float, str]:
        values = [run.metrics["accuracy"] for run in arms[arm]]
        mean = sum(values) / len(values)
        return mean, f"{mean:.2%} (n = {len(values)})"

    own, said = found(baseline)
    return [
        f"The arm {arm} is less accurate than {baseline}: {found(arm)[1]} against {said}. Students cannot be expected "
        "to gain from it; train it longer, or on more images."
        for arm in arms
        if arm.endswith("teacher") and found(arm)[0] < own
    ]


def _of_trainings(
    arms: Mapping[str, Sequence[Trained | Teacher]], arm_seeds: Mapping[str, Sequence[int]]
) -> list[str]:
    """What trainings have noted, such as that they went on on another machine: each sentence once, with whose it is."""
    whose: dict[str, list[str]] = {}
    for arm, runs in arms.items():
        for seed, run in zip(arm_seeds[arm], runs, strict=True):
            for note in run.notes:
                whose.setdefault(note, []).append(f"{arm}, seed {seed}")
    return [f"{'; '.join(names)}: {note}" for note, names in whose.items()]


def publish(workdir: Path, result: Mapping[str, Any], *, metrics: Sequence[str]) -> None:
    """Writes a result, its figure and its page into the workdir, and says its table and what was found."""
    if jax.process_index() == 0:
        results.write(workdir / "results.json", result)
        report.save_figure(workdir / "figure.png", result)
        report.page({result["name"]: result}, path=workdir / "report.html")
    say(f"\n{report.markdown_table(result, metrics=metrics)}\n")
    say(report.finding(result))


def _total(sums: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The sums of several runs of an arm as one."""
    return {name: np.sum([np.asarray(run[name]) for run in sums], axis=0) for name in sums[0]}


def _comparisons(
    arms: Mapping[str, Sequence[Trained | Teacher]], baseline: str, metric: str, tested: Iterable[str]
) -> list[dict[str, Any]]:
    found = []
    for arm in tested:
        if arm in (baseline, "teacher") or min(len(arms[arm]), len(arms[baseline])) < 3:
            continue
        a, b = ([t.metrics[metric] for t in arms[key]] for key in (arm, baseline))
        found.append({"metric": metric, "a": arm, "b": baseline, **significance.welch(a, b)._asdict()})
    return found
