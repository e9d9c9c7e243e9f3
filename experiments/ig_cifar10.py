r"""Does a student gain from seeing where its teacher looks? Integrated gradients beside distillation and attention.

    python -m experiments.ig_cifar10 --data_dir=data --workdir=runs/ig_cifar10 \
        --teacher_dir=runs/cifar10_teacher/teacher/0
    python -m experiments.ig_cifar10 --data_dir=data --workdir=runs/ig_cifar10_full --teacher=mobilenet_v2 \
        --student=mobilenet_v2_cut5 --num_train=0 --epochs=100 --teacher_epochs=200 --seeds=0,1,2,3,4,5,6,7,8,9 \
        --sweep=mobilenet_v2_cut9,mobilenet_v2_cut13,mobilenet_v2_cut17

Hernandez, Chang and Nordling (arXiv 2503.13008) blend a tenth of the training images with the teacher's integrated
gradients, computed once, and combine that with distillation and attention transfer. Their stored signals belonged to
other images than the index said, and their maps did not follow an image's crop and flip. So the arms are

* student, kd, ig, at, kd+ig, kd+at, ig+at, kd+ig+at: the factorial, with each signal where it belongs;
* NAME/misaligned: with the signal of another image, that stays where it is, as published; NAME/noise: with each map's
  (or answer's) own values in random places; both for kd, ig, at and the ig of kd+ig, the first for kd+crop;
* kd+match: the student's own map (gradient × input) is drawn to the teacher's, as a loss; kd+crop: of two crops the
  student sees the one that shows more of the map; kd+weight: pixels are saliency_dim where the teacher does not look.

The teacher's answers, maps and attention are columns of the data set, of the images as they are. Maps are computed with
as many nodes as each needs (--bound). Every arm of one seed starts from the same weights and sees the same order.

--sweep adds students of other sizes, to arms student, kd and kd+ig. --split=validation asks nothing of the test
split, for choosing settings, as experiments.sweep does; the defaults are the published ones. Beside accuracy stand the
rank correlation of each student's maps with the teacher's (map_correlation), and the areas under its own deletion and
insertion curves.

The workdir receives all checkpoints, columns, results.json, figure.png and report.html. The same command started again
continues where it was stopped. --jobs processes train side by side.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import common
from experiments.common import assessing, workers
from kdjax import attributions, checkpoints, data, losses, models, parallel, train
from kdjax.types import ApplyFn

DATASET = flags.DEFINE_string("dataset", "cifar10", "Any TFDS name, digits, a file.npz, or folder:PATH.")
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
NUM_TRAIN = flags.DEFINE_integer("num_train", 4000, "Training images that students see; 0 for all.", 0)
TEACHER_NUM_TRAIN = flags.DEFINE_integer("teacher_num_train", 0, "Likewise the teacher.", 0)
NUM_VALIDATION = flags.DEFINE_integer("num_validation", None, "Validation images; a tenth by default.")
TEACHER = flags.DEFINE_string("teacher", "resnet20", f"One of {', '.join(sorted(models.MODELS))}.")
TEACHER_DIR = flags.DEFINE_string(
    "teacher_dir", None, "A finished teacher of another run, such as RUN/teacher/0."
)
STUDENT = flags.DEFINE_string("student", "resnet8", "As --teacher.")
SWEEP = flags.DEFINE_list("sweep", [], "Further students, of other sizes.")
ARMS = flags.DEFINE_list("arms", [], "Some of those above; all by default.")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2", "3", "4"], "One student of each arm per seed.")
SPLIT = flags.DEFINE_enum("split", "test", ["test", "validation"], "The split that is reported.")

EPOCHS = flags.DEFINE_integer("epochs", 30, "Of a student; 100 as published.", lower_bound=1)
TEACHER_EPOCHS = flags.DEFINE_integer("teacher_epochs", 12, "Of the teacher.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images per step.", lower_bound=1)
LEARNING_RATE = flags.DEFINE_float("learning_rate", 1e-3, "Of Adam.", common.LEAST_RATE)
TEACHER_LEARNING_RATE = flags.DEFINE_float(
    "teacher_learning_rate", 0.05, "Of the teacher's SGD.", common.LEAST_RATE
)
SCHEDULE = flags.DEFINE_enum("schedule", "constant", list(common.SCHEDULES), "Of a student's learning rate.")
PADDING = flags.DEFINE_integer("padding", 4, "Pixels of the random crop.", lower_bound=0)
FLIP = flags.DEFINE_bool("flip", True, "Whether images are mirrored at random.")
TEMPERATURE = flags.DEFINE_float("temperature", 2.5, "Of the distillation.", lower_bound=1e-3)
SOFT_WEIGHT = flags.DEFINE_float(
    "soft_weight", 0.01, "Of its teacher; the labels have the rest of 1.", 0.0, 1.0
)
ATTENTION_WEIGHT = flags.DEFINE_float(
    "attention_weight", 0.8, "Of 2 - 2 cos of the maps, mean over stages.", 0.0
)
MATCH_WEIGHT = flags.DEFINE_float("match_weight", 0.8, "Likewise of the attribution maps.", 0.0)
PROBABILITY = flags.DEFINE_float("probability", 0.1, "Of an overlay.", 0.0, 1.0)
STRENGTH = flags.DEFINE_float("strength", 0.5, "Share of the map in an overlay.", 0.0, 1.0)
EXPONENT = flags.DEFINE_float("exponent", 2.0, "Largest of the exponents of a map; the least is 1.", 1.0)
BOUND = flags.DEFINE_float("bound", 0.05, "Of the relative completeness residual of a map.", 0.0)

WORKDIR = flags.DEFINE_string("workdir", None, "Where everything is written.", required=True)
SHARED_DIR = flags.DEFINE_string(
    "shared_dir", None, "Where runs share teachers and columns that are alike; the workdir if not given."
)
OUTPUT = flags.DEFINE_string("output", None, "Also write the results to this file.")
JOBS = flags.DEFINE_integer("jobs", 1, "Processes that train side by side.", lower_bound=1)
STEPS_PER_DISPATCH = flags.DEFINE_integer(
    "steps_per_dispatch", 32, "Most steps of one call to the device.", 1
)
SAVE_EVERY = flags.DEFINE_float("save_every_s", 60.0, "Least seconds between two checkpoints.", 0.0)
SMOKE = flags.DEFINE_bool(
    "smoke", False, "The same code in a minute or two: three seeds, two epochs, few images."
)

MACHINE = (
    "workdir",
    "shared_dir",
    "output",
    "data_dir",
    "jobs",
    "save_every_s",
    "arms",
    "sweep",
)  # may change on a resumed run
OF_TRAINED_TEACHERS = (
    "teacher",
    "teacher_epochs",
    "teacher_learning_rate",
)  # what --teacher_dir leaves undecided
EXPLAINED = 64  # images whose maps are compared and whose pixels are removed


class Arm(NamedTuple):
    """What a student is given; each signal is one of ``common.VARIANTS``, or absent."""

    kd: str = ""
    ig: str = ""
    at: str = ""
    use: str = "overlay"  # of ig: overlay, match, crop or weight


A = "aligned"
TABLE = {
    "student": Arm(),
    "kd": Arm(A),
    "ig": Arm("", A),
    "at": Arm("", "", A),
    "kd+ig": Arm(A, A),
    "kd+at": Arm(A, "", A),
    "ig+at": Arm("", A, A),
    "kd+ig+at": Arm(A, A, A),
    "kd/misaligned": Arm("misaligned"),
    "kd/noise": Arm("noise"),
    "ig/misaligned": Arm("", "misaligned"),
    "ig/noise": Arm("", "noise"),
    "at/misaligned": Arm("", "", "misaligned"),
    "at/noise": Arm("", "", "noise"),
    "kd+ig/misaligned": Arm(A, "misaligned"),
    "kd+ig/noise": Arm(A, "noise"),
    "kd+match": Arm(A, A, use="match"),
    "kd+crop": Arm(A, A, use="crop"),
    "kd+crop/misaligned": Arm(A, "misaligned", use="crop"),
    "kd+weight": Arm(A, A, use="weight"),
}
SWEPT = ("student", "kd", "kd+ig")  # the arms of the students of --sweep
PARTS = (  # what each says: signals alone, with distillation, and where they come from
    ("kd+ig", "kd"),
    ("kd+at", "kd"),
    ("kd+ig+at", "kd"),
    ("kd+match", "kd"),
    ("kd+crop", "kd"),
    ("kd+weight", "kd"),
    ("kd", "kd/misaligned"),
    ("ig", "ig/misaligned"),
    ("ig", "ig/noise"),
    ("at", "at/misaligned"),
    ("kd+ig", "kd+ig/misaligned"),
    ("kd+ig", "kd+ig/noise"),
    ("kd+crop", "kd+crop/misaligned"),
)
FACTORS = {
    "kd": (("student", "kd"), ("ig", "kd+ig"), ("at", "kd+at"), ("ig+at", "kd+ig+at")),
    "ig": (("student", "ig"), ("kd", "kd+ig"), ("at", "ig+at"), ("kd+at", "kd+ig+at")),
    "at": (("student", "at"), ("kd", "kd+at"), ("ig", "ig+at"), ("kd+ig", "kd+ig+at")),
}


def main() -> dict[str, Any] | None:
    """Checks the flags, then the teacher, its columns, all arms, report; returns the result."""
    start = time.monotonic()
    arms = wanted_arms()
    seeds()  # refused now, if at all
    wide = the_task(TEACHER_NUM_TRAIN.value)
    # One normalisation for both, so that a teacher's maps are of what the student sees.
    task = the_task(NUM_TRAIN.value)._replace(mean=wide.mean, std=wide.std)
    parallel.check_batch_size(BATCH_SIZE.value, task.devices)
    for student in (STUDENT.value, *SWEEP.value):
        common.build(student, task)
    study = Study(task, wide, Path(WORKDIR.value))
    study.check(arms)
    share = workers.my_task("experiments.ig_cifar10")
    if share is not None:
        workers.end_with_parent()
        train_all(study, arms, share)
        return None
    settings = common.settings_of(globals(), apart=MACHINE)
    if TEACHER_DIR.value:
        settings |= dict.fromkeys(OF_TRAINED_TEACHERS) | {"teacher": study.teacher.name}
    made_from = settings | {"data": task.fingerprint, "teacher_data": wide.fingerprint}
    if TEACHER_DIR.value:
        made_from |= {"teacher_weights": common.network_in(TEACHER_DIR.value)["weights"]}
    workdir = common.claim_workdir(WORKDIR.value, made_from)
    if JOBS.value > 1:
        study.explained()  # once, by all cores
        workers.in_children(
            "experiments.ig_cifar10", [{"first": k, "step": JOBS.value} for k in range(JOBS.value)]
        )
    runs = train_all(study, arms, {"first": 0, "step": 1})
    return report(study, runs, workdir, settings, start)


def the_task(num_train: int) -> common.Task:
    """The data set as the flags give it, with that many training images, 0 for all."""
    return common.make_task(
        DATASET.value,
        data_dir=DATA_DIR.value,
        image_size=IMAGE_SIZE.value,
        skip_broken=SKIP_BROKEN.value,
        clip=SMOKE.value,
        num_train=min(num_train or 128, 128) if SMOKE.value else num_train or None,
        num_validation=64 if SMOKE.value else NUM_VALIDATION.value,
    )


def wanted_arms() -> list[tuple[str, str]]:
    """Arms and their students, in the table's order; a ValueError for an arm that is not there."""
    common.check_arms(ARMS.value, list(TABLE))
    if len({STUDENT.value, *SWEEP.value}) <= len(SWEEP.value):
        raise ValueError(
            f"--sweep={','.join(SWEEP.value)} must name different networks, --student not among them."
        )
    if TEACHER_DIR.value:
        common.refuse_given(OF_TRAINED_TEACHERS, "--teacher_dir takes up a teacher that is trained already")
    own = [(name, STUDENT.value) for name in TABLE if not ARMS.value or name in ARMS.value]
    return own + [(name, student) for student in SWEEP.value for name in SWEPT]


