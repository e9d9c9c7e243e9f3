r"""Are integrated gradients of a trained network faster here than with captum or a loop in PyTorch, map for map?

    python -m experiments.benchmarks.attributions --data_dir=data --torch_python=PYTHON \
        --output=runs/benchmarks/attributions.json
    python -m experiments.benchmarks.attributions --smoke

A ResNet-8 and a MobileNetV2 of a quarter of the width explain 64 images of CIFAR-10. An untrained network is nearly
linear along a path and needs few nodes, so both are trained for a few epochs first, or taken from --teacher_dirs; what
is trained stays in --workdir and is not trained again. Each contender is a process of its own with the same weights and
images (:mod:`experiments.benchmarks.attributions_baselines`); each takes a turn in every round.
PYTHON, by default the one that runs this, has torch and captum; what is missing is named in the result as absent.

Measured are, after a check that all maps agree:

- 50 nodes of captum's default rule in time and memory: captum's default call, which takes all nodes in one batch (left
  out where it would not fit into memory), its chunks, a loop by hand, kdjax with its first call; and the floor, as many
  gradients and nothing else.
- Each rule's residual and map error at several numbers of nodes ("swept").
- The time to an equal residual: captum at the fewest nodes, doubled from 16, at which the 90 % quantile over the images
  of |sum of the map - difference of scores| / |difference of scores| is at most a bound, in its best chunks; beside
  kdjax.attributions.adaptive_integrated_gradients with that bound for every image ("equal"), if its maps reach it by
  the same quantile. captum's default call is extrapolated there from 50 nodes. A sum may be right where
  the map is not, so the error of both maps stands beside it: of signed values, |map - reference| / |reference| in the
  2-norm per image, with many midpoints for reference; and the nodes that captum's rule needs for that error.
- The images per second at which a teacher's columns of such maps are filled, and the hours that 50,000 would take.

Ratios are a peer's time over kdjax's in the same round, above 1 where kdjax is faster. With one thread the clock is CPU
time, which a busy machine disturbs least; with more it is the wall clock.

Expect more than an hour on two cores, training included; `--smoke` runs the same code on four digits and few nodes.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax.traverse_util import flatten_dict
from tqdm import tqdm

from experiments import common
from experiments.benchmarks.attribution_metrics import (
    Quality,
    check_equal,
    map_errors,
    reaches,
    relative_residuals,
    summary,
    uniform_nodes,
)
from experiments.benchmarks.attributions_baselines import TWINS, Problem, write
from experiments.benchmarks.workers import (
    Worker,
    free_mib,
    goal,
    note,
    over,
    tell,
    thread_counts,
    versions_of,
    working,
)
from experiments.common.explaining import ROWS
from kdjax import data, models, results

OUTPUT = flags.DEFINE_string("output", "runs/benchmarks/attributions.json", "Where to write the result.")
WORKDIR = flags.DEFINE_string(
    "workdir", "runs/benchmarks/attributions", "Where trained networks are kept for the next run."
)
TORCH_PYTHON = flags.DEFINE_string("torch_python", None, "Interpreter that has PyTorch and captum.")
PEERS = flags.DEFINE_list("peers", ["captum", "torch"], "Contenders to run beside kdjax.")
NETWORKS = flags.DEFINE_list(
    "networks", ["resnet8", "mobilenet_v2_w25"], "Any ResNets and MobileNetV2s of kdjax.models."
)
DATASET = flags.DEFINE_string(
    "dataset", "cifar10", "What kdjax.data.load knows, such as cifar10 or the path of an .npz file."
)
DATA_DIR = flags.DEFINE_string("data_dir", None, "Root of the prepared TFDS data sets.")
TEACHER_DIRS = flags.DEFINE_list(
    "teacher_dirs",
    [],
    "Trained networks, such as runs/one/teacher/0, in place of training those of that name.",
)
NUM_TRAIN = flags.DEFINE_integer("num_train", 5000, "Images to train the networks on.", lower_bound=1)
EPOCHS = flags.DEFINE_integer("epochs", 6, "Of that training.", lower_bound=1)
IMAGES = flags.DEFINE_integer("images", 64, "Images to explain, of the validation split.", lower_bound=1)
NODES = flags.DEFINE_integer("nodes", 50, "Fixed nodes.", lower_bound=1)
CHUNKS = flags.DEFINE_list("chunks", ["1", "5"], "Nodes that captum takes at once, beside all of them.")
BOUNDS = flags.DEFINE_list("bounds", ["0.1", "0.05", "0.02"], "Of the relative residual.")
MOST = flags.DEFINE_integer("most", 512, "Nodes at which the search for captum's number gives up.", 16)
REFERENCE = flags.DEFINE_integer("reference_nodes", 1000, "Midpoints of the reference maps.", lower_bound=1)
FILL = flags.DEFINE_integer("fill_images", 3 * ROWS, "Images whose columns are filled; 0 for none.", 0)
THREADS = flags.DEFINE_list(
    "threads", [], "Numbers of threads; by default 1 and 2, where there are two cores."
)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of every contender.", lower_bound=1)
SMOKE = flags.DEFINE_bool("smoke", False, "Four digits, one epoch, few nodes, two rounds.")

PACKAGES = {"captum": ["captum", "torch"], "torch": ["torch"]}
RULES = ("gauss_legendre", "midpoint", "trapezoid")
RULE_NODES = (8, 16, 32, 64, 128)
FEWEST = 16  # nodes, from which captum's are doubled
EQUAL_ROUNDS = 3  # hundreds of nodes take long
DEFAULT, FLOOR = "captum default", "kdjax gradients"
GOALS = {DEFAULT: 2.0, "captum's best chunk": 1.0}  # times kdjax
FLOOR_GOAL = 1.1
CIFAR = 50_000
FREE_SHARE = 0.8  # of the free memory, beyond which a call might end other processes


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
    """Those of the flags."""
    if SMOKE.value:
        return Sizes("digits", 128, 1, 4, 6, (4, 8), 64, 128, min(FILL.value, 4), 2)
    return Sizes(
        *(DATASET.value, NUM_TRAIN.value, EPOCHS.value, IMAGES.value, NODES.value, RULE_NODES),
        *(MOST.value, REFERENCE.value, FILL.value, ROUNDS.value),
    )


# ----------------------------------------------------------------------------------------- the networks


def make_networks(task: common.Task, size: Sizes, workdir: Path) -> dict[str, common.Teacher]:
    """Trains the networks, or takes them up again."""
    found = {}
    for directory in TEACHER_DIRS.value:
        teacher = common.load_teacher(task, directory, split="validation")
        if teacher.name not in NETWORKS.value:
            raise ValueError(
                f"--teacher_dirs={directory} is a {teacher.name}, which --networks={','.join(NETWORKS.value)} does "
                "not name; add it there."
            )
        found[teacher.name] = teacher
    photographs = not SMOKE.value and task.source.images.shape[-1] == 3
    recipe = common.Recipe(
        epochs=size.epochs,
        batch_size=min(64, size.num_train),
        learning_rate=2e-3,
        schedule="cosine",
        padding=4 if photographs else 0,
        flip=photographs,
        evaluate_every=size.epochs,  # once, for the note
    )
    for name in NETWORKS.value:
        if name not in found:
            network = common.build(name, task)
            trainer = common.make_trainer(task, network, common.scratch, recipe, split="validation")
            found[name] = common.train_teacher(task, name, network, trainer, 0, workdir / name)
    return {name: found[name] for name in NETWORKS.value}


def problem_of(task: common.Task, teacher: common.Teacher, images: int) -> Problem:
    """The first images of the validation split as this network takes them, and its weights."""
    ids = task.split["validation"][:images]
    if len(ids) < images:
        raise ValueError(
            f"--images={images} are more than the {len(ids)} of {task.source.name}'s validation."
        )
    inputs = data.normalise(jnp.asarray(task.source.images[ids]), mean=teacher.mean, std=teacher.std)
    weights = jax.device_get(teacher.weights)
    flat = flatten_dict({"params": weights.params, **weights.model_state})
    named = {"/".join(path): np.asarray(x) for path, x in flat.items()}
    return Problem(teacher.name, np.asarray(inputs), task.source.labels[ids].astype(np.int32), named)


# -------------------------------------------------------------------------------------------- measuring


Arm: TypeAlias = tuple[Worker, dict[str, Any]]
"""Who computes attributions, and the options that say which."""
Arms: TypeAlias = dict[str, Arm]


def arms_of(workers: Sequence[Worker], nodes: int, chunks: Sequence[int]) -> Arms:
    """All that take fixed nodes, by name."""
    found: Arms = {}
    for worker in workers:
        for arm in worker.arms:
            if arm != "captum":
                found[arm] = worker, {"nodes": nodes}
            else:
                found[DEFAULT] = worker, {"nodes": nodes, "chunk": None}
                found |= {captum_arm(chunk): (worker, {"nodes": nodes, "chunk": chunk}) for chunk in chunks}
    return found


def captum_arm(chunk: int) -> str:
    """Its name."""
    return f"captum by {chunk}"


class Explained(NamedTuple):
    """A call's attributions, the nodes of each image, and seconds."""

    values: np.ndarray
    nodes: list[int]
    seconds: float


