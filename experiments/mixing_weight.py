r"""How should labels and teacher be weighted in distillation? Many weights and seeds in one program.

    python -m experiments.mixing_weight --workdir=runs/mixing_weight
    python -m experiments.mixing_weight --workdir=runs/mixing_weight_noisy --label_noise=0.05
    python -m experiments.mixing_weight --dataset=mnist --data_dir=data --workdir=runs/mixing_weight_mnist \
        --num_train=10000 --label_noise=0.05 --teacher=keras_teacher --student=keras_student --temperature=3 \
        --epochs=20 --teacher_epochs=8 --teacher_learning_rate=5e-4 --batch_size=64 --seeds=0,1,2

The loss is a·hard + (1 − a)·T²·soft, as in Hao (2023), A Study of Response-Based Knowledge Distillation and the Effects
of Alpha on Model Accuracy: hard is the cross-entropy with the labels, soft the divergence from the teacher's softened
logits. The students of every a in --hard_weights and of every seed are trained at once, in one compiled program
(:func:`kdjax.run.train_many`): 55 by default, which take less than a minute on two CPU cores for the digits.

The best a is chosen on the validation split, in the last epoch, and only that one is tested against the largest a
(labels alone) on the test split. --label_noise makes a share of the labels wrong, for the teacher too unless
--teacher_dir names one that was trained on others; validation and test labels stay as they are.

The workdir receives the checkpoints, results.json (with the field "swept"), figure.png and report.html. The same
command started again continues where it was stopped.
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
from kdjax.recipe import Machine, Recipe

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
    omit=("teacher_seeds",),
)
HARD_WEIGHTS = flags.DEFINE_list(
    "hard_weights", [f"{i / 10:g}" for i in range(11)], "Every a, rising, from 0 to 1."
)
TEMPERATURE = flags.DEFINE_float("temperature", 4.0, "Softening of both logits.", lower_bound=1e-3)
SEEDS = cli.define_seeds()
MAPPING = flags.DEFINE_enum(
    "mapping", "vmap", list(vmapped.MAPPINGS), "vmap trains students side by side; map needs less memory."
)
LAUNCH = cli.define(cli.Launch(), only=("workdir", "output", "smoke"))
MACHINE = cli.define(Machine())

Runs = Mapping[float, Sequence[run.Trained]]  # weight → students that have not diverged


def mixed(outputs, batch):
    """The loss of a student, by its own weight of the labels."""
    a = batch["settings"]["hard_weight"]
    soft = losses.soft_target_kl(outputs.logits, batch["teacher_logits"], temperature=TEMPERATURE.value)
    return {"hard": a * methods.cross_entropy(outputs, batch), "soft": (1 - a) * jnp.mean(soft)}


def main() -> dict[str, Any]:
    """The teacher, its cached answers, all students at once, report."""
    start, launch, machine = time.monotonic(), LAUNCH.value, MACHINE.value
    weights, seeds = hard_weights(), SEEDS.value[: 3 if launch.smoke else None]
    recipe, wanted = smoke(RECIPE.value), TEACHER.value
    wanted = dataclasses.replace(wanted, recipe=smoke(wanted.recipe))
    few = DATA.value.load(at_most=256 if launch.smoke else None)
    student, count = cli.network(STUDENT.value, few), len(weights) * len(seeds)
    devices = parallel.local_devices(machine.devices)
    parallel.check_batch_size(recipe.batch_size, devices)
    options = {"launch": launch, "settings": cli.settings(__name__), "machine": machine}
    source = cli.teachers(wanted, DATA.value, few, **options)
    trained = {student: count} | ({} if wanted.teacher_dir else {source.network: 1})
    cli.check_disk(launch.workdir, trained, cache_bytes=4 * few.num_classes * len(few.images))
    workdir = cli.claim_workdir(launch.workdir, source.made_from)
    (teacher,) = source.train(workdir, [ProgressBar()])
    if DATA.value.label_noise:
        files.write_json(workdir / "mislabelled.json", few.example_ids[few.mislabelled].tolist())
    students = run.train_many(
        student,
        methods.objective(mixed),
        few,
        recipe,
        teacher=teachers.answers(teacher, few, directory=workdir / "teacher_answers", devices=devices),
        seeds=[seed for _ in weights for seed in seeds],
        directory=workdir / "students",
        many=run.Many(
            settings={"hard_weight": [a for a in weights for _ in seeds]},
            arm=f"{count} students",
            identity=source.settings,
            mapping=MAPPING.value,
            machine=machine,
        ),
    )
    runs, notes = finite({a: students[i * len(seeds) :][: len(seeds)] for i, a in enumerate(weights)})
    more = {"settings": source.settings, "seconds": time.monotonic() - start}
    return report(workdir, few, recipe, teacher, runs, notes, **more)


def report(
    workdir: Path,
    few: data.Dataset,
    recipe: Recipe,
    teacher: run.Trained,
    runs: Runs,
    notes: Sequence[str],
    **more: Any,
) -> dict[str, Any]:
    """Chooses a weight, tests it, and writes the result with the sweep over all weights."""
    (best, found), (height, width, _) = choose(runs), few.image_shape
    assert few.splits is not None
    about = study.Study(
        "mixing_weight",
        f"How should a student of {few.name} weight its labels and its teacher?",
        baseline=name(max(runs)),
        scaled_down=f"{len(few.splits['train'])} training images of {height}x{width}, where the study had 10,000 of "
        f"28x28; {recipe.epochs} epochs, where it had 100 to 1000; one teacher",
        tested=[name(best)],
        drawn=("teacher",),  # the sweep shows where the students end
    )
    swept = {metric: [[of(one) for one in own] for own in runs.values()] for metric, of in SWEPT.items()}
    arms = {"teacher": [teacher]} | {name(a): own for a, own in runs.items()}
    more |= {"swept": [{"name": "hard_weight", "values": list(runs), "arms": {"student": swept}}]}
    result = study.conclude(
        about, workdir, few, arms, notes=[found, *notes], output=LAUNCH.value.output, **more
    )
    cli.say(found)
    return result


SWEPT = {
    "accuracy": lambda trained: trained.metrics["accuracy"],
    "loss": lambda trained: trained.metrics["loss"],
    "validation_accuracy": lambda trained: trained.history[-1]["validation_accuracy"],
    "validation_loss": lambda trained: trained.history[-1]["validation_loss"],
}
"""What is recorded of every student, all of the last epoch; on the test split unless it says so."""


def hard_weights() -> list[float]:
    """``--hard_weights`` as different numbers, rising from 0 or more to 1 or less."""
    given = f"--hard_weights={','.join(HARD_WEIGHTS.value)}"
    try:
        found = [float(item) for item in HARD_WEIGHTS.value]
    except ValueError as error:
        raise ValueError(f"{given} must be numbers, such as 0,0.5,1.") from error
    if not found or found != sorted(set(found)) or not 0 <= found[0] <= found[-1] <= 1:
        raise ValueError(
            f"{given} must be different numbers that rise from 0 or more to 1 or less, as 0,0.5,1."
        )
    return found


def smoke(recipe: Recipe) -> Recipe:
    """The recipe, with two epochs in a smoke run."""
    return dataclasses.replace(recipe, epochs=2) if LAUNCH.value.smoke else recipe


def name(a: float) -> str:
    """The arm of a weight."""
    return f"a = {a:g}"


def finite(runs: Runs) -> tuple[dict[float, list[run.Trained]], list[str]]:
    """The students that have not diverged, and one note for each that has."""
    kept: dict[float, list[run.Trained]] = {}
    notes = []
    for a, trained in ((a, trained) for a, own in runs.items() for trained in own):
        epoch = vmapped.diverged_at(trained.fitted)
        if epoch is None:
            kept.setdefault(a, []).append(trained)
        else:
            notes.append(f"{name(a)}, seed {trained.seed} diverged in epoch {epoch} and is left out.")
    return kept, notes


def choose(runs: Runs) -> tuple[float, str]:
    """The best weight by validation accuracy (by its loss between equals), and its accuracy on the test split."""

    def mean(a: float, metric: str) -> float:
        return statistics.fmean(SWEPT[metric](trained) for trained in runs[a])

    best = max(runs, key=lambda a: (mean(a, "validation_accuracy"), -mean(a, "validation_loss")))
    labels = max(runs)
    said = (
        f"The validation split chooses {name(best)} (accuracy {mean(best, 'validation_accuracy'):.2%} there); its test "
        f"accuracy is {mean(best, 'accuracy'):.2%} on average"
    )
    return best, said + (
        "." if best == labels else f", that of {name(labels)} {mean(labels, 'accuracy'):.2%}."
    )


if __name__ == "__main__":
    cli.launch(main)
