r"""Is the curvature of a network faster here than with matfree, PyHessian, curvlinops or a loop in PyTorch?

    python -m experiments.benchmarks.curvature --torch_python=PYTHON --output=runs/benchmarks/curvature.json
    python -m experiments.benchmarks.curvature --smoke

Two networks at batch 128 in float32, an MLP of 178,110 parameters and a CNN of 188,810, random images, and the same
weights and images for all. Each contender is a process of its own (:mod:`experiments.benchmarks.curvature_baselines`);
each takes a turn in every round while the others wait. matfree is installed beside kdjax; torch, pyhessian and
curvlinops-for-pytorch in PYTHON, by default the one that runs this. The result names missing packages as absent.

It measures a gradient and products with the Hessian; a density of one start and so many Lanczos steps, from weights to
quadrature, in time and memory; its first call, which compiles; and how kdjax's density scales with parameters and
steps, beside the products alone. Before anything is timed, all must have the same loss and the same ends of the
spectrum, or the run stops. Ghosts are Ritz values that were found twice.

Ratios are a peer's time over that of kdjax's default loop in the same round, above 1 where kdjax is faster. With one
thread the clock is CPU time, which a busy machine disturbs least; with more it is the wall clock.

See docs/results/curvature.md for what to expect. `--smoke` runs the same code on tiny networks.
"""

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from experiments import cli
from experiments.benchmarks.curvature_baselines import COMPILED, HOST
from experiments.benchmarks.timing import (
    check_names,
    goal,
    label,
    note,
    over,
    print_goals,
    quotients,
    thread_counts,
)
from experiments.benchmarks.workers import Worker, versions_of, working
from kdjax import results

OUTPUT = flags.DEFINE_string("output", "runs/benchmarks/curvature.json", "Where to write the result.")
TORCH_PYTHON = flags.DEFINE_string("torch_python", None, "Interpreter that has PyTorch and its peers.")
PEERS = flags.DEFINE_list(
    "peers", ["matfree", "pyhessian", "curvlinops", "torch"], "Contenders to run beside kdjax."
)
NETWORKS = flags.DEFINE_list("networks", ["mlp", "cnn"], "Which of the two to measure.")
THREADS = flags.DEFINE_list(
    "threads", [], "Numbers of threads; by default 1 and 2, where there are two cores."
)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of every contender.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 60, "Lanczos steps of a density.", lower_bound=2)
SECONDS = flags.DEFINE_float("seconds", 2.0, "Length of one timing of products.", lower_bound=0.0)
SCALING = flags.DEFINE_bool("scaling", True, "Whether to measure scaling with parameters and steps.")
SMOKE = flags.DEFINE_bool("smoke", False, "Tiny networks, two rounds, forty steps.")

MODULE = "curvature_baselines"
JAX = ("kdjax", "matfree")  # run in the interpreter of this process
PACKAGES = {
    "matfree": "matfree",
    "pyhessian": "pyhessian",
    "curvlinops": "curvlinops-for-pytorch",
    "torch": "torch",
}
PARAMETERS, STEP_COUNTS = (10**4, 10**5, 10**6, 10**7), (10, 20, 40, 60, 80, 120)
SCALING_ROUNDS = 3
GHOST = 1e-6  # of the largest eigenvalue: Ritz values closer than this are one, found twice
PRODUCT_GOALS = {"linearised": 1.4, "cold": 1.8}  # gradients
DENSITY_GOALS = {
    "mlp": {"matfree": 2.5, "pyhessian": 1.0, "curvlinops": 1.0, "torch": 1.0},
    "cnn": {"matfree": 1.2, "pyhessian": 1.0, "torch": 1.0},
}


def pythons(workers: Sequence[str]) -> dict[str, str]:
    """Contender → the interpreter that has it."""
    return {x: sys.executable if x in JAX else TORCH_PYTHON.value or sys.executable for x in workers}


# Networks