def label_of(name: str, student: str) -> str:
    """What an arm is called in directories and tables."""
    return name if student == STUDENT.value else f"{name} ({student})"


def seeds() -> list[int]:
    """Those of the students."""
    return common.seeds_of(SEEDS.value)[: 3 if SMOKE.value else None]


def recipe() -> common.Recipe:
    """How a student is trained."""
    return common.Recipe(
        epochs=2 if SMOKE.value else EPOCHS.value,
        batch_size=BATCH_SIZE.value,
        learning_rate=LEARNING_RATE.value,
        schedule=SCHEDULE.value,
        padding=PADDING.value,
        flip=FLIP.value,
        evaluate_every=1 if SMOKE.value else min(EPOCHS.value, max(5, EPOCHS.value // 10)),
        steps_per_dispatch=STEPS_PER_DISPATCH.value,
        save_every_s=SAVE_EVERY.value,
    )


class Study:
    """The teacher, its columns and the trainers of a task, each made when it is first asked for."""

    def __init__(self, task: common.Task, wide: common.Task, workdir: Path):
        self.task, self.wide, self.workdir = task, wide, workdir

    @functools.cached_property
    def teacher(self) -> common.Teacher:
        """The one of --teacher_dir, or one trained here."""
        if TEACHER_DIR.value:
            return common.load_teacher(self.task, TEACHER_DIR.value, split=SPLIT.value)
        network = common.build(TEACHER.value, self.wide)
        own = recipe()._replace(
            epochs=2 if SMOKE.value else TEACHER_EPOCHS.value,
            learning_rate=TEACHER_LEARNING_RATE.value,
            optimizer="sgd",
            schedule="cosine",
            weight_decay=5e-4,
            evaluate_every=1,
        )
        trainer = common.make_trainer(self.wide, network, common.scratch, own, split=SPLIT.value)
        decides = {"teacher": TEACHER.value, "recipe": own._replace(save_every_s=0)}
        with common.shelf(SHARED_DIR.value, self.workdir / "teacher", self.wide, **decides) as home:
            return common.train_teacher(self.wide, TEACHER.value, network, trainer, 0, home / "0")

    def check(self, arms: Sequence[tuple[str, str]]) -> None:
        """Raises a ValueError for an arm that has nothing to be drawn to."""
        for name, student in arms:
            if TABLE[name].at and not self.stages(student):
                raise ValueError(
                    f"{name} draws a student's attention to its teacher's, and {student} has no stage of the size of "
                    f"one of {', '.join(self.maps)} of the teacher: choose another --student, or --arms without at."
                )

    @functools.cached_property
    def maps(self) -> dict[str, jax.Array]:
        """The teacher's maps after its stages."""
        module = self.teacher.module if TEACHER_DIR.value else common.build(TEACHER.value, self.wide)
        features = common.shown(module, self.task).features
        return {n: features[n] for n in sorted(features) if n.startswith("stage") and n != "stage0"}

    def stages(self, student: str) -> tuple[str, ...]:
        """Those that the student has too, at one size."""
        ours = common.shown(common.build(student, self.task), self.task).features
        return tuple(n for n, x in self.maps.items() if n in ours and ours[n].shape[1:3] == x.shape[1:3])

    @functools.cache  # noqa: B019, one study a process
    def explained(self) -> common.Explained:
        """Where the teacher looks in each training image."""
        asked: dict[str, Any] = {"stages": list(self.maps), "bound": BOUND.value}
        decides = {"weights": checkpoints.digest_tree(self.teacher.weights)}
        with common.shelf(SHARED_DIR.value, self.workdir / "maps", self.task, **decides, **asked) as home:
            return common.explained_by(self.task, self.teacher, directory=home, **asked)

    @functools.cache  # noqa: B019
    def answers(self) -> np.ndarray:
        """What the teacher says of each image."""
        asked: dict[str, Any] = {"mode": "centre", "views": 1}
        decides = {"weights": checkpoints.digest_tree(self.teacher.weights)}
        with common.shelf(SHARED_DIR.value, self.workdir / "columns", self.task, **decides, **asked) as home:
            taught = common.taught_by(self.task, self.teacher, recipe(), directory=home, **asked)
        return dict(taught.columns or {})["logits"]

    def train(self, name: str, student: str, seed: int) -> common.Trained:
        """One student of one arm."""
        label = label_of(name, student)
        directory = self.workdir / "students" / label / str(seed)
        settings = common.settings_of(globals(), apart=MACHINE)
        return self._trainer(name, student)(seed, directory, f"{label}, seed {seed}", settings)

    @functools.lru_cache(maxsize=1)  # noqa: B019, an arm's seeds follow each other, and its columns lie on the device
    def _trainer(self, name: str, student: str) -> Callable[..., common.Trained]:
        arm, stages = TABLE[name], self.stages(student)
        return common.make_trainer(
            self.task,
            common.build(student, self.task),
            objective(arm, stages),
            recipe(),
            self.taught(arm, stages),
            split=SPLIT.value,
            sees=with_pullback if arm.use == "match" else lambda apply_fn: apply_fn,
        )

    def taught(self, arm: Arm, stages: Sequence[str]) -> common.Taught:
        """The columns of an arm, aligned or not, and what is made of its map."""
        ids = self.task.split["train"]
        columns = {"logits": common.disturbed(self.answers(), ids, variant=arm.kd or A, seed=0)}
        moving = []
        for names, variant in ((["map"], arm.ig), ([f"attention_{stage}" for stage in stages], arm.at)):
            if variant:
                columns |= {
                    n: common.disturbed(self.explained().columns[n], ids, variant=variant, seed=1)
                    for n in names
                }
                moving += [f"teacher_{n}" for n in names] if variant == A else []
        overlaid = common.overlaid(
            probability=PROBABILITY.value, opacity=STRENGTH.value, exponents=(1.0, EXPONENT.value)
        )
        uses = {
            "overlay": {"blend": overlaid},
            "crop": {"choose": saliency_crop},
            "weight": {"blend": saliency_dim},
        }
        more = uses.get(arm.use, {}) if arm.ig else {}
        identity = {"weights": checkpoints.digest_tree(self.teacher.weights)}
        return common.Taught(columns, maps=tuple(moving), identity=identity, **more)


def saliency_dim(batch, keys):
    """The images, some of them darker where their maps are low: down to 1 - --strength of the pixel."""
    maps = batch["teacher_map"]
    light = losses.attribution_map(maps, scale="min_max").reshape(maps.shape)
    factor = 1 - STRENGTH.value + STRENGTH.value * light
    chosen = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, 5), PROBABILITY.value))(keys)
    pixels = batch["image"].astype(jnp.float32)
    return jnp.where(chosen[:, None, None, None], factor * pixels, pixels)


