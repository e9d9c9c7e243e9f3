r"""Does distillation help a network that is trained to compute in integers?

    python -m experiments.qat --data_dir=data --workdir=runs/qat --output=experiments/results/qat.json

Trains a float student per seed on the labels, and goes on from its weights for --qat_epochs in several ways:

* float: as it is; float+labels, float+kd: trained on without rounding, which shows what the additional steps do alone;
* ptq_wB: rounded after training (post-training quantisation), kernels to B bits and activations to 8, with ranges of
  the training images;
* qat_wB: trained with fake quantisation on the labels; qat+kd_wB: with the teacher's softened logits beside them.

Networks are measured as JAX computes them with fake quantisation. The first seed's qat+kd of every width is exported to
LiteRT (workdir/bundles) and compared with that on a thousand test images; the notes of the result say what was found.
Takes about forty minutes on two cores. Expect 8 bits to lose nothing, 4 bits much without training and little with it.

References:
  Mishra and Marr, Apprentice, arXiv 1711.05852, 2018; Polino et al., Model compression via distillation and
  quantization, arXiv 1802.05668, 2018.
"""

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from experiments import cli
from kdjax import checkpoints, data, export, methods, models, quantisation, run, study
from kdjax.callbacks import Callback, ProgressBar
from kdjax.recipe import Machine, Recipe
from kdjax.teacher import TeacherSignal
from kdjax.types import Weights

DATA = cli.define(cli.Data(dataset="cifar10", num_train=4000))
STUDENT = flags.DEFINE_string(
    "student", "resnet8_w50", "A name in kdjax.models.MODELS, or path/mine.py:build."
)
RECIPE = cli.define(Recipe(30, schedule="cosine", padding=4, flip=True, evaluate_every=5))
QAT = cli.define(Recipe(10, learning_rate=3e-4, schedule="cosine", padding=4, flip=True), prefix="qat_")
TEACHER = cli.define_teacher(RECIPE, only=("epochs", "learning_rate"), defaults=cli.Teacher("resnet20"))
KD = cli.define(methods.KdOptions(temperature=4.0))
BITS = flags.DEFINE_list("bits", ["8", "4"], "Of the kernels.")
CALIBRATION = flags.DEFINE_integer(
    "calibration", 500, "Training images whose activations give the ranges.", 16
)
VIEWS = flags.DEFINE_integer("views", 8, "Cached augmentations per image that the teacher is asked about.", 2)
SEEDS = cli.define_seeds()
LAUNCH = cli.define(cli.Launch(), omit=("jobs", "pod", "tensorboard"))
MACHINE = cli.define(Machine())


