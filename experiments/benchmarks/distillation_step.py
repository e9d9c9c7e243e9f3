r"""How many epochs of distillation per second does kdjax do, beside Keras 3's Distiller and a plain PyTorch loop?

    python -m experiments.benchmarks.distillation_step --data_dir=data

Needs MNIST in data (python -m experiments.prepare_data --dataset=mnist) and the peers (pip install 'kdjax[bench]').
The pair of the Keras tutorial at batch 64, temperature 3 and hard weight .1: a teacher of 1,433,610 parameters and a
student of 20,490. All frameworks start from the same weights, and the run stops if their first losses differ. It
compares like with like first, then the two:

- The teacher in every step, which is what Keras's Distiller and a plain loop do; kdjax in its online mode.
- Cached answers: the same training fed with the teacher's logits, computed before and not counted.
- Amortisation: kdjax's cost per epoch of computing the answers once and training for 5, 20 or 100 epochs, beside the
  teacher in the step, its own and that of the peers. What each peer's caching costs is in its arms.

The student alone, on the labels, is also measured. Frameworks take turns in every round, each with one thread and with
all cores, so that other load on the machine affects all of them; each is compared at its faster number of threads, with
the fastest of its settings for each arm. A PyTorch loop under torch.compile takes part where that runs; the result says
where it does not. About 12 minutes on two idle cores.

What to expect: docs/results/training_speed.md. `--smoke` runs the same code in two rounds of few steps.
"""

import importlib.metadata
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from absl import flags
from tqdm import tqdm

from experiments import cli
from experiments.benchmarks import distillation_workload
from experiments.benchmarks.distillation_baselines import CACHED, ONLINE, PLAIN
from experiments.benchmarks.timing import check_names, cores, goal, label, note, over, print_goals
from experiments.benchmarks.workers import Worker, working
from kdjax import results

DATASET = flags.DEFINE_string(
    "dataset", "mnist", "mnist, fashion_mnist or a file.npz of 28x28x1 images, 10 classes."
)
DATA_DIR = flags.DEFINE_string("data_dir", None, "Where the prepared TFDS data set lies.")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Measurements per framework and number of threads.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 30, "Steps of batch 64 per epoch that is timed.", lower_bound=10)
PEERS = flags.DEFINE_list(
    "peers",
    ["keras_jax", "keras_tensorflow", "keras_torch", "torch", "torch_compile"],
    "Frameworks to run beside kdjax.",
)
OUTPUT = flags.DEFINE_string("output", "runs/benchmarks/distillation_step.json", "Where to write the result.")
SMOKE = flags.DEFINE_bool("smoke", False, "Two rounds, ten steps, PyTorch only.")

BATCH_SIZE, EPOCH_IMAGES = 64, 10_000
EPOCH_STEPS = EPOCH_IMAGES // BATCH_SIZE
AMORTISED_OVER = (5, 20, 100)  # epochs
TITLES = {
    "kdjax": "kdjax",
    "keras_jax": "Keras (JAX)",
    "keras_tensorflow": "Keras (TensorFlow)",
    "keras_torch": "Keras (Torch)",
    "torch": "PyTorch loop",
    "torch_compile": "PyTorch loop, compiled",
}
FORMS = {ONLINE: "teacher in the step", CACHED: "cached answers", PLAIN: "student alone"}
GOALS = {"keras_jax": 20, "keras_tensorflow": 20, "keras_torch": 20, "torch": 10, "torch_compile": 10}
GOAL_EPOCHS = 20  # of kdjax's cached answers, in these goals
OPTIONAL = "torch_compile"  # left out where it does not run, for it needs a C++ compiler

Arms: TypeAlias = dict[str, dict[str, list[float]]]
"""Arm → metric → one value per round."""
Pick: TypeAlias = Callable[[str, str, str], list[float]]
"""The values of ``(framework, form, metric)``."""


def named(framework: str, form: str) -> str:
    """A framework in a form."""
    return f"{TITLES[framework]}, {FORMS[form]}"


