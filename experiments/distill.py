r"""Does a student learn more from a teacher than from the labels alone? The general launch.

    python -m experiments.distill --dataset=digits --workdir=runs/digits
    python -m experiments.distill --dataset=mnist --data_dir=data --workdir=runs/mnist --num_train=10000 \
        --teacher=keras_teacher --student=keras_student --teacher_num_train=0 --teacher_epochs=8 \
        --teacher_learning_rate=5e-4 --schedule=cosine
    python -m experiments.distill --dataset=digits --workdir=runs/methods --arms=scratch,kd,rkd,dkd,crd+kd
    python -m experiments.distill --dataset=mine.npz --student=mine.py:build --teacher_answers=answers.npz \
        --workdir=runs/mine

Trains the teacher, or takes one up with --teacher_dir, or reads the answers of one in any framework with
--teacher_answers; then trains the student by each of --arms over --seeds. The first command takes about a minute on
two CPU cores, the second about twenty. Expected numbers stand in docs/results beside the command.

--arms takes every method of kdjax.methods with its published weight. Methods that compare feature maps need two
networks with the same stages and a teacher that sees the student's own pixels: --teacher_mode=online or views, or no
augmentation. --init_from=RUN starts every student from the weights of a finished run of the same network.

The workdir receives every run's checkpoints, results.json (flags, versions, every number of every seed), figure.png and
report.html. The same command started again continues where it was stopped.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from absl import flags

from experiments import cli
from kdjax import checkpoints, data, files, methods, models, parallel, run, study
from kdjax import recipe as recipes
from kdjax import teacher as teachers
from kdjax.callbacks import Callback, ProgressBar, TensorBoard
from kdjax.recipe import Machine, Recipe

DATA = cli.define(cli.Data())
STUDENT = flags.DEFINE_string(
    "student", "digits_student", "A name in kdjax.models.MODELS, or path/mine.py:build."
)
INIT_FROM = flags.DEFINE_string("init_from", None, "Start students from this finished run, as runs/one/kd/0.")
RECIPE = cli.define(Recipe(), omit=("max_norm", "momentum"))
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Of activations; parameters are float32."
)
TEACHER = cli.define_teacher(RECIPE, only=("epochs", "padding", "learning_rate"))
TEACHER_MODE = flags.DEFINE_enum(
    "teacher_mode",
    "centre",
    teachers.MODES,
    "What the teacher sees: the unaugmented image, cached; --views cached augmentations, of which the student is shown "
    "one; or, online, the student's own augmented image.",
)
VIEWS = flags.DEFINE_integer(
    "views", 8, "Cached views per image in the mode views, the unaugmented one included.", 2
)
ARMS = cli.define_arms(
    default=["scratch", "kd"],
    help="Methods to compare; the first is the baseline. One of them is a name or several joined by +, as in hint+kd: "
    f"scratch, kd, {', '.join(methods.METHODS)}.",
)
WEIGHTS = flags.DEFINE_list("weights", [], "Weights of methods, if not the published: hint=50,dist=1.")
KD = cli.define(methods.KdOptions(temperature=3.0))
ROBUSTNESS = cli.may_change(
    flags.DEFINE_bool(
        "robustness",
        False,
        "Also measure accuracy under corruptions, weight noise and attacks; minutes on a CPU.",
    )
)
SEEDS = cli.define_seeds()
LAUNCH = cli.define(cli.Launch(), omit=("jobs", "output", "supersedes"))
MACHINE = cli.define(Machine())

UNREAD = "Every number is of the validation split, which settings are chosen on; the test split was not read."


def main(callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
    """Checks everything, then teachers, their answers, students, report; returns the result."""
    start, launch, machine = time.monotonic(), LAUNCH.value, MACHINE.value
    arms, seeds = methods_of_arms(), SEEDS.value[: 2 if launch.smoke else None]
    if launch.pod:
        parallel.initialise()
    dataset = DATA.value.load(at_most=256 if launch.smoke else None)
    recipe, settings = launch.shorten(RECIPE.value, epochs=1), cli.settings(__name__)
    parallel.check_batch_size(recipe.batch_size, parallel.local_devices(machine.devices))
    recipes.check(recipe, len(dataset.splits["train"]))
    student = cli.network(STUDENT.value, dataset, dtype=jnp.dtype(DTYPE.value))
    init = first_weights(student, dataset, settings)
    source = source_of(dataset, settings)
    asked = to_ask(source, student, arms, dataset)
    images = len(dataset.images) * {"centre": 1, "views": VIEWS.value, "online": 0}[TEACHER_MODE.value]
    runs = {student: len(arms) * len(seeds)} | source.to_train
    cli.check_disk(launch.workdir, runs, cache_bytes=source.cache_bytes(images, asked["features"]))
    watch: list[Callback] = [ProgressBar(), *callbacks]
    if launch.tensorboard:
        watch.append(TensorBoard(Path(launch.workdir) / "tensorboard"))
    # Whatever can be refused has been by now: this is the first to write.
    about = question(arms, source)
    workdir = cli.begin(launch, source.made_from, about, arms)
    if DATA.value.label_noise:
        files.write_json(workdir / "mislabelled.json", dataset.example_ids[dataset.mislabelled].tolist())

    trained = source.train(workdir, watch)
    signals = source.answers or [
        cli.ask(
            *(teacher, dataset, workdir / "teacher_answers" / str(k)), launch=launch, machine=machine, **asked
        )
        for k, teacher in enumerate(trained)
    ]
    finished: dict[str, list[run.Trained]] = {arm: [] for arm in arms}
    for number, signal in enumerate(signals):  # the students take turns among the teachers
        for arm, method in arms.items():
            options = {"teacher": signal, "machine": machine, "split": launch.split}
            train_student = run.make_trainer(student, method, dataset, recipe, **options)
            more: dict[str, Any] = {"callbacks": watch, "settings": source.settings, "init": init}
            for seed in seeds[number :: len(signals)]:
                finished[arm].append(train_student(seed, workdir / arm / str(seed), arm=arm, **more))
    every = ({"teacher": trained} if trained else {}) | finished
    return report(about, workdir, dataset, every, settings=source.settings, seconds=time.monotonic() - start)


def methods_of_arms() -> dict[str, methods.Method]:
    """The methods of --arms, once the flags make sense together."""
    if TEACHER_MODE.value != "views":
        cli.refuse_given(["views"], f"--teacher_mode={TEACHER_MODE.value} caches no augmented views")
    if TEACHER.value.teacher_answers:
        cli.refuse_given(["teacher_mode"], "--teacher_answers holds one answer per image")
    names, recipe = ARMS.value, RECIPE.value
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"--arms={','.join(names)} must name one or more different arms, such as scratch,kd."
        )
    if recipe.mixup and names != ["scratch"] and TEACHER_MODE.value != "online":
        raise ValueError(
            f"--mixup={recipe.mixup} blends images, and no cached answer is about a blend; use --teacher_mode=online "
            f"in place of {TEACHER_MODE.value}, or --mixup=0."
        )
    weights, kd = cli.parse_weights(WEIGHTS.value, names), methods.kd(**vars(KD.value))
    return {name: methods.named(name, kd=kd, weights=weights) for name in names}


def first_weights(
    student: models.Network, dataset: data.Dataset, settings: dict[str, Any]
) -> run.Init | None:
    """What starts the students at the weights of --init_from, whose digest becomes part of the settings."""
    if INIT_FROM.value is None:
        return None
    weights = run.load(INIT_FROM.value, dataset, network=student, split=LAUNCH.value.split).weights
    settings["init_from"] = checkpoints.digest_tree(weights)
    return methods.start_at(*weights)


def source_of(dataset: data.Dataset, settings: Mapping[str, Any]) -> cli.Teachers:
    """The teachers, or the file of their answers."""
    launch, teacher = LAUNCH.value, TEACHER.value
    teacher = dataclasses.replace(teacher, recipe=launch.shorten(teacher.recipe, epochs=1))
    options = {"launch": launch, "settings": settings, "machine": MACHINE.value}
    return cli.teachers(teacher, DATA.value, dataset, **options, dtype=jnp.dtype(DTYPE.value))


def to_ask(
    source: cli.Teachers,
    student: models.Network,
    arms: Mapping[str, methods.Method],
    dataset: data.Dataset,
) -> dict[str, Any]:
    """What the teachers are asked for; a ValueError if an arm cannot be trained on it."""
    recipe, mode = RECIPE.value, TEACHER_MODE.value
    options: dict[str, Any] = {"shapes": source.shapes, "mode": mode}
    bound = [run.check(student, method, dataset, recipe, **options) for method in arms.values()]
    features = sorted({name for one in bound for name in one.teacher_features})
    move = {"padding": recipe.padding, "flip": recipe.flip}
    return {"mode": mode, "views": VIEWS.value, "features": features, "move": move}


def question(arms: Sequence[str] | Mapping[str, Any], source: cli.Teachers) -> study.Study:
    """What is asked: each arm is compared with the first."""
    return study.Study(
        "distill",
        f"Does {STUDENT.value} learn more of {DATA.value.dataset} from {source.name} than from labels alone?",
        baseline=next(iter(arms)),
        scaled_down=LAUNCH.value.scaled_down,
        chosen_on=LAUNCH.value.chosen_on,
    )


def report(
    about: study.Study, workdir: Path, dataset: data.Dataset, arms: study.Arms, **more: Any
) -> dict[str, Any]:
    """The result of finished arms."""
    launch = LAUNCH.value
    more |= {"costs": study.costs_of(arms)} if launch.split == "test" else {}
    if ROBUSTNESS.value:
        more["robustness"] = study.robustness_of(dataset, arms, workdir / "robustness", split=launch.split)
    more |= {"notes": [UNREAD] if launch.split == "validation" else [], "split": launch.split}
    return study.conclude(about, workdir, dataset, arms, **more)


if __name__ == "__main__":
    cli.launch(main)
