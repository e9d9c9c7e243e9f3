r"""One framework that distils, in a process of its own; not run by hand.

``experiments.benchmarks.distillation_step`` starts one such process for every framework and number of threads, as
:mod:`experiments.benchmarks.workers` says. The workload is an ``.npz`` file with images, labels and initial weights,
the same for all. The jobs:

    losses      the plain and the KD loss of the first three batches, from the shared weights
    settle      tries the framework's settings, keeps the fastest, and says how long the first epoch took
    steps       seconds per step of the student on the labels alone (plain), and of distillation with the teacher in the
                step (kd; kdjax gathers cached answers instead), in turns, so that their quotient is meaningful
    precompute  kdjax only: seconds per image of computing the teacher's answers and writing them to disk
    online      kdjax only: seconds per step with the teacher in the step

Every framework is used as its users would: Keras by ``fit`` on NumPy arrays, PyTorch by a plain loop over resident
channels-last tensors, kdjax by ``train.fit`` over resident uint8 arrays, which it normalises in the step.
"""

import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from experiments.benchmarks.timing import cores, medians
from experiments.benchmarks.workers import serve

BATCH_SIZE, LEARNING_RATE, EPSILON = 64, 1e-3, 1e-7
TEMPERATURE, HARD_WEIGHT = 3.0, 0.1
LAYERS = ("Conv_0", "Conv_1", "Dense_0")
PLAIN, KD, ONLINE = "plain", "kd", "online"