def name_of(worker: Worker) -> str:
    """For the reader."""
    return label(TITLES[worker.contender], worker.threads)


def first_losses(workers: Sequence[Worker]) -> tuple[dict[str, dict[str, list[float]]], list[str]]:
    """Lets the frameworks compute their first losses.

    Returns:
      The losses of each framework that takes part, and why the optional one does not, if so.

    Raises:
      ValueError: if another framework is missing or fails.
    """
    for worker in workers:
        if worker.absent and worker.contender != OPTIONAL:
            raise ValueError(
                f"{name_of(worker)} cannot be measured: {worker.absent}. Install the peers with pip install "
                "'kdjax[bench]', or name those that are installed in --peers."
            )
    losses, left_out = {}, []
    for worker in workers:
        try:
            if worker.absent:
                raise ValueError(worker.absent)
            losses[name_of(worker)] = worker.ask("losses")
        except ValueError as error:
            if worker.contender != OPTIONAL:
                raise
            left_out.append(f"{name_of(worker)} was left out: {error}")
    if left_out:  # at one number of threads only, it could not be compared at its faster one
        losses = {
            name: found for name, found in losses.items() if not name.startswith(f"{TITLES[OPTIONAL]},")
        }
    return losses, left_out


def measure(workers: Sequence[Worker], rounds: int) -> Arms:
    """Lets the frameworks take turns."""
    arms: Arms = {}
    for _ in tqdm(range(rounds), desc="rounds", disable=None):
        for worker in workers:
            answers = worker.ask("steps")
            for form in FORMS:
                arm = arms.setdefault(label(named(worker.contender, form), worker.threads), {})
                note(arm, "step", answers[form])
                if form == CACHED:
                    note(arm, "precompute", answers["precompute"])
    return {arm: per_epoch(metrics) for arm, metrics in arms.items()}


