r"""Does a student learn digits it never saw? Hinton's MNIST study: soft targets at T = 20, and a digit held out.

    python -m experiments.hinton_mnist --data_dir=data --workdir=runs/hinton_mnist

A teacher with two hidden layers of 1200 units, dropout, weight constraints and images jittered by two pixels; a student
with two of 800 and no regularisation at all, which learns from the labels alone (scratch), or from the labels and the
teacher's softened logits of the same images at T = 20 (kd). Then both again without a single image of
--held_out_class, and with its bias corrected: raised by what makes the fewest errors on the validation split. (The
paper chose it on the test set.)

Needs MNIST in --data_dir (python -m experiments.prepare_data). Takes about an hour and a half on two CPU cores. The
paper does not say its epochs, which were many more; --epochs and --teacher_epochs are ours. Expect kd to beat scratch
by far, and a student that recognises most threes without having seen one; the counts stand in docs/results.

References:
  Hinton, Vinyals and Dean, `Distilling the Knowledge in a Neural Network <https://arxiv.org/abs/1503.02531>`_, 2015,
  section 3.
"""

import dataclasses
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import cli
from kdjax import data, evaluate, methods, run, study
from kdjax import teacher as teachers
from kdjax.callbacks import ProgressBar
from kdjax.recipe import Recipe
from kdjax.types import Weights

DATA = cli.define(cli.Data(dataset="mnist"), only=("dataset", "data_dir", "image_size", "skip_broken"))
KD = cli.define(methods.KdOptions(temperature=20.0))
HELD_OUT_CLASS = flags.DEFINE_string(
    "held_out_class", "3", "The class that some students never see, by name."
)
STUDENT = Recipe(epochs=20, batch_size=128, learning_rate=1e-3, schedule="cosine", evaluate_every=2)
RECIPE = cli.define(STUDENT, only=("epochs",))
TEACHER_RECIPE = cli.define(
    dataclasses.replace(STUDENT, epochs=40, padding=2, max_norm=15**0.5), prefix="teacher_", only=("epochs",)
)
SEEDS = cli.define_seeds()
LAUNCH = cli.define(
    cli.Launch(workdir="runs/hinton_mnist"), only=("workdir", "output", "supersedes", "smoke")
)

NOTES = [
    "Published (Hinton et al. 2015, one run each): 67 errors for the teacher, 146 for the student on hard labels, 74 "
    "distilled at T = 20; without the threes 206, of which 133 of the 1,010 threes, and 109, of which 14, once the "
    "bias was raised by 3.5, which was chosen on the test set. Here the validation split chooses it.",
    "The validation split holds images of the held-out class: without any, no bias could be chosen.",
]


def arms(dataset: data.Dataset, digit: int) -> Mapping[str, tuple[methods.Method, data.Dataset]]:
    """What each student learns from: a method, and a data set with or without the digit."""
    kd = methods.kd(**vars(KD.value))
    fewer, never = without(dataset, digit), f"no {HELD_OUT_CLASS.value}"
    return {
        "scratch": (methods.labels(), dataset),
        "kd": (kd, dataset),
        f"scratch, {never}": (methods.labels(), fewer),
        f"kd, {never}": (kd, fewer),
    }


