r"""Are integrated gradients of a trained network faster here than with captum or a loop in PyTorch, map for map?

    python -m experiments.benchmarks.attributions --data_dir=data --torch_python=PYTHON \
        --output=runs/benchmarks/attributions.json
    python -m experiments.benchmarks.attributions --smoke

A ResNet-8 and a MobileNetV2 of a quarter of the width explain 64 images of CIFAR-10. They are trained for a few epochs
first, since an untrained network is nearly linear along a path and needs few nodes; --workdir keeps them. Each
contender is a process of its own with the same weights and images
(:mod:`experiments.benchmarks.attributions_baselines`), and takes a turn in every round. PYTHON, by default the one that
runs this, has torch and captum; the result names missing packages as absent.

After a check that all maps agree, it measures:

- Time and memory of 50 nodes by captum's default rule: captum's default call, which takes all nodes in one batch (left
  out where it would not fit into memory), captum in chunks, a loop by hand, kdjax, and as many gradients alone (the
  floor); also kdjax's first call, which compiles.
- Residual and map error of each rule at several numbers of nodes ("swept"). The error is
  |map - reference| / |reference| of signed values in the 2-norm per image; the reference has many midpoints.
- Time to an equal residual ("equal"): captum at the fewest nodes at which the 90 % quantile over the images of
  |sum of the map - difference of scores| / |difference of scores| is at most a bound, in its best chunks, by its
  default rule or its riemann_middle, whichever needs fewer; the notes name both. Every number up to 32 is tried, since
  residuals do not fall evenly; more are doubled, then bisected. Beside it
  kdjax.attributions.adaptive_integrated_gradients with that bound for every image. captum's default call is
  extrapolated from 50 nodes. A sum may be right where the map is not, so the errors of both maps are listed, and the
  nodes that captum needs for the adaptive map's error.
- Images per second of computing and caching adaptive maps ("filled"), and the hours that 50,000 images would take.

Ratios are a peer's time over kdjax's in the same round, above 1 where kdjax is faster; of CPU time with one thread,
which a busy machine disturbs least, else of wall-clock time.

Expect more than an hour on two cores, training included; `--smoke` runs the same code on four digits and few nodes.
"""

import statistics
import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax.traverse_util import flatten_dict
from tqdm import tqdm

from experiments import cli
from experiments.benchmarks.attribution_metrics import (
    DEFAULT,
    FLOOR,
    Quality,
    adaptive_arm,
    captum_arm,
    check_equal,
    clock_of,
    judge,
    map_errors,
    reaches,
    relative_residuals,
    summary,
    uniform_arm,
    uniform_nodes,
    with_times,
)
from experiments.benchmarks.attributions_baselines import CAPTUM_RULES, TWINS, Problem, write
from experiments.benchmarks.timing import check_names, label, note, print_goals, thread_counts
from experiments.benchmarks.workers import Worker, free_mib, versions_of, working
from kdjax import data, methods, models, results, run, teacher
from kdjax.callbacks import ProgressBar
from kdjax.recipe import Recipe
from kdjax.teacher.maps import ROWS

OUTPUT = flags.DEFINE_string("output", "runs/benchmarks/attributions.json", "Where to write the result.")
WORKDIR = flags.DEFINE_string("workdir", "runs/benchmarks/attributions", "Keeps the trained networks.")
TORCH_PYTHON = flags.DEFINE_string("torch_python", None, "Interpreter that has PyTorch and captum.")
PEERS = flags.DEFINE_list("peers", ["captum", "torch"], "Contenders to run beside kdjax.")
NETWORKS = flags.DEFINE_list(
    "networks", ["resnet8", "mobilenet_v2_w25"], "ResNets and MobileNetV2s of kdjax.models."
)
DATASET = flags.DEFINE_string("dataset", "cifar10", "As in experiments.distill; not digits.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Where the prepared TFDS data set lies.")
NUM_TRAIN = flags.DEFINE_integer("num_train", 5000, "Images that the networks are trained on.", 16)
EPOCHS = flags.DEFINE_integer("epochs", 6, "Epochs that the networks are trained for.", lower_bound=1)
IMAGES = flags.DEFINE_integer("images", 64, "Images to explain.", lower_bound=2)
NODES = flags.DEFINE_integer("nodes", 50, "Nodes of the comparison at fixed nodes.", lower_bound=1)
CHUNKS = flags.DEFINE_list("chunks", ["1", "5"], "Nodes that captum takes at once, beside all of them.")
BOUNDS = flags.DEFINE_list("bounds", ["0.1", "0.05", "0.02"], "Of the relative residual.")
MOST = flags.DEFINE_integer("most", 512, "Nodes at which the search for captum's number gives up.", 16)
REFERENCE = flags.DEFINE_integer("reference_nodes", 1000, "Midpoints of the reference maps.", lower_bound=1)
FILL = flags.DEFINE_integer("fill_images", 3 * ROWS, "Images whose maps are cached; 0 for none.", 0)
THREADS = flags.DEFINE_list(
    "threads", [], "Numbers of threads; by default 1 and 2, where there are two cores."
)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of every contender.", lower_bound=1)
SMOKE = flags.DEFINE_bool("smoke", False, "Four digits, one epoch, few nodes, two rounds.")

