"""Where compiled programs are kept from one start to the next; a damaged entry is removed."""

import contextlib
import os
import re
import sys
from pathlib import Path

import jax

_FAULT = re.compile(r"Error (reading|writing) persistent compilation cache entry for '(.+?)'")


def keep() -> None:
    """Keeps compiled programs in the user's cache directory, unless JAX has been given another or there is none."""
    if jax.config.values["jax_compilation_cache_dir"]:
        return
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdjax" / "xla"
        cache.mkdir(parents=True, exist_ok=True)
        writable = os.access(cache, os.W_OK)
    except (OSError, RuntimeError):  # no home directory, or none of this user's
        writable = False
    if not writable:
        note("no home directory to keep compiled programs in; JAX_COMPILATION_CACHE_DIR may name another.")
        return
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def note(message: str) -> None:
    """Prints a warning as a note. If it is about a damaged entry, removes that, since JAX never replaces it."""
    fault = _FAULT.search(message)
    if not fault:
        print(f"note: {message}", file=sys.stderr)
    elif _remove(fault[2]) and fault[1] == "reading":
        print(f"note: a damaged program in JAX's cache was removed ({fault[2]}).", file=sys.stderr)


def _remove(program: str) -> bool:
    """Removes all entries of a program, since the message does not say which one is damaged."""
    entries = []
    with contextlib.suppress(OSError):
        cache = Path(jax.config.values["jax_compilation_cache_dir"])
        entries = [path for path in cache.glob("*-cache") if path.name.startswith(f"{program}-")]
        for path in entries:
            path.unlink(missing_ok=True)
    return bool(entries)
