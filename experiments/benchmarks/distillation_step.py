r"""How many epochs of distillation per second does kdjax do, beside Keras 3's Distiller and a plain PyTorch loop?

    python -m experiments.benchmarks.distillation_step --data_dir=data

Needs MNIST in data (python -m experiments.prepare_data --dataset=mnist) and the peers (pip install 'kdjax[bench]').
The pair of the Keras tutorial at batch 64, temperature 3 and hard weight .1: a teacher of 1,433,610 parameters and a
student of 20,490. All frameworks start from the same weights, and the run stops if their first losses differ. The peers
run the teacher in every step, which is what Keras's Distiller and a plain loop do; kdjax computes the teacher's
answers once, and its epoch here carries one twentieth of that. Frameworks take turns in every round, each with one
thread and with all cores, so that other load on the machine affects all of them; each is compared at its faster number
of threads. About 6 minutes on two idle cores.

What to expect: docs/results/training_speed.md. `--smoke` runs the same code in two rounds of few steps.
"""

import importlib.metadata
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from experiments import cli
from experiments.benchmarks.timing import check_names, cores, goal, label, note, over, print_goals
from experiments.benchmarks.workers import Worker, working
from kdjax import data, models, results

DATASET = flags.DEFINE_string(
    "dataset", "mnist", "mnist, fashion_mnist or a file.npz of 28x28x1 images, 10 classes."
)
DATA_DIR = flags.DEFINE_string("data_dir", None, "Where the prepared TFDS data set lies.")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Measurements per framework and number of threads.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 30, "Steps of batch 64 per epoch that is timed.", lower_bound=10)
PEERS = flags.DEFINE_list(
    "peers", ["keras_jax", "keras_tensorflow", "keras_torch", "torch"], "Frameworks to run beside kdjax."
)
OUTPUT = flags.DEFINE_string("output", "runs/benchmarks/distillation_step.json", "Where to write the result.")
SMOKE = flags.DEFINE_bool("smoke", False, "Two rounds, ten steps, PyTorch only.")

BATCH_SIZE, EPOCH_IMAGES, AMORTISED_OVER = 64, 10_000, 20
EPOCH_STEPS = EPOCH_IMAGES // BATCH_SIZE
TITLES = {
    "kdjax": "kdjax",
    "keras_jax": "Keras Distiller (JAX)",
    "keras_tensorflow": "Keras Distiller (TensorFlow)",
    "keras_torch": "Keras Distiller (Torch)",
    "torch": "PyTorch loop",
}
PACKAGES = {
    "keras_jax": ["keras"],
    "keras_tensorflow": ["keras", "tensorflow-cpu"],
    "keras_torch": ["keras", "torch"],
    "torch": ["torch"],
}
GOALS = {"keras_jax": 20, "keras_tensorflow": 20, "keras_torch": 20, "torch": 10}


def name_of(worker: Worker) -> str:
    """The arm of a framework at a number of threads."""
    return label(TITLES[worker.contender], worker.threads)


def write_workload(path: Path, steps: int) -> str:
    """Writes the images and weights that all frameworks share; returns the name of the data set."""
    dataset = data.load(DATASET.value, data_dir=DATA_DIR.value)
    if dataset.images.shape[1:] != (28, 28, 1) or dataset.num_classes != 10:
        raise ValueError(
            f"this benchmark needs 28x28x1 images of 10 classes, {dataset.name} has {dataset.images.shape[1:]} of "
            f"{dataset.num_classes}; use --dataset=mnist or fashion_mnist."
        )
    ids = data.split_ids(dataset)["train"]
    if len(ids) < steps * BATCH_SIZE:
        raise ValueError(f"{steps} steps need {steps * BATCH_SIZE} training images, there are {len(ids)}.")
    ids = np.random.default_rng(0).permutation(ids)[: steps * BATCH_SIZE]
    mean, std = data.channel_statistics(dataset.images[ids])
    arrays = {"images": dataset.images[ids], "labels": dataset.labels[ids], "mean": mean, "std": std}
    for seed, name in enumerate(("teacher", "student")):
        params, _ = models.init(models.build(f"keras_{name}", num_classes=10), (28, 28, 1), seed=seed)
        arrays |= {
            f"{name}/{layer}/{leaf}": x for layer, leaves in params.items() for leaf, x in leaves.items()
        }
    np.savez(path, allow_pickle=False, **{name: np.asarray(x) for name, x in arrays.items()})
    return dataset.name


def check_losses(losses: Mapping[str, Mapping[str, Sequence[float]]]) -> float:
    """Refuses to compare frameworks that do not compute the same; returns the largest relative difference found.

    The first loss knows the forward passes, the next two also the gradients and the optimiser.
    """
    reference, worst = next(iter(losses.values())), 0.0
    for worker, arms in losses.items():
        for arm, values in arms.items():
            differences = [abs(a / b - 1) for a, b in zip(values, reference[arm], strict=True)]
            if differences[0] > 1e-4 or max(differences) > 2e-3:
                raise ValueError(
                    f"{worker} does other work: its {arm} losses are {values}, not {reference[arm]}."
                )
            worst = max(worst, *differences)
    return worst