PACKAGES = {"captum": ["captum", "torch"], "torch": ["torch"]}
RULES = ("gauss_legendre", "midpoint", "trapezoid")
FEWEST = 2  # nodes of captum's midpoints
NEEDED = ("uniform_nodes", "uniform_nodes_of_equal_map_error")
SCANNED = 32  # nodes, up to which every number is tried
EQUAL_ROUNDS = 3  # hundreds of nodes take long
CIFAR = 50_000
FREE_SHARE = 0.8  # of the free memory that a call may take


class Sizes(NamedTuple):
    """What --smoke makes smaller."""

    dataset: str
    num_train: int
    epochs: int
    images: int
    nodes: int
    rule_nodes: tuple[int, ...]
    most: int
    reference: int
    fill: int
    rounds: int


def sizes() -> Sizes:
    """The sizes of the flags."""
    if SMOKE.value:
        return Sizes("digits", 128, 1, 4, 6, (4, 8), 64, 128, min(FILL.value, 4), 2)
    return Sizes(
        *(DATASET.value, NUM_TRAIN.value, EPOCHS.value, IMAGES.value, NODES.value, (8, 16, 32, 64, 128)),
        *(MOST.value, REFERENCE.value, FILL.value, ROUNDS.value),
    )


# Networks


def make_networks(dataset: data.Dataset, size: Sizes, workdir: Path) -> dict[str, run.Trained]:
    """Trains the networks, or reads them back."""
    photographs = not SMOKE.value and dataset.image_shape[-1] == 3
    recipe = Recipe(
        epochs=size.epochs,
        batch_size=min(64, size.num_train),
        learning_rate=2e-3,
        schedule="cosine",
        padding=4 if photographs else 0,
        flip=photographs,
        evaluate_every=size.epochs,  # once, for the note
    )
    found = {}
    for name in NETWORKS.value:
        network = cli.network(name, dataset)
        train = run.make_trainer(network, methods.labels(), dataset, recipe, split="validation")
        found[name] = train(0, workdir / name, arm=name, callbacks=[ProgressBar()])
    return found


def problem_of(dataset: data.Dataset, network: run.Trained, images: int) -> Problem:
    """The first images of the validation split as this network takes them, and its weights."""
    ids = dataset.splits["validation"][:images]
    if len(ids) < images:
        raise ValueError(f"--images={images} are more than the {len(ids)} of {dataset.name}'s validation.")
    inputs = data.normalise(jnp.asarray(dataset.images[ids]), **network.normalisation._asdict())
    weights = jax.device_get(network.weights)
    flat = flatten_dict({"params": weights.params, **weights.model_state}, sep="/")
    named = {path: np.asarray(x) for path, x in flat.items()}
    return Problem(network.network.name, np.asarray(inputs), dataset.labels[ids].astype(np.int32), named)


# Measuring

Arms: TypeAlias = dict[str, tuple[Worker, dict[str, Any]]]
"""Name → who computes attributions, with which options."""


def fixed_arms(workers: Sequence[Worker], nodes: int, chunks: Sequence[int]) -> Arms:
    """All arms with a fixed number of nodes."""
    found: Arms = {}
    for worker in workers:
        for arm in worker.arms:
            if arm != "captum":
                found[arm] = worker, {"nodes": nodes}
            else:
                found[DEFAULT] = worker, {"nodes": nodes, "chunk": None}
                found |= {captum_arm(chunk): (worker, {"nodes": nodes, "chunk": chunk}) for chunk in chunks}
    return found


class Explained(NamedTuple):
    """Attributions of all images, the nodes of each, and seconds."""

    values: np.ndarray
    nodes: list[int]
    seconds: float


