r"""Does a student learn more from a teacher than from the labels alone? The general launch.

    python -m experiments.distill --dataset=digits --workdir=runs/digits
    python -m experiments.distill --dataset=mnist --data_dir=data --workdir=runs/mnist --num_train=10000 \
        --teacher=keras_teacher --student=keras_student --teacher_num_train=0 --teacher_epochs=8 \
        --teacher_learning_rate=5e-4 --schedule=cosine

    python -m experiments.distill --dataset=digits --workdir=runs/methods \
        --method=scratch,kd,rkd,dkd,crd+kd

Trains the teacher (or takes one up with --teacher_dir), computes what it says of every image once, and trains the
student by each --method over --seeds. The first command takes about a minute on two CPU cores, the second about
twenty. What to expect stands in BUILD_NOTES.md beside the command.

--method takes every loss of the library that is for classifiers, with the weight that was published for it; the table
is experiments/common/methods.py. Methods that compare maps need two networks with the same stages and a teacher that
looks at the student's own pixels: --teacher_mode=online or views, or no augmentation.

The workdir receives every run's checkpoints, results.json (flags, versions, every number of every seed), figure.png
and report.html. The same command started again continues where it was stopped, whatever stopped it.
"""

import contextlib
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from absl import flags

from experiments import common
from kdjax import checkpoints, files, models, parallel

# What is learnt from, and by whom.
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
NUM_TRAIN = flags.DEFINE_integer(
    "num_train", None, "Training images that students see; all by default.", lower_bound=1
)
NUM_VALIDATION = flags.DEFINE_integer(
    "num_validation", None, "Validation images; a tenth of the training split."
)
LABEL_NOISE = flags.DEFINE_float("label_noise", 0.0, "Share of training labels made wrong.", 0.0, 1.0)

# The method.
METHOD = flags.DEFINE_list(
    "method",
    ["scratch", "kd"],
    "Arms to run, in order; the first is the baseline. One of them is a name or several joined by +, as in hint+kd: "
    f"{', '.join((*common.BASIC, *common.METHODS))}.",
)
WEIGHTS = flags.DEFINE_list(
    "weights", [], "Weights of methods, if not those published, as in hint=50,dist=1."
)
TEMPERATURE = flags.DEFINE_float("temperature", 3.0, "Softening of both logits, above 0.")
HARD_WEIGHT = flags.DEFINE_float(
    "hard_weight", 0.1, "Weight of the labels' cross-entropy in kd alone.", lower_bound=0.0
)
SOFT_WEIGHT = flags.DEFINE_float(
    "soft_weight", 0.9, "Weight of the teacher's T²-scaled divergence in kd alone.", lower_bound=0.0
)
TEACHER_MODE = flags.DEFINE_enum(
    "teacher_mode",
    "centre",
    ["centre", "views", "online"],
    "What the teacher looks at: the unaugmented image (stored once), --views stored augmentations that the student is "
    "then shown, or online the very input of the student.",
)
VIEWS = flags.DEFINE_integer(
    "views", 8, "Stored views per image in the mode views, the unaugmented one included.", 2
)

ROBUSTNESS = flags.DEFINE_bool(
    "robustness", False, "Also measure accuracy under corruption, weight noise and attack; minutes on a CPU."
)

# The recipe.
EPOCHS = flags.DEFINE_integer("epochs", 20, "Of each student.", lower_bound=1)
TEACHER_EPOCHS = flags.DEFINE_integer(
    "teacher_epochs", None, "Of each teacher; as the students by default.", 1
)
TEACHER_NUM_TRAIN = flags.DEFINE_integer(
    "teacher_num_train", None, "Training images of teachers; 0 for all.", 0
)
TEACHER_PADDING = flags.DEFINE_integer(
    "teacher_padding", None, "Pixels of the teacher's random crop, if others.", 0
)
TEACHER_LEARNING_RATE = flags.DEFINE_float(
    "teacher_learning_rate", None, "Of each teacher, if another.", common.LEAST_RATE
)
TEACHER_SEEDS = flags.DEFINE_integer("teacher_seeds", 1, "Teachers; the students take turns among them.", 1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images per step over all devices.", lower_bound=1)
LEARNING_RATE = flags.DEFINE_float("learning_rate", 1e-3, "Peak.", lower_bound=common.LEAST_RATE)
OPTIMIZER = flags.DEFINE_enum(
    "optimizer", "adam", list(common.OPTIMIZERS), "adam is AdamW; sgd has momentum .9."
)
SCHEDULE = flags.DEFINE_enum(
    "schedule", "constant", list(common.SCHEDULES), "step: a tenth at 62.5, 75 and 87.5 %."
)
WEIGHT_DECAY = flags.DEFINE_float("weight_decay", 0.0, "L2 under sgd, decoupled under adam.", lower_bound=0.0)
EMA = flags.DEFINE_float(
    "ema", 0.0, "Decay of averaged weights that are evaluated instead of the last.", 0.0, 1.0
)
ACCUMULATE = flags.DEFINE_integer("accumulate", 1, "Batches per update.", lower_bound=1)
PADDING = flags.DEFINE_integer("padding", 0, "Pixels of random crop; 4 for CIFAR.", lower_bound=0)
FLIP = flags.DEFINE_bool("flip", False, "Mirror images at random; not for writing.")
MIXUP = flags.DEFINE_float(
    "mixup", 0.0, "Alpha of mixup, 0 for none; needs --teacher_mode=online for kd.", 0.0
)
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Of activations; parameters are float32."
)
EVALUATE_EVERY = flags.DEFINE_integer("evaluate_every", 1, "Epochs between two validations.", lower_bound=1)
SPLIT = flags.DEFINE_enum(
    "split",
    "test",
    ["test", "validation"],
    "Where the final numbers are measured; validation while settings are chosen, which leaves the test split unread.",
)

