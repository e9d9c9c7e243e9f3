r"""How should labels and teacher be weighted in distillation? Many weights and seeds in one program.

    python -m experiments.mixing_weight --workdir=runs/mixing_weight
    python -m experiments.mixing_weight --workdir=runs/mixing_weight_noisy --label_noise=0.05
    python -m experiments.mixing_weight --dataset=mnist --data_dir=data --workdir=runs/mixing_weight_mnist \
        --num_train=10000 --label_noise=0.05 --teacher=keras_teacher --student=keras_student --temperature=3 \
        --epochs=20 --teacher_epochs=8 --teacher_learning_rate=5e-4 --batch_size=64 --seeds=0,1,2

The loss is a·hard + (1 − a)·T²·soft, as in Hao (2023), A Study of Response-Based Knowledge Distillation and the Effects
of Alpha on Model Accuracy. The students of every a in --hard_weights and of every seed are trained at once, in one
compiled program: 55 by default, which take less than a minute on two CPU cores for the digits.

The best a is chosen on the validation split, in the last epoch, and only that one is tested against the largest a
(labels alone) on the test split. --label_noise makes a share of the labels of the training split wrong; the teacher
sees the same wrong labels unless --teacher_label_noise=clean is given, or --teacher_dir names one that was trained on
others. The workdir receives the checkpoints, results.json (with the field "swept"), figure.png and report.html; the
same command started again continues where it was stopped.
"""

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from absl import flags

