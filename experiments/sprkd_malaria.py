r"""Does a student gain from the saddles that its teachers passed? SPRKD, its ablation and its rivals, on malaria cells.

    python -m experiments.sprkd_malaria --data_dir=data --workdir=runs/sprkd_malaria
    python -m experiments.sprkd_malaria --data_dir=data --workdir=runs/sprkd_patients --split_by=group \
        --arms=scratch,kd_strong,sprkd_paper,sprkd,sprkd+kd
    python -m experiments.sprkd_malaria --dataset=digits --workdir=runs/sprkd_digits --num_train=300 \
        --teacher=digits_teacher --student=digits_student --epochs=60 --split=validation

Every seed has weak teachers of its own, trained for --weak_epochs, whose scored snapshots are kept, and one of
--strong_teachers, trained for --strong_epochs. A region in the shapes of the student is made of either. The arms:

* scratch; kd_weak and kd_strong, Hinton's distillation; response_kd, the divergence alone at T = 1, as published;
* sprkd_paper, sprkd_paper_3: SPRKD as Dewan (arXiv 2607.23346) describes it, from one and from three weak teachers;
* sprkd: as this library recommends it, by --region_from, --resize and the flags of an escape; sprkd+kd, with the loss
  of kd_strong;
* init_only, init_only+kd: the student starts at that region, without approach or escapes; no_region: escapes alone;
* no_eigenstep, no_perturbation: sprkd without one or the other;
* init_strong, init_saddle, init_last, init_random, init_average: sprkd with a region of a strong teacher's final weights
  (weight selection, Xu et al., https://arxiv.org/abs/2311.18823, by norms), or of a weak teacher's snapshots: its
  strongest saddle by --saddle_rule, and the controls; init_saddle_3, of three teachers.

A step is one gradient. gradient_equivalents is what an arm cost in all: 1.5 gradients for a Hessian-vector product and a
third for a loss (benchmarks/escape.json); the training of teachers is not counted.

The workdir receives all checkpoints and snapshots, results.json, figure.png and report.html. The same command started
again continues where it was stopped. --jobs processes train side by side.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from experiments import cli
from kdjax import checkpoints, data, methods, parallel, recruit, robustness, run, saddles, study
from kdjax import teacher as teachers
from kdjax.callbacks import Callback, ProgressBar
from kdjax.methods import Method
from kdjax.recipe import Machine, Recipe
from kdjax.types import Params

DATA = cli.define(cli.Data(dataset="malaria", split_by="example"))
TEACHER_NUM_TRAIN = flags.DEFINE_integer("teacher_num_train", 0, "Training images of teachers; 0 for all.", 0)
TEACHER = flags.DEFINE_string("teacher", "malaria_teacher", "A network without normalisation layers.")
STUDENT = flags.DEFINE_string("student", "malaria_student", "Likewise, of the same depth.")
RECIPE = cli.define(Recipe(epochs=100), only=("epochs", "batch_size", "learning_rate", "schedule"))
WEAK_EPOCHS = flags.DEFINE_integer("weak_epochs", 2, "Of teachers that keep snapshots.", 1)
STRONG_EPOCHS = flags.DEFINE_integer("strong_epochs", 50, "Of the teachers of kd_strong.", 1)
STRONG_TEACHERS = flags.DEFINE_integer(
    "strong_teachers",
    10,
    "Students take turns among them; with fewer than seeds these are not independent.",
    1,
)
TEMPERATURE = flags.DEFINE_float("temperature", 4.0, "Of Hinton's distillation.", lower_bound=1e-3)
HARD_WEIGHT = flags.DEFINE_float("hard_weight", 0.1, "Weight of the labels there.", lower_bound=0.0)
SOFT_WEIGHT = flags.DEFINE_float("soft_weight", 0.9, "Weight of the teacher there.", lower_bound=0.0)
REGION_FROM = flags.DEFINE_enum(
    "region_from",
    "strong",
    ["strong", "saddle", "last", "random", "average"],
    "What sprkd's region is made of.",
)
SADDLE_RULE = flags.DEFINE_enum("saddle_rule", "strong", list(recruit.RULES), "A strong saddle, to sprkd.")
RESIZE = flags.DEFINE_enum("resize", "select", ["select", "crop"], "How sprkd cuts a teacher to size.")
PERIOD = flags.DEFINE_integer("period", 100, "Steps between two searches for an escape.", 1)
ESCAPE_RADIUS = flags.DEFINE_float("escape_radius", 0.3, "Longest escape, relative to the parameters.", 0.0)
PERTURBATION_RADIUS = flags.DEFINE_float("perturbation_radius", 0.01, "Perturbation before a search.", 0.0)
NEGATIVE_CURVATURE_RATIO = flags.DEFINE_float(
    "negative_curvature_ratio", 0.1, "|λ_min| / λ_max of a saddle that is left.", 0.0
)
BUDGET = flags.DEFINE_integer("budget", 20, "Most escapes of a run.", 0)
SEEDS = cli.define_seeds("0,1,2,3,4,5,6,7,8,9")
LAUNCH = cli.define(cli.Launch(), only=("workdir", "output", "split", "jobs", "smoke"))
MACHINE = cli.define(Machine(steps_per_dispatch=51), omit=("devices",))

HVP, EVALUATION = 1.5, 1 / 3  # in gradients
TARGETS = {"malaria": (0.25, 0.20, 0.16), "digits": (0.8, 0.5, 0.3), "mnist": (0.5, 0.4, 0.3)}
COMPARED = (  # KD with sprkd or alone, its region, saddles or not, its escapes, and both of their halves
    ("sprkd+kd", "kd_strong"),
    ("sprkd", "sprkd_paper"),
    ("init_saddle", "init_last"),
    ("init_saddle", "init_random"),
    ("init_saddle", "init_average"),
    ("init_saddle", "init_saddle_3"),
    ("sprkd", "init_only"),
    ("sprkd", "no_eigenstep"),
    ("sprkd", "no_perturbation"),
    ("no_region", "scratch"),
)
DRAWN = ("scratch", "sprkd_paper", "sprkd")  # arms whose spectrum and surface are drawn


# The arms: what a student minimises, given the shapes of its region.


def scratch(region: Params) -> Method:
    """The labels alone."""
    return methods.labels()


def response_kd(region: Params) -> Method:
    """The divergence alone at T = 1: the published baseline, which can only copy its teacher."""
    return methods.kd(1.0, hard_weight=0.0, soft_weight=1.0)


def kd(region: Params) -> Method:
    """Hinton's distillation, as the flags weigh it."""
    return methods.kd(TEMPERATURE.value, hard_weight=HARD_WEIGHT.value, soft_weight=SOFT_WEIGHT.value)


