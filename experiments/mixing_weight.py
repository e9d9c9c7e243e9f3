r"""How should labels and teacher be weighted in distillation? Many weights and seeds in one program.

    python -m experiments.mixing_weight --workdir=runs/mixing_weight
    python -m experiments.mixing_weight --workdir=runs/mixing_weight_noise \
        --hard_weights=-0.5,-0.25,0,0.1,0.25,0.5,0.75,1,1.25,1.5 \
        --condition= --condition=label_noise=0.2 --condition=label_noise=0.2,teacher_label_noise=clean
    python -m experiments.mixing_weight --dataset=mnist --data_dir=data --workdir=runs/mixing_weight_mnist \
        --num_train=10000 --label_noise=0.05 --teacher=keras_teacher --student=keras_student --temperature=3 \
        --hard_weights=0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1 --schedule=constant --learning_rate=1e-3 \
        --epochs=1000 --lengths=100,300,500 --evaluate_every=100 --batch_size=64 --seeds=0,1,2

The loss is a·hard + (1 − a)·soft, as in Hao (2023), A Study of Response-Based Knowledge Distillation and the Effects of
Alpha on Model Accuracy; the soft term is T²·KL unless --soft_loss names another. The students of every a in
--hard_weights and of every seed are trained at once, in one compiled program: 55 by default, which take less than a
minute on two CPU cores for the digits. A weight below 0 or above 1 drives the student away from labels or teacher.

Each --condition trains all of them under other flags: wrong labels, another teacher (teacher_epochs=2,
teacher_untrained=true, teacher_label_smoothing=0.1), temperature or student. --lengths measures students earlier in one
training, which needs a constant learning rate.

The best a is chosen on the validation split, in the last epoch, and only that one is tested on the test split: against
a = 1 (labels alone), and against a = .1, the usual weight, where it is among the weights. --label_noise makes a share
of the labels of the training split wrong; the teacher sees the same wrong labels unless --teacher_label_noise=clean is
given, or --teacher_dir names one that was trained on others. The result counts of how many images with a wrong label a
student predicts the true one (corrected), and of how many the wrong one (memorised). The workdir receives the
checkpoints, results.json (with the field "swept"), figure.png and report.html; the same command started again continues
where it was stopped.
"""

import dataclasses
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from absl import flags

from experiments import cli
from kdjax import data, files, losses, methods, models, parallel, run, study, vmapped
from kdjax.callbacks import ProgressBar
from kdjax.options import option
from kdjax.recipe import Machine, Recipe

