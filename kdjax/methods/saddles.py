"""Saddle point recruitment (SPRKD) as a method: a region to start from, and escapes along negative curvature."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from kdjax import parallel, train, transforms
from kdjax.methods.method import Method
from kdjax.options import option
from kdjax.types import ModelState, Params

NUM_MATVECS = 16  # Hessian-vector products of every look at a spectrum


@dataclasses.dataclass(frozen=True)
class EscapeOptions:
    """How :func:`sprkd` looks for ways down; see :func:`kdjax.transforms.sprkd`."""

    period: int = option(100, "Steps between two searches for an escape.", least=1)
    escape_radius: float = option(0.3, "Longest escape, relative to the norm of the parameters.", least=0.0)
    perturbation_radius: float = option(
        0.01, "Perturbation before a search, relative to that norm.", least=0.0
    )
    negative_curvature_ratio: float = option(0.1, "|λ_min| / λ_max of a saddle that is left.", least=0.0)
    budget: int = option(20, "Most escapes of a run.", least=0)


def sprkd(region: Params | None = None, **escape: Any) -> Method:
    """SPRKD as this library recommends it: a smooth approach to the region, then checked escapes.

    It adds no loss: use ``labels() + sprkd(region)`` or ``kd() + sprkd(region)``.

    Args:
      region: parameters shaped like the student's, as of :func:`kdjax.saddles.select_weights`; None for escapes alone.
      **escape: options of :func:`kdjax.transforms.sprkd`, such as ``period`` and ``budget``.
    """

    def wrap(base: optax.GradientTransformation) -> optax.GradientTransformation:
        return transforms.sprkd(
            base,
            key=jax.random.key(0),
            num_matvecs=NUM_MATVECS,
            region=region,
            axis_name=parallel.AXIS,
            **escape,
        )

    wrap(optax.identity())  # refuses options that make no sense
    return Method(optimizer=wrap, record=cost, second_batch=True, settings={"sprkd": dict(escape)})


def perturbations(region: Params | None = None, *, period: int = 100, radius: float = 0.01) -> Method:
    """SPRKD without its eigensteps: perturbations of the same length, kept where the loss falls."""

    def wrap(base: optax.GradientTransformation) -> optax.GradientTransformation:
        noise = transforms.perturb(period=period, key=jax.random.key(0), radius=radius)
        parts = [base, transforms.accept_if_better(noise, axis_name=parallel.AXIS)]
        return optax.chain(*parts, *([] if region is None else [transforms.approach_region(region)]))

    return Method(optimizer=wrap, record=cost, settings={"perturbations": [period, radius]})


def sprkd_paper(region: Params) -> Method:
    """SPRKD as published: approach by l·T, then eigensteps and perturbations that are kept where the loss falls.

    Dewan, SPRKD, arXiv 2607.23346, 2026.
    """

    def wrap(base: optax.GradientTransformation) -> optax.GradientTransformation:
        trial = optax.chain(
            transforms.negative_eigenstep(
                period=20, key=jax.random.key(0), num_matvecs=NUM_MATVECS, axis_name=parallel.AXIS
            ),
            transforms.perturb(period=20, key=jax.random.key(1), sigma=0.1**0.5),
        )
        return optax.chain(
            base,
            transforms.accept_if_better(trial, axis_name=parallel.AXIS),
            transforms.approach_region(region, form="published"),
        )

    return Method(optimizer=wrap, record=cost, settings={"sprkd_paper": True})


def start_at(
    params: Params, model_state: ModelState | None = None, *, other_classes: bool = False
) -> Callable[[int, train.TrainState], train.TrainState]:
    """A run's ``init`` that starts the student at these weights; heads start as they would.

    Args:
      params: of a network like the student.
      model_state: its statistics, such as those of batch normalisation; None starts them as they would.
      other_classes: whether that network had other classes, as a pretrained one has: arrays of another shape than the
        student's, which are those of the last layer, start as they would.
    """

    def init(seed: int, state: train.TrainState) -> train.TrainState:
        del seed
        heads = isinstance(state.params, Mapping) and state.params.keys() == {"student", "heads"}

        def replaced(old: Any, new: Any) -> Any:
            if other_classes:
                own = old["student"] if heads else old
                new = jax.tree.map(lambda o, n: n if np.shape(n) == np.shape(o) else o, own, new)
            copied = jax.tree.map(jnp.array, new)
            return {**old, "student": copied} if heads else copied

        kept = state.model_state if model_state is None else replaced(state.model_state, model_state)
        return state._replace(params=replaced(state.params, params), model_state=kept)

    return init


def towards(region: Params) -> Callable[[int, train.TrainState], train.TrainState]:
    """A run's ``init`` that lets :func:`sprkd` approach this region: a program compiled once serves many regions."""
    copied = jax.tree.map(lambda x: np.asarray(x, np.float32), region)

    def init(seed: int, state: train.TrainState) -> train.TrainState:
        del seed
        return state._replace(opt_state=optax.tree.set(state.opt_state, region=copied))

    return init


def cost(before: optax.OptState, after: optax.OptState) -> Mapping[str, Array]:
    """Escapes accepted by one update, and what it cost: Hessian-vector products and losses."""

    def total(state):
        def one(name):
            return optax.tree.get(state, name, jnp.zeros((), jnp.int32))

        accepted = optax.tree.get(state, "events", one("accepted"))
        return {"events": accepted, "hvps": one("hvps"), "evaluations": one("evaluations")}

    return jax.tree.map(lambda new, old: (new - old).astype(jnp.float32), total(after), total(before))