def paper(region: Params) -> Method:
    """SPRKD as published."""
    return methods.labels() + methods.sprkd_paper(region)


def escapes(region: Params | None, **changes: float) -> Method:
    """SPRKD's optimizer as the flags set it."""
    options = {
        "period": PERIOD.value,
        "escape_radius": ESCAPE_RADIUS.value,
        "perturbation_radius": PERTURBATION_RADIUS.value,
        "negative_curvature_ratio": NEGATIVE_CURVATURE_RATIO.value,
        "budget": BUDGET.value,
    }
    return methods.sprkd(region, **options | changes)


def sprkd(region: Params) -> Method:
    """SPRKD as recommended, on the labels."""
    return methods.labels() + escapes(region)


def sprkd_kd(region: Params) -> Method:
    """SPRKD as recommended, with Hinton's distillation."""
    return kd(region) + escapes(region)


def no_region(region: Params) -> Method:
    """Escapes without a region."""
    return methods.labels() + escapes(None)


def no_eigenstep(region: Params) -> Method:
    """Perturbations in place of escapes."""
    noise = {"period": PERIOD.value, "radius": PERTURBATION_RADIUS.value}
    return methods.labels() + methods.perturbations(region, **noise)


def no_perturbation(region: Params) -> Method:
    """Escapes without a perturbation before them."""
    return methods.labels() + escapes(region, perturbation_radius=0.0)


class Arm(NamedTuple):
    """One arm: its method, whose answers it is given, and the region it starts from; None is what the flags say."""

    method: Callable[[Params], Method]
    answers: str = ""  # of its weak or strong teacher
    region: str | None = ""  # what it is made of; "" for none
    rule: str | None = None
    resize: str | None = None
    teachers: int = 1
    starts_there: bool = False  # instead of approaching it