class Workload:
    """The images, labels and weights that every framework starts from."""

    def __init__(self, path: Path):
        with np.load(path, allow_pickle=False) as arrays:
            self.arrays = dict(arrays)
        self.images, self.labels = self.arrays["images"], self.arrays["labels"]
        self.mean, self.std = (tuple(self.arrays[name].tolist()) for name in ("mean", "std"))
        self.steps = len(self.images) // BATCH_SIZE

    def inputs(self) -> np.ndarray:
        """The normalised images, float32."""
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return (self.images.astype(np.float32) / 255 - mean) / std

    def weights(self, network: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """Kernel (HWIO, or inputs × outputs) and bias of each layer of "teacher" or "student"."""
        return [tuple(self.arrays[f"{network}/{x}/{leaf}"] for leaf in ("kernel", "bias")) for x in LAYERS]

    def widths(self, network: str) -> tuple[int, int]:
        """Channels of the two convolutions."""
        first, second, _ = (bias.size for _, bias in self.weights(network))
        return first, second

    def first_batches(self) -> list[slice]:
        """Where three batches lie in the order of the arrays."""
        return [slice(i * BATCH_SIZE, (i + 1) * BATCH_SIZE) for i in range(3)]


class Clock:
    """Wall-clock and CPU seconds since it was made; those of all threads."""

    def __init__(self):
        self.start = time.perf_counter(), time.process_time()

    def per(self, count: int) -> dict[str, float]:
        """Both, divided by a number of steps or images."""
        wall, cpu = time.perf_counter() - self.start[0], time.process_time() - self.start[1]
        return {"wall": wall / count, "cpu": cpu / count}


class Peer(Protocol):
    """One framework at one number of threads; made without arguments, which imports it."""

    arms: tuple[str, ...]  # none: every framework does the same

    def load(self, work: Workload) -> None:
        """Prepares the images, labels and networks."""
        ...

    def losses(self, arm: str) -> list[float]:
        """Losses of the first three batches, trained on in order from the shared weights."""
        ...

    def settle(self) -> dict[str, Any]:
        """Chooses settings and warms up; returns them and the seconds of the first KD epoch."""
        ...

    turns: int  # how often plain and KD steps alternate in one measurement

    def measure(self, arm: str) -> dict[str, float]:
        """Seconds per step, over at least one epoch that nothing is compiled in."""
        ...


# kdjax


class Kdjax:
    """The library as its experiments use it: resident arrays, cached answers, ``train.fit``."""

    arms, turns = (), 5  # its two steps are nearly equal, and short

    def __init__(self):
        import jax
        import optax  # noqa: F401

        from kdjax import models, teacher  # noqa: F401

        self.jax = jax

    def load(self, work: Workload) -> None:
        """See :class:`Peer`."""
        import optax

        from kdjax import models, parallel

        self.work, self.devices = work, parallel.local_devices()
        self.networks = {
            name: models.build(f"keras_{name}", num_classes=10) for name in ("teacher", "student")
        }
        self.params = {name: _nested(work, name) for name in self.networks}
        self.tx = optax.adam(LEARNING_RATE, eps=EPSILON)
        self.steps_per_dispatch, self.teacher_batch = 1, 64
        self.runs: dict[str, Callable] = {}
        self.resident: Any = None

    def ask(self, params, images):
        """The teacher as a function of images in [0, 255]."""
        from kdjax import data, models

        inputs = data.normalise(images, mean=self.work.mean, std=self.work.std)
        outputs, _ = models.apply_fn(self.networks["teacher"])(params, {}, inputs, train=False)
        return {"logits": outputs.logits}

    def precompute(self) -> dict[str, float]:
        """Seconds per image, from the end of the first chunk to that of the last, and seconds of the first."""
        from kdjax import teacher

        marks: list[tuple[int, Clock]] = []
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as directory:
            cached = teacher.precompute(
                Path(directory) / "answers",
                self.ask,
                self.params["teacher"],
                self.work.images,
                settings={},
                batch_size=self.teacher_batch,
                chunk_size=math.ceil(len(self.work.images) / 5 / self.teacher_batch) * self.teacher_batch,
                progress=lambda done, total: marks.append((done, Clock())),
            )
        if self.resident is None:
            self._put(cached.arrays)
        (first, began), (last, ended) = marks[0], marks[-1]
        wall, cpu = (end - begin for begin, end in zip(began.start, ended.start, strict=True))
        return {
            "wall": wall / (last - first),
            "cpu": cpu / (last - first),
            "first_chunk": began.start[0] - start,
        }

    def _put(self, answers: dict[str, np.ndarray]) -> None:
        from kdjax import parallel

        resident = {
            "data": {"image": self.work.images, "label": self.work.labels},
            "answers": answers,
            "teacher": self.params["teacher"],
        }
        self.resident = parallel.replicate(resident, self.devices)

    def _run(self, arm: str) -> Callable:
        import jax.numpy as jnp
        import optax

        from kdjax import data, losses, models, parallel, teacher, train

        shapes = models.from_linen(self.networks["teacher"], self.work.images.shape[1:]).output_shapes
        online = teacher.TeacherSignal(None, shapes, online=self.ask)

        def make_batch(resident, index, key):
            batch = data.gather(resident["data"], index)
            if arm == KD:
                batch |= teacher.gather(resident["answers"], index)
            if arm == ONLINE:
                batch = teacher.attach_online(online, resident["teacher"], batch)
            return batch | {"image": data.normalise(batch["image"], mean=self.work.mean, std=self.work.std)}

        def objective(outputs, batch):
            labels = batch["label"]
            hard = jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(outputs.logits, labels))
            if arm == PLAIN:
                return {"hard": hard}
            soft = losses.soft_target_kl(outputs.logits, batch["teacher_logits"], temperature=TEMPERATURE)
            return {"hard": HARD_WEIGHT * hard, "soft": (1 - HARD_WEIGHT) * jnp.mean(soft)}

        apply_fn = models.apply_fn(self.networks["student"])
        step = train.make_train_step(apply_fn, objective, self.tx, axis_name=parallel.AXIS)
        run = train.make_run(step, make_batch)
        return parallel.data_parallel(run, replicated=2, devices=self.devices, donate_first=True)

    def _state(self):
        from kdjax import parallel, train

        return parallel.replicate(train.init_state(self.params["student"], {}, self.tx, seed=0), self.devices)

    def losses(self, arm: str) -> list[float]:
        """See :class:`Peer`."""
        if self.resident is None:
            self.precompute()
        run, state, values = self._run(arm), self._state(), []
        for where in self.work.first_batches():
            index = np.arange(where.start, where.stop, dtype=np.int32)[:, None]
            state, metrics = run(state, self.resident, index)
            values.append(float(metrics["loss"][0]))
        return values

    def _epochs(self, arm: str, epochs: int) -> list[Clock]:
        """Trains from the shared weights; returns the time at the end of each epoch."""
        from kdjax import data, train

        if arm not in self.runs:
            self.runs[arm] = self._run(arm)
        feed = data.resident_feed(
            self.resident,
            np.arange(len(self.work.images)),
            seed=0,
            batch_size=BATCH_SIZE,
            steps_per_dispatch=self.steps_per_dispatch,
        )
        ends: list[Clock] = []

        def progress(steps, record):
            if record and record["epoch"] == len(ends) + 1:
                ends.append(Clock())

        train.fit(self.runs[arm], self._state(), feed, epochs=epochs, progress=progress)
        return ends

    def measure(self, arm: str) -> dict[str, float]:
        """See :class:`Peer`; the first epoch is not counted."""
        epochs = 2 if arm == ONLINE else 4
        first, *_, last = self._epochs(arm, epochs)
        wall, cpu = (b - a for a, b in zip(first.start, last.start, strict=True))
        steps = (epochs - 1) * self.work.steps
        return {"wall": wall / steps, "cpu": cpu / steps}

    def settle(self) -> dict[str, Any]:
        """See :class:`Peer`."""
        first_chunk = self.precompute()["first_chunk"]
        start = time.perf_counter()
        self._epochs(KD, 1)
        first = time.perf_counter() - start
        steps, times = {}, {}
        for self.steps_per_dispatch in (1, 10, 30):
            steps[self.steps_per_dispatch] = min(self.measure(KD)["wall"] for _ in range(3))
        self.steps_per_dispatch = min(steps, key=steps.__getitem__)
        for self.teacher_batch in (16, 32, 64):
            times[self.teacher_batch] = self.precompute()["wall"]
        self.teacher_batch = min(times, key=times.__getitem__)
        self.measure(PLAIN)
        self.measure(ONLINE)
        settings = {"steps_per_dispatch": self.steps_per_dispatch, "fill_batch_size": self.teacher_batch}
        return {"settings": settings, "first_epoch_s": first, "first_chunk_s": first_chunk}


