"""What every test runs under: two simulated devices, checked shapes and types, no silent broadcasting."""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

import pytest
from absl import flags

ROOT = Path(__file__).resolve().parent.parent

# In the environment, so that the processes that tests start share the compiled programs too.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
# Tests compile thousands of programs and run most of them once: compiled as for users, they take twice the time in all.
# JAX_DISABLE_MOST_OPTIMIZATIONS=0 in the environment compiles them as for users.
if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1":
    quick, given = "--xla_cpu_use_fusion_emitters=false", os.environ.get("XLA_FLAGS", "")
    # XLA ends a process that gives it an unknown flag; a worker has it from the process that started it.
    if importlib.metadata.version("jaxlib").startswith("0.10.") and quick not in given:
        os.environ["XLA_FLAGS"] = f"{given} {quick}".strip()

import jax
import jaxtyping

# Not in the environment: an experiment that a test starts is to see the machine as it is.
if "JAX_PLATFORMS" not in os.environ:
    jax.config.update("jax_platforms", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_rank_promotion", "raise")

# is_pep484_tower: an int is welcome where a float is asked for.
if importlib.util.find_spec("beartype"):
    jaxtyping.install_import_hook(
        "kdjax", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
    )


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Drops compiled programs when they are many: each holds a few memory maps, and Linux allows a process 65,530.

    Beyond that XLA crashes the process while it loads the next program. A module's own are up to 15,000.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()


def _optimised():
    """Compiles for speed what is new: where programs take longer to run than to compile, or must round alike."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


optimised = pytest.fixture(_optimised, name="optimised")
optimised_module = pytest.fixture(_optimised, name="optimised_module", scope="module")


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves out the figure and the page of a result, which are slow, and of other tests."""
    from kdjax import report

    for name in ("save_figure", "page"):
        monkeypatch.setattr(report, name, lambda *_, **__: None)


_lent = []  # modules whose flags are in the process, from the first


@contextlib.contextmanager
def _alone(name, keep=()):
    others = [
        (module, flag)
        for module, own in flags.FLAGS.flags_by_module_dict().items()
        if (module.startswith("experiments.") or module in _lent) and module not in keep
        for flag in own
    ]
    for _, flag in others:
        delattr(flags.FLAGS, flag.name)
    before = sys.modules.pop(name, None)  # so that importing it defines its flags
    _lent.append(name)
    try:
        yield importlib.import_module(name)
    finally:
        _lent.pop()
        for flag in list(flags.FLAGS.flags_by_module_dict().get(name, [])):
            delattr(flags.FLAGS, flag.name)
        sys.modules.pop(name, None)
        if before is not None:
            sys.modules[name] = before
        for module, flag in others:
            flags.FLAGS[flag.name] = flag
            flags.FLAGS.register_flag_by_module(module, flag)


@pytest.fixture(scope="session")
def alone():
    """Lends an experiment while the flags of others are away: no two flags of one name can be in one process."""
    return _alone


@pytest.fixture(scope="session")
def start():
    """Runs a study in this process as its command line would: ``start(study, *arguments, **of_main) -> result``."""
    return _start


def _start(study, *arguments, **of_main):
    from experiments import cli

    flags.FLAGS.unparse_flags()
    for flag in flags.FLAGS.flags_by_module_dict()[study.__name__]:
        flag.unparse()
    flags.FLAGS([study.__name__, *map(str, arguments)])
    with cli.released():
        return study.main(**of_main)