class Explainer:
    """Asks a worker for maps, which come back through a file."""

    def __init__(self, folder: Path):
        self.path = folder / "maps.npy"

    def __call__(self, worker: Worker, **options: Any) -> Explained:
        """One call."""
        answer = worker.ask("explain", options=options, into=str(self.path))
        return Explained(np.load(self.path, allow_pickle=False), answer["nodes"], answer["wall"])


class Begun(NamedTuple):
    """A network that all workers have taken up, and what the first call of every arm returned."""

    differences: dict[str, np.ndarray]  # contender → score of each image less that of its baseline
    fixed: Arms
    adaptive: dict[float, Arm]  # by the bound
    first: dict[str, Explained]  # by the arm
    left_out: str | None  # why captum's default call is not made, if it is not

    @property
    def arms(self) -> Arms:
        """All of them by name."""
        return self.fixed | {adaptive_arm(bound): arm for bound, arm in self.adaptive.items()}


def begin(
    workers: Sequence[Worker],
    network: str,
    nodes: int,
    chunks: Sequence[int],
    bounds: Sequence[float],
    explain: Explainer,
) -> Begun:
    """Loads a network everywhere, and calls every arm once."""
    differences = {
        worker.contender: np.asarray(worker.ask("load", network=network)["difference"]) for worker in workers
    }
    adaptive: dict[float, Arm] = {bound: (workers[0], {"bound": bound}) for bound in bounds}
    fixed, reason = arms_of(workers, nodes, chunks), None
    if DEFAULT in fixed:
        reason = too_large(*fixed[captum_arm(chunks[0])], nodes, chunks[0])
        if reason:
            del fixed[DEFAULT]
    begun = Begun(differences, fixed, adaptive, {}, reason)
    for arm, (worker, options) in begun.arms.items():
        begun.first[arm] = explain(worker, **options)
    return begun


