"""The end of an experiment: results.json, a figure, a page, and the last lines on the terminal."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.common.launching import say
from experiments.common.teachers import Teacher
from experiments.common.training import Trained
from kdjax import report, results, significance

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
    tested: Sequence[str] | None = None,
    **optional: Any,
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
      tested: the arms to compare with the baseline; all by default.
      **optional: further fields of the result.
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
        comparisons=_comparisons(arms, baseline, arms if tested is None else tested),
        wall_clock_s=wall_clock_s,
        scaled_down=scaled_down,
        notes=list(notes),
        **optional,
    )
    if jax.process_index() == 0:
        results.write(workdir / "results.json", result)
        report.save_figure(workdir / "figure.png", result)
        report.page(result, path=workdir / "report.html", title=name)
    say(f"\n{report.markdown_table(result, metrics=TABLE)}\n")
    say(report.finding(result))
    say(f"Checkpoints, results.json, figure.png and report.html are in {workdir}/.")
    return result


def _comparisons(
    arms: Mapping[str, Sequence[Trained | Teacher]], baseline: str, tested: Iterable[str]
) -> list[dict[str, Any]]:
    found = []
    for arm in tested:
        if arm in (baseline, "teacher") or min(len(arms[arm]), len(arms[baseline])) < 3:
            continue
        a, b = ([t.metrics["accuracy"] for t in arms[key]] for key in (arm, baseline))
        found.append({"metric": "accuracy", "a": arm, "b": baseline, **significance.welch(a, b)._asdict()})
    return found
