r"""Does a student gain from the saddles that its teachers passed? SPRKD, its parts and its rivals, on malaria cells.

    python -m experiments.sprkd_malaria --data_dir=data --workdir=runs/sprkd_malaria
    python -m experiments.sprkd_malaria --data_dir=data --workdir=runs/sprkd_patients --split_by=patient \
        --arms=scratch,kd_strong,published,sprkd,sprkd+kd
    python -m experiments.sprkd_malaria --dataset=digits --workdir=runs/sprkd_digits --num_train=300 \
        --teacher=digits_teacher --student=digits_student --epochs=60 --measure=validation

Every seed has weak teachers of its own, that are trained for --weak_epochs and leave scored snapshots, and a strong one
of --strong_teachers, trained for --strong_epochs. A region is made of either in the shapes of the student, which
approaches it, and descends on the labels alone. The arms:

* scratch; kd_weak and kd_strong, Hinton's distillation; response_kd, the divergence alone at T = 1, as published;
* published, published_3: SPRKD as Dewan (arXiv 2607.23346) describes it, from one and from three weak teachers;
* sprkd: as this library recommends it, by --which, --form and the flags of an escape; sprkd+kd, with kd_strong's loss;
* init_only, init_only+kd: the student starts at that region, without approach or escapes; no_region: escapes alone;
* no_eigenstep, no_perturbation: sprkd without one or the other;
* from_strong, from_saddle, from_last, from_random, from_average: sprkd with a region of the end of a strong teacher's
  training (weight selection, Xu et al., https://arxiv.org/abs/2311.18823, by norms), or of a weak teacher's snapshots:
  its strongest saddle by --rule, and what that has to be compared with; from_saddle_3, of three teachers.

A step is one gradient. Beside it stands what an arm has paid in all, in gradients: 1.5 for a Hessian-vector product and
a third for a loss, as in benchmarks/escape.json; a teacher's own training is not counted. --measure=validation asks
nothing of the test split, for choosing settings.

The workdir receives all checkpoints and snapshots, results.json, figure.png and report.html. The same command started
again continues where it was stopped. --jobs processes train side by side.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from experiments import common
from experiments.common import recruiting, workers
from kdjax import checkpoints, losses, models, parallel, robustness, saddles, train

DATASET = flags.DEFINE_string(
    "dataset", "malaria", "malaria, any TFDS name, digits, a file.npz, or folder:PATH of class folders."
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
SPLIT_BY = flags.DEFINE_enum(
    "split_by", "image", ["image", "patient"], "What never lies on both sides of a split; image as published."
)
NUM_TRAIN = flags.DEFINE_integer("num_train", 0, "Training images that students see; 0 for all.", 0)
TEACHER_NUM_TRAIN = flags.DEFINE_integer("teacher_num_train", 0, "Likewise teachers.", 0)
NUM_VALIDATION = flags.DEFINE_integer(
    "num_validation", None, "Validation images; a tenth of the training split."
)
TEACHER = flags.DEFINE_string("teacher", "malaria_teacher", f"One of {', '.join(sorted(models.MODELS))}.")
STUDENT = flags.DEFINE_string("student", "malaria_student", "Likewise, of the same depth.")
ARMS = flags.DEFINE_list("arms", [], "Some of those above, scratch among them; all by default.")
SEEDS = flags.DEFINE_integer("seeds", 10, "Students of each arm, from seed 0 on.", lower_bound=1)
MEASURE = flags.DEFINE_enum("measure", "test", ["test", "validation"], "The split that is reported.")

EPOCHS = flags.DEFINE_integer("epochs", 100, "Of a student.", lower_bound=1)
WEAK_EPOCHS = flags.DEFINE_integer("weak_epochs", 2, "Of the teachers whose saddles are sought.", 1)
STRONG_EPOCHS = flags.DEFINE_integer("strong_epochs", 50, "Of kd_strong's teachers.", 1)
STRONG_TEACHERS = flags.DEFINE_integer(
    "strong_teachers",
    10,
    "That students take turns with; with fewer than seeds, these are not independent.",
    1,
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images per step.", lower_bound=1)
LEARNING_RATE = flags.DEFINE_float("learning_rate", 1e-3, "Of Adam.", common.LEAST_RATE)
SCHEDULE = flags.DEFINE_enum("schedule", "constant", list(common.SCHEDULES), "Of a student's learning rate.")
TEMPERATURE = flags.DEFINE_float("temperature", 4.0, "Of Hinton's distillation.", lower_bound=1e-3)
HARD_WEIGHT = flags.DEFINE_float("hard_weight", 0.1, "Of the labels there.", lower_bound=0.0)
SOFT_WEIGHT = flags.DEFINE_float("soft_weight", 0.9, "Of the teacher there.", lower_bound=0.0)

WHICH = flags.DEFINE_enum(
    "which", "strong", ["strong", "saddle", "last", "random", "average"], "What sprkd's region is made of."
)
RULE = flags.DEFINE_enum("rule", "strong", list(recruiting.RULES), "What a strong saddle is to sprkd.")
FORM = flags.DEFINE_enum("form", "select", ["select", "crop"], "How sprkd cuts a teacher to size.")
PERIOD = flags.DEFINE_integer("period", 100, "Steps between two looks for an escape.", 1)
RADIUS = flags.DEFINE_float("radius", 0.3, "Longest escape, as a share of the norm of the parameters.", 0.0)
SIGMA = flags.DEFINE_float("sigma", 0.01, "Perturbation before a look, likewise.", 0.0)
STRENGTH = flags.DEFINE_float("strength", 0.1, "|λ_min| / λ_max of a saddle that is left.", 0.0)
BUDGET = flags.DEFINE_integer("budget", 20, "Most escapes of a run.", 0)

WORKDIR = flags.DEFINE_string("workdir", None, "Where everything is written.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "Also write the results to this file.")
JOBS = flags.DEFINE_integer("jobs", 1, "Processes that train side by side.", lower_bound=1)
STEPS_PER_DISPATCH = flags.DEFINE_integer(
    "steps_per_dispatch", 51, "Most steps of one call to the device.", 2
)
SAVE_EVERY = flags.DEFINE_float("save_every_s", 60.0, "Least seconds between two checkpoints.", 0.0)
SMOKE = flags.DEFINE_bool("smoke", False, "The same code in a minute: three seeds, two epochs, few images.")

MACHINE = (
    "workdir",
    "output",
    "data_dir",
    "jobs",
    "save_every_s",
    "arms",
)  # what a run may change that goes on
HVP, EVALUATION = 1.5, 1 / 3  # in gradients
TARGETS = {"malaria": (0.25, 0.20, 0.16), "digits": (0.8, 0.5, 0.3), "mnist": (0.5, 0.4, 0.3)}
NOISE = ("gaussian_noise",)
PARTS = (  # what each says: KD with it or alone, its region, saddles or not, its escapes, and both of their halves
    ("sprkd+kd", "kd_strong"),
    ("sprkd", "published"),
    ("from_saddle", "from_last"),
    ("from_saddle", "from_random"),
    ("from_saddle", "from_average"),
    ("from_saddle", "from_saddle_3"),
    ("sprkd", "init_only"),
    ("sprkd", "no_eigenstep"),
    ("sprkd", "no_perturbation"),
    ("no_region", "scratch"),
)
DENSITIES = ("scratch", "published", "sprkd")  # arms whose spectrum and surface are drawn


class Arm(NamedTuple):
    """What is done to a student; ``own`` is what the flags say of sprkd."""

    loss: str = "labels"  # labels, kd or response
    teacher: str = ""  # weak or strong, of the loss
    which: str = ""  # what the region is made of; none without
    rule: str = "own"
    form: str = "own"
    teachers: int = 1
    moves: str = "none"  # none, start (at the region), published, escapes or perturbations
    perturbation_radius: float | None = None


PUBLISHED = Arm(which="saddle", rule="extreme", form="crop", moves="published")
OWN = Arm(which="own", moves="escapes")
TABLE = {
    "scratch": Arm(),
    "response_kd": Arm("response", "weak"),
    "kd_weak": Arm("kd", "weak"),
    "kd_strong": Arm("kd", "strong"),
    "published": PUBLISHED,
    "published_3": PUBLISHED._replace(teachers=3),
    "sprkd": OWN,
    "sprkd+kd": OWN._replace(loss="kd", teacher="strong"),
    "init_only": OWN._replace(moves="start"),
    "init_only+kd": OWN._replace(moves="start", loss="kd", teacher="strong"),
    "no_region": Arm(moves="escapes"),
    "no_eigenstep": OWN._replace(moves="perturbations"),
    "no_perturbation": OWN._replace(perturbation_radius=0.0),
    "from_strong": OWN._replace(which="strong"),
    "from_saddle": OWN._replace(which="saddle"),
    "from_saddle_3": OWN._replace(which="saddle", teachers=3),
    "from_last": OWN._replace(which="last"),
    "from_random": OWN._replace(which="random"),
    "from_average": OWN._replace(which="average"),
}


def main() -> None:
    """Checks the flags, then weak and strong teachers, all arms, report."""
    start = time.monotonic()
    arms = wanted_arms()
    hinton()  # refused now, if at all
    wide = the_task(TEACHER_NUM_TRAIN.value)
    # One normalisation for both, so that a teacher's weights mean the same to a student.
    task = the_task(NUM_TRAIN.value)._replace(mean=wide.mean, std=wide.std)
    parallel.check_batch_size(BATCH_SIZE.value, task.devices)
    study = Study(task, wide, Path(WORKDIR.value))
    share = workers.my_task("experiments.sprkd_malaria")
    if share is not None:
        workers.end_with_parent()
        train_all(study, arms, share)
        return
    settings = common.settings_of(globals(), apart=MACHINE)
    made_from = settings | {"data": task.fingerprint, "teacher_data": wide.fingerprint}
    workdir = common.claim_workdir(WORKDIR.value, made_from)
    if JOBS.value > 1:
        shares = [{"first": k, "step": JOBS.value} for k in range(JOBS.value)]
        workers.in_children("experiments.sprkd_malaria", shares)
    runs = train_all(study, arms, {"first": 0, "step": 1})
    report(study, runs, workdir, settings, time.monotonic() - start)


def the_task(num_train: int) -> common.Task:
    """The data set as the flags give it, with that many training images, 0 for all."""
    return common.make_task(
        DATASET.value,
        data_dir=DATA_DIR.value,
        image_size=IMAGE_SIZE.value,
        skip_broken=SKIP_BROKEN.value,
        clip=SMOKE.value,
        num_train=min(num_train or 256, 256) if SMOKE.value else num_train or None,
        num_validation=NUM_VALIDATION.value,
        by_group=SPLIT_BY.value == "patient",
    )


def wanted_arms() -> list[str]:
    """The arms in the table's order; a ValueError for one that is not there."""
    same = f"from_{WHICH.value}"  # is sprkd itself
    common.check_arms(ARMS.value, list(TABLE), baseline="scratch")
    return [name for name in TABLE if (name in ARMS.value if ARMS.value else name != same)]