ARMS = {
    "scratch": Arm(scratch),
    "response_kd": Arm(response_kd, "weak"),
    "kd_weak": Arm(kd, "weak"),
    "kd_strong": Arm(kd, "strong"),
    "sprkd_paper": Arm(paper, region="saddle", rule="extreme", resize="crop"),
    "sprkd_paper_3": Arm(paper, region="saddle", rule="extreme", resize="crop", teachers=3),
    "sprkd": Arm(sprkd, region=None),
    "sprkd+kd": Arm(sprkd_kd, "strong", region=None),
    "init_only": Arm(scratch, region=None, starts_there=True),
    "init_only+kd": Arm(kd, "strong", region=None, starts_there=True),
    "no_region": Arm(no_region),
    "no_eigenstep": Arm(no_eigenstep, region=None),
    "no_perturbation": Arm(no_perturbation, region=None),
    "init_strong": Arm(sprkd, region="strong"),
    "init_saddle": Arm(sprkd, region="saddle"),
    "init_saddle_3": Arm(sprkd, region="saddle", teachers=3),
    "init_last": Arm(sprkd, region="last"),
    "init_random": Arm(sprkd, region="random"),
    "init_average": Arm(sprkd, region="average"),
}
ARM_NAMES = cli.define_arms(list(ARMS), baseline="scratch")


class Teachers(NamedTuple):
    """What the teachers of a seed provide, computed or read back when it is first asked for."""

    weak: Callable[[int, int], recruit.SnapshotTeacher]  # (seed, number)
    strong: Callable[[int], run.Trained]  # (number)
    answers: Callable[[str, int], teachers.TeacherSignal]  # (weak or strong, seed)
    region: Callable[..., recruit.Region]  # (region, rule, resize, teachers, seed)


def main(callbacks: Sequence[Callback] = ()) -> dict[str, Any] | None:
    """Checks the flags, then weak and strong teachers, all arms, report."""
    start, launch, names = time.monotonic(), LAUNCH.value, arms_to_run()
    wide, dataset = load(TEACHER_NUM_TRAIN.value), load(DATA.value.num_train)
    # One normalisation for both, so that a teacher's weights mean the same to a student.
    dataset = dataset._replace(normalisation=wide.normalisation)
    parallel.check_batch_size(RECIPE.value.batch_size, parallel.local_devices())
    student, teacher = (cli.network(name, dataset) for name in (STUDENT.value, TEACHER.value))
    shapes = student.init(0)[0]
    saddles.select_weights(
        teacher.init(0)[0], shapes
    )  # raises unless the student can take the teacher's place
    for name in names:
        ARMS[name].method(shapes)
    settings, share = cli.settings(__name__), cli.my_task("experiments.sprkd_malaria")
    made_from = settings | {"data": dataset.fingerprint, "teacher_data": wide.fingerprint}
    workdir = Path(launch.workdir) if share else cli.claim_workdir(launch.workdir, made_from)
    source = make_teachers(dataset, wide, workdir, shapes, callbacks)
    if not share and launch.jobs > 1:
        tasks = [{"first": k, "step": launch.jobs} for k in range(launch.jobs)]
        cli.in_children("experiments.sprkd_malaria", tasks)
    runs: dict[str, list[run.Trained]] = {name: [] for name in names}
    fallbacks: dict[str, int] = dict.fromkeys(names, 0)
    trainers: dict[str, Callable[..., run.Trained]] = {}
    for seed in seeds()[share["first"] :: share["step"]] if share else seeds():
        for name in names:
            arm, more = ARMS[name], {"settings": settings, "callbacks": [ProgressBar(), *callbacks]}
            if arm.region != "":
                region = source.region(arm.region, arm.rule, arm.resize, arm.teachers, seed)
                fallbacks[name] += not region.strong
                begin = methods.start_at if arm.starts_there else methods.towards
                more |= {"init": begin(region.params)}
                more["settings"] = settings | {"region": checkpoints.digest_tree(region.params)}
            if arm.answers or name not in trainers:  # the answers belong to one seed
                signal = source.answers(arm.answers, seed) if arm.answers else None
                method = arm.method(shapes) + methods.Method(record=methods.cost)
                options: dict[str, Any] = {"machine": MACHINE.value, "split": launch.split}
                recipe = smoke(RECIPE.value)
                trainers[name] = run.make_trainer(student, method, dataset, recipe, teacher=signal, **options)
            trained = trainers[name](seed, workdir / name / str(seed), arm=name, **more)
            runs[name].append(with_costs(trained, len(dataset.splits["train"])))
    if share:
        return None
    return report(workdir, dataset, runs, source, fallbacks, settings, time.monotonic() - start)


