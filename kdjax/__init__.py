"""kdjax: knowledge distillation in JAX, as pure functions.

A tour, in the order in which data flows:

* :mod:`kdjax.data`: images and labels as arrays addressed by index; splits by hash; augmentation inside the step.
* :mod:`kdjax.models`: networks that return logits and named features; adapters for linen, NNX and Equinox modules.
* :mod:`kdjax.teacher`: a teacher's answers for every example, cached and verified, or asked for in the step.
* :mod:`kdjax.losses`: distillation losses, one value per example. :mod:`kdjax.methods`: losses with their published
  weights and heads; they add up. :mod:`kdjax.transforms`: Optax transformations, SPRKD among them.
* :mod:`kdjax.run`: trains a network by a method on a data set, resumably; :mod:`kdjax.recipe`, :mod:`kdjax.callbacks`
  and :mod:`kdjax.pipeline` are its parts, :mod:`kdjax.train` its step and loop, :mod:`kdjax.vmapped` many runs in one
  program, :mod:`kdjax.parallel` many devices and hosts, :mod:`kdjax.checkpoints` a run on disk.
* :mod:`kdjax.evaluate`: metrics as masked sums. :mod:`kdjax.robustness`, :mod:`kdjax.flatness`, :mod:`kdjax.saliency`:
  what else is measured of a trained network. :mod:`kdjax.significance`: what may be concluded.
* :mod:`kdjax.study`: finished arms as one result; :mod:`kdjax.results`, :mod:`kdjax.report`: its JSON, tables, figures.
* :mod:`kdjax.curvature`, :mod:`kdjax.landscape`: Hessian-vector products, eigenpairs, densities, loss surfaces.
  :mod:`kdjax.saddles`, :mod:`kdjax.recruit`: teachers that keep the saddles they pass. :mod:`kdjax.attributions`:
  integrated gradients as maps to learn from, and to judge.

Importing ``kdjax`` brings ``attributions``, ``curvature``, ``losses`` and ``transforms``, which need only jax, optax,
numpy and jaxtyping. The other modules are imported by name.
"""

from kdjax import attributions as attributions
from kdjax import curvature as curvature
from kdjax import losses as losses
from kdjax import transforms as transforms

__version__ = "0.1.0"
