r"""Is any loss slower, or larger in memory, than its authors' implementation in PyTorch?

    python -m experiments.benchmarks.losses --output=experiments/results/benchmarks/losses.json
    python -m experiments.benchmarks.losses --smoke

Needs PyTorch (pip install 'kdjax[bench]'). Takes about five minutes. Every loss of the library is evaluated with its
gradient by the student's inputs, which are then updated in place by a small step: a donated array in JAX, ``sub_`` in
PyTorch. The baselines are in :mod:`experiments.benchmarks.losses_baselines`, channels first, with the operations of the
authors' code. Before timing, values and all gradients of the two are compared; a difference stops the run. Both sides
use malloc, configured to keep freed memory as accelerators do: otherwise large arrays measure how fast the kernel maps
fresh memory.

The two alternate in rounds and in order. "torch" is PyTorch's time over kdjax's in the same round, above 1 where kdjax
is faster; low and high are over all rounds. With one thread the clock is the process's CPU time, which other load
disturbs least; with more it is the wall clock. "torch memory" is the ratio of the peak memory for value and gradient,
without the inputs: for JAX what XLA's buffer assignment allocates, for PyTorch the running sum of the allocations that
its profiler records. Both are exact and do not vary; neither counts the workspace of matrix product libraries.

Expect every "torch" above 1, except ties at dice, lovasz, and hint and mgd of the smaller map; 20 to 50 for nst and
fsp, whose originals form the products of all channels at every position. "torch memory" is below 1 for some losses on
logits (tens of KiB), and for lovasz, which sorts all classes at once where the original sorts one class at a time.
"""

import contextlib
import ctypes
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import cli
from experiments.benchmarks.timing import clock, clock_note, in_turns, over, pin, said
from kdjax import losses, results

