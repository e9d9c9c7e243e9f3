"""A study: what it declares before its runs, and its result as JSON, figure, report, and the table on the terminal."""

import datetime
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from kdjax import data, evaluate, files, report, results
from kdjax.callbacks import say
from kdjax.study.measures import answers_of
from kdjax.study.notes import Arms, accuracies, equivalence_note, mcnemar_note

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
      primary: the pairs of arms to compare, the first most important; each arm with the baseline by default. They are
        corrected as one family, so that what nobody asked costs nothing.
      chosen_on: what was chosen before, and on which data, such as "temperature and weight: validation, sweep_digits".
      margin: the smallest difference in the first metric that would matter; None where equality is no question.
      drawn: the arms whose curves are kept and drawn; all by default.
    """

    name: str
    question: str
    baseline: str
    metrics: Sequence[str] = TABLE
    scaled_down: str = ""
    primary: Sequence[tuple[str, str]] | None = None
    chosen_on: str = ""
    margin: float | None = None
    drawn: Collection[str] | None = None

    def pairs(self, arms: Iterable[str]) -> list[tuple[str, str]]:
        """The primary comparisons among ``arms``; each arm with the baseline where there is none."""
        if found := [(a, b) for a, b in self.primary or () if {a, b} <= set(arms)]:
            return found
        return [(arm, self.baseline) for arm in arms if arm != self.baseline and not report.is_reference(arm)]


def declare(workdir: Path, study: Study, arms: Iterable[str]) -> list[dict[str, Any]]:
    """Writes down what a study will compare, before its first run, in ``workdir/plan.json``; returns all of that.

    What is already there stays: if the study has changed since, what it is now is added with its time, and stands in
    the result.
    """
    path = workdir / "plan.json"
    try:
        plan = files.read_sealed(path)
    except (FileNotFoundError, files.Damaged):
        plan = []
    now = {
        "metric": study.metrics[0],
        "baseline": study.baseline,
        "primary": [list(pair) for pair in study.pairs(arms)],
        "chosen_on": study.chosen_on,
        "margin": study.margin,
    }
    if not plan or {name: plan[-1][name] for name in now} != now:
        declared = datetime.datetime.now(datetime.UTC).isoformat()  # to the microsecond: no two runs share it
        plan = [*plan, {"declared": declared, **now}]
        if jax.process_index() == 0:
            files.write_sealed(path, plan)
    return plan


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
    supersedes: str = "",
    split: str = "test",
    **measured: Any,
) -> dict[str, Any]:
    """Writes results.json, figure.png and report.html of finished arms, and prints the table and what was found.

    The result holds every student's answers on the split, so that its intervals cover other test examples too.

    Args:
      study: what it is about.
      workdir: to write into.
      dataset: what was learnt; its notes and class names become part of the result.
      arms: arm → one finished run per seed.
      settings: that decide the numbers.
      seconds: of the whole study.
      notes: for the reader of the result.
      output: also write the result to this file, and its figure beside it.
      supersedes: why the result supersedes the one in ``output``, which is kept; see :func:`kdjax.results.write`.
      split: that the runs were measured on.
      **measured: further fields of the result, such as ``robustness``, ``flatness`` and ``costs``.
    """
    seeds = {arm: [run.seed for run in runs] for arm, runs in arms.items()}
    weak = weak_teachers(arms, "scratch" if "scratch" in arms else study.baseline)
    packed, examples = answers_of(dataset, arms, workdir / "answers", split=split), len(dataset.splits[split])
    tested = [(a, b) for a, b in study.pairs(arms) if set(seeds[a]) & set(seeds[b])]
    found = [mcnemar_note(packed, arms, pairs=tested, examples=examples)] if tested else []
    if study.margin is not None and tested:
        found += [equivalence_note(arms, pairs=tested, margin=study.margin)]
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
        plan=declare(workdir, study, arms),
        examples={name: len(dataset.splits[name]) for name in ("train", split)},
        correct={"split": split, "examples": examples, "arms": packed},
        calibration={arm: evaluate.reliability(sums) for arm, sums in totals.items()},
        confusion={arm: sums["confusion"].astype(int).tolist() for arm, sums in totals.items()},
        wall_clock_s=seconds,
        scaled_down=study.scaled_down,
        notes=[*notes, *found, *weak, *dataset.notes, *_of_trainings(arms)],
        class_names=list(dataset.class_names),
        **measured,
    )
    result["comparisons"] = _comparisons(study, result)
    publish(workdir, result, metrics=study.metrics)
    if output and jax.process_index() == 0:
        results.write(output, result, supersedes=supersedes)
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
        if report.is_reference(arm) and found(arm)[0] < own
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


def _comparisons(study: Study, result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The primary comparisons that enough seeds were run for, as they are before any correction."""
    metric = study.metrics[0]
    tests = {pair: report.compare(result, metric, *pair) for pair in study.pairs(result["arms"])}
    return [{"metric": metric, "a": a, "b": b, **t._asdict()} for (a, b), t in tests.items() if t is not None]
