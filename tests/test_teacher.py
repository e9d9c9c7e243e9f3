"""Row i of a cache is the teacher's answer to image i, or the cache is refused."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import teacher
from kdjax.teacher import cache
from kdjax.types import Outputs

ROOT = Path(__file__).resolve().parent.parent
SHAPES = Outputs(jax.ShapeDtypeStruct((2, 3), jnp.float32), {})
SETTINGS = {"name": "linear", "views": "centre"}


def make_images(count=37, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 1), dtype=np.uint8)


def make_variables(seed=1):
    return {"w": np.random.default_rng(seed).normal(size=(16, 3)).astype(np.float32)}


def fn(variables, images):
    flat = images.reshape(len(images), -1).astype(jnp.float32) / 255
    return {"logits": flat @ variables["w"], "sum": jnp.sum(images.astype(jnp.int32), axis=(1, 2, 3))}


def view_fn(images, index, view):
    """A shift that depends on the example and on the view; view 0 is the image itself."""

    def one(image, i):
        shift = jax.random.randint(jax.random.fold_in(jax.random.key(7), i), (), 1, 4)
        return jnp.roll(image, view * shift, axis=0)

    return jax.vmap(one)(images, index)


def precompute(directory, images=None, variables=None, **options):
    images = make_images() if images is None else images
    variables = make_variables() if variables is None else variables
    return teacher.precompute(
        directory,
        fn,
        variables,
        images,
        **({"settings": SETTINGS, "batch_size": 6, "chunk_size": 8} | options),
    )


def header(**changes):
    return teacher.describe(make_variables(), make_images(), settings=SETTINGS) | changes


def computed(monkeypatch):
    """The numbers of the chunks computed from here on."""
    numbers, rows = [], cache._Teacher.rows
    record = lambda self, images, number: numbers.append(number) or rows(self, images, number)  # noqa: E731
    monkeypatch.setattr(cache._Teacher, "rows", record)
    return numbers


def chunk(directory, number):
    return next(Path(directory).glob(f"chunk_{number:05d}-*.npz"))


def run_script(body, *arguments):
    # As many devices as here: each computes its rows of a batch, and a matmul of 3 rows rounds unlike one of 6.
    preamble = f"""import sys; sys.path[:0] = ['tests', '.']
