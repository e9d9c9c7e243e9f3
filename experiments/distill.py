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
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from absl import flags

from experiments import cli
from kdjax import checkpoints, data, files, methods, models, parallel, run, study
from kdjax import recipe as recipes
from kdjax import teacher as teachers
from kdjax.callbacks import Callback, ProgressBar, TensorBoard, bar
from kdjax.recipe import Machine, Recipe
from kdjax.types import Outputs

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
TEACHER_ANSWERS = flags.DEFINE_string(
    "teacher_answers",
    None,
    "An .npz with a teacher's logits, and features by name; see kdjax.teacher.from_file.",
)
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
LAUNCH = cli.define(cli.Launch(), omit=("jobs", "output"))
MACHINE = cli.define(Machine())

UNREAD = "Every number is of the validation split, which settings are chosen on; the test split was not read."


def main(callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
    """Checks everything, then teachers, their answers, students, report; returns the result."""
    start, launch, machine = time.monotonic(), LAUNCH.value, MACHINE.value
    arms, seeds = checked_flags(), SEEDS.value[: 2 if launch.smoke else None]
    if launch.pod:
        parallel.initialise()
    dataset = DATA.value.load(at_most=256 if launch.smoke else None)
    recipe, settings = smoke(RECIPE.value), cli.settings(__name__)
    parallel.check_batch_size(recipe.batch_size, parallel.local_devices(machine.devices))
    recipes.check(recipe, len(dataset.splits["train"]))
    student = network(STUDENT.value, dataset)
    init = None
    if INIT_FROM.value:
        found = run.load(INIT_FROM.value, dataset, network=student)
        init = methods.start_at(found.weights.params)
        settings["init_from"] = checkpoints.digest_tree(found.weights)
    # Whatever can be refused is refused before claim_workdir, which is the first to write.
    source = the_teachers(dataset, settings)
    bound = [
        run.check(student, arm, dataset, recipe, shapes=source.shapes, mode=source.mode)
        for arm in arms.values()
    ]
    features = sorted({name for one in bound for name in one.teacher_features})
    runs = {student: len(arms) * len(seeds)} | source.networks
    cli.check_disk(launch.workdir, runs, cache_bytes=cache_bytes(dataset, source, features))
    workdir = cli.claim_workdir(launch.workdir, source.made_from)
    if DATA.value.label_noise:
        files.write_json(workdir / "mislabelled.json", dataset.example_ids[dataset.mislabelled].tolist())

    watch: list[Callback] = [ProgressBar(), *callbacks]
    if launch.tensorboard:
        watch.append(TensorBoard(workdir / "tensorboard"))
    trained = source.train(workdir, watch)
    signals = source.signals or [
        ask(teacher, dataset, features, workdir / "teacher_answers" / str(number))
        for number, teacher in enumerate(trained)
    ]
    finished: dict[str, list[run.Trained]] = {arm: [] for arm in arms}
    for number, signal in enumerate(signals):  # the students take turns among the teachers
        for arm, method in arms.items():
            trainer = run.make_trainer(
                *(student, method, dataset, recipe), teacher=signal, machine=machine, split=launch.split
            )
            for seed in seeds[number :: len(signals)]:
                home, more = workdir / arm / str(seed), {"settings": source.settings, "init": init}
                finished[arm].append(trainer(seed, home, arm=arm, callbacks=watch, **more))
    every = ({"teacher": trained} if trained else {}) | finished
    return report(workdir, dataset, every, source, time.monotonic() - start)


class Source(NamedTuple):
    """Where the teacher's answers come from, before anything is trained or written."""

    settings: dict[str, Any]
    made_from: dict[str, Any]
    name: str
    shapes: Outputs
    mode: str
    networks: dict[models.Network, int]  # to train
    train: Callable[..., list[run.Trained]] = lambda workdir, callbacks: []
    signals: Sequence[teachers.TeacherSignal] = ()  # that are there already


def the_teachers(dataset: data.Dataset, settings: dict[str, Any]) -> Source:
    """The answers of --teacher_answers, the teacher of --teacher_dir, or teachers to be trained."""
    launch = LAUNCH.value
    if path := TEACHER_ANSWERS.value:
        signal = teachers.from_file(path, dataset, loaded=DATA.value.read())
        made_from = {**settings, "data": dataset.fingerprint, "answers": signal.identity}
        return Source(settings, made_from, path, signal.shapes, "centre", {}, signals=[signal])
    teacher = TEACHER.value
    teacher = dataclasses.replace(teacher, recipe=smoke(teacher.recipe))
    options = {"launch": launch, "settings": settings, "machine": MACHINE.value, **dtype_of(teacher.teacher)}
    found = cli.teachers(teacher, DATA.value, dataset, **options)
    networks = {} if teacher.teacher_dir else {found.network: teacher.teacher_seeds}
    shapes, name = found.network.output_shapes, found.network.name
    return Source(found.settings, found.made_from, name, shapes, TEACHER_MODE.value, networks, found.train)


def ask(
    teacher: run.Trained, dataset: data.Dataset, features: Sequence[str], own: Path
) -> teachers.TeacherSignal:
    """A teacher's answers, cached in the workdir or in --shared_cache."""
    move = {"padding": RECIPE.value.padding, "flip": RECIPE.value.flip}
    asked: dict[str, Any] = {
        "mode": TEACHER_MODE.value,
        "views": VIEWS.value,
        "features": features,
        "move": move,
    }
    decides = {"weights": checkpoints.digest_tree(teacher.weights), **asked}
    devices = parallel.local_devices(MACHINE.value.devices)
    with (
        cli.shared_cache(LAUNCH.value.shared_cache, own, dataset.fingerprint, **decides) as home,
        bar("teacher's answers", total=len(dataset.images), unit="image") as meter,
    ):
        return teachers.answers(
            *(teacher, dataset),
            **asked,
            directory=home,
            devices=devices,
            progress=lambda done, total: meter.update(done - meter.n),
        )


def report(
    workdir: Path, dataset: data.Dataset, arms: study.Arms, source: Source, seconds: float
) -> dict[str, Any]:
    """The result of finished arms."""
    launch = LAUNCH.value
    more: dict[str, Any] = {"costs": study.costs_of(arms)} if launch.split == "test" else {}
    if ROBUSTNESS.value:
        more["robustness"] = study.robustness_of(dataset, arms, workdir / "robustness", split=launch.split)
    about = study.Study(
        "distill",
        f"Does {STUDENT.value} learn more of {DATA.value.dataset} from {source.name} than from labels alone?",
        baseline=next(arm for arm in arms if arm != "teacher"),
        scaled_down=launch.scaled_down,
    )
    notes = [UNREAD] if launch.split == "validation" else []
    return study.conclude(
        *(about, workdir, dataset, arms), settings=source.settings, seconds=seconds, notes=notes, **more
    )


def checked_flags() -> dict[str, methods.Method]:
    """The arms as methods, once the flags make sense together."""
    if TEACHER_MODE.value != "views":
        cli.refuse_given(["views"], f"--teacher_mode={TEACHER_MODE.value} caches no augmented views")
    if TEACHER_ANSWERS.value:
        given = ("teacher_dir", "teacher_mode", *TEACHER.value.training_flags)
        cli.refuse_given(given, "--teacher_answers brings its own teacher")
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
    weights = cli.parse_weights(WEIGHTS.value, names)
    kd = methods.kd(**vars(KD.value))
    return {name: methods.named(name, kd=kd, weights=weights) for name in names}


def network(spec: str, dataset: data.Dataset) -> models.Network:
    """The network of a flag, in --dtype."""
    return cli.network(spec, dataset, **dtype_of(spec))


def dtype_of(spec: str) -> dict[str, Any]:
    """The field that --dtype sets; a network of the user's decides for itself."""
    return {} if ":" in spec else {"dtype": jnp.dtype(DTYPE.value)}


def smoke(recipe: Recipe) -> Recipe:
    """The recipe, with one epoch in a smoke run."""
    return dataclasses.replace(recipe, epochs=1) if LAUNCH.value.smoke else recipe


def cache_bytes(dataset: data.Dataset, source: Source, features: Sequence[str]) -> int:
    """What the teachers' cached answers will take."""
    shapes = [source.shapes.features[name].shape[1:] for name in features if not source.signals]
    numbers = source.shapes.logits.shape[-1] + sum(map(math.prod, shapes))
    images = len(dataset.images) * {"centre": 1, "views": VIEWS.value, "online": 0}[source.mode]
    return (2 if features else 4) * numbers * images * max(1, sum(source.networks.values()))


if __name__ == "__main__":
    cli.launch(main)
