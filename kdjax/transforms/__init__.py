"""Optax transformations that distillation needs and Optax lacks.

Each is an ``optax.GradientTransformationExtraArgs``. It ignores extra arguments that it does not use, keeps its dtypes
fixed, and its state holds what one would plot or evaluate.

* :func:`parameter_ema`, :func:`max_norm`: for any training.
* :func:`sprkd`: saddle point recruitment around any optimiser (:mod:`kdjax.saddles` finds the region).
* :func:`approach_region`, :func:`negative_eigenstep`, :func:`perturb`, :func:`accept_if_better`: the published parts,
  to be chained.
* :func:`escape`: one search for negative curvature, to be called from a Python loop.
* :func:`perturbed_gradient_descent`, :func:`saddle_free_newton`: baselines.

::

    tx = transforms.sprkd(optax.adam(1e-3), region=region, key=0)
    updates, state = tx.update(grads, state, params, value_fn=loss_of_params)

The train step of :mod:`kdjax.train` passes ``value``, ``grad`` and ``value_fn``. Freeze BatchNorm statistics and the
dropout key inside ``value_fn``; otherwise its Hessian is another function's. Where several devices hold parts of the
batch, pass the name of their axis as ``axis_name``. (Where ``jax.shard_map`` checks varying axes, gradients arrive
summed: take the mean inside the loss, and pass no axis name.)

A ``key`` may be an integer seed. ``optax.inject_hyperparams`` may inject every number except those that set array
sizes. If you set one of these, declare it static::

    factory = optax.inject_hyperparams(transforms.sprkd, static_args=("num_matvecs",))
    tx = factory(optax.adam(1e-3), key=0, escape_radius=optax.linear_schedule(0.3, 0.1, 1000), num_matvecs=8)

``optax.MultiSteps`` must be outermost, and has to be wrapped to pass extra arguments on::

    several = optax.MultiSteps(tx, every_k_schedule=4)
    tx = optax.GradientTransformationExtraArgs(several.init, several.update)

``optax.masked`` hides parameters from a loss that needs all of them. To freeze some, pass only the others to ``init``
and ``update``, and let the loss close over the frozen ones::

    value_fn = lambda trainable: loss({**frozen, **trainable})
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