def make_teachers(
    dataset: data.Dataset, wide: data.Dataset, workdir: Path, shapes: Params, callbacks: Sequence[Callback]
) -> Teachers:
    """The teachers of every seed; processes that train side by side wait for each other."""
    network, split, watch = cli.network(TEACHER.value, wide), LAUNCH.value.split, [ProgressBar(), *callbacks]
    options: dict[str, Any] = {"split": split, "machine": MACHINE.value}
    recipes = [
        smoke(dataclasses.replace(RECIPE.value, schedule="constant", epochs=n))
        for n in (WEAK_EPOCHS.value, STRONG_EPOCHS.value)
    ]

    @functools.cache
    def weak_trainer() -> Callable[..., recruit.SnapshotTeacher]:
        # Snapshots lie closer than dispatches need to.
        steps = min(51, MACHINE.value.steps_per_dispatch)
        machine = dataclasses.replace(MACHINE.value, steps_per_dispatch=steps)
        return recruit.make_trainer(network, wide, recipes[0], split=split, machine=machine)

    @functools.cache
    def weak(seed: int, number: int) -> recruit.SnapshotTeacher:
        home = workdir / "weak" / f"{seed}.{number}"
        with cli.file_lock(home.with_name(f"{home.name}.lock")):
            return weak_trainer()(10 * seed + number, home, watch)

    @functools.cache
    def strong_trainer() -> Callable[..., run.Trained]:
        return run.make_trainer(network, methods.labels(), wide, recipes[1], **options)

    @functools.cache
    def strong(number: int) -> run.Trained:
        with cli.file_lock(workdir / "strong" / f"{number}.lock"):
            return strong_trainer()(
                number, workdir / "strong" / str(number), arm="strong_teacher", callbacks=watch
            )

    @functools.cache
    def answers(which: str, seed: int) -> teachers.TeacherSignal:
        number = seed % STRONG_TEACHERS.value if which == "strong" else seed
        teacher = strong(number) if which == "strong" else weak(seed, 0).trained
        home = workdir / "teacher_answers" / f"{which}{number}"
        with cli.file_lock(home.with_name(f"{home.name}.lock")):
            return teachers.answers(teacher, dataset, directory=home)

    @functools.cache
    def region(
        which: str | None, rule: str | None, resize: str | None, count: int, seed: int
    ) -> recruit.Region:
        which, rule, form = which or REGION_FROM.value, rule or SADDLE_RULE.value, resize or RESIZE.value
        if which == "strong":
            params = strong(seed % STRONG_TEACHERS.value).weights.params
            return recruit.Region(saddles.select_weights(params, shapes, form=form), [], strong=True)
        own = [weak(seed, number) for number in range(count)]
        return recruit.region_of(own, shapes, which=which, rule=rule, resize=form, seed=seed)

    return Teachers(weak, strong, answers, region)


