r"""One framework that distils, in a process of its own; not run by hand.

``experiments.benchmarks.distillation_step`` starts one such process for every framework and number of threads, as
:mod:`experiments.benchmarks.workers` says. The workload is an ``.npz`` file with images, labels and initial weights,
the same for all. The jobs:

    losses  the losses of the first three batches, from the shared weights
    settle  tries the framework's settings, keeps the fastest of each arm, and says how long the first epochs took
    steps   seconds per step of the student on the labels alone (plain) and with cached answers of the teacher (cached),
            in turns, so that their quotient is meaningful; then with the teacher in the step (online); and seconds per
            image of computing the teacher's answers (precompute), which kdjax also writes to disk

Every framework is used as its users would: Keras by ``fit`` on NumPy arrays, PyTorch by a plain loop over resident
channels-last tensors, kdjax by ``train.fit`` over resident uint8 arrays, which it normalises in the step. Keras's own
``Distiller`` runs the teacher in the step; cached answers are columns of its targets, beside the labels. torch_compile
is the PyTorch loop with forward pass, loss and their gradient compiled; its answers are computed without.
"""

import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from experiments.benchmarks.timing import cores, medians
from experiments.benchmarks.workers import serve

BATCH_SIZE, LEARNING_RATE, EPSILON = 64, 1e-3, 1e-7
TEMPERATURE, HARD_WEIGHT = 3.0, 0.1
LAYERS = ("Conv_0", "Conv_1", "Dense_0")
ARMS = PLAIN, CACHED, ONLINE = "plain", "cached", "online"
TEACHER_BATCHES = (16, 32, 64)  # of which the fastest computes the answers to cache
COMPILE_SECONDS = 240  # that torch.compile may take for each arm


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

    arms: tuple[str, ...] = ()  # none: every framework does the same
    turns: int = 1  # how often plain and cached steps alternate in one measurement
    candidates: Sequence[Any]  # settings to try
    options: dict[str, Any]  # arm → its setting, one of the candidates
    teacher_batch: int = TEACHER_BATCHES[-1]

    def load(self, work: Workload) -> None:
        """Prepares the images, labels and networks."""
        ...

    def losses(self, arm: str) -> list[float]:
        """Losses of the first three batches, trained on in order from the shared weights."""
        ...

    def precompute(self) -> dict[str, float]:
        """Caches the teacher's answers to all images; returns seconds per image."""
        ...

    def measure(self, arm: str) -> dict[str, float]:
        """Seconds per step, over at least one epoch; the first call of a setting also compiles."""
        ...

    def settle(self) -> dict[str, Any]:
        """Chooses settings and warms up; returns them and the seconds of each arm's first epoch."""
        found: dict[str, Any] = {}
        for arm in ARMS:
            times = []
            for setting in self.candidates:
                self.options[arm] = setting
                start = time.perf_counter()
                self.measure(arm)
                found.setdefault(f"first_{arm}_epoch_s", time.perf_counter() - start)
                times.append(min(self.measure(arm)["wall"] for _ in range(2)))
            self.options[arm] = self.candidates[times.index(min(times))]
        times = []
        for self.teacher_batch in TEACHER_BATCHES:
            self.precompute()  # compiles
            times.append(self.precompute()["wall"])
        self.teacher_batch = TEACHER_BATCHES[times.index(min(times))]
        return {"settings": self.options | {"teacher_batch": self.teacher_batch}} | found


# kdjax


