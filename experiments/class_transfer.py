r"""Does a teacher of other classes help a student? CIFAR-100 teaches CIFAR-10.

    python -m experiments.class_transfer --data_dir=data --workdir=runs/class_transfer --last_stage
    python -m experiments.class_transfer --data_dir=data --workdir=runs/class_transfer_full --teacher=wrn_40_2 \
        --student=wrn_16_2 --teacher_epochs=200 --epochs=200 --batch_size=128 --learning_rate=0.1 --optimizer=sgd \
        --weight_decay=5e-4 --teacher_mode=online --num_train=0 --evaluate_every=20

Beckerbauer, Prakash and Dongmo (2024) propose to distil a CIFAR-100 teacher into a small CIFAR-10 student, and give no
numbers. An arm is METHOD or METHOD@TEACHER. Methods:

* scratch: the labels alone; finetuned: the same, from weights that were trained on the teacher's data set;
* names, least_squares, blm, blm_plus: kd through a map of classes, by names or learnt on the student's training images;
  blm_logits: the same counts as weights of logits, as the authors of BLM use them;
* probe: kd from a linear probe of the frozen teacher, fitted to the student's labels;
* kd: without a map, of a teacher that has the student's classes;
* any method of kdjax.methods that compares features, such as vkd or refilled, beside the labels.

Teachers: full, the default; random, the same network untrained; smoothed_S, trained with label smoothing S; epoch_N,
the weights of full after N epochs; same_classes, the same network trained on all labels of the student's data set. With
--teacher_answers the logits and features of a file stand in for full.

--classes transfers knowledge of some classes alone: images of the others have their label only. Their accuracy and that
of the others is measured.
"""

import contextlib
import csv
import dataclasses
import functools
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import cli
from kdjax import data, losses, methods, models, parallel, representations, run, study
from kdjax import recipe as recipes
from kdjax import teacher as teachers
from kdjax.callbacks import Callback, KeepWeights, ProgressBar
from kdjax.recipe import Machine, Recipe
from kdjax.teacher import TeacherSignal
from kdjax.types import Outputs, Weights

DATA = cli.define(cli.Data(dataset="cifar10", num_train=448), omit=("label_noise",))
TEACHER_DATASET = flags.DEFINE_string("teacher_dataset", "cifar100", "What the teacher learns; as --dataset.")
STUDENT = flags.DEFINE_string(
    "student", "resnet8_w50", "A name in kdjax.models.MODELS, or path/mine.py:build."
)
RECIPE = cli.define(Recipe(200, schedule="cosine", padding=4, flip=True, evaluate_every=200))
SGD = Recipe(12, 128, 0.1, optimizer="sgd", schedule="cosine", weight_decay=5e-4, padding=4, flip=True)
OMITTED = (
    *("teacher_dir", "teacher_num_train", "teacher_label_noise", "teacher_seeds"),
    *("teacher_label_smoothing", "teacher_untrained"),  # arms say which teacher: @smoothed_S, @random
)
TEACHER = cli.define_teacher(SGD, defaults=cli.Teacher("resnet20"), omit=OMITTED)
KEPT = flags.DEFINE_list("teacher_keep", ["1", "2", "4", "8"], "Epochs whose weights can teach, as epoch_N.")
MODE = flags.DEFINE_enum("teacher_mode", "views", teachers.MODES, "As in experiments.distill.")
VIEWS = flags.DEFINE_integer("views", 4, "Cached views per image in the mode views.", 2)
KD = cli.define(methods.KdOptions(temperature=4.0, hard_weight=0.5, soft_weight=0.5))
WEIGHTS = flags.DEFINE_list(
    "weights",
    [],
    "Weights of methods, if not the published: hint=50,rkd=2; of a map or probe the soft weight, 1 minus it of labels.",
)
LAST_STAGE = flags.DEFINE_bool(
    "last_stage", False, "hint and attention_transfer compare the last stage alone: less to cache."
)
TOP_K = flags.DEFINE_integer("top_k", 3, "Of blm_plus.", 1)
CLASS_MAP = flags.DEFINE_string(
    "class_map",
    None,
    "Of names: a CSV with the columns teacher_class and classes, which are separated by spaces; the reviewed table of "
    "CIFAR-100 and CIFAR-10 by default.",
)
REVIEWED = Path(__file__).parent / "class_maps" / "cifar100_to_cifar10.csv"
CLASSES = flags.DEFINE_list("classes", [], "Classes of the student to transfer and measure; all by default.")
MAPPED = ("names", *teachers.WAYS)
FEATURES = ("refilled", "hint", "attention_transfer", "vkd", "rkd", "similarity_preserving", "cka", "crd")
CONTROLS = ("probe@random", "blm_plus@random", "vkd@random", "similarity_preserving@random")
ARMS = cli.may_change(
    flags.DEFINE_list(
        "arms",
        ["scratch", *MAPPED, *FEATURES, *CONTROLS, "finetuned", "kd@same_classes"],
        "METHOD or METHOD@TEACHER, as above; scratch is the baseline.",
    )
)
SEEDS = cli.define_seeds()
LAUNCH = cli.define(cli.Launch(), omit=("pod", "tensorboard"))
MACHINE = cli.define(Machine())