# The machine.
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2", "3", "4"], "One run of each arm per seed.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where everything is written.", required=True)
SHARED_DIR = flags.DEFINE_string(
    "shared_dir",
    None,
    "Where runs share teachers, and columns, that their flags make alike; the workdir if not given.",
)
TENSORBOARD = flags.DEFINE_bool("tensorboard", False, "Write every epoch's numbers to workdir/tensorboard.")
DEVICES = flags.DEFINE_integer(
    "devices", None, "Devices of this process to use; all by default.", lower_bound=1
)
STEPS_PER_DISPATCH = flags.DEFINE_integer(
    "steps_per_dispatch", 32, "Most steps that one call to the device runs.", 1
)
SAVE_EVERY = flags.DEFINE_float("save_every_s", 60.0, "Least seconds between two checkpoints of a run.", 0.0)
POD = flags.DEFINE_bool("pod", False, "Join the processes of a TPU pod or cluster job first.")
SCALED_DOWN = flags.DEFINE_string(
    "scaled_down", "", "What is smaller than in the study followed; kept with the result."
)
SMOKE = flags.DEFINE_bool("smoke", False, "The same code in seconds: one epoch, two seeds, few images.")


def hard_loss(outputs, batch) -> jax.Array:
    """Cross-entropy with the labels; with those of both images where two were blended."""
    per_label = optax.losses.softmax_cross_entropy_with_integer_labels
    value = per_label(outputs.logits, batch["label"])
    if "partner" in batch:
        other = per_label(outputs.logits, batch["label"][batch["partner"]])
        value = batch["share"] * value + (1 - batch["share"]) * other
    return jnp.mean(value)


def scratch(outputs, batch):
    """The labels alone."""
    return {"hard": hard_loss(outputs, batch)}


# what may change when a run is resumed
MACHINE = ("workdir", "shared_dir", "data_dir", "devices", "save_every_s", "pod", "tensorboard", "robustness")


OF_TRAINED_TEACHERS = (
    "teacher",
    "teacher_epochs",
    "teacher_num_train",
    "teacher_padding",
    "teacher_learning_rate",
    "teacher_seeds",
)  # what decides nothing with --teacher_dir


def main() -> dict[str, Any]:
    """The whole run, written for TensorBoard too if that is asked for; returns its result."""
    board = common.tensorboard(Path(WORKDIR.value) / "tensorboard")
    with board if TENSORBOARD.value else contextlib.nullcontext():
        return run()


