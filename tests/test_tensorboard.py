"""What is trained is written for TensorBoard, every epoch once."""

import sys
from unittest import mock

import pytest
from absl import flags

from experiments import common, distill
from kdjax import files


def flags_set(*arguments):
    flags.FLAGS.unparse_flags()
    for flag in flags.FLAGS.flags_by_module_dict()["experiments.distill"]:
        flag.unparse()
    flags.FLAGS(["distill", *map(str, arguments)])


def events(directory):
    """(tag, step) → values in the event files of a run, those left out that a later file voids."""
    from tensorboardX.proto import event_pb2

    points = []
    for path in sorted(directory.iterdir()):  # as TensorBoard does
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.session_log.status == 1:  # START
                points = [point for point in points if point[1] < event.step]
            points += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return points


class TestTensorBoard:
    RUN = (
        "--batch_size=16",
        "--num_train=48",
        "--num_validation=40",
        "--method=scratch,kd",
        "--seeds=3",
        "--epochs=3",
        "--save_every_s=0",
        "--tensorboard",
    )

    def test_has_every_epoch_once_after_a_run_that_was_interrupted(self, tmp_path, monkeypatch):
        writer = pytest.importorskip("tensorboardX.event_file_writer")
        monkeypatch.setattr(writer, "time", mock.Mock(time=lambda: 1.7e9))  # all within a second

        def stop(label, record):
            if label == "kd, seed 3" and record["epoch"] == 2:
                raise KeyboardInterrupt

        def run():
            flags_set(f"--workdir={tmp_path / 'run'}", *self.RUN)
            with common.released():
                return distill.main()

        with pytest.raises(KeyboardInterrupt), common.watched(stop):
            run()
        run()
        for arm, seed in (("teacher", 0), ("scratch", 3), ("kd", 3)):
            points = events(tmp_path / "run" / "tensorboard" / arm / str(seed))
            assert len({point[:2] for point in points}) == len(points)
            summary = files.read_sealed(tmp_path / "run" / arm / str(seed) / "summary_test.json")
            assert {step for _, step, _ in points} == {3, 6, 9}  # 48 images in batches of 16
            for tag, step, value in points:
                name = tag.replace("training/", "").replace("/", "_")
                assert value == pytest.approx(summary["history"][step // 3 - 1][name], rel=1e-6)
        assert {"training/soft", "training/grad_norm", "validation/accuracy"} <= {tag for tag, *_ in points}

    def test_without_the_package_is_one_sentence(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorboardX", None)
        flags_set(f"--workdir={tmp_path / 'run'}", *self.RUN)
        with pytest.raises(ValueError, match=r"pip install 'kdjax\[tensorboard\]'"):
            distill.main()
        assert not (tmp_path / "run").exists()
