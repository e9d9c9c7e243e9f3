r"""Are the CPU forms of convolution and pooling faster than XLA's own, and than PyTorch?

    python -m experiments.benchmarks.layers --output=experiments/results/benchmarks/layers.json
    python -m experiments.benchmarks.layers --threads=2 --output=layers_2.json

Takes about three minutes. Each case (a layer's forward and backward pass, a network's whole Adam step) is timed in
rounds, and in every round once in each form: kdjax's, XLA's own ("xla"), both again inside ``lax.scan``, and, where
torch is installed, PyTorch in channels-last layout with the same number of threads. A ratio is the peer's time over
kdjax's in the same round, above 1 where kdjax is faster; its low and high are those of all rounds. With one thread the
clock is the process's CPU time, which a busy machine disturbs least; with more it is the wall clock.

Expect every "torch" ratio of the Keras student above 1 and "xla in scan" of the Keras student around 10.
"""

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax
from absl import app, flags

from kdjax import models, results
from kdjax.models import layers

OUTPUT = flags.DEFINE_string("output", None, "Result file to write.", required=True)
THREADS = flags.DEFINE_integer("threads", 1, "CPU cores that every form may use.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 7, "Times that each form is timed.", lower_bound=1)
SECONDS = flags.DEFINE_float("seconds", 0.15, "Length of one timing; at least one call.", lower_bound=0.0)
CASES = flags.DEFINE_list("cases", [], "Only those whose name starts with one of these.")

LAYERS = {  # name: (layer, input, kernel, strides, padding)
    "conv first student": ("conv", (64, 28, 28, 1), (3, 3, 1, 16), 2, "SAME"),
    "conv second student": ("conv", (64, 14, 14, 16), (3, 3, 16, 32), 2, "SAME"),
    "conv malaria": ("conv", (64, 32, 32, 3), (3, 3, 3, 4), 1, "VALID"),
    "conv 16 to 16": ("conv", (64, 32, 32, 16), (3, 3, 16, 16), 1, "SAME"),
    "conv 16 to 32 strided": ("conv", (64, 32, 32, 16), (3, 3, 16, 32), 2, "SAME"),
    "conv 64 to 64": ("conv", (64, 8, 8, 64), (3, 3, 64, 64), 1, "SAME"),
    "conv 1x1": ("conv", (64, 16, 16, 96), (1, 1, 96, 24), 1, "SAME"),
    "depthwise": ("depthwise", (32, 16, 16, 96), (3, 3, 1, 96), 1, "SAME"),
    "pool 2x2": ("pool", (64, 28, 28, 16), (2, 2), 2, "VALID"),
    "pool 2x2 overlapping": ("pool", (64, 14, 14, 16), (2, 2), 1, "SAME"),
}
NETWORKS = {  # name: (model, batch, image, classes, whether it trains)
    "keras_student step": ("keras_student", 64, (28, 28, 1), 10, True),
    "malaria_teacher step": ("malaria_teacher", 64, (32, 32, 3), 2, True),
    "malaria_student step": ("malaria_student", 64, (32, 32, 3), 2, True),
    "resnet8 step": ("resnet8", 64, (32, 32, 3), 10, True),
    "keras_teacher forward": ("keras_teacher", 64, (28, 28, 1), 10, False),
}
IN_SCAN = ("keras_student step", "conv 16 to 16")  # the other cases would say the same and take minutes
SCANNED = 2


@contextlib.contextmanager
def native_forms() -> Iterator[None]:
    """While a function is traced in here, its layers are XLA's own."""
    with (
        mock.patch.object(layers, "_conv", layers._native_conv),
        mock.patch.object(layers, "_depthwise", layers._native_depthwise),
        mock.patch.object(layers, "_max_pool", layers._native_max_pool),
    ):
        yield


def layer_case(layer: str, shape: tuple[int, ...], kernel: tuple[int, ...], strides: int, padding: str):
    """``(carry) -> carry`` that runs a layer forward and backward, and its carry."""
    key, options = jax.random.key(0), {"strides": strides, "padding": padding}
    x = jax.random.normal(key, shape)
    if layer == "pool":
        return (lambda x: x + 1e-6 * jax.grad(lambda x: jnp.sum(layers.max_pool(x, kernel, **options) ** 2))(x)), x
    form = {"conv": layers.conv, "depthwise": layers.depthwise_conv}[layer]

    def run(carry):
        gradients = jax.grad(lambda carry: jnp.mean(form(*carry, **options) ** 2))(carry)
        return jax.tree.map(lambda a, b: a - 1e-3 * b, carry, gradients)

    return run, (x, 0.1 * jax.random.normal(key, kernel))


def network_case(name: str, batch: int, shape: tuple[int, ...], classes: int, trains: bool):
    """``(carry) -> carry`` that takes a step of Adam, or only scores a batch, and its carry."""
    module = models.build(name, num_classes=classes)
    params, model_state = models.init(module, shape, seed=0)
    apply, tx = models.apply_fn(module), optax.adam(1e-3)
    x, y = jax.random.normal(jax.random.key(1), (batch, *shape)), jnp.arange(batch) % classes

    def step(carry):
        params, opt_state, model_state, count, x = carry
        key = jax.random.fold_in(jax.random.key(0), count)

        def loss(params):
            outputs, updated = apply(params, model_state, x, train=True, key=key)
            return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(outputs.logits, y)), updated

        gradients, model_state = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, model_state, count + 1, x

    def score(carry):
        params, model_state, x = carry
        return params, model_state, x + 1e-6 * jnp.sum(apply(params, model_state, x, train=False)[0].logits)

    if trains:
        return step, (params, tx.init(params), model_state, jnp.zeros((), jnp.int32), x)
    return score, (params, model_state, x)


