r"""Are the CPU forms of convolution and pooling faster than XLA's own, and than PyTorch?

    python -m experiments.benchmarks.layers --output=experiments/results/benchmarks/layers.json
    python -m experiments.benchmarks.layers --threads=2 --output=layers_2.json

Takes about ten minutes, most of it compiling. Each case (a layer's forward and backward pass, a network's whole Adam
step) is timed in rounds, and in every round once in each form: kdjax's, XLA's own ("xla"), kdjax's again inside
``lax.scan``, for a few cases XLA's too, and, where torch is installed, PyTorch in channels-last layout with the same
number of threads. A ratio is the peer's time over kdjax's in the same round, above 1 where kdjax is faster; its low and
high are those of all rounds; "torch, kdjax in scan" is how a run trains. With one thread the clock is the process's CPU
time, which a busy machine disturbs least; with more it is the wall clock.

Expect every "torch" ratio of the Keras student above 1 and "xla in scan" of it around 15.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax.traverse_util import flatten_dict

from experiments import cli
from experiments.benchmarks import attributions_baselines
from experiments.benchmarks.timing import clock, clock_note, in_turns, over, pin, said
from kdjax import models, results
from kdjax.models import layers, rows_first
from kdjax.models.cnn import MalariaCnn
from kdjax.types import Outputs

OUTPUT = flags.DEFINE_string("output", None, "Result file to write.", required=True)
THREADS = flags.DEFINE_integer("threads", 1, "CPU cores that every form may use.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 7, "Times that each form is timed.", lower_bound=1)
SECONDS = flags.DEFINE_float("seconds", 0.15, "Length of one timing; at least one call.", lower_bound=0.0)
CASES = flags.DEFINE_list("cases", [], "Only those whose name starts with one of these.")

LAYERS = {  # name: (layer, input, kernel, strides, padding); ours of "rows" has its rows first, as in a network
    "conv first student": ("conv", (64, 28, 28, 1), (3, 3, 1, 16), 2, "SAME"),
    "conv second student": ("conv", (64, 14, 14, 16), (3, 3, 16, 32), 2, "SAME"),
    "conv malaria": ("rows", (64, 32, 32, 3), (3, 3, 3, 4), 1, "VALID"),
    "conv 16 to 16": ("rows", (64, 32, 32, 16), (3, 3, 16, 16), 1, "SAME"),
    "conv 16 to 32 strided": ("rows", (64, 32, 32, 16), (3, 3, 16, 32), 2, "SAME"),
    "conv 64 to 64": ("rows", (64, 8, 8, 64), (3, 3, 64, 64), 1, "SAME"),
    "conv 1x1": ("conv", (64, 16, 16, 96), (1, 1, 96, 24), 1, "SAME"),
    "depthwise": ("depthwise", (32, 16, 16, 96), (3, 3, 1, 96), 1, "SAME"),
    "depthwise between ReLUs": ("between", (32, 16, 16, 96), (3, 3, 1, 96), 1, "SAME"),
    "pool 2x2": ("pool", (64, 28, 28, 16), (2, 2), 2, "VALID"),
    "pool 2x2 overlapping": ("pool", (64, 14, 14, 16), (2, 2), 1, "SAME"),
}
NETWORKS = {  # name: (model, batch, image, classes, whether it trains)
    "keras_student step": ("keras_student", 64, (28, 28, 1), 10, True),
    "malaria_teacher step": ("malaria_teacher", 64, (32, 32, 3), 2, True),
    "malaria_student step": ("malaria_student", 64, (32, 32, 3), 2, True),
    "digits_teacher step": ("digits_teacher", 64, (8, 8, 1), 10, True),
    "resnet8 step": ("resnet8", 64, (32, 32, 3), 10, True),
    "resnet8 step of 128": ("resnet8", 128, (32, 32, 3), 10, True),
    "resnet20 step": ("resnet20", 64, (32, 32, 3), 10, True),
    "resnet8x4 step": ("resnet8x4", 64, (32, 32, 3), 100, True),
    "wrn_16_2 step": ("wrn_16_2", 64, (32, 32, 3), 100, True),
    "mobilenet_v2_w25 step": ("mobilenet_v2_w25", 64, (32, 32, 3), 10, True),
    "keras_teacher forward": ("keras_teacher", 64, (28, 28, 1), 10, False),
}
XLA_IN_SCAN = ("keras_student step", "conv 16 to 16")  # other cases show the same and take minutes
SCANNED = 2


class LinenMalaria(nn.Module):
    """The network and the parameters of ``kdjax.models.cnn.MalariaCnn``, of Flax's layers with the channels last."""

    like: MalariaCnn

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> Outputs:
        """Scores images."""
        first, second = (nn.Dropout(rate, deterministic=not train) for rate in self.like.dropout)
        for width in self.like.widths:
            x = nn.relu(nn.Conv(width, (3, 3), padding="VALID")(x))
        x = first(nn.max_pool(x, (2, 2), (2, 2))).reshape(x.shape[0], -1)
        x = second(nn.relu(nn.Dense(self.like.hidden)(x)))
        return Outputs(nn.Dense(self.like.num_classes)(x), {})