MARGIN = 0.01  # of accuracy
MODULE = "experiments.class_transfer"
FULL, RANDOM, SAME, EMBEDDING = "full", "random", "same_classes", "embedding"


class Arm(NamedTuple):
    """How a student learns, and from whom.

    Attributes:
      method: what it minimises.
      teacher: its name; empty without one.
      answer: how the teacher answers in the student's classes: one of MAPPED, or kd for its own logits.
      transferred: whether it starts from the weights of a student that learnt the teacher's data set.
    """

    method: methods.Method
    teacher: str = ""
    answer: str = ""
    transferred: bool = False


class Said(NamedTuple):
    """A teacher's answers as a student is given them, those about unaugmented images, and a probe fitted to these."""

    signal: TeacherSignal
    centre: TeacherSignal
    probe: representations.Probe | None


def main(callbacks: Sequence[Callback] = ()) -> dict[str, Any] | None:
    """Teachers, their answers, students, report; returns the result, or None in a worker of --jobs."""
    start, launch, settings = time.monotonic(), LAUNCH.value, cli.settings(__name__)
    dataset, arms = load(), arms_of()
    recipe, seeds = quick(RECIPE.value), SEEDS.value[: 2 if launch.smoke else None]
    student, from_file = cli.network(STUDENT.value, dataset), None
    if (path := TEACHER.value.teacher_answers) is not None:
        from_file = teachers.from_file(path, dataset, loaded=DATA.value.read(), other_classes=True)
    alone = from_file is not None and {(a.teacher or FULL, a.transferred) for a in arms.values()} == {
        (FULL, False)
    }
    others = dataset if alone else load(dataset=TEACHER_DATASET.value, num_train=0)
    compared = check(arms, student, dataset, others, from_file)
    worker, workdir = cli.my_task(MODULE), Path(launch.workdir)
    if worker is None:
        made_from = settings | {"data": dataset.fingerprint, "teacher_data": others.fingerprint}
        made_from["answers"] = None if from_file is None else from_file.identity
        cli.begin(launch, made_from, question(arms, dataset, has_probe=True), arms)
    watch = [ProgressBar(), *callbacks]
    mine = list(arms) if worker is None else list(arms)[worker :: launch.jobs]
    names = [FULL] * (worker is None) + [arms[name].teacher for name in mine if arms[name].teacher]
    options: dict[str, Any] = {"others": others, "workdir": workdir, "watch": watch}
    taught = {n: trained(n, **options) for n in dict.fromkeys(names) if n != FULL or from_file is None}

    @functools.lru_cache(maxsize=1)  # answers may be large
    def said(name: str) -> Said:
        if name not in taught:
            assert from_file is not None
            return probed(from_file, from_file, dataset)
        features = {f for arm in arms if arms[arm].teacher == name for f in compared[arm]}
        return ask(taught[name], dataset, sorted({EMBEDDING, *features}), workdir)

    probes, predicted = {}, None
    if worker is None:  # which also caches what the workers will read
        for name in dict.fromkeys(reversed(names)):  # FULL last
            probes[name] = said(name).probe
        predicted = predictions(said(FULL), dataset)
    init = None
    if any(arm.transferred for arm in arms.values()):
        pretrained = trained("pretrained", spec=STUDENT.value, **options)
        init = methods.start_at(*pretrained.weights, other_classes=True)
    if worker is None and launch.jobs > 1:
        cli.in_children(MODULE, range(launch.jobs))
    found: dict[str, list[run.Trained]] = {}
    for name in mine:
        arm, signal = arms[name], None
        if arm.teacher:
            signal = answering(arm, said(arm.teacher), compared[name], dataset, others)
        given: dict[str, Any] = {"teacher": signal, "machine": MACHINE.value, "split": launch.split}
        train = run.make_trainer(student, arm.method, dataset, recipe, **given)
        own: dict[str, Any] = {"settings": settings | {"transferred": arm.transferred}, "callbacks": watch}
        own |= {"init": init} if arm.transferred else {}
        homes = [workdir / "students" / name / str(seed) for seed in seeds]
        found[name] = [train(n, home, arm=name, **own) for n, home in zip(seeds, homes, strict=True)]
    if worker is not None:
        return None
    more = {"settings": settings, "seconds": time.monotonic() - start}
    return report(dataset, others, found, taught, probes, predicted, **more)