def seeds() -> range:
    """Those of the students."""
    return range(min(SEEDS.value, 3) if SMOKE.value else SEEDS.value)


def recipe(epochs: int, schedule: str = "constant") -> common.Recipe:
    """How students and teachers are trained."""
    return common.Recipe(
        epochs=min(epochs, 2) if SMOKE.value else epochs,
        batch_size=BATCH_SIZE.value,
        learning_rate=LEARNING_RATE.value,
        schedule=schedule,
        steps_per_dispatch=STEPS_PER_DISPATCH.value,
        save_every_s=SAVE_EVERY.value,
    )


class Study:
    """The teachers, regions and trainers of a task, each made when it is first asked for."""

    def __init__(self, task: common.Task, wide: common.Task, workdir: Path):
        self.task, self.wide, self.workdir = task, wide, workdir
        self.student = common.build(STUDENT.value, task)
        teacher = common.build(TEACHER.value, task)
        shape = task.source.images.shape[1:]
        self.shapes = models.init(self.student, shape, seed=0)[0]
        # Whether the student can take the teacher's place at all.
        saddles.select_weights(models.init(teacher, shape, seed=0)[0], self.shapes)
        self.escape = recruiting.Escape(PERIOD.value, RADIUS.value, SIGMA.value, STRENGTH.value, BUDGET.value)
        recruiting.with_escapes(None, self.escape)(optax.identity())  # refused now, if at all
        self.fallbacks: dict[str, set[int]] = {}  # arm → seeds whose teachers had no strong saddle
        self._trainers: dict[str, Callable[..., common.Trained]] = {}

    @functools.cached_property
    def _watch(self):
        weak = recipe(WEAK_EPOCHS.value)
        # Snapshots lie closer than dispatches need to.
        weak = weak._replace(steps_per_dispatch=min(51, STEPS_PER_DISPATCH.value))
        return recruiting.make_watcher(self.wide, TEACHER.value, weak, split=MEASURE.value)

    @functools.cache  # noqa: B019, one study a process
    def weak(self, seed: int, number: int) -> recruiting.Watched:
        """A weak teacher of a student's seed, with its snapshots."""
        directory = self.workdir / "weak" / f"{seed}.{number}"
        with common.alone(self.workdir / "weak" / f"{seed}.{number}.lock"):
            return self._watch(10 * seed + number, directory)

    @functools.cache  # noqa: B019
    def strong(self, number: int) -> common.Teacher:
        """One of the strong teachers."""
        network = common.build(TEACHER.value, self.wide)
        trainer = common.make_trainer(
            self.wide, network, common.scratch, recipe(STRONG_EPOCHS.value), split=MEASURE.value
        )
        directory = self.workdir / "strong" / str(number)
        with common.alone(self.workdir / "strong" / f"{number}.lock"):
            return common.train_teacher(self.wide, TEACHER.value, network, trainer, number, directory)

    @functools.cache  # noqa: B019
    def taught(self, teacher: str, seed: int) -> common.Taught:
        """What the teacher of a seed says of every image."""
        number = seed % STRONG_TEACHERS.value
        source, name = (
            (self.strong(number), f"strong{number}")
            if teacher == "strong"
            else (self.weak(seed, 0).teacher, f"weak{seed}")
        )
        directory = self.workdir / "columns" / name
        with common.alone(self.workdir / "columns" / f"{name}.lock"):
            return common.taught_by(self.task, source, recipe(1), mode="centre", views=1, directory=directory)

    @functools.cache  # noqa: B019
    def region(self, which: str, rule: str, form: str, teachers: int, seed: int) -> recruiting.Region:
        """The region that a student of this seed approaches."""
        if which == "strong":
            teacher = self.strong(seed % STRONG_TEACHERS.value)
            shape: Any = form
            params = saddles.select_weights(teacher.weights.params, self.shapes, form=shape)
            return recruiting.Region(params, [], strong=True)
        watched = [self.weak(seed, number) for number in range(teachers)]
        return recruiting.region_of(watched, self.shapes, which=which, rule=rule, form=form, seed=seed)

    def train(self, name: str, seed: int) -> common.Trained:
        """One student of one arm."""
        arm = TABLE[name]
        taught = self.taught(arm.teacher, seed) if arm.teacher else None
        if arm.which:
            wanted = own(arm.which, WHICH), own(arm.rule, RULE), own(arm.form, FORM)
            region = self.region(*wanted, arm.teachers, seed)
            if not region.strong:
                self.fallbacks.setdefault(name, set()).add(seed)
            params = region.params
        else:
            params = None
        if taught is not None or name not in self._trainers:  # what a teacher says belongs to one seed
            self._trainers[name] = self._trainer(arm, taught)
        self._region = params
        decides = common.settings_of(globals(), apart=MACHINE)
        if params is not None:
            decides["region"] = checkpoints.digest_tree(params)
        return self._trainers[name](seed, self.workdir / name / str(seed), f"{name}, seed {seed}", decides)

    def _trainer(self, arm: Arm, taught: common.Taught | None) -> Callable[..., common.Trained]:
        template = self.shapes if arm.which else None
        radius = arm.perturbation_radius
        escape = self.escape if radius is None else self.escape._replace(perturbation_radius=radius)
        wrap: Callable[..., Any] = lambda tx: tx  # noqa: E731
        if arm.moves == "published":
            wrap = recruiting.as_published(template)
        elif arm.moves == "escapes":
            wrap = recruiting.with_escapes(template, escape)
        elif arm.moves == "perturbations":
            wrap = recruiting.with_perturbations(template, escape)

        def begin(seed: int, state: train.TrainState) -> train.TrainState:
            if self._region is None:
                return state
            if arm.moves == "start":
                return state._replace(params=jax.tree.map(jnp.array, self._region))
            return recruiting.towards(self._region)(seed, state)

        return common.make_trainer(
            self.task,
            self.student,
            {"labels": common.scratch, "kd": hinton(), "response": response}[arm.loss],
            recipe(EPOCHS.value, SCHEDULE.value),
            taught,
            split=MEASURE.value,
            wrap=wrap,
            begin=begin,
            record=recruiting.spent,
            second=arm.moves == "escapes",
        )


