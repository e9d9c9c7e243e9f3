"""A checkpoint is restored exactly or refused by name, whatever happened to its files."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import checkpoints, files

ROOT = Path(__file__).resolve().parent.parent


class State(NamedTuple):
    params: dict
    batch_stats: dict
    opt_state: tuple
    counts: tuple


def make_state(seed=0, width=7):
    random_state = np.random.default_rng(seed)
    params = {
        "mlp/~/linear_0": {
            "w": jnp.asarray(random_state.normal(size=(5, width)), jnp.float32)
        },  # Haiku's names
        "out": {
            "kernel": jnp.asarray(random_state.normal(size=(width, 3)), jnp.bfloat16),
            "bias": jnp.array([0.0, -0.0, 1e-40], jnp.float32),
            "none": jnp.zeros((0, 3)),
        },
    }
    optimizer = optax.chain(optax.clip(1.0), optax.adam(optax.linear_schedule(0.1, 0.0, 9)), optax.ema(0.9))
    counts = (
        jnp.uint32(7),
        np.uint32([4_000_000_000, 1]),
        np.float64(1 / 3),
        np.array([2**60]),
        5,
        0.1,
        True,
        jax.random.key_data(jax.random.key(3)),
        jnp.array([True, False]),
    )
    return State(params, {}, optimizer.init(params), counts)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert type(x) is type(y)
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


def files_of(directory):
    return sorted(path for path in Path(directory).rglob("*") if path.is_file())


def flip(path, offset, bit):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def run_script(body, *arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(body), *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def test_restores_every_kind_of_leaf_bit_for_bit(tmp_path):
    state, meta = make_state(), {"epoch": 3, "losses": [0.1, 1e-300], "name": "ü", "nested": {"a": None}}
    checkpoints.save(tmp_path, 12, state, meta=meta)
    restored = checkpoints.restore(tmp_path, make_state(seed=1))
    assert (restored.step, restored.meta) == (12, meta)
    assert_same(restored.tree, state)


def test_restores_into_shapes_and_keeps_weak_types(tmp_path):
    state = {"x": jnp.arange(3.0), "weak": jnp.asarray(2.0)}
    checkpoints.save(tmp_path, 0, state, meta={})
    abstract = jax.eval_shape(lambda: {"x": jnp.arange(3.0), "weak": jnp.asarray(2.0)})
    tree = checkpoints.restore(tmp_path, abstract).tree
    assert_same(tree, state)
    assert tree["weak"].weak_type
    assert not tree["x"].weak_type


def test_restores_onto_the_target_s_devices(tmp_path):
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("batch",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    state = {"x": jax.device_put(jnp.arange(4.0), everywhere), "one": jnp.arange(4.0)}
    checkpoints.save(tmp_path, 0, state, meta={})
    tree = checkpoints.restore(tmp_path, state).tree
    assert tree["x"].sharding == everywhere
    # Not tied to its device: it may meet an array that lives on both.
    assert_same(jax.jit(jnp.add)(tree["x"], tree["one"]) / 2, state["x"])


@pytest.mark.parametrize("tree", [{}, {"a": {}, "b": ()}, {"empty": np.zeros((0, 2))}], ids=str)
def test_trees_without_numbers(tmp_path, tree):
    checkpoints.save(tmp_path, 1, tree, meta={"a": 1})
    assert_same(checkpoints.restore(tmp_path, tree).tree, tree)


def test_a_bare_array_is_a_tree(tmp_path):
    checkpoints.save(tmp_path, 1, jnp.arange(3), meta={})
    assert_same(checkpoints.restore(tmp_path, jnp.zeros(3, jnp.int32)).tree, jnp.arange(3))


def test_plain_orbax_reads_the_arrays(tmp_path):
    import orbax.checkpoint as ocp

    checkpoints.save(tmp_path, 1, {"params": {"dense": {"kernel": jnp.arange(6.0)}}}, meta={})
    found = ocp.PyTreeCheckpointer().restore(tmp_path / "step_00000001" / "arrays")
    np.testing.assert_array_equal(found["params"]["dense"]["kernel"], np.arange(6.0))


def test_keeps_the_newest_and_starts_empty(tmp_path):
    directory = tmp_path / "not" / "yet"
    assert checkpoints.restore(directory, {"x": 0}) is None
    for step in (1, 5, 20, 100):
        checkpoints.save(directory, step, {"x": step}, meta={}, keep=2)
    assert [path.name for path in sorted(directory.iterdir())] == ["step_00000020", "step_00000100"]
    assert checkpoints.restore(directory, {"x": 0}, step=20).tree == {"x": 20}
    with pytest.raises(ValueError, match=r"no step 5 .* there are \[20, 100\]"):
        checkpoints.restore(directory, {"x": 0}, step=5)


def test_a_rewound_run_replaces_what_came_later(tmp_path):
    for step in (10, 20, 30):
        checkpoints.save(tmp_path, step, {"x": step}, meta={}, keep=9)
    checkpoints.save(tmp_path, 20, {"x": -20}, meta={}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000020"]
    assert checkpoints.restore(tmp_path, {"x": 0}).tree == {"x": -20}


def test_saving_the_same_again_changes_nothing_but_repairs_damage(tmp_path):
    checkpoints.save(tmp_path, 1, make_state(), meta={})
    before = {path: path.stat().st_mtime_ns for path in files_of(tmp_path)}
    checkpoints.save(tmp_path, 1, make_state(), meta={})
    assert {path: path.stat().st_mtime_ns for path in files_of(tmp_path)} == before
    victim = max(files_of(tmp_path), key=lambda path: path.stat().st_size)
    victim.write_bytes(b"")
    checkpoints.save(tmp_path, 1, make_state(), meta={})
    assert_same(checkpoints.restore(tmp_path, make_state(1)).tree, make_state())


def test_a_flipped_bit_is_never_restored_as_something_else(tmp_path):
    state, meta = make_state(width=64), {"epoch": 3, "rate": 0.1}
    checkpoints.save(tmp_path / "good", 2, state, meta=meta)
    files = files_of(tmp_path / "good")
    offsets = [(path, offset) for path in files for offset in range(path.stat().st_size)]
    chosen = random.Random(0)
    # One in every file, and a hundred in all.
    trials = [(path, chosen.randrange(path.stat().st_size)) for path in files if path.stat().st_size]
    trials += chosen.sample(offsets, 100 - len(trials))
    refused = 0
    for path, offset in trials:
        bad = tmp_path / "bad"
        shutil.copytree(tmp_path / "good", bad)
        flip(bad / path.relative_to(tmp_path / "good"), offset, chosen.randrange(8))
        try:
            restored = checkpoints.restore(bad, state)
        except ValueError as error:
            assert "step_00000002" in str(error)  # noqa: PT017
            refused += 1
        else:  # the change did not matter, such as one between two kinds of white space in JSON
            assert restored.meta == meta
            assert_same(restored.tree, state)
        shutil.rmtree(bad)
    assert len(trials) == 100
    assert refused >= 99


@pytest.mark.parametrize("harm", ["truncate", "delete", "manifest", "no manifest", "another step's file"])
def test_a_damaged_step_is_named_and_the_one_before_it_used(tmp_path, harm):
    for step in (1, 2):
        checkpoints.save(tmp_path, step, make_state(step), meta={"step": step})
    files = files_of(tmp_path / "step_00000002" / "arrays")
    largest = max(files, key=lambda path: path.stat().st_size)
    manifest = tmp_path / "step_00000002" / "manifest.json"
    if harm == "truncate":
        largest.write_bytes(largest.read_bytes()[:-1])
    elif harm == "delete":
        largest.unlink()
    elif harm == "manifest":
        manifest.write_text(manifest.read_text().replace('"step": 2', '"step": 3'))
    elif harm == "no manifest":
        manifest.unlink()
    else:
        shutil.rmtree(tmp_path / "step_00000002" / "arrays")
        shutil.copytree(tmp_path / "step_00000001" / "arrays", tmp_path / "step_00000002" / "arrays")
    with pytest.warns(UserWarning, match=r"damaged checkpoint.*step_00000002"):
        restored = checkpoints.restore(tmp_path, make_state())
    assert restored.step == 1
    assert_same(restored.tree, make_state(1))
    with pytest.raises(ValueError, match=r"step_00000002.*backup"):
        checkpoints.restore(tmp_path, make_state(), step=2)
    shutil.rmtree(tmp_path / "step_00000001" / "arrays")
    with (
        pytest.warns(UserWarning, match="step_00000002"),
        pytest.raises(ValueError, match=r"step_00000002.*step_00000001"),
    ):
        checkpoints.restore(tmp_path, make_state())


def test_orbax_wrong_but_files_right_is_caught_too(tmp_path, monkeypatch):
    checkpoints.save(tmp_path, 1, {"x": np.arange(4.0)}, meta={})
    write, read = checkpoints._orbax()
    wrong = lambda path, tree: jax.tree.map(lambda x: x + 1e-9, read(path, tree))  # noqa: E731
    monkeypatch.setattr(checkpoints, "_orbax", lambda: (write, wrong))
    with pytest.raises(ValueError, match="array x is not the one that was saved"):
        checkpoints.restore(tmp_path, {"x": np.zeros(4)})


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"a": np.zeros(3, np.float32), "b": np.zeros(2)}, r"a is float64\[3\] there and float32\[3\] here"),
        ({"a": np.zeros(4), "b": np.zeros(2)}, r"a is float64\[3\] there and float64\[4\] here"),
        ({"a": np.zeros(3)}, r"b is float64\[2\] there and missing here"),
        ({"a": np.zeros(3), "b": np.zeros(2), "c": 1.0}, r"c is missing there and float64\[\] here"),
        ({"a": np.zeros(3), "b": {"c": np.zeros(2)}}, "b is .*b/c is missing"),
        ({"a": np.zeros(3), "b": jax.random.key(0)}, "b is .* and key<fry>"),
    ],
)
def test_another_structure_is_refused(tmp_path, target, message):
    checkpoints.save(tmp_path, 1, {"a": np.zeros(3), "b": np.zeros(2)}, meta={})
    with pytest.raises(ValueError, match=message):
        checkpoints.restore(tmp_path, target)


@pytest.mark.parametrize(
    ("tree", "options", "message"),
    [
        ({"rng": jax.random.key(0)}, {}, "'rng' is a typed PRNG key.*fold_in"),
        ({"name": "resnet"}, {}, "'name' is a str.*move it to meta"),
        ({"a.b": 1.0, "a": {"b": 2.0}}, {}, "two leaves are called"),
        ({"a": 1.0, "a/b": 2.0}, {}, "'a/b' lies below"),
        ({"x": 1.0}, {"meta": {"x": np.zeros(2)}}, "plain JSON"),
        ({"x": 1.0}, {"keep": 0}, "keep >= 1"),
        ({"x": 1.0}, {"step": -1}, "step >= 0"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path, tree, options, message):
    with pytest.raises(ValueError, match=message):
        checkpoints.save(tmp_path, tree=tree, **({"step": 1, "meta": {}} | options))
    assert not list(tmp_path.iterdir())


def test_digest_depends_on_everything_but_the_order_of_dicts():
    base = {"a": np.zeros(2, np.float32), "b": {"c": np.ones(2)}}
    digest = checkpoints.digest_tree(base)
    assert digest == checkpoints.digest_tree({"b": {"c": np.ones(2)}, "a": jnp.zeros(2)})
    others = [
        {"a": np.zeros(2), "b": {"c": np.ones(2)}},
        {"a": np.zeros((2, 1), np.float32), "b": {"c": np.ones(2)}},
        {"a": -np.zeros(2, np.float32), "b": {"c": np.ones(2)}},
        {"a": np.zeros(2, np.float32), "b": {"d": np.ones(2)}},
        {"a": np.zeros(2, np.float32), "b": np.ones(2)},
    ]
    assert len({digest, *map(checkpoints.digest_tree, others)}) == 6


def test_sealed_json_notices_any_change(tmp_path):
    path = tmp_path / "x.json"
    body = {"a": [1, 2.5, None], "b": "text"}
    files.write_sealed(path, body)
    assert files.read_sealed(path) == body
    for damage in (b"", b"[]", b"null", path.read_bytes()[:-1], path.read_bytes().replace(b"2.5", b"2.6")):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=r"x\.json is damaged"):
            files.read_sealed(path)


HERE = {"arm": "kd", "seed": 0, "data": {"train": 90, "content": "ab"}}


class TestIdentity:
    @pytest.mark.parametrize(
        ("there", "said"),
        [
            ({**HERE, "seed": 1}, "seed 1 there and 0 here"),
            (
                {**HERE, "data": {"train": 91, "content": "cd"}},
                "data.content 'cd' there and 'ab' here, data.train 91",
            ),
            ({"seed": 0, "data": HERE["data"]}, "arm missing there and 'kd' here"),
            ({**HERE, "split": None}, "split None there and missing here"),
            ({**HERE, "seed": True}, "seed True there and 0 here"),
            ({**HERE, "data": {}}, "data {} there and missing here"),
        ],
    )
    def test_of_another_run_is_named(self, tmp_path, there, said):
        files.write_sealed(tmp_path / "x.json", 1, identity=there)
        with pytest.raises(files.Mismatch, match=re.escape(said)):
            files.read_sealed(tmp_path / "x.json", identity=HERE)
        assert files.read_sealed(tmp_path / "x.json") == 1
        assert files.read_sealed(tmp_path / "x.json", identity=there) == 1

    def test_cannot_be_changed_without_notice(self, tmp_path):
        path = tmp_path / "x.json"
        files.write_sealed(path, 1, identity=HERE)
        path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
        with pytest.raises(files.Damaged, match=r"x\.json is damaged"):
            files.read_sealed(path, identity={**HERE, "seed": 1})

    def test_a_checkpoint_of_another_run_is_refused_and_the_advice_works(self, tmp_path):
        tree = {"x": np.arange(3.0)}
        checkpoints.save(tmp_path / "a", 1, tree, meta={}, identity=HERE)
        assert checkpoints.restore(tmp_path / "a", tree, identity=HERE).step == 1
        assert checkpoints.restore(tmp_path / "a", tree).step == 1
        with pytest.raises(
            files.Mismatch, match=r"a/step_0.*seed 0 there and 1 here.*[Dd]elete it to start anew"
        ):
            checkpoints.restore(tmp_path / "a", tree, identity={**HERE, "seed": 1})
        shutil.rmtree(tmp_path / "a")
        assert checkpoints.restore(tmp_path / "a", tree, identity={**HERE, "seed": 1}) is None

    def test_equal_arrays_of_another_run_are_saved_over(self, tmp_path):
        tree = {"x": np.arange(3.0)}
        for identity in (HERE, {**HERE, "seed": 1}):
            checkpoints.save(tmp_path, 1, tree, meta={}, identity=identity)
            assert checkpoints.restore(tmp_path, tree, identity=identity).step == 1

    def test_cached_computes_what_is_missing_damaged_or_of_another_run_once(self, tmp_path):
        path, calls = tmp_path / "deep" / "x.json", []

        def compute():
            calls.append(None)
            return {"b": (1, 2.5), "a": float(len(calls))}

        found = [files.cached(path, compute, identity=HERE) for _ in range(2)]
        assert found == [{"b": [1, 2.5], "a": 1.0}] * 2
        assert list(found[0]) == ["b", "a"]  # in the order in which it was computed
        with pytest.warns(UserWarning, match=r"x\.json was written by another run.*computed again"):
            assert files.cached(path, compute, identity={**HERE, "seed": 1})["a"] == 2
        path.write_bytes(path.read_bytes()[:40])
        with pytest.warns(UserWarning, match=r"x\.json is damaged.*computed again"):
            assert files.cached(path, compute, identity=HERE, writes=False)["a"] == 3
        with pytest.warns(UserWarning, match=r"x\.json is damaged"):  # this process does not write
            assert files.cached(path, compute, identity=HERE)["a"] == 4
        assert files.cached(path, compute, identity=HERE)["a"] == 4


SAVE_FOREVER = """
    import sys, numpy as np
    from kdjax import checkpoints, files
    for step in range(1, 10_000):
        tree = {"x": np.full(2000, step), "y": np.random.default_rng(step).normal(size=30_000)}
        checkpoints.save(sys.argv[1], step, tree, meta={"step": step})
        print(step, flush=True)