# What is asked for, and what can be refused at once.


def load(**changes: Any) -> data.Dataset:
    """The student's data, or others; few in smoke form."""
    smoke: dict[str, Any] = {"at_most": 256, "num_validation": 128} if LAUNCH.value.smoke else {}
    return DATA.value.load(**smoke, **changes)


def quick(recipe: Recipe) -> Recipe:
    """Two epochs in smoke form."""
    return dataclasses.replace(recipe, epochs=2, evaluate_every=1) if LAUNCH.value.smoke else recipe


def arms_of() -> dict[str, Arm]:
    """The arms that --arms names."""
    names, said = ARMS.value, f"--arms={','.join(ARMS.value)}"
    if "scratch" not in names or len(set(names)) < len(names):
        raise ValueError(f"{said} must name different arms, scratch among them.")
    used = [name.partition("@")[0] for name in names]
    weights = cli.parse_weights(WEIGHTS.value, used)
    soft, found = methods.kd(**vars(KD.value)), {}
    for arm in names:
        name, _, teacher = arm.partition("@")
        if name in ("scratch", "finetuned"):
            if teacher:
                raise ValueError(f"{said}: {name} has no teacher, so write {name} for {arm}.")
            found[arm] = Arm(methods.labels(), transferred=name == "finetuned")
        elif name in MAPPED or name == "kd":
            method = soft
            if name in weights:
                if weights[name] > 1:
                    raise ValueError(f"--weights: {name}={weights[name]:g} must be a share from 0 to 1.")
                own = {"soft_weight": weights[name], "hard_weight": 1 - weights[name]}
                method = methods.kd(**vars(KD.value) | own)
            found[arm] = Arm(method, teacher or FULL, name)
        else:
            method = methods.named(name, kd=soft, weights=weights)
            if LAST_STAGE.value and name in ("hint", "attention_transfer"):
                given = {"weight": weights[name]} if name in weights else {}
                method = methods.METHODS[name](**given, student=methods.last_stage)
            found[arm] = Arm(method, teacher or FULL, "probe")
    return found