def too_large(captum: Worker, options: Mapping[str, Any], nodes: int, chunk: int) -> str | None:
    """Why all nodes at once are more than this machine holds, by what a chunk holds; None if they are not."""
    chunk_alone = {**options, "nodes": chunk}
    captum.ask("explain", options=chunk_alone)  # the first call holds more, for good
    peak, free = captum.ask("memory", options=chunk_alone)["peak_mib"], free_mib()
    if peak is None or free is None or peak * nodes / chunk <= FREE_SHARE * free:
        return None
    return (
        f"captum's default call was left out: it would hold about {peak * nodes / chunk:,.0f} MiB, and {free:,.0f} are "
        "free. Fewer --images fit."
    )


def assess(
    begun: Begun, network: str, size: Sizes, chunk: int, explain: Explainer
) -> tuple[dict[str, dict], list[dict[str, Any]]]:
    """How good maps are: nothing here is timed.

    Returns:
      Rule → metric → a number per number of nodes; and a row per bound of what adaptive and uniform nodes reach.
    """
    (ours, _), difference = begun.fixed["kdjax"], begun.differences["kdjax"]
    reference = explain(ours, nodes=size.reference, rule="midpoint").values

    def judged(values: np.ndarray) -> Quality:
        return Quality(relative_residuals(values, difference), map_errors(values, reference))

    rules: dict[str, dict[str, list[list[float]]]] = {}
    for rule in RULES:
        for nodes in size.rule_nodes:
            quality = judged(explain(ours, nodes=nodes, rule=rule).values)
            for metric, number in quality.summary().items():
                rules.setdefault(rule, {}).setdefault(metric, []).append([number])
    adaptive = {bound: judged(begun.first[adaptive_arm(bound)].values) for bound in begun.adaptive}
    # Without captum the same rule, that the search be the same.
    rule, worker = {"rule": "gauss_legendre"}, ours
    if captum_arm(chunk) in begun.fixed:
        rule, worker = {"chunk": chunk}, begun.fixed[captum_arm(chunk)][0]
    uniform: dict[int, Quality] = {}
    nodes = FEWEST
    while nodes <= size.most:
        uniform[nodes] = judged(explain(worker, nodes=nodes, **rule).values)
        found = [uniform_nodes(uniform, bound, quality) for bound, quality in adaptive.items()]
        if all(None not in pair for pair in found):
            break
        nodes *= 2
    rows = []
    for bound, quality in adaptive.items():
        needed, same_error = uniform_nodes(uniform, bound, quality)
        took = begun.first[adaptive_arm(bound)].nodes
        shares = {
            "within": float(np.mean(quality.residuals <= bound)),
            "reached": reaches(quality.residuals, bound),
        }
        counts = {"nodes_mean": statistics.mean(took), "nodes_largest": max(took)}
        row = {
            "network": network,
            "bound": bound,
            "adaptive": counts | shares | quality.summary(),
            "uniform_nodes": needed,
            "uniform_nodes_of_equal_map_error": same_error,
        }
        if needed is not None:
            row["uniform"] = uniform[needed].summary()
        rows.append(row)
    return rules, rows