def saliency_crop(batch, keys, move):
    """Of two crops of each image, that which shows more of its map."""
    others = jax.vmap(lambda key: jax.random.fold_in(key, 6))(keys)
    maps = batch["teacher_map"].astype(jnp.float32)
    shown, more = (jnp.sum(move(maps, k), axis=(1, 2, 3)) for k in (keys, others))
    return jnp.where(more > shown, others, keys)


def with_pullback(apply_fn: ApplyFn) -> ApplyFn:
    """The student with one more feature in training: what pulls a cotangent of its logits back to its inputs."""

    def score(params, inputs, model_state, key, cotangent):
        return cotangent * apply_fn(params, model_state, inputs, train=True, key=key)[0].logits

    def apply(params, model_state, inputs, *, train, key=None):
        outputs, state = apply_fn(params, model_state, inputs, train=train, key=key)
        if not train:
            return outputs, state

        def pullback(cotangent):
            return attributions.trainable_input_gradients(score, params, inputs, model_state, key, cotangent)

        return outputs._replace(features={**outputs.features, "pullback": pullback}), state

    return apply


def objective(arm: Arm, stages: Sequence[str]) -> train.Objective:
    """The terms of an arm."""
    soft_weight = SOFT_WEIGHT.value if arm.kd else 0.0

    def terms(outputs, batch):
        found: dict[str, Any] = {"hard": (1 - soft_weight) * common.scratch(outputs, batch)["hard"]}
        if arm.kd:
            soft = losses.soft_target_kl(
                outputs.logits, batch["teacher_logits"], temperature=TEMPERATURE.value
            )
            found["soft"] = soft_weight * jnp.mean(soft)
        if arm.at:
            each = [
                unit_distance(
                    losses.attention_map(outputs.features[stage]), batch[f"teacher_attention_{stage}"]
                )
                for stage in stages
            ]
            found["attention"] = ATTENTION_WEIGHT.value * sum(each) / len(each)
        if arm.use == "match":
            score = jax.nn.one_hot(batch["label"], outputs.logits.shape[-1])
            slope = outputs.features["pullback"](score)
            own = losses.attribution_map(slope * batch["image"])
            found["match"] = MATCH_WEIGHT.value * unit_distance(own, batch["teacher_map"])
        return found

    return terms


