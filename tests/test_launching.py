"""A launched process: how it ends, what it says, and what of its surroundings it does without."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from experiments import cli
from experiments.cli import compilation_cache, launching
from kdjax import results
from kdjax.interrupts import Stopped

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = """
import hashlib, os, sys
import jax, jax.numpy as jnp
from absl import flags
from experiments import cli
from kdjax.recipe import Machine

LAUNCH = cli.define(cli.Launch(), only=("workdir",))
MACHINE = cli.define(Machine(), only=("devices",))
TEMPERATURE = flags.DEFINE_float("temperature", 3.0, "Of nothing.", lower_bound=0.0)
DO = flags.DEFINE_string("do", "print", "What is done.")


def main():
    if DO.value == "load":
        print("ready", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes without an instruction of Python's
    cli.claim_workdir(LAUNCH.value.workdir, {})
    if DO.value == "work":
        print("ready", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
    if DO.value == "count":
        print(jax.local_device_count(), "devices")
    print("0.9 ± 0.1 ↑", jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x))(jnp.ones((3, 3)))[0, 0])


if __name__ == "__main__":
    cli.launch(main)
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The directory of the program above."""
    directory = tmp_path_factory.mktemp("mine")
    (directory / "program.py").write_text(PROGRAM)
    return directory


@pytest.fixture
def start(program):
    """Starts the program above in a process of its own."""
    started = []

    def start(*arguments, **environment):
        paths = os.pathsep.join([str(ROOT), str(program)])
        command = [sys.executable, "-m", "program", *map(str, arguments)]
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = inherited | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"} | environment
        started.append(subprocess.Popen(command, env=environment, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def outcome(process):
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


@pytest.mark.once
def test_help_is_no_error_and_misuse_is_one_sentence(start, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    cases = {
        ("--help",): (0, "--workdir"),
        ("--workdir=x", "--tempreture=3"): (2, "'tempreture'. Did you mean: temperature"),
        ("--workdir=x", "more"): (2, "unexpected arguments ['more']"),
        (f"--workdir={tmp_path / 'link'}",): (2, f"link is a link to {tmp_path / 'nowhere'}"),
    }
    running = {arguments: start(*arguments) for arguments in cases}
    for arguments, process in running.items():
        (code, said), (found, output, errors) = cases[arguments], outcome(process)
        assert found == code, (arguments, errors)
        assert said in (errors if code else output), arguments
        assert errors.count("\n") == (1 if code else 0), errors
        assert errors.startswith("error: ") == bool(code)


def test_so_it_is_in_other_cases(program, alone, monkeypatch, capfd, tmp_path):
    (tmp_path / "file").touch()

    def said(act, *arguments):
        with pytest.raises(SystemExit) as ended, launching._refusing():
            act(*arguments)
        return ended.value.code, capfd.readouterr().err

    def refuse(sentence):
        raise ValueError(sentence)

    def parsed(*arguments):
        return said(launching._parsed, ["program", *arguments])

    monkeypatch.syspath_prepend(program)
    with alone("program"):
        for arguments, sentence in (
            ((), "--workdir must have a value"),
            (("--workdir=x", "--temperature=-1"), "--temperature=-1"),
            (("--workdir=x", "--temperature=nan"), "--temperature=nan must be a finite number"),
        ):
            code, line = parsed(*arguments)
            assert (code, line[:7], line.count("\n")) == (2, "error: ", 1)
            assert sentence in line
        code, line = said(refuse, "temperature=0.0 must be above 0.")  # by the library, which knows no flags
        assert (code, line) == (2, "error: --temperature=0.0 must be above 0.\n")
    code, line = said(cli.claim_workdir, tmp_path / "file" / "run", {})
    assert code == 2
    assert "would have to be a directory" in line


@pytest.mark.once
def test_a_cpu_is_divided_into_as_many_devices_as_are_asked_for(start, tmp_path):
    simulated = "--xla_force_host_platform_device_count=2"
    running = {
        "1 devices": start("--do=count", f"--workdir={tmp_path / 'one'}", XLA_FLAGS=""),
        "3 devices": start("--do=count", f"--workdir={tmp_path / 'three'}", "--devices=3", XLA_FLAGS=""),
        "2 devices": start("--do=count", f"--workdir={tmp_path / 'two'}", "--devices=3", XLA_FLAGS=simulated),
    }
    for said, process in running.items():
        code, output, errors = outcome(process)
        assert code == 0, errors
        assert said in output


def test_what_training_says_when_it_is_stopped_is_passed_on(capfd):
    with pytest.raises(SystemExit, match="143"), launching._refusing():
        raise Stopped(signal.SIGTERM, "saved at step 7.")
    assert capfd.readouterr().err == "stopped by SIGTERM; saved at step 7.\n"


@pytest.mark.once
@pytest.mark.parametrize(
    ("number", "do", "said"),
    [
        (signal.SIGINT, "load", "stopped by Ctrl-C; nothing was lost; start the same command again.\n"),
        (
            signal.SIGTERM,
            "work",
            "stopped by SIGTERM; what is finished in {run} is kept, and the same command continues.\n",
        ),
    ],
)
def test_a_signal_ends_it_at_once_with_one_line(start, tmp_path, number, do, said):
    process = start(f"--workdir={tmp_path / 'run'}", f"--do={do}")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert outcome(process) == (128 + number, "", said.format(run=tmp_path / "run"))


@pytest.mark.once
def test_while_it_still_imports_too(tmp_path):
    command = [sys.executable, "-m", "experiments.quickstart", f"--workdir={tmp_path / 'run'}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONVERBOSE": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert any("import 'numpy'" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    # Among what Python says of every import.
    assert "stopped by Ctrl-C; nothing was written.\n" in errors
    assert "Traceback" not in errors


@pytest.mark.once
def test_without_a_home_and_on_an_ascii_terminal(start, tmp_path):
    (tmp_path / "file").touch()  # not even root can make a directory below it
    process = start(f"--workdir={tmp_path / 'run'}", HOME=str(tmp_path / "file"), PYTHONIOENCODING="ascii")
    code, output, errors = outcome(process)
    assert code == 0, errors
    assert output.startswith("0.9 ? 0.1 ? ")
    assert errors.count("\n") == 1
    assert errors.startswith("note: no home directory to keep compiled programs in")


def test_a_user_without_a_home_at_all(monkeypatch, capsys):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    kept = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        compilation_cache.keep()
        assert jax.config.values["jax_compilation_cache_dir"] is None
    finally:
        jax.config.update("jax_compilation_cache_dir", kept)
    assert "no home directory" in capsys.readouterr().err


@pytest.mark.parametrize(("home", "said"), [("/", "--workdir=/data/run"), ("/data", "--workdir=~/run")])
def test_a_recorded_command_survives_any_home(monkeypatch, home, said):
    monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(sys, "argv", ["x", "--workdir=/data/run"])
    assert results.command_line().replace("'", "").endswith(said)


@pytest.mark.once
def test_a_damaged_compiled_program_is_replaced(start, tmp_path):
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def started():
        return outcome(start(f"--workdir={tmp_path / 'run'}", **cache))

    whole = started()
    entries = sorted((tmp_path / "cache").glob("*-cache"))
    assert len(entries) > 1
    for number, path in enumerate(entries):  # cut short, or one bit flipped
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data if number % 2 else data[: len(data) // 2])
    again = started()
    assert again[:2] == whole[:2]
    assert again[2].count("note: a damaged program") == len(entries)
    assert started() == (*whole[:2], "")


WORKER = """
import json, os, signal, sys, time

