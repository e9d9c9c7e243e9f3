r"""How long does a sweep over the mixing weight take, beside the loop of the Keras tutorial?

    python -m experiments.benchmarks.sweep --data_dir=data --output=experiments/results/benchmarks/sweep.json

Ten weights and three seeds, 100 epochs of 10,000 MNIST images at batch 64: 30 students of 20,490 parameters and one
teacher of 1,433,610, the networks of the tutorial. Steps are timed and multiplied:

- kdjax: the teacher's answers computed once and cached, then all students in one program (map or vmap, the faster by
  the median), or one student after the other;
- the tutorial's loop, Keras's Distiller under fit, once per student, with the teacher in every step; and, like with
  like, the same loop fed with cached answers.

Needs MNIST in data and the peer (pip install 'kdjax[bench]'). Frameworks take turns with as many threads as there are
cores. Compiling is not counted. About six minutes on two idle cores.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import flags
from tqdm import tqdm

from experiments import cli
from experiments.benchmarks import distillation_workload
from experiments.benchmarks.distillation_baselines import CACHED, ONLINE
from experiments.benchmarks.timing import cores, goal, over, print_goals
from experiments.benchmarks.workers import versions_of, working
from kdjax import results

DATA_DIR = flags.DEFINE_string("data_dir", None, "Where the prepared TFDS data set lies.")
PEER = flags.DEFINE_enum(
    "peer", "keras_tensorflow", ["keras_tensorflow", "keras_jax", "keras_torch", "torch"], "Beside kdjax."
)
PEER_PYTHON = flags.DEFINE_string("peer_python", sys.executable, "The interpreter that has the peer.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Measurements of each.", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", None, "Result file to write.")
SMOKE = flags.DEFINE_bool("smoke", False, "One round of few steps and students.")

STUDENTS, EPOCHS, IMAGES, BATCH_SIZE = 30, 100, 10_000, 64
STEPS = EPOCHS * (IMAGES // BATCH_SIZE)  # of every student
TUTORIAL, WITH_ANSWERS = "one by one, teacher in the step", "one by one, cached answers"
MAPPED = {"kdjax, all at once by map": "map", "kdjax, all at once by vmap": "vmap"}
NEEDED = 50  # times as fast, with the teacher in the tutorial's step


def main() -> dict[str, Any]:
    """Measures in turns, multiplies, and writes the result."""
    start, peer = time.monotonic(), PEER.value
    rounds, steps, students = (1, 10, 3) if SMOKE.value else (ROUNDS.value, 30, STUDENTS)
    with tempfile.TemporaryDirectory() as temporary:
        workload = Path(temporary) / "workload.npz"
        distillation_workload.write(workload, "mnist", DATA_DIR.value, steps=steps)
        pythons = {"kdjax": sys.executable, peer: PEER_PYTHON.value}
        with working(pythons, [len(cores())], workload, baselines="distillation_baselines") as workers:
            if missing := [worker for worker in workers if worker.absent]:
                raise ValueError(
                    f"{missing[0].contender} cannot be measured: {missing[0].absent}. Install it with pip install "
                    "'kdjax[bench]', or name the interpreter that has it in --peer_python."
                )
            ours, theirs = workers
            distillation_workload.check_losses({one.contender: one.ask("losses") for one in workers})
            for worker in workers:
                worker.ask("settle")
            seen = []
            for _ in tqdm(range(rounds), desc="rounds", disable=None):
                seen.append((ours.ask("steps"), ours.ask("sweep", students=students), theirs.ask("steps")))
    arms = {name: {"seconds": values} for name, values in sweeps(seen, peer, students).items()}
    together = min(MAPPED, key=lambda name: statistics.median(arms[name]["seconds"]))
    ratios = {
        f"{name} over {together}": over(metrics["seconds"], arms[together]["seconds"])
        for name, metrics in arms.items()
        if name != together
    }
    goals = [
        goal(f"the tutorial's loop takes ≥ {NEEDED}×", NEEDED, ratios[f"{peer}, {TUTORIAL} over {together}"])
    ]
    result = results.make(
        "sweep",
        question="How long does a sweep over ten mixing weights and three seeds take, beside the tutorial's loop?",
        flags={"peer": peer, "rounds": rounds, "students": students},
        seeds=list(range(rounds)),
        arms=arms,
        ratios=ratios,
        goals=goals,
        wall_clock_s=time.monotonic() - start,
        scaled_down=f"{students} students, {EPOCHS} epochs of {IMAGES:,} images, multiplied from timed steps of batch "
        f"{BATCH_SIZE}; networks have their initial weights",
        notes=[
            "Compiling is not counted. kdjax's times hold the computation of the teacher's answers, once for all "
            "students; those of the tutorial's loop with cached answers do too."
        ],
    )
    result["versions"] |= versions_of(distillation_workload.PACKAGES[peer], python=PEER_PYTHON.value)
    if OUTPUT.value is not None:
        results.write(OUTPUT.value, result)
    print_goals(goals)
    return result


def sweeps(seen: list[tuple[Any, Any, Any]], peer: str, students: int) -> dict[str, list[float]]:
    """Seconds of the whole sweep in every way, one number per round."""

    def one_by_one(steps: Any, form: str) -> float:
        answers = IMAGES * steps["precompute"]["wall"] if form == CACHED else 0.0
        return answers + students * STEPS * steps[form]["wall"]

    found: dict[str, list[float]] = {}
    for own, together, theirs in seen:
        answers = IMAGES * own["precompute"]["wall"]
        times = {name: answers + STEPS * together[form]["wall"] for name, form in MAPPED.items()}
        times[f"kdjax, {WITH_ANSWERS}"] = one_by_one(own, CACHED)
        times[f"{peer}, {WITH_ANSWERS}"] = one_by_one(theirs, CACHED)
        times[f"{peer}, {TUTORIAL}"] = one_by_one(theirs, ONLINE)
        for name, seconds in times.items():
            found.setdefault(name, []).append(seconds)
    return found


if __name__ == "__main__":
    cli.launch(main)
