r"""One library that measures curvature, in a process of its own; not run by hand.

``experiments.benchmarks.curvature`` starts one such process for every contender and number of threads, as
:mod:`experiments.benchmarks.workers` says. The workload is an ``.npz`` file with the images, labels and weights of all
networks. The jobs:

    load      builds the named network; the answer has its loss and, for kdjax, its default loop
    first     seconds of the first density of an arm, compilation included, and its Ritz values
    density   wall-clock and CPU seconds of a density of so many steps, and its Ritz values
    memory    MiB held at once during such a density, beyond what the process held before (Linux only)
    products  wall-clock and CPU seconds of a gradient and of products with the Hessian, in turns

A density is everything from weights and batch to the nodes and weights of the quadrature of one random start; it
includes what is computed once per Hessian, such as a linearised gradient or PyTorch's graph.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from unittest import mock

import numpy as np

from experiments.benchmarks.timing import cores, medians, timed
from experiments.benchmarks.workers import peak_mib, serve

HOST, COMPILED = "kdjax host", "kdjax compiled"


class Problem(NamedTuple):
    """A network and its batch. Kernels of four axes are convolutions, followed by ReLU and the mean of 2×2 pixels."""

    images: np.ndarray  # batch × inputs, or batch × height × width × channels
    labels: np.ndarray
    layers: list[tuple[np.ndarray, np.ndarray]]  # kernel (HWIO, or inputs × outputs) and bias

    @property
    def convolutional(self) -> bool:
        """Whether it starts with convolutions: dense layers then have ReLU between them, else tanh."""
        return self.layers[0][0].ndim == 4

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(kernel.size + bias.size for kernel, bias in self.layers)


def read(workload: Path, network: str) -> Problem:
    """A network of the file by its name."""
    with np.load(workload, allow_pickle=False) as arrays:
        count = sum(name.startswith(f"{network}/kernel") for name in arrays.files)
        layers = [(arrays[f"{network}/kernel{i}"], arrays[f"{network}/bias{i}"]) for i in range(count)]
        return Problem(arrays[f"{network}/images"], arrays[f"{network}/labels"], layers)


class Contender(Protocol):
    """One library at one number of threads; made without arguments, which imports it."""

    arms: tuple[str, ...]

    def load(self, problem: Problem) -> dict[str, Any]:
        """Takes a network up, in place of the one before; returns its loss."""
        ...

    def forget(self) -> None:
        """Drops what has been compiled, so that the next call is a first one."""
        ...

    def density(self, arm: str, steps: int) -> np.ndarray:
        """Ritz values of so many steps of Lanczos from one random start."""
        ...

    def products(self) -> dict[str, Callable[[], Any]]:
        """Gradient and products, each as a call that returns when the result is there."""
        ...


# JAX


class Kdjax:
    """``kdjax.curvature``, with both forms of its loop."""

    arms: tuple[str, ...] = (HOST, COMPILED)

    def __init__(self):
        import jax

        from kdjax import curvature

        self.jax, self.curvature = jax, curvature
        self.key = jax.random.key(0)

    def load(self, problem: Problem) -> dict[str, Any]:
        """See :class:`Contender`."""
        from kdjax.curvature.vectors import choose_loop

        array = self.jax.numpy.asarray
        self.params = [{"kernel": array(kernel), "bias": array(bias)} for kernel, bias in problem.layers]
        self.batch = {"image": array(problem.images), "label": array(problem.labels)}
        self.loss = jax_loss(problem.convolutional)
        default = choose_loop(None, self.hessian(), self.params)
        return {"loss": float(self.loss(self.params, self.batch)), "default": f"kdjax {default}"}

    def forget(self) -> None:
        """See :class:`Contender`."""
        self.jax.clear_caches()

    def hessian(self):
        """The Hessian as products, linearised anew."""
        return self.curvature.hessian(self.loss, self.params, self.batch)

    def density(self, arm: str, steps: int) -> np.ndarray:
        """See :class:`Contender`."""
        loop: Any = arm.removeprefix("kdjax ")
        options: dict[str, Any] = {"num_matvecs": steps, "num_probes": 1, "loop": loop}
        found = self.curvature.spectral_density(self.hessian(), self.params, self.key, **options)
        self.jax.block_until_ready(found)
        return np.asarray(found.nodes[0])

    def products(self) -> dict[str, Callable[[], Any]]:
        """See :class:`Contender`. A "cold" product linearises first; one "from scratch" is ``curvature.hvp``."""
        ready, gradient = self.jax.block_until_ready, self.jax.jit(self.jax.grad(self.loss))
        multiply = self.hessian()
        vector = self.curvature.random_like(self.key, self.params)
        return {
            "gradient": lambda: ready(gradient(self.params, self.batch)),
            "linearised": lambda: ready(multiply(vector)),
            "cold": lambda: ready(self.hessian()(vector)),
            "from scratch": lambda: ready(self.curvature.hvp(self.loss, self.params, vector, self.batch)),
        }


class Matfree(Kdjax):
    """matfree's Lanczos with full reorthogonalisation, on kdjax's products, in one compiled program."""

    arms: tuple[str, ...] = ("matfree",)

    def __init__(self):
        super().__init__()
        from matfree import decomp

        self.decomp = decomp
        self.forget()

    def forget(self) -> None:
        """See :class:`Contender`."""
        super().forget()
        self.program = self.jax.jit(self.tridiagonalise, static_argnums=2)

    def tridiagonalise(self, multiply, start, steps):
        """Ritz values and the weights of the quadrature."""
        run = self.decomp.tridiag_sym(steps, reortho="full")
        values, vectors = self.jax.numpy.linalg.eigh(run(lambda v, m: m(v), start, multiply).J_small)
        return values, vectors[0] ** 2

    def density(self, arm: str, steps: int) -> np.ndarray:
        """See :class:`Contender`."""
        start = self.curvature.random_like(self.key, self.params)
        return np.asarray(self.jax.block_until_ready(self.program(self.hessian(), start, steps))[0])

    def products(self) -> dict[str, Callable[[], Any]]:
        """See :class:`Contender`: it has none of its own."""
        return {}


def jax_loss(convolutional: bool) -> Callable[..., Any]:
    """Cross-entropy of the network as a function of weights and batch."""
    import jax
    import optax

    from kdjax.models import layers

    def loss(params, batch):
        x = batch["image"]
        for i, layer in enumerate(params):
            if layer["kernel"].ndim == 4:
                height, width, _, features = layer["kernel"].shape
                conv = layers.Conv(features, (height, width))
                x = jax.nn.relu(conv.apply({"params": layer}, x))  # type: ignore[arg-type]
                n, h, w, c = x.shape
                x = x.reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))
            else:
                x = x.reshape(len(x), -1) @ layer["kernel"] + layer["bias"]
                if i < len(params) - 1:
                    x = jax.nn.relu(x) if convolutional else jax.numpy.tanh(x)
        return optax.losses.softmax_cross_entropy_with_integer_labels(x, batch["label"]).mean()

    return loss


# PyTorch


class Torch:
    """A loop as one writes it by hand: the graph of the gradient kept, the basis one matrix, rows so far swept once."""

    arms: tuple[str, ...] = ("torch",)

    def __init__(self):
        import torch

        self.torch = torch
        torch.set_num_threads(len(cores()))
        torch.manual_seed(0)

    def load(self, problem: Problem) -> dict[str, Any]:
        """See :class:`Contender`."""
        self.model = torch_network(problem)
        self.params = list(self.model.parameters())
        images = np.moveaxis(problem.images, -1, 1) if problem.convolutional else problem.images
        self.images = self.torch.from_numpy(np.ascontiguousarray(images))
        self.labels = self.torch.from_numpy(problem.labels.astype(np.int64))
        self.criterion = self.torch.nn.CrossEntropyLoss()
        return {"loss": float(self.evaluate().detach())}

    def evaluate(self):
        """The loss with its graph."""
        return self.criterion(self.model(self.images), self.labels)

    def forget(self) -> None:
        """See :class:`Contender`: nothing is compiled."""

    def gradient(self, **options: bool):
        """The gradient by the parameters, as a tuple."""
        return self.torch.autograd.grad(self.evaluate(), self.params, **options)

    def split(self, vector):
        """A flat vector in pieces like the parameters."""
        pieces = vector.split([p.numel() for p in self.params])
        return [piece.view_as(p) for piece, p in zip(pieces, self.params, strict=True)]

    def flat(self, tensors):
        """Pieces as one vector."""
        return self.torch.cat([x.reshape(-1) for x in tensors])

    def start(self):
        """A random unit vector."""
        vector = self.torch.randn(sum(p.numel() for p in self.params))
        return vector / vector.norm()

    def density(self, arm: str, steps: int) -> np.ndarray:
        """See :class:`Contender`."""
        torch = self.torch
        gradient = self.gradient(create_graph=True)
        v, basis = self.start(), torch.empty(steps, sum(p.numel() for p in self.params))
        matrix = torch.zeros(steps, steps)
        for i in range(steps):
            basis[i] = v
            pieces = torch.autograd.grad(gradient, self.params, self.split(v), retain_graph=True)
            w, rows = self.flat(pieces), basis[: i + 1]
            alpha = torch.dot(w, v)
            w = w.sub_(v, alpha=float(alpha))
            if i:
                w = w.sub_(basis[i - 1], alpha=float(matrix[i, i - 1]))
            w = torch.addmv(w, rows.T, rows @ w, alpha=-1)
            beta = w.norm()
            matrix[i, i] = alpha
            if i + 1 < steps:
                matrix[i, i + 1] = matrix[i + 1, i] = beta
                v = w / beta
        values, vectors = torch.linalg.eigh(matrix)
        _ = vectors[0] ** 2
        return values.numpy()

    def products(self) -> dict[str, Callable[[], Any]]:
        """See :class:`Contender`. The product of a graph that is kept, and one that makes its graph first."""
        kept, pieces = self.gradient(create_graph=True), self.split(self.start())

        def product(gradient, **options: bool):
            return self.torch.autograd.grad(gradient, self.params, pieces, **options)

        return {
            "gradient": self.gradient,
            "kept graph": lambda: product(kept, retain_graph=True),
            "cold": lambda: product(self.gradient(create_graph=True)),
        }


class PyHessian(Torch):
    """PyHessian's ``density`` with one batch as ``data=``, which keeps the graph.

    The release calls ``torch.eig``, which PyTorch no longer has; the repository since writes ``torch.linalg.eig`` in
    its place and is otherwise the same there. So it is given the function that it looks for.
    """

    arms: tuple[str, ...] = ("pyhessian",)

    def __init__(self):
        super().__init__()
        import pyhessian

        self.pyhessian = pyhessian

    def density(self, arm: str, steps: int) -> np.ndarray:
        """See :class:`Contender`."""
        torch = self.torch

        def eig(matrix, eigenvectors):
            values, vectors = torch.linalg.eig(matrix)
            return torch.view_as_real(values), vectors.real

        data = (self.images, self.labels)
        with mock.patch.object(torch, "eig", eig, create=True):
            computer = self.pyhessian.hessian(self.model, self.criterion, data=data, cuda=False)
            (values,), _ = computer.density(iter=steps, n_v=1)
        for p in self.params:  # a gradient with its graph and its parameter hold each other
            p.grad = None
        return np.sort(np.asarray(values, np.float32))

    def products(self) -> dict[str, Callable[[], Any]]:
        """See :class:`Contender`: its product is that of the kept graph."""
        return {}


class Curvlinops(Torch):
    """curvlinops' Lanczos, which does not reorthogonalise, without the search for the spectrum's ends before it."""

    arms: tuple[str, ...] = ("curvlinops",)

    def __init__(self):
        super().__init__()
        import curvlinops
        from curvlinops.papyan2020traces import spectrum

        self.curvlinops, self.spectrum = curvlinops, spectrum

    def hessian(self):
        """The Hessian as its linear operator."""
        data = [(self.images, self.labels)]
        make = self.curvlinops.HessianLinearOperator
        return make(self.model, self.criterion, self.params, data, check_deterministic=False)

    def density(self, arm: str, steps: int) -> np.ndarray:
        """See :class:`Contender`."""
        values, vectors = self.spectrum.fast_lanczos(self.hessian(), steps)
        _ = vectors[0] ** 2
        return values.numpy()

    def products(self) -> dict[str, Callable[[], Any]]:
        """See :class:`Contender`."""
        multiply, vector = self.hessian(), self.start()
        return {"gradient": self.gradient, "operator": lambda: multiply @ vector}


def torch_network(problem: Problem):
    """The network as a module, with the same weights in PyTorch's order."""
    import torch
    from torch import nn

    parts, activation = [], nn.ReLU if problem.convolutional else nn.Tanh
    before = 0  # channels of the map that the next dense layer reads
    for kernel, bias in problem.layers:
        if kernel.ndim == 4:
            *window, inputs, before = kernel.shape
            layer = nn.Conv2d(inputs, before, window, padding="same")
            weight, after = kernel.transpose(3, 2, 0, 1), [nn.ReLU(), nn.AvgPool2d(2)]
        else:
            if before:  # a map is flattened channels first here, channels last there
                kernel = kernel.reshape(-1, before, kernel.shape[1]).transpose(1, 0, 2)
                kernel, before = kernel.reshape(-1, kernel.shape[2]), 0
                parts.append(nn.Flatten())
            layer, weight, after = nn.Linear(*kernel.shape), kernel.T, [activation()]
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(np.ascontiguousarray(weight)))
            layer.bias.copy_(torch.from_numpy(bias))  # type: ignore[union-attr]
        parts += [layer, *after]
    return nn.Sequential(*parts[:-1])


