r"""One way of computing integrated gradients, in a process of its own; not run by hand.

``experiments.benchmarks.attributions`` starts one such process for every contender and number of threads, as
:mod:`experiments.benchmarks.workers` says. The workload is an ``.npz`` file with normalised images, labels and the
weights of trained networks, the same for all. The jobs:

    load     builds the named network; the answer has each image's score less that of its baseline, zeros
    explain  wall-clock and CPU seconds of attributions of all images; with "into", they are saved there. The first
             after loading includes compilation
    memory   MiB held at once during such a call, beyond what the process held before (Linux only)

Which attributions is said by "options". All workers know ``{"nodes": 50}``, fixed nodes by Gauss and Legendre, which
is captum's default; captum also ``"chunk"``, how many nodes it takes at once, null for its default of all of them, and
``"rule"``, one of CAPTUM_RULES; and kdjax ``{"bound": .05}``, as many nodes as each image needs; ``{"nodes": 64,
"rule": "midpoint"}``, any rule in a loop that is compiled once for all numbers of nodes; and ``{"gradients": 50}``, as
many gradients and nothing else.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from experiments.benchmarks.timing import cores, timed
from experiments.benchmarks.workers import peak_mib, serve

LONGEST = 1024  # nodes that the loop of any rule is compiled for; more of them are a multiple of it
# kdjax's name → captum's. Its others converge as 1 / nodes: left and right sums, and trapezoids whose weights add up to
# 1 - 1 / nodes.
CAPTUM_RULES = {"gauss_legendre": "gausslegendre", "midpoint": "riemann_middle"}
TWINS = ("resnet", "mobilenet_v2")  # what the networks' names begin with that torch_network knows


class Problem(NamedTuple):
    """A network and the images to explain."""

    name: str  # of the network in kdjax.models
    images: np.ndarray  # float32, batch × height × width × channels, normalised
    labels: np.ndarray  # int32
    weights: dict[str, np.ndarray]  # collection/module/.../leaf → array, as linen names them

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return self.weights["params/Dense_0/bias"].size


class Found(NamedTuple):
    """Attributions, and how many gradients each image took."""

    values: np.ndarray  # batch × height × width × channels, signed
    nodes: list[int]


def write(path: Path, problems: Mapping[str, Problem]) -> None:
    """One file of all of them."""
    arrays = {}
    for name, problem in problems.items():
        arrays |= {f"{name}/images": problem.images, f"{name}/labels": problem.labels}
        arrays |= {f"{name}/weights/{leaf}": x for leaf, x in problem.weights.items()}
    np.savez(path, allow_pickle=False, **arrays)


def read(workload: Path, name: str) -> Problem:
    """A network of the file by its name."""
    with np.load(workload, allow_pickle=False) as arrays:
        prefix = f"{name}/weights/"
        weights = {x.removeprefix(prefix): arrays[x] for x in arrays.files if x.startswith(prefix)}
        return Problem(name, arrays[f"{name}/images"], arrays[f"{name}/labels"], weights)


class Contender(Protocol):
    """One library at one number of threads; made without arguments, which imports it."""

    arms: tuple[str, ...]

    def load(self, problem: Problem) -> np.ndarray:
        """Takes a network up, in place of the one before and all that was compiled; returns differences of scores."""
        ...

    def prepare(self, options: Mapping[str, Any]) -> Callable[[], Any]:
        """Attributions as a call that returns when they are there, in the library's own form."""
        ...

    def read(self, raw: Any, options: Mapping[str, Any]) -> Found:
        """What a call has returned, in the form of all."""
        ...


# JAX


