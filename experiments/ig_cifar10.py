r"""Does a student gain from seeing where its teacher looks? Integrated gradients beside distillation and attention.

    python -m experiments.ig_cifar10 --data_dir=data --workdir=runs/ig_cifar10 \
        --teacher_dir=runs/cifar10_teacher/teacher/0
    python -m experiments.ig_cifar10 --data_dir=data --workdir=runs/ig_cifar10_full --teacher=mobilenet_v2 \
        --student=mobilenet_v2_cut5 --num_train=0 --epochs=100 --evaluate_every=10 --teacher_epochs=200 \
        --seeds=0,1,2,3,4,5,6,7,8,9 --more_students=mobilenet_v2_cut9,mobilenet_v2_cut13,mobilenet_v2_cut17

Hernandez, Chang and Nordling (arXiv 2503.13008) overlay a tenth of the training images with the teacher's integrated
gradients, computed once, and combine that with distillation and attention transfer. Their cached maps belonged to other
images than those they were read for, and did not follow an image's crop and flip. So the arms are

* scratch, kd, ig, at, kd+ig, kd+at, ig+at, kd+ig+at: all combinations, each signal aligned with its image;
* NAME/misaligned: the signal of another image, whose maps are not cropped and flipped, as published; NAME/noise: the
  values of each map, or of each image's logits, in random places;
* kd+match: the student's own map, gradient times input, is drawn to the teacher's, as a loss; kd+crop: of two random
  crops, the one that contains more of the map; kd+weight: pixels are dimmed where the map is low.

Students of one seed start from the same weights and see the images in the same order. Beside the accuracy stands how
each student's maps agree with the teacher's (map_correlation), and the areas under its deletion and insertion curves.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from experiments import cli
from kdjax import checkpoints, data, methods, models, parallel, run, study
from kdjax import teacher as teachers
from kdjax.callbacks import Callback, ProgressBar
from kdjax.recipe import Machine, Recipe

DATA = cli.define(cli.Data(dataset="cifar10", num_train=4000), omit=("label_noise",))
TEACHER_NUM_TRAIN = flags.DEFINE_integer("teacher_num_train", 0, "Images for the teacher; 0 for all.", 0)
NETWORK = f"One of {', '.join(sorted(models.MODELS))}, or mine.py:build."
TEACHER = flags.DEFINE_string("teacher", "resnet20", NETWORK)
TEACHER_DIR = flags.DEFINE_string("teacher_dir", None, "Run to take as teacher, such as RUN/teacher/0.")
STUDENT = flags.DEFINE_string("student", "resnet8", NETWORK)
MORE_STUDENTS = cli.may_change(
    flags.DEFINE_list("more_students", [], "Further students, for scratch, kd and kd+ig.")
)
SEEDS = cli.define_seeds()
AUGMENTED = Recipe(padding=4, flip=True)
RECIPE = cli.define(dataclasses.replace(AUGMENTED, epochs=30, evaluate_every=5))
SGD = {"optimizer": "sgd", "learning_rate": 0.05, "schedule": "cosine", "weight_decay": 5e-4}
TEACHER_RECIPE = cli.define(dataclasses.replace(AUGMENTED, epochs=12, **SGD), prefix="teacher_")
TEMPERATURE = flags.DEFINE_float("temperature", 2.5, "Softening of both logits.", 1e-3)
SOFT_WEIGHT = flags.DEFINE_float("soft_weight", 0.01, "Of the teacher's logits; 1 minus it of labels.", 0, 1)
ATTENTION_WEIGHT = flags.DEFINE_float("attention_weight", 0.8, "Of the distance of attention maps.", 0)
MATCH_WEIGHT = flags.DEFINE_float("match_weight", 0.8, "Of the distance of attribution maps.", 0)
PROBABILITY = flags.DEFINE_float("overlay_probability", 0.1, "Of an overlay, and of dimming.", 0, 1)
OPACITY = flags.DEFINE_float("overlay_opacity", 0.5, "Of a map in an overlay; strength of dimming.", 0, 1)
EXPONENT = flags.DEFINE_float("overlay_exponent", 2.0, "Largest power of an overlaid map; least is 1.", 1)
IG_TOLERANCE = flags.DEFINE_float("ig_tolerance", 0.05, "Relative completeness residual of a map.", 0)
LAUNCH = cli.define(cli.Launch(), omit=("pod", "tensorboard", "scaled_down"))
MACHINE = cli.define(Machine())


class Arm(NamedTuple):
    """How a student learns, and how the teacher's logits and maps are perturbed; empty: not at all."""

    method: methods.Method
    logits: str = ""
    maps: str = ""