"""


@pytest.mark.parametrize("seed", [0, 1])
def test_sigkill_leaves_the_last_step_whole(tmp_path, seed):
    with run_script(SAVE_FOREVER, tmp_path) as process:
        for line in process.stdout:  # wait until it is saving, then strike in the middle of some save
            if int(line) == 5 + 3 * seed:
                break
        time.sleep(random.Random(seed).uniform(0.0, 0.1))
        process.send_signal(signal.SIGKILL)
        announced = [5 + 3 * seed, *(int(line) for line in process.stdout)][-1]
    restored = checkpoints.restore(tmp_path, {"x": np.zeros(2000, int), "y": np.zeros(30_000)})
    assert restored.step >= announced
    assert restored.meta == {"step": restored.step}
    np.testing.assert_array_equal(restored.tree["x"], restored.step)
    np.testing.assert_array_equal(
        restored.tree["y"], np.random.default_rng(restored.step).normal(size=30_000)
    )
    checkpoints.save(tmp_path, restored.step + 1, restored.tree, meta={})
    assert {path.name for path in tmp_path.iterdir()} <= {
        f"step_{restored.step + more:08d}" for more in (-1, 0, 1)
    }


FULL_DISK = """
    import resource, sys, numpy as np
    from kdjax import checkpoints, files
    checkpoints.save(sys.argv[1], 1, {"x": np.arange(10.0)}, meta={})
    if sys.argv[2] == "late":  # the space was there when it was looked for
        checkpoints._reserve = lambda *_: None
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
        checkpoints.save(sys.argv[1], 2, {"x": np.random.default_rng(0).normal(size=40_000)}, meta={})
    except OSError as error:
        print("REFUSED:", error)
    print("LATEST:", checkpoints.restore(sys.argv[1], {"x": np.zeros(10)}))