def check(
    arms: Mapping[str, Arm],
    student: models.Network,
    dataset: data.Dataset,
    others: data.Dataset,
    from_file: TeacherSignal | None,
) -> dict[str, Sequence[str]]:
    """Refuses what cannot be trained, before anything is computed; arm → the teacher's features that it compares."""
    recipe, own = quick(RECIPE.value), quick(TEACHER.value.recipe)
    if MODE.value != "views":
        cli.refuse_given(["views"], f"--teacher_mode={MODE.value} caches no augmented views")
    if dataset.image_shape != others.image_shape:
        raise ValueError(
            f"{dataset.name} has images of shape {dataset.image_shape}, {others.name} of {others.image_shape}; give "
            "both one shape with --image_size=HEIGHT,WIDTH."
        )
    parallel.check_batch_size(recipe.batch_size, parallel.local_devices(MACHINE.value.devices))
    recipes.check(recipe, len(dataset.splits["train"]))
    recipes.check(own, len(others.splits["train"]), of="the teacher's")
    labels = set(dataset.labels[dataset.splits["train"]].tolist())
    if without := [name for k, name in enumerate(dataset.class_names) if k not in labels]:
        raise ValueError(
            f"--num_train={DATA.value.num_train} leaves no training image of {', '.join(without)}, and what a teacher "
            "says of it cannot be learnt; use more."
        )
    if unknown := [name for name in CLASSES.value if name not in dataset.class_names]:
        raise ValueError(
            f"--classes={','.join(CLASSES.value)}: {dataset.name} has no class {unknown[0]}; it has "
            f"{', '.join(dataset.class_names)}."
        )
    if CLASSES.value and MODE.value == "online":
        raise ValueError(
            "--classes needs cached answers: use --teacher_mode=views or centre in place of online."
        )
    teacher, compared = cli.network(TEACHER.value.teacher, others), {}
    for name, arm in arms.items():
        if not arm.teacher:
            run.check(student, arm.method, dataset, recipe)
            continue
        shapes = teacher.output_shapes if from_file is None or arm.teacher != FULL else from_file.shapes
        check_teacher(name, arm, own, from_file)
        if arm.answer == "kd":
            if arm.teacher != SAME and others.class_names != dataset.class_names:
                raise ValueError(
                    f"{name}: the teacher's classes are not the student's; put a map between them, as in blm_plus, or "
                    "write kd@same_classes."
                )
        elif arm.answer == "names":
            if from_file is not None and arm.teacher == FULL:
                raise ValueError(
                    "names needs the names of the teacher's classes, and --teacher_answers has none."
                )
            read_class_map(CLASS_MAP.value or str(REVIEWED), others, dataset)
        elif arm.answer == "probe" and EMBEDDING not in shapes.features:
            raise ValueError(f"{name} needs the teacher's {EMBEDDING}, and it has none.")
        if CLASSES.value and [term.name for term in arm.method.terms] != ["soft"]:
            raise ValueError(
                f"{name} compares features of all images; --classes goes with {', '.join(MAPPED)}."
            )
        logits: Any = jax.ShapeDtypeStruct((2, dataset.num_classes), jnp.float32)
        mode = "centre" if from_file is not None and arm.teacher == FULL else MODE.value
        shapes = Outputs(logits, shapes.features)
        compared[name] = run.check(
            student, arm.method, dataset, recipe, shapes=shapes, mode=mode
        ).teacher_features
    return compared


def check_teacher(name: str, arm: Arm, recipe: Recipe, from_file: TeacherSignal | None) -> None:
    """Refuses an arm whose teacher there will not be."""
    kind, _, value = arm.teacher.partition("_")
    if arm.teacher in (FULL, RANDOM, SAME):
        return
    if kind == "smoothed":
        with contextlib.suppress(ValueError):
            if 0 < float(value) < 1:
                return
        raise ValueError(f"{name}: write a share between 0 and 1, as in smoothed_0.1.")
    if kind != "epoch":
        raise ValueError(
            f"{name}: there is no teacher {arm.teacher}; write full, random, same_classes, smoothed_0.1 or epoch_4."
        )
    if from_file is not None:
        raise ValueError(f"{name}: --teacher_answers stands in for full, which has no epochs then.")
    if value not in KEPT.value or int(value) > recipe.epochs:
        kept = [n for n in KEPT.value if int(n) <= recipe.epochs]
        raise ValueError(f"{name}: --teacher_keep keeps the weights of the epochs {', '.join(kept)} alone.")


