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

With --until_loss all arms are measured at about the same training loss, so that their flatness can be compared: the
curvature falls with the loss by itself.

A step is one gradient. gradient_equivalents is what an arm cost in all: 1.5 gradients for a Hessian-vector product and
a third for a loss (benchmarks/escape.json); the training of teachers is not counted.

The workdir receives all checkpoints and snapshots, results.json, figure.png and report.html. The same command started
again continues where it was stopped. --jobs processes train side by side.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from absl import flags

from experiments import cli
from kdjax import checkpoints, data, methods, models, parallel, recruit, robustness, run, saddles, study
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
    "strong_teachers", 10, "Students take turns; with fewer than seeds these are not independent.", 1
)
KD = cli.define(methods.KdOptions())
SOURCES = ["strong", "saddle", "last", "random", "average"]
REGION_FROM = flags.DEFINE_enum("region_from", "strong", SOURCES, "What sprkd's region is made of.")
SADDLE_RULE = flags.DEFINE_enum("saddle_rule", "strong", list(recruit.RULES), "A strong saddle, to sprkd.")
RESIZE = flags.DEFINE_enum("resize", "select", ["select", "crop"], "How sprkd cuts a teacher to size.")
ESCAPE = cli.define(methods.EscapeOptions())
UNTIL_LOSS = flags.DEFINE_float(
    "until_loss",
    None,
    "Measure students after the epoch whose training loss is first below this; trains them twice.",
    0,
)
SEEDS = cli.define_seeds("0,1,2,3,4,5,6,7,8,9")
LAUNCH = cli.define(
    cli.Launch(), only=("workdir", "output", "supersedes", "split", "jobs", "chosen_on", "smoke")
)
MACHINE = cli.define(Machine(steps_per_dispatch=51), omit=("devices",))

TARGETS = {"malaria": (0.25, 0.20, 0.16), "digits": (0.8, 0.5, 0.3), "mnist": (0.5, 0.4, 0.3)}  # of the loss
PRIMARY = [  # weights selected from the teacher beside KD; saddles or other snapshots; KD, selection and SPRKD alone
    ("init_only+kd", "kd_strong"),
    *(("init_saddle", f"init_{other}") for other in ("last", "random", "average")),
    *((arm, "scratch") for arm in ("kd_strong", "init_only", "sprkd_paper")),
]
COMPARED = (  # beside those: approach and escapes with KD or alone, and both of their halves
    ("sprkd+kd", "kd_strong"),
    ("init_saddle", "init_saddle_3"),
    *(("sprkd", other) for other in ("sprkd_paper", "init_only", "no_eigenstep", "no_perturbation")),
    ("no_region", "scratch"),
)
MARGIN = 0.005  # of accuracy: less is no reason to search for saddles
DRAWN = ("scratch", "sprkd_paper", "sprkd")  # arms whose spectrum and surface are drawn


class Region(NamedTuple):
    """What a student's region is made of; where nothing is named, what the flags say."""

    of: str = ""  # a strong teacher, or the saddle, last, random or average snapshot of weak ones
    rule: str = ""
    resize: str = ""
    teachers: int = 1
    start: bool = False  # start there, instead of approaching it


BY_FLAGS, PAPER = Region(), Region("saddle", "extreme", "crop")


class Arm(NamedTuple):
    """What a student minimises, whose answers it is given, and its region."""

    method: Method
    answers: str = ""  # of its weak or strong teacher
    region: Region | None = None


def kd() -> Method:
    """Hinton's distillation, as the flags weigh it."""
    return methods.kd(**vars(KD.value))


def escaping(shapes: Params | None, region: Region | None = BY_FLAGS, **changes: float) -> Arm:
    """SPRKD's approach to a region and escapes, as the flags set them."""
    return Arm(methods.labels() + methods.sprkd(shapes, **vars(ESCAPE.value) | changes), "", region)


def noise(shapes: Params) -> Method:
    """Perturbations in place of escapes."""
    return methods.perturbations(shapes, period=ESCAPE.value.period, radius=ESCAPE.value.perturbation_radius)