"""


@pytest.mark.parametrize("when", ["early", "late"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, when):
    output, _ = run_script(FULL_DISK, tmp_path, when).communicate(timeout=60)
    assert "REFUSED: could not save step 2 to" in output
    assert "needs about 320,000 bytes" in output
    assert "LATEST: Restored(step=1" in output
    if when == "early":  # and not a page of Orbax's tracebacks
        assert "Traceback" not in output
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


TWO_PROCESSES = """
    import sys, warnings
    directory, port, process = sys.argv[1], sys.argv[2], int(sys.argv[3])
    import jax
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"localhost:{port}", 2, process, heartbeat_timeout_seconds=10)
    import json, os, pathlib
    import jax.numpy as jnp, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from kdjax import checkpoints, files

    everywhere = NamedSharding(Mesh(np.array(jax.devices()), ("batch",)), PartitionSpec())
    spread = NamedSharding(everywhere.mesh, PartitionSpec("batch"))
    make = lambda value, sharding: jax.make_array_from_callback(value.shape, sharding, lambda i: value[i])
    state = {"x": make(np.arange(8.0, dtype=np.float32), everywhere), "y": jnp.arange(3), "n": 4}
    for step in (1, 2, 3):
        checkpoints.save(directory, step, state | {"n": step}, meta={"step": step})
    found = checkpoints.restore(directory, state)
    assert found.step == 3 and found.tree["n"] == 3, found
    assert found.tree["x"].sharding == everywhere
    np.testing.assert_array_equal(np.asarray(found.tree["x"]), np.arange(8.0))

    def refused(kind, call):
        try:
            call()
        except kind as error:
            return str(error)
        raise AssertionError("was not refused")

    differs = lambda: checkpoints.save(directory, 4, {"x": jnp.arange(3) + process}, meta={})
    assert "differs between processes" in refused(ValueError, differs)
    split = make(np.arange(8.0, dtype=np.float32), spread)
    assert "split over processes" in refused(ValueError, lambda: checkpoints.save(directory, 4, split, meta={}))
    own = f"{directory}_{process}"
    if process == 0:
        os.symlink(directory, own)
    assert "storage that all share" in refused(ValueError, lambda: checkpoints.restore(own, state))
    blocked = directory + "_blocked"
    if process == 0:
        pathlib.Path(blocked).write_text("a file in the way")
    message = refused((OSError, RuntimeError), lambda: checkpoints.save(blocked, 1, state, meta={}))
    assert ("could not save" if process == 0 else "another process failed") in message, message

    if process == 0:
        files = (p for p in pathlib.Path(directory, "step_00000003", "arrays").rglob("*") if p.is_file())
        victim = max(files, key=lambda p: p.stat().st_size)
        victim.write_bytes(b"")
    checkpoints.raise_together(None, doing="damaging a file")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = checkpoints.restore(directory, state)
    assert found.step == 2 and found.tree["n"] == 2, found
    assert any("step_00000003" in str(w.message) for w in caught)
    checkpoints.raise_together(None, doing="ending")
    print("PASSED")
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def test_two_processes_save_and_restore_together(tmp_path):
    port = free_port()
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(run_script(TWO_PROCESSES, tmp_path / "run", port, process))
            for process in (0, 1)
        ]
        for process in processes:
            stack.callback(process.kill)
        outputs = [process.communicate(timeout=90)[0] for process in processes]
    assert all("PASSED" in output for output in outputs), "\n".join(outputs)[-4000:]
    manifest = json.loads((tmp_path / "run" / "step_00000002" / "manifest.json").read_text())
    assert manifest["body"]["meta"] == {"step": 2}


def test_a_relative_directory_serves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = {"kernel": np.arange(6.0, dtype=np.float32)}
    checkpoints.save("runs/one", 3, state, meta={})
    restored = checkpoints.restore("runs/one", state)
    assert restored is not None
    np.testing.assert_array_equal(restored.tree["kernel"], state["kernel"])
