r"""How much should a student believe its labels, and how much its teacher? Many weights and seeds in one program.

    python -m experiments.mixing_weight --workdir=runs/mixing_weight
    python -m experiments.mixing_weight --workdir=runs/mixing_weight_noisy --label_noise=0.05
    python -m experiments.mixing_weight --dataset=mnist --data_dir=data --workdir=runs/mixing_weight_mnist \
        --num_train=10000 --label_noise=0.05 --teacher=keras_teacher --student=keras_student --temperature=3 \
        --epochs=20 --teacher_epochs=8 --teacher_learning_rate=5e-4 --batch_size=64 --seeds=0,1,2

The loss is a·hard + (1 − a)·T²·soft, as in Hao (2023), A Study of Response-Based Knowledge Distillation and the Effects
of Alpha on Model Accuracy: hard is the cross-entropy with the labels, soft the divergence from the teacher's softened
answers. The students of every a in --hard_weights and of every seed are trained at once, in one compiled program
(:mod:`kdjax.vmapped`): 55 of them unless told otherwise; for the digits, all takes less than a minute on two CPU cores.

The best a is chosen on the validation split, in the last epoch, and only that one is tested against the largest a
(labels alone) on the test split. --label_noise makes a share of the labels wrong, for the teacher too unless
--teacher_dir names one that was trained on others; validation and test labels stay as they are.

The workdir receives the checkpoints, results.json (with the field "swept"), figure.png and report.html. The same
command started again continues where it was stopped.
"""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
from absl import flags

from experiments import common
from kdjax import checkpoints, files, losses, models, parallel, vmapped

DATASET = flags.DEFINE_string(
    "dataset", "digits", "digits, a TFDS name, a file.npz, or folder:PATH of class folders."
)
DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Where prepared TFDS data sets lie (python -m experiments.prepare_data)."
)
IMAGE_SIZE = flags.DEFINE_list(
    "image_size",
    None,
    "HEIGHT,WIDTH that photos and TFDS images are resized to cover and cut to, as in 32,32.",
)
SKIP_BROKEN = flags.DEFINE_bool(
    "skip_broken", False, "Leave out image files of a folder that cannot be read; the result counts them."
)
TEACHER = flags.DEFINE_string("teacher", "digits_teacher", f"One of {', '.join(sorted(models.MODELS))}.")
TEACHER_DIR = flags.DEFINE_string(
    "teacher_dir", None, "Take up this trained teacher, such as runs/one/teacher/0."
)
STUDENT = flags.DEFINE_string("student", "digits_student", "Any name that --teacher takes.")
NUM_TRAIN = flags.DEFINE_integer("num_train", 100, "Training images that students see; 0 for all.", 0)
TEACHER_NUM_TRAIN = flags.DEFINE_integer(
    "teacher_num_train", 0, "Training images of the teacher; 0 for all.", 0
)
NUM_VALIDATION = flags.DEFINE_integer(
    "num_validation", None, "Validation images; a tenth of the training split."
)
LABEL_NOISE = flags.DEFINE_float("label_noise", 0.0, "Share of training labels made wrong.", 0.0, 1.0)

HARD_WEIGHTS = flags.DEFINE_list(
    "hard_weights", [f"{i / 10:g}" for i in range(11)], "Every a, rising, from 0 to 1."
)
TEMPERATURE = flags.DEFINE_float("temperature", 4.0, "Softening of both logits.", lower_bound=1e-3)
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2", "3", "4"], "One student of each a per seed.")

