"""Programs begin again with huge pages where Linux offers them, once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import huge_pages

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def begun(monkeypatch, tmp_path):
    """The environments that programs were started again with, on a machine that offers huge pages."""
    offer, environments = tmp_path / "enabled", []
    offer.write_text("always [madvise] never\n")
    monkeypatch.setattr(huge_pages, "OFFER", offer)
    monkeypatch.setattr(huge_pages.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "execve", lambda path, arguments, environment: environments.append(environment))
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    return environments


def test_other_tunables_stay(begun, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")
    huge_pages.restart()
    assert begun[0]["GLIBC_TUNABLES"] == "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"


def test_a_choice_of_the_user_stays(begun, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    huge_pages.restart()
    assert begun == []


@pytest.mark.parametrize("offer", ["[always] madvise never", "always madvise [never]", None])
def test_nothing_where_nothing_is_to_be_asked_for(begun, offer):
    if offer is None:
        huge_pages.OFFER.unlink()
    else:
        huge_pages.OFFER.write_text(offer)
    huge_pages.restart()
    assert begun == []


@pytest.mark.parametrize("library", [("glibc", "2.31"), ("", "")])
def test_nothing_for_other_libraries(begun, monkeypatch, library):
    monkeypatch.setattr(huge_pages.platform, "libc_ver", lambda: library)
    huge_pages.restart()
    assert begun == []


def test_a_program_starts_once_more_and_keeps_its_arguments():
    program = "import os, sys; print(sys.argv[1:], os.environ.get('GLIBC_TUNABLES'))"
    code = f"from experiments import huge_pages; huge_pages.restart(); {program}"
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    ran = subprocess.run(
        [sys.executable, "-c", code, "a b", "--c=1"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    wanted = "glibc.malloc.hugetlb=1" if huge_pages._offered() else None
    assert ran.stdout == f"['a b', '--c=1'] {wanted}\n"
