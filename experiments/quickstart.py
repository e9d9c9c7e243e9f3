r"""Does a small network learn more from a large one than from the labels alone, when labels are few?

    python -m experiments.quickstart

The whole data flow on real data in about a minute on two CPU cores, without a download: scikit-learn's 1,797
handwritten digits. A teacher is trained on the whole training split; what it says of every image is computed once,
stored and verified; a much smaller student then learns from only --num_train of those images, over five seeds, and is
measured on a test split that nothing was chosen on. It learns from their labels alone (scratch), with the teacher's
softened answers beside them (kd), likewise with some images overlaid with what the teacher looks at (kd+ig; see
experiments.ig_cifar10), or likewise, but starting from what is cut out of the teacher itself and looking for ways down
along negative curvature (sprkd+kd, as this library recommends it; experiments.sprkd_malaria takes it to pieces). At the
end the curvature of the loss is measured where each arm came to rest.

Leaves in runs/quickstart/: the checkpoints of every run, results.json, figure.png and report.html. Expect kd to beat
scratch, and sprkd+kd to beat kd; the numbers stand in BUILD_NOTES.md, from experiments/results/quickstart.json.

References:
  Hinton et al., Distilling the Knowledge in a Neural Network, arXiv 1503.02531, 2015. Hernandez et al., Knowledge
  Distillation with Integrated Gradients, arXiv 2503.13008, 2025. Dewan, SPRKD, arXiv 2607.23346, 2026.
"""

import time

from absl import flags

from experiments import common
from experiments.common import recruiting
from kdjax import models, saddles

WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Where everything is written.")
OUTPUT = flags.DEFINE_string("output", None, "Also write the results to this file.")
NUM_TRAIN = flags.DEFINE_integer("num_train", 100, "Training images that the students see.", lower_bound=16)
TEMPERATURE = flags.DEFINE_float("temperature", 4.0, "Softening of both logits.", lower_bound=1e-3)
HARD_WEIGHT = flags.DEFINE_float("hard_weight", 0.1, "Weight of the labels in kd.", lower_bound=0.0)
SOFT_WEIGHT = flags.DEFINE_float(
    "soft_weight", 0.9, "Weight of the teacher's answers in kd.", lower_bound=0.0
)
SMOKE = flags.DEFINE_bool("smoke", False, "The same code in seconds: three seeds, two epochs.")

TEACHER = common.Recipe(epochs=30, batch_size=64, learning_rate=2e-3, schedule="cosine", evaluate_every=5)
STUDENT = common.Recipe(epochs=150, batch_size=20, learning_rate=2e-3, schedule="cosine", evaluate_every=10)


def main() -> None:
    """Teacher, columns, students, report."""
    start = time.monotonic()
    settings = common.settings_of(globals(), apart=("workdir", "output"))
    kd = common.kd(
        hard_weight=HARD_WEIGHT.value, soft_weight=SOFT_WEIGHT.value, temperature=TEMPERATURE.value
    )
    seeds = range(3 if SMOKE.value else 5)
    teacher_recipe, student_recipe = (
        recipe._replace(epochs=2, evaluate_every=1) if SMOKE.value else recipe
        for recipe in (TEACHER, STUDENT)
    )

    everything = common.make_task("digits", data_dir=None)
    network = common.build("digits_teacher", everything)
    few = common.make_task("digits", data_dir=None, num_train=NUM_TRAIN.value)
    made_from = settings | {"data": few.fingerprint, "teacher_data": everything.fingerprint}
    workdir = common.claim_workdir(WORKDIR.value, made_from)
    trainer = common.make_trainer(everything, network, common.scratch, teacher_recipe)
    teacher = common.train_teacher(
        everything, "digits_teacher", network, trainer, 0, workdir / "teacher" / "0"
    )

    student = common.build("digits_student", few)
    taught = common.taught_by(
        few, teacher, student_recipe, mode="centre", views=1, directory=workdir / "columns"
    )
    shape, _ = models.init(student, few.source.images.shape[1:], seed=0)
    region = saddles.select_weights(teacher.weights.params, shape)
    recruit = recruiting.with_escapes(region, recruiting.Escape())
    explained = common.explained_by(few, teacher, directory=workdir / "maps")
    shown = taught._replace(
        columns={**(taught.columns or {}), "map": explained.columns["map"]},
        maps=("teacher_map",),
        blend=common.overlaid(),
    )
    learning: dict = {
        "scratch": (common.scratch, taught, {}),
        "kd": (kd, taught, {}),
        "kd+ig": (kd, shown, {}),
        "sprkd+kd": (kd, taught, {"wrap": recruit, "second": True}),
    }
    students: dict = {}
    for arm, (objective, told, more) in learning.items():
        trainer = common.make_trainer(few, student, objective, student_recipe, told, **more)
        students[arm] = [
            trainer(seed, workdir / arm / str(seed), f"{arm}, seed {seed}", settings) for seed in seeds
        ]
    arms = {"teacher": [teacher], **students}
    disturbed = common.robustness_of(few, arms, workdir / "robustness")
    common.conclude(
        workdir,
        "quickstart",
        task=few,
        question=f"Does a small network learn more of digits from a teacher than from {NUM_TRAIN.value} labels alone?",
        arms=arms,
        arm_seeds={"teacher": [0]} | dict.fromkeys(students, seeds),
        baseline="scratch",
        settings=settings,
        output=OUTPUT.value,
        scaled_down="8x8 images; one teacher" + (", two epochs (smoke)" if SMOKE.value else ""),
        notes=[
            "Blur and translation are in pixels, of strengths made for pictures of 32x32. One pixel of an 8x8 digit is "
            "an eighth of it, so hardly any network stands them here.",
            "All students of sprkd+kd start from the same weights, so they differ less than those of other arms.",
        ],
        robustness=disturbed,
        flatness=common.flatness_of(few, students, workdir / "flatness"),
        densities=common.densities_of(few, students, workdir / "densities"),
        surfaces=common.surfaces_of(few, students, workdir / "surfaces"),
        overlays=common.pictures(few, explained),
        costs=common.costs_of(few, arms),
        wall_clock_s=time.monotonic() - start,  # all of the above too
    )


if __name__ == "__main__":
    common.launch(main)
