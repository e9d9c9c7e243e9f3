r"""Are the CPU forms of convolution and pooling faster than XLA's own, and than PyTorch?

    python -m experiments.benchmarks.layers --output=experiments/results/benchmarks/layers.json
    python -m experiments.benchmarks.layers --threads=2 --output=layers_2.json

Takes about fifteen minutes, mostly to compile. Each case (a layer's forward and backward pass, a network's whole Adam
step) is timed in rounds, and in every round once in each form: kdjax's, XLA's own ("xla"), kdjax's again inside
``lax.scan``, for a few cases XLA's too, and, where torch is installed, PyTorch in channels-last layout with the same
number of threads. A ratio is the peer's time over kdjax's in the same round, above 1 where kdjax is faster; its low and
high are those of all rounds; "torch, kdjax in scan" is how a run trains. With one thread the clock is the process's CPU
time, which a busy machine disturbs least; with more it is the wall clock, and "kdjax on N devices" trains the network
by ``pmap``, a part of the batch on a simulated device per core, in a scan.

Expect every "torch" ratio of the Keras student above 1 and "xla in scan" of it around 15.
"""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from experiments import cli
from experiments.benchmarks import layers_baselines
from experiments.benchmarks.layers_cases import LAYERS, NETWORKS, layer_case, native_forms, network_case
from experiments.benchmarks.timing import clock, clock_note, in_turns, over, pin, said
from kdjax import parallel, results

OUTPUT = flags.DEFINE_string("output", None, "Result file to write.", required=True)
THREADS = flags.DEFINE_integer("threads", 1, "CPU cores that every form may use.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 7, "Times that each form is timed.", lower_bound=1)
SECONDS = flags.DEFINE_float("seconds", 0.15, "Length of one timing; at least one call.", lower_bound=0.0)
CASES = flags.DEFINE_list("cases", [], "Only those whose name starts with one of these.")

XLA_IN_SCAN = ("keras_student step", "conv 16 to 16")  # other cases show the same and take minutes
SCANNED = 2


def jax_arms(case: str) -> dict[str, tuple[Callable[[], Any], int]]:
    """Form -> a call that blocks until its result is there, and how often it runs the case."""

    def compiled(times: int, native: bool) -> tuple[Callable[[], Any], int]:
        # a new function each time: jit would take the other form's program from its cache
        run, carry = (
            layer_case(*LAYERS[case], native=native)
            if case in LAYERS
            else network_case(*NETWORKS[case], native=native)
        )

        def looped(carry):
            return jax.lax.scan(lambda carry, _: (run(carry), None), carry, length=times)[0]

        with native_forms() if native else contextlib.nullcontext():
            program = jax.jit(looped if times > 1 else run).lower(carry).compile()
        return lambda: jax.block_until_ready(program(carry)), times

    arms = {"kdjax": compiled(1, native=False), "xla": compiled(1, native=True)}
    if case in NETWORKS or case in XLA_IN_SCAN:
        arms["kdjax in scan"] = compiled(SCANNED, native=False)
    if case in XLA_IN_SCAN:
        arms["xla in scan"] = compiled(SCANNED, native=True)
    if case in NETWORKS and jax.local_device_count() > 1:
        arms[f"kdjax on {jax.local_device_count()} devices"] = on_devices(case)
    return arms


def on_devices(case: str) -> tuple[Callable[[], Any], int]:
    """The steps of a network by ``pmap`` on all devices, each with its part of the batch."""
    name, batch, shape, classes, trains = NETWORKS[case]
    devices = jax.local_devices()
    own = (name, batch // len(devices), shape, classes, trains)
    step, carry = network_case(*own, native=False, axis_name=parallel.AXIS)

    *state, images = carry

    def looped(state, images):
        return jax.lax.scan(lambda c, _: (step(c), None), (*state, images), length=SCANNED)[0][:-1]

    program = parallel.data_parallel(looped, replicated=1, devices=devices)
    state, images = parallel.replicate(state, devices), jnp.tile(images, (len(devices), 1, 1, 1))
    return lambda: jax.block_until_ready(program(state, images)), SCANNED


def torch_arm(case: str) -> dict[str, tuple[Callable[[], Any], int]]:
    """The same case in PyTorch, channels last; nothing where torch is not installed."""
    try:
        import torch
    except ImportError:
        return {}
    torch.set_num_threads(THREADS.value)
    if case in LAYERS:
        return {"torch": (layers_baselines.torch_layer(*LAYERS[case]), 1)}
    return {"torch": (layers_baselines.torch_network(*NETWORKS[case]), 1)}


def measure(case: str, *, threads: int, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Milliseconds per run, form -> one number per round; the forms take turns."""
    arms = jax_arms(case) | torch_arm(case)
    calls = {name: call for name, (call, _) in arms.items()}
    times = in_turns(calls, rounds, seconds=seconds, read=clock(threads))
    return {name: [value / arms[name][1] for value in values] for name, values in times.items()}


def compare(case: str, times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Peer -> how many times faster kdjax is."""
    ratios = {
        f"{case}: {peer}": over(found, times["kdjax in scan" if peer.endswith("in scan") else "kdjax"])
        for peer, found in times.items()
        if not peer.startswith("kdjax")
    }
    if "torch" in times:
        for form in times:
            if form.startswith("kdjax "):
                ratios[f"{case}: torch, {form}"] = over(times["torch"], times[form])
    return ratios


def main() -> None:
    """Times every case and writes one result file."""
    pin(THREADS.value)
    jax.config.update("jax_num_cpu_devices", THREADS.value)
    start = time.perf_counter()
    wanted = [c for c in [*LAYERS, *NETWORKS] if not CASES.value or c.startswith(tuple(CASES.value))]
    arms, ratios = {}, {}
    for case in wanted:
        times = measure(case, threads=THREADS.value, rounds=ROUNDS.value, seconds=SECONDS.value)
        arms |= {f"{case}: {form}": {"ms": values} for form, values in times.items()}
        found = compare(case, times)
        ratios |= found
        ratios_said = ", ".join(f"{k.split(': ')[1]} {said(ratio)}" for k, ratio in found.items())
        print(f"{case:24s} {min(times['kdjax']):8.3f} ms; {ratios_said}", flush=True)
    content = results.make(
        "layers",
        question="Are the CPU forms of convolution and pooling faster than XLA's own, and than PyTorch?",
        flags={
            "threads": THREADS.value,
            "rounds": ROUNDS.value,
            "seconds": SECONDS.value,
            "cases": CASES.value,
        },
        seeds=range(ROUNDS.value),
        arms=arms,
        ratios=ratios,
        wall_clock_s=time.perf_counter() - start,
        notes=[clock_note(THREADS.value)],
    )
    results.write(OUTPUT.value, content)


if __name__ == "__main__":
    cli.launch(main)
