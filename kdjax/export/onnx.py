"""ONNX by jax2onnx, whose package asks for an older Orbax than kdjax and so needs an installation of its own."""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from kdjax.export.quiet import quiet
from kdjax.export.source import Source
from kdjax.models import layers

INSTALL = "pip install --no-deps jax2onnx==0.17.1 && pip install onnx onnx-ir onnxruntime"
INPUT, OUTPUT = "image", "logits"


def convert(source: Source) -> bytes:
    """A float file of ``uint8[batch, height, width, channels] -> float32[batch, classes]``.

    Raises:
      ValueError: if jax2onnx does not know an operation; the message names it.
      ModuleNotFoundError: if it is not installed.
    """
    with _installed(), quiet():
        jax2onnx: Any = importlib.import_module("jax2onnx")
        conversion_api: Any = importlib.import_module("jax2onnx.converter.conversion_api")

    with layers.native_forms(), _unoptimised(conversion_api), quiet():
        try:
            model: Any = jax2onnx.to_onnx(
                source.function, [source.images("B")], input_names=[INPUT], output_names=[OUTPUT]
            )
        except Exception as error:  # it raises nearly anything where an operation is unknown
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"jax2onnx cannot write this network ({said}); export stablehlo or litert."
            ) from error
    return model.SerializeToString()


def opened(data: bytes, *, num_threads: int = 1) -> Callable[[np.ndarray], np.ndarray]:
    """The function in a file, run by onnxruntime: uint8 images to logits."""
    with _installed():
        onnxruntime: Any = importlib.import_module("onnxruntime")

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = num_threads
    options.log_severity_level = 3  # it warns of every constant that it removes
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return lambda images: np.asarray(session.run([OUTPUT], {INPUT: images})[0])


@contextlib.contextmanager
def _installed() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or str(error)).split(".")[0]
        raise ModuleNotFoundError(
            f"{missing} is not installed, and ONNX has no extra, since jax2onnx asks for an older Orbax than kdjax: "
            f"{INSTALL}",
            name=error.name,
        ) from error


@contextlib.contextmanager
def _unoptimised(conversion_api: Any) -> Iterator[None]:
    """Without the passes of jax2onnx 0.17.1, which write an invalid graph of a residual network."""
    before = conversion_api.optimize_graph
    conversion_api.optimize_graph = lambda model, *_, **__: model
    try:
        yield
    finally:
        conversion_api.optimize_graph = before