def main() -> dict[str, Any]:
    """One teacher per seed, its cached answers, its students, corrected biases, report."""
    start, launch, settings = time.monotonic(), LAUNCH.value, cli.settings(__name__)
    seeds, recipe, teacher_recipe = SEEDS.value, RECIPE.value, TEACHER_RECIPE.value
    if launch.smoke:
        seeds, short = seeds[:1], {"epochs": 1, "evaluate_every": 1}
        recipe, teacher_recipe = (dataclasses.replace(r, **short) for r in (recipe, teacher_recipe))
    dataset = DATA.value.load(at_most=256 if launch.smoke else None)
    if HELD_OUT_CLASS.value not in dataset.class_names:
        raise ValueError(
            f"--held_out_class={HELD_OUT_CLASS.value} is none of the classes {', '.join(dataset.class_names)}."
        )
    digit = dataset.class_names.index(HELD_OUT_CLASS.value)
    learnt_from = arms(dataset, digit)
    large, small = (cli.network(f"hinton_{name}", dataset) for name in ("teacher", "student"))
    scale = f"{teacher_recipe.epochs} epochs of the teacher and {recipe.epochs} of the students"
    asked = about(dataset, scale)
    workdir = cli.begin(launch, settings | {"data": dataset.fingerprint}, asked, names(learnt_from))
    watch = {"callbacks": [ProgressBar()]}

    train_teacher = run.make_trainer(large, methods.labels(), dataset, teacher_recipe)
    finished = {
        "teacher": [train_teacher(n, workdir / "teacher" / str(n), arm="teacher", **watch) for n in seeds]
    }
    answers = [
        teachers.answers(teacher, dataset, directory=workdir / "teacher_answers" / str(teacher.seed))
        for teacher in finished["teacher"]
    ]
    for arm, (method, seen) in learnt_from.items():
        home = workdir / arm.replace(", ", "_").replace(" ", "_")
        trainers = [run.make_trainer(small, method, seen, recipe, teacher=signal) for signal in answers]
        finished[arm] = [
            train_student(n, home / str(n), arm=arm, settings=settings, **watch)
            for n, train_student in zip(seeds, trainers, strict=True)  # student n has teacher n
        ]
    for arm in list(learnt_from)[2:]:
        finished[f"{arm}, bias corrected"] = [corrected(dataset, one, digit) for one in finished[arm]]
    counts = {arm: [counted(one, digit) for one in runs] for arm, runs in finished.items()}
    more = {"output": launch.output, "supersedes": launch.supersedes, "notes": NOTES}
    more |= {"settings": settings, "seconds": time.monotonic() - start}
    return study.conclude(asked, workdir, dataset, counts, **more)


def names(learnt_from: Iterable[str]) -> list[str]:
    """All arms: those that are trained, and those whose bias is corrected."""
    return [*learnt_from, *(f"{arm}, bias corrected" for arm in list(learnt_from)[2:])]


def about(dataset: data.Dataset, scale: str) -> study.Study:
    """The question, and how far this is from the paper."""
    return study.Study(
        "hinton_mnist",
        f"Does a small network learn MNIST better from a teacher's soft targets at T = {KD.value.temperature:g}, even "
        f"a {HELD_OUT_CLASS.value} that it never saw?",
        baseline="scratch",
        metrics=("errors", "errors_on_omitted", "bias_shift", "accuracy", "loss", "ece"),
        scaled_down=f"{scale}; {len(dataset.splits['train']):,} training images"
        + (", smoke" if LAUNCH.value.smoke else ", the others choose the bias"),
    )


def without(dataset: data.Dataset, digit: int) -> data.Dataset:
    """The data set with no training image of a digit."""
    train = dataset.splits["train"]
    return dataset._replace(splits={**dataset.splits, "train": train[dataset.labels[train] != digit]})


def corrected(dataset: data.Dataset, student: run.Trained, digit: int) -> run.Trained:
    """A student whose bias for the digit is raised by what makes the fewest errors in validation."""
    labels = {split: dataset.labels[dataset.splits[split]] for split in ("validation", "test")}
    scores = study.logits_of(student, dataset, split="validation")
    shift = evaluate.best_shift(scores, labels["validation"], digit)
    last = max(student.weights.params)  # of the dense layers, which are numbered
    params = {**student.weights.params, last: dict(student.weights.params[last])}
    params[last]["bias"] = params[last]["bias"].at[digit].add(shift)
    weights = Weights(params, student.weights.model_state)
    found = student._replace(fitted=student.fitted._replace(last=weights, history=[]))  # nothing was trained
    scores = jnp.asarray(study.logits_of(found, dataset))
    valid = jnp.ones(len(scores), jnp.float32)
    sums = evaluate.metric_sums(scores, jnp.asarray(labels["test"]), valid=valid)
    metrics = evaluate.summarise(sums) | {"bias_shift": shift}
    return found._replace(sums=jax.device_get(sums), metrics=metrics)


def counted(student: run.Trained, digit: int) -> run.Trained:
    """A run with its errors as Hinton counts them: on the whole test split, and on the held-out digit."""
    confusion = np.asarray(student.sums["confusion"])
    missed = confusion.sum(1) - np.diag(confusion)
    errors = {"errors": float(missed.sum()), "errors_on_omitted": float(missed[digit])}
    return student._replace(metrics=errors | student.metrics)


if __name__ == "__main__":
    cli.launch(main)