def drawn(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    filters: Sequence[int],
    widths: Sequence[int],
    batch: int,
) -> dict[str, np.ndarray]:
    """Images, labels of 10 classes, and weights: 3×3 convolutions of so many filters, then dense layers."""
    found = {
        "images": rng.standard_normal((batch, *shape), np.float32),
        "labels": rng.integers(0, 10, batch),
    }
    side, inputs, shapes = shape[0], shape[-1], []
    for count in filters:
        shapes.append((3, 3, inputs, count))
        side, inputs = side // 2, count
    inputs *= side**2 if filters else 1
    for width in (*widths, 10):
        shapes.append((inputs, width))
        inputs = width
    gain = 2 if filters else 1
    for i, kernel in enumerate(shapes):
        scale = np.sqrt(gain / np.prod(kernel[:-1]))
        found[f"kernel{i}"] = (scale * rng.standard_normal(kernel)).astype(np.float32)
        found[f"bias{i}"] = np.zeros(kernel[-1], np.float32)
    return found


def size(network: Mapping[str, np.ndarray]) -> int:
    """Number of parameters."""
    return sum(x.size for name, x in network.items() if name.startswith(("kernel", "bias")))


def make_networks(smoke: bool) -> dict[str, dict[str, np.ndarray]]:
    """The MLP and the CNN, and MLPs of growing width named by their number of parameters."""
    rng = np.random.default_rng(0)
    if smoke:
        found = {"mlp": drawn(rng, (12,), (), (8,), 8), "cnn": drawn(rng, (8, 8, 3), (4, 4), (8,), 4)}
    else:
        found = {
            "mlp": drawn(rng, (784,), (), (200, 100), 128),
            "cnn": drawn(rng, (32, 32, 3), (32, 64, 64), (128,), 128),
        }
    for wanted in (200, 400) if smoke else PARAMETERS:
        # 64 inputs, two layers of one width w, 10 classes: w² + 76 w + 10 parameters
        width = round(np.sqrt(wanted + 38**2) - 38)
        network = drawn(rng, (64 if not smoke else 4,), (), (width, width), 16)
        found[f"{size(network)}"] = network
    return found