def jax_arms(case: str) -> dict[str, tuple[Callable[[], Any], int]]:
    """Form -> a call that blocks until its result is there, and how often it runs the case."""
    run, carry = layer_case(*LAYERS[case]) if case in LAYERS else network_case(*NETWORKS[case])

    def compiled(function: Callable[[Any], Any], native: bool) -> Callable[[], Any]:
        # a new function each time: jit would take the other form's program from its cache
        with native_forms() if native else contextlib.nullcontext():
            program = jax.jit(lambda carry: function(carry)).lower(carry).compile()
        return lambda: jax.block_until_ready(program(carry))

    def looped(carry):
        return jax.lax.scan(lambda carry, _: (run(carry), None), carry, length=SCANNED)[0]

    arms = {"kdjax": (compiled(run, native=False), 1), "xla": (compiled(run, native=True), 1)}
    if case in IN_SCAN:
        arms["kdjax in scan"] = compiled(looped, native=False), SCANNED
        arms["xla in scan"] = compiled(looped, native=True), SCANNED
    return arms


def torch_arm(case: str) -> dict[str, tuple[Callable[[], Any], int]]:
    """The same case in PyTorch, channels last; nothing where torch is not installed."""
    try:
        from experiments.benchmarks import layers_torch
    except ImportError:
        return {}
    if case in LAYERS:
        return {"torch": (layers_torch.layer(*LAYERS[case]), 1)}
    return {"torch": (layers_torch.network(*NETWORKS[case]), 1)}


def measure(case: str, *, threads: int, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Milliseconds per run, form -> one number per round; the forms take turns."""
    clock = time.process_time if threads == 1 else time.perf_counter
    arms, repeats = jax_arms(case) | torch_arm(case), {}
    for name, (call, _) in arms.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(seconds / (time.perf_counter() - start)))
    times = {name: [] for name in arms}
    for _ in range(rounds):
        for name, (call, inside) in arms.items():
            start = clock()
            for _ in range(repeats[name]):
                call()
            times[name].append(1e3 * (clock() - start) / repeats[name] / inside)
    return times


def compare(case: str, times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Peer -> how many times faster kdjax is: median, low and high over the rounds."""
    found = {}
    for peer in times:
        if peer.startswith("kdjax"):
            continue
        ours = times["kdjax in scan" if peer.endswith("in scan") else "kdjax"]
        ratios = [theirs / mine for theirs, mine in zip(times[peer], ours, strict=True)]
        found[f"{case}: {peer}"] = {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
    return found


def main(argv: list[str]) -> None:
    """Times every case and writes one result file."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every setting is a --flag.")
    start = time.perf_counter()
    wanted = [c for c in [*LAYERS, *NETWORKS] if not CASES.value or c.startswith(tuple(CASES.value))]
    arms, ratios = {}, {}
    for case in wanted:
        times = measure(case, threads=THREADS.value, rounds=ROUNDS.value, seconds=SECONDS.value)
        arms |= {f"{case}: {form}": {"ms": values} for form, values in times.items()}
        found = compare(case, times)
        ratios |= found
        said = ", ".join(f"{k.split(': ')[1]} {v['median']:.2f} [{v['low']:.2f}, {v['high']:.2f}]" for k, v in found.items())
        print(f"{case:24s} {min(times['kdjax']):8.3f} ms; {said}", flush=True)
    content = results.make(
        "layers",
        question="Are the CPU forms of convolution and pooling faster than XLA's own, and than PyTorch?",
        flags={"threads": THREADS.value, "rounds": ROUNDS.value, "seconds": SECONDS.value, "cases": CASES.value},
        seeds=range(ROUNDS.value),
        arms=arms,
        ratios=ratios,
        wall_clock_s=time.perf_counter() - start,
        notes=[f"Clock: {'CPU time' if THREADS.value == 1 else 'wall'}. Seeds are rounds, not draws."],
    )
    results.write(OUTPUT.value, content)


def parse(argv: list[str]) -> list[str]:
    """Reads the flags, and gives up the cores beyond --threads before XLA or PyTorch counts them."""
    rest = app._register_and_parse_flags_with_usage(argv=argv)
    return rest


if __name__ == "__main__":
    app.run(main)