class Kdjax:
    """``kdjax.attributions`` in compiled functions of weights, images and labels.

    Several threads are as many devices, which divide the images, as those of ``--devices`` do.
    """

    arms: tuple[str, ...] = ("kdjax",)

    def __init__(self):
        import jax

        from kdjax import attributions, models

        self.jax, self.attributions, self.models = jax, attributions, models
        self.devices = len(cores())
        jax.config.update("jax_num_cpu_devices", self.devices)

    def load(self, problem: Problem) -> np.ndarray:
        """See :class:`Contender`."""
        from flax.traverse_util import unflatten_dict

        array = self.jax.numpy.asarray
        # Through apply_fn, as the library applies networks: it chooses the layout of the maps.
        self.apply = self.models.apply_fn(self.models.build(problem.name, num_classes=problem.num_classes))
        variables = unflatten_dict({tuple(k.split("/")): array(x) for k, x in problem.weights.items()})
        if len(problem.labels) % self.devices:
            raise ValueError(f"{len(problem.labels)} images can't be divided among {self.devices} devices.")
        divided = (array(x).reshape(self.devices, -1, *x.shape[1:]) for x in (problem.images, problem.labels))
        self.arguments = variables, *divided
        self.jax.clear_caches()
        self.programs: dict[str, Callable] = {}
        score = self.compiled(lambda v, x, labels: self.score(v)(x, labels))
        variables, images, labels = self.arguments
        at_images, at_zeros = (score(variables, x, labels) for x in (images, 0 * images))
        return np.ravel(at_images) - np.ravel(at_zeros)

    def compiled(self, function: Callable, shared: int = 0) -> Callable:
        """A function of weights, divided images and labels, and of ``shared`` more arguments, on all devices."""
        return self.jax.pmap(function, in_axes=(None, 0, 0, *[None] * shared))

    def score(self, variables):
        """The logit of each image's label."""
        params, state = variables["params"], {k: v for k, v in variables.items() if k != "params"}
        return self.attributions.class_score(lambda x: self.apply(params, state, x, train=False)[0].logits)

    def gradient(self, variables, points, labels):
        """One gradient of all images."""
        score, total = self.score(variables), self.jax.numpy.sum
        return self.jax.grad(lambda x: total(score(x, labels)))(points)

    def fixed(self, nodes: int) -> Callable:
        """``integrated_gradients`` of captum's rule."""
        return lambda variables, images, labels: self.attributions.integrated_gradients(
            self.score(variables), images, targets=labels, num_steps=nodes, rule="gauss_legendre"
        )

    def adaptive(self, bound: float) -> Callable:
        """``adaptive_integrated_gradients`` with its other defaults."""
        return lambda variables, images, labels: self.attributions.adaptive_integrated_gradients(
            self.score(variables), images, targets=labels, tolerance=bound
        )

    def looped(self, variables, images, labels, nodes, weights, count):
        """Any rule, of a number of nodes that is not known when this is compiled."""

        def add(i, total):
            return total + weights[i] * self.gradient(variables, nodes[i] * images, labels)

        return images * self.jax.lax.fori_loop(0, count, add, self.jax.numpy.zeros_like(images))

    def program(self, name: str, make: Callable[[], Callable], shared: int = 0) -> Callable:
        """A compiled function, the same for the same name."""
        if name not in self.programs:
            self.programs[name] = self.compiled(make(), shared)
        return self.programs[name]

    def prepare(self, options: Mapping[str, Any]) -> Callable[[], Any]:
        """See :class:`Contender`."""
        ready, (variables, images, labels) = self.jax.block_until_ready, self.arguments
        if "gradients" in options:
            gradient = self.program("gradient", lambda: self.gradient)

            def one_by_one():
                for _ in range(options["gradients"]):
                    ready(gradient(variables, images, labels))

            return one_by_one
        if "rule" in options:
            found = self.attributions.quadrature(options["nodes"], options["rule"])
            rest = -options["nodes"] % LONGEST
            nodes, weights = (self.jax.numpy.asarray(np.pad(x, (0, rest)), "float32") for x in found)
            looped = self.program("looped", lambda: self.looped, shared=3)
            return lambda: ready(looped(variables, images, labels, nodes, weights, options["nodes"]))
        if "bound" in options:
            bound = options["bound"]
            explain = self.program(f"adaptive {bound}", lambda: self.adaptive(bound))
        else:
            nodes = options["nodes"]
            explain = self.program(f"fixed {nodes}", lambda: self.fixed(nodes))
        return lambda: ready(explain(variables, images, labels))

    def read(self, raw: Any, options: Mapping[str, Any]) -> Found:
        """See :class:`Contender`."""
        values = np.asarray(raw if "rule" in options else raw.values)
        values = values.reshape(-1, *values.shape[2:])
        nodes = [options["nodes"]] * len(values) if "rule" in options else np.ravel(raw.nodes).tolist()
        return Found(values, nodes)


