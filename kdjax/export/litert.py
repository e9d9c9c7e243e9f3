"""LiteRT (TensorFlow Lite) files for phones and browsers, by Google's converter and quantiser, without TensorFlow."""

import importlib
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from kdjax.export.quiet import quiet
from kdjax.export.source import NORMALISE, Ranges, Source
from kdjax.extras import extra
from kdjax.models import layers

SIGNATURE, INPUT, OUTPUT = "serving_default", "image", "logits"


def convert(source: Source) -> bytes:
    """A float file of ``uint8[batch, height, width, channels] -> float32[batch, classes]``.

    Weights become constants, and batch normalisation is folded into them.

    Raises:
      ValueError: if LiteRT has no counterpart of an operation; the message names it.
    """
    modules = ("ir", "passmanager", "_mlir_libs.converter_api_ext")
    with extra("export"), quiet():
        imported: Any = [importlib.import_module(f"litert_converter.mlir.{name}") for name in modules]
    ir, passmanager, converter = imported
    with layers.native_forms():
        # Lowered for a TPU, since a CPU's StableHLO may call libraries that exist in JAX alone.
        lowered = jax.jit(source.function).trace(source.images()).lower(lowering_platforms=("tpu",))
    text, context = lowered.as_text(debug_info=True), ir.Context()
    converter.prepare_mlir_context(context)
    try:
        with context, ir.Location.unknown():
            module = ir.Module.parse(text)
            converter.set_signature(module.operation, SIGNATURE, [INPUT], [OUTPUT])
            config = converter.ConvertToTFLConfig()
            config.qdq_conversion_mode = "NONE"
            converter.run_convert_to_tfl_passes(module, passmanager.PassManager(), config)
            content = bytes(converter.export_flatbuffer_to_bytes(module.operation))
        _undelegated(content)  # which the converter leaves to the phone to find out
    except (ir.MLIRError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"LiteRT has no counterpart of an operation of this network ({_unknown(str(error), text)}); write it with "
            "others, or export stablehlo."
        ) from error
    return content


def _unknown(error: str, stablehlo: str) -> str:
    """The operation that the converter did not know: by its error, or by what it seldom knows."""
    named = re.findall(r"'((?:stablehlo|mhlo|chlo|tfl)\.\w+)'|'(STABLEHLO_\w+)'", error)
    rare = re.findall(
        r"stablehlo\.custom_call @(\w+)|stablehlo\.(fft|cholesky|triangular_solve|complex)\b", stablehlo
    )
    names = dict.fromkeys(
        "".join(found).lower().replace("stablehlo_", "stablehlo.") for found in rare or named
    )
    return ", ".join(names) or (error.strip().splitlines() or ["no reason given"])[0]