def run() -> dict[str, Any]:
    """Checks the flags, then teachers, their columns, students, report."""
    start = time.monotonic()
    seeds = checked_flags()
    if POD.value:
        parallel.initialise()
    recipe = the_recipe()
    task = the_task(NUM_TRAIN.value)
    parallel.check_batch_size(recipe.batch_size, task.devices)
    common.check_recipe(task, recipe)
    dtype = jnp.dtype(DTYPE.value)
    student = common.build(STUDENT.value, task, dtype=dtype)
    settings = common.settings_of(globals(), apart=MACHINE)
    runs, directory = {student: len(METHOD.value) * len(seeds)}, Path(WORKDIR.value)
    # Whatever may be refused is refused before claim_workdir, which is the first to write.
    if TEACHER_DIR.value:
        teachers = [common.load_teacher(task, TEACHER_DIR.value, split=SPLIT.value, dtype=dtype)]
        settings |= dict.fromkeys(OF_TRAINED_TEACHERS) | {"teacher": teachers[0].name}
        arms = the_arms(task, student, teachers[0].module)
        common.check_disk(task, directory, runs, column_bytes=column_bytes(task, teachers[0].module, arms))
        weights = checkpoints.digest_tree(teachers[0].weights)
        made_from = settings | {"data": task.fingerprint, "teacher_weights": weights}
        workdir = common.claim_workdir(WORKDIR.value, made_from)
    else:
        network = common.build(TEACHER.value, task, dtype=dtype)
        arms = the_arms(task, student, network)
        runs |= {network: TEACHER_SEEDS.value}
        common.check_disk(task, directory, runs, column_bytes=column_bytes(task, network, arms))
        own = recipe._replace(
            epochs=1 if SMOKE.value else TEACHER_EPOCHS.value or EPOCHS.value,
            learning_rate=TEACHER_LEARNING_RATE.value or LEARNING_RATE.value,
            padding=PADDING.value if TEACHER_PADDING.value is None else TEACHER_PADDING.value,
        )
        wider = task if TEACHER_NUM_TRAIN.value is None else the_task(TEACHER_NUM_TRAIN.value or None)
        common.check_recipe(wider, own, of="the teacher's")
        made_from = settings | {"data": task.fingerprint, "teacher_data": wider.fingerprint}
        workdir = common.claim_workdir(WORKDIR.value, made_from)
        trainer = common.make_trainer(wider, network, scratch, own, split=SPLIT.value)
        decides = {"teacher": TEACHER.value, "dtype": DTYPE.value, "recipe": own._replace(save_every_s=0)}
        with common.shelf(SHARED_DIR.value, workdir / "teacher", wider, **decides) as home:
            teachers = [
                common.train_teacher(wider, TEACHER.value, network, trainer, number, home / str(number))
                for number in range(TEACHER_SEEDS.value)
            ]
    if LABEL_NOISE.value:
        files.write_json(workdir / "perturbed.json", task.source.example_ids[task.perturbed].tolist())
    finished: dict = {"teacher": teachers} | {method: [] for method in METHOD.value}
    features = sorted({name for arm in arms.values() for name in arm.features})
    for number, teacher in enumerate(teachers):
        asked: dict[str, Any] = {"mode": TEACHER_MODE.value, "views": VIEWS.value, "features": features}
        decides = {
            "weights": checkpoints.digest_tree(teacher.weights),
            "moves": [recipe.padding, recipe.flip],
        }
        own_columns = workdir / "columns" / str(number)
        with common.shelf(SHARED_DIR.value, own_columns, task, **decides, **asked) as home:
            taught = common.taught_by(task, teacher, recipe, directory=home, **asked)
        for method, arm in arms.items():
            trainer = common.make_trainer(
                task, student, arm.objective, recipe, taught, arm.heads, split=SPLIT.value
            )
            for seed in seeds[number :: len(teachers)]:
                directory, label = workdir / method / str(seed), f"{method}, seed {seed}"
                finished[method].append(trainer(seed, directory, label, settings))
    order = [seed for number in range(len(teachers)) for seed in seeds[number :: len(teachers)]]
    unread = (
        "Every number is of the validation split, which settings are chosen on; the test split was not read."
    )
    more: dict = {"costs": common.costs_of(task, finished)} if SPLIT.value == "test" else {}
    if ROBUSTNESS.value:
        disturbed = common.robustness_of(task, finished, workdir / "robustness", split=SPLIT.value)
        more["robustness"] = disturbed
    return common.conclude(
        workdir,
        "distill",
        task=task,
        question=f"Does {STUDENT.value} learn more of {DATASET.value} from {teachers[0].name} than from labels alone?",
        arms=finished,
        arm_seeds={"teacher": list(range(len(teachers)))} | dict.fromkeys(METHOD.value, order),
        baseline=METHOD.value[0],
        settings=settings,
        wall_clock_s=time.monotonic() - start,
        scaled_down=SCALED_DOWN.value,
        notes=[unread] if SPLIT.value == "validation" else [],
        **more,
    )