class Kdjax(Peer):
    """The library as its experiments use it: resident arrays, cached answers, ``train.fit``."""

    turns = 5  # its two steps are nearly equal, and short
    candidates = (1, 10, 30)  # steps per dispatch

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
        self.options = dict.fromkeys(ARMS, 1)
        self.runs: dict[str, Callable] = {}
        self.resident: Any = None

    def ask(self, params, images):
        """The teacher as a function of images in [0, 255]."""
        from kdjax import data, models

        inputs = data.normalise(images, mean=self.work.mean, std=self.work.std)
        outputs, _ = models.apply_fn(self.networks["teacher"])(params, {}, inputs, train=False)
        return {"logits": outputs.logits}

    def precompute(self) -> dict[str, float]:
        """See :class:`Peer`; from the end of the first chunk to that of the last. Also the seconds of the first."""
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
            if arm == CACHED:
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
            steps_per_dispatch=self.options[arm],
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
        """See :class:`Peer`; also the seconds of the first chunk of answers."""
        return {"first_chunk_s": self.precompute()["first_chunk"]} | super().settle()

    def sweep(self, students: int) -> dict[str, dict[str, float]]:
        """Seconds per step of so many students with weights of their own, by each form of :mod:`kdjax.vmapped`.

        Every student has cached answers, ten weights of the labels in turn, and an order of its own; a call has ten
        steps, and the first call of a form, which compiles, is not counted.
        """
        import jax.numpy as jnp
        import optax

        from kdjax import data, losses, models, parallel, teacher, train, vmapped

        def make_batch(resident, index, key):
            batch = data.gather(resident["data"], index) | teacher.gather(resident["answers"], index)
            image = data.normalise(batch["image"], mean=self.work.mean, std=self.work.std)
            return batch | {"image": image, "settings": resident["settings"]}

        def objective(outputs, batch):
            a = batch["settings"]["hard_weight"]
            hard = optax.losses.softmax_cross_entropy_with_integer_labels(outputs.logits, batch["label"])
            soft = losses.soft_target_kl(outputs.logits, batch["teacher_logits"], temperature=TEMPERATURE)
            return {"hard": a * jnp.mean(hard), "soft": (1 - a) * jnp.mean(soft)}

        step = train.make_train_step(
            models.apply_fn(self.networks["student"]), objective, self.tx, axis_name=parallel.AXIS
        )
        weights = np.arange(students, dtype=np.float32) % 10 / 10 + 0.1
        settings = parallel.replicate({"hard_weight": weights}, self.devices)
        rng, found = np.random.default_rng(0), {}
        for mapping in vmapped.MAPPINGS:
            many = vmapped.make_run(train.make_run(step, make_batch), mapping=mapping)
            run = parallel.data_parallel(many, replicated=2, devices=self.devices, donate_first=True)
            own = [
                train.init_state(self.params["student"], {}, self.tx, seed=seed) for seed in range(students)
            ]
            state = parallel.replicate(vmapped.stack(own), self.devices)
            index = rng.integers(0, len(self.work.images), (BATCH_SIZE, 10, students), np.int32)
            for _ in range(2):  # the first compiles
                clock = Clock()
                state, metrics = run(state, self.resident | {"settings": settings}, index)
                self.jax.block_until_ready(metrics)
            found[mapping] = clock.per(10)
        return found


def _nested(work: Workload, network: str) -> dict[str, dict[str, np.ndarray]]:
    pairs = zip(LAYERS, work.weights(network), strict=True)
    return {layer: {"kernel": kernel, "bias": bias} for layer, (kernel, bias) in pairs}


# Keras