def kd() -> methods.Method:
    """The labels and the teacher's logits; their weights sum to 1."""
    soft_weight = SOFT_WEIGHT.value
    return methods.kd(TEMPERATURE.value, hard_weight=1 - soft_weight, soft_weight=soft_weight)


def ig() -> methods.Method:
    """Overlays of the teacher's maps."""
    exponents = (1.0, EXPONENT.value)
    return methods.ig_overlay(probability=PROBABILITY.value, opacity=OPACITY.value, exponents=exponents)


def at(stages: Sequence[str]) -> methods.Method:
    """The distance from the teacher's attention maps after these stages."""
    return methods.attention_matching(stages, weight=ATTENTION_WEIGHT.value)


def dim() -> methods.Method:
    """Dimming where the teacher's maps are low."""
    return methods.saliency_dim(probability=PROBABILITY.value, strength=OPACITY.value)


labels, crop = methods.labels, methods.saliency_crop
ARMS: Mapping[
    str, Callable[[Sequence[str]], Arm]
] = {  # s: stages after which both networks have maps of one size
    "scratch": lambda s: Arm(labels()),
    "kd": lambda s: Arm(kd()),
    "ig": lambda s: Arm(labels() + ig()),
    "at": lambda s: Arm(labels() + at(s)),
    "kd+ig": lambda s: Arm(kd() + ig()),
    "kd+at": lambda s: Arm(kd() + at(s)),
    "ig+at": lambda s: Arm(labels() + ig() + at(s)),
    "kd+ig+at": lambda s: Arm(kd() + ig() + at(s)),
    "kd/misaligned": lambda s: Arm(kd(), logits="misaligned"),
    "kd/noise": lambda s: Arm(kd(), logits="noise"),
    "ig/misaligned": lambda s: Arm(labels() + ig(), maps="misaligned"),
    "ig/noise": lambda s: Arm(labels() + ig(), maps="noise"),
    "at/misaligned": lambda s: Arm(labels() + at(s), maps="misaligned"),
    "at/noise": lambda s: Arm(labels() + at(s), maps="noise"),
    "kd+ig/misaligned": lambda s: Arm(kd() + ig(), maps="misaligned"),
    "kd+ig/noise": lambda s: Arm(kd() + ig(), maps="noise"),
    "kd+match": lambda s: Arm(kd() + methods.map_matching(MATCH_WEIGHT.value)),
    "kd+crop": lambda s: Arm(kd() + crop()),
    "kd+crop/misaligned": lambda s: Arm(kd() + crop(), maps="misaligned"),
    "kd+weight": lambda s: Arm(kd() + dim()),
}
WANTED = cli.define_arms(list(ARMS))
PAIRS = (  # what a signal adds to distillation; whether it must be aligned
    *((f"kd+{signal}", "kd") for signal in ("ig", "at", "ig+at", "match", "crop", "weight")),
    *((arm, f"{arm}/misaligned") for arm in ("kd", "ig", "at", "kd+ig", "kd+crop")),
    *((arm, f"{arm}/noise") for arm in ("ig", "kd+ig")),
)
FACTORS = {
    "kd": (("scratch", "kd"), ("ig", "kd+ig"), ("at", "kd+at"), ("ig+at", "kd+ig+at")),
    "ig": (("scratch", "ig"), ("kd", "kd+ig"), ("at", "ig+at"), ("kd+at", "kd+ig+at")),
    "at": (("scratch", "at"), ("kd", "kd+at"), ("ig", "ig+at"), ("kd+ig", "kd+ig+at")),
}


