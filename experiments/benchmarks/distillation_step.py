r"""How many epochs of distillation per second does kdjax do, beside Keras 3's Distiller and a plain PyTorch loop?

    python -m experiments.benchmarks.distillation_step --data_dir=data

Needs MNIST in data (python -m experiments.prepare_data --dataset=mnist) and the peers (pip install 'kdjax[bench]').
The pair of the Keras tutorial at batch 64, temperature 3 and hard weight .1: a teacher of 1,433,610 parameters and a
student of 20,490. All frameworks start from the same weights, and the run stops if their first losses differ. The peers
run the teacher in every step, which is what Keras's Distiller and a plain loop do; kdjax fills the teacher's columns
once, and its epoch here carries one twentieth of that. Frameworks take turns, round after round, each at one thread
and at all cores, so that other load on the machine meets all of them; each is then judged at its faster number of
threads. About 6 minutes on two idle cores.

What to expect: docs/results/training_speed.md. `--smoke` runs the same code in two rounds of few steps.
"""

import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from experiments import common
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


class Worker:
    """A process of one framework, idle until it is asked."""

    def __init__(self, framework: str, threads: int, folder: Path):
        self.framework, self.threads = framework, threads
        self.name = f"{TITLES[framework]}, {threads} thread{'s' * (threads > 1)}"
        dropped = {"JAX_COMPILATION_CACHE_DIR", "OMP_NUM_THREADS", "KERAS_BACKEND"}
        environment = {k: v for k, v in os.environ.items() if k not in dropped}
        self.errors = open(folder / f"{framework}-{threads}.log", "w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "experiments.benchmarks.distillation_baselines",
                framework,
                str(threads),
                str(folder),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment | {"TF_CPP_MIN_LOG_LEVEL": "3"},
        )

    def ask(self, job: str) -> dict[str, Any]:
        """Sends one word and waits for the answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(job, file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.errors.seek(0)
            last = (self.errors.read().strip().splitlines() or ["no message"])[-1]
            raise ValueError(
                f"{self.name} stopped at {job!r}: {last}. Install the peers with pip install 'kdjax[bench]', or name "
                "those that are there in --peers."
            )
        return json.loads(answer)

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()
        self.errors.close()


def write_workload(folder: Path, steps: int) -> str:
    """Draws the images and weights that all frameworks share; returns what the data set is called."""
    source = data.load(DATASET.value, data_dir=DATA_DIR.value)
    if source.images.shape[1:] != (28, 28, 1) or source.num_classes != 10:
        raise ValueError(
            f"this benchmark needs 28x28x1 images of 10 classes, {source.name} has {source.images.shape[1:]} of "
            f"{source.num_classes}; use --dataset=mnist or fashion_mnist."
        )
    ids = data.split_ids(source)["train"]
    if len(ids) < steps * BATCH_SIZE:
        raise ValueError(f"{steps} steps need {steps * BATCH_SIZE} training images, there are {len(ids)}.")
    ids = np.random.default_rng(0).permutation(ids)[: steps * BATCH_SIZE]
    mean, std = data.channel_statistics(source.images[ids])
    arrays = {"images": source.images[ids], "labels": source.labels[ids], "mean": mean, "std": std}
    for seed, name in enumerate(("teacher", "student")):
        params, _ = models.init(models.build(f"keras_{name}", num_classes=10), (28, 28, 1), seed=seed)
        arrays |= {
            f"{name}/{layer}/{leaf}": x for layer, leaves in params.items() for leaf, x in leaves.items()
        }
    np.savez(
        folder / "workload.npz", allow_pickle=False, **{name: np.asarray(x) for name, x in arrays.items()}
    )
    return source.name


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
    arms: dict[str, dict[str, list[float]]] = {worker.name: {} for worker in workers}
    for _ in tqdm(range(rounds), desc="rounds", disable=None):
        for worker in workers:
            answers = {f"{arm}_step": answer for arm, answer in worker.ask("steps").items()}
            if worker.framework == "kdjax":
                answers |= {"fill_per_image": worker.ask("fill"), "online_step": worker.ask("online")}
            for name, answer in answers.items():
                for clock, suffix in (("wall", "ms"), ("cpu", "cpu_ms")):
                    arms[worker.name].setdefault(f"{name}_{suffix}", []).append(1000 * answer[clock])
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


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, low and high of the rounds."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def best(arms: Mapping[str, Mapping[str, list[float]]], framework: str, metric: str) -> list[float]:
    """A metric at the number of threads with the smallest median."""
    found = [metrics[metric] for arm, metrics in arms.items() if arm.rsplit(",", 1)[0] == TITLES[framework]]
    return min(found, key=statistics.median)


def _median_epoch(metrics: Mapping[str, Sequence[float]]) -> float:
    return statistics.median(metrics["epoch_ms"])


def over(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Spread of the quotient round by round."""
    return spread([a / b for a, b in zip(numerator, denominator, strict=True)])


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
        {
            "goal": f"epochs per second ≥ {GOALS[peer]}× {TITLES[peer]}",
            "needed": GOALS[peer],
            **ratios[TITLES[peer]],
        }
        for peer in peers
    ]
    if "torch" in peers:
        title = "PyTorch loop, student alone"
        ratios[title] = over(best(arms, "torch", "plain_step_ms"), plain)
        goals.append({"goal": "plain student step ≤ 1.0× PyTorch's", "needed": 1.0, **ratios[title]})
    ours = min((metrics for arm, metrics in arms.items() if arm.startswith("kdjax,")), key=_median_epoch)
    own = over(ours["plain_step_ms"], ours["kd_step_ms"])
    goals.append({"goal": "KD step ≤ 1.05× a plain student step", "needed": 1 / 1.05, **own})
    return ratios, cpu, [goal | {"met": goal["median"] >= goal["needed"]} for goal in goals]


def main() -> None:
    """Measures, writes the result and prints what was found."""
    start = time.monotonic()
    rounds, steps = (2, 10) if SMOKE.value else (ROUNDS.value, STEPS.value)
    peers = ["torch"] if SMOKE.value else PEERS.value
    for peer in peers:
        if peer not in GOALS:
            raise ValueError(f"--peers={peer} is none of {', '.join(GOALS)}.")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers: list[Worker] = []
    with tempfile.TemporaryDirectory() as temporary:
        try:
            dataset = write_workload(Path(temporary), steps)
            losses, settled = {}, {}
            for framework in ["kdjax", *peers]:
                for threads in sorted({1, cores}):
                    worker = Worker(framework, threads, Path(temporary))
                    workers.append(worker)
                    losses[worker.name] = worker.ask("losses")
                    settled[worker.name] = worker.ask("settle")
                    common.say(f"{worker.name}: {settled[worker.name]}")
            difference = check_losses(losses)
            arms = measure(workers, rounds)
        finally:
            for worker in workers:
                worker.close()
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
            f"kdjax fills the teacher's columns once, here shared by {AMORTISED_OVER} epochs; the peers run the "
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
    for goal in goals:
        verdict = "met" if goal["met"] else "NOT met"
        print(f"{goal['goal']}: {goal['median']:.2f} ({goal['low']:.2f} to {goal['high']:.2f}), {verdict}")
    print(f"written to {OUTPUT.value}")


if __name__ == "__main__":
    common.launch(main)
