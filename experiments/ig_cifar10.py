r"""Does a student gain from seeing where its teacher looks? Integrated gradients beside distillation and attention.

    python -m experiments.ig_cifar10 --data_dir=data --workdir=runs/ig_cifar10 --teacher_dir=runs/resnet20/teacher/0
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

A student's maps are compared with its teacher's (map_correlation), and evaluated by deletion and insertion of pixels.
"""

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli
from kdjax import checkpoints, data, methods, models, parallel, run, study
from kdjax import teacher as teachers
from kdjax.callbacks import Callback, ProgressBar
from kdjax.recipe import Machine, Recipe
from kdjax.types import Outputs

DATA = cli.define(cli.Data(dataset="cifar10", num_train=4000), omit=("label_noise",))
STUDENT = flags.DEFINE_string("student", "resnet8", "A name in kdjax.models.MODELS, or path/mine.py:build.")
MORE_STUDENTS = cli.may_change(flags.DEFINE_list("more_students", [], "For scratch, kd and kd+ig."))
RECIPE = cli.define(Recipe(epochs=30, padding=4, flip=True, evaluate_every=5))
SGD = Recipe(12, 64, 0.05, optimizer="sgd", schedule="cosine", weight_decay=5e-4, padding=4, flip=True)
RESNET = cli.Teacher("resnet20", teacher_num_train=0)
TEACHER = cli.define_teacher(SGD, defaults=RESNET, omit=("teacher_answers", "teacher_label_noise"))
SEEDS = cli.define_seeds()
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


def kd() -> methods.Method:
    """The labels and the teacher's logits; their weights sum to 1."""
    return methods.kd(TEMPERATURE.value, hard_weight=1 - SOFT_WEIGHT.value, soft_weight=SOFT_WEIGHT.value)


def ig() -> methods.Method:
    """Overlays of the teacher's maps."""
    exponents = (1.0, EXPONENT.value)
    return methods.ig_overlay(probability=PROBABILITY.value, opacity=OPACITY.value, exponents=exponents)


def at(stages: Sequence[str]) -> methods.Method:
    """The distance from the teacher's attention maps after these stages."""
    return methods.attention_matching(stages, weight=ATTENTION_WEIGHT.value)


labels, crop, dim = methods.labels, methods.saliency_crop, methods.saliency_dim
Arm = tuple[methods.Method, Mapping[str, str]]  # how a student learns; cached answer → how it is perturbed
ARMS: Mapping[str, Callable[[Sequence[str]], Arm]] = {  # s: the stages that both networks have at one size
    "scratch": lambda s: (labels(), {}),
    "kd": lambda s: (kd(), {}),
    "ig": lambda s: (labels() + ig(), {}),
    "at": lambda s: (labels() + at(s), {}),
    "kd+ig": lambda s: (kd() + ig(), {}),
    "kd+at": lambda s: (kd() + at(s), {}),
    "ig+at": lambda s: (labels() + ig() + at(s), {}),
    "kd+ig+at": lambda s: (kd() + ig() + at(s), {}),
    "kd/misaligned": lambda s: (kd(), {"logits": "misaligned"}),
    "kd/noise": lambda s: (kd(), {"logits": "noise"}),
    "ig/misaligned": lambda s: (labels() + ig(), {"map": "misaligned"}),
    "ig/noise": lambda s: (labels() + ig(), {"map": "noise"}),
    "at/misaligned": lambda s: (labels() + at(s), dict.fromkeys(at(s).teacher_features, "misaligned")),
    "at/noise": lambda s: (labels() + at(s), dict.fromkeys(at(s).teacher_features, "noise")),
    "kd+ig/misaligned": lambda s: (kd() + ig(), {"map": "misaligned"}),
    "kd+ig/noise": lambda s: (kd() + ig(), {"map": "noise"}),
    "kd+match": lambda s: (kd() + methods.map_matching(MATCH_WEIGHT.value), {}),
    "kd+crop": lambda s: (kd() + crop(), {}),
    "kd+crop/misaligned": lambda s: (kd() + crop(), {"map": "misaligned"}),
    "kd+weight": lambda s: (kd() + dim(probability=PROBABILITY.value, strength=OPACITY.value), {}),
}
WANTED = cli.define_arms(list(ARMS))
PRIMARY = [("kd+ig", "kd"), ("kd+ig", "kd+ig/noise"), ("kd", "scratch")]
PAIRS = (  # beside those: what a signal adds to distillation; whether it must be aligned
    *((f"kd+{signal}", "kd") for signal in ("at", "ig+at", "match", "crop", "weight")),
    *((arm, f"{arm}/misaligned") for arm in ("kd", "ig", "at", "kd+ig", "kd+crop")),
    ("ig", "ig/noise"),
)
MARGIN = 0.005  # of accuracy: less is no reason to compute maps
FACTORS = {
    "kd": (("scratch", "kd"), ("ig", "kd+ig"), ("at", "kd+at"), ("ig+at", "kd+ig+at")),
    "ig": (("scratch", "ig"), ("kd", "kd+ig"), ("at", "ig+at"), ("kd+at", "kd+ig+at")),
    "at": (("scratch", "at"), ("kd", "kd+at"), ("ig", "ig+at"), ("kd+ig", "kd+ig+at")),
}


