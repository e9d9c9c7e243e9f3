"""What happens while a network is trained: progress, TensorBoard, snapshots, pruning.

A callback is passed to the run, and called with the run that it is about. What it raises ends the training, whose
checkpoints stay.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from kdjax import checkpoints, train
from kdjax.types import Weights


class RunId(NamedTuple):
    """One training of a study."""

    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.arm}, seed {self.seed}"


class Callback:
    """Does nothing; override what you need.

    A run that is resumed, or was finished before, calls ``on_epoch`` first with the newest record that it had.
    """

    def on_start(self, run: RunId, steps: int) -> None:
        """Before the first dispatch of a run of that many steps."""

    def on_dispatch(self, run: RunId, state: train.TrainState, step: int) -> train.TrainState:
        """After each dispatch; returns the state to go on with."""
        del run, step
        return state

    def on_progress(self, run: RunId, steps: int, record: Mapping[str, Any]) -> None:
        """After each dispatch, with the number of its steps and the record of the newest epoch."""

    def on_epoch(self, run: RunId, record: Mapping[str, Any]) -> None:
        """After each epoch, with its record and its last ``step``."""

    def on_end(self, run: RunId, record: Mapping[str, Any]) -> None:
        """After the last epoch, with its record; also where the run ends by an exception, with ``{}``."""


class ProgressBar(Callback):
    """A bar on the terminal of the first process, with tqdm; and a line when a run ends, in a log too."""

    def __init__(self) -> None:
        self._meter: Any = None

    def on_start(self, run: RunId, steps: int) -> None:
        """Opens the bar."""
        self._meter = bar(str(run), total=steps, unit="step")

    def on_progress(self, run: RunId, steps: int, record: Mapping[str, Any]) -> None:
        """Moves it on."""
        self._meter.update(steps)
        self._meter.set_postfix(
            {k: f"{float(v):.4g}" for k, v in record.items() if k in ("loss", "validation_accuracy")}
        )

    def on_end(self, run: RunId, record: Mapping[str, Any]) -> None:
        """Closes it, and says how the run ended."""
        self._meter.close()
        if record:
            say(f"{run}: loss {record['loss']:.4g}, validation accuracy {record['validation_accuracy']:.2%}")


class TensorBoard(Callback):
    """Writes each epoch's numbers for TensorBoard: ``<arm>/<seed>`` under a directory, a point per epoch.

    A run that is resumed begins another file; its first entry voids what earlier files hold from its step on
    (``purge_step``), so that no point is there twice. Needs tensorboardX.
    """

    def __init__(self, directory: str | Path):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ValueError("TensorBoard needs tensorboardX: pip install 'kdjax[tensorboard]'.") from error
        self._directory, self._new, self._writer = Path(directory), SummaryWriter, None

    def on_epoch(self, run: RunId, record: Mapping[str, Any]) -> None:
        """Writes the record of an epoch."""
        if jax.process_index() > 0:
            return
        step = int(record["step"])
        if self._writer is None:
            # Files are named by the second; a run stopped and continued within one would overwrite the first.
            path = str(self._directory / run.arm / str(run.seed))
            self._writer = self._new(path, purge_step=step, filename_suffix=f".{step:09d}")
        for name in sorted(record.keys() - {"epoch", "step"}):
            tag = name.replace("validation_", "validation/") if "validation" in name else f"training/{name}"
            self._writer.add_scalar(tag, record[name], step)
        self._writer.flush()  # before the checkpoint of this epoch, so that none is missing after a kill

    def on_end(self, run: RunId, record: Mapping[str, Any]) -> None:
        """Closes the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class KeepWeights(Callback):
    """Keeps a run's weights after given steps, which :meth:`read` finds again.

    Args:
      directory: of the weights of one run.
      steps: after which they are kept; a dispatch must end there, as one does at the end of every epoch.
      identity: of the run, as JSON; weights of another one are refused.
    """

    def __init__(self, directory: Path, steps: Collection[int], identity: Mapping[str, Any]):
        self._directory, self._steps, self._identity = directory, set(steps), dict(identity)

    def on_dispatch(self, run: RunId, state: train.TrainState, step: int) -> train.TrainState:
        """Writes them; the training goes on unchanged."""
        if step in self._steps:
            weights = train.weights_of(state)
            checkpoints.save(self._directory / str(step), step, weights, meta={}, identity=self._identity)
        return state

    def read(self, step: int, like: Weights) -> Weights:
        """The weights after a step, in the shapes of ``like``.

        Raises:
          ValueError: if they are missing, damaged, or of another run.
        """
        found = checkpoints.restore(self._directory / str(step), like, identity=self._identity)
        if found is None:
            raise ValueError(
                f"{self._directory} lacks the weights after step {step}; delete the run that it belongs to, and train "
                "it again."
            )
        return found.tree


def say(text: str) -> None:
    """Prints from the first process alone."""
    if jax.process_index() == 0:
        print(text, flush=True)


def bar(label: str, *, total: int, unit: str) -> Any:
    """A progress bar on the terminal of the first process; nothing in a log, or without tqdm."""
    try:
        from tqdm import tqdm
    except ImportError:
        return _NoBar()
    hidden = None if jax.process_index() == 0 else True
    return tqdm(total=total, desc=label, unit=unit, disable=hidden, leave=False)


class _NoBar:
    """What :func:`bar` returns without tqdm."""

    n = 0

    def __enter__(self) -> "_NoBar":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, steps: int = 1) -> None:
        self.n += steps

    def set_postfix(self, postfix: Mapping[str, str]) -> None:
        pass

    def close(self) -> None:
        pass