def convert_int8(source: Source) -> bytes:
    """An int8 file with the inputs and outputs of the float one: uint8 pixels, normalised in float, and float logits.

    Kernels have a scale per output channel. Activations have the range that occurs on the calibration images, or that
    the student has learnt.

    Raises:
      ValueError: if an operation has no counterpart, or the calibration images are too few or of another shape.
    """
    shape, images = source.image_shape, source.calibration
    if images is None or images.shape[1:] != tuple(shape) or images.dtype != np.uint8:
        got = "none" if images is None else f"{images.dtype} of shape {list(images.shape)}"
        raise ValueError(
            f"calibration images must be uint8 of shape [n, {', '.join(map(str, shape))}], got {got}."
        )
    if len(images) < MIN_CALIBRATION:
        raise ValueError(
            f"{len(images)} calibration images are too few to know the ranges of activations by; give at least "
            f"{MIN_CALIBRATION}."
        )
    with extra("export"):
        from litert_quantizer import algorithm_manager, calibrator, quantizer, recipe_manager
        from litert_quantizer.qtyping import TFLOperationName
        from litert_quantizer.utils import qsv_utils

    content = convert(source)
    recipe = recipe_manager.RecipeManager()
    recipe.add_static_config(".*", TFLOperationName.ALL_SUPPORTED, activation_num_bits=8, weight_num_bits=8)
    if source.ranges is not None and source.ranges.weight_bits < 8:
        for operation in (TFLOperationName.CONV_2D, TFLOperationName.FULLY_CONNECTED):
            recipe.add_static_config(
                ".*", operation, activation_num_bits=8, weight_num_bits=source.ranges.weight_bits
            )
    for regex, operation in ((f"/{NORMALISE}/", "*"), (".*", "INPUT"), (".*", "OUTPUT")):
        recipe.add_quantization_config(
            regex, TFLOperationName(operation), algorithm_key=algorithm_manager.AlgorithmName.NO_QUANTIZE
        )
    size = source.batch_size or 1
    batches = images[: len(images) // size * size].reshape(-1, size, *shape)
    # Ranges are by default a moving average, which cuts off what is rare.
    with quiet():
        ranges = calibrator.Calibrator(content, num_threads=1, qsv_update_func=qsv_utils.min_max_update)
        ranges.calibrate({SIGNATURE: [{INPUT: batch} for batch in batches]}, recipe)
        found = ranges.get_model_qsvs()
        if source.ranges is not None:
            found |= _learnt(content, source.ranges)
        made = quantizer.Quantizer(bytearray(content), recipe.get_quantization_recipe())
        quantised: Any = made.quantize(found).quantized_model
    return bytes(quantised)


def _learnt(content: bytes, ranges: Ranges) -> dict[str, dict[str, np.ndarray]]:
    """Learnt ranges by the names of the tensors of a float file.

    Its operations are in the order of the student's steps, which is checked by their kinds.
    """
    interpreter = _undelegated(content)
    names = {tensor["index"]: tensor["name"] for tensor in interpreter.get_tensor_details()}
    last: list[tuple[str, str]] = []
    for operation in interpreter._get_ops_details():
        kind, output = KINDS.get(operation["op_name"]), names[operation["outputs"][0]]
        if f"/{NORMALISE}/" in output:
            last = [("images", output)]
        elif kind is not None:
            last.append((kind, output))
    kinds = tuple(kind for kind, _ in last)
    if kinds != ranges.points:
        raise ValueError(
            f"LiteRT has made other operations of this network ({', '.join(kinds)}) than it was trained with "
            f"({', '.join(ranges.points)})."
        )
    return {
        name: {"min": low[None], "max": high[None]}
        for (_, name), low, high in zip(last, ranges.low, ranges.high, strict=True)
    }


KINDS = {
    "CONV_2D": "conv",
    "DEPTHWISE_CONV_2D": "depthwise",
    "FULLY_CONNECTED": "dense",
    "ADD": "add",
    "MEAN": "mean",
}
"""LiteRT's operations as steps of :mod:`kdjax.quantisation.graph`."""

MIN_CALIBRATION = 16
"""Images, below which the ranges of activations are a guess."""


def opened(data: bytes, *, num_threads: int = 1) -> Callable[[np.ndarray], np.ndarray]:
    """The function in a file: uint8 images, as many as it was converted for, to logits."""
    with extra("export"):
        from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=data, num_threads=num_threads)
    run = interpreter.get_signature_runner(SIGNATURE)
    return lambda images: run(**{INPUT: images})[OUTPUT]


def operations(data: bytes) -> list[tuple[str, set[str]]]:
    """The operations of a file in order, each with the types of the numbers it reads and writes."""
    interpreter = _undelegated(data)
    kinds = {tensor["index"]: np.dtype(tensor["dtype"]).name for tensor in interpreter.get_tensor_details()}
    return [
        (
            operation["op_name"],
            {kinds[i] for i in (*operation["inputs"], *operation["outputs"]) if i in kinds},
        )
        for operation in interpreter._get_ops_details()
    ]


def inputs_of(data: bytes) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of every input of a file by name."""
    details = _undelegated(data).get_signature_runner(SIGNATURE).get_input_details()
    return {
        name: (tuple(int(n) for n in one["shape"]), np.dtype(one["dtype"]).name)
        for name, one in details.items()
    }


def _undelegated(data: bytes) -> Any:
    """An interpreter whose operations are those of the file, before XNNPACK fuses them."""
    with extra("export"):
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

    plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    return Interpreter(model_content=data, experimental_op_resolver_type=plain)