def main(callbacks: Sequence[Callback] = ()) -> dict[str, Any] | None:
    """Teacher, its cached logits and maps, students, report; returns the result, or None in a worker of --jobs."""
    start, launch, settings = time.monotonic(), LAUNCH.value, cli.settings(__name__)
    wanted, watch, workdir = checked_flags(), [ProgressBar(), *callbacks], Path(launch.workdir)
    smoke: dict[str, Any] = {"at_most": 128, "num_validation": 64} if launch.smoke else {}
    wide = DATA.value.load(num_train=TEACHER_NUM_TRAIN.value, **smoke)
    few = DATA.value.load(**smoke)._replace(
        normalisation=wide.normalisation
    )  # maps are of the student's inputs
    loaded = run.load(TEACHER_DIR.value, few, **where()) if TEACHER_DIR.value else None
    large = loaded.network if loaded else cli.network(TEACHER.value, wide)
    small = {student: cli.network(student, few) for _, student in wanted}
    arms = {}  # by label; those of --student have the name of the arm alone
    for name, student in wanted:
        stages = methods.common_stages(small[student].output_shapes.features, large.output_shapes.features)
        label = name if student == STUDENT.value else f"{name} ({student})"
        arms[label] = small[student], ARMS[name](stages)
    worker = cli.my_task("experiments.ig_cifar10")
    if worker is None:
        made_from = {"data": few.fingerprint, "teacher_data": wide.fingerprint}
        made_from["teacher"] = checkpoints.digest_tree(loaded.weights) if loaded else None
        cli.claim_workdir(launch.workdir, settings | made_from)
    teacher = loaded or train_teacher(large, wide, watch)
    signal, maps = ask(teacher, few)
    if worker is None and launch.jobs > 1:
        cli.in_children("experiments.ig_cifar10", range(launch.jobs))
    students = {}
    for label in list(arms) if worker is None else list(arms)[worker :: launch.jobs]:
        network, arm = arms[label]
        given = perturbed(arm, teachers.with_maps(signal, maps, arm.method.teacher_features), few)
        train = run.make_trainer(network, arm.method, few, recipe(RECIPE), teacher=given, **where())
        options = {"arm": label, "settings": settings, "callbacks": watch}
        students[label] = [
            train(seed, workdir / "students" / label / str(seed), **options) for seed in seeds()
        ]
    return None if worker is not None else report(few, teacher, students, maps, settings, start)


def checked_flags() -> list[tuple[str, str]]:
    """Each arm with its student; a ValueError where flags contradict each other."""
    if TEACHER_DIR.value:
        fields = (f"teacher_{field.name}" for field in dataclasses.fields(Recipe))
        cli.refuse_given(("teacher", *fields), "--teacher_dir is a teacher that is already trained")
    parallel.check_batch_size(RECIPE.value.batch_size, parallel.local_devices(MACHINE.value.devices))
    own = [(name, STUDENT.value) for name in WANTED.value]
    return own + [(name, student) for student in MORE_STUDENTS.value for name in ("scratch", "kd", "kd+ig")]


def seeds() -> list[int]:
    """Three in smoke form."""
    return SEEDS.value[: 3 if LAUNCH.value.smoke else None]


def recipe(flags: cli.Flags[Recipe]) -> Recipe:
    """Two epochs in smoke form."""
    return dataclasses.replace(
        flags.value, **({"epochs": 2, "evaluate_every": 1} if LAUNCH.value.smoke else {})
    )


def where() -> dict[str, Any]:
    """The machine to run on, and the split to measure."""
    return {"machine": MACHINE.value, "split": LAUNCH.value.split}


def train_teacher(
    network: models.Network, dataset: data.Dataset, callbacks: Sequence[Callback]
) -> run.Trained:
    """The teacher, trained or read back."""
    decides = {"network": dict(network.description), "recipe": dataclasses.asdict(recipe(TEACHER_RECIPE))}
    decides["steps_per_dispatch"] = MACHINE.value.steps_per_dispatch
    trainer = run.make_trainer(network, labels(), dataset, recipe(TEACHER_RECIPE), **where())
    with shared("teacher", dataset, **decides) as home:
        return trainer(0, home / "0", arm="teacher", callbacks=callbacks)