def per_epoch(metrics: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Adds epochs of steps alone, and epochs that carry their part of precomputing, if that was measured."""
    found = {}
    for suffix in ("ms", "cpu_ms"):
        found[f"epoch_{suffix}"] = [EPOCH_STEPS * step for step in metrics[f"step_{suffix}"]]
        for epochs in AMORTISED_OVER if "precompute_ms" in metrics else ():
            found[f"epoch_of_{epochs}_{suffix}"] = [
                epoch + EPOCH_IMAGES * image / epochs
                for epoch, image in zip(
                    found[f"epoch_{suffix}"], metrics[f"precompute_{suffix}"], strict=True
                )
            ]
    return {"epochs_per_s": [1000 / epoch for epoch in found["epoch_ms"]], **metrics, **found}


def best(arms: Arms, framework: str, form: str, metric: str) -> list[float]:
    """A metric at the number of threads with the smallest median."""
    name = named(framework, form)
    found = [metrics[metric] for arm, metrics in arms.items() if arm.rsplit(",", 1)[0] == name]
    return min(found, key=statistics.median)


def amortised(framework: str, epochs: int) -> str:
    """The name of a ratio to kdjax's cached answers."""
    return f"{named(framework, ONLINE)}; kdjax caches for {epochs} epochs"


def compare(pick: Pick, peers: Sequence[str]) -> dict[str, dict[str, float]]:
    """Like with like, then the teacher in the step over kdjax's cached answers and the part of computing them."""
    ratios = {
        named(peer, form): over(pick(peer, form, "epoch"), pick("kdjax", form, "epoch"))
        for form in FORMS
        for peer in peers
    }
    for epochs in AMORTISED_OVER:
        ours = pick("kdjax", CACHED, f"epoch_of_{epochs}")
        for framework in ("kdjax", *peers):
            ratios[amortised(framework, epochs)] = over(pick(framework, ONLINE, "epoch"), ours)
    return ratios


def judge(arms: Arms, peers: Sequence[str]) -> tuple[dict, dict, list[dict]]:
    """The ratios to the peers, the same in CPU seconds at one thread, and what became of each goal."""

    def wall(framework, form, metric):
        return best(arms, framework, form, f"{metric}_ms")

    ratios = compare(wall, peers)
    cpu = compare(lambda name, form, metric: arms[label(named(name, form), 1)][f"{metric}_cpu_ms"], peers)
    goals = [
        goal(f"epochs per second ≥ 1× {name}", 1.0, ratios[name])
        for name in (named(peer, form) for form in FORMS for peer in peers)
    ]
    for peer in peers:
        name = amortised(peer, GOAL_EPOCHS)
        goals.append(goal(f"epochs per second ≥ {GOALS[peer]}× {name}", GOALS[peer], ratios[name]))
    own = over(wall("kdjax", PLAIN, "step"), wall("kdjax", CACHED, "step"))
    goals.append(goal("step with cached answers ≤ 1.05× a plain student step", 1 / 1.05, own))
    return ratios, cpu, goals


def main() -> None:
    """Measures, writes the result and prints what was found."""
    start = time.monotonic()
    rounds, steps = (2, 10) if SMOKE.value else (ROUNDS.value, STEPS.value)
    peers = ["torch"] if SMOKE.value else PEERS.value
    check_names("peers", peers, list(GOALS))
    settled, pythons = {}, dict.fromkeys(["kdjax", *peers], sys.executable)
    with tempfile.TemporaryDirectory() as temporary:
        workload = Path(temporary) / "workload.npz"
        dataset = distillation_workload.write(workload, DATASET.value, DATA_DIR.value, steps=steps)
        threads = sorted({1, len(cores())})
        with working(pythons, threads, workload, baselines="distillation_baselines") as workers:
            losses, left_out = first_losses(workers)
            workers = [worker for worker in workers if name_of(worker) in losses]
            peers = [peer for peer in peers if any(worker.contender == peer for worker in workers)]
            difference = distillation_workload.check_losses(losses)
            for worker in workers:
                settled[name_of(worker)] = worker.ask("settle") | {"import_s": worker.import_s}
                cli.say(f"{name_of(worker)}: {settled[name_of(worker)]}")
            arms = measure(workers, rounds)
    ratios, cpu, goals = judge(arms, peers)
    content = results.make(
        "distillation_step",
        question="How many times as many epochs of distillation per second does kdjax do as Keras 3 and a PyTorch "
        "loop: with the teacher in the step, with cached answers, and for caching once?",
        flags={
            "dataset": dataset,
            "rounds": rounds,
            "steps": steps,
            "peers": peers,
            "batch_size": BATCH_SIZE,
        },
        seeds=list(range(rounds)),
        arms=arms,
        wall_clock_s=time.monotonic() - start,
        scaled_down=f"Epochs of {EPOCH_IMAGES:,} images ({EPOCH_STEPS} steps) are extrapolated from timed epochs of "
        f"{steps} steps; networks have their initial weights.",
        ratios=ratios,
        ratios_cpu_time_one_thread=cpu,
        goals=goals,
        settings={name: answer["settings"] for name, answer in settled.items()},
        first_calls_s={
            name: {key: value for key, value in answer.items() if key.endswith("_s")}
            for name, answer in settled.items()
        },
        notes=[
            *left_out,
            f"The frameworks' first losses agree to {difference:.1e} (relative, three steps, all forms).",
            "The teacher in the step and cached answers compare like with like; computing the answers is not counted "
            "in the latter. Where kdjax caches for 5, 20 or 100 epochs, its epochs carry their part of computing the "
            "answers, and the other side has the teacher in the step.",
            "Cached answers are computed without torch.compile in both PyTorch loops.",
            "Ratios are round by round, each side at its faster number of threads by the median.",
            "Keras's Distiller is given KLDivergence() itself: by its default, the name of that loss, Keras 3.15 "
            "applies it to raw logits, without softmax and T².",
        ],
    )
    content["versions"] |= {
        name: importlib.metadata.version(name)
        for peer in peers
        for name in distillation_workload.PACKAGES[peer]
    }
    results.write(OUTPUT.value, content)
    print_goals(goals)
    print(f"written to {OUTPUT.value}")


if __name__ == "__main__":
    cli.launch(main)