# PyTorch


class Torch:
    """A loop as one writes it by hand: a gradient of the whole batch per node, added up in place."""

    arms: tuple[str, ...] = ("torch",)

    def __init__(self):
        import torch

        self.torch = torch
        torch.set_num_threads(len(cores()))

    def load(self, problem: Problem) -> np.ndarray:
        """See :class:`Contender`. Everything is channels-last, and weights ask for no gradient."""
        torch = self.torch
        form: Any = {"memory_format": torch.channels_last}
        self.network = torch_network(problem.weights).eval().requires_grad_(False).to(**form)
        images = torch.from_numpy(np.ascontiguousarray(np.moveaxis(problem.images, -1, 1)))
        self.images, self.labels = (
            images.contiguous(**form),
            torch.from_numpy(problem.labels.astype(np.int64)),
        )
        with torch.no_grad():
            return (self.score(self.images) - self.score(0 * self.images)).numpy()

    def score(self, images):
        """The logit of each image's label."""
        return self.network(images).gather(1, self.labels[:, None])[:, 0]

    def prepare(self, options: Mapping[str, Any]) -> Callable[[], Any]:
        """See :class:`Contender`."""

        def explain():
            nodes, weights = np.polynomial.legendre.leggauss(options["nodes"])
            total = self.torch.zeros_like(self.images)
            for node, weight in zip(((nodes + 1) / 2).tolist(), (weights / 2).tolist(), strict=True):
                points = (node * self.images).requires_grad_()
                (gradient,) = self.torch.autograd.grad(self.score(points).sum(), points)
                total.add_(gradient, alpha=weight)
            return total.mul_(self.images)

        return explain

    def read(self, raw: Any, options: Mapping[str, Any]) -> Found:
        """See :class:`Contender`."""
        return Found(np.moveaxis(raw.detach().numpy(), 1, -1), [options["nodes"]] * len(raw))


class Captum(Torch):
    """captum's ``IntegratedGradients``, without the convergence delta, for which it would score all images again."""

    arms: tuple[str, ...] = ("captum",)

    def __init__(self):
        super().__init__()
        from captum.attr import IntegratedGradients

        self.make = IntegratedGradients

    def prepare(self, options: Mapping[str, Any]) -> Callable[[], Any]:
        """See :class:`Contender`. A chunk is said in nodes, since captum's own size may not be below the batch's."""
        chunk = options.get("chunk")
        size = None if chunk is None else chunk * len(self.images)
        rule = CAPTUM_RULES[options.get("rule", "gauss_legendre")]

        def explain():
            method: Any = self.make(self.network)
            return method.attribute(
                self.images,
                target=self.labels,
                n_steps=options["nodes"],
                method=rule,
                internal_batch_size=size,
            )

        return explain