def main(callbacks: Sequence[Callback] = ()) -> dict[str, Any] | None:
    """Teacher, its cached logits and maps, students, report; returns the result, or None in a worker of --jobs."""
    start, launch, machine, settings = time.monotonic(), LAUNCH.value, MACHINE.value, cli.settings(__name__)
    smoke: dict[str, Any] = {"at_most": 128, "num_validation": 64} if launch.smoke else {}
    wide = DATA.value.load(num_train=TEACHER.value.teacher_num_train or 0, **smoke)
    # The teacher's normalisation, so that its maps are of the student's inputs.
    few = DATA.value.load(**smoke)._replace(normalisation=wide.normalisation)
    recipe, seeds = quick(RECIPE.value), SEEDS.value[: 3 if launch.smoke else None]
    parallel.check_batch_size(recipe.batch_size, parallel.local_devices(machine.devices))
    teacher = dataclasses.replace(TEACHER.value, recipe=quick(TEACHER.value.recipe), teacher_num_train=None)
    source = cli.teachers(teacher, DATA.value, wide, launch=launch, settings=settings, machine=machine)
    students = students_of(few, source.shapes)
    worker, workdir = cli.my_task("experiments.ig_cifar10"), Path(launch.workdir)
    if worker is None:
        made_from = source.made_from | {"student_data": few.fingerprint}
        cli.begin(launch, made_from, about(few, source.name, students), students)
    watch = [ProgressBar(), *callbacks]
    trained = source.train(workdir, watch)
    answers = [ask(teacher, few, workdir, number) for number, teacher in enumerate(trained)]
    if worker is None and launch.jobs > 1:
        cli.in_children("experiments.ig_cifar10", range(launch.jobs))
    arms: dict[str, list[run.Trained]] = {"teacher": trained}
    options = {"machine": machine, "split": launch.split}
    more: dict[str, Any] = {"settings": source.settings, "callbacks": watch}
    for arm in list(students) if worker is None else list(students)[worker :: launch.jobs]:
        network, (method, perturbed) = students[arm]
        home, arms[arm] = workdir / "students" / arm, []
        for number, (signal, maps) in enumerate(answers):  # the students take turns among the teachers
            given = teachers.perturb(
                teachers.with_maps(signal, maps, method.teacher_features), few, perturbed
            )
            train = run.make_trainer(network, method, few, recipe, teacher=given, **options)
            own = seeds[number :: len(answers)]
            arms[arm] += [train(seed, home / str(seed), arm=arm, **more) for seed in own]
    if worker is not None:
        return None
    teacher_of = {seed: trained[i % len(trained)] for i, seed in enumerate(seeds)}
    more = {"settings": source.settings, "seconds": time.monotonic() - start}
    return report(few, arms, teacher_of, [maps for _, maps in answers], **more)