def own(value: str, flag: flags.FlagHolder) -> str:
    """What the table says, or the flag where it says so."""
    return flag.value if value == "own" else value


def hinton() -> train.Objective:
    """Hinton's distillation, as the flags weigh it."""
    return common.kd(
        hard_weight=HARD_WEIGHT.value, soft_weight=SOFT_WEIGHT.value, temperature=TEMPERATURE.value
    )


def response(outputs, batch):
    """The divergence alone, at temperature 1: the published baseline, which can only copy its teacher."""
    return {"soft": jnp.mean(losses.soft_target_kl(outputs.logits, batch["teacher_logits"], temperature=1.0))}


def train_all(study: Study, arms: Sequence[str], share: Mapping[str, int]) -> dict[str, list[common.Trained]]:
    """Every ``step``-th seed of all arms from ``first`` on."""
    runs: dict[str, list[common.Trained]] = {name: [] for name in arms}
    per_epoch = max(len(study.task.split["train"]) // BATCH_SIZE.value, 1)
    for seed in seeds()[share["first"] :: share["step"]]:
        for name in arms:
            runs[name].append(measured(study.train(name, seed), per_epoch))
    return runs


def measured(run: common.Trained, per_epoch: int) -> common.Trained:
    """A run with what it cost, and when its validation loss came below each target."""
    metrics = dict(run.metrics)
    for name in ("events", "hvps", "evaluations"):
        metrics[name] = round(per_epoch * sum(record[name] for record in run.history))
    paid = np.cumsum([per_epoch * (1 + HVP * r["hvps"] + EVALUATION * r["evaluations"]) for r in run.history])
    metrics["gradient_equivalents"] = float(paid[-1])
    for target in TARGETS.get(DATASET.value, (0.5, 0.3)):
        reached = [i for i, record in enumerate(run.history) if record["validation_loss"] <= target]
        at = reached[0] if reached else len(run.history) - 1
        metrics[f"reached_{target:g}"] = float(bool(reached))
        metrics[f"steps_to_{target:g}"] = float(per_epoch * (at + 1))
        metrics[f"paid_to_{target:g}"] = float(paid[at])
    return run._replace(metrics=metrics)


def report(
    study: Study,
    runs: Mapping[str, Sequence[common.Trained]],
    workdir: Path,
    settings: Mapping[str, Any],
    seconds: float,
) -> None:
    """Everything that is known of the finished students."""
    task, numbers = study.task, list(seeds())
    weak = [study.weak(seed, 0).teacher for seed in numbers]
    used = {part for name in runs for part in (TABLE[name].teacher, own(TABLE[name].which, WHICH))}
    count = min(STRONG_TEACHERS.value, len(numbers)) if "strong" in used else 0
    strong = [study.strong(k) for k in range(count)]
    teachers = {"weak_teacher": weak} | ({"strong_teacher": strong} if strong else {})
    arms: dict[str, Any] = {**runs, **teachers}
    notes = [
        "steps_to and paid_to (in gradients) tell when the validation loss, measured after each epoch, first came "
        "below a target; where it never did, they stand at the end of the run, and reached is 0.",
        *(
            f"{name}: no strong saddle by its rule among the snapshots of a teacher of {len(which)} of {len(numbers)} "
            "seeds; the snapshot of strongest negative curvature stood in."
            for name, which in study.fallbacks.items()
        ),
    ]
    if len(numbers) >= 3:
        notes += [common.apart(a, b, runs) for a, b in PARTS if a in runs and b in runs]
        notes.append(common.equal(runs, baseline="scratch"))
    notes.append(common.disagreements(task, runs, baseline="scratch", split=MEASURE.value))
    drawn = {name: runs[name] for name in DENSITIES if name in runs}
    common.conclude(
        workdir,
        "sprkd" if DATASET.value != "malaria" else "sprkd_malaria",
        task=task,
        question=f"Does a student of {DATASET.value} gain from the saddles that its teachers passed?",
        arms=arms,
        arm_seeds=dict.fromkeys((*runs, "weak_teacher"), numbers)
        | ({"strong_teacher": range(len(strong))} if strong else {}),
        baseline="scratch",
        settings=settings,
        wall_clock_s=seconds,
        flatness=common.flatness_of(task, runs, workdir / "flatness", num_images=256),
        densities=common.densities_of(task, drawn, workdir / "densities"),
        surfaces=common.surfaces_of(task, drawn, workdir / "surfaces"),
        scaled_down=scaled_down(task),
        metrics=("accuracy", "loss", "events", "hvps", "gradient_equivalents"),
        notes=notes,
        drawn=(*DENSITIES, "kd_strong", "sprkd+kd"),
        # What is recommended comes first, since that is what a reader is told first.
        tested=sorted((name for name in runs if name != "scratch"), key=lambda name: name != "sprkd+kd"),
        robustness=common.robustness_of(
            task,
            arms,
            workdir / "robustness",
            split=MEASURE.value,
            corruptions={name: robustness.CORRUPTIONS[name] for name in NOISE},
            severities=(1, 3, 5),
            weight_noise=(0.1,),
            draws=3,
            epsilons=(),
        ),
        costs=common.costs_of(task, arms),
        output=OUTPUT.value,
    )


def scaled_down(task: common.Task) -> str:
    """What is smaller than in the study."""
    own = (
        f"{len(task.split['train'])} training images"
        + (", where the study had 20,668" if DATASET.value == "malaria" else "")
        + f"; {recipe(EPOCHS.value).epochs} epochs, where it had 500"
    )
    return own + f"; strong teachers of {recipe(STRONG_EPOCHS.value).epochs} epochs, likewise"


if __name__ == "__main__":
    common.launch(main)
