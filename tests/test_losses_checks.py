"""The argument checks of every public loss, and their error messages.

The cases are made from the annotations, so they cover every loss.
"""

import inspect
import subprocess
import sys
import typing
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses

ROOT = Path(__file__).resolve().parent.parent
NOT_OF_ARRAYS = ("class_map", "check_class_map")  # checked by hand, and tested where they are
PUBLIC = {name: f for name, f in vars(losses).items() if inspect.isfunction(f) and not name.startswith("_")}
PUBLIC = {name: f for name, f in PUBLIC.items() if name not in NOT_OF_ARRAYS}
SIZES = {"batch": 3, "classes": 5, "scores": 5, "k": 2, "teachers": 2, "height": 4, "width": 4, "channels": 2}
SIZES |= {"examples": 6, "candidates": 3, "dims": 4, "outputs": 2, "positions": 16, "first": 2, "second": 3}
INTEGERS = {"num_classes": 5, "examples": 6, "dims": 4, "negatives": 2}
NUMBERS = {"deviation": 0.1, "label_error": 1.0, "teacher_error": 1.0}
NUMBERS |= {"freedom": 1.0, "own_freedom": 0.5}


def size(dim):
    """Of one axis; ``student_height`` is a height."""
    return SIZES.get(dim, SIZES.get(dim.split("_")[-1], SIZES.get(dim.split("_")[0], 4)))


def arrays_in(hint):
    """The arrays that an annotation allows, the largest last."""
    if hasattr(hint, "dim_str"):
        return [hint]
    found = [array for member in typing.get_args(hint) for array in arrays_in(member)]
    return sorted(found, key=lambda array: len(array.dim_str.split()))


def example(name, hint, rng):
    if isinstance(hint, type) and issubclass(hint, tuple):  # the memory of CRD
        return losses.init_crd_memory(jax.random.key(0), examples=6, dims=4)
    if typing.get_origin(hint) is tuple:
        return tuple(example(name, inner, rng) for inner in typing.get_args(hint))
    if name == "key":
        return jax.random.key(0)
    array = arrays_in(hint)[-1]
    shape = tuple(3 if dim == "*batch" else size(dim.strip("*")) for dim in array.dim_str.split())
    if array.dtype.__name__ == "Int":
        return jnp.asarray(rng.permuted(np.broadcast_to(np.arange(shape[-1]) % 3, shape), axis=-1), jnp.int32)
    if array.dtype.__name__ == "Bool":
        return jnp.asarray(rng.random(shape) < 0.5)
    values = rng.random(shape)
    return jnp.asarray(values / values.sum(-1, keepdims=True), jnp.float32)


@cache
def arguments(name):
    """Valid arguments of a public function, and its annotations."""
    rng = np.random.default_rng(0)
    parameters = inspect.signature(PUBLIC[name]).parameters
    hints = {key: parameter.annotation for key, parameter in parameters.items()}
    given = {}
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty or key == "labels":
            known = INTEGERS.get(key, NUMBERS.get(key))
            given[key] = example(key, hints[key], rng) if known is None else known
    return given, hints


def options():
    """Every number that may be given to a loss."""
    for name in PUBLIC:
        for key, hint in arguments(name)[1].items():
            if "float" in repr(hint).replace("jaxtyping.Float", "") and key != "share":
                yield name, key


@pytest.mark.parametrize("name", PUBLIC)
class TestEveryPublicFunction:
    def test_takes_what_its_annotations_say_as_jax_and_as_numpy(self, name):
        given, _ = arguments(name)
        value = PUBLIC[name](**given)

        def to_numpy(x):
            return x if jnp.issubdtype(getattr(x, "dtype", int), jax.dtypes.prng_key) else np.asarray(x)

        again = PUBLIC[name](
            **{k: jax.tree.map(to_numpy, v) for k, v in given.items() if k not in INTEGERS},
            **{k: v for k, v in given.items() if k in INTEGERS},
        )
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), again, value)

    def test_names_an_array_of_another_dtype_rank_or_size(self, name):
        given, hints = arguments(name)
        arrays = {k: v for k, v in given.items() if hasattr(v, "dtype") and k != "key"}
        shared = [set(" ".join(a.dim_str for a in arrays_in(hints[k])).split()) for k in arrays]
        for key, array in arrays.items():
            value = np.asarray(array)  # by JAX, each change of it is a program to compile
            wrong = {"complex": value.astype(complex), "a number": value.ravel()[0] if value.ndim else None}
            whole = jnp.issubdtype(value.dtype, jnp.integer)
            wrong["other dtype"] = value.astype(float if whole else int)
            wrong["boolean"] = None if value.dtype == bool else value > 0
            wrong["a list"] = value.tolist()
            own = set(arrays_in(hints[key])[-1].dim_str.split())
            alone = {dim for dim in own if sum(dim in other for other in shared) == 1}
            any_rank = any(dim.startswith("*") and (dim != "*batch" or dim in alone) for dim in own)
            if not any_rank and sum(bool(own & other) for other in shared) > 1:
                wrong |= {"axis more": value[..., None], "axis in front": value[None]}
                wrong["axis less"] = (
                    value[0] if value.ndim > 1 and key != "kept" else None
                )  # one mask for all
            for bad in (x for x in wrong.values() if x is not None):
                bad = bad if isinstance(bad, list) else jnp.asarray(bad)
                if key == "share" and np.ndim(bad) == 0:
                    continue  # one share for the batch is welcome
                with pytest.raises(ValueError, match=rf"^{name} needs .*") as caught:
                    PUBLIC[name](**given | {key: bad})
                assert any(f"{other}" in str(caught.value) for other in arrays)
                if not isinstance(bad, list):
                    with pytest.raises(ValueError, match=rf"^{name} needs "):
                        jax.eval_shape(lambda x: PUBLIC[name](**given | {key: x}), bad)  # noqa: B023


