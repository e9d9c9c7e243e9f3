"""``import kdjax`` brings nothing heavy and costs little more than importing optax."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# What kdjax brings beyond optax, counted after optax so that neither the modules nor the time of optax are kdjax's.
# Frozen, what optax made is not searched for garbage while kdjax is imported, which took longer than the import.
PROBE = """
import gc, json, sys, time
import optax
gc.freeze()
modules, start = set(sys.modules), time.process_time()
import kdjax
seconds = time.process_time() - start
print(json.dumps([seconds, sorted({name.split(".")[0] for name in set(sys.modules) - modules})]))
"""
EXPECTED = {"kdjax", "jax", "optax", "numpy", "jaxtyping", "wadler_lindig"}
HEAVY = {
    "flax", "keras", "matplotlib", "orbax", "pandas", "scipy", "sklearn", "tensorflow", "tensorflow_datasets", "torch",
}  # fmt: skip


def probe() -> tuple[float, set[str]]:
    output = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    seconds, modules = json.loads(output)
    return seconds, set(modules)


def test_import_is_light_and_quick():
    probe()  # the first may write bytecode
    seconds, modules = zip(*[probe() for _ in range(3)], strict=True)
    assert modules[0] & HEAVY == set()
    assert modules[0] - EXPECTED - sys.stdlib_module_names == set(), "a new dependency of `import kdjax`"
    assert statistics.median(seconds) < 0.2
