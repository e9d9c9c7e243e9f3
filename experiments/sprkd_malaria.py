r"""Does a student gain from the saddles that its teachers passed? SPRKD and its ablation, on malaria cells.

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
* init_strong, init_saddle, init_last, init_random, init_average: sprkd with a region of a strong teacher's final
  weights (weight selection, Xu et al., https://arxiv.org/abs/2311.18823, by norms), or of a weak teacher's snapshots:
  its strongest saddle by --saddle_rule, and the controls; init_saddle_3, of three teachers.

A step is one gradient. gradient_equivalents is what an arm cost in all: 1.5 gradients for a Hessian-vector product and
a third for a loss (benchmarks/escape.json); the training of teachers is not counted.

The workdir receives all checkpoints and snapshots, results.json, figure.png and report.html. The same command started
again continues where it was stopped. --jobs processes train side by side.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from experiments import cli
from kdjax import checkpoints, data, methods, parallel, recruit, robustness, run, saddles, study
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
KD = cli.define(methods.KdOptions())
REGION_FROM = flags.DEFINE_enum(
    "region_from",
    "strong",
    ["strong", "saddle", "last", "random", "average"],
    "What sprkd's region is made of.",
)
SADDLE_RULE = flags.DEFINE_enum("saddle_rule", "strong", list(recruit.RULES), "A strong saddle, to sprkd.")
RESIZE = flags.DEFINE_enum("resize", "select", ["select", "crop"], "How sprkd cuts a teacher to size.")
ESCAPE = cli.define(methods.EscapeOptions())
SEEDS = cli.define_seeds("0,1,2,3,4,5,6,7,8,9")
LAUNCH = cli.define(cli.Launch(), only=("workdir", "output", "split", "jobs", "smoke"))
MACHINE = cli.define(Machine(steps_per_dispatch=51), omit=("devices",))

TARGETS = {"malaria": (0.25, 0.20, 0.16), "digits": (0.8, 0.5, 0.3), "mnist": (0.5, 0.4, 0.3)}  # of the loss
COMPARED = (  # KD with sprkd or alone, its region, saddles or not, its escapes, and both of their halves
    ("sprkd+kd", "kd_strong"),
    ("sprkd", "sprkd_paper"),
    *(("init_saddle", f"init_{other}") for other in ("last", "random", "average", "saddle_3")),
    *(("sprkd", other) for other in ("init_only", "no_eigenstep", "no_perturbation")),
    ("no_region", "scratch"),
)
DRAWN = ("scratch", "sprkd_paper", "sprkd")  # arms whose spectrum and surface are drawn


class Arm(NamedTuple):
    """One arm: a method of its region's shapes, whose answers it is given, and its region; None as the flags say."""

    method: Callable[[Params], Method]
    answers: str = ""  # of its weak or strong teacher
    region: str | None = ""  # what it is made of; "" for none
    rule: str | None = None
    resize: str | None = None
    teachers: int = 1
    starts_there: bool = False  # instead of approaching it


def kd() -> Method:
    """Hinton's distillation, as the flags weigh it."""
    return methods.kd(**vars(KD.value))


def escapes(region: Params | None, **changes: float) -> Method:
    """SPRKD's optimizer, as the flags set it."""
    return methods.sprkd(region, **vars(ESCAPE.value) | changes)


def sprkd(region: Params) -> Method:
    """SPRKD as recommended, on the labels."""
    return methods.labels() + escapes(region)


def no_eigenstep(region: Params) -> Method:
    """Perturbations in place of escapes."""
    own = ESCAPE.value
    return methods.labels() + methods.perturbations(region, period=own.period, radius=own.perturbation_radius)


PAPER = Arm(lambda region: methods.labels() + methods.sprkd_paper(region), "", "saddle", "extreme", "crop")
ARMS = {
    "scratch": Arm(lambda region: methods.labels()),
    # The published baseline, which can only copy its teacher.
    "response_kd": Arm(lambda region: methods.kd(1.0, hard_weight=0.0, soft_weight=1.0), "weak"),
    "kd_weak": Arm(lambda region: kd(), "weak"),
    "kd_strong": Arm(lambda region: kd(), "strong"),
    "sprkd_paper": PAPER,
    "sprkd_paper_3": PAPER._replace(teachers=3),
    "sprkd": Arm(sprkd, region=None),
    "sprkd+kd": Arm(lambda region: kd() + escapes(region), "strong", region=None),
    "init_only": Arm(lambda region: methods.labels(), region=None, starts_there=True),
    "init_only+kd": Arm(lambda region: kd(), "strong", region=None, starts_there=True),
    "no_region": Arm(lambda region: methods.labels() + escapes(None)),
    "no_eigenstep": Arm(no_eigenstep, region=None),
    "no_perturbation": Arm(
        lambda region: methods.labels() + escapes(region, perturbation_radius=0.0), region=None
    ),
    "init_strong": Arm(sprkd, region="strong"),
    "init_saddle": Arm(sprkd, region="saddle"),
    "init_saddle_3": Arm(sprkd, region="saddle", teachers=3),
    "init_last": Arm(sprkd, region="last"),
    "init_random": Arm(sprkd, region="random"),
    "init_average": Arm(sprkd, region="average"),
}
ARM_NAMES = cli.define_arms(list(ARMS), baseline="scratch")