def measure(
    begun: Begun, size: Sizes, rows: Sequence[Mapping[str, Any]], chunks: Sequence[int], label: str
) -> dict[str, Any]:
    """All times of one network at one number of threads.

    Returns:
      "best", captum's fastest chunk, if captum is there; "fixed" and "equal", arm → metric → one number per round.
    """
    ours, _ = begun.fixed["kdjax"]
    arms = {FLOOR: (ours, {"gradients": size.nodes})} | begun.fixed
    ours.ask("explain", options={"gradients": 1})  # compiles
    fixed = in_rounds(arms, size.rounds, label)
    clock = clock_of(ours.threads)
    by_chunk = {chunk: fixed[captum_arm(chunk)][clock] for chunk in chunks if captum_arm(chunk) in fixed}
    best = min(by_chunk, key=lambda chunk: statistics.median(by_chunk[chunk])) if by_chunk else None
    turns = {adaptive_arm(bound): arm for bound, arm in begun.adaptive.items()}
    if best is not None:
        captum, _ = begun.fixed[captum_arm(best)]
        needed = {row[name] for row in rows for name in ("uniform_nodes", "uniform_nodes_of_equal_map_error")}
        turns |= {uniform_arm(n): (captum, {"nodes": n, "chunk": best}) for n in sorted(needed - {None})}
    later = in_rounds(turns, min(size.rounds, EQUAL_ROUNDS), f"{label}, equal residual")
    for arm, (worker, options) in begun.arms.items():
        peak = worker.ask("memory", options=options)["peak_mib"]
        if peak is not None:
            metrics = (later if arm in later else fixed)[arm]
            metrics["peak_mib"] = [peak] * len(metrics["ms"])
    return {"best": best, "fixed": fixed, "equal": later}