def explain(worker: Worker, folder: Path, **options: Any) -> Explained:
    """Asks a worker for attributions, which it returns in a file."""
    path = folder / "maps.npy"
    answer = worker.ask("explain", options=options, into=str(path))
    return Explained(np.load(path, allow_pickle=False), answer["nodes"], answer["wall"])


def too_large(captum: Worker, options: Mapping[str, Any], nodes: int, chunk: int) -> str | None:
    """A note if all nodes at once would exceed this machine's memory, judged by a chunk's; else None."""
    chunk_alone = {**options, "nodes": chunk}
    captum.ask("explain", options=chunk_alone)  # the first call allocates more, permanently
    peak, free = captum.ask("memory", options=chunk_alone)["peak_mib"], free_mib()
    if peak is None or free is None or peak * nodes / chunk <= FREE_SHARE * free:
        return None
    return (
        f"captum's default call was left out: it would hold about {peak * nodes / chunk:,.0f} MiB, and {free:,.0f} are "
        "free. Fewer --images fit."
    )


class Begun(NamedTuple):
    """A network that all workers have loaded, and what the first call of every arm returned."""

    network: str
    differences: dict[str, np.ndarray]  # contender → score of each image less that of its baseline
    fixed: Arms
    adaptive: Arms
    first: dict[str, Explained]  # by arm
    left_out: str | None  # why captum's default call is not made


def begin(
    workers: Sequence[Worker],
    network: str,
    size: Sizes,
    chunks: Sequence[int],
    bounds: Sequence[float],
    folder: Path,
) -> Begun:
    """Loads a network everywhere, and calls every arm once."""
    loaded = {worker.contender: worker.ask("load", network=network)["difference"] for worker in workers}
    fixed, left_out = fixed_arms(workers, size.nodes, chunks), None
    if DEFAULT in fixed:
        left_out = too_large(*fixed[captum_arm(chunks[0])], size.nodes, chunks[0])
        if left_out:
            del fixed[DEFAULT]
    adaptive: Arms = {adaptive_arm(bound): (fixed["kdjax"][0], {"bound": bound}) for bound in bounds}
    first = {arm: explain(worker, folder, **options) for arm, (worker, options) in (fixed | adaptive).items()}
    differences = {contender: np.asarray(x) for contender, x in loaded.items()}
    return Begun(network, differences, fixed, adaptive, first, left_out)


def fewest_nodes(passes: Callable[[int], bool], most: int) -> int | None:
    """The fewest nodes that pass: the first up to SCANNED, else doubled, then bisected; None beyond ``most``."""
    low = min(SCANNED, most)
    scanned = next((nodes for nodes in range(FEWEST, low + 1) if passes(nodes)), None)
    if scanned is not None:
        return scanned
    while low < most:
        high = min(2 * low, most)
        if passes(high):
            return low + 1 + bisect_left(range(low + 1, high), True, key=passes)
        low = high
    return None


def assess(
    begun: Begun, size: Sizes, chunk: int, bounds: Sequence[float], folder: Path
) -> tuple[dict[str, dict], list[dict[str, Any]]]:
    """How accurate maps are; nothing here is timed.

    Returns:
      Rule → metric → a number per number of nodes; and a row per bound of what adaptive and uniform nodes reach.
    """
    (ours, _), difference = begun.fixed["kdjax"], begun.differences["kdjax"]
    reference = explain(ours, folder, nodes=size.reference, rule="midpoint").values

    def judged(values: np.ndarray) -> Quality:
        return Quality(relative_residuals(values, difference), map_errors(values, reference))

    rules: dict[str, dict[str, list[list[float]]]] = {}
    for rule in RULES:
        for nodes in size.rule_nodes:
            quality = judged(explain(ours, folder, nodes=nodes, rule=rule).values)
            for metric, number in quality.summary().items():
                rules.setdefault(rule, {}).setdefault(metric, []).append([number])
    adaptive = {bound: judged(begun.first[adaptive_arm(bound)].values) for bound in bounds}
    # Without captum kdjax computes the same rules, so that the search is the same.
    options, worker = {}, ours
    if captum_arm(chunk) in begun.fixed:
        options, worker = {"chunk": chunk}, begun.fixed[captum_arm(chunk)][0]
    uniform: dict[str, dict[int, Quality]] = {rule: {} for rule in CAPTUM_RULES}

    def passes(rule: str, which: int, bound: float, nodes: int) -> bool:
        if nodes not in uniform[rule]:
            uniform[rule][nodes] = judged(explain(worker, folder, nodes=nodes, rule=rule, **options).values)
        return uniform_nodes({nodes: uniform[rule][nodes]}, bound, adaptive[bound])[which] is not None

    rows = []
    for bound, quality in adaptive.items():
        by_rule = {
            name: {
                rule: fewest_nodes(partial(passes, rule, which, bound), size.most) for rule in CAPTUM_RULES
            }
            for which, name in enumerate(NEEDED)
        }
        took = begun.first[adaptive_arm(bound)].nodes
        row = {
            "network": begun.network,
            "bound": bound,
            "adaptive": {
                "nodes_mean": statistics.mean(took),
                "nodes_largest": max(took),
                "within": float(np.mean(quality.residuals <= bound)),
                "reached": reaches(quality.residuals, bound),
                **quality.summary(),
            },
            "by_rule": by_rule,
        }
        for name, found in by_rule.items():
            nodes, rule = min(((n, rule) for rule, n in found.items() if n is not None), default=(None, None))
            row |= {name: nodes, name.replace("nodes", "rule"): rule}
        if row["uniform_rule"]:
            row["uniform"] = uniform[row["uniform_rule"]][row["uniform_nodes"]].summary()
        rows.append(row)
    return rules, rows


