r"""Is distillation more than label smoothing? An example of a study: three arms, in one short file.

    python -m experiments.label_smoothing --workdir=runs/label_smoothing

A teacher's soft targets also smooth the labels. If that were all, smoothing alone would help as much. Three students of
the same seeds learn from --num_train digits: from the labels (scratch), from smoothed labels, and by KD. Takes about a
minute on two CPU cores; docs/results/label_smoothing.md has the numbers to expect.

References:
  Yuan et al., `Revisiting Knowledge Distillation via Label Smoothing Regularization
  <https://arxiv.org/abs/1909.11723>`_, 2020.
"""

import time
from collections.abc import Sequence
from typing import Any

from experiments import cli
from kdjax import methods, run, study, teacher
from kdjax.callbacks import Callback, ProgressBar
from kdjax.recipe import Recipe

DATA = cli.define(cli.Data(num_train=200), only=("num_train",))
RECIPE = cli.define(Recipe(epochs=80, batch_size=20, learning_rate=2e-3, schedule="cosine", evaluate_every=5))
SEEDS = cli.define_seeds()
LAUNCH = cli.define(cli.Launch(), only=("workdir", "output", "supersedes", "split", "smoke"))

ARMS = {
    "scratch": methods.labels(),
    "label_smoothing": methods.label_smoothing_cross_entropy(),
    "kd": methods.kd(temperature=4.0),
}


def main(callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
    """Trains a teacher on all digits and every arm on a few, and writes the result."""
    start, launch, settings = time.monotonic(), LAUNCH.value, cli.settings(__name__)
    few, digits = DATA.value.load(), DATA.value.load(num_train=0)
    recipe = launch.shorten(RECIPE.value, epochs=2)
    large, small = (cli.network(f"digits_{size}", few) for size in ("teacher", "student"))
    made_from = settings | {"data": few.fingerprint, "teacher_data": digits.fingerprint}
    about = study.Study(
        "label_smoothing",
        "Is distillation more than label smoothing?",
        baseline="scratch",
        scaled_down="8x8 digits; one teacher",
        primary=[("kd", "label_smoothing"), ("kd", "scratch"), ("label_smoothing", "scratch")],
    )
    workdir = cli.begin(launch, made_from, about, ARMS)
    watch = [ProgressBar(), *callbacks]

    train_teacher = run.make_trainer(large, methods.labels(), digits, recipe, split=launch.split)
    taught = train_teacher(0, workdir / "teacher" / "0", arm="teacher", callbacks=watch)
    answers = teacher.answers(taught, few, directory=workdir / "teacher_answers")
    arms: dict[str, list[run.Trained]] = {"teacher": [taught]}
    for arm, method in ARMS.items():
        train = run.make_trainer(small, method, few, recipe, teacher=answers, split=launch.split)
        arms[arm] = [
            train(seed, workdir / arm / str(seed), arm=arm, settings=settings, callbacks=watch)
            for seed in SEEDS.value[: 3 if launch.smoke else None]
        ]
    to = {"output": launch.output, "supersedes": launch.supersedes, "split": launch.split}
    seconds = time.monotonic() - start
    return study.conclude(about, workdir, few, arms, settings=settings, seconds=seconds, **to)


if __name__ == "__main__":
    cli.launch(main)