OUTPUT = flags.DEFINE_string("output", None, "Result file to write.")
THREADS = flags.DEFINE_integer("threads", 1, "CPU cores that either side may use.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 7, "Times that each side is timed.", lower_bound=1)
SECONDS = flags.DEFINE_float("seconds", 0.15, "Length of one timing; at least one call.", lower_bound=0.0)
LOSSES = flags.DEFINE_list("losses", [], "Only those whose name starts with one of these.")
SMOKE = flags.DEFINE_bool(
    "smoke", False, "Small arrays, two rounds, and without --losses only a few of them."
)

MALLOC_OPTIONS = {"arenas": (-8, 1), "blocks mapped": (-4, 0), "trim": (-1, -1)}  # of <malloc.h>; -1 is never
STEP = 1e-6  # small, so that every call finds nearly the same inputs
SMOKE_LOSSES = ("soft_target_kl", "hint", "nst", "rkd_angle", "crd", "lovasz")


class Sizes(NamedTuple):
    """Sizes of the arguments."""

    batch: int = 128
    classes: int = 100
    maps: Sequence[tuple[int, int]] = ((64, 8), (256, 14))  # channels, side
    widths: Sequence[int] = (64, 256, 512)
    images: Sequence[int] = (32, 224)  # sides, of 3 channels
    segmented: tuple[int, int, int] = (8, 64, 21)  # images, side, classes
    memory: tuple[int, int, int] = (50_000, 16_384, 64)  # examples, negatives, batch
    product: int = 2**31  # bytes for the authors' products of all channels; the batch is cut to fit


SMALL = Sizes(8, 10, ((8, 6),), (16,), (12,), (2, 12, 5), (100, 40, 4))


class Case(NamedTuple):
    """A loss and its arguments; arrays with four axes are maps, channels last in JAX and first in PyTorch."""

    ours: Callable[..., Any]  # (*inputs, *given, *state) -> values, and the next state where there is one
    reference: str  # its name in losses_baselines
    inputs: tuple[np.ndarray, ...]  # which receive gradients
    given: tuple[np.ndarray, ...] = ()
    state: tuple[np.ndarray, ...] = ()


def make_cases(sizes: Sizes) -> dict[str, Case]:
    """Every loss at every size."""
    rng, found = np.random.default_rng(0), {}
    for family in (logit_cases, map_cases, embedding_cases, memory_case, position_cases):
        found |= family(sizes, rng)
    return found


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Random numbers of mean 0 and deviation 1."""
    return rng.standard_normal(shape, np.float32)


def case(name: str, *arrays: np.ndarray, inputs: int = 1, **options: Any) -> Case:
    """A loss of the library by its name; the first arrays are the student's."""
    return Case(partial(getattr(losses, name), **options), name, arrays[:inputs], arrays[inputs:])


def logit_cases(sizes: Sizes, rng: np.random.Generator) -> dict[str, Case]:
    """Losses on logits, and for regression."""
    s, t, other = (3 * normal(rng, sizes.batch, sizes.classes) for _ in range(3))
    y = rng.integers(0, sizes.classes, sizes.batch)
    top = np.argsort(-t, axis=1)[:, : sizes.classes // 10]
    softened = np.exp(t / 4) / np.sum(np.exp(t / 4), axis=1, keepdims=True)
    found = {
        "soft_target_kl": case("soft_target_kl", s, t, temperature=4.0),
        "soft_target_cross_entropy": case("soft_target_cross_entropy", s, t, temperature=4.0),
        "squared_logits": case("squared_logits", s, t),
        "dkd": case("dkd", s, t, y),
        "dist": case("dist", s, t, temperature=4.0),
        "logit_standardised_kl": case("logit_standardised_kl", s, t),
        "wttm": case("wttm", s, t),
        "confidence_penalty": case("confidence_penalty", s),
        "teacher_free_kl": case("teacher_free_kl", s, y),
        "jensen_shannon": case("jensen_shannon", s, t, temperature=4.0),
        "top_k_kl": case("top_k_kl", s, np.take_along_axis(softened, top, 1), top, temperature=4.0),
        "label_smoothing_cross_entropy": case("label_smoothing_cross_entropy", s, y),
        "privileged": case("privileged", s, t, y),
        "squared_error": case("squared_error", s, t, other),
        "correlation_distance": case("correlation_distance", s, t),
        "correlation_distance ranks": case("correlation_distance", s, t, rank_weight=1.0)._replace(
            reference="correlation_distance_ranks"
        ),
    }
    return {f"{name} {sizes.classes} classes": found[name] for name in found}


def map_cases(sizes: Sizes, rng: np.random.Generator) -> dict[str, Case]:
    """Losses between feature maps, and relational losses on maps."""
    found = {}
    for channels, side in sizes.maps:
        s, t, s_first, t_first = (normal(rng, sizes.batch, side, side, channels) for _ in range(4))
        margin, scale = -np.abs(normal(rng, channels)), normal(rng, channels)
        fits = int(sizes.product // (4 * channels**2 * side**2))
        few = slice(min(sizes.batch, 1 << fits.bit_length() - 1))
        information = case("vid", s, t)
        each = {
            "hint": case("hint", s, t),
            "attention_transfer": case("attention_transfer", s, t),
            "factor_transfer": case("factor_transfer", s, t),
            "nst": case("nst", s[few], t[few]),
            "fsp": Case(
                lambda a, b, c, d: losses.fsp((a, b), (c, d)),
                "fsp",
                (s_first[few], s[few]),
                (t_first[few], t[few]),
            ),
            "activation_boundary": case("activation_boundary", s, t),
            "ofd": Case(lambda s, t, m: losses.ofd(s, t, margin=m), "ofd", (s,), (t, margin)),
            "reviewkd": case("reviewkd", s, t),
            "vid": information._replace(
                ours=lambda s, a, t: losses.vid(s, t, log_scale=a), inputs=(s, scale)
            ),
            "mgd": case("mgd", s, t),
            "similarity_preserving": case("similarity_preserving", s, t),
            "cka": case("cka", s, t),
        }
        for name, found_case in each.items():
            batch = len(found_case.inputs[0])
            cut = "" if batch == sizes.batch else f", batch {batch}"
            found[f"{name} {channels}x{side}x{side}{cut}"] = found_case
    return found


def embedding_cases(sizes: Sizes, rng: np.random.Generator) -> dict[str, Case]:
    """Losses over the relations within a batch of pooled features."""
    names = (
        "rkd_distance",
        "rkd_angle",
        "pkt",
        "similarity_preserving",
        "correlation_congruence",
        "info_nce",
        "cka",
    )
    found = {}
    for name in names:
        for width in sizes.widths:
            s, t = normal(rng, sizes.batch, width), normal(rng, sizes.batch, width)
            found[f"{name} {width}"] = case(name, s, t)
    return found


def memory_case(sizes: Sizes, rng: np.random.Generator) -> dict[str, Case]:
    """CRD with its memory; drawing the candidates is timed on neither side."""
    examples, negatives, batch = sizes.memory
    s, t, s_bank, t_bank = (normal(rng, rows, 128) for rows in (batch, batch, examples, examples))
    s, t, s_bank, t_bank = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (s, t, s_bank, t_bank))
    candidates = rng.integers(0, examples, (batch, 1 + negatives))
    candidates[:, 0] = rng.permutation(examples)[:batch]

    def ours(student, teacher, candidates, s_bank, t_bank, z):
        memory = losses.CrdMemory(s_bank, t_bank, z[0], z[1])
        values, after = losses.crd(student, teacher, memory, candidates)
        return values, (after.student, after.teacher, jnp.stack([after.student_z, after.teacher_z]))

    state = s_bank, t_bank, np.zeros(2, np.float32)
    found = Case(ours, "crd", (s, t), (candidates,), state)
    return {f"crd {negatives} of {examples}, batch {batch}": found}


def position_cases(sizes: Sizes, rng: np.random.Generator) -> dict[str, Case]:
    """Losses between attributions and gradients of images, and of segmentations."""
    found = {}
    for side in sizes.images:
        s, t = (normal(rng, sizes.batch, side, side, 3) for _ in range(2))
        found[f"gradient_match 3x{side}x{side}"] = case("gradient_match", s, t)
        found[f"attribution_map 3x{side}x{side}"] = Case(
            attribution_distance, "attribution_distance", (s,), (t,)
        )
        s, t = (x.reshape(*x.shape[:1], -1, 3)[..., 0].copy() for x in (s, t))
        pooled = t.reshape(-1, side // 2, 2, side // 2, 2).mean((2, 4)).reshape(sizes.batch, -1)
        found[f"map_distance {side}x{side}"] = case("map_distance", s, t)
        found[f"map_distance {side}x{side} pooled"] = case("map_distance", s, pooled)
    images, side, classes = sizes.segmented
    s, t = (3 * normal(rng, images, side, side, classes) for _ in range(2))
    soft = np.exp(t) / np.sum(np.exp(t), axis=-1, keepdims=True)
    shape = f"{images}x{classes}x{side}x{side}"
    found[f"dice {shape}"] = case("dice", s, soft)
    found[f"lovasz {shape}"] = case("lovasz", s, rng.integers(0, classes, (images, side, side)))
    return found


def attribution_distance(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Distance of two min-max maps."""
    return losses.map_distance(*(losses.attribution_map(x, scale="min_max") for x in (student, teacher)))


def differentiated(case: Case) -> Callable[..., Any]:
    """``(inputs, state, given) -> ((value, state), gradients)`` of the batch, by kdjax."""

    def total(inputs, state, given):
        values = case.ours(*inputs, *given, *state)
        values, state = values if case.state else (values, ())
        return jnp.mean(values), state

    return jax.value_and_grad(total, has_aux=True)


class Ours:
    """A case in kdjax."""

    def __init__(self, case: Case):
        self.pass_, self.given = differentiated(case), [jnp.asarray(x) for x in case.given]
        self.carry = [[jnp.array(x) for x in group] for group in (case.inputs, case.state)]

        def step(inputs, state, given):
            (value, state), gradients = self.pass_(inputs, state, given)
            return value, (jax.tree.map(lambda x, g: x - STEP * g, inputs, gradients), state)

        self.step = jax.jit(step, donate_argnums=(0, 1))

    def evaluated(self) -> tuple[float, list[np.ndarray]]:
        """Value and gradients at the first inputs."""
        (value, _), gradients = jax.jit(self.pass_)(*self.carry, self.given)
        return float(value), [np.asarray(g) for g in gradients]

    def peak_mib(self) -> float:
        """Memory of the program that returns value, gradients and, in place, the state."""
        program = jax.jit(self.pass_, donate_argnums=1).lower(*self.carry, self.given).compile()
        found: Any = program.memory_analysis()
        held = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
        return held / 2**20

    def __call__(self) -> None:
        """One step, until its result is ready."""
        value, self.carry = self.step(*self.carry, self.given)
        jax.block_until_ready((value, self.carry))


class Theirs:
    """The same case in PyTorch."""

    def __init__(self, case: Case):
        from experiments.benchmarks import losses_baselines

        self.loss = getattr(losses_baselines, case.reference)
        self.inputs = [torch_array(x).requires_grad_() for x in case.inputs]
        self.given = [torch_array(x) for x in (*case.given, *case.state)]

    def backward(self) -> Any:
        """Value; the gradients are the inputs' own."""
        for x in self.inputs:
            x.grad = None
        value = self.loss(*self.inputs, *self.given)
        value.backward()
        return value

    def evaluated(self) -> tuple[float, list[np.ndarray]]:
        """Value and gradients at the first inputs."""
        value = self.backward().item()
        gradients = [x.grad.numpy() for x in self.inputs]
        return value, [np.moveaxis(g, 1, -1) if g.ndim == 4 else g for g in gradients]

    def peak_mib(self) -> float:
        """Most memory held at once by value and gradients, by the allocations that the profiler records."""
        import torch

        for x in self.inputs:
            x.grad = None
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            self.backward()
        with tempfile.TemporaryDirectory() as folder:
            profile.export_chrome_trace(f"{folder}/trace.json")
            trace = json.loads(Path(folder, "trace.json").read_text())
        events = [event for event in trace["traceEvents"] if event["name"] == "[memory]"]
        changes = [
            event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["args"]["Ev Idx"])
        ]
        return float(np.max(np.cumsum(changes))) / 2**20

    def __call__(self) -> None:
        """One step."""
        import torch

        self.backward()
        with torch.no_grad():
            for x in self.inputs:
                x.sub_(x.grad, alpha=STEP)


def torch_array(x: np.ndarray):
    """A tensor of its own, a map with its channels first."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)) if x.ndim == 4 else x.copy())


def keep_freed_memory() -> None:
    """Both sides allocate by malloc; from now on what it frees stays in the process, where it is found again."""
    with contextlib.suppress(AttributeError):  # only glibc has it
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in MALLOC_OPTIONS.values():
            mallopt(option, value)


def check_equal(name: str, ours: Ours, theirs: Theirs) -> None:
    """Both sides compute the same value and gradients.

    Raises:
      ValueError: if they do not.
    """
    (value, gradients), (wanted, wanted_gradients) = ours.evaluated(), theirs.evaluated()
    difference = abs(value - wanted) / abs(wanted)
    gradient_difference = max(
        float(np.max(np.abs(g - w)) / np.max(np.abs(w)))
        for g, w in zip(gradients, wanted_gradients, strict=True)
    )
    if not (difference < 1e-4 and gradient_difference < 1e-3):
        raise ValueError(
            f"{name}: kdjax has the value {value}, PyTorch {wanted}; their gradients differ by "
            f"{gradient_difference:.1e} of the largest entry. A benchmark compares forms of the same loss."
        )


def measure(
    name: str, case: Case, *, threads: int, rounds: int, seconds: float
) -> dict[str, dict[str, list]]:
    """Milliseconds of a call and MiB at most, side -> metric -> one number per round; the sides take turns."""
    check_equal(name, Ours(case), Theirs(case))
    sides: dict[str, Ours | Theirs] = {"kdjax": Ours(case), "torch": Theirs(case)}
    times = in_turns(sides, rounds, seconds=seconds, warmup=3, read=clock(threads))
    return {side: {"ms": times[side], "peak_mib": [call.peak_mib()] * rounds} for side, call in sides.items()}


def compare(found: dict[str, dict[str, list]]) -> dict[str, dict[str, float]]:
    """How many times faster, and smaller, kdjax is."""
    metrics = {"torch": "ms", "torch memory": "peak_mib"}
    return {peer: over(found["torch"][metric], found["kdjax"][metric]) for peer, metric in metrics.items()}


def main() -> None:
    """Measures every case and writes one result file."""
    pin(THREADS.value)
    keep_freed_memory()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else PyTorch's profiler reports its starts and stops
    try:
        import torch
    except ImportError as error:
        raise ValueError(f"{error}: the peer is PyTorch, pip install 'kdjax[bench]'.") from error
    torch.set_num_threads(THREADS.value)
    rounds, seconds = (2, 0.01) if SMOKE.value else (ROUNDS.value, SECONDS.value)
    wanted = tuple(LOSSES.value or (SMOKE_LOSSES if SMOKE.value else [""]))
    start, arms, ratios = time.perf_counter(), {}, {}
    cases = make_cases(SMALL if SMOKE.value else Sizes())
    chosen = {name: one for name, one in cases.items() if name.startswith(wanted)}
    if not chosen:
        raise ValueError(
            f"--losses={','.join(wanted)} names none of {sorted({n.split()[0] for n in cases})}."
        )
    for name, one in chosen.items():
        found = measure(name, one, threads=THREADS.value, rounds=rounds, seconds=seconds)
        compared = compare(found)
        arms |= {f"{name}: {side}": metrics for side, metrics in found.items()}
        ratios |= {f"{name}: {peer}": ratio for peer, ratio in compared.items()}
        faster, smaller = compared.values()
        print(
            f"{name:56s} {min(found['kdjax']['ms']):9.3f} ms, torch {said(faster)}; "
            f"{found['kdjax']['peak_mib'][0]:8.2f} MiB, torch {smaller['median']:6.2f}",
            flush=True,
        )
    content = results.make(
        "losses",
        question="Is any loss slower or larger in memory than its authors' form in PyTorch?",
        flags={"threads": THREADS.value, "rounds": rounds, "seconds": seconds, "losses": LOSSES.value},
        seeds=range(rounds),
        arms=arms,
        ratios=ratios,
        wall_clock_s=time.perf_counter() - start,
        notes=[
            clock_note(THREADS.value),
            f"torch {torch.__version__}.",
        ],
    )
    if OUTPUT.value:
        results.write(OUTPUT.value, content)


if __name__ == "__main__":
    cli.launch(main)