def measure(
    begun: Begun, size: Sizes, rows: Sequence[Mapping[str, Any]], chunks: Sequence[int], where: str
) -> dict[str, Any]:
    """All times of one network at one number of threads.

    Returns:
      "best", captum's fastest chunk, if captum is there; "fixed" and "equal", arm → metric → one number per round.
    """
    ours, _ = begun.fixed["kdjax"]
    ours.ask("explain", options={"gradients": 1})  # compiles
    fixed = in_rounds({FLOOR: (ours, {"gradients": size.nodes})} | begun.fixed, size.rounds, where)
    speed = clock_of(ours.threads)
    by_chunk = {chunk: fixed[captum_arm(chunk)][speed] for chunk in chunks if captum_arm(chunk) in fixed}
    best = min(by_chunk, key=lambda chunk: statistics.median(by_chunk[chunk])) if by_chunk else None
    turns = dict(begun.adaptive)
    if best is not None:
        captum, _ = begun.fixed[captum_arm(best)]
        # By the rule that needs them; as many nodes take as long by the other.
        needed = {
            row[name]: row[name.replace("nodes", "rule")] for row in rows for name in NEEDED if row[name]
        }
        turns |= {
            uniform_arm(n): (captum, {"nodes": n, "chunk": best, "rule": needed[n]}) for n in sorted(needed)
        }
    later = in_rounds(turns, min(size.rounds, EQUAL_ROUNDS), f"{where}, equal residual")
    for arm, (worker, options) in (begun.fixed | begun.adaptive).items():
        peak = worker.ask("memory", options=options)["peak_mib"]
        if peak is not None:
            metrics = (later if arm in later else fixed)[arm]
            metrics["peak_mib"] = [peak] * len(metrics["ms"])
    return {"best": best, "fixed": fixed, "equal": later}


def in_rounds(arms: Arms, rounds: int, where: str) -> dict[str, dict[str, list[float]]]:
    """Arm → milliseconds; each arm has one turn in every round, in an order that alternates."""
    metrics: dict[str, dict[str, list[float]]] = {arm: {} for arm in arms}
    for turn in tqdm(range(rounds), desc=where, disable=None):
        for arm in list(arms)[:: -1 if turn % 2 else 1]:
            worker, options = arms[arm]
            note(metrics[arm], "", worker.ask("explain", options=options))
    return metrics


def caching(dataset: data.Dataset, network: run.Trained, images: int) -> dict[str, Any]:
    """How fast adaptive maps are computed and cached on all cores, as experiments do it.

    With more images than one file holds, the rate is that of the files after the first, without what every call begins
    with, such as compiling.
    """

    def call(count: int) -> tuple[float, teacher.Explanations]:
        few = dataset._replace(splits={**dataset.splits, "train": dataset.splits["train"][:count]})
        with tempfile.TemporaryDirectory() as directory:
            start = time.perf_counter()
            found = teacher.explain(network, few, directory=Path(directory) / "maps")
            return time.perf_counter() - start, found

    start = min(images, ROWS)
    first_seconds, _ = call(start)
    seconds, found = call(images)
    rate = images / seconds
    if images > ROWS:
        rate = (images - start) / max(seconds - call(start)[0], 1e-9)
    return {
        "network": network.network.name,
        "images": images,
        "images_per_second": rate,
        f"hours_of_{CIFAR}_extrapolated": CIFAR / rate / 3600,
        "first_call_s": first_seconds,
        "nodes_mean": float(np.mean(found.nodes)),
        **summary("relative_residual", found.residual),
    }


