r"""The latency of one file in one runtime, in a process of its own; not run by hand.

``experiments.latency`` starts ``python -m experiments.benchmarks.latency_contender RUNTIME FILE THREADS SECONDS`` and
reads one line of JSON: milliseconds to import the runtime and to load the file (``load_ms``; for JAX, to read the
weights and compile), of the first image after that (``cold_ms``), and of each of the following, in order (``warm_ms``,
without the first tenth); and ``peak_mib``, what the process held at most.

FILE is a bundle for jax, and a file of one for the others.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments.benchmarks.timing import pin

Answer = Callable[[np.ndarray], np.ndarray]


def jax_bundle(path: Path, threads: int) -> tuple[Answer, tuple[int, ...]]:
    """The student of a bundle, compiled for one image, with its weights as arguments."""
    del threads  # XLA takes the cores that the process is pinned to
    import jax
    import jax.numpy as jnp

    from kdjax import export

    jax.config.update("jax_enable_compilation_cache", False)
    bundle = export.load(path)
    shape = (1, *bundle.description["image_shape"])
    function = jax.jit(export.logits_of, static_argnums=(0, 1))
    arguments = (bundle.network, bundle.normalisation, bundle.weights)
    compiled = function.lower(*arguments, jnp.zeros(shape, jnp.uint8)).compile()
    return lambda image: np.asarray(compiled(bundle.weights, image)), shape


def litert_file(path: Path, threads: int) -> tuple[Answer, tuple[int, ...]]:
    """A LiteRT file, with XNNPACK."""
    from ai_edge_litert.interpreter import Interpreter

    run = Interpreter(model_path=str(path), num_threads=threads).get_signature_runner()
    (name, image), (output,) = next(iter(run.get_input_details().items())), run.get_output_details()
    return lambda pixels: run(**{name: pixels})[output], tuple(int(size) for size in image["shape"])


def onnx_file(path: Path, threads: int) -> tuple[Answer, tuple[int, ...]]:
    """An ONNX file in onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (image,) = session.get_inputs()
    shape = tuple(size if isinstance(size, int) else 1 for size in image.shape)
    return lambda pixels: np.asarray(session.run(None, {image.name: pixels})[0]), shape


def peak_mib() -> float:
    """What this process has held at most; of Linux, and 0 elsewhere.

    Not ``getrusage``, whose maximum a child inherits from the process that started it.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


RUNTIMES = {"jax": jax_bundle, "litert": litert_file, "litert_int8": litert_file, "onnx": onnx_file}


def main() -> None:
    """Measures and prints."""
    runtime, path, threads, seconds = sys.argv[1:]
    pin(int(threads))
    start = time.perf_counter()
    answer, shape = RUNTIMES[runtime](Path(path), int(threads))
    load = time.perf_counter() - start
    rng, times = np.random.default_rng(0), []
    images = rng.integers(0, 256, (16, *shape), np.uint8)
    while len(times) < 20 or sum(times) < float(seconds):
        image, start = images[len(times) % len(images)], time.perf_counter()
        answer(image)
        times.append(time.perf_counter() - start)
    warm = times[len(times) // 10 + 1 :]
    found = {
        "load_ms": 1e3 * load,
        "cold_ms": 1e3 * times[0],
        "peak_mib": peak_mib(),
    }
    print(json.dumps(found | {"warm_ms": [round(1e3 * t, 6) for t in warm]}))


if __name__ == "__main__":
    main()