def _nested(work: Workload, network: str) -> dict[str, dict[str, np.ndarray]]:
    pairs = zip(LAYERS, work.weights(network), strict=True)
    return {layer: {"kernel": kernel, "bias": bias} for layer, (kernel, bias) in pairs}


# Keras


class Keras:
    """Keras 3's own ``Distiller`` under ``fit``, on one of its backends."""

    arms, turns = (), 1

    def __init__(self, backend: str):
        os.environ |= {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        import keras

        if backend == "torch":
            import torch

            torch.set_num_threads(len(cores()))
        self.keras = keras

    def load(self, work: Workload) -> None:
        """See :class:`Peer`."""
        self.work = work
        self.inputs, self.labels = work.inputs(), work.labels
        self.options: dict[str, Any] = {}
        self.models: dict[str, Any] = {}

    def _network(self, name: str):
        first, second = self.work.widths(name)
        layers = self.keras.layers
        network = self.keras.Sequential(
            [
                self.keras.Input(self.work.images.shape[1:]),
                layers.Conv2D(first, 3, strides=2, padding="same"),
                layers.LeakyReLU(negative_slope=0.2),
                layers.MaxPooling2D(2, strides=1, padding="same"),
                layers.Conv2D(second, 3, strides=2, padding="same"),
                layers.Flatten(),
                layers.Dense(10),
            ]
        )
        network.set_weights([array for pair in self.work.weights(name) for array in pair])
        return network

    def _model(self, arm: str):
        keras = self.keras
        model = self._network("student")
        if arm == KD:
            # Keras 3.15 takes its own default, the name "kl_divergence", for a function of logits: no softmax, no T².
            soft = keras.distillation.LogitsDistillation(TEMPERATURE, loss=keras.losses.KLDivergence())
            model = keras.distillation.Distiller(
                self._network("teacher"), model, soft, student_loss_weight=HARD_WEIGHT
            )
        model.compile(
            keras.optimizers.Adam(LEARNING_RATE, epsilon=EPSILON),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            **self.options,
        )
        return model

    def losses(self, arm: str) -> list[float]:
        """See :class:`Peer`."""
        model, values = self._model(arm), []
        for where in self.work.first_batches():
            model.reset_metrics()
            logs = model.train_on_batch(self.inputs[where], self.labels[where], return_dict=True)
            values.append(float(logs["total_loss" if arm == KD else "loss"]))
        return values

    def measure(self, arm: str) -> dict[str, float]:
        """See :class:`Peer`; the time of an epoch is taken between its callbacks, without the set-up of ``fit``."""
        if arm not in self.models:
            self.models[arm] = self._model(arm)
        seen: list[dict[str, float]] = []
        clock: list[Clock] = []
        callback = self.keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: clock.append(Clock()),
            on_epoch_end=lambda epoch, logs: seen.append(clock[-1].per(self.work.steps)),
        )
        self.models[arm].fit(
            self.inputs, self.labels, batch_size=BATCH_SIZE, epochs=1, verbose=0, callbacks=[callback]
        )
        return seen[-1]

    def settle(self) -> dict[str, Any]:
        """See :class:`Peer`."""
        candidates: list[dict[str, Any]] = [{}]
        if self.keras.backend.backend() != "torch":  # whose trainer runs single steps only
            candidates += [{"steps_per_execution": 10}]
        if self.keras.backend.backend() == "tensorflow":
            candidates += [{"jit_compile": False}, {"jit_compile": False, "steps_per_execution": 10}]
        first, found = 0.0, []
        for self.options in candidates:
            self.models = {}
            start = time.perf_counter()
            self.measure(KD)
            first = first or time.perf_counter() - start
            found.append((min(self.measure(KD)["wall"] for _ in range(2)), self.options, self.models))
        _, self.options, self.models = min(found, key=lambda entry: entry[0])
        self.measure(PLAIN)
        return {"settings": self.options or {"compile": "defaults"}, "first_epoch_s": first}


