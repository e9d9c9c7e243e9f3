"""One device, several devices and several processes must give one answer."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from kdjax import parallel

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("implementation", ["pmap", "shard_map"])
class TestDataParallel:
    def test_each_device_gets_its_part(self, implementation):
        def parts(offset, rows):
            return offset + jax.lax.psum(rows.sum() * (1 + jax.lax.axis_index(parallel.AXIS)), parallel.AXIS)

        run = parallel.data_parallel(
            parts, replicated=1, devices=parallel.local_devices(2), implementation=implementation
        )
        assert run(jnp.float32(0.5), np.array([1.0, 2.0, 10.0, 20.0], np.float32)) == 0.5 + 3 + 2 * 30

    def test_a_donated_state_is_given_back(self, implementation):
        def bump(state, rows):
            return state + jax.lax.psum(rows.sum(), parallel.AXIS)

        devices = parallel.local_devices(2)
        run = parallel.data_parallel(
            bump, replicated=1, devices=devices, implementation=implementation, donate_first=True
        )
        state = parallel.replicate(jnp.zeros(4), devices)
        for _ in range(3):
            before, state = state, run(state, np.ones(2, np.float32))
        np.testing.assert_array_equal(state, np.full(4, 6.0))
        assert before.is_deleted()


def test_compiles_once_though_the_first_state_comes_from_the_host():
    traces = []

    def bump(state, rows):
        traces.append(1)
        return state + jax.lax.psum(rows.sum(), parallel.AXIS)

    devices = parallel.local_devices(2)
    run = parallel.data_parallel(bump, replicated=1, devices=devices)
    state = parallel.replicate(jnp.zeros(4), devices)
    for _ in range(3):
        state = run(state, np.ones(2, np.float32))
    assert len(traces) == 1


def test_errors_say_what_to_write_instead():
    with pytest.raises(ValueError, match=r"3 devices were asked for, this process has 2.*device_count=3"):
        parallel.local_devices(3)
    with pytest.raises(ValueError, match=r"batch of 65 does not divide over 2 devices; use 64 or 66"):
        parallel.check_batch_size(65, parallel.local_devices(2))
    with pytest.raises(ValueError, match="'pmap' and 'shard_map', got 'xmap'"):
        parallel.data_parallel(len, replicated=0, devices=parallel.local_devices(), implementation="xmap")


def pod(
    directory: Path, processes: int, *, devices: int, stop_at: int = -1
) -> list[tuple[int, dict | None, str]]:
    """Runs ``pod_worker`` in that many processes; returns exit code, result and output of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, str(ROOT / "tests" / "pod_worker.py")]
    started = [
        subprocess.Popen(
            [*command, str(i), str(processes), str(port), str(directory), str(stop_at)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(processes)
    ]
    ended = []
    try:
        for process in started:
            output, _ = process.communicate(timeout=180)
            found = re.search(r"^RESULT (.*)$", output, re.M)
            ended.append((process.returncode, json.loads(found[1]) if found else None, output))
    finally:
        for process in started:
            process.kill()
    return ended


def test_two_processes_equal_one_and_stop_and_resume_together(tmp_path):
    ((code, alone, output),) = pod(tmp_path / "alone", 1, devices=2)
    assert code == 0, output
    both = pod(tmp_path / "pod", 2, devices=1, stop_at=13)
    for code, found, output in both:
        assert code == 128 + signal.SIGTERM, output  # to one of them: both save at the same step
        assert found is None, output
    resumed = pod(tmp_path / "pod", 2, devices=1)
    for code, found, output in resumed:
        assert code == 0, output
        assert found["steps"] < 40, "the resumed pod began again from the start"
        np.testing.assert_allclose(found["kernel"], alone["kernel"], atol=1e-5)
        np.testing.assert_allclose(found["loss"], alone["loss"], rtol=1e-5)
        assert found["accuracy"] == alone["accuracy"]
    assert resumed[0][1]["weights"] == resumed[1][1]["weights"]


def test_a_compiled_program_half_written_by_another_process_is_compiled_anew(tmp_path):
    """Else a test fails when its worker reads the shared cache while another writes, as one of CI's did."""
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    compilation_cache.reset_cache()
    try:
        assert jax.jit(lambda x: 2 * x)(jnp.float32(3)) == 6
        (entry,) = tmp_path.glob("jit__lambda*-cache")
        entry.write_bytes(entry.read_bytes()[:20])
        assert jax.jit(lambda x: 2 * x)(jnp.float32(3)) == 6  # another function, of the same program
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()