@contextlib.contextmanager
def native_forms() -> Iterator[None]:
    """While a function is traced in here, the layers of :mod:`kdjax.models.layers` are XLA's own."""
    with (
        mock.patch.object(layers, "_conv", layers._native_conv),
        mock.patch.object(layers, "_depthwise", layers._native_depthwise),
        mock.patch.object(layers, "_max_pool", layers._native_max_pool),
        mock.patch.object(rows_first, "suits", return_value=False),
    ):
        yield


def layer_case(
    layer: str, shape: tuple[int, ...], kernel: tuple[int, ...], strides: int, padding: str, *, native: bool
):
    """``(carry) -> carry`` that runs a layer forward and backward, and its carry."""
    key, options = jax.random.key(0), {"strides": strides, "padding": padding}
    x = jax.random.normal(key, shape)
    if layer == "rows" and not native:  # XLA's own has the channels last, as a user of Flax would
        x = rows_first.from_nhwc(x)
    if layer == "pool":
        return (
            lambda x: x + 1e-6 * jax.grad(lambda x: jnp.sum(layers.max_pool(x, kernel, **options) ** 2))(x)
        ), x

    def between(x, kernel, **options):
        return nn.relu6(layers.depthwise_conv(nn.relu6(x), kernel, **options))

    form = {
        "conv": layers.conv,
        "depthwise": layers.depthwise_conv,
        "between": between,
        "rows": layers.conv,
    }[layer]

    def run(carry):
        gradients = jax.grad(lambda carry: jnp.mean(form(*carry, **options) ** 2))(carry)
        return jax.tree.map(lambda a, b: a - 1e-3 * b, carry, gradients)

    return run, (x, 0.1 * jax.random.normal(key, kernel))


def network_case(name: str, batch: int, shape: tuple[int, ...], classes: int, trains: bool, *, native: bool):
    """``(carry) -> carry`` that takes a step of Adam, or only scores a batch, and its carry."""
    module = models.build(name, num_classes=classes)
    if native and isinstance(module, MalariaCnn):
        module = LinenMalaria(module)
    params, model_state = models.init(module, shape, seed=0)
    apply, tx = models.apply_fn(module), optax.adam(1e-3)
    x, y = jax.random.normal(jax.random.key(1), (batch, *shape)), jnp.arange(batch) % classes

    def step(carry):
        params, opt_state, model_state, count, x = carry
        key = jax.random.fold_in(jax.random.key(0), count)

        def loss(params):
            outputs, updated = apply(params, model_state, x, train=True, key=key)
            return jnp.mean(
                optax.losses.softmax_cross_entropy_with_integer_labels(outputs.logits, y)
            ), updated

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
    return arms