def torch_network(weights: Mapping[str, np.ndarray]):
    """The ResNet or MobileNetV2 of these weights, as PyTorch's users write it.

    Where a ResNet's 3×3 convolution has a stride of 2, "SAME" puts the one zero that even maps need behind them, and
    PyTorch pads both sides alike; so a layer of its own pads there.
    """
    import torch
    from torch import nn

    mobile = any("DepthwiseConv" in name for name in weights)
    activation = nn.ReLU6 if mobile else nn.ReLU

    def tensor(name: str):
        return torch.from_numpy(np.ascontiguousarray(weights[name]))

    def conv(name: str, strides: int = 1) -> list[nn.Module]:
        kernel = np.ascontiguousarray(weights[f"params/{name}/kernel"].transpose(3, 2, 0, 1))
        outputs, inputs, side, _ = kernel.shape
        groups = outputs if "DepthwiseConv" in name else 1
        behind = strides > 1 and side > 1 and not mobile
        options: Any = {"groups": groups, "bias": False, "padding": 0 if behind else side // 2}
        layer = nn.Conv2d(inputs * groups, outputs, side, strides, **options)
        layer.weight = nn.Parameter(torch.from_numpy(kernel))
        return [nn.ZeroPad2d((0, 1, 0, 1)), layer] if behind else [layer]

    def norm(name: str) -> nn.Module:
        layer = nn.BatchNorm2d(weights[f"params/{name}/scale"].size)
        layer.load_state_dict(
            {
                "weight": tensor(f"params/{name}/scale"),
                "bias": tensor(f"params/{name}/bias"),
                "running_mean": tensor(f"batch_stats/{name}/mean"),
                "running_var": tensor(f"batch_stats/{name}/var"),
                "num_batches_tracked": torch.tensor(0),
            }
        )
        return layer

    def act() -> nn.Module:
        return activation(inplace=True)

    class Block(nn.Module):
        """A path and what its result is added to, if anything is."""

        def __init__(self, path: list[nn.Module], shortcut: nn.Module | None, last: nn.Module):
            super().__init__()
            self.path, self.shortcut, self.last = nn.Sequential(*path), shortcut, last

        def forward(self, x):
            y = self.path(x)
            return self.last(y if self.shortcut is None else y + self.shortcut(x))

    def residual(name: str, strides: int) -> Block:
        path = [
            *(*conv(f"{name}/Conv_0", strides), norm(f"{name}/BatchNorm_0"), act()),
            *(*conv(f"{name}/Conv_1"), norm(f"{name}/BatchNorm_1")),
        ]
        shortcut = nn.Identity()
        if f"params/{name}/shortcut/kernel" in weights:
            shortcut = nn.Sequential(*conv(f"{name}/shortcut", strides), norm(f"{name}/shortcut_norm"))
        return Block(path, shortcut, act())

    def inverted(name: str, strides: int) -> Block:
        layers = ["DepthwiseConv_0", "Conv_0"]
        if f"params/{name}/Conv_1/kernel" in weights:
            layers = ["Conv_0", "DepthwiseConv_0", "Conv_1"]
        path: list[nn.Module] = []
        for i, layer in enumerate(layers):
            own = strides if layer.startswith("Depthwise") else 1
            path += [*conv(f"{name}/{layer}", own), norm(f"{name}/BatchNorm_{i}"), act()]
        path.pop()
        first: Any = path[0]
        same = strides == 1 and first.in_channels == weights[f"params/{name}/{layers[-1]}/kernel"].shape[-1]
        return Block(path, nn.Identity() if same else None, nn.Identity())

    blocks = sorted({name.split("/")[1] for name in weights if "_block" in name}, key=stage_and_block)
    parts = [*conv("Conv_0"), norm("BatchNorm_0"), act()]
    for name in blocks:
        stage, block = stage_and_block(name)
        parts.append((inverted if mobile else residual)(name, 2 if stage > 1 and block == 1 else 1))
    if "params/Conv_1/kernel" in weights:
        parts += [*conv("Conv_1"), norm("BatchNorm_1"), act()]
    dense = nn.Linear(*weights["params/Dense_0/kernel"].shape)
    dense.load_state_dict(
        {"weight": tensor("params/Dense_0/kernel").T, "bias": tensor("params/Dense_0/bias")}
    )
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), dense)


def stage_and_block(name: str) -> tuple[int, int]:
    """Its two numbers: (2, 1) of ``stage2_block1``."""
    stage, block = name.removeprefix("stage").split("_block")
    return int(stage), int(block)


# The process

CONTENDERS: dict[str, Callable[[], Contender]] = {"kdjax": Kdjax, "captum": Captum, "torch": Torch}


def answer(contender: Contender, workload: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Does one job."""
    job = asked["job"]
    if job == "load":
        return {"difference": contender.load(read(workload, asked["network"])).tolist()}
    options = asked["options"]
    call = contender.prepare(options)
    if job == "memory":
        return {"peak_mib": peak_mib(call)}
    seconds, raw = timed(call)
    if "into" not in asked:
        return seconds
    found = contender.read(raw, options)
    np.save(asked["into"], found.values)
    return seconds | {"nodes": found.nodes}


def main() -> None:
    """Answers lines from stdin on stdout until there are no more."""
    serve(CONTENDERS, answer)