def main(callbacks: Sequence[Callback] = ()) -> dict[str, Any] | None:
    """Checks the flags, then weak and strong teachers, all arms, report."""
    start, launch, settings = time.monotonic(), LAUNCH.value, cli.settings(__name__)
    share, watch = cli.my_task("experiments.sprkd_malaria"), [ProgressBar(), *callbacks]
    at_most = 256 if launch.smoke else None
    wide = DATA.value.load(num_train=TEACHER_NUM_TRAIN.value, at_most=at_most)
    # One normalisation for both, so that a teacher's weights mean the same to a student.
    dataset = DATA.value.load(at_most=at_most)._replace(normalisation=wide.normalisation)
    parallel.check_batch_size(RECIPE.value.batch_size, parallel.local_devices())
    student, teacher = (cli.network(name, dataset) for name in (STUDENT.value, TEACHER.value))
    shapes = student.init(0)[0]
    saddles.select_weights(
        teacher.init(0)[0], shapes
    )  # raises unless the student can take the teacher's place
    arms = {name: ARMS[name].method(shapes) + methods.Method(record=methods.cost) for name in arms_to_run()}
    made_from = settings | {"data": dataset.fingerprint, "teacher_data": wide.fingerprint}
    workdir = Path(launch.workdir) if share else cli.claim_workdir(launch.workdir, made_from)
    options: dict[str, Any] = {"machine": MACHINE.value, "split": launch.split}
    recipes = (recipe(epochs=WEAK_EPOCHS.value), recipe(epochs=STRONG_EPOCHS.value))
    source = recruit.make_teachers(teacher, wide, dataset, recipes, workdir, callbacks=watch, **options)
    if not share and launch.jobs > 1:
        tasks = [{"first": k, "step": launch.jobs} for k in range(launch.jobs)]
        cli.in_children("experiments.sprkd_malaria", tasks)
    runs: dict[str, list[run.Trained]] = {name: [] for name in arms}
    fallbacks, trainers = dict.fromkeys(arms, 0), {}
    for seed in seeds()[share["first"] :: share["step"]] if share else seeds():
        for name, method in arms.items():
            arm, more = ARMS[name], {"settings": settings, "callbacks": watch}
            if arm.region != "":
                region = region_of(arm, source, shapes, seed)
                fallbacks[name] += not region.strong
                more["init"] = (methods.start_at if arm.starts_there else methods.towards)(region.params)
                more["settings"] = settings | {"region": checkpoints.digest_tree(region.params)}
            if arm.answers or name not in trainers:  # answers belong to one seed
                number = seed % STRONG_TEACHERS.value if arm.answers == "strong" else seed
                signal = source.answers(arm.answers, number) if arm.answers else None
                own = recipe(schedule=RECIPE.value.schedule, epochs=RECIPE.value.epochs)
                trainers[name] = run.make_trainer(student, method, dataset, own, teacher=signal, **options)
            runs[name].append(trainers[name](seed, workdir / name / str(seed), arm=name, **more))
    if share:
        return None
    return report(workdir, dataset, runs, source, fallbacks, time.monotonic() - start)


def region_of(arm: Arm, source: recruit.Teachers, shapes: Params, seed: int) -> recruit.Region:
    """What a student of an arm approaches: weights of its strong teacher, or snapshots of its weak ones."""
    which, resize = arm.region or REGION_FROM.value, arm.resize or RESIZE.value
    if which == "strong":
        params = source.strong(seed % STRONG_TEACHERS.value).weights.params
        form: Any = resize
        return recruit.Region(saddles.select_weights(params, shapes, form=form), [], strong=True)
    own = [source.weak(seed, number) for number in range(arm.teachers)]
    rule = arm.rule or SADDLE_RULE.value
    return recruit.region_of(own, shapes, which=which, rule=rule, resize=resize, seed=seed)