def adaptive_arm(bound: float) -> str:
    """Its name."""
    return f"kdjax adaptive {bound:g}"


def uniform_arm(nodes: int) -> str:
    """The name of captum with so many nodes in its best chunks."""
    return f"captum, {nodes} nodes"


def in_rounds(arms: Arms, rounds: int, label: str) -> dict[str, dict[str, list[float]]]:
    """Arm → milliseconds; each arm has one turn in every round, in an order that changes."""
    metrics: dict[str, dict[str, list[float]]] = {arm: {} for arm in arms}
    for turn in tqdm(range(rounds), desc=label, disable=None):
        for arm in list(arms)[:: -1 if turn % 2 else 1]:
            worker, options = arms[arm]
            note(metrics[arm], "", worker.ask("explain", options=options))
    return metrics


def fill(task: common.Task, teacher: common.Teacher, images: int) -> dict[str, Any]:
    """How fast a teacher's columns of adaptive maps are filled, on all cores, as experiments fill them.

    With more images than one file holds, the rate is that of the files after the first: what every call begins with,
    such as compiling, is left out.
    """

    def call(count: int) -> tuple[float, common.Explained]:
        few = task._replace(split=task.split | {"train": task.split["train"][:count]})
        with tempfile.TemporaryDirectory() as directory:
            start = time.perf_counter()
            found = common.explained_by(few, teacher, directory=Path(directory) / "maps")
            return time.perf_counter() - start, found

    start = min(images, ROWS)
    first_seconds, _ = call(start)
    seconds, found = call(images)
    if images > ROWS:
        start_seconds, _ = call(start)
        rate = (images - start) / max(seconds - start_seconds, 1e-9)
    else:
        rate = images / seconds
    return {
        "network": teacher.name,
        "images": images,
        "images_per_second": rate,
        f"hours_of_{CIFAR}_extrapolated": CIFAR / rate / 3600,
        "first_call_s": first_seconds,
        "nodes_mean": float(np.mean(found.nodes)),
        **summary("relative_residual", found.residual),
    }


# ---------------------------------------------------------------------------------------------- judging


def clock_of(threads: int) -> str:
    """The metric that is compared: a busy machine disturbs CPU time least, which says nothing of parallel work."""
    return "cpu_ms" if threads == 1 else "ms"


