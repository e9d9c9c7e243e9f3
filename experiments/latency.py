r"""How long does one image take, in JAX and in the exported files?

    python -m experiments.latency --output=experiments/results/latency.json
    python -m experiments.latency --runtimes=jax,litert --threads=1 --output=experiments/results/latency_ladder.json \
        --networks=mobilenet_v2,mobilenet_v2_cut3,mobilenet_v2_cut5,mobilenet_v2_cut7,mobilenet_v2_cut9,\
    mobilenet_v2_cut11,mobilenet_v2_cut13,mobilenet_v2_cut15,mobilenet_v2_cut17
    python -m experiments.latency --bundles=teacher,student --output=runs/latency.json

Takes about half an hour. Networks of kdjax.models (with fresh weights: values don't matter for speed), or bundles of
experiments.export, are run on single images by JAX, LiteRT, LiteRT int8 and onnxruntime, where it is installed. Every
measurement is a process of its own, which holds nothing else; all of them take their turns in a random order, --rounds
times. Latency is that of warm calls: median and 95th percentile of a process, then the median over processes. The first
call and loading are listed beside it, and never called latency. Cores are pinned.

Goals: LiteRT at most .5 of JAX's median on one thread, and int8 at most .5 of LiteRT's.
"""

import importlib.util
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from experiments import cli
from experiments.benchmarks.timing import goal, over, print_goals, thread_counts
from kdjax import data, export, models, results
from kdjax.callbacks import bar
from kdjax.types import Normalisation, Weights

OUTPUT = flags.DEFINE_string("output", None, "Result file to write.", required=True)
NETWORKS = flags.DEFINE_list(
    "networks",
    [
        *("digits_teacher", "digits_student", "malaria_teacher", "malaria_student"),
        *("resnet20", "resnet8", "resnet8_w50", "mobilenet_v2_w25"),
    ],
    "Names in kdjax.models.MODELS.",
)
BUNDLES = flags.DEFINE_list("bundles", [], "Bundles in place of networks.")
RUNTIMES = flags.DEFINE_list("runtimes", ["jax", "litert", "litert_int8", "onnx"], "What to compare.")
THREADS = flags.DEFINE_list(
    "threads", [], "Numbers of threads; by default 1 and 2, where there are two cores."
)
ROUNDS = flags.DEFINE_integer("rounds", 3, "Processes per contender.", 1)
SECONDS = flags.DEFINE_float("seconds", 2.0, "Of warm calls in each process.", 0.0)
SMOKE = flags.DEFINE_bool("smoke", False, "The smallest network, one round.")

SHAPES = {
    "digits": (8, 8, 1),
    "keras": (28, 28, 1),
    "hinton": (28, 28, 1),
}  # by the first word of a network's name
DEFAULT_SHAPE = (32, 32, 3)
GOAL = 0.5


class Contender(NamedTuple):
    """One network in one runtime."""

    network: str
    runtime: str
    threads: int

    @property
    def arm(self) -> str:
        """Its name in the result."""
        return f"{self.network}, {self.runtime}, {self.threads} thread{'s' * (self.threads > 1)}"


class Untrained(NamedTuple):
    """A network as an export takes it."""

    network: models.Network
    weights: Weights
    normalisation: Normalisation


def main() -> dict[str, Any]:
    """Writes the files, measures all contenders, reports."""
    start = time.monotonic()
    runtimes, threads = available(), thread_counts(THREADS.value, smoke=SMOKE.value)
    seconds, rounds = (0.1, 1) if SMOKE.value else (SECONDS.value, ROUNDS.value)
    with tempfile.TemporaryDirectory() as directory:
        bundles = bundles_of(Path(directory), [name for name in runtimes if name != "jax"])
        contenders = [Contender(n, r, t) for n in bundles for r in runtimes for t in threads]
        found: dict[Contender, list[dict[str, Any]]] = {one: [] for one in contenders}
        order = random.Random(0)
        with bar("latency", total=rounds * len(contenders), unit="process") as meter:
            for _ in range(rounds):
                for one in order.sample(contenders, len(contenders)):
                    found[one].append(measured(one, bundles[one.network], seconds))
                    meter.update()
        arms = {one.arm: metrics_of(one, bundles[one.network], answers) for one, answers in found.items()}
    ratios = compared(arms, list(bundles), runtimes, threads)
    wanted = [name for name in ratios if "1 thread:" in name and "onnx" not in name]
    print_goals([goal(f"{name} ≥ {1 / GOAL:g}", 1 / GOAL, ratios[name]) for name in wanted])
    result = results.make(
        "latency",
        question="How long does one image take, in JAX and in the exported files?",
        flags={name: flag.value for name, flag in cli.flags_of(__name__).items() if name != "output"},
        seeds=list(range(rounds)),
        arms=arms,
        ratios=ratios,
        notes=[
            "Seeds are processes, not draws. Cores were pinned; each process ran alone among the contenders."
        ],
        wall_clock_s=time.monotonic() - start,
    )
    results.write(OUTPUT.value, result)
    cli.say(f"written to {OUTPUT.value}")
    return result