class Keras(Peer):
    """Keras 3 under ``fit``, on one of its backends; its own ``Distiller`` where the teacher is in the step."""

    def __init__(self, backend: str):
        os.environ |= {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        import keras

        if backend == "torch":
            import torch

            torch.set_num_threads(len(cores()))
        self.keras = keras
        self.candidates = [{}]
        if backend != "torch":  # whose trainer runs single steps only
            self.candidates += [{"steps_per_execution": 10}]
        if backend == "tensorflow":
            self.candidates += [{"jit_compile": False}, {"jit_compile": False, "steps_per_execution": 10}]

    def load(self, work: Workload) -> None:
        """See :class:`Peer`."""
        self.work = work
        self.inputs = work.inputs()
        self.targets: dict[str, Any] = dict.fromkeys(ARMS, work.labels)
        self.options = {arm: {} for arm in ARMS}
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
        loss: Any = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        if arm == CACHED:
            loss = self._cached_loss
        if arm == ONLINE:
            # Keras 3.15 takes its own default, the name "kl_divergence", for a function of logits: no softmax, no T².
            soft = keras.distillation.LogitsDistillation(TEMPERATURE, loss=keras.losses.KLDivergence())
            model = keras.distillation.Distiller(
                self._network("teacher"), model, soft, student_loss_weight=HARD_WEIGHT
            )
        model.compile(keras.optimizers.Adam(LEARNING_RATE, epsilon=EPSILON), loss=loss, **self.options[arm])
        return model

    def _cached_loss(self, targets, logits):
        """The Distiller's, per example; the targets are the label and the teacher's logits."""
        losses, ops = self.keras.losses, self.keras.ops
        hard = losses.sparse_categorical_crossentropy(
            ops.cast(targets[:, 0], "int32"), logits, from_logits=True
        )
        theirs, ours = (ops.softmax(x / TEMPERATURE) for x in (targets[:, 1:], logits))
        return HARD_WEIGHT * hard + (1 - HARD_WEIGHT) * TEMPERATURE**2 * losses.kl_divergence(theirs, ours)

    def precompute(self) -> dict[str, float]:
        """See :class:`Peer`; the teacher is compiled as it is in the step."""
        options = self.options[ONLINE]
        key = f"teacher {options}"
        if key not in self.models:
            self.models[key] = self._network("teacher")
            self.models[key].compile(**options)
        clock = Clock()
        answers = self.models[key].predict(self.inputs, batch_size=self.teacher_batch, verbose=0)
        took = clock.per(len(self.inputs))
        self.targets[CACHED] = np.column_stack([self.work.labels.astype(np.float32), answers])
        return took

    def losses(self, arm: str) -> list[float]:
        """See :class:`Peer`."""
        if arm == CACHED:
            self.precompute()
        model, values = self._model(arm), []
        for where in self.work.first_batches():
            model.reset_metrics()
            logs = model.train_on_batch(self.inputs[where], self.targets[arm][where], return_dict=True)
            values.append(float(logs["total_loss" if arm == ONLINE else "loss"]))
        return values

    def measure(self, arm: str) -> dict[str, float]:
        """See :class:`Peer`; the time of an epoch is taken between its callbacks, without the set-up of ``fit``."""
        key = f"{arm} {self.options[arm]}"
        if key not in self.models:
            self.models[key] = self._model(arm)
        seen: list[dict[str, float]] = []
        clock: list[Clock] = []
        callback = self.keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: clock.append(Clock()),
            on_epoch_end=lambda epoch, logs: seen.append(clock[-1].per(self.work.steps)),
        )
        self.models[key].fit(
            self.inputs, self.targets[arm], batch_size=BATCH_SIZE, epochs=1, verbose=0, callbacks=[callback]
        )
        return seen[-1]


# PyTorch


class Torch(Peer):
    """A plain loop: resident channels-last tensors, the teacher under ``no_grad`` in the step."""

    candidates = ({}, {"foreach": True}, {"fused": True})  # of Adam

    def __init__(self):
        import torch

        torch.set_num_threads(len(cores()))
        self.torch = torch
        self.make_network = _network_class()

    def load(self, work: Workload) -> None:
        """See :class:`Peer`."""
        torch, self.work = self.torch, work
        self.inputs = self._channels_last(torch.from_numpy(work.inputs()).permute(0, 3, 1, 2))
        self.labels = torch.from_numpy(work.labels.astype(np.int64))
        self.teacher = self._network("teacher").eval()
        self.answers: Any = None
        self.options = {arm: {} for arm in ARMS}
        self.students: dict[str, tuple[Any, Any]] = {}

    def _channels_last(self, x):
        return x.contiguous(memory_format=self.torch.channels_last)

    def _network(self, name: str):
        first, second = self.work.widths(name)
        network = self.make_network(first, second, self.work.weights(name)[2][0].shape[0])
        layers = (network.conv_1, network.conv_2, network.dense)
        with self.torch.no_grad():
            for layer, (kernel, bias) in zip(layers, self.work.weights(name), strict=True):
                layer.weight.copy_(self.torch.from_numpy(_torch_order(kernel, second)))
                layer.bias.copy_(self.torch.from_numpy(bias))
        return network.to(memory_format=self.torch.channels_last)

    def _fresh(self, arm: str):
        student = self._network("student")
        optimizer = self.torch.optim.Adam(
            student.parameters(), LEARNING_RATE, eps=EPSILON, **self.options[arm]
        )
        return student, optimizer

    def loss(self, arm: str, student, inputs, labels, answers):
        """Of a batch; ``answers`` are the teacher's logits, or None."""
        F = self.torch.nn.functional
        if arm == ONLINE:
            with self.torch.no_grad():
                answers = self.teacher(inputs)
        logits = student(inputs)
        loss = F.cross_entropy(logits, labels)
        if arm == PLAIN:
            return loss
        theirs, ours = (F.log_softmax(x / TEMPERATURE, 1) for x in (answers, logits))
        soft = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        return HARD_WEIGHT * loss + (1 - HARD_WEIGHT) * TEMPERATURE**2 * soft

    def _step(self, arm: str, student, optimizer, rows):
        optimizer.zero_grad(set_to_none=True)
        answers = self.answers[rows] if arm == CACHED else None
        loss = self.loss(arm, student, self.inputs[rows], self.labels[rows], answers)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def precompute(self) -> dict[str, float]:
        """See :class:`Peer`."""
        clock = Clock()
        with self.torch.no_grad():
            parts = self.inputs.split(self.teacher_batch)
            self.answers = self.torch.cat([self.teacher(part) for part in parts])
        return clock.per(len(self.inputs))

    def losses(self, arm: str) -> list[float]:
        """See :class:`Peer`."""
        if arm == CACHED:
            self.precompute()
        pair = self._fresh(arm)
        return [float(self._step(arm, *pair, rows)) for rows in self.work.first_batches()]

    def measure(self, arm: str) -> dict[str, float]:
        """See :class:`Peer`."""
        key = f"{arm} {self.options[arm]}"
        if key not in self.students:
            self.students[key] = self._fresh(arm)
        epochs = 1 if arm == ONLINE else 4
        clock = Clock()
        for _ in range(epochs):
            total, order = 0, self.torch.randperm(len(self.labels))
            for step in range(self.work.steps):
                rows = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
                total = total + self._step(arm, *self.students[key], rows)
            float(total)
        return clock.per(epochs * self.work.steps)