def judge(
    found: Mapping[str, Any], equal: Sequence[Mapping[str, Any]], where: str, threads: int, nodes: int
) -> tuple[dict[str, dict], list[dict[str, Any]]]:
    """The ratios to the peers, and what became of each goal."""
    clock = clock_of(threads)
    fixed, later = found["fixed"], found["equal"]
    ours, ratios, goals = fixed["kdjax"], {}, []
    for arm, metrics in fixed.items():
        if arm not in ("kdjax", FLOOR):
            ratios[f"{where}: {arm}"] = over(metrics[clock], ours[clock])
            if "peak_mib" in ours and min(ours["peak_mib"]) > 0 and min(metrics["peak_mib"]) > 0:
                ratios[f"{where}: {arm} memory"] = over(metrics["peak_mib"], ours["peak_mib"])
    ratios[f"{where}: the floor, {nodes} gradients"] = over(fixed[FLOOR][clock], ours[clock])
    peers = {DEFAULT: DEFAULT}
    if found["best"] is not None:
        peers["captum's best chunk"] = captum_arm(found["best"])
    for said, arm in peers.items():
        if arm in fixed:
            ratio = ratios[f"{where}: {arm}"]
            goals.append(goal(f"{where}: {nodes} nodes ≥ {GOALS[said]:g}× {said}", GOALS[said], ratio))
    floor = over(ours[clock], fixed[FLOOR][clock])
    goals.append(
        goal(f"{where}: {nodes} nodes ≤ {FLOOR_GOAL:g}× {nodes} gradients", FLOOR_GOAL, floor, at_most=True)
    )
    for row in equal:
        mine, bound = later[adaptive_arm(row["bound"])][clock], f"residual ≤ {row['bound']:g}"
        needed, same_error = row["uniform_nodes"], row["uniform_nodes_of_equal_map_error"]
        arm = uniform_arm(needed or 0)
        if arm in later and row["adaptive"]["reached"]:
            ratios[f"{where}: {bound}, {arm}"] = ratio = over(later[arm][clock], mine)
            goals.append(goal(f"{where}: {bound} ≥ 1× {arm} in its best chunks", 1.0, ratio))
        if arm in later and row["adaptive"]["reached"] and DEFAULT in fixed:
            # Hundreds of nodes in one batch would not fit: more of them take at least as long in proportion.
            default = statistics.median(fixed[DEFAULT][clock]) * needed / nodes
            ratio = over([default] * len(mine), mine)
            ratios[f"{where}: {bound}, {DEFAULT}, {needed} nodes extrapolated"] = ratio
            said = f"{where}: {bound} ≥ {GOALS[DEFAULT]:g}× {DEFAULT}, {needed} nodes extrapolated"
            goals.append(goal(said, GOALS[DEFAULT], ratio))
        arm = uniform_arm(same_error or 0)
        if arm in later:
            ratios[f"{where}: map error as at {bound}, {arm}"] = over(later[arm][clock], mine)
    return ratios, goals


def with_times(
    row: Mapping[str, Any], later: Mapping[str, Mapping[str, Sequence[float]]], threads: int, images: int
) -> dict[str, Any]:
    """A row of "equal" with the milliseconds per map of both, by the wall clock."""
    found: dict[str, Any] = {**row, "threads": threads}
    for kind, arm in (
        ("adaptive", adaptive_arm(row["bound"])),
        ("uniform", uniform_arm(row["uniform_nodes"] or 0)),
    ):
        if arm in later:
            found[kind] = row[kind] | {"ms_per_map": statistics.median(later[arm]["ms"]) / images}
    return found


# ------------------------------------------------------------------------------------------------- main


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
    for peer in PEERS.value:
        if peer not in PACKAGES:
            raise ValueError(f"--peers={peer} is none of {', '.join(PACKAGES)}.")
    for network in NETWORKS.value:
        if network not in models.MODELS or not network.startswith(TWINS):
            known = ", ".join(sorted(name for name in models.MODELS if name.startswith(TWINS)))
            raise ValueError(f"--networks={network} has no form in PyTorch here; there are {known}.")
    if not SMOKE.value and DATASET.value == "digits":
        raise ValueError(
            "--dataset=digits has images of 8x8 pixels, on which times mean nothing; write --smoke, or "
            "--dataset=cifar10 --data_dir=data."
        )