def quick(recipe: Recipe) -> Recipe:
    """Two epochs in smoke form."""
    return dataclasses.replace(recipe, epochs=2, evaluate_every=1) if LAUNCH.value.smoke else recipe


def students_of(dataset: data.Dataset, teacher: Outputs) -> dict[str, tuple[models.Network, Arm]]:
    """The network of each arm, and how it learns; arms of further students are called "kd (resnet14)"."""
    found = {}
    for student in (STUDENT.value, *MORE_STUDENTS.value):
        network, first = cli.network(student, dataset), student == STUDENT.value
        stages = methods.common_stages(network.output_shapes.features, teacher.features)
        for arm in WANTED.value if first else ("scratch", "kd", "kd+ig"):
            found[arm if first else f"{arm} ({student})"] = network, ARMS[arm](stages)
    return found


def ask(
    teacher: run.Trained, dataset: data.Dataset, workdir: Path, number: int
) -> tuple[teachers.TeacherSignal, teachers.Explanations]:
    """A teacher's logits, and its maps with attention, computed or read back."""
    launch, machine = LAUNCH.value, MACHINE.value
    home = workdir / "teacher_answers" / str(number)
    signal = cli.ask(teacher, dataset, home, launch=launch, machine=machine)
    decides = {"fingerprint": dataset.fingerprint, "weights": checkpoints.digest_tree(teacher.weights)}
    stages = methods.stages(teacher.network.output_shapes.features)
    asked: dict[str, Any] = {"stages": stages, "tolerance": IG_TOLERANCE.value}
    devices = parallel.local_devices(machine.devices)
    with cli.shared_cache(launch.shared_cache, workdir / "maps" / str(number), **decides, **asked) as home:
        return signal, teachers.explain(teacher, dataset, directory=home, devices=devices, **asked)


def report(
    dataset: data.Dataset,
    arms: study.Arms,
    teacher_of: Mapping[int, run.Trained],
    maps: Sequence[teachers.Explanations],
    **more: Any,
) -> dict[str, Any]:
    """Metrics of the students' maps, tests, and the result."""
    launch, workdir = LAUNCH.value, Path(LAUNCH.value.workdir)
    students = {arm: runs for arm, runs in arms.items() if arm != "teacher"}
    options = {"teacher_of": teacher_of, "split": launch.split, "tolerance": IG_TOLERANCE.value}
    metrics = study.saliency_of(dataset, students, workdir / "saliency", **options)
    arms = {"teacher": arms["teacher"], **study.with_metrics(students, metrics)}
    more |= {"costs": study.costs_of(arms)} if launch.split == "test" else {}
    notes = [of.note for of in maps] + study.comparison_notes(arms, pairs=PAIRS, factors=FACTORS)
    overlays = study.pictures(dataset, maps[0].answers["map"])
    more |= {"output": launch.output, "supersedes": launch.supersedes, "split": launch.split}
    more |= {"notes": notes, "overlays": overlays}
    asked = about(dataset, arms["teacher"][0].network.name, students)
    return study.conclude(asked, workdir, dataset, arms, **more)


def about(dataset: data.Dataset, teacher: str, students: Collection[str]) -> study.Study:
    """The question, and what it compares."""
    first, *_ = own = [arm for arm in students if arm in ARMS]  # of the first student
    return study.Study(
        "ig_cifar10",
        f"Does a student of {dataset.name} gain from seeing where its teacher looks?",
        baseline=first,
        metrics=("accuracy", "best_accuracy", "agreement", "map_correlation", "deletion", "insertion"),
        scaled_down=f"{len(dataset.splits['train'])} images, {quick(RECIPE.value).epochs} epochs, {teacher} and "
        f"{STUDENT.value}; the publication: 50,000, 100, MobileNetV2 and its first fourteen blocks",
        primary=[p for p in PRIMARY if set(p) <= set(students)] or [(a, first) for a in own if a != first],
        chosen_on=LAUNCH.value.chosen_on,
        margin=MARGIN,
        drawn=("scratch", "kd", "ig", "kd+ig"),
    )


if __name__ == "__main__":
    cli.launch(main)