# The process

CONTENDERS: dict[str, Callable[[], Contender]] = {
    "kdjax": Kdjax,
    "matfree": Matfree,
    "pyhessian": PyHessian,
    "curvlinops": Curvlinops,
    "torch": Torch,
}


def in_turns(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, dict[str, float]]:
    """Medians of all calls, each once per turn, in so many turns as the time allows; at least three."""
    start = time.perf_counter()
    for call in calls.values():
        call()
    start, seen = time.perf_counter(), {name: [] for name in calls}
    while len(next(iter(seen.values()))) < 3 or time.perf_counter() - start < seconds:
        for name, call in calls.items():
            seen[name].append(timed(call)[0])
    return {name: medians(times) for name, times in seen.items()}


def answer(contender: Contender, workload: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Does one job."""
    job = asked["job"]
    if job == "load":
        return contender.load(read(workload, asked["network"]))
    if job == "products":
        calls = contender.products()
        return in_turns({n: calls[n] for n in asked.get("names", calls)}, asked["seconds"]) if calls else {}

    def density() -> Sequence[float]:
        return contender.density(asked["arm"], asked["steps"]).tolist()

    if job == "memory":
        return {"peak_mib": peak_mib(density)}
    if job == "first":
        contender.forget()
    seconds, values = timed(density)
    return seconds | {"values": values}


def main() -> None:
    """Answers lines from stdin on stdout until there are no more."""
    serve(CONTENDERS, answer)