class Findings:
    """What the result will hold, gathered network by network."""

    def __init__(self, size: Sizes, chunks: Sequence[int], bounds: Sequence[float]):
        self.size, self.chunks, self.bounds = size, chunks, bounds
        self.arms: dict[str, dict[str, list[float]]] = {}
        self.arm_rounds: dict[str, list[int]] = {}  # of those that had fewer turns
        self.ratios: dict[str, dict] = {}
        self.goals: list[dict[str, Any]] = []
        self.first_calls_s: dict[str, dict[str, float]] = {}
        self.equal: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.assessed: dict[str, tuple[dict[str, dict], list[dict[str, Any]]]] = {}  # network → assess()
        self.apart: dict[str, float] = {}  # network → largest difference of two workers' maps

    def measure(self, workers: Sequence[Worker], network: str, threads: int, explain: Explainer) -> None:
        """One network by all workers, with so many threads. Its maps are judged the first time."""
        where = f"{network}, {threads} thread{'s' * (threads > 1)}"
        begun = begin(workers, network, self.size.nodes, self.chunks, self.bounds, explain)
        maps = {arm: begun.first[arm].values for arm in begun.fixed}
        apart = check_equal(network, maps, begun.differences)
        self.apart[network] = max(self.apart.get(network, 0.0), apart)
        if network not in self.assessed:
            self.assessed[network] = assess(begun, network, self.size, self.chunks[0], explain)
        _, rows = self.assessed[network]
        found = measure(begun, self.size, rows, self.chunks, where)
        ratios, goals = judge(found, rows, where, threads, self.size.nodes)
        self.ratios |= ratios
        self.goals += goals
        self.first_calls_s[where] = {arm: x.seconds for arm, x in begun.first.items()}
        self.equal += [with_times(row, found["equal"], threads, self.size.images) for row in rows]
        self.arms |= {f"{where}: {arm}": x for arm, x in (found["fixed"] | found["equal"]).items()}
        turns = list(range(min(self.size.rounds, EQUAL_ROUNDS)))
        self.arm_rounds |= {f"{where}: {arm}": turns for arm in found["equal"]}
        if begun.left_out:
            self.say(f"{where}: {begun.left_out}")
        if found["best"] is not None:
            self.notes.append(f"{where}: captum's best chunk is {found['best']} nodes of all images.")

    def fill(self, task: common.Task, teacher: common.Teacher) -> dict[str, Any]:
        """How fast columns are filled by one network."""
        row, arm = fill(task, teacher, self.size.fill), f"{teacher.name}: filling"
        self.arms[arm] = {"images_per_second": [row["images_per_second"]]}
        self.arm_rounds[arm] = [0]
        return row

    def say(self, note: str) -> None:
        """On the terminal at once, and in the result."""
        self.notes.append(note)
        common.say(note)


