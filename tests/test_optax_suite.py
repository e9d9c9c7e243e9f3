"""Every transformation through the tests that optax has for contributed optimisers, and ships in its wheel."""

import importlib.util
import inspect
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import optax
import optax.contrib
import pytest
from absl.testing import parameterized

from kdjax import transforms

SUITE = Path(inspect.getfile(optax.contrib)).parent / "_common_test.py"
if not SUITE.exists():
    pytest.skip(f"optax {optax.__version__} comes without {SUITE.name}", allow_module_level=True)

pytestmark = pytest.mark.once


class TakesLoss(str):
    """A name that the suite takes for "sophia" too, the one optimiser of optax to which it hands the loss."""

    __hash__ = str.__hash__

    def __eq__(self, other):
        return other == "sophia" or str.__eq__(self, other)


def after_sgd(make):
    return lambda learning_rate, **options: optax.chain(optax.sgd(learning_rate), make(**options))


def sprkd(learning_rate, **options):
    return transforms.sprkd(optax.sgd(learning_rate), **options)


def approach_region(learning_rate, **options):
    """Its region is like the parameters, which are others in every test: zeros like them."""

    def toward_zero(params):
        region = jax.tree.map(jnp.zeros_like, params)
        return optax.chain(optax.sgd(learning_rate), transforms.approach_region(region, **options))

    return optax.GradientTransformationExtraArgs(
        lambda params: toward_zero(params).init(params),
        lambda updates, state, params=None, **extra: toward_zero(params).update(
            updates, state, params, **extra
        ),
    )


# Name, how it is built, what it has beside numbers, and its numbers, which the suite makes hyperparameters.
TRANSFORMS = {
    "parameter_ema": (after_sgd(transforms.parameter_ema), {}, {"decay": 0.9}),
    "max_norm": (after_sgd(transforms.max_norm), {}, {"limit": 10.0}),
    "approach_region": (approach_region, {"region": ...}, {"max_steps": 5}),
    "negative_eigenstep": (
        after_sgd(transforms.negative_eigenstep),
        {},
        {"period": 1000, "key": 0},
    ),
    "perturb": (after_sgd(transforms.perturb), {}, {"period": 100, "radius": 1e-3, "key": 0}),
    "accept_if_better": (after_sgd(transforms.accept_if_better), {"inner": optax.scale(2.0)}, {}),
    "perturbed_gradient_descent": (transforms.perturbed_gradient_descent, {}, {"radius": 1e-3, "key": 0}),
    "saddle_free_newton": (transforms.saddle_free_newton, {}, {}),
    "sprkd": (sprkd, {"base": ...}, {"period": 1000, "key": 0}),
}


def factory(name):
    """What the suite takes for an optimiser: a function of hyperparameters, whose signature lists them."""
    build, fixed, _ = TRANSFORMS[name]
    given = {option: value for option, value in fixed.items() if value is not ...}

    def make(**options):
        tx = build(**given, **options)

        # Compiled, since the suite calls some as they are, where every operation is a program.
        @partial(jax.jit, static_argnames="obj_fn")
        def update(updates, state, params=None, *, obj_fn=None, **extra):
            return tx.update(updates, state, params, value_fn=obj_fn, **extra)

        return optax.GradientTransformationExtraArgs(tx.init, update)

    rate = inspect.Parameter(
        "learning_rate", inspect.Parameter.KEYWORD_ONLY, annotation=optax.ScalarOrSchedule
    )
    options = inspect.signature(getattr(transforms, name)).parameters
    rest = [
        option.replace(kind=option.KEYWORD_ONLY)
        for option in options.values()
        if option.name not in fixed and option.name != rate.name
    ]
    make.__signature__ = inspect.Signature([options.get(rate.name, rate).replace(kind=rate.kind), *rest])
    return make


ROWS = [
    {
        "opt_name": TakesLoss(name),
        "opt_kwargs": {"learning_rate": 1e-3} | numbers,
        "wrapper_name": None,
        "wrapper_kwargs": None,
    }
    for name, (_, _, numbers) in TRANSFORMS.items()
]


def load():
    """The suite over our rows in place of its own, and nothing else in it changed."""
    spec = importlib.util.spec_from_file_location("optax_common_test", SUITE)
    suite = importlib.util.module_from_spec(spec)
    product = parameterized.product
    ours = lambda *lists, **grid: product(*(ROWS for _ in lists), **grid)  # noqa: E731
    with mock.patch.object(parameterized, "product", ours):
        spec.loader.exec_module(suite)
    suite._get_opt_factory = factory
    return suite.ContribTest


class TestOptaxSuite(load()):
    pass


def test_nothing_is_left_out():
    made = {
        name
        for name, item in vars(transforms).items()
        if inspect.isfunction(item)
        and inspect.signature(item).return_annotation is optax.GradientTransformationExtraArgs
    }
    assert made == TRANSFORMS.keys()