@pytest.mark.parametrize(("name", "option"), list(options()))
class TestEveryOption:
    def test_is_finite(self, name, option):
        given, _ = arguments(name)
        for bad in (np.nan, np.inf, -np.inf, np.float32(np.nan), jnp.float32(jnp.inf)):
            with pytest.raises(ValueError, match=f"{name} needs a finite {option}, got"):
                PUBLIC[name](**given | {option: bad})

    def test_is_one_number(self, name, option):
        given, _ = arguments(name)
        for bad in (True, "4", jnp.ones((1, 1)), 1j):
            with pytest.raises(ValueError, match=f"{name} needs {option} as a number"):
                PUBLIC[name](**given | {option: bad})

    def test_may_be_traced_or_of_numpy_or_jax(self, name, option):
        given, _ = arguments(name)
        number = 0.5 if option in ("fraction", "correct_probability") else 1.0
        plain = PUBLIC[name](**given | {option: number})
        other = PUBLIC[name](**given | {option: np.float32(number)})
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), other, plain)
        traced = jax.eval_shape(lambda x: PUBLIC[name](**given | {option: x}), 0.0)
        assert jax.tree.map(lambda x: x.shape, traced) == jax.tree.map(lambda x: x.shape, plain)


@pytest.mark.parametrize("zero", [0, 0.0, -1, np.float32(0), np.int64(0), jnp.float32(0), jnp.int32(-1)])
def test_a_temperature_is_positive_however_it_is_written(zero):
    logits = jnp.ones((2, 3))
    with pytest.raises(ValueError, match="soft_target_kl needs a temperature above 0, got"):
        losses.soft_target_kl(logits, logits, temperature=zero)
    assert jnp.isnan(jax.jit(lambda t: losses.soft_target_kl(logits, logits, temperature=t))(0.0)).all()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            jnp.zeros((4, 1), int),
            r"labels as int \[\*batch\] = \[4\], got int32\[4, 1\]: write labels\[\.\.\., 0\]",
        ),
        (jnp.zeros((4, 5), int), r"jnp\.argmax\(labels, axis=-1\)"),
        (jnp.zeros((4, 5)), r"got float32\[4, 5\].*jnp\.argmax\(labels, axis=-1\)"),
        (jnp.zeros(4), r"labels\.astype\(jnp\.int32\)"),
        (jnp.zeros(4, bool), r"got bool\[4\].*labels\.astype\(jnp\.int32\)"),
        (jnp.zeros(3, int), r"labels as int \[\*batch\] = \[4\], got int32\[3\]"),
        (np.array([0, 1, 7, 2]), "labels from 0 to 4, or below 0 .*, got 7"),
        (np.array([0, 2**32 + 1, 0, 2]), "got 4294967297"),
    ],
)
def test_labels_are_refused_with_advice(labels, message):
    with pytest.raises(ValueError, match=f"^dkd needs .*{message}"):
        losses.dkd(jnp.zeros((4, 5)), jnp.zeros((4, 5)), labels)


def test_one_score_is_no_prediction_over_classes():
    one = jnp.ones((4, 1))
    for name in ("soft_target_kl", "jensen_shannon", "correlation_distance", "logit_standardised_kl", "dist"):
        with pytest.raises(
            ValueError, match=f"{name} needs at least 2 classes, got student_logits .*sigmoid"
        ):
            PUBLIC[name](one, one)
    np.testing.assert_array_equal(losses.squared_logits(one, 3 * one), [4, 4, 4, 4])


def test_an_empty_batch_has_no_values_and_no_relations():
    none = jnp.zeros((0, 5))
    assert losses.soft_target_kl(none, none).shape == (0,)
    for name in ("dist", "rkd_distance", "info_nce"):
        with pytest.raises(ValueError, match=f"{name} needs at least 1 batch, got student"):
            PUBLIC[name](none, none)


# The hook that checks annotations in tests would refuse these too; a user has no such hook.
def test_refuses_without_the_tests_own_checks():
    code = """
import jax.numpy as jnp, numpy as np
from kdjax import losses
logits, maps = jnp.ones((4, 5)), jnp.ones((4, 2, 2, 8))
for name, call in {
    "soft_target_kl": lambda: losses.soft_target_kl(logits, logits[:1]),
    "squared_logits": lambda: losses.squared_logits(logits, logits[:, None]),
    "label_smoothing_cross_entropy": lambda: losses.label_smoothing_cross_entropy(logits, np.zeros((4, 1), int)),
    "hint": lambda: losses.hint(maps, maps[..., :1]),
    "pkt": lambda: losses.pkt(logits, logits[:1]),
    "map_distance": lambda: losses.map_distance(logits, logits[:1]),
    "squared_error": lambda: losses.squared_error(logits, logits, logits[:, 0]),
    "crd": lambda: losses.crd(
        logits, logits, losses.CrdMemory(maps[0, 0], logits, jnp.zeros(()), jnp.zeros(())), jnp.zeros((4, 2), int)),
}.items():
    try:
        call()
    except ValueError as error:
        assert str(error).startswith(name + " needs "), error
    else:
        raise AssertionError(name)
assert losses.dkd(np.ones((4, 5)), np.eye(4, 5), np.arange(4, dtype=np.uint8)).shape == (4,)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