def main() -> None:
    """Measures, writes the result and prints what was found."""
    start = time.monotonic()
    check_flags()
    size, chunks, bounds = sizes(), numbers(CHUNKS, int), numbers(BOUNDS, float)[::-1]
    protocols = thread_counts(THREADS.value, smoke=SMOKE.value)
    task = common.make_task(
        size.dataset,
        data_dir=DATA_DIR.value,
        num_train=max(size.num_train, size.fill),
        num_validation=size.images if SMOKE.value else None,
    )
    decides = {"dataset": size.dataset, "num_train": max(size.num_train, size.fill), "epochs": size.epochs}
    decides |= {"smoke": SMOKE.value, "data": task.fingerprint}
    teachers = make_networks(task, size, common.claim_workdir(WORKDIR.value, decides))
    problems = {name: problem_of(task, teacher, size.images) for name, teacher in teachers.items()}
    torch = TORCH_PYTHON.value or sys.executable
    pythons = {"kdjax": sys.executable} | dict.fromkeys(PEERS.value, torch)
    findings, absent = Findings(size, chunks, bounds), {}
    with tempfile.TemporaryDirectory() as temporary:
        workload = Path(temporary) / "workload.npz"
        write(workload, problems)
        for threads in sorted(protocols, reverse=True):  # maps are judged once, with most threads
            with working(pythons, threads, workload, peers="attributions_baselines") as workers:
                absent |= {worker.contender: worker.absent for worker in workers if worker.absent}
                if "kdjax" in absent:
                    raise ValueError(f"kdjax cannot be measured: {absent['kdjax']}.")
                there = [worker for worker in workers if not worker.absent]
                for network in problems:
                    findings.measure(there, network, threads, Explainer(Path(temporary)))
    asked = list(teachers.values())[: 1 if SMOKE.value else None] if size.fill else []
    filled = [findings.fill(task, teacher) for teacher in asked]
    for contender, reason in absent.items():
        findings.say(f"{contender} was not measured: {reason}.")
    content = results.make(
        "attributions",
        question="Are integrated gradients of a trained network faster here than with captum or a loop in PyTorch, map "
        "for map?",
        flags={
            **size._asdict(),
            "networks": NETWORKS.value,
            "peers": PEERS.value,
            "teacher_dirs": TEACHER_DIRS.value,
            "chunks": chunks,
            "bounds": bounds,
            "threads": protocols,
            "smoke": SMOKE.value,
        },
        seeds=range(size.rounds),
        arms=findings.arms,
        arm_seeds=findings.arm_rounds,
        wall_clock_s=time.monotonic() - start,
        scaled_down=f"filling {CIFAR:,} images is extrapolated from {size.fill:,}" if size.fill else "",
        ratios=findings.ratios,
        goals=findings.goals,
        swept=swept({name: rules for name, (rules, _) in findings.assessed.items()}, size.rule_nodes),
        equal=findings.equal,
        filled=filled,
        first_calls_s=findings.first_calls_s,
        absent=absent,
        notes=[*findings.notes, *remarks(findings.equal, findings.apart, teachers, size)],
    )
    packages = sorted({name for peer in PEERS.value if peer not in absent for name in PACKAGES[peer]})
    content["versions"] |= versions_of(packages, python=torch)
    results.write(OUTPUT.value, content)
    tell(findings.goals)
    for row in filled:
        rate, hours = row["images_per_second"], row[f"hours_of_{CIFAR}_extrapolated"]
        print(f"{row['network']}: columns of {rate:.1f} images a second, {hours:.1f} hours for {CIFAR:,}")
    print(f"written to {OUTPUT.value}")


def swept(rules: Mapping[str, Mapping[str, Any]], rule_nodes: Sequence[int]) -> list[dict[str, Any]]:
    """The rules' errors as the schema has them."""
    lines = {f"{name}: {rule}": x for name, found in rules.items() for rule, x in found.items()}
    return [{"name": "nodes", "values": list(rule_nodes), "arms": lines}]


def remarks(
    equal: Sequence[Mapping[str, Any]],
    apart: Mapping[str, float],
    teachers: Mapping[str, common.Teacher],
    size: Sizes,
) -> list[str]:
    """What a reader of the numbers has to know."""
    unreached = [
        (row["network"], row["bound"], who)
        for row in equal
        for who, reached in (
            (f"captum's rule, with {size.most} nodes,", row["uniform_nodes"] is not None),
            ("the adaptive one, with the most that it takes,", row["adaptive"]["reached"]),
        )
        if not reached
    ]
    return [
        *(
            f"{name}: validation accuracy {teacher.metrics['accuracy']:.1%}; maps of {size.nodes} nodes agree to "
            f"{apart[name]:.1e} of their size."
            for name, teacher in teachers.items()
        ),
        *(
            f"{name}: {who} does not reach a residual of {bound:g}; no time is compared there."
            for name, bound, who in dict.fromkeys(unreached)
        ),
        "Ratios are of CPU time with one thread, else of wall-clock time, round by round. Seeds are rounds, not draws.",
        "A time of kdjax includes the residual of every image, one of captum does not. Not counted are the search for "
        "captum's number of nodes and kdjax's first calls, which stand in first_calls_s.",
        "A residual under the bound is not a map error: adaptive nodes are chosen by the residual, which flatters "
        'them. The errors of both maps stand in "equal"; uniform_nodes_of_equal_map_error are those with which this '
        "rule of captum's has at most the adaptive maps' median error, or null.",
        "Adaptive steps serve every image that they can, uniform nodes nine of ten. Columns are filled on all cores.",
    ]


if __name__ == "__main__":
    common.launch(main)