import jax; jax.config.update("jax_num_cpu_devices", {jax.local_device_count()})
"""
    return subprocess.Popen(
        [sys.executable, "-c", preamble + textwrap.dedent(body), *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(
    ("count", "batch_size", "chunk_size"), [(37, 6, 8), (1, 512, 4096), (3, 2, 1), (16, 4, 8), (17, 5, 100)]
)
def test_row_i_belongs_to_image_i(tmp_path, count, batch_size, chunk_size):
    images, steps = make_images(count), []
    cached = precompute(
        tmp_path,
        images,
        batch_size=batch_size,
        chunk_size=chunk_size,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert cached.arrays["logits"].shape == (count, 1, 3)
    np.testing.assert_array_equal(cached.arrays["sum"][:, 0], images.reshape(count, -1).sum(1))
    expected = images.reshape(count, -1).astype(np.float64) / 255 @ make_variables()["w"]
    np.testing.assert_allclose(cached.arrays["logits"][:, 0], expected, rtol=1e-5, atol=1e-5)
    assert steps == [(min(n, count), count) for n in range(chunk_size, count + chunk_size, chunk_size)]
    loaded = teacher.load(tmp_path, header=teacher.describe(make_variables(), images, settings=SETTINGS))
    assert loaded.header == cached.header
    jax.tree.map(np.testing.assert_array_equal, loaded.arrays, cached.arrays)


def test_two_devices_say_what_one_says(tmp_path):
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    one = precompute(tmp_path / "one", devices=jax.devices()[:1])
    two = precompute(tmp_path / "two", devices=jax.devices()[:2])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), one.arrays, two.arrays)


def test_views_are_functions_of_index_and_view(tmp_path):
    images = make_images()
    cached = precompute(tmp_path / "a", views=3, view_fn=view_fn)
    again = precompute(tmp_path / "b", views=3, view_fn=view_fn, batch_size=10, chunk_size=20)
    index = np.arange(len(images), dtype=np.int32)
    assert cached.arrays["logits"].shape == (37, 3, 3)
    for view in range(3):
        expected = fn(make_variables(), view_fn(images, index, view))["logits"]
        for each in (cached, again):
            np.testing.assert_allclose(each.arrays["logits"][:, view], expected, rtol=1e-5, atol=1e-5)
    assert np.abs(cached.arrays["logits"][:, 0] - cached.arrays["logits"][:, 1]).max() > 0.1
    assert teacher.verify(cached, fn, make_variables(), images, view_fn=view_fn) > 0.9999
    with pytest.raises(ValueError, match="not this teacher's output"):
        teacher.verify(cached, fn, make_variables(), images)


def test_gather_in_a_jitted_step(tmp_path):
    arrays = jax.device_put(precompute(tmp_path, views=2, view_fn=view_fn).arrays)
    index, view = jnp.array([5, 36, 0, 5]), jnp.array([0, 1, 1, 1])
    gathered = jax.jit(teacher.gather)(arrays, index, view)
    assert sorted(gathered) == ["teacher_logits", "teacher_sum"]
    np.testing.assert_array_equal(gathered["teacher_logits"], np.asarray(arrays["logits"])[index, view])
    first = jax.jit(teacher.gather)(arrays, index)["teacher_sum"]
    np.testing.assert_array_equal(first, np.asarray(arrays["sum"])[index, 0])


def test_nothing_is_computed_twice(tmp_path, monkeypatch):
    whole = precompute(tmp_path)
    numbers = computed(monkeypatch)
    again = precompute(tmp_path)
    assert numbers == []
    jax.tree.map(np.testing.assert_array_equal, whole.arrays, again.arrays)
    chunk(tmp_path, 1).rename(f"{chunk(tmp_path, 1)}.tmp")  # as a process killed before the rename leaves it
    truncated = chunk(tmp_path, 3)
    truncated.write_bytes(truncated.read_bytes()[:-1])
    (tmp_path / "chunk_00001-leftover.npz.tmp").write_bytes(b"half")
    with pytest.raises(
        ValueError, match=r"only 21 of 37 rows.*chunk_00003.*damaged.*run the same precompute again"
    ):
        teacher.load(tmp_path, header=header())
    with pytest.warns(UserWarning, match=r"computed again.*chunk_00003"):
        repaired = precompute(tmp_path, chunk_size=1000)  # what it was begun with stays
    assert numbers == [1, 3]
    jax.tree.map(np.testing.assert_array_equal, whole.arrays, repaired.arrays)
    assert len(list(tmp_path.iterdir())) == 6  # five chunks and the header; no leftovers


def test_one_compilation_whatever_the_tails(tmp_path):
    traced = []

    def counting(variables, images):
        traced.append(images.shape)
        return fn(variables, images)

    images = make_images()
    teacher.precompute(
        tmp_path,
        counting,
        make_variables(),
        images,
        settings={},
        views=2,
        view_fn=view_fn,
        batch_size=6,
        chunk_size=16,
    )
    assert len(traced) == 2  # the shapes of the answers, and the program


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"name": "other", "views": "centre"}}, r"name 'linear' there and 'other' here"),
        ({"settings": SETTINGS | {"crop": 4}}, "crop missing there and 4 here"),
        ({"variables": make_variables(seed=2)}, r"teacher '\w+\.\.\. there and '"),
        ({"images": make_images(seed=2)}, r"images '\w+\.\.\. there and '"),
        ({"images": make_images()[::-1]}, r"images '\w+\.\.\. there and '"),
        ({"images": make_images()[:-1]}, "examples 37 there and 36 here, images '"),
        ({"views": 2, "view_fn": view_fn}, "views 1 there and 2 here"),
        ({"dtype": "float16"}, r"dtype 'float32' there and 'float16' here\): delete that directory"),
    ],
)
def test_a_cache_of_something_else_are_refused(tmp_path, changes, message):
    precompute(tmp_path)
    before = sorted(path.read_bytes() for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        precompute(tmp_path, **changes)
    assert sorted(path.read_bytes() for path in tmp_path.iterdir()) == before


def test_load_checks_what_it_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"no cached answers in .* run teacher\.precompute"):
        teacher.load(tmp_path, header=header())
    precompute(tmp_path)
    teacher.load(tmp_path, header={"images": header()["images"]})
    for wrong in ({"teacher": "another"}, {"unknown": 1}, header(name="other")):
        with pytest.raises(ValueError, match="computed from something else"):
            teacher.load(tmp_path, header=wrong)
    chunk(tmp_path, 1).unlink()  # and another chunk in its place
    shutil.copy(chunk(tmp_path, 0), tmp_path / chunk(tmp_path, 0).name.replace("00000", "00001"))
    with pytest.raises(ValueError, match="only 29 of 37 rows"):
        teacher.load(tmp_path, header=header())


def test_a_chunk_of_another_teacher_is_refused(tmp_path):
    precompute(tmp_path / "a")
    precompute(tmp_path / "b", variables=make_variables(seed=2))
    chunk(tmp_path / "a", 2).unlink()
    shutil.copy(chunk(tmp_path / "b", 2), tmp_path / "a")
    with pytest.raises(ValueError, match="damaged or of another cache"):
        teacher.load(tmp_path / "a", header=header())


def test_a_flipped_bit_is_refused(tmp_path):
    cached = precompute(tmp_path / "good")
    files = sorted((tmp_path / "good").iterdir())
    offsets = [(path, offset) for path in files for offset in range(path.stat().st_size)]
    chosen = random.Random(0)
    # Half of them in the header, which is small.
    in_header = [pair for pair in offsets if pair[0].name == "header.json"]
    trials = chosen.sample(offsets, 50) + chosen.sample(in_header, 50)
    refused = 0
    for path, offset in trials:
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        victim = tmp_path / "bad" / path.name
        data = bytearray(victim.read_bytes())
        data[offset] ^= 1 << chosen.randrange(8)
        victim.write_bytes(data)
        try:
            loaded = teacher.load(tmp_path / "bad", header=header())
        except ValueError:
            refused += 1
        else:  # the change did not matter, such as one between two kinds of white space in JSON
            assert loaded.header == cached.header
            jax.tree.map(np.testing.assert_array_equal, loaded.arrays, cached.arrays)
        shutil.rmtree(tmp_path / "bad")
    assert refused >= 95


def test_a_damaged_header_is_written_anew_and_good_chunks_stay(tmp_path, monkeypatch):
    precompute(tmp_path)
    (tmp_path / "header.json").write_text("{")
    numbers = computed(monkeypatch)
    with pytest.warns(UserWarning, match=r"header\.json is damaged"):
        precompute(tmp_path)
    assert numbers == []
    (tmp_path / "header.json").write_text("{")
    with pytest.warns(UserWarning, match=r"header\.json is damaged|computed again"):
        precompute(tmp_path, variables=make_variables(seed=2))
    assert numbers == [0, 1, 2, 3, 4]


def test_float16_is_half_the_size_and_integers_stay(tmp_path):
    cached = precompute(tmp_path, dtype="float16")
    assert (cached.arrays["logits"].dtype, cached.arrays["sum"].dtype) == (np.float16, np.int32)
    assert teacher.verify(cached, fn, make_variables(), make_images()) > 0.999


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        (np.nan, {}, "logits at index 11, view 0, is nan: the teacher has diverged"),
        (np.inf, {"dtype": "float16"}, "logits at index 11, view 0, is inf: the teacher has diverged"),
        (1e5, {"dtype": "float16"}, "logits at index 11, view 0, is 100000.0: store it with dtype='float32'"),
    ],
)
def test_numbers_that_cannot_be_used_name_their_index(tmp_path, value, options, message):
    images = np.zeros((20, 4, 4, 1), np.uint8)
    images[11] = 1

    def bad(variables, images):
        return {"logits": jnp.where(images[:, 0, 0] > 0, value, 1.0)}

    with pytest.raises(ValueError, match=message):
        teacher.precompute(tmp_path, bad, {}, images, settings={}, chunk_size=8, batch_size=4, **options)
    with pytest.raises(ValueError, match="only 8 of 20 rows"):
        teacher.load(tmp_path, header={})


class TestMaskedClasses:
    """A logit of -inf rules a class out, which is no divergence."""

    def precompute(self, path, logits, **options):
        images = np.arange(len(logits), dtype=np.uint8).reshape(-1, 1, 1, 1)
        given = {"logits": jnp.asarray(logits, jnp.float32)}

        def masking(variables, images):
            return {"logits": variables["logits"][images[:, 0, 0, 0]]}

        cached = teacher.precompute(path, masking, given, images, settings={}, batch_size=4, **options)
        return cached, masking, given, images

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_are_stored_read_back_and_verified(self, tmp_path, dtype):
        logits = np.random.default_rng(0).normal(size=(6, 4))
        logits[:, 3] = logits[2, 0] = -np.inf
        cached, masking, variables, images = self.precompute(tmp_path, logits, dtype=dtype)
        np.testing.assert_allclose(cached.arrays["logits"][:, 0], logits, rtol=2e-3)
        again = teacher.load(tmp_path, header={})
        assert teacher.verify(again, masking, variables, images) > 0.999

    def test_other_masks_are_refused(self, tmp_path):
        logits = np.random.default_rng(0).normal(size=(6, 4))
        cached, masking, _, images = self.precompute(tmp_path, logits)
        logits[3, 1] = -np.inf
        with pytest.raises(ValueError, match="not this teacher's output"):
            teacher.verify(cached, masking, {"logits": jnp.asarray(logits)}, images)

    @pytest.mark.parametrize("masked", [-np.inf, np.finfo(np.float32).min])
    def test_an_example_with_every_class_masked_is_refused(self, tmp_path, masked):
        logits = np.zeros((6, 4))
        logits[5] = masked
        with pytest.raises(ValueError, match=r"logits at index 5, view 0, is .*: it masks every class"):
            self.precompute(tmp_path, logits)

    @pytest.mark.parametrize(
        ("name", "value"), [("logits", np.inf), ("logits", np.nan), ("features", -np.inf)]
    )
    def test_other_infinities_are_refused(self, tmp_path, name, value):
        row = jnp.array([0.0, value, 1.0])
        with pytest.raises(ValueError, match="has diverged"):
            teacher.precompute(
                tmp_path,
                lambda variables, images: {name: jnp.tile(row, (len(images), 1))},
                {},
                np.zeros((3, 1, 1, 1), np.uint8),
                settings={},
            )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": 2}, "2 views need a view_fn"),
        ({"batch_size": 0}, "at least 1"),
        ({"images": np.zeros((0, 4, 4, 1), np.uint8)}, "at least one"),
        ({"settings": {"teacher": "x"}}, "rename them"),
        ({"settings": {"x": np.zeros(2)}}, "plain JSON"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        precompute(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_fn_must_return_rows(tmp_path):
    for bad in (lambda v, x: {"mean": jnp.mean(x)}, lambda v, x: {}):
        with pytest.raises(ValueError, match="one row per image"):
            teacher.precompute(tmp_path, bad, {}, make_images(), settings={})
    assert not list(tmp_path.iterdir())


class TestVerify:
    """Whatever the teacher, a shuffled cache is caught, and rounding is not."""

    COUNT = 200
    LABELS = np.repeat(np.arange(5), 40)  # sorted by class, as a folder of class folders is

    def rows(self, kind):
        random_state = np.random.default_rng(3)
        noise = random_state.normal(size=(self.COUNT, 5))
        confident = 20 * np.eye(5)[self.LABELS]
        return {
            "ordinary": noise,
            "confident": confident + noise,
            "offset": 1000 + noise,
            "offset and confident": 1000 + confident + noise,
            "two classes": np.stack([noise[:, 0], -noise[:, 0]], 1) * 10,
            "sparse": np.maximum(noise - 1, 0),
            "tiny": noise * 1e-12,
            "huge": noise * 1e12,
            "maps": random_state.normal(size=(self.COUNT, 8, 8)),
        }[kind].astype(np.float32)

    KINDS = (
        "ordinary",
        "confident",
        "offset",
        "offset and confident",
        "two classes",
        "sparse",
        "tiny",
        "huge",
        "maps",
    )

    def verify(self, stored, rows, seed=0, **options):
        """The teacher is a table: image i's row is rows[i]."""
        images = np.arange(self.COUNT, dtype=np.int32)[:, None]
        cached = teacher.TeacherCache(
            {"layout": {"examples": self.COUNT, "views": 1}}, {"logits": stored[:, None]}
        )
        return teacher.verify(cached, lambda v, x: {"logits": v[x[:, 0]]}, rows, images, seed=seed, **options)

    @pytest.mark.parametrize("kind", KINDS)
    def test_rounding_passes(self, kind):
        rows = self.rows(kind)
        noise = np.random.default_rng(0).normal(size=rows.shape)
        # Rounding is relative to what is summed, not to an offset added at the end.
        scale = np.std(rows, axis=0)
        for size in (0, 1e-6, 1e-3, 1e-2):
            for seed in range(5):
                assert self.verify((rows + size * scale * noise).astype(np.float32), rows, seed) > 0.999

    @pytest.mark.parametrize("kind", KINDS)
    def test_every_shuffle_is_caught(self, kind):
        rows = self.rows(kind)
        orders = [
            np.roll(np.arange(self.COUNT), 1),
            np.arange(self.COUNT)[::-1],
            np.roll(np.arange(self.COUNT), 7),
        ]
        orders += [np.random.default_rng(seed).permutation(self.COUNT) for seed in range(10)]
        for seed, order in enumerate(orders):
            with pytest.raises(
                ValueError, match=r"not this teacher's output.*index \d+, view 0.*another order"
            ):
                self.verify(rows[order], rows, seed)

    def test_a_shuffle_within_classes_is_caught(self):
        rows = self.rows("confident")
        order = np.concatenate([np.random.default_rng(c).permutation(40) + 40 * c for c in range(5)])
        cosine = (
            np.sum(rows * rows[order], -1)
            / np.linalg.norm(rows, axis=-1)
            / np.linalg.norm(rows[order], axis=-1)
        )
        assert np.median(cosine) > 0.98  # by cosine alone it would be a close call
        with pytest.raises(ValueError, match="not this teacher's output"):
            self.verify(rows[order], rows)

    def test_other_teachers_are_caught(self):
        rows = self.rows("ordinary")
        for other in (rows + 1, rows * 1.2, -rows, rows[:, ::-1], np.zeros_like(rows)):
            with pytest.raises(ValueError, match="not this teacher's output"):
                self.verify(other, rows)

    def test_one_row_of_the_right_direction_and_the_wrong_length(self):
        rows = self.rows("ordinary")
        longer = rows.copy()
        longer[np.argmax(np.linalg.norm(rows, axis=-1))] *= 1.2
        with pytest.raises(ValueError, match=r"off by .* of the rows' spread"):
            self.verify(longer, rows, num_samples=self.COUNT)

    def test_two_swapped_rows_are_found_if_all_are_looked_at(self):
        rows = self.rows("ordinary")
        order = np.arange(self.COUNT)
        order[[3, 150]] = 150, 3
        with pytest.raises(ValueError, match=r"index (3|150), view 0"):
            self.verify(rows[order], rows, num_samples=self.COUNT)

    def test_a_constant_teacher_is_no_false_alarm(self):
        for value in (0.0, 3.0):
            rows = np.full((self.COUNT, 5), value, np.float32)
            assert self.verify(rows * (1 + 1e-6), rows) > 0.999

    def test_another_number_of_images(self):
        rows = self.rows("ordinary")
        cached = teacher.TeacherCache({"layout": {"examples": 7, "views": 1}}, {"logits": rows[:7, None]})
        with pytest.raises(ValueError, match="7 rows and there are 8 images"):
            teacher.verify(cached, lambda v, x: {}, {}, np.zeros((8, 1)))