# PyTorch


class Torch:
    """A plain loop: resident channels-last tensors, the teacher under ``no_grad`` in the step."""

    arms, turns = (), 1

    def __init__(self):
        import torch

        torch.set_num_threads(len(cores()))
        self.torch = torch

    def load(self, work: Workload) -> None:
        """See :class:`Peer`."""
        torch, self.work = self.torch, work
        self.inputs = self._channels_last(torch.from_numpy(work.inputs()).permute(0, 3, 1, 2))
        self.labels = torch.from_numpy(work.labels.astype(np.int64))
        self.teacher = self._network("teacher").eval()
        self.options: dict[str, Any] = {}
        self.students: dict[str, tuple[Any, Any]] = {}

    def _channels_last(self, x):
        return x.contiguous(memory_format=self.torch.channels_last)

    def _network(self, name: str):
        nn, F = self.torch.nn, self.torch.nn.functional
        first, second = self.work.widths(name)
        conv_1, conv_2 = nn.Conv2d(1, first, 3, stride=2), nn.Conv2d(first, second, 3, stride=2)
        dense = nn.Linear(self.work.weights(name)[2][0].shape[0], 10)

        class Network(nn.Module):
            """The tutorial's network; "same" padding of an even map falls to the right and below."""

            def __init__(self):
                super().__init__()
                self.conv_1, self.conv_2, self.dense = conv_1, conv_2, dense

            def forward(self, x):
                x = F.leaky_relu(self.conv_1(F.pad(x, (0, 1, 0, 1))), 0.2)
                x = F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-math.inf), 2, stride=1)
                x = self.conv_2(F.pad(x, (0, 1, 0, 1)))
                return self.dense(x.flatten(1))

        with self.torch.no_grad():
            for layer, (kernel, bias) in zip((conv_1, conv_2, dense), self.work.weights(name), strict=True):
                layer.weight.copy_(self.torch.from_numpy(_torch_order(kernel, second)))
                layer.bias.copy_(self.torch.from_numpy(bias))
        return Network().to(memory_format=self.torch.channels_last)

    def _fresh(self):
        student = self._network("student")
        optimizer = self.torch.optim.Adam(student.parameters(), LEARNING_RATE, eps=EPSILON, **self.options)
        return student, optimizer

    def _step(self, arm: str, student, optimizer, inputs, labels):
        F = self.torch.nn.functional
        if arm == KD:
            with self.torch.no_grad():
                answers = F.log_softmax(self.teacher(inputs) / TEMPERATURE, 1)
        optimizer.zero_grad(set_to_none=True)
        logits = student(inputs)
        loss = F.cross_entropy(logits, labels)
        if arm == KD:
            mine = F.log_softmax(logits / TEMPERATURE, 1)
            soft = F.kl_div(mine, answers, reduction="batchmean", log_target=True)
            loss = HARD_WEIGHT * loss + (1 - HARD_WEIGHT) * TEMPERATURE**2 * soft
        loss.backward()
        optimizer.step()
        return loss.detach()

    def losses(self, arm: str) -> list[float]:
        """See :class:`Peer`."""
        pair = self._fresh()
        batches = [(self.inputs[where], self.labels[where]) for where in self.work.first_batches()]
        return [float(self._step(arm, *pair, *batch)) for batch in batches]

    def measure(self, arm: str) -> dict[str, float]:
        """See :class:`Peer`."""
        pair = self.students.setdefault(arm, self._fresh())
        epochs = 1 if arm == KD else 4
        clock = Clock()
        for _ in range(epochs):
            total, order = 0, self.torch.randperm(len(self.labels))
            for step in range(self.work.steps):
                rows = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
                total = total + self._step(arm, *pair, self.inputs[rows], self.labels[rows])
            float(total)
        return clock.per(epochs * self.work.steps)

    def settle(self) -> dict[str, Any]:
        """See :class:`Peer`."""
        start = time.perf_counter()
        self.measure(KD)
        first = time.perf_counter() - start
        found = []
        for self.options in ({}, {"foreach": True}, {"fused": True}):
            self.students = {}
            self.measure(PLAIN)
            times = [self.measure(PLAIN)["wall"] for _ in range(3)]
            found.append((min(times), self.options, self.students))
        _, self.options, self.students = min(found, key=lambda entry: entry[0])
        self.measure(KD)
        return {"settings": {"Adam": self.options or "defaults"}, "first_epoch_s": first}


