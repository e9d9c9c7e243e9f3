"""Optax transformations that distillation needs and optax lacks.

Each is an ``optax.GradientTransformationExtraArgs``: it ignores extra arguments that are not its own, keeps its dtypes
fixed, and its state records what one would want to plot or to evaluate.

* :func:`parameter_ema`, :func:`max_norm`: of any training.
* :func:`sprkd`: saddle point recruitment around an optimiser (:mod:`kdjax.saddles` finds the region).
* :func:`track_saddles`, :func:`approach_region`, :func:`negative_eigenstep`, :func:`perturb`,
  :func:`accept_if_better`: its published parts, to be chained.
* :func:`escape`: its kernel, a function to be called from a loop in Python.
* :func:`perturbed_gradient_descent`, :func:`saddle_free_newton`: what to compare it with.

::

    tx = transforms.sprkd(optax.adam(1e-3), region=region, key=0)
    updates, state = tx.update(grads, state, params, value_fn=loss_of_params)

The train step of :mod:`kdjax.train` passes ``value``, ``grad`` and ``value_fn``. Keep batch statistics and the key of a
dropout fixed inside ``value_fn``, else its curvature is that of something else. Where several devices hold parts of the
batch, name their axis as ``axis_name``. (Where ``jax.shard_map`` checks varying axes, gradients arrive summed: take the
mean inside the loss, and name no axis.)

A ``key`` may be an integer seed. Every number may be a hyperparameter of ``optax.inject_hyperparams`` except those that
size arrays. Where these are not left at their defaults, name them as static::

    factory = optax.inject_hyperparams(transforms.sprkd, static_args=("num_matvecs", "trials"))
    tx = factory(optax.adam(1e-3), key=0, radius=optax.linear_schedule(0.3, 0.1, 1000), num_matvecs=8)

``optax.MultiSteps`` must go around all others, and be told to pass extra arguments on::

    several = optax.MultiSteps(tx, every_k_schedule=4)
    tx = optax.GradientTransformationExtraArgs(several.init, several.update)

``optax.masked`` hides parameters from a loss that needs them all. To freeze some, hand only the others to ``init`` and
``update``, and let the loss close over the frozen::

    value_fn = lambda moving: loss({**frozen, **moving})
"""

from kdjax.transforms.accept_if_better import AcceptState as AcceptState
from kdjax.transforms.accept_if_better import accept_if_better as accept_if_better
from kdjax.transforms.averaging import ParameterEmaState as ParameterEmaState
from kdjax.transforms.averaging import parameter_ema as parameter_ema
from kdjax.transforms.baselines import PerturbedGradientState as PerturbedGradientState
from kdjax.transforms.baselines import SaddleFreeState as SaddleFreeState
from kdjax.transforms.baselines import perturbed_gradient_descent as perturbed_gradient_descent
from kdjax.transforms.baselines import saddle_free_newton as saddle_free_newton
from kdjax.transforms.constraining import max_norm as max_norm
from kdjax.transforms.monitor import TrackState as TrackState
from kdjax.transforms.monitor import track_saddles as track_saddles
from kdjax.transforms.negative_curvature import EigenstepState as EigenstepState
from kdjax.transforms.negative_curvature import Escape as Escape
from kdjax.transforms.negative_curvature import PerturbState as PerturbState
from kdjax.transforms.negative_curvature import escape as escape
from kdjax.transforms.negative_curvature import negative_eigenstep as negative_eigenstep
from kdjax.transforms.negative_curvature import perturb as perturb
from kdjax.transforms.sprkd import SprkdState as SprkdState
from kdjax.transforms.sprkd import sprkd as sprkd
from kdjax.transforms.warm_start import ApproachState as ApproachState
from kdjax.transforms.warm_start import approach_region as approach_region