def question(arms: Iterable[str], dataset: data.Dataset, *, has_probe: bool) -> study.Study:
    """What is compared: each arm with the labels alone, with its control, and with the better trained teacher."""
    pairs = [(arm, "scratch") for arm in arms if arm != "scratch" and "@" not in arm]
    pairs += [(arm, f"{arm}@{RANDOM}") for arm in arms]
    pairs += [(arm, arm.partition("@")[0]) for arm in arms if "@" in arm and not arm.endswith(RANDOM)]
    agreement = ("agreement_right", "agreement_wrong") if has_probe else ()
    chosen = ("accuracy_chosen", "accuracy_other") if CLASSES.value else ()
    return study.Study(
        "class_transfer",
        f"Does a teacher of {TEACHER_DATASET.value} help a student of {dataset.name}?",
        baseline="scratch",
        metrics=("accuracy", *agreement, *chosen),
        scaled_down=LAUNCH.value.scaled_down,
        primary=pairs,
        chosen_on=LAUNCH.value.chosen_on,
        margin=MARGIN,
    )


# Teachers.


def trained(
    name: str, *, others: data.Dataset, workdir: Path, watch: Sequence[Callback], spec: str | None = None
) -> run.Trained:
    """A teacher by its name, trained or read back; a network of another ``spec`` is trained in its place."""
    launch, machine, (kind, _, value) = LAUNCH.value, MACHINE.value, name.partition("_")
    own = load(num_train=0) if name == SAME else others
    network, recipe = cli.network(spec or TEACHER.value.teacher, own), quick(TEACHER.value.recipe)
    measured = functools.partial(run.measured, name, 0, network, split=launch.split, machine=machine)
    if name == RANDOM:
        return measured(Weights(*network.init(0)), own)
    smoothed = kind == "smoothed"
    method = methods.label_smoothing_cross_entropy(smoothing=float(value)) if smoothed else methods.labels()
    identity = run.identity_of(network, own, recipe, machine) | {"seed": 0}
    epoch = max(len(own.splits["train"]) // recipe.batch_size, 1)
    folder = FULL if kind == "epoch" else name
    decides = {key: value for key, value in identity.items() if key != "data"}
    decides["method"] = method.description
    with cli.shared_cache(
        launch.shared_cache, workdir / "teachers" / folder, own.fingerprint, **decides
    ) as home:
        keep = KeepWeights(home / "epochs", [epoch * int(n) for n in KEPT.value], identity)
        train = run.make_trainer(network, method, own, recipe, machine=machine, split=launch.split)
        finished = train(0, home / "0", arm=folder, callbacks=[*watch, keep])
        if kind == "epoch":
            return measured(keep.read(epoch * int(value), finished.weights), own)
        return finished


def ask(teacher: run.Trained, dataset: data.Dataset, features: Sequence[str], workdir: Path) -> Said:
    """What a teacher says of the student's images."""
    recipe, home = RECIPE.value, workdir / "teacher_answers" / teacher.arm
    asked = functools.partial(cli.ask, teacher, dataset, launch=LAUNCH.value, machine=MACHINE.value)
    move = {"padding": recipe.padding, "flip": recipe.flip}
    signal = asked(home, mode=MODE.value, features=features, views=VIEWS.value, move=move)
    centre = signal
    if signal.answers is None:
        centre = asked(home / "centre", mode="centre", features=[EMBEDDING])
    return probed(signal, centre, dataset)


def probed(signal: TeacherSignal, centre: TeacherSignal, dataset: data.Dataset) -> Said:
    """Answers with a probe, where there are embeddings to fit it to."""
    has = EMBEDDING in (centre.answers or {})
    return Said(signal, centre, teachers.probe_of(centre, dataset) if has else None)


def predictions(said: Said, dataset: data.Dataset) -> np.ndarray | None:
    """The classes that a probed teacher predicts on the split that is measured."""
    if said.probe is None:
        return None
    assert said.centre.answers is not None
    rows = said.centre.answers[EMBEDDING][dataset.splits[LAUNCH.value.split], 0].astype(np.float32)
    return (rows @ said.probe.kernel + said.probe.bias).argmax(-1)


# Their answers, in the student's classes.


def read_class_map(path: str, others: data.Dataset, dataset: data.Dataset) -> np.ndarray:
    """The map in a CSV; a ValueError if it is not of these classes."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [(row["teacher_class"], row["classes"].split()) for row in csv.DictReader(file)]
    except (OSError, KeyError, AttributeError) as error:
        raise ValueError(
            f"--class_map={path} must be a CSV with the columns teacher_class and classes ({error!r})."
        ) from None
    listed: dict[str, list[str]] = {}
    for theirs, ours in rows:
        for name in ours:
            listed.setdefault(name, []).append(theirs)
    try:
        return losses.class_map(listed, teacher_classes=others.class_names, classes=dataset.class_names)
    except ValueError as error:
        raise ValueError(f"--class_map={path}: {error}") from None


def answering(
    arm: Arm, said: Said, features: Sequence[str], dataset: data.Dataset, others: data.Dataset
) -> TeacherSignal:
    """The teacher's answers as an arm reads them: logits of the student's classes, and the features it compares."""
    options: dict[str, Any] = {"features": features, "temperature": KD.value.temperature}
    if arm.answer == "names":
        signal = teachers.through_map(
            said.signal, read_class_map(CLASS_MAP.value or str(REVIEWED), others, dataset), **options
        )
    elif arm.answer == "kd":
        signal = teachers.translate(said.signal, lambda one: one["logits"], features=features, made_from="kd")
    elif arm.answer == "probe":
        assert said.probe is not None
        signal = teachers.through_probe(said.signal, said.probe, features=features)
    else:
        options |= {"top_k": TOP_K.value, "fitted_to": said.centre}
        signal = teachers.in_classes(said.signal, dataset, arm.answer, **options)
    return teachers.about_classes(signal, dataset, CLASSES.value) if CLASSES.value else signal


# What is measured beside accuracy.


def report(
    dataset: data.Dataset,
    others: data.Dataset,
    students: Mapping[str, Sequence[run.Trained]],
    taught: Mapping[str, run.Trained],
    probes: Mapping[str, representations.Probe | None],
    predicted: np.ndarray | None,
    **more: Any,
) -> dict[str, Any]:
    """The result, with each teacher and its probe as references."""
    launch, workdir, references = LAUNCH.value, Path(LAUNCH.value.workdir), {}
    for name, teacher in taught.items():
        if name == SAME:
            references[f"{name}_teacher"] = [teacher]
        elif (probe := probes[name]) is not None:
            own = dataset._replace(normalisation=teacher.normalisation)
            probed = models.probed(teacher.network, teacher.weights, probe)
            row = f"{name}_probed_teacher"
            one = run.measured(row, 0, *probed, own, split=launch.split, machine=MACHINE.value)
            measures = {"own_accuracy": teacher.metrics["accuracy"]} | study.embeddings_of(teacher, others)
            references[row] = [one._replace(metrics=one.metrics | measures)]
    arms = {**references, **students}
    if predicted is not None:
        options: dict[str, Any] = {"predicted": predicted, "split": launch.split}
        arms = study.with_metrics(arms, study.agreement_of(dataset, arms, workdir / "answers", **options))
    if CLASSES.value:
        arms = {
            name: [study.with_class_accuracy(one, dataset, CLASSES.value) for one in runs]
            for name, runs in arms.items()
        }
    more |= {"costs": study.costs_of(arms)} if launch.split == "test" else {}
    more |= {"output": launch.output, "supersedes": launch.supersedes, "split": launch.split}
    about = question(students, dataset, has_probe=predicted is not None)
    return study.conclude(about, workdir, dataset, arms, **more)


if __name__ == "__main__":
    cli.launch(main)
