"""Memory in huge pages: without them a compiled step on a CPU spends much of its time in page faults."""

import contextlib
import os
import platform
import sys
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
OFFER = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart() -> None:
    """Starts this program again, in the same process, with ``GLIBC_TUNABLES=glibc.malloc.hugetlb=1``.

    glibc reads it when a process begins. Nothing happens where it is set already, to 0 for instance, where Linux offers
    no huge pages on request, or where the C library is another or older than 2.35.
    """
    set_before = os.environ.get("GLIBC_TUNABLES", "")
    if TUNABLE in set_before or not _offered():
        return
    tunables = ":".join(filter(None, [set_before, f"{TUNABLE}=1"]))
    with contextlib.suppress(OSError):
        os.execve(
            sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"GLIBC_TUNABLES": tunables}
        )


def _offered() -> bool:
    library, version = platform.libc_ver()
    if sys.platform != "linux" or library != "glibc" or tuple(map(int, version.split(".")[:2])) < (2, 35):
        return False
    try:
        return "[madvise]" in OFFER.read_text()  # "[always]" needs no request
    except OSError:
        return False