# The result


def numbers(flag: flags.FlagHolder, kind: Callable[[str], Any]) -> list[Any]:
    """A list flag as rising numbers above 0."""
    try:
        found = sorted({kind(x) for x in flag.value})
    except ValueError:
        found = []
    if not found or found[0] <= 0:
        example = "1,5" if kind is int else "0.1,0.05"
        raise ValueError(
            f"--{flag.name}={','.join(flag.value)} needs numbers above 0, such as --{flag.name}={example}."
        )
    return found


def check_flags() -> None:
    """Refuses what cannot be measured, before anything is trained."""
    check_names("peers", PEERS.value, list(PACKAGES))
    check_names("networks", NETWORKS.value, sorted(name for name in models.MODELS if name.startswith(TWINS)))
    if not SMOKE.value and DATASET.value == "digits":
        raise ValueError(
            "--dataset=digits has images of 8x8 pixels, on which times mean nothing; write --smoke, or "
            "--dataset=cifar10 --data_dir=data."
        )


def measured(
    workers: Sequence[Worker],
    network: str,
    size: Sizes,
    chunks: Sequence[int],
    bounds: Sequence[float],
    assessed: dict[str, Any],
) -> dict[str, Any]:
    """Fields of the result about one network at one number of threads; ``assessed`` keeps :func:`assess` of each."""
    threads = workers[0].threads
    where, turns = label(network, threads), list(range(min(size.rounds, EQUAL_ROUNDS)))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        begun = begin(workers, network, size, chunks, bounds, folder)
        maps = {arm: begun.first[arm].values for arm in begun.fixed}
        difference = check_equal(network, maps, begun.differences)
        if network not in assessed:
            assessed[network] = assess(begun, size, chunks[0], bounds, folder)
    rules, rows = assessed[network]
    found = measure(begun, size, rows, chunks, where)
    ratios, goals = judge(found, rows, where, threads, size.nodes)
    notes = [f"{where}: maps of {size.nodes} nodes agree to {difference:.1e} of their size."]
    if begun.left_out:
        notes.append(f"{where}: {begun.left_out}")
    if found["best"] is not None:
        notes.append(f"{where}: captum's best chunk is {found['best']} nodes of all images.")
    return {
        "arms": {f"{where}: {arm}": x for arm, x in (found["fixed"] | found["equal"]).items()},
        "arm_seeds": {f"{where}: {arm}": turns for arm in found["equal"]},
        "ratios": ratios,
        "goals": goals,
        "first_calls_s": {where: {arm: x.seconds for arm, x in begun.first.items()}},
        "equal": [with_times(row, found["equal"], threads, size.images) for row in rows],
        "rules": {f"{network}: {rule}": x for rule, x in rules.items()},
        "notes": notes,
    }