labels = methods.labels
ARMS: Mapping[str, Callable[[Params], Arm]] = {  # s: parameters in the shapes of the student
    "scratch": lambda s: Arm(labels()),
    # The published baseline, which can only copy its teacher.
    "response_kd": lambda s: Arm(methods.kd(1.0, hard_weight=0.0, soft_weight=1.0), "weak"),
    "kd_weak": lambda s: Arm(kd(), "weak"),
    "kd_strong": lambda s: Arm(kd(), "strong"),
    "sprkd_paper": lambda s: Arm(labels() + methods.sprkd_paper(s), "", PAPER),
    "sprkd_paper_3": lambda s: Arm(labels() + methods.sprkd_paper(s), "", PAPER._replace(teachers=3)),
    "sprkd": escaping,
    "sprkd+kd": lambda s: Arm(kd() + methods.sprkd(s, **vars(ESCAPE.value)), "strong", BY_FLAGS),
    "init_only": lambda s: Arm(labels(), "", Region(start=True)),
    "init_only+kd": lambda s: Arm(kd(), "strong", Region(start=True)),
    "no_region": lambda s: escaping(None, None),
    "no_eigenstep": lambda s: Arm(labels() + noise(s), "", BY_FLAGS),
    "no_perturbation": lambda s: escaping(s, perturbation_radius=0.0),
    **{f"init_{of}": lambda s, of=of: escaping(s, Region(of)) for of in SOURCES},
    "init_saddle_3": lambda s: escaping(s, Region("saddle", teachers=3)),
}
WANTED = cli.define_arms(list(ARMS), baseline="scratch")


def main(callbacks: Sequence[Callback] = ()) -> dict[str, Any] | None:
    """Weak and strong teachers, all arms, report; returns the result, or None in a worker of --jobs."""
    start, launch, settings = time.monotonic(), LAUNCH.value, cli.settings(__name__)
    at_most, seeds = 256 if launch.smoke else None, SEEDS.value[: 3 if launch.smoke else None]
    wide = DATA.value.load(num_train=TEACHER_NUM_TRAIN.value, at_most=at_most)
    # One normalisation for both, so that a teacher's weights mean the same to a student.
    dataset = DATA.value.load(at_most=at_most)._replace(normalisation=wide.normalisation)
    parallel.check_batch_size(RECIPE.value.batch_size, parallel.local_devices())
    student, teacher = (cli.network(name, dataset) for name in (STUDENT.value, TEACHER.value))
    shapes = student.init(0)[0]
    saddles.select_weights(teacher.init(0)[0], shapes)  # raises if the student cannot take its place
    # By default without the arm that is sprkd itself.
    same = "" if flags.FLAGS["arms"].value else f"init_{REGION_FROM.value}"
    arms = {name: ARMS[name](shapes) for name in WANTED.value if name != same}
    if UNTIL_LOSS.value is not None:
        check_until_loss(arms)
    worker, workdir = cli.my_task("experiments.sprkd_malaria"), Path(launch.workdir)
    if worker is None:
        made_from = settings | {"data": dataset.fingerprint, "teacher_data": wide.fingerprint}
        cli.begin(launch, made_from, about(dataset), [*arms, "strong_teacher", "weak_teacher"])
    watch = [ProgressBar(), *callbacks]
    weak, strong = (shorter(schedule="constant", epochs=flag.value) for flag in (WEAK_EPOCHS, STRONG_EPOCHS))
    source = recruit.make_teachers(
        *(teacher, wide, dataset, (weak, strong), workdir), callbacks=watch, **measured_on()
    )
    if worker is None and launch.jobs > 1:
        cli.in_children("experiments.sprkd_malaria", range(launch.jobs))
    own = seeds if worker is None else seeds[worker :: launch.jobs]
    runs, fallbacks = train(student, dataset, arms, source, own, watch)
    if worker is not None:
        return None
    # A teacher is reported under the seed of the student that it teaches.
    teachers = {"weak_teacher": [source.weak(seed, 0).trained._replace(seed=seed) for seed in seeds]}
    uses = {arm.answers for arm in arms.values()}
    uses |= {arm.region.of or REGION_FROM.value for arm in arms.values() if arm.region}
    if "strong" in uses:
        count = min(STRONG_TEACHERS.value, len(seeds))
        teachers["strong_teacher"] = [source.strong(number) for number in range(count)]
    return report(dataset, runs, teachers, fallbacks, time.monotonic() - start)