def test_a_shuffled_cache_is_caught(tmp_path):
    cached, images = precompute(tmp_path), make_images()
    assert teacher.verify(cached, fn, make_variables(), images) > 0.9999
    order = np.random.default_rng(0).permutation(len(images))
    shuffled = cached._replace(arrays={name: array[order] for name, array in cached.arrays.items()})
    with pytest.raises(ValueError, match="another order"):
        teacher.verify(shuffled, fn, make_variables(), images)


PRECOMPUTE_SLOWLY = """
    import time
    import test_teacher as t
    def progress(done, total):
        print(done, flush=True)
        time.sleep(0.02)
    t.precompute(sys.argv[1], images=t.make_images(400), progress=progress)
"""


def test_sigkill_in_the_middle_costs_only_the_chunk_at_hand(tmp_path, monkeypatch):
    images = make_images(400)
    with run_script(PRECOMPUTE_SLOWLY, tmp_path / "killed") as process:
        for line in process.stdout:
            if int(line) >= 200:
                break
        process.send_signal(signal.SIGKILL)
        announced = [200, *(int(line) for line in process.stdout)][-1]
    with pytest.raises(ValueError, match=r"only \d+ of 400 rows"):
        teacher.load(
            tmp_path / "killed", header=teacher.describe(make_variables(), images, settings=SETTINGS)
        )
    numbers = computed(monkeypatch)
    resumed = precompute(tmp_path / "killed", images)
    assert numbers[0] >= announced // 8
    assert numbers == list(range(numbers[0], 50))
    numbers.clear()
    whole = precompute(tmp_path / "whole", images)
    jax.tree.map(np.testing.assert_array_equal, resumed.arrays, whole.arrays)
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )


FULL_DISK = """
    import resource
    import test_teacher as t
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    try:
        t.precompute(sys.argv[1], images=t.make_images(400), chunk_size=200)
    except OSError as error:
        print("REFUSED:", error)
"""


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    output, _ = run_script(FULL_DISK, tmp_path).communicate(timeout=60)
    assert "REFUSED: could not write cached answers to" in output, output
    assert "bytes (" in output
    assert "Traceback" not in output
    assert [path.name for path in tmp_path.iterdir()] == ["header.json"]
    assert precompute(tmp_path, make_images(400)).arrays["logits"].shape == (400, 1, 3)


TWO_PROCESSES = """
    directory, port, process = sys.argv[1], sys.argv[2], int(sys.argv[3])
    import jax
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"localhost:{port}", 2, process, heartbeat_timeout_seconds=10)
    import jax.numpy as jnp, numpy as np
    import test_teacher as t
    from kdjax import teacher
    from kdjax.teacher import cache

    mine, rows = [], cache._Teacher.rows
    cache._Teacher.rows = lambda self, images, number: mine.append(number) or rows(self, images, number)
    cached = t.precompute(directory)
    assert mine == [[0, 2, 4], [1, 3]][process], mine
    images = t.make_images()
    np.testing.assert_array_equal(cached.arrays["sum"][:, 0], images.reshape(37, -1).sum(1))

    def bad(variables, images):  # only a chunk of process 1 has the image
        return {"logits": jnp.where(images[:, 0, 0] > 0, jnp.nan, 1.0)}

    images = np.zeros((20, 4, 4, 1), np.uint8)
    images[11] = 1
    try:
        teacher.precompute(directory + "_bad", bad, {}, images, settings={}, chunk_size=8)
    except (ValueError, RuntimeError) as error:
        assert ("index 11" if process else "another process failed") in str(error), error
        print("PASSED")
"""