def merge(fields: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Adds lists to lists and dicts to dicts."""
    for name, value in more.items():
        fields[name] = fields[name] + value if isinstance(value, list) else fields.get(name, {}) | value


def main() -> None:
    """Measures, writes the result and prints what was found."""
    start = time.monotonic()
    check_flags()
    size, chunks, bounds = sizes(), numbers(CHUNKS, int), numbers(BOUNDS, float)[::-1]
    protocols = thread_counts(THREADS.value, smoke=SMOKE.value)
    num_train = max(size.num_train, size.fill)
    loaded = data.load(size.dataset, data_dir=DATA_DIR.value)
    dataset = data.split(loaded, num_train=num_train, num_validation=size.images if SMOKE.value else 0)
    decides = {"dataset": size.dataset, "num_train": num_train, "epochs": size.epochs, "smoke": SMOKE.value}
    workdir = cli.claim_workdir(WORKDIR.value, decides | {"data": dataset.fingerprint})
    networks = make_networks(dataset, size, workdir)
    torch = TORCH_PYTHON.value or sys.executable
    pythons = {"kdjax": sys.executable} | dict.fromkeys(PEERS.value, torch)
    fields: dict[str, Any] = {"goals": [], "equal": [], "notes": [], "absent": {}, "filled": []}
    assessed: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        workload = Path(temporary) / "workload.npz"
        write(workload, {name: problem_of(dataset, one, size.images) for name, one in networks.items()})
        for threads in sorted(protocols, reverse=True):  # maps are assessed once, with most threads
            with working(pythons, [threads], workload, baselines="attributions_baselines") as workers:
                fields["absent"] |= {worker.contender: worker.absent for worker in workers if worker.absent}
                if "kdjax" in fields["absent"]:
                    raise ValueError(f"kdjax cannot be measured: {fields['absent']['kdjax']}.")
                there = [worker for worker in workers if not worker.absent]
                for network in networks:
                    merge(fields, measured(there, network, size, chunks, bounds, assessed))
    for network in list(networks.values())[: 1 if SMOKE.value else None] if size.fill else []:
        row, arm = caching(dataset, network, size.fill), f"{network.network.name}: filling"
        rate = {"arms": {arm: {"images_per_second": [row["images_per_second"]]}}, "arm_seeds": {arm: [0]}}
        merge(fields, {"filled": [row], **rate})
    rules, notes = fields.pop("rules"), fields.pop("notes")
    absent = [f"{contender} was not measured: {reason}." for contender, reason in fields["absent"].items()]
    given = {"networks": NETWORKS.value, "peers": PEERS.value, "chunks": chunks, "bounds": bounds}
    content = results.make(
        "attributions",
        question="Are integrated gradients of a trained network faster here than with captum or a loop in PyTorch, map "
        "for map?",
        flags={**size._asdict(), **given, "threads": protocols, "smoke": SMOKE.value},
        seeds=range(size.rounds),
        wall_clock_s=time.monotonic() - start,
        scaled_down=f"filling {CIFAR:,} images is extrapolated from {size.fill:,}" if size.fill else "",
        swept=[{"name": "nodes", "values": list(size.rule_nodes), "arms": rules}],
        notes=[*absent, *notes, *remarks(fields["equal"], networks, size)],
        **fields,
    )
    packages = sorted({x for peer in PEERS.value if peer not in fields["absent"] for x in PACKAGES[peer]})
    content["versions"] |= versions_of(packages, python=torch)
    results.write(OUTPUT.value, content)
    for sentence in (*absent, *notes):
        cli.say(sentence)
    print_goals(fields["goals"])
    for row in fields["filled"]:
        rate, hours = row["images_per_second"], row[f"hours_of_{CIFAR}_extrapolated"]
        print(f"{row['network']}: {rate:.1f} maps a second are cached, {hours:.1f} hours for {CIFAR:,}")
    print(f"written to {OUTPUT.value}")


def remarks(
    equal: Sequence[Mapping[str, Any]], networks: Mapping[str, run.Trained], size: Sizes
) -> list[str]:
    """Notes for the reader of the numbers."""
    found: dict[str, None] = {}
    for row in equal:
        for name, by_rule in row["by_rule"].items():
            reached = f"{'' if name == NEEDED[0] else 'the map error as at '}residual ≤ {row['bound']:g}"
            nodes = [f"{n or f'over {size.most}'} by {CAPTUM_RULES[rule]}" for rule, n in by_rule.items()]
            found[f"{row['network']}: captum's fewest nodes for {reached}: {', '.join(nodes)}."] = None
        end = f"does not reach a residual of {row['bound']:g}; no time is compared there."
        if row["uniform_nodes"] is None:
            found[f"{row['network']}: captum, with {size.most} nodes, {end}"] = None
        if not row["adaptive"]["reached"]:
            found[f"{row['network']}: the adaptive one, with the most that it takes, {end}"] = None
    return [
        *(f"{name}: validation accuracy {one.metrics['accuracy']:.1%}." for name, one in networks.items()),
        *found,
        "Ratios are of CPU time with one thread, else of wall-clock time, round by round. Seeds are rounds, not draws.",
        "A time of kdjax includes the residual of every image, one of captum does not. Not counted are the search for "
        "captum's number of nodes and kdjax's first calls, which are in first_calls_s.",
        "A residual under the bound is not a map error: adaptive nodes are chosen by the residual, which flatters "
        'them. The errors of both maps are in "equal"; uniform_nodes_of_equal_map_error are those with which '
        "captum has at most the adaptive maps' median error, or null.",
        "Adaptive steps serve every image that they can, uniform nodes nine of ten. Maps are cached on all cores.",
    ]


if __name__ == "__main__":
    cli.launch(main)