def measured_on() -> dict[str, Any]:
    """The machine, and the split of the final numbers, of every training."""
    return {"machine": MACHINE.value, "split": LAUNCH.value.split}


def shorter(**changes: Any) -> Recipe:
    """The recipe with these changes; two epochs at most in a smoke run."""
    recipe = dataclasses.replace(RECIPE.value, **changes)
    return LAUNCH.value.shorten(recipe, epochs=min(recipe.epochs, 2))


def train(
    student: models.Network,
    dataset: data.Dataset,
    arms: Mapping[str, Arm],
    source: recruit.Teachers,
    seeds: Sequence[int],
    callbacks: Sequence[Callback],
) -> tuple[dict[str, list[run.Trained]], dict[str, int]]:
    """The students of every arm; and of how many seeds of an arm a teacher had no strong saddle."""
    runs: dict[str, list[run.Trained]] = {name: [] for name in arms}
    fallbacks, makers = dict.fromkeys(arms, 0), {}
    shapes, settings, workdir = student.init(0)[0], cli.settings(__name__), Path(LAUNCH.value.workdir)
    for seed in seeds:
        for name, arm in arms.items():
            more: dict[str, Any] = {"settings": settings, "callbacks": callbacks}
            if arm.region is not None:
                region = region_of(arm.region, source, shapes, seed)
                fallbacks[name] += not region.strong
                more["init"] = (methods.start_at if arm.region.start else methods.towards)(region.params)
                more["settings"] = settings | {"region": checkpoints.digest_tree(region.params)}
            if arm.answers or name not in makers:  # answers belong to one seed
                number = seed % STRONG_TEACHERS.value if arm.answers == "strong" else seed
                signal = source.answers(arm.answers, number) if arm.answers else None
                method = arm.method + methods.Method(record=methods.cost)
                given, options = (student, method, dataset), {"teacher": signal, **measured_on()}
                makers[name] = functools.cache(functools.partial(run.make_trainer, *given, **options))
            home, more = workdir / name / str(seed), {"arm": name, **more}
            whole = makers[name](recipe=shorter())(seed, home, **more)
            runs[name].append(stopped(whole, makers[name], home / "until_loss", **more))
    return runs, fallbacks


def check_until_loss(arms: Mapping[str, Arm]) -> None:
    """Refuses what cannot be stopped at an equal loss."""
    if taught := [name for name, arm in arms.items() if arm.answers]:
        raise ValueError(
            f"--until_loss compares losses of the labels, and {', '.join(taught)} minimise another; leave them out of "
            "--arms."
        )
    if RECIPE.value.schedule != "constant":
        raise ValueError(
            f"--until_loss trains the first epochs of a run again, which --schedule={RECIPE.value.schedule} would "
            "change; use --schedule=constant."
        )


def stopped(
    whole: run.Trained, make: Callable[..., Callable[..., run.Trained]], home: Path, **more: Any
) -> run.Trained:
    """The run; with --until_loss its first epochs again, to the one whose loss fell below it, if one did."""
    below = [r for r in whole.history if UNTIL_LOSS.value is not None and r["loss"] < UNTIL_LOSS.value]
    if not below:
        return whole
    again = make(recipe=shorter(epochs=round(below[0]["epoch"])))(whole.seed, home, **more)
    if not math.isclose(again.history[-1]["loss"], below[0]["loss"], rel_tol=0.05):
        raise ValueError(
            f"{home} ends at a loss of {again.history[-1]['loss']:.3g}, and the run that it repeats had "
            f"{below[0]['loss']:.3g} after as many epochs: what is trained depends on the length of the run."
        )
    return again