def checked_flags() -> list[int]:
    """The seeds, once the flags that a flag's own range cannot check make sense."""
    if TEMPERATURE.value <= 0:
        raise ValueError(f"--temperature={TEMPERATURE.value} must be above 0; the field uses 1 to 20.")
    common.check_methods(METHOD.value, weights=WEIGHTS.value, mixup=bool(MIXUP.value))
    if "kd" in METHOD.value:
        common.kd(**kd_settings())
    if EMA.value == 1:
        raise ValueError("--ema=1 would keep the first weights for ever; .99 to .9999 are usual.")
    if TEACHER_DIR.value:
        common.refuse_given(OF_TRAINED_TEACHERS, "--teacher_dir takes up a teacher that is trained already")
    if TEACHER_MODE.value != "views":
        common.refuse_given(["views"], f"--teacher_mode={TEACHER_MODE.value} stores no augmented views")
    if MIXUP.value and METHOD.value != ["scratch"] and TEACHER_MODE.value != "online":
        raise ValueError(
            f"--mixup={MIXUP.value} blends images, and no stored column knows what the teacher says of a blend; "
            f"use --teacher_mode=online in place of {TEACHER_MODE.value}, or --mixup=0."
        )
    seeds = common.seeds_of(SEEDS.value)
    return seeds[:2] if SMOKE.value else seeds


def kd_settings() -> dict[str, float]:
    """Of Hinton's distillation, as the flags give them."""
    return {
        "hard_weight": HARD_WEIGHT.value,
        "soft_weight": SOFT_WEIGHT.value,
        "temperature": TEMPERATURE.value,
    }


def the_task(num_train: int | None) -> common.Task:
    """The data set as the flags give it, with that many training images."""
    return common.make_task(
        DATASET.value,
        data_dir=DATA_DIR.value,
        image_size=IMAGE_SIZE.value,
        skip_broken=SKIP_BROKEN.value,
        clip=SMOKE.value,
        devices=DEVICES.value,
        num_train=min(num_train or 256, 256) if SMOKE.value else num_train,
        num_validation=NUM_VALIDATION.value,
        label_noise=LABEL_NOISE.value,
    )


def the_arms(task: common.Task, student: nn.Module, teacher: nn.Module) -> dict[str, common.Arm]:
    """Every --method, tried on the shapes of the two networks.

    Raises:
      ValueError: if one compares what the networks do not have, or maps that do not lie over each other.
    """
    views = [common.shown(network, task) for network in (student, teacher)]
    steps = max(len(task.split["train"]) // BATCH_SIZE.value, 1) * the_recipe().epochs
    weights = common.check_methods(METHOD.value, weights=WEIGHTS.value, mixup=bool(MIXUP.value))
    arms = {
        name: common.make_arm(
            name,
            student=views[0],
            teacher=views[1],
            steps=steps,
            labels=task.source.labels[task.split["train"]],
            hard=hard_loss,
            weights=weights,
            kd=kd_settings(),
        )
        for name in METHOD.value
    }
    moves = PADDING.value or FLIP.value
    for name, arm in arms.items():
        if (
            moves
            and TEACHER_MODE.value == "centre"
            and any(views[1].features[f].ndim == 4 for f in arm.features)
        ):
            raise ValueError(
                f"--method={name} compares maps, and those stored of an unmoved image do not lie over a cropped or "
                "mirrored one; use --teacher_mode=online or views, or --padding=0 --noflip."
            )
    return arms


def column_bytes(task: common.Task, teacher: nn.Module, arms: Mapping[str, common.Arm]) -> int:
    """What the teachers' stored columns will take."""
    shapes = common.shown(teacher, task)
    features = {name: shapes.features[name] for arm in arms.values() for name in arm.features}
    numbers = shapes.logits.shape[-1] + sum(math.prod(x.shape[1:]) for x in features.values())
    images = len(task.source.images) * {"centre": 1, "views": VIEWS.value, "online": 0}[TEACHER_MODE.value]
    return (2 if features else 4) * numbers * images * (1 if TEACHER_DIR.value else TEACHER_SEEDS.value)


def the_recipe() -> common.Recipe:
    """The recipe of the students as the flags give it."""
    return common.Recipe(
        epochs=1 if SMOKE.value else EPOCHS.value,
        batch_size=BATCH_SIZE.value,
        learning_rate=LEARNING_RATE.value,
        optimizer=OPTIMIZER.value,
        schedule=SCHEDULE.value,
        weight_decay=WEIGHT_DECAY.value,
        ema=EMA.value,
        accumulate=ACCUMULATE.value,
        padding=PADDING.value,
        flip=FLIP.value,
        mixup=MIXUP.value,
        evaluate_every=EVALUATE_EVERY.value,
        steps_per_dispatch=STEPS_PER_DISPATCH.value,
        save_every_s=SAVE_EVERY.value,
    )


if __name__ == "__main__":
    common.launch(main)