def torch_arm(case: str) -> dict[str, tuple[Callable[[], Any], int]]:
    """The same case in PyTorch, channels last; nothing where torch is not installed."""
    try:
        import torch
    except ImportError:
        return {}
    torch.set_num_threads(THREADS.value)
    return {"torch": (torch_layer(*LAYERS[case]) if case in LAYERS else torch_network(*NETWORKS[case]), 1)}


def torch_layer(layer: str, shape: tuple[int, ...], kernel: tuple[int, ...], strides: int, padding: str):
    """A call that runs a layer forward and backward in PyTorch."""
    import torch
    from torch.nn import functional as f

    batch, height, width, channels = shape
    last = {"memory_format": torch.channels_last}
    x = torch.randn(batch, channels, height, width).to(**last).requires_grad_()
    pads = torch_pads(height, width, kernel[:2], strides, padding)
    groups = channels if layer in ("depthwise", "between") else 1
    w = (
        None
        if layer == "pool"
        else torch.randn(kernel[3], kernel[2], *kernel[:2]).to(**last).requires_grad_()
    )

    def run():
        x.grad = None
        if w is None:
            y = f.max_pool2d(f.pad(x, pads, value=float("-inf")) if any(pads) else x, kernel, strides)
        else:
            w.grad = None
            y = torch_conv(f.relu6(x) if layer == "between" else x, w, None, strides, pads, groups)
            y = f.relu6(y) if layer == "between" else y
        (y**2).mean().backward()

    return run


def torch_pads(height: int, width: int, window: tuple[int, ...], strides: int, padding: str) -> list[int]:
    """What XLA's padding adds, in the order of ``torch.nn.functional.pad``."""
    rows, columns = jax.lax.padtype_to_pads((height, width), window, (strides, strides), padding)
    return [*columns, *rows]


def torch_conv(x, weight, bias, strides, pads, groups=1):
    """Convolution with XLA's padding: inside the operation where it is even, else added before."""
    from torch.nn import functional as f

    if pads[0] == pads[1] == pads[2] == pads[3]:
        return f.conv2d(x, weight, bias, strides, pads[0], groups=groups)
    return f.conv2d(f.pad(x, pads), weight, bias, strides, groups=groups)


def torch_network(name: str, batch: int, shape: tuple[int, ...], classes: int, trains: bool):
    """A call that takes a step of Adam, or only scores a batch, in PyTorch."""
    import torch
    from torch.nn import functional as f

    params, model_state = models.init(models.build(name, num_classes=classes), shape, seed=0)
    x = torch.randn(batch, shape[2], *shape[:2]).to(memory_format=torch.channels_last)
    y = torch.arange(batch) % classes
    by_hand = {"keras": torch_keras, "malaria": torch_malaria, "digits": torch_digits, "wrn": torch_wide}
    by_hand = by_hand.get(name.partition("_")[0])
    if by_hand is None:
        flat = flatten_dict({"params": params, **model_state}, sep="/")
        network = attributions_baselines.torch_network(
            {path: np.asarray(leaf) for path, leaf in flat.items()}
        )
        forward = network.train(trains).to(memory_format=torch.channels_last)
        leaves = list(forward.parameters())
    else:
        leaves = [torch.nn.Parameter(torch_weight(leaf)) for leaf in jax.tree.leaves(params)]
        weights = jax.tree.unflatten(jax.tree.structure(params), leaves)
        forward = functools.partial(by_hand, weights)
    # on a CPU the fused form of Adam is PyTorch's fastest
    adam = torch.optim.Adam(leaves, 1e-3, fused=True)

    def step():
        adam.zero_grad()
        f.cross_entropy(forward(x), y).backward()
        adam.step()

    def score():
        with torch.no_grad():
            forward(x)

    return step if trains else score


