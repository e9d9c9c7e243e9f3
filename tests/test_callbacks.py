"""Callbacks see every epoch of a run once, and TensorBoard's files hold no point twice."""

import sys
from unittest import mock

import jax
import numpy as np
import pytest

from kdjax import data, methods, models, run
from kdjax.callbacks import Callback, KeepWeights, ProgressBar, TensorBoard
from kdjax.recipe import Machine, Recipe


@pytest.fixture(scope="module")
def trainer():
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (150, 4, 4, 1), np.uint8), np.arange(150) % 3
    dataset = data.split(data.from_arrays(images, labels), num_train=48, num_validation=10)
    network = models.from_linen(models.build("mlp", num_classes=3, widths=(4,)), dataset.image_shape)
    recipe, machine = Recipe(epochs=3, batch_size=16), Machine(save_every_s=0.0)
    return run.make_trainer(network, methods.labels(), dataset, recipe, machine=machine)


class Stop(Callback):
    def on_epoch(self, run, record):
        if record["epoch"] == 2:
            raise KeyboardInterrupt


class Seen(Callback):
    def __init__(self):
        self.calls = []

    def on_start(self, run, steps):
        self.calls.append(("start", str(run), steps))

    def on_epoch(self, run, record):
        self.calls.append(("epoch", record["epoch"], record["step"]))

    def on_end(self, run, record):
        self.calls.append(("end", record.get("epoch")))


def test_every_epoch_is_seen_once_and_the_newest_again_when_a_run_goes_on(trainer, tmp_path):
    def seen(*others):
        callback = Seen()
        try:
            trainer(3, tmp_path, arm="kd", callbacks=[callback, *others])
        except KeyboardInterrupt:
            callback.calls.append(("stopped",))
        return callback.calls

    start, epochs = ("start", "kd, seed 3", 9), [("epoch", k, 3 * k) for k in (1, 2, 3)]
    assert seen(Stop()) == [start, *epochs[:2], ("end", None), ("stopped",)]
    assert seen() == [start, *epochs[1:], ("end", 3)]
    assert seen() == [start, epochs[2], ("end", 3)]


def test_kept_weights_are_those_after_their_step_also_of_a_run_that_was_stopped(trainer, tmp_path):
    class Weights(Callback):
        def __init__(self):
            self.seen = {}

        def on_dispatch(self, run, state, step):
            self.seen[step] = jax.device_get(state.params)
            return state

    keep, seen = KeepWeights(tmp_path / "kept", [3, 9], {"seed": 0}), Weights()
    with pytest.raises(KeyboardInterrupt):
        trainer(0, tmp_path / "run", callbacks=[keep, seen, Stop()])
    finished = trainer(0, tmp_path / "run", callbacks=[keep, seen])
    for step in (3, 9):
        found = keep.read(step, finished.weights)
        jax.tree.map(np.testing.assert_array_equal, found.params, seen.seen[step])
    jax.tree.map(
        np.testing.assert_array_equal, keep.read(9, finished.weights).params, finished.weights.params
    )
    with pytest.raises(ValueError, match="lacks the weights after step 6; delete the run"):
        keep.read(6, finished.weights)
    with pytest.raises(ValueError, match="seed"):
        KeepWeights(tmp_path / "kept", [3], {"seed": 1}).read(3, finished.weights)


def events(directory):
    """(tag, step, value) in the event files of a run, without those that a later file voids."""
    from tensorboardX.proto import event_pb2

    points = []
    for path in sorted(directory.iterdir()):  # as TensorBoard does
        content = path.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            event = event_pb2.Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]
            if event.session_log.status == 1:  # START
                points = [point for point in points if point[1] < event.step]
            points += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return points


def test_tensorboard_has_every_epoch_once_after_a_run_that_was_interrupted(trainer, tmp_path, monkeypatch):
    writer = pytest.importorskip("tensorboardX.event_file_writer")
    monkeypatch.setattr(writer, "time", mock.Mock(time=lambda: 1.7e9))  # all within a second
    board = tmp_path / "tensorboard"
    for more in ([Stop()], []):
        try:
            trained = trainer(3, tmp_path / "run", arm="kd", callbacks=[TensorBoard(board), *more])
        except KeyboardInterrupt:
            assert more
    points = events(board / "kd" / "3")
    assert len({point[:2] for point in points}) == len(points)
    assert {step for _, step, _ in points} == {3, 6, 9}  # 48 images in batches of 16
    for tag, step, value in points:
        name = tag.replace("training/", "").replace("/", "_")
        assert value == pytest.approx(trained.history[step // 3 - 1][name], rel=1e-6)
    assert {"training/loss", "training/grad_norm", "validation/accuracy"} <= {tag for tag, *_ in points}


def test_tensorboard_without_its_package_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match=r"pip install 'kdjax\[tensorboard\]'"):
        TensorBoard(tmp_path)


def test_a_finished_run_is_a_line_in_a_log_and_a_stopped_one_is_none(trainer, capsys):
    trained = trainer(3, arm="kd", callbacks=[ProgressBar()])
    accuracy = trained.history[-1]["validation_accuracy"]
    said = capsys.readouterr().out
    assert said.startswith("kd, seed 3: loss ")
    assert said.endswith(f", validation accuracy {accuracy:.2%}\n")
    with pytest.raises(KeyboardInterrupt):
        trainer(3, arm="kd", callbacks=[ProgressBar(), Stop()])
    assert capsys.readouterr().out == ""