def test_two_processes_compute_together(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(run_script(TWO_PROCESSES, tmp_path / "run", port, process))
            for process in (0, 1)
        ]
        for process in processes:
            stack.callback(process.kill)
        outputs = [process.communicate(timeout=90)[0] for process in processes]
    assert all("PASSED" in output for output in outputs), "\n".join(outputs)[-4000:]
    alone = precompute(tmp_path / "alone")
    loaded = teacher.load(tmp_path / "run", header=header())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), alone.arrays, loaded.arrays)


class TestNestedOutputs:
    @staticmethod
    def nested(variables, images):
        logits = fn(variables, images)["logits"]
        return {"logits": logits, "features": {"early": 2 * logits, "late": (3 * logits, {"gate": -logits})}}

    def test_have_joined_names_in_every_mode(self, tmp_path):
        images, variables = make_images(), make_variables()
        options = {"settings": SETTINGS, "batch_size": 6, "chunk_size": 8}
        cached = teacher.precompute(tmp_path, self.nested, variables, images, **options)
        factors = {"features/early": 2, "features/late/0": 3, "features/late/1/gate": -1, "logits": 1}
        expected = images.reshape(len(images), -1).astype(np.float64) / 255 @ variables["w"]
        assert cached.arrays.keys() == factors.keys()
        for name, factor in factors.items():
            np.testing.assert_allclose(cached.arrays[name][:, 0], factor * expected, rtol=1e-5, atol=1e-5)
        assert teacher.verify(cached, self.nested, variables, images) > 0.999
        loaded = teacher.load(tmp_path, header=cached.header["made_from"])
        stored = teacher.gather(loaded.arrays, jnp.arange(3))
        signal = teacher.TeacherSignal(None, SHAPES, online=self.nested)
        online = teacher.attach_online(signal, variables, {"image": jnp.asarray(images[:3])})
        for name in factors:
            np.testing.assert_allclose(
                stored[f"teacher_{name}"], online[f"teacher_{name}"], rtol=1e-5, atol=1e-5
            )

    @pytest.mark.parametrize(
        ("returned", "message"),
        [
            (lambda x: x, "must return a dict of arrays"),
            (lambda x: (x, {"features": x}), "must return a dict of arrays.*got tuple"),
            (lambda x: {}, "one row per image"),
            (lambda x: {"features": {}}, "one row per image"),
            (lambda x: {"features": {"mean": jnp.mean(x)}}, "one row per image"),
            (lambda x: {"a": {"b": x}, "a/b": x}, "names two outputs alike"),
        ],
    )
    def test_others_are_refused_before_anything_is_written(self, tmp_path, returned, message):
        with pytest.raises(ValueError, match=message):
            teacher.precompute(
                tmp_path,
                lambda variables, images: returned(images.astype(jnp.float32).mean((1, 2))),
                make_variables(),
                make_images(),
                settings=SETTINGS,
            )
        assert not list(tmp_path.iterdir())