USUAL = 0.1  # the weight of the labels that Hao and the Keras tutorial start from
SOFT_LOSSES = ("soft_target_kl", "logit_standardised_kl", "wttm")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What the students differ in, and how they are trained at once."""

    hard_weights: tuple[float, ...] = option(
        tuple(i / 10 for i in range(11)), "Every a, rising; 1, the labels alone, among them."
    )
    soft_loss: str = option("soft_target_kl", "The teacher's term, in kdjax.losses.", choices=SOFT_LOSSES)
    temperature: float = option(4.0, "Of the teacher's term.", least=1e-3)
    lengths: tuple[int, ...] = option(
        (), "Epochs after which students are measured too, each a multiple of --evaluate_every."
    )
    mapping: str = option(
        "vmap", "vmap trains students side by side; map needs less memory.", choices=tuple(vmapped.MAPPINGS)
    )

    def __post_init__(self) -> None:
        a = self.hard_weights
        if list(a) != sorted(set(a)) or 1 not in a:
            given = ",".join(map(str, a))
            raise ValueError(f"hard_weights={given} must rise, with 1 among them, such as 0,0.5,1.")

    @property
    def note(self) -> list[str]:
        """What a reader should know of the weights."""
        outside = [f"{a:g}" for a in self.hard_weights if not 0 <= a <= 1]
        away = "below 0 the student is driven away from the labels, above 1 from the teacher"
        return [f"Weights outside 0 to 1 ({', '.join(outside)}): {away}."] if outside else []


DATA = cli.define(cli.Data(num_train=100))
STUDENT = flags.DEFINE_string("student", "digits_student", "As --teacher.")
RECIPE = cli.define(
    Recipe(epochs=150, batch_size=20, learning_rate=2e-3, schedule="cosine", evaluate_every=10),
    only=("epochs", "batch_size", "learning_rate", "schedule", "evaluate_every"),
)
TEACHER = cli.define_teacher(
    Recipe(epochs=30, batch_size=64, learning_rate=2e-3, schedule="cosine", evaluate_every=5),
    only=("epochs", "batch_size", "learning_rate"),
    defaults=cli.Teacher(teacher_num_train=0),
    omit=("teacher_answers", "teacher_seeds"),
)
SWEEP = cli.define(Sweep())
CONDITIONS = flags.DEFINE_multi_string(
    "condition",
    [],
    "Other flags, as label_noise=0.2 or NAME=VALUE,NAME=VALUE, under which all students are trained too.",
)
SEEDS = cli.define_seeds()
LAUNCH = cli.define(
    cli.Launch(), only=("workdir", "output", "supersedes", "chosen_on", "scaled_down", "smoke")
)
MACHINE = cli.define(Machine())

FIXED = (
    *("dataset", "image_size", "num_train", "num_validation", "skip_broken", "split_by"),
    *("condition", "hard_weights", "lengths", "mapping", "seeds", "smoke", "scaled_down"),
)
"""Flags that no condition may change: students of all conditions stand in one result."""

CHOSEN = "chosen"  # the arm of the weight that validation chooses
CHOSEN_ON = "the weight of the arm chosen: mean validation accuracy of these seeds in the last epoch"

DRAWN, VALIDATED = ("accuracy", "loss"), ("validation_accuracy", "validation_loss")
DENOISED = ("corrected", "memorised")

Runs = Mapping[float, Sequence[run.Trained]]  # weight → students that have not diverged


class Condition(NamedTuple):
    """One sweep over the weights: what --condition says, or nothing, and what the flags are under it."""

    text: str
    few: data.Dataset
    student: models.Network
    recipe: Recipe
    sweep: Sweep
    source: cli.Teachers

    def arm(self, name: str) -> str:
        """The name of an arm under this condition."""
        return f"{self.text}, {name}" if self.text else name

    def home(self, workdir: Path) -> Path:
        """Where its runs are."""
        return workdir / (re.sub(r"[^\w.-]+", "_", self.text) or "as_given") if CONDITIONS.value else workdir

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """What is compared."""
        others = [a for a in (1.0, USUAL) if a in self.sweep.hard_weights]
        return [(self.arm(CHOSEN), self.arm(name(a))) for a in others]


def mixed(outputs, batch):
    """The loss of a student, by its own weight of the labels."""
    own, soft_loss = batch["settings"], getattr(losses, SWEEP.value.soft_loss)
    soft = soft_loss(outputs.logits, batch["teacher_logits"], temperature=own["temperature"])
    a = own["hard_weight"]
    return {"hard": a * methods.cross_entropy(outputs, batch), "soft": (1 - a) * jnp.mean(soft)}


def main() -> dict[str, Any]:
    """Under every condition the teacher, its cached answers, and all students at once; then the report."""
    start, launch, machine = time.monotonic(), LAUNCH.value, MACHINE.value
    if len(CONDITIONS.value) > len(set(CONDITIONS.value)):
        raise ValueError(f"--condition={','.join(CONDITIONS.value)}: each condition can be given once.")
    if CONDITIONS.value:  # which share what is equal, such as a teacher
        launch = dataclasses.replace(launch, shared_cache=str(Path(launch.workdir) / "shared"))
    conditions = [prepare(text, launch, machine) for text in CONDITIONS.value or [""]]
    about, count = question(conditions), len(SWEEP.value.hard_weights) * len(seeds())
    networks, cache_bytes = {}, 0
    for one in conditions:
        for network, number in ({one.student: count} | one.source.to_train).items():
            networks[network] = networks.get(network, 0) + number
        cache_bytes += one.source.cache_bytes(len(one.few.images))
    cli.check_disk(launch.workdir, networks, cache_bytes=cache_bytes)
    made_from = {one.text: one.source.made_from for one in conditions}
    arms = [arm for one in conditions for arm in dict.fromkeys(arm for pair in one.pairs for arm in pair)]
    workdir = cli.begin(launch, made_from if CONDITIONS.value else made_from[""], about, arms)
    finished, notes = [], []
    for one in conditions:
        with given(one.text):
            finished.append(train(one, workdir, launch, machine))
        notes += finished[-1].notes
    more = {"settings": conditions[0].source.settings, "seconds": time.monotonic() - start}
    more |= {"notes": notes, "output": launch.output, "supersedes": launch.supersedes}
    result = report(about, workdir, finished, **more)
    for one in finished:
        cli.say(one.notes[0])
    return result


def given(text: str):
    """The flags of a condition."""
    return cli.given(text, module=__name__, fixed=FIXED)


def seeds() -> list[int]:
    """Of every weight."""
    return SEEDS.value[: 3 if LAUNCH.value.smoke else None]


def prepare(text: str, launch: cli.Launch, machine: Machine) -> Condition:
    """Reads and checks the flags of a condition; writes nothing."""
    with given(text):
        if DATA.value.label_noise == 1:
            raise ValueError("--label_noise=1 leaves no right label to learn from; it is below 1.")
        few, sweep = DATA.value.load(at_most=256 if launch.smoke else None), SWEEP.value
        recipe, wanted = launch.shorten(RECIPE.value, epochs=2), TEACHER.value
        if launch.smoke and sweep.lengths:
            recipe = dataclasses.replace(recipe, evaluate_every=1)
            sweep = dataclasses.replace(sweep, lengths=(1,))
        check_lengths(sweep.lengths, recipe)
        wanted = dataclasses.replace(wanted, recipe=launch.shorten(wanted.recipe, epochs=2))
        student = cli.network(STUDENT.value, few)
        parallel.check_batch_size(recipe.batch_size, parallel.local_devices(machine.devices))
        options = {"launch": launch, "settings": cli.settings(__name__), "machine": machine}
        return Condition(text, few, student, recipe, sweep, cli.teachers(wanted, DATA.value, few, **options))


def check_lengths(lengths: Sequence[int], recipe: Recipe) -> None:
    """Raises a ValueError where one training does not pass through trainings of these lengths."""
    said = f"--lengths={','.join(map(str, lengths))}"
    if lengths and recipe.schedule != "constant":
        raise ValueError(
            f"{said}: a {recipe.schedule} schedule of {recipe.epochs} epochs is another than one of {lengths[0]}, so "
            "these trainings cannot share epochs; use --schedule=constant, or --condition=epochs=N for each."
        )
    wrong = [n for n in lengths if not 0 < n < recipe.epochs or n % recipe.evaluate_every]
    if wrong or list(lengths) != sorted(set(lengths)):
        raise ValueError(
            f"{said} must rise, below --epochs={recipe.epochs}, in multiples of --evaluate_every="
            f"{recipe.evaluate_every}."
        )


class Finished(NamedTuple):
    """What a condition ended with: the teacher, the students, the weight that is best, and notes."""

    condition: Condition
    teacher: run.Trained
    runs: Runs
    best: float
    notes: list[str]

    @property
    def arms(self) -> dict[str, Sequence[run.Trained]]:
        """Teacher and students by their names in the result: all weights, or under conditions what is compared."""
        weights = [a for a in self.runs if not CONDITIONS.value or a in (1.0, USUAL)]
        arms = {"teacher": [self.teacher], CHOSEN: self.runs[self.best]}
        arms |= {name(a): self.runs[a] for a in weights}
        return {self.condition.arm(arm): runs for arm, runs in arms.items()}

    @property
    def lines(self) -> dict[str, dict[str, list[list[float]]]]:
        """What is drawn against the weight: line → metric → per weight one number per student."""
        line = self.condition.text or ("as given" if CONDITIONS.value else "student")
        names = {None: line} | {n: f"{line}, {n} epochs" for n in self.condition.sweep.lengths}
        found = {}
        for epochs, drawn in names.items():
            each = [[swept(one, epochs) for one in own] for own in self.runs.values()]
            found[drawn] = {m: [[one[m] for one in own] for own in each] for m in each[0][0]}
        return found


def train(condition: Condition, workdir: Path, launch: cli.Launch, machine: Machine) -> Finished:
    """The teacher and the students of one condition."""
    few, sweep, home = condition.few, condition.sweep, condition.home(workdir)
    (teacher,) = condition.source.train(home, [ProgressBar()])
    if DATA.value.label_noise:
        files.write_json(home / "mislabelled.json", few.example_ids[few.mislabelled].tolist())
    weights, own_seeds = sweep.hard_weights, seeds()
    count = len(weights) * len(own_seeds)
    own = {"hard_weight": [a for a in weights for _ in own_seeds], "temperature": [sweep.temperature] * count}
    how = {"arm": f"{count} students", "mapping": sweep.mapping, "machine": machine}
    students = run.train_many(
        *(condition.student, methods.objective(mixed), few, condition.recipe),
        teacher=cli.ask(teacher, few, home / "teacher_answers", launch=launch, machine=machine),
        seeds=[seed for _ in weights for seed in own_seeds],
        directory=home / "students",
        many=run.Many(own, identity=condition.source.settings, watch_test=bool(sweep.lengths), **how),
    )
    n = len(own_seeds)
    runs, lost = finite({a: students[i * n :][:n] for i, a in enumerate(weights)})
    if 1.0 not in runs:
        raise ValueError(f"every student of labels alone diverged ({lost[0]}); lower --learning_rate.")
    runs = measured(condition, teacher, runs, home)
    best, found = choose(runs)
    notes = [found, *sweep.note, *lost]
    if condition.text:
        notes += [note for note in few.notes if note.startswith("Training labels made wrong")]
    return Finished(
        condition,
        teacher,
        runs,
        best,
        [f"{condition.text}: {note}" if condition.text else note for note in notes],
    )


def question(conditions: Sequence[Condition]) -> study.Study:
    """What is asked: whether the weight that validation chooses is better than labels alone, and the usual weight."""
    few, recipe, launch = conditions[0].few, conditions[0].recipe, LAUNCH.value
    height, width, _ = few.image_shape
    scaled_down = (
        f"{len(few.splits['train'])} training images of {height}x{width}, where the study had 10,000 of 28x28; "
        f"{recipe.epochs} epochs, where it had 100 to 1000; one teacher"
    )
    return study.Study(
        "mixing_weight",
        f"How should a student of {few.name} weight its labels and its teacher?",
        baseline=conditions[0].arm(name(1)),
        scaled_down=launch.scaled_down or scaled_down,
        primary=[pair for one in conditions for pair in one.pairs],
        chosen_on="; ".join(filter(None, (CHOSEN_ON, launch.chosen_on))),
        drawn=[one.arm("teacher") for one in conditions],  # the sweep shows where the students end
    )


def measured(condition: Condition, teacher: run.Trained, runs: Runs, home: Path) -> Runs:
    """Adds how each student differs from its teacher, and what it makes of wrong labels."""
    few, arms = condition.few, {name(a): own for a, own in runs.items()}
    logits = study.logits_of(teacher, few)
    predicted = logits.argmax(-1)
    found = [study.agreement_of(few, arms, home / "answers", predicted=predicted)]
    found += [study.exaggeration_of(few, arms, home / "exaggeration", teacher=logits)]
    if len(few.mislabelled):
        found += [study.denoising_of(few, arms, home / "denoising")]
    for one in found:
        arms = study.with_metrics(arms, one)
    return {a: arms[name(a)] for a in runs}


def report(about: study.Study, workdir: Path, finished: Sequence[Finished], **more: Any) -> dict[str, Any]:
    """Writes the result: what is compared under every condition, and the sweep over all weights."""
    arms = {arm: runs for one in finished for arm, runs in one.arms.items()}
    sweeps = []
    for family in families(finished):
        lines: dict[tuple[float, ...], dict[str, Any]] = {}  # by the weights that did not diverge
        for one in family:
            lines.setdefault(tuple(one.runs), {}).update(one.lines)
        sweeps += [{"name": "hard_weight", "values": list(a), "arms": own} for a, own in lines.items()]
    return study.conclude(about, workdir, finished[0].condition.few, arms, swept=sweeps, **more)


def families(finished: Sequence[Finished]) -> list[list[Finished]]:
    """Conditions that belong into one figure: those whose first flag is the same, beside that of no other flags."""
    plain = [one for one in finished if not one.condition.text]
    found: dict[str, list[Finished]] = {}
    for one in finished:
        if one.condition.text:
            found.setdefault(one.condition.text.partition("=")[0], [*plain]).append(one)
    return [*found.values()] or [plain]


def swept(student: run.Trained, epochs: int | None = None) -> dict[str, float]:
    """What is drawn against the weight, after all or after some epochs; on the test split unless it says so."""
    record = student.history[-1 if epochs is None else epochs - 1]
    metrics = student.metrics if epochs is None else {m: record[f"test_{m}"] for m in DRAWN}
    return {m: metrics[m] for m in (*DRAWN, *DENOISED) if m in metrics} | {m: record[m] for m in VALIDATED}


def name(a: float) -> str:
    """The arm of a weight."""
    return f"a = {a:g}"


def finite(runs: Runs) -> tuple[dict[float, list[run.Trained]], list[str]]:
    """The students that have not diverged, and one note for each that has."""
    kept: dict[float, list[run.Trained]] = {}
    notes = []
    for a, student in ((a, student) for a, own in runs.items() for student in own):
        if (epoch := vmapped.diverged_at(student.fitted)) is None:
            kept.setdefault(a, []).append(student)
        else:
            notes.append(f"{name(a)}, seed {student.seed} diverged in epoch {epoch} and is left out.")
    return kept, notes


def choose(runs: Runs) -> tuple[float, str]:
    """The best weight by validation accuracy (by its loss between equals), and its accuracy on the test split."""

    def mean(a: float, metric: str) -> float:
        return statistics.fmean(swept(one)[metric] for one in runs[a])

    best = max(runs, key=lambda a: (mean(a, "validation_accuracy"), -mean(a, "validation_loss")))
    against = "" if best == 1 else f", that of {name(1)} {mean(1.0, 'accuracy'):.2%}"
    return best, (
        f"The validation split chooses {name(best)} (accuracy {mean(best, 'validation_accuracy'):.2%} there); its test "
        f"accuracy is {mean(best, 'accuracy'):.2%} on average{against}."
    )


if __name__ == "__main__":
    cli.launch(main)