from experiments import cli
from kdjax import data, files, losses, methods, parallel, run, study, vmapped
from kdjax import teacher as teachers
from kdjax.callbacks import ProgressBar
from kdjax.options import option
from kdjax.recipe import Machine, Recipe


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What the students differ in, and how they are trained at once."""

    hard_weights: tuple[float, ...] = option(tuple(i / 10 for i in range(11)), "Every a, rising.")
    temperature: float = option(4.0, "Softening of both logits.", least=1e-3)
    mapping: str = option(
        "vmap", "vmap trains students side by side; map needs less memory.", choices=tuple(vmapped.MAPPINGS)
    )

    def __post_init__(self) -> None:
        a = self.hard_weights
        if not a or list(a) != sorted(set(a)) or not 0 <= a[0] <= a[-1] <= 1:
            given = ",".join(map(str, a))
            raise ValueError(f"hard_weights={given} must rise from 0 or more to 1 or less, such as 0,0.5,1.")


DATA = cli.define(cli.Data(num_train=100))
STUDENT = flags.DEFINE_string("student", "digits_student", "As --teacher.")
RECIPE = cli.define(
    Recipe(epochs=150, batch_size=20, learning_rate=2e-3, schedule="cosine", evaluate_every=10),
    only=("epochs", "batch_size", "learning_rate", "evaluate_every"),
)
TEACHER = cli.define_teacher(
    Recipe(epochs=30, batch_size=64, learning_rate=2e-3, schedule="cosine", evaluate_every=5),
    only=("epochs", "batch_size", "learning_rate"),
    defaults=cli.Teacher(teacher_num_train=0),
    omit=("teacher_answers", "teacher_seeds"),
)
SWEEP = cli.define(Sweep())
SEEDS = cli.define_seeds()
LAUNCH = cli.define(cli.Launch(), only=("workdir", "output", "supersedes", "smoke"))
MACHINE = cli.define(Machine())

CHOSEN = "chosen"  # the arm of the weight that validation chooses

Runs = Mapping[float, Sequence[run.Trained]]  # weight → students that have not diverged


def mixed(outputs, batch):
    """The loss of a student, by its own weight of the labels."""
    a = batch["settings"]["hard_weight"]
    soft = losses.soft_target_kl(outputs.logits, batch["teacher_logits"], temperature=SWEEP.value.temperature)
    return {"hard": a * methods.cross_entropy(outputs, batch), "soft": (1 - a) * jnp.mean(soft)}


def main() -> dict[str, Any]:
    """The teacher, its cached answers, all students at once, report."""
    start, launch, machine = time.monotonic(), LAUNCH.value, MACHINE.value
    weights, seeds = SWEEP.value.hard_weights, SEEDS.value[: 3 if launch.smoke else None]
    recipe, wanted = launch.shorten(RECIPE.value, epochs=2), TEACHER.value
    wanted = dataclasses.replace(wanted, recipe=launch.shorten(wanted.recipe, epochs=2))
    few = DATA.value.load(at_most=256 if launch.smoke else None)
    student, count = cli.network(STUDENT.value, few), len(weights) * len(seeds)
    devices = parallel.local_devices(machine.devices)
    parallel.check_batch_size(recipe.batch_size, devices)
    options = {"launch": launch, "settings": cli.settings(__name__), "machine": machine}
    source = cli.teachers(wanted, DATA.value, few, **options)
    cache_bytes = source.cache_bytes(len(few.images))
    cli.check_disk(launch.workdir, {student: count} | source.to_train, cache_bytes=cache_bytes)
    about = question(few)
    workdir = cli.begin(launch, source.made_from, about, [CHOSEN, *map(name, weights)])
    (teacher,) = source.train(workdir, [ProgressBar()])
    if DATA.value.label_noise:
        files.write_json(workdir / "mislabelled.json", few.example_ids[few.mislabelled].tolist())
    own = {"hard_weight": [a for a in weights for _ in seeds]}
    how = {"arm": f"{count} students", "mapping": SWEEP.value.mapping, "machine": machine}
    students = run.train_many(
        *(student, methods.objective(mixed), few, recipe),
        teacher=teachers.answers(teacher, few, directory=workdir / "teacher_answers", devices=devices),
        seeds=[seed for _ in weights for seed in seeds],
        directory=workdir / "students",
        many=run.Many(own, identity=source.settings, **how),
    )
    runs, notes = finite({a: students[i * len(seeds) :][: len(seeds)] for i, a in enumerate(weights)})
    (best, found), more = choose(runs), {"output": launch.output, "supersedes": launch.supersedes}
    more |= {"settings": source.settings, "seconds": time.monotonic() - start, "notes": [found, *notes]}
    result = report(about, workdir, few, {"teacher": [teacher], CHOSEN: runs[best]}, runs, **more)
    cli.say(found)
    return result


def question(few: data.Dataset) -> study.Study:
    """What is asked: whether the weight that validation chooses is better than labels alone."""
    height, width, _ = few.image_shape
    labels = name(max(SWEEP.value.hard_weights))
    return study.Study(
        "mixing_weight",
        f"How should a student of {few.name} weight its labels and its teacher?",
        baseline=labels,
        scaled_down=f"{len(few.splits['train'])} training images of {height}x{width}, where the study had 10,000 of "
        f"28x28; {LAUNCH.value.shorten(RECIPE.value, epochs=2).epochs} epochs, where it had 100 to 1000; one teacher",
        primary=[(CHOSEN, labels)],
        chosen_on="the weight of the arm chosen: mean validation accuracy of these seeds in the last epoch",
        drawn=("teacher",),  # the sweep shows where the students end
    )


def report(
    about: study.Study, workdir: Path, few: data.Dataset, first: study.Arms, runs: Runs, **more: Any
) -> dict[str, Any]:
    """Writes the result with the sweep over all weights."""
    labels = name(max(runs))  # the largest weight of which some student has not diverged
    about = about._replace(baseline=labels, primary=[(CHOSEN, labels)])
    numbers = {a: [swept(student) for student in own] for a, own in runs.items()}
    curves = {
        m: [[one[m] for one in own] for own in numbers.values()] for m in next(iter(numbers.values()))[0]
    }
    arms = {**first, **{name(a): own for a, own in runs.items()}}
    more |= {"swept": [{"name": "hard_weight", "values": list(runs), "arms": {"student": curves}}]}
    return study.conclude(about, workdir, few, arms, **more)


def swept(student: run.Trained) -> dict[str, float]:
    """What is drawn against the weight, all of the last epoch; on the test split unless it says so."""
    validated = ("validation_accuracy", "validation_loss")
    return {m: student.metrics[m] for m in ("accuracy", "loss")} | {
        m: student.history[-1][m] for m in validated
    }


def name(a: float) -> str:
    """The arm of a weight."""
    return f"a = {a:g}"


def finite(runs: Runs) -> tuple[dict[float, list[run.Trained]], list[str]]:
    """The students that have not diverged, and one note for each that has."""
    kept: dict[float, list[run.Trained]] = {}
    notes = []
    for a, student in ((a, student) for a, own in runs.items() for student in own):
        if (epoch := vmapped.diverged_at(student.fitted)) is None:
            kept.setdefault(a, []).append(student)
        else:
            notes.append(f"{name(a)}, seed {student.seed} diverged in epoch {epoch} and is left out.")
    return kept, notes


def choose(runs: Runs) -> tuple[float, str]:
    """The best weight by validation accuracy (by its loss between equals), and its accuracy on the test split."""

    def mean(a: float, metric: str) -> float:
        return statistics.fmean(swept(student)[metric] for student in runs[a])

    best = max(runs, key=lambda a: (mean(a, "validation_accuracy"), -mean(a, "validation_loss")))
    labels = max(runs)
    against = "" if best == labels else f", that of {name(labels)} {mean(labels, 'accuracy'):.2%}"
    return best, (
        f"The validation split chooses {name(best)} (accuracy {mean(best, 'validation_accuracy'):.2%} there); its test "
        f"accuracy is {mean(best, 'accuracy'):.2%} on average{against}."
    )


if __name__ == "__main__":
    cli.launch(main)