def unit_distance(own, maps):
    """The squared distance of unit maps, 2 - 2 cos, mean over the batch; a moved map is brought to unit norm again."""
    theirs = losses.attribution_map(maps)
    return jnp.mean(own.shape[-1] * losses.map_distance(own, theirs))


def train_all(
    study: Study, arms: Sequence[tuple[str, str]], share: Mapping[str, int]
) -> dict[str, list[common.Trained]]:
    """Every ``step``-th arm from ``first`` on, with all its seeds."""
    return {
        label_of(name, student): [study.train(name, student, seed) for seed in seeds()]
        for name, student in arms[share["first"] :: share["step"]]
    }


def report(
    study: Study,
    runs: Mapping[str, list[common.Trained]],
    workdir: Path,
    settings: Mapping[str, Any],
    start: float,
) -> dict[str, Any]:
    """Everything that is known of the finished students, as the result."""
    task = study.task
    looks = saliency_metrics(study, runs)
    arms: dict[str, Any] = {"teacher": [study.teacher]} | {
        name: [
            run._replace(metrics=run.metrics | {key: values[i] for key, values in looks[name].items()})
            for i, run in enumerate(own)
        ]
        for name, own in runs.items()
    }
    explained = study.explained()
    notes = [
        f"Maps took {explained.nodes.mean():.1f} gradients each on average ({explained.nodes.min()} to "
        f"{explained.nodes.max()}); their relative completeness residual is {np.median(explained.residual):.3f} in "
        f"the median and {np.quantile(explained.residual, 0.9):.3f} at nine tenths of {len(explained.nodes)} images.",
        "Both networks' maps in map_correlation are integrated gradients to the true class, "
        f"of {min(EXPLAINED, len(task.split[SPLIT.value]))} images of the split that is reported.",
    ]
    if len(seeds()) >= 3:
        notes += [common.apart(a, b, arms) for a, b in PARTS if a in runs and b in runs]
        notes += [
            common.main_effect(factor, pairs, runs)
            for factor, pairs in FACTORS.items()
            if all(name in runs for pair in pairs for name in pair)
        ]
    return common.conclude(
        workdir,
        "ig_cifar10",
        task=task,
        question=f"Does a student of {DATASET.value} gain from seeing where its teacher looks?",
        arms=arms,
        arm_seeds={"teacher": [0]} | dict.fromkeys(runs, seeds()),
        baseline=next(iter(runs)),
        settings=settings,
        wall_clock_s=time.monotonic() - start,
        scaled_down=scaled_down(task),
        metrics=("accuracy", "best_accuracy", "agreement", "map_correlation", "deletion", "insertion"),
        notes=notes,
        tested=[name for name in runs if name in TABLE],
        drawn=("student", "kd", "ig", "kd+ig"),
        overlays=common.pictures(task, explained),
        output=OUTPUT.value,
        **({"costs": common.costs_of(task, arms)} if SPLIT.value == "test" else {}),
    )