def with_costs(trained: run.Trained, num_train: int) -> run.Trained:
    """A run with what it cost, and when its validation loss came below each target."""
    metrics, per_epoch = dict(trained.metrics), max(num_train // RECIPE.value.batch_size, 1)
    for name in ("events", "hvps", "evaluations"):
        metrics[name] = round(per_epoch * sum(record[name] for record in trained.history))
    paid = np.cumsum(
        [per_epoch * (1 + HVP * r["hvps"] + EVALUATION * r["evaluations"]) for r in trained.history]
    )
    metrics["gradient_equivalents"] = float(paid[-1])
    for target in TARGETS.get(DATA.value.dataset, (0.5, 0.3)):
        reached = [i for i, record in enumerate(trained.history) if record["validation_loss"] <= target]
        at = reached[0] if reached else len(trained.history) - 1
        metrics[f"reached_{target:g}"] = float(bool(reached))
        metrics[f"steps_to_{target:g}"] = float(per_epoch * (at + 1))
        metrics[f"paid_to_{target:g}"] = float(paid[at])
    return trained._replace(metrics=metrics)


def report(
    workdir: Path,
    dataset: data.Dataset,
    runs: Mapping[str, Sequence[run.Trained]],
    source: Teachers,
    fallbacks: Mapping[str, int],
    settings: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """Everything that is measured of the finished students, and the result."""
    split, name = LAUNCH.value.split, DATA.value.dataset
    used = {part for arm in runs for part in (ARMS[arm].answers, ARMS[arm].region or REGION_FROM.value)}
    count = min(STRONG_TEACHERS.value, len(seeds())) if "strong" in used else 0
    every: dict[str, Sequence[run.Trained]] = {
        **runs,
        # A teacher is reported under the seed of the student that it teaches.
        "weak_teacher": [source.weak(s, 0).trained._replace(seed=s) for s in seeds()],
        **({"strong_teacher": [source.strong(k) for k in range(count)]} if count else {}),
    }
    notes = [
        "steps_to and paid_to (in gradients) tell when the validation loss, measured after each epoch, first came "
        "below a target; where it never did, they are those of the whole run, and reached is 0.",
        *(
            f"{arm}: no strong saddle by its rule among the snapshots of a teacher of {n} of {len(seeds())} seeds; the "
            "snapshot of strongest negative curvature stood in."
            for arm, n in fallbacks.items()
            if n
        ),
    ]
    if len(seeds()) >= 3:
        notes += [study.welch_note(a, b, runs) for a, b in COMPARED if a in runs and b in runs]
        notes.append(study.tost_note(runs, baseline="scratch"))
    notes.append(study.mcnemar_note(dataset, runs, baseline="scratch", split=split))
    drawn = {arm: runs[arm] for arm in DRAWN if arm in runs}
    noise = {
        "corruptions": {"gaussian_noise": robustness.CORRUPTIONS["gaussian_noise"]},
        "severities": (1, 3, 5),
    }
    about = study.Study(
        "sprkd_malaria" if name == "malaria" else "sprkd",
        f"Does a student of {name} gain from the saddles that its teachers passed?",
        baseline="scratch",
        metrics=("accuracy", "loss", "events", "hvps", "gradient_equivalents"),
        scaled_down=f"{len(dataset.splits['train'])} training images"
        + (", where the study had 20,668" if name == "malaria" else "")
        + f"; {smoke(RECIPE.value).epochs} epochs, where it had 500; strong teachers of "
        f"{min(STRONG_EPOCHS.value, 2) if LAUNCH.value.smoke else STRONG_EPOCHS.value} epochs, likewise",
        # What is recommended comes first, since that is what a reader is told first.
        tested=sorted((arm for arm in runs if arm != "scratch"), key=lambda arm: arm != "sprkd+kd"),
        drawn=(*DRAWN, "kd_strong", "sprkd+kd"),
    )
    return study.conclude(
        *(about, workdir, dataset, every),
        settings=settings,
        seconds=seconds,
        notes=notes,
        output=LAUNCH.value.output,
        flatness=study.flatness_of(dataset, runs, workdir / "flatness", num_images=256),
        densities=study.densities_of(dataset, drawn, workdir / "densities"),
        surfaces=study.surfaces_of(dataset, drawn, workdir / "surfaces"),
        robustness=study.robustness_of(
            *(dataset, every, workdir / "robustness"),
            split=split,
            weight_noise=(0.1,),
            draws=3,
            epsilons=(),
            **noise,
        ),
        costs=study.costs_of(every),
    )


def load(num_train: int) -> data.Dataset:
    """The data set with that many training images, 0 for all."""
    return DATA.value.load(num_train=num_train, at_most=256 if LAUNCH.value.smoke else None)


def arms_to_run() -> list[str]:
    """The arms in the table's order; by default all but the one that is sprkd itself."""
    wanted = ARM_NAMES.value
    same = f"init_{REGION_FROM.value}"
    return [name for name in wanted if flags.FLAGS["arms"].value or name != same]


def seeds() -> list[int]:
    """Seeds of the students."""
    return SEEDS.value[: 3 if LAUNCH.value.smoke else None]


def smoke(recipe: Recipe) -> Recipe:
    """The recipe, with two epochs at most in a smoke run."""
    return dataclasses.replace(recipe, epochs=min(recipe.epochs, 2)) if LAUNCH.value.smoke else recipe


if __name__ == "__main__":
    cli.launch(main)
