"""StableHLO by ``jax.export``: one file for CPU, GPU and TPU that any later JAX, IREE or OpenXLA program can run."""

from collections.abc import Callable

import jax
import numpy as np
from jax import export

from kdjax.export.source import Source
from kdjax.extras import extra
from kdjax.models import layers

PLATFORMS = ("cpu", "cuda", "tpu")


def convert(source: Source) -> bytes:
    """A serialised ``uint8[batch, height, width, channels] -> float32[batch, classes]``.

    Raises:
      ValueError: if the network reads the number of images while it is traced, and that number is to be any.
    """
    (batch,), any_batch = export.symbolic_shape("batch"), source.batch_size is None
    with extra("export"), layers.native_forms():
        import flatbuffers  # noqa: F401, which jax.export needs without saying so

        try:
            return bytes(
                export.export(jax.jit(source.function), platforms=PLATFORMS)(source.images(batch)).serialize()
            )
        except (TypeError, ValueError, jax.errors.InconclusiveDimensionOperation) as error:
            if not any_batch:
                raise
            raise ValueError(
                f"the network cannot be exported for any number of images ({str(error).splitlines()[0]}): read "
                "x.shape[0] in place of len(x), or export it for a fixed number with batch_size=1."
            ) from error


def opened(data: bytes) -> Callable[[np.ndarray], np.ndarray]:
    """The function in a file of :func:`convert`."""
    function = jax.jit(export.deserialize(bytearray(data)).call)
    return lambda images: np.asarray(function(images))
