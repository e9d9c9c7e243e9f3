"""The data set and the networks that a command line names."""

import dataclasses
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn

from kdjax import data, models
from kdjax.options import option


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set and how much of it is used."""

    dataset: str = option("digits", "digits, a TFDS name, a file.npz, or folder:PATH of class folders.")
    data_dir: str | None = option(None, "Where TFDS sets lie that experiments.prepare_data has prepared.")
    image_size: tuple[int, int] | None = option(
        None, "HEIGHT,WIDTH that photos and TFDS images are resized to cover and cropped to, as in 32,32."
    )
    skip_broken: bool = option(False, "Leave out image files that cannot be read; the result counts them.")
    num_train: int = option(0, "Training images; 0 for all.", least=0)
    num_validation: int = option(0, "Validation images; 0 for a tenth of the training split.", least=0)
    label_noise: float = option(
        0.0,
        "Share of labels of the training split made wrong; --num_train images have about that share.",
        least=0.0,
        most=1.0,
    )
    split_by: str = option(
        "group",
        "group: all images of one patient are in one split, where patients are known; example: they may be in several.",
        choices=("group", "example"),
    )

    def read(self) -> data.Dataset:
        """Loads the data set whole."""
        options = {"image_size": self.image_size, "skip_broken": self.skip_broken}
        return data.load(self.dataset, data_dir=self.data_dir, **options)

    def load(self, *, at_most: int | None = None, **changes: Any) -> data.Dataset:
        """Loads the data set and splits it.

        Args:
          at_most: training images, for a smoke run, which also takes what there is where there are fewer.
          **changes: other values of the fields, such as ``num_train`` of a teacher.
        """
        own = dataclasses.replace(self, **changes)
        num_train = own.num_train if at_most is None else min(own.num_train or at_most, at_most)
        return data.split(
            own.read(),
            num_train=num_train,
            num_validation=own.num_validation,
            by_group=own.split_by == "group",
            label_noise=own.label_noise,
            clip=at_most is not None,
        )


def network(spec: str, dataset: data.Dataset, **fields: Any) -> models.Network:
    """The network that ``--student`` or ``--teacher`` names, for the classes and images of a data set.

    Args:
      spec: a name in :data:`kdjax.models.MODELS`; or a function of the user's that is called with ``num_classes`` and
        returns a linen module or a :class:`kdjax.models.Network`: ``path/mine.py:build`` or ``package.module:build``.
      dataset: what it is for.
      **fields: of a network of kdjax, such as ``dtype``.

    Raises:
      ValueError: if there is no such network, file or function, it returns something else, or the network does not
        take these images.
    """
    classes, shape = dataset.num_classes, dataset.image_shape
    if ":" not in spec:
        return models.from_linen(models.build(spec, num_classes=classes, **fields), shape)
    where, _, name = spec.rpartition(":")
    function = getattr(_imported(spec, where), name, None)
    if not callable(function):
        raise ValueError(f"{spec}: there is no function {name!r} in {where}.")
    made = function(num_classes=classes)
    if isinstance(made, nn.Module):
        return models.from_linen(made, shape)
    if not isinstance(made, models.Network):
        kind = type(made).__name__
        raise ValueError(f"{spec} must return a linen module or a kdjax.models.Network, it returned {kind}.")
    if made.image_shape != shape:
        raise ValueError(f"{spec} is for images of shape {made.image_shape}; {dataset.name} has {shape}.")
    return made


def _imported(spec: str, where: str) -> Any:
    """A module by its file or by its dotted name."""
    try:
        return _from_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except FileNotFoundError:
        raise ValueError(f"{spec}: there is no file {where}.") from None
    except ModuleNotFoundError as error:
        advice = "" if where.endswith(".py") else f"; for a file, write path/to/{where}.py:NAME"
        raise ValueError(f"{spec}: {error}{advice}.") from None


def _from_file(path: Path) -> Any:
    """The module in a file, run once; its name is its path, which hides no other module."""
    name = str(path.resolve())
    if name not in sys.modules:
        found: Any = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(found)  # dataclasses look their module up
        try:
            found.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