def torch_weight(leaf: jax.Array):
    """A kernel in PyTorch's order of axes, channels last in memory."""
    import torch

    weight = torch.from_numpy(np.array(leaf))
    if leaf.ndim == 4:
        return weight.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
    return weight.T.contiguous() if leaf.ndim == 2 else weight


def torch_keras(weights, x):
    """The network of ``kdjax.models.cnn.KerasCnn``."""
    from torch.nn import functional as f

    x = torch_conv(x, weights["Conv_0"]["kernel"], weights["Conv_0"]["bias"], 2, [0, 1, 0, 1])
    x = f.max_pool2d(f.pad(f.leaky_relu(x, 0.2), [0, 1, 0, 1], value=float("-inf")), 2, 1)
    x = torch_conv(x, weights["Conv_1"]["kernel"], weights["Conv_1"]["bias"], 2, [0, 1, 0, 1])
    return f.linear(x.flatten(1), weights["Dense_0"]["kernel"], weights["Dense_0"]["bias"])


def torch_malaria(weights, x):
    """The network of ``kdjax.models.cnn.MalariaCnn``, in training mode."""
    from torch.nn import functional as f

    for layer in ("Conv_0", "Conv_1"):
        x = f.relu(torch_conv(x, weights[layer]["kernel"], weights[layer]["bias"], 1, [0] * 4))
    x = f.dropout(f.max_pool2d(x, 2), 0.1).flatten(1)
    x = f.dropout(f.relu(f.linear(x, weights["Dense_0"]["kernel"], weights["Dense_0"]["bias"])), 0.2)
    return f.linear(x, weights["Dense_1"]["kernel"], weights["Dense_1"]["bias"])


def torch_digits(weights, x):
    """The network of ``kdjax.models.cnn.DigitsCnn``, in training mode."""
    from torch.nn import functional as f

    x = f.relu(torch_conv(x, weights["Conv_0"]["kernel"], weights["Conv_0"]["bias"], 1, [1] * 4))
    x = f.relu(torch_conv(x, weights["Conv_1"]["kernel"], weights["Conv_1"]["bias"], 2, [0, 1, 0, 1]))
    x = f.dropout(x.flatten(1), 0.3)
    return f.linear(x, weights["Dense_0"]["kernel"], weights["Dense_0"]["bias"])


def torch_wide(weights, x):
    """The network of ``kdjax.models.wideresnet.WideResNet``, in training mode; its running statistics are not kept."""
    from torch.nn import functional as f

    def conv(name, x, strides=1):
        kernel = weights[name]["kernel"]
        pads = [0, 1, 0, 1] if strides > 1 else [1] * 4
        return torch_conv(x, kernel, None, strides, pads if kernel.shape[-1] > 1 else [0] * 4)

    def norm(name, x):
        return f.batch_norm(x, None, None, weights[name]["scale"], weights[name]["bias"], training=True)

    x = conv("Conv_0", x)
    before = norm("BatchNorm_0", x)
    for name in sorted(name.removesuffix("_in") for name in weights if name.endswith("_in")):
        y, strides = f.relu(before), 2 if name in ("stage2_block1", "stage3_block1") else 1
        if f"{name}_shortcut" in weights:
            x = conv(f"{name}_shortcut", y, strides)
        y = f.relu(norm(f"{name}_norm", conv(f"{name}_in", y, strides)))
        x = x + conv(f"{name}_out", y)
        before = norm(f"{name}_next_norm", x)
    x = f.relu(before).mean((2, 3))
    return f.linear(x, weights["Dense_0"]["kernel"], weights["Dense_0"]["bias"])


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
    if "torch" in times and "kdjax in scan" in times:
        ratios[f"{case}: torch, kdjax in scan"] = over(times["torch"], times["kdjax in scan"])
    return ratios


def main() -> None:
    """Times every case and writes one result file."""
    pin(THREADS.value)
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