def available() -> list[str]:
    """--runtimes, without onnx where it is not installed, which is said."""
    known = [*export.FORMATS, "jax"]
    for name in RUNTIMES.value:
        if name not in known or name == "stablehlo":
            raise ValueError(f"--runtimes={name} is not known; there are jax, litert, litert_int8, onnx.")
    missing = [name for name in ("jax2onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if "onnx" in RUNTIMES.value and missing:
        cli.say(f"onnx is left out: {' and '.join(missing)} not installed; see docs/export.md.")
        return [name for name in RUNTIMES.value if name != "onnx"]
    return list(RUNTIMES.value)


def bundles_of(directory: Path, formats: Sequence[str]) -> dict[str, Path]:
    """A bundle with these formats for every network, or those of --bundles."""
    if BUNDLES.value:
        for path in BUNDLES.value:
            if lacking := set(formats) - set(export.load(path).description["formats"]):
                raise ValueError(
                    f"--bundles={path} has no {', '.join(sorted(lacking))}; export it with "
                    f"--formats={','.join(formats)}, or name other --runtimes."
                )
        return {Path(path).name: Path(path) for path in BUNDLES.value}
    found, rng = {}, np.random.default_rng(0)
    for name in ["digits_student"] if SMOKE.value else NETWORKS.value:
        shape = SHAPES.get(name.partition("_")[0], DEFAULT_SHAPE)
        network = models.from_linen(models.build(name, num_classes=10), shape)
        student = Untrained(
            network, Weights(*network.init(0)), Normalisation((0.5,) * shape[2], (0.25,) * shape[2])
        )
        dataset = data.split(
            data.from_arrays(rng.integers(0, 256, (200, *shape), np.uint8), np.arange(200) % 10)
        )
        limits = export.Limits(accuracy_drop=1.0)  # of labels drawn at random
        export.write(directory / name, student, dataset, formats=formats, limits=limits)
        found[name] = directory / name
    return found


def file_of(contender: Contender, bundle: Path) -> Path:
    """What a contender loads."""
    return bundle if contender.runtime == "jax" else bundle / export.FORMATS[contender.runtime].file


def measured(contender: Contender, bundle: Path, seconds: float) -> dict[str, Any]:
    """The answer of a new process."""
    module = "experiments.benchmarks.latency_contender"
    path = str(file_of(contender, bundle))
    command = [sys.executable, "-m", module, contender.runtime, path, str(contender.threads), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"{contender.arm} failed: {said}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def metrics_of(
    contender: Contender, bundle: Path, answers: Sequence[Mapping[str, Any]]
) -> dict[str, list[float]]:
    """Numbers of a contender, one per process."""
    path, network = file_of(contender, bundle), export.load(bundle).network
    path = path / "weights.npz" if contender.runtime == "jax" else path
    return {
        "latency_ms": [statistics.median(answer["warm_ms"]) for answer in answers],
        "p95_ms": [float(np.percentile(answer["warm_ms"], 95)) for answer in answers],
        "cold_ms": [answer["cold_ms"] for answer in answers],
        "load_ms": [answer["load_ms"] for answer in answers],
        "images": [len(answer["warm_ms"]) for answer in answers],
        "peak_mib": [answer["peak_mib"] for answer in answers],
        "file_kb": [path.stat().st_size / 1e3] * len(answers),
        "parameters": [network.num_parameters] * len(answers),
        "multiply_adds": [network.multiply_adds] * len(answers),
    }


def compared(
    arms: Mapping[str, Mapping[str, Sequence[float]]],
    networks: Sequence[str],
    runtimes: Sequence[str],
    threads: Sequence[int],
) -> dict[str, dict[str, float]]:
    """JAX's latency over LiteRT's, and LiteRT's over that of int8, process by process."""
    ratios = {}
    for network in networks:
        for slower, faster in (("jax", "litert"), ("litert", "litert_int8"), ("jax", "onnx")):
            for count in threads if {slower, faster} <= set(runtimes) else ():
                times = [arms[Contender(network, name, count).arm]["latency_ms"] for name in (slower, faster)]
                label = f"{network}, {count} thread{'s' * (count > 1)}: {slower} over {faster}"
                ratios[label] = over(*times)
    return ratios


if __name__ == "__main__":
    cli.launch(main)