class TorchCompiled(Torch):
    """The same loop with ``torch.compile`` around the loss; ends the process where that fails or takes too long."""

    def __init__(self):
        # A cache of an earlier run would hide what compiling takes; a pool of compilers, that it is one thread's.
        os.environ |= {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        super().__init__()
        # Beyond its limit of recompilations PyTorch would quietly run uncompiled.
        self.torch._dynamo.config.fail_on_recompile_limit_hit = True
        self.loss = self.torch.compile(self.loss, dynamic=False)

    def losses(self, arm: str) -> list[float]:
        """See :class:`Peer`. All that compiles is compiled here."""

        def late(*_):
            raise TimeoutError(f"it took more than {COMPILE_SECONDS} s")

        signal.signal(signal.SIGALRM, late)
        signal.alarm(COMPILE_SECONDS)
        try:
            return super().losses(arm)
        except Exception as error:
            sys.exit(f"torch.compile does not run here: {(str(error) or repr(error)).splitlines()[0]}")
        finally:
            signal.alarm(0)


def _network_class() -> Callable[..., Any]:
    """Made once, so that all networks are of one class, for which PyTorch compiles once."""
    from torch import nn
    from torch.nn import functional as F

    class Network(nn.Module):
        """The tutorial's network; "same" padding of an even map falls to the right and below."""

        def __init__(self, first: int, second: int, features: int):
            super().__init__()
            self.conv_1, self.conv_2 = nn.Conv2d(1, first, 3, stride=2), nn.Conv2d(first, second, 3, stride=2)
            self.dense = nn.Linear(features, 10)

        def forward(self, x):
            x = F.leaky_relu(self.conv_1(F.pad(x, (0, 1, 0, 1))), 0.2)
            x = F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-math.inf), 2, stride=1)
            x = self.conv_2(F.pad(x, (0, 1, 0, 1)))
            return self.dense(x.flatten(1))

    return Network


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
    "torch_compile": TorchCompiled,
}


def in_turns(peer: Peer) -> dict[str, dict[str, float]]:
    """Seconds per step of every arm, and per image of precomputing; medians of plain and cached steps in turns."""
    seen: dict[str, list[dict[str, float]]] = {PLAIN: [], CACHED: []}
    for _ in range(peer.turns):
        for arm, values in seen.items():
            values.append(peer.measure(arm))
    steps = {arm: medians(values) for arm, values in seen.items()}
    return steps | {ONLINE: peer.measure(ONLINE), "precompute": peer.precompute()}


def answer(peer: Peer, workload: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Does one job."""
    if asked["job"] == "losses":
        peer.load(Workload(workload))
        return {arm: peer.losses(arm) for arm in ARMS}
    if asked["job"] == "sweep":
        assert isinstance(peer, Kdjax)
        return peer.sweep(asked["students"])
    return {"settle": peer.settle, "steps": lambda: in_turns(peer)}[asked["job"]]()


def main() -> None:
    """Answers lines from stdin on stdout until there are no more."""
    serve(FRAMEWORKS, answer)