def saliency_metrics(
    study: Study, runs: Mapping[str, Sequence[common.Trained]]
) -> dict[str, dict[str, list[float]]]:
    """How each student's maps agree with the teacher's, and how its score follows the pixels that they name."""
    task, teacher = study.task, study.teacher
    ids = task.split[SPLIT.value][:EXPLAINED]
    images, labels = (
        jnp.asarray(task.source.images[ids]),
        jnp.asarray(task.source.labels[ids].astype(np.int32)),
    )

    @functools.cache
    def explainer(module: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> Callable:
        apply_fn = models.apply_fn(module)

        @jax.jit
        def explain(weights: train.Weights, images, labels):
            def logits(x):
                return apply_fn(*weights, x, train=False)[0].logits

            def likely(x, labels):
                return jnp.take_along_axis(jax.nn.softmax(logits(x)), labels[:, None], axis=-1)[:, 0]

            x = data.normalise(images, mean=mean, std=std)
            found = attributions.adaptive_integrated_gradients(
                attributions.class_score(logits), x, targets=labels, tolerance=BOUND.value, max_nodes=64
            )
            maps = attributions.importance(found.values)
            areas = {
                kind: jnp.mean(
                    attributions.deletion_insertion(
                        likely, x, maps, jnp.zeros_like(x), kind=kind, targets=labels
                    )
                )
                for kind in ("deletion", "insertion")
            }
            return maps, areas

        return explain

    def explain(run: common.Trained | common.Teacher):
        mean, std = assessing.normalisation_of(task, run)
        return explainer(run.module, mean, std)(run.weights, images, labels)

    theirs, _ = explain(teacher)

    def measure(run: common.Trained) -> dict[str, float]:
        maps, areas = explain(run)
        alike = jnp.mean(attributions.rank_correlation(maps, theirs))
        return {"map_correlation": float(alike)} | {kind: float(area) for kind, area in areas.items()}

    return assessing.of_every_run(
        runs,
        study.workdir / "looks",
        (task.fingerprint, SPLIT.value, len(ids), BOUND.value, checkpoints.digest_tree(teacher.weights)),
        measure,
        label="where students look",
    )


def scaled_down(task: common.Task) -> str:
    """What is smaller than in the study."""
    own = recipe()
    where = f"teacher from {TEACHER_DIR.value}" if TEACHER_DIR.value else f"teacher {TEACHER.value}"
    return (
        f"{len(task.split['train'])} training images, where the study had 50,000; {own.epochs} epochs, where it had "
        f"100; {where}, student {STUDENT.value}, where they were MobileNetV2 and its first fourteen pieces"
    )


if __name__ == "__main__":
    common.launch(main)