def report(
    workdir: Path,
    dataset: data.Dataset,
    students: Mapping[str, Sequence[run.Trained]],
    source: recruit.Teachers,
    fallbacks: Mapping[str, int],
    seconds: float,
) -> dict[str, Any]:
    """Everything that is measured of the finished students, and the result."""
    launch, name, count = LAUNCH.value, DATA.value.dataset, len(seeds())
    cost = {
        "targets": TARGETS.get(name, (0.5, 0.3)),
        "steps_per_epoch": max(len(dataset.splits["train"]) // RECIPE.value.batch_size, 1),
    }
    runs = {arm: [study.with_costs(one, **cost) for one in own] for arm, own in students.items()}
    # A teacher is reported under the seed of the student that it teaches.
    every = runs | {"weak_teacher": [source.weak(s, 0).trained._replace(seed=s) for s in seeds()]}
    if "strong" in {
        part for arm in runs for part in (ARMS[arm].answers, ARMS[arm].region or REGION_FROM.value)
    }:
        every["strong_teacher"] = [source.strong(k) for k in range(min(STRONG_TEACHERS.value, count))]
    notes = [
        "steps_to and paid_to (in gradients) tell when the validation loss, measured after each epoch, first came "
        "below a target; where it never did, they are those of the whole run, and reached is 0.",
        *(
            f"{arm}: no strong saddle by its rule among the snapshots of a teacher of {n} of {count} seeds; the "
            "snapshot of strongest negative curvature stood in."
            for arm, n in fallbacks.items()
            if n
        ),
    ]
    if count >= 3:
        notes += [study.welch_note(a, b, runs) for a, b in COMPARED if a in runs and b in runs]
        notes.append(study.tost_note(runs, baseline="scratch"))
    notes.append(study.mcnemar_note(dataset, runs, baseline="scratch", split=launch.split))
    about = study.Study(
        "sprkd_malaria" if name == "malaria" else "sprkd",
        f"Does a student of {name} gain from the saddles that its teachers passed?",
        baseline="scratch",
        metrics=("accuracy", "loss", "events", "hvps", "gradient_equivalents"),
        scaled_down=f"{len(dataset.splits['train'])} training images"
        f"{', where the study had 20,668' if name == 'malaria' else ''}; {recipe(epochs=RECIPE.value.epochs).epochs} "
        f"epochs, where it had 500; strong teachers of {recipe(epochs=STRONG_EPOCHS.value).epochs} epochs, likewise",
        # What is recommended comes first, since that is what a reader is told first.
        tested=sorted((arm for arm in runs if arm != "scratch"), key=lambda arm: arm != "sprkd+kd"),
        drawn=(*DRAWN, "kd_strong", "sprkd+kd"),
    )
    drawn = {arm: runs[arm] for arm in DRAWN if arm in runs}
    noise: dict[str, Any] = {"corruptions": {"gaussian_noise": robustness.CORRUPTIONS["gaussian_noise"]}}
    noise |= {"severities": (1, 3, 5), "weight_noise": (0.1,), "draws": 3, "epsilons": ()}
    return study.conclude(
        *(about, workdir, dataset, every),
        **{"settings": cli.settings(__name__), "seconds": seconds, "notes": notes, "output": launch.output},
        flatness=study.flatness_of(dataset, runs, workdir / "flatness", num_images=256),
        densities=study.densities_of(dataset, drawn, workdir / "densities"),
        surfaces=study.surfaces_of(dataset, drawn, workdir / "surfaces"),
        robustness=study.robustness_of(dataset, every, workdir / "robustness", split=launch.split, **noise),
        costs=study.costs_of(every),
    )


def recipe(**changes: Any) -> Recipe:
    """The recipe of a teacher, or with its own schedule of a student; two epochs at most in a smoke run."""
    changes["epochs"] = min(changes["epochs"], 2) if LAUNCH.value.smoke else changes["epochs"]
    return dataclasses.replace(RECIPE.value, **{"schedule": "constant"} | changes)


def arms_to_run() -> list[str]:
    """The arms in the table's order; unless named, without the one that is sprkd itself."""
    same = f"init_{REGION_FROM.value}"
    return [name for name in ARM_NAMES.value if flags.FLAGS["arms"].value or name != same]


def seeds() -> list[int]:
    """Seeds of the students."""
    return SEEDS.value[: 3 if LAUNCH.value.smoke else None]


if __name__ == "__main__":
    cli.launch(main)