def _torch_order(kernel: np.ndarray, channels: int) -> np.ndarray:
    """A kernel as PyTorch wants it; the dense one reads a map flattened channels first."""
    if kernel.ndim == 4:
        return np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
    side = math.isqrt(kernel.shape[0] // channels)
    return np.ascontiguousarray(
        kernel.reshape(side, side, channels, -1).transpose(3, 2, 0, 1).reshape(kernel.shape[1], -1)
    )


# The process

FRAMEWORKS: dict[str, Callable[[], Peer]] = {
    "kdjax": Kdjax,
    "keras_jax": lambda: Keras("jax"),
    "keras_tensorflow": lambda: Keras("tensorflow"),
    "keras_torch": lambda: Keras("torch"),
    "torch": Torch,
}


def in_turns(peer: Peer) -> dict[str, dict[str, float]]:
    """Medians of plain and KD steps measured alternately."""
    seen: dict[str, list[dict[str, float]]] = {PLAIN: [], KD: []}
    for _ in range(peer.turns):
        for arm, values in seen.items():
            values.append(peer.measure(arm))
    return {arm: medians(values) for arm, values in seen.items()}


def answer(peer: Peer, workload: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Does one job."""
    if asked["job"] == "losses":
        peer.load(Workload(workload))
        return {arm: peer.losses(arm) for arm in (PLAIN, KD)}
    jobs: dict[str, Callable[[], dict[str, Any]]] = {
        "settle": peer.settle,
        "steps": lambda: in_turns(peer),
        "precompute": lambda: peer.precompute(),  # pyright: ignore[reportAttributeAccessIssue]
        "online": lambda: peer.measure(ONLINE),
    }
    return jobs[asked["job"]]()


def main() -> None:
    """Answers lines from stdin on stdout until there are no more."""
    serve(FRAMEWORKS, answer)
