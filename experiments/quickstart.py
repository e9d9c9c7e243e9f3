r"""Does a small network learn more from a large one than from the labels alone, when labels are few?

    python -m experiments.quickstart

The whole data flow on real data in under two minutes on two CPU cores, without a download: scikit-learn's 1,797
handwritten digits. A teacher is trained on the whole training split; its answers for every image are computed once,
cached and verified; a much smaller student then learns from only --num_train of those images, over five seeds, and is
measured on the test split. It learns from their labels alone (scratch), with the teacher's
softened logits beside them (kd), with some images overlaid with the teacher's integrated gradients as well (kd+ig; see
experiments.ig_cifar10), or starting from weights selected from the teacher, with escapes along negative curvature
(sprkd+kd; experiments.sprkd_malaria has its ablation). At the end the curvature of the loss is measured where each arm
came to rest.

Leaves in runs/quickstart/: the checkpoints of every run, results.json, figure.png and report.html. Expect kd to beat
scratch, and sprkd+kd to beat kd; the numbers stand in docs/results/quickstart.md.

References:
  Hinton et al., Distilling the Knowledge in a Neural Network, arXiv 1503.02531, 2015. Hernandez et al., Knowledge
  Distillation with Integrated Gradients, arXiv 2503.13008, 2025. Dewan, SPRKD, arXiv 2607.23346, 2026.
"""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli
from kdjax import data, methods, run, saddles, study
from kdjax import teacher as teachers
from kdjax.callbacks import ProgressBar
from kdjax.recipe import Recipe
from kdjax.types import Params

NUM_TRAIN = flags.DEFINE_integer("num_train", 100, "Training images that the students see.", lower_bound=16)
KD = cli.define(methods.KdOptions())
LAUNCH = cli.define(cli.Launch(workdir="runs/quickstart"), only=("workdir", "output", "supersedes", "smoke"))

TEACHER = Recipe(epochs=30, batch_size=64, learning_rate=2e-3, schedule="cosine", evaluate_every=5)
STUDENT = Recipe(epochs=150, batch_size=20, learning_rate=2e-3, schedule="cosine", evaluate_every=10)

PRIMARY = [("kd", "scratch"), ("kd+ig", "kd"), ("sprkd+kd", "kd")]
CHOSEN_ON = (
    "sprkd's region, approach and escapes: validation of digits with 300 labels (sprkd_digits_300), after an arm of "
    "sprkd without kd had been read on this test split; nothing else was chosen"
)
NOTES = [
    "Blur and translation are in pixels, of strengths made for pictures of 32x32. One pixel of an 8x8 digit is "
    "an eighth of it, so hardly any network stands them here.",
    "All students of sprkd+kd start from the same weights, so they differ less than those of other arms.",
    "make web builds a page on which one can draw a digit for the student of kd, seed 0, and for its teacher.",
]


def arms(region: Params) -> Mapping[str, methods.Method]:
    """What each student learns from; ``region`` holds weights selected from the teacher."""
    kd = methods.kd(**vars(KD.value))
    return {
        "scratch": methods.labels(),
        "kd": kd,
        "kd+ig": kd + methods.ig_overlay(),
        "sprkd+kd": kd + methods.sprkd(region),
    }


def main() -> dict[str, Any]:
    """Teacher, its cached answers and maps, students, report."""
    start, launch, settings = time.monotonic(), LAUNCH.value, cli.settings(__name__)
    recipes = [
        dataclasses.replace(r, epochs=2, evaluate_every=1) if launch.smoke else r for r in (TEACHER, STUDENT)
    ]
    digits = data.load("digits")
    everything, few = data.split(digits), data.split(digits, num_train=NUM_TRAIN.value)
    large, small = (cli.network(f"digits_{size}", few) for size in ("teacher", "student"))
    names = list(arms(small.init(0)[0]))  # raises for weights and temperatures that make no sense
    made_from = settings | {"data": few.fingerprint, "teacher_data": everything.fingerprint}
    workdir, watch = cli.begin(launch, made_from, about(), names), {"callbacks": [ProgressBar()]}

    train_teacher = run.make_trainer(large, methods.labels(), everything, recipes[0])
    teacher = train_teacher(0, workdir / "teacher" / "0", arm="teacher", **watch)
    answers = teachers.answers(teacher, few, directory=workdir / "teacher_answers")
    maps = teachers.explain(teacher, few, directory=workdir / "maps")
    with_maps = teachers.with_maps(answers, maps)
    region = saddles.select_weights(teacher.weights.params, small.init(0)[0])

    students: dict[str, list[run.Trained]] = {}
    for arm, method in arms(region).items():
        signal = with_maps if arm == "kd+ig" else answers
        train_student = run.make_trainer(small, method, few, recipes[1], teacher=signal)
        students[arm] = [
            train_student(seed, workdir / arm / str(seed), arm=arm, settings=settings, **watch)
            for seed in range(3 if launch.smoke else 5)
        ]
    overlays = study.pictures(few, maps.answers["map"])
    return report(workdir, few, {"teacher": [teacher], **students}, settings, start, overlays=overlays)


def report(
    workdir: Path,
    few: data.Dataset,
    every: study.Arms,
    settings: Mapping[str, Any],
    start: float,
    **more: Any,
) -> dict[str, Any]:
    """Robustness, curvature and costs of every arm, and the result."""
    students = {arm: runs for arm, runs in every.items() if arm != "teacher"}
    more |= {
        "robustness": study.robustness_of(few, every, workdir / "robustness"),
        "flatness": study.flatness_of(few, students, workdir / "flatness"),
        "densities": study.densities_of(few, students, workdir / "densities"),
        "surfaces": study.surfaces_of(few, students, workdir / "surfaces"),
        "costs": study.costs_of(every),
    }
    more |= {"settings": settings, "seconds": time.monotonic() - start, "notes": NOTES}
    launch = LAUNCH.value
    return study.conclude(
        about(), workdir, few, every, output=launch.output, supersedes=launch.supersedes, **more
    )


def about() -> study.Study:
    """The question, and what it compares."""
    return study.Study(
        "quickstart",
        f"Does a small network learn more of digits from a teacher than from {NUM_TRAIN.value} labels alone?",
        baseline="scratch",
        scaled_down="8x8 images" + ("; two epochs (smoke)" if LAUNCH.value.smoke else ""),
        primary=PRIMARY,
        chosen_on=CHOSEN_ON,
    )


if __name__ == "__main__":
    cli.launch(main)