def write(path: Path, networks: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """One file of all of them."""
    arrays = {f"{name}/{part}": x for name, parts in networks.items() for part, x in parts.items()}
    np.savez(path, allow_pickle=False, **arrays)


# Agreement


def check_equal(network: str, losses: Mapping[str, float], ritz: Mapping[str, Sequence[float]]) -> float:
    """Refuses to compare workers that do not measure the same matrix.

    Starts are random, so only the ends of the spectrum are the same for all.

    Args:
      network: its name.
      losses: contender → loss.
      ritz: arm → Ritz values.

    Returns:
      The largest difference of an end met, as a fraction of the largest eigenvalue.

    Raises:
      ValueError: if losses differ by more than 1e-4, or ends by more than 1e-2 of the largest eigenvalue.
    """
    reference, worst = next(iter(losses.values())), 0.0
    for contender, loss in losses.items():
        if not abs(loss / reference - 1) < 1e-4:
            raise ValueError(f"{network}: {contender} has the loss {loss}, others {reference}.")
    first = next(iter(ritz.values()))
    largest = max(map(abs, first))
    for arm, values in ritz.items():
        difference = max(abs(min(values) - min(first)), abs(max(values) - max(first))) / largest
        if not difference < 1e-2:
            raise ValueError(
                f"{network}: {arm} finds eigenvalues from {min(values):.6g} to {max(values):.6g}, others from "
                f"{min(first):.6g} to {max(first):.6g}. A benchmark compares forms of the same Hessian."
            )
        worst = max(worst, difference)
    return worst


def ghosts(values: Sequence[float]) -> int:
    """How many Ritz values lie on their neighbour."""
    ordered = np.sort(np.asarray(values, np.float64))
    return int(np.sum(np.diff(ordered) < GHOST * np.max(np.abs(ordered))))


# Measuring


def measure(
    workers: Sequence[Worker], network: str, rounds: int, steps: int, seconds: float
) -> dict[str, Any]:
    """Everything of one network at one number of threads.

    Returns:
      "default", the arm of kdjax's default loop; "difference", of :func:`check_equal`; "first", arm → seconds of the
      first density; and "arms", arm → metric → one number per round.
    """
    loaded = {worker.contender: worker.ask("load", network=network) for worker in workers}
    first = {arm: worker.ask("first", arm=arm, steps=steps) for worker in workers for arm in worker.arms}
    ritz = {arm: answer["values"] for arm, answer in first.items()}
    difference = check_equal(network, {name: answer["loss"] for name, answer in loaded.items()}, ritz)
    arms: dict[str, dict[str, list[float]]] = {arm: {} for arm in first}
    for worker in workers:
        for arm in worker.arms:
            peak = worker.ask("memory", arm=arm, steps=steps)["peak_mib"]
            if peak is not None:
                arms[arm]["peak_mib"] = [peak] * rounds
    for turn in tqdm(range(rounds), desc=label(network, workers[0].threads), disable=None):
        for worker in list(workers)[:: -1 if turn % 2 else 1]:
            for arm in worker.arms:
                answer = worker.ask("density", arm=arm, steps=steps)
                note(arms[arm], "density", answer)
                arms[arm].setdefault("ghosts", []).append(ghosts(answer["values"]))
            for name, answer in worker.ask("products", seconds=seconds).items():
                note(arms.setdefault(f"{worker.contender} {name}", {}), "", answer)
    return {
        "default": loaded["kdjax"]["default"],
        "difference": difference,
        "first": {arm: answer["wall"] for arm, answer in first.items()},
        "arms": arms,
    }


def scale(workload: Path, networks: Sequence[str], steps: int, counts: Sequence[int], rounds: int) -> dict:
    """Densities of kdjax's default loop with one thread, beside as many products alone; arm → metric → numbers."""
    arms: dict[str, dict[str, list[float]]] = {}
    with working(pythons(["kdjax"]), [1], workload, baselines=MODULE) as (worker,):
        cases = [(network, steps) for network in networks] + [("mlp", count) for count in counts]
        for network, count in tqdm(cases, desc="scaling", disable=None):
            arm = worker.ask("load", network=network)["default"]
            metrics = arms.setdefault(f"scaling: {network}, {count} steps", {})
            worker.ask("first", arm=arm, steps=count)
            for _ in range(rounds):
                note(metrics, "density", worker.ask("density", arm=arm, steps=count))
                found = worker.ask("products", names=["linearised"], seconds=0.0)
                note(metrics, "product", found["linearised"])
            floor = [count * product for product in metrics["product_cpu_ms"]]
            metrics["over_floor"] = quotients(metrics["density_cpu_ms"], floor)
    return arms


# Ratios and goals


def judge(
    found: Mapping[str, Any], network: str, threads: int
) -> tuple[dict[str, dict], list[dict[str, Any]]]:
    """The ratios to the peers, and what became of each goal."""
    arms, suffix = found["arms"], "cpu_ms" if threads == 1 else "ms"
    where, density = label(network, threads), f"density_{suffix}"
    ours, ratios, goals = arms[found["default"]], {}, []

    def want(said: str, needed: float, ratio: dict[str, float], **how: bool) -> None:
        goals.append(goal(f"{where}: {said}", needed, ratio, **how))

    other = HOST if found["default"] == COMPILED else COMPILED
    for peer in (other, *PACKAGES):
        if peer not in arms:
            continue
        ratios[f"{where}: {peer}"] = ratio = over(arms[peer][density], ours[density])
        if "peak_mib" in ours:
            ratios[f"{where}: {peer} memory"] = over(arms[peer]["peak_mib"], ours["peak_mib"])
        needed = DENSITY_GOALS[network].get(peer)
        if needed:
            want(f"density ≥ {needed:g}× {peer}", needed, ratio)
    gradient = arms["kdjax gradient"][suffix]
    for name, needed in PRODUCT_GOALS.items():
        cost = over(arms[f"kdjax {name}"][suffix], gradient)
        want(f"a {name} product ≤ {needed:g} gradients", needed, cost, at_most=True)
    if "torch kept graph" in arms:
        pairs = {"torch gradient": "gradient", "torch kept graph": "linearised", "torch cold": "from scratch"}
        for theirs, mine in pairs.items():
            ratios[f"{where}: {theirs}"] = over(arms[theirs][suffix], arms[f"kdjax {mine}"][suffix])
    if "curvlinops operator" in arms:
        mine = arms["kdjax linearised"][suffix]
        ratios[f"{where}: curvlinops operator"] = over(arms["curvlinops operator"][suffix], mine)
    if "matfree" in arms:
        first = found["first"]
        ratios[f"{where}: matfree first call"] = over([first["matfree"]], [first[found["default"]]])
    found_twice = over(ours["ghosts"], [1] * len(ours["ghosts"]))
    want("no ghosts", 0, found_twice, at_most=True)
    return ratios, goals


def main() -> None:
    """Measures, writes the result and prints what was found."""
    start = time.monotonic()
    rounds, steps, seconds = (2, 40, 0.0) if SMOKE.value else (ROUNDS.value, STEPS.value, SECONDS.value)
    check_names("peers", PEERS.value, list(PACKAGES))
    check_names("networks", NETWORKS.value, list(DENSITY_GOALS))
    protocols = thread_counts(THREADS.value, smoke=SMOKE.value)
    arms, ratios, goals, firsts, absent, notes, grown, few = {}, {}, [], {}, {}, [], {}, []
    with tempfile.TemporaryDirectory() as temporary:
        workload = Path(temporary) / "workload.npz"
        networks = make_networks(SMOKE.value)
        write(workload, networks)
        for threads in protocols:
            with working(pythons(["kdjax", *PEERS.value]), [threads], workload, baselines=MODULE) as workers:
                absent |= {worker.contender: worker.absent for worker in workers if worker.absent}
                if "kdjax" in absent:
                    raise ValueError(f"kdjax cannot be measured: {absent['kdjax']}.")
                there = [worker for worker in workers if not worker.absent]
                for network in NETWORKS.value:
                    found = measure(there, network, rounds, steps, seconds)
                    more, judged = judge(found, network, threads)
                    ratios |= more
                    goals += judged
                    where = label(network, threads)
                    arms |= {f"{where}: {arm}": metrics for arm, metrics in found["arms"].items()}
                    firsts[where] = found["first"]
                    notes.append(
                        f"{where}: kdjax by default is {found['default']!r}; losses are equal, the spectrum's ends "
                        f"agree to {found['difference']:.1e} of the largest eigenvalue."
                    )
        if SCALING.value:
            growing = [name for name in networks if name not in DENSITY_GOALS]
            counts = (5, 10) if SMOKE.value else STEP_COUNTS
            grown = scale(workload, growing, steps, counts, min(rounds, SCALING_ROUNDS))
            arms |= grown
            few = list(range(min(rounds, SCALING_ROUNDS)))
    for contender, reason in absent.items():
        notes.append(f"{contender} was not measured: {reason}.")
        cli.say(notes[-1])
    content = results.make(
        "curvature",
        question="Is the curvature of a network faster here than with matfree, PyHessian, curvlinops or a loop in "
        "PyTorch?",
        flags={
            "rounds": rounds,
            "steps": steps,
            "seconds": seconds,
            "peers": PEERS.value,
            "networks": NETWORKS.value,
            "threads": protocols,
            "smoke": SMOKE.value,
        },
        seeds=range(rounds),
        arms=arms,
        arm_seeds=dict.fromkeys(grown, few),
        wall_clock_s=time.monotonic() - start,
        ratios=ratios,
        goals=goals,
        first_calls_s=firsts,
        absent=absent,
        notes=[
            *notes,
            "Ratios are of CPU time with one thread, else of wall-clock time, round by round. Seeds are rounds, not "
            "draws.",
            "curvlinops does not reorthogonalise; its search for the ends of the spectrum is not counted. PyHessian is "
            "the release with torch.linalg.eig in place of torch.eig.",
        ],
    )
    content["versions"] |= peer_versions([peer for peer in PEERS.value if peer not in absent])
    results.write(OUTPUT.value, content)
    print_goals(goals)
    print(f"written to {OUTPUT.value}")


def peer_versions(peers: Sequence[str]) -> dict[str, str]:
    """Package → version, in the interpreter that each runs in."""
    found = {}
    for peer, python in pythons(peers).items():
        found |= versions_of([PACKAGES[peer]], python=python)
    return found


if __name__ == "__main__":
    cli.launch(main)