def measure(workers: Sequence[Worker], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Lets the frameworks take turns; returns worker → metric → one value per round."""
    arms: dict[str, dict[str, list[float]]] = {name_of(worker): {} for worker in workers}
    for _ in tqdm(range(rounds), desc="rounds", disable=None):
        for worker in workers:
            answers = {f"{arm}_step": answer for arm, answer in worker.ask("steps").items()}
            if worker.contender == "kdjax":
                answers |= {"fill_per_image": worker.ask("precompute"), "online_step": worker.ask("online")}
            for name, answer in answers.items():
                note(arms[name_of(worker)], name, answer)
    for metrics in arms.values():
        for suffix in ("ms", "cpu_ms"):
            metrics[f"epoch_{suffix}"] = [
                EPOCH_STEPS * step + EPOCH_IMAGES * fill / AMORTISED_OVER
                for step, fill in zip(
                    metrics[f"kd_step_{suffix}"],
                    metrics.get(f"fill_per_image_{suffix}", [0.0] * rounds),
                    strict=True,
                )
            ]
        metrics["epochs_per_s"] = [1000 / value for value in metrics["epoch_ms"]]
    return {
        arm: dict(sorted(metrics.items(), key=lambda m: m[0] != "epochs_per_s"))
        for arm, metrics in arms.items()
    }


def best(arms: Mapping[str, Mapping[str, list[float]]], framework: str, metric: str) -> list[float]:
    """A metric at the number of threads with the smallest median."""
    found = [metrics[metric] for arm, metrics in arms.items() if arm.rsplit(",", 1)[0] == TITLES[framework]]
    return min(found, key=statistics.median)


def _median_epoch(metrics: Mapping[str, Sequence[float]]) -> float:
    return statistics.median(metrics["epoch_ms"])


def judge(
    arms: Mapping[str, Mapping[str, list[float]]], peers: Sequence[str]
) -> tuple[dict, dict, list[dict]]:
    """The ratios to the peers, the same in CPU seconds at one thread, and what became of each goal."""
    epoch, plain = (best(arms, "kdjax", metric) for metric in ("epoch_ms", "plain_step_ms"))
    ratios = {TITLES[peer]: over(best(arms, peer, "epoch_ms"), epoch) for peer in peers}
    cpu = {
        TITLES[peer]: over(
            arms[f"{TITLES[peer]}, 1 thread"]["epoch_cpu_ms"], arms["kdjax, 1 thread"]["epoch_cpu_ms"]
        )
        for peer in peers
    }
    goals = [
        goal(f"epochs per second ≥ {GOALS[peer]}× {TITLES[peer]}", GOALS[peer], ratios[TITLES[peer]])
        for peer in peers
    ]
    if "torch" in peers:
        title = "PyTorch loop, student alone"
        ratios[title] = over(best(arms, "torch", "plain_step_ms"), plain)
        goals.append(goal("plain student step ≤ 1.0× PyTorch's", 1.0, ratios[title]))
    ours = min((metrics for arm, metrics in arms.items() if arm.startswith("kdjax,")), key=_median_epoch)
    own = over(ours["plain_step_ms"], ours["kd_step_ms"])
    goals.append(goal("KD step ≤ 1.05× a plain student step", 1 / 1.05, own))
    return ratios, cpu, goals


def main() -> None:
    """Measures, writes the result and prints what was found."""
    start = time.monotonic()
    rounds, steps = (2, 10) if SMOKE.value else (ROUNDS.value, STEPS.value)
    peers = ["torch"] if SMOKE.value else PEERS.value
    check_names("peers", peers, list(GOALS))
    losses, settled, pythons = {}, {}, dict.fromkeys(["kdjax", *peers], sys.executable)
    with tempfile.TemporaryDirectory() as temporary:
        workload = Path(temporary) / "workload.npz"
        dataset = write_workload(workload, steps)
        threads = sorted({1, len(cores())})
        with working(pythons, threads, workload, baselines="distillation_baselines") as workers:
            for worker in workers:
                if worker.absent:
                    raise ValueError(
                        f"{name_of(worker)} cannot be measured: {worker.absent}. Install the peers with pip install "
                        "'kdjax[bench]', or name those that are installed in --peers."
                    )
            for worker in workers:
                losses[name_of(worker)] = worker.ask("losses")
                settled[name_of(worker)] = worker.ask("settle") | {"import_s": worker.import_s}
                cli.say(f"{name_of(worker)}: {settled[name_of(worker)]}")
            difference = check_losses(losses)
            arms = measure(workers, rounds)
    ratios, cpu, goals = judge(arms, peers)
    content = results.make(
        "distillation_step",
        question="How many times as many epochs of distillation per second does kdjax do as Keras 3's Distiller and "
        "a plain PyTorch loop?",
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
            f"The frameworks' first losses agree to {difference:.1e} (relative, three steps, plain and KD).",
            f"kdjax computes the teacher's answers once, here shared by {AMORTISED_OVER} epochs; the peers run the "
            "teacher in every step. online_step_ms is kdjax with the teacher in the step.",
            "Ratios are round by round, each side at its faster number of threads by the median.",
            "Keras's Distiller is given KLDivergence() itself: by its default, the name of that loss, Keras 3.15 "
            "applies it to raw logits, without softmax and T².",
        ],
    )
    content["versions"] |= {
        name: importlib.metadata.version(name) for peer in peers for name in PACKAGES[peer]
    }
    results.write(OUTPUT.value, content)
    print_goals(goals)
    print(f"written to {OUTPUT.value}")


if __name__ == "__main__":
    cli.launch(main)