EPOCHS = flags.DEFINE_integer("epochs", 150, "Of the students.", lower_bound=1)
TEACHER_EPOCHS = flags.DEFINE_integer("teacher_epochs", 30, "Of the teacher.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 20, "Images per step of a student, over all devices.", 1)
TEACHER_BATCH_SIZE = flags.DEFINE_integer("teacher_batch_size", 64, "Likewise of the teacher.", 1)
LEARNING_RATE = flags.DEFINE_float("learning_rate", 2e-3, "Before its cosine decay.", common.LEAST_RATE)
TEACHER_LEARNING_RATE = flags.DEFINE_float(
    "teacher_learning_rate", 2e-3, "Likewise of the teacher.", common.LEAST_RATE
)
EVALUATE_EVERY = flags.DEFINE_integer("evaluate_every", 10, "Epochs between two validations.", lower_bound=1)

WORKDIR = flags.DEFINE_string("workdir", None, "Where everything is written.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "Also write the results to this file.")
FORM = flags.DEFINE_enum(
    "form", "vmap", list(vmapped.FORMS), "How the students share a program; map needs less memory."
)
DEVICES = flags.DEFINE_integer(
    "devices", None, "Devices of this process to use; all by default.", lower_bound=1
)
STEPS_PER_DISPATCH = flags.DEFINE_integer(
    "steps_per_dispatch", 32, "Most steps that one call to the device runs.", 1
)
SAVE_EVERY = flags.DEFINE_float("save_every_s", 60.0, "Least seconds between two checkpoints.", 0.0)
SMOKE = flags.DEFINE_bool("smoke", False, "The same code in seconds: two epochs, three seeds, few images.")

MACHINE = (
    "workdir",
    "output",
    "data_dir",
    "devices",
    "save_every_s",
)  # what may change when a run is resumed
OF_TRAINED_TEACHERS = (
    "teacher",
    "teacher_num_train",
    "teacher_epochs",
    "teacher_batch_size",
    "teacher_learning_rate",
)  # what decides nothing with --teacher_dir


def mixed(outputs, batch):
    """The labels and the teacher's answers, by this student's own weight of the labels."""
    a = batch["settings"]["hard_weight"]
    soft = losses.soft_target_kl(outputs.logits, batch["teacher_logits"], temperature=TEMPERATURE.value)
    return {"hard": a * common.scratch(outputs, batch)["hard"], "soft": (1 - a) * jnp.mean(soft)}


def main() -> None:
    """Checks the flags, then the teacher, its columns, all students at once, report."""
    start = time.monotonic()
    weights, seeds = numbers(HARD_WEIGHTS), common.seeds_of(SEEDS.value)
    if weights != sorted(weights) or weights[0] < 0 or weights[-1] > 1:
        raise ValueError(
            f"--hard_weights={','.join(HARD_WEIGHTS.value)} must rise from 0 or more to 1 or less, such as 0,0.5,1."
        )
    if TEACHER_DIR.value:
        common.refuse_given(OF_TRAINED_TEACHERS, "--teacher_dir takes up a teacher that is trained already")
    seeds = seeds[:3] if SMOKE.value else seeds
    own, teachers = recipes()
    task = the_task(NUM_TRAIN.value)
    for recipe in (own, teachers):
        parallel.check_batch_size(recipe.batch_size, task.devices)
    student = common.build(STUDENT.value, task)
    settings = common.settings_of(globals(), apart=MACHINE)
    columns = 4 * task.source.num_classes * len(task.source.images)
    if TEACHER_DIR.value:
        teacher = common.load_teacher(task, TEACHER_DIR.value)
        settings |= dict.fromkeys(OF_TRAINED_TEACHERS) | {"teacher": teacher.name}
        runs = {student: len(weights) * len(seeds)}
        common.check_disk(task, Path(WORKDIR.value), runs, column_bytes=columns)
        weights_digest = checkpoints.digest_tree(teacher.weights)
        made_from = settings | {"data": task.fingerprint, "teacher_weights": weights_digest}
        workdir = common.claim_workdir(WORKDIR.value, made_from)
    else:
        wider = the_task(TEACHER_NUM_TRAIN.value)
        network = common.build(TEACHER.value, wider)
        runs = {student: len(weights) * len(seeds), network: 1}
        common.check_disk(task, Path(WORKDIR.value), runs, column_bytes=columns)
        made_from = settings | {"data": task.fingerprint, "teacher_data": wider.fingerprint}
        workdir = common.claim_workdir(WORKDIR.value, made_from)
        trainer = common.make_trainer(wider, network, common.scratch, teachers)
        teacher = common.train_teacher(wider, TEACHER.value, network, trainer, 0, workdir / "teacher" / "0")
    if LABEL_NOISE.value:
        files.write_json(workdir / "perturbed.json", task.source.example_ids[task.perturbed].tolist())
    taught = common.taught_by(task, teacher, own, mode="centre", views=1, directory=workdir / "columns")
    trained = common.train_many(
        task,
        student,
        mixed,
        own,
        taught,
        seeds=[seed for _ in weights for seed in seeds],
        settings={"hard_weight": [a for a in weights for _ in seeds]},
        directory=workdir / "students",
        identity=settings,
        label=f"{len(weights) * len(seeds)} students",
        form=FORM.value,
    )
    by_weight = {a: trained[i * len(seeds) :][: len(seeds)] for i, a in enumerate(weights)}
    kept, notes = finite(by_weight, seeds)
    best, found = choose({a: list(runs.values()) for a, runs in kept.items()})
    common.conclude(
        workdir,
        "mixing_weight",
        task=task,
        question=f"How much should a student of {DATASET.value} believe its labels, and how much its teacher?",
        arms={"teacher": [teacher]} | {name(a): list(runs.values()) for a, runs in kept.items()},
        arm_seeds={"teacher": [0]} | {name(a): list(runs) for a, runs in kept.items()},
        baseline=name(max(kept)),
        settings=settings,
        output=OUTPUT.value,
        wall_clock_s=time.monotonic() - start,
        scaled_down=scaled_down(task),
        notes=[found, *notes],
        tested=[name(best)],
        drawn=("teacher",),  # the sweep says what the students' end in
        swept=[
            {
                "name": "hard_weight",
                "values": list(kept),
                "arms": {
                    "student": {
                        m: [[of(t) for t in runs.values()] for runs in kept.values()]
                        for m, of in SWEPT.items()
                    }
                },
            }
        ],
    )
    common.say(found)


SWEPT = {
    "accuracy": lambda trained: trained.metrics["accuracy"],
    "loss": lambda trained: trained.metrics["loss"],
    "validation_accuracy": lambda trained: trained.fitted.history[-1]["validation_accuracy"],
    "validation_loss": lambda trained: trained.fitted.history[-1]["validation_loss"],
}
"""What is recorded of every student against its weight, all of the last epoch; on the test split unless it says so."""


def numbers(flag: flags.FlagHolder) -> list[float]:
    """A flag's list as different numbers."""
    given = f"--{flag.name}={','.join(flag.value)}"
    try:
        found = [float(item) for item in flag.value]
    except ValueError as error:
        raise ValueError(f"{given} must be numbers, such as 0,1.") from error
    if not found or len(set(found)) < len(found) or not all(map(math.isfinite, found)):
        raise ValueError(f"{given} must be one or more different numbers.")
    return found


def name(a: float) -> str:
    """The arm of a weight."""
    return f"a = {a:g}"


def finite(
    by_weight: Mapping[float, Sequence[common.Trained]], seeds: Sequence[int]
) -> tuple[dict[float, dict[int, common.Trained]], list[str]]:
    """Weight → seed → student, without those that diverged, and one note for each of these."""
    kept: dict[float, dict[int, common.Trained]] = {}
    notes = []
    for a, runs in by_weight.items():
        for seed, trained in zip(seeds, runs, strict=True):
            epoch = vmapped.diverged_at(trained.fitted)
            if epoch is None:
                kept.setdefault(a, {})[seed] = trained
            else:
                notes.append(f"{name(a)}, seed {seed} diverged in epoch {epoch} and is left out.")
    return kept, notes


def choose(by_weight: Mapping[float, Sequence[common.Trained]]) -> tuple[float, str]:
    """The best weight by validation accuracy (by its loss between equals), and what the test split says of it."""

    def mean(a: float, metric: str) -> float:
        return statistics.fmean(SWEPT[metric](trained) for trained in by_weight[a])

    best = max(by_weight, key=lambda a: (mean(a, "validation_accuracy"), -mean(a, "validation_loss")))
    labels = max(by_weight)
    said = (
        f"The validation split chooses {name(best)} (accuracy {mean(best, 'validation_accuracy'):.2%} there); its test "
        f"accuracy is {mean(best, 'accuracy'):.2%} on average"
    )
    return best, said + (
        "." if best == labels else f", that of {name(labels)} {mean(labels, 'accuracy'):.2%}."
    )


def the_task(num_train: int) -> common.Task:
    """The data set as the flags give it, with that many training images, 0 for all."""
    return common.make_task(
        DATASET.value,
        data_dir=DATA_DIR.value,
        image_size=IMAGE_SIZE.value,
        skip_broken=SKIP_BROKEN.value,
        clip=SMOKE.value,
        devices=DEVICES.value,
        num_train=min(num_train or 256, 256) if SMOKE.value else num_train or None,
        num_validation=NUM_VALIDATION.value,
        label_noise=LABEL_NOISE.value,
    )


def recipes() -> tuple[common.Recipe, common.Recipe]:
    """How the students and the teacher are trained."""
    own = common.Recipe(
        epochs=2 if SMOKE.value else EPOCHS.value,
        batch_size=BATCH_SIZE.value,
        learning_rate=LEARNING_RATE.value,
        schedule="cosine",
        evaluate_every=EVALUATE_EVERY.value,
        steps_per_dispatch=STEPS_PER_DISPATCH.value,
        save_every_s=SAVE_EVERY.value,
    )
    return own, own._replace(
        epochs=2 if SMOKE.value else TEACHER_EPOCHS.value,
        batch_size=TEACHER_BATCH_SIZE.value,
        learning_rate=TEACHER_LEARNING_RATE.value,
        evaluate_every=min(EVALUATE_EVERY.value, 5),
    )


def scaled_down(task: common.Task) -> str:
    """What is smaller than in the study."""
    height, width = task.source.images.shape[1:3]
    images = (
        f"{len(task.split['train'])} training images of {height}x{width}, where the study had 10,000 of 28x28"
    )
    return f"{images}; {recipes()[0].epochs} epochs, where it had 100 to 1000; one teacher"


if __name__ == "__main__":
    common.launch(main)