def region_of(region: Region, source: recruit.Teachers, shapes: Params, seed: int) -> recruit.Region:
    """The region of a student: weights of its strong teacher, or snapshots of its weak ones."""
    which, resize = region.of or REGION_FROM.value, region.resize or RESIZE.value
    if which == "strong":
        params, form = source.strong(seed % STRONG_TEACHERS.value).weights.params, cast(Any, resize)
        return recruit.Region(saddles.select_weights(params, shapes, form=form), [], strong=True)
    own = [source.weak(seed, number) for number in range(region.teachers)]
    rule = region.rule or SADDLE_RULE.value
    return recruit.region_of(own, shapes, which=which, rule=rule, resize=resize, seed=seed)


def report(
    dataset: data.Dataset,
    students: study.Arms,
    teachers: study.Arms,
    fallbacks: Mapping[str, int],
    seconds: float,
) -> dict[str, Any]:
    """Everything that is measured of the finished students, and the result."""
    launch, name, workdir = LAUNCH.value, DATA.value.dataset, Path(LAUNCH.value.workdir)
    count = len(students["scratch"])
    steps = max(len(dataset.splits["train"]) // RECIPE.value.batch_size, 1)
    cost: dict[str, Any] = {"targets": TARGETS.get(name, (0.5, 0.3)), "steps_per_epoch": steps}
    runs = {arm: [study.with_costs(one, **cost) for one in own] for arm, own in students.items()}
    every, drawn = {**runs, **teachers}, {arm: runs[arm] for arm in DRAWN if arm in runs}
    notes = [
        "steps_to and paid_to (in gradients) tell when the validation loss, measured after each epoch, first came "
        "below a target; where it never did, they are those of the whole run, and reached is 0.",
        *(
            f"{arm}: no strong saddle by its rule among the snapshots of a teacher of {n} of {count} seeds; the "
            "snapshot of strongest negative curvature stood in."
            for arm, n in fallbacks.items()
            if n
        ),
        *(
            f"{arm}: {n} of {count} runs never came below the training loss of --until_loss={UNTIL_LOSS.value:g}, and "
            "are measured at their end."
            for arm, own in runs.items()
            if UNTIL_LOSS.value is not None
            and (n := sum(one.history[-1]["loss"] >= UNTIL_LOSS.value for one in own))
        ),
        *study.comparison_notes(runs, pairs=COMPARED),
    ]
    noisy: dict[str, Any] = {"corruptions": {"gaussian_noise": robustness.CORRUPTIONS["gaussian_noise"]}}
    noisy |= {"severities": (1, 3, 5), "weight_noise": (0.1,), "draws": 3, "epsilons": ()}
    return study.conclude(
        *(about(dataset), workdir, dataset, every),
        **{"settings": cli.settings(__name__), "seconds": seconds, "notes": notes, "split": launch.split},
        **{"output": launch.output, "supersedes": launch.supersedes},
        flatness=study.flatness_of(dataset, runs, workdir / "flatness", num_images=256),
        densities=study.densities_of(dataset, drawn, workdir / "densities"),
        surfaces=study.surfaces_of(dataset, drawn, workdir / "surfaces"),
        robustness=study.robustness_of(dataset, every, workdir / "robustness", split=launch.split, **noisy),
        costs=study.costs_of(every),
    )


def about(dataset: data.Dataset) -> study.Study:
    """The question, and what it compares."""
    name, strong = DATA.value.dataset, shorter(epochs=STRONG_EPOCHS.value)
    return study.Study(
        "sprkd_malaria" if name == "malaria" else "sprkd",
        f"Does a student of {name} gain from the saddles that its teachers passed?",
        baseline="scratch",
        metrics=("accuracy", "loss", "events", "hvps", "gradient_equivalents"),
        scaled_down=f"{len(dataset.splits['train'])} training images"
        f"{', where the study had 20,668' if name == 'malaria' else ''}; {shorter().epochs} epochs, where it had 500; "
        f"strong teachers of {strong.epochs} epochs, likewise",
        primary=PRIMARY,
        chosen_on=LAUNCH.value.chosen_on,
        margin=MARGIN,
        drawn=(*DRAWN, "kd_strong", "sprkd+kd"),
    )


if __name__ == "__main__":
    cli.launch(main)