def main(callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
    """Teacher, float students, the ways to go on from them, report."""
    start, launch, machine, settings = time.monotonic(), LAUNCH.value, MACHINE.value, cli.settings(__name__)
    at_most, seeds = (256, SEEDS.value[:2]) if launch.smoke else (None, SEEDS.value)
    dataset = DATA.value.load(at_most=at_most)
    recipe, network = launch.shorten(RECIPE.value, epochs=1), cli.network(STUDENT.value, dataset)
    rounded = {f"w{bits}": quantisation.quantised(network, weight_bits=bits) for bits in bit_widths()}
    teacher = dataclasses.replace(TEACHER.value, recipe=launch.shorten(TEACHER.value.recipe, epochs=1))
    source = cli.teachers(teacher, DATA.value, dataset, launch=launch, settings=settings, machine=machine)
    about = question(rounded)
    workdir, watch = cli.begin(launch, source.made_from, about, arms_of(rounded)), [ProgressBar(), *callbacks]

    taught, asked = source.train(workdir, watch), {"mode": "views", "views": VIEWS.value, "features": []}
    asked["move"] = {"padding": recipe.padding, "flip": recipe.flip}
    signal = (
        source.answers[0]
        if source.answers
        else cli.ask(taught[0], dataset, workdir / "teacher_answers", launch=launch, machine=machine, **asked)
    )
    options: dict[str, Any] = {"machine": machine, "split": launch.split}
    train = run.make_trainer(network, methods.labels(), dataset, recipe, **options)
    own: dict[str, Any] = {"callbacks": watch, "settings": settings}
    floats = [train(seed, workdir / "float" / str(seed), arm="float", **own) for seed in seeds]
    arms = {"float": floats} | continued(
        "float+{}", network, [one.weights for one in floats], dataset, signal, workdir, own
    )
    images, notes = calibration_images(dataset), []
    for name, small in rounded.items():
        begun = [small.calibrated(one.weights, images) for one in floats]
        arms[f"ptq_{name}"] = [
            run.measured(f"ptq_{name}", seed, small, weights, dataset, **options)
            for seed, weights in zip(seeds, begun, strict=True)
        ]
        arms |= continued(f"qat{{}}_{name}", small, begun, dataset, signal, workdir, own)
        notes.append(exported(arms[f"qat+kd_{name}"][0], dataset, workdir))
    every = {"teacher": taught} | arms if taught else arms
    more = {
        "settings": source.settings,
        "seconds": time.monotonic() - start,
        "split": launch.split,
        "notes": notes,
    }
    return study.conclude(
        about, workdir, dataset, every, output=launch.output, supersedes=launch.supersedes, **more
    )


def continued(
    arm: str,
    network: models.Network,
    begun: Sequence[Weights],
    dataset: data.Dataset,
    signal: TeacherSignal,
    workdir: Path,
    own: Mapping[str, Any],
) -> dict[str, list[run.Trained]]:
    """Trains a network further from the weights of each seed, on the labels alone and with the teacher's answers."""
    launch, found = LAUNCH.value, {}
    recipe = launch.shorten(QAT.value, epochs=1)
    for way, method in {"labels": methods.labels(), "kd": methods.kd(**vars(KD.value))}.items():
        name = arm.format(way) if arm.startswith("float") else arm.format("+kd" if way == "kd" else "")
        given = {"teacher": signal if way == "kd" else None, "machine": MACHINE.value, "split": launch.split}
        train = run.make_trainer(network, method, dataset, recipe, **given)
        found[name] = []
        for seed, weights in zip(SEEDS.value, begun, strict=False):
            settings = {**own["settings"], "begun": checkpoints.digest_tree(weights)}
            more = {**own, "settings": settings, "init": methods.start_at(*weights)}
            found[name].append(train(seed, workdir / name / str(seed), arm=name, **more))
    return found


def exported(student: run.Trained, dataset: data.Dataset, workdir: Path) -> str:
    """Writes a student as an int8 file, which is refused if it is not what JAX computes; says how near it is."""
    formats, limits = ["litert_int8"], export.Limits(accuracy_drop=0.01)
    bundle = export.write(workdir / "bundles" / student.arm, student, dataset, formats=formats, limits=limits)
    found = bundle.description["formats"]["litert_int8"]["checked"]
    said = export.summary(bundle)[0].partition(": ")[2]
    return (
        f"The file of {student.arm}, seed {student.seed} ({said}); its logits are at most "
        f"{255 * found['difference']:.1f} of 255 units from those of JAX with fake quantisation."
    )


def calibration_images(dataset: data.Dataset) -> jax.Array:
    """The first training images, normalised."""
    ids = dataset.splits["train"][: CALIBRATION.value]
    return data.normalise(jnp.asarray(dataset.images[ids]), **dataset.normalisation._asdict())


def bit_widths() -> list[int]:
    """--bits as numbers."""
    try:
        widths = [int(bits) for bits in BITS.value]
    except ValueError:
        widths = []
    if not widths or len(set(widths)) < len(widths) or not {4, 8} >= set(widths):
        raise ValueError(
            f"--bits={','.join(BITS.value)} must be 8, 4 or both, which is what LiteRT has kernels for."
        )
    return widths


def arms_of(widths: Iterable[str]) -> list[str]:
    """All arms that are trained or measured."""
    return ["float", "float+labels", "float+kd"] + [
        f"{way}_{w}" for w in widths for way in ("ptq", "qat", "qat+kd")
    ]


def question(widths: Iterable[str]) -> study.Study:
    """What is asked: what rounding costs, what training with it gives back, and what the teacher adds."""
    primary = [pair for w in widths for pair in ((f"qat+kd_{w}", f"qat_{w}"), (f"qat_{w}", f"ptq_{w}"))]
    primary += [(f"ptq_{w}", "float") for w in widths] + [("float+kd", "float+labels")]
    launch = LAUNCH.value
    return study.Study(
        "qat",
        f"Does distillation help {STUDENT.value} to compute in integers on {DATA.value.dataset}?",
        baseline="float",
        primary=primary,
        scaled_down=launch.scaled_down,
        chosen_on=launch.chosen_on,
    )


if __name__ == "__main__":
    cli.launch(main)