task = json.loads(os.environ["KDJAX_TASK"])["worker"]
if task == "wait":
    time.sleep(60)
if task == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if task == "told":
    os.kill(os.getpid(), signal.SIGTERM)
print("error: out of luck.")
sys.exit(2)
"""


@pytest.mark.once
@pytest.mark.parametrize(
    ("task", "error", "said"),
    [
        ("fail", ValueError, "worker 1 ended with code 2: out of luck"),
        ("killed", ValueError, r"worker 1 was killed \(SIGKILL\)"),
        ("told", SystemExit, "143"),
    ],
)
def test_a_worker_that_ends_early_ends_those_before_it(tmp_path, monkeypatch, task, error, said):
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["worker"])
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    with pytest.raises(error, match=said):
        cli.in_children("worker", ["wait", task], logs=logs)


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity"), reason="this system cannot say which cores a process has"
)
def test_workers_share_the_cores_of_their_parent(tmp_path, monkeypatch):
    (tmp_path / "worker.py").write_text("import os; print(sorted(os.sched_getaffinity(0)))")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["worker"])
    cores = sorted(os.sched_getaffinity(0))

    def given(count, **options):
        logs = [tmp_path / f"{number}.log" for number in range(count)]
        cli.in_children("worker", list(range(count)), logs=logs, **options)
        assert sorted(os.sched_getaffinity(0)) == cores  # the parent keeps its own
        return [json.loads(log.read_text()) for log in logs]

    assert given(1) == [cores]
    shares = given(2)
    assert shares == ([cores[::2], cores[1::2]] if len(cores) > 1 else [cores, cores])
    assert given(len(cores) + 1) == [cores] * (len(cores) + 1)
    assert given(2, gpus=["0", "1"]) == [cores, cores]


def test_a_process_that_is_no_worker_has_no_task(monkeypatch):
    assert cli.my_task("experiments.sweep") is None
    monkeypatch.setenv("KDJAX_TASK", '{"experiments.sweep": [0]}')
    assert cli.my_task("experiments.distill") is None  # which a worker of a sweep runs
