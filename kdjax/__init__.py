"""kdjax: knowledge distillation in JAX, as pure functions.

A tour, in the order in which data flows:

* :mod:`kdjax.data`: images and labels as arrays addressed by index; splits by hash; augmentation inside the step.
* :mod:`kdjax.models`: linen networks, each returning logits and named features.
* :mod:`kdjax.teacher`: a teacher's answers for every example, computed once, cached and verified, or online.
* :mod:`kdjax.losses`: distillation losses, one value per example.
* :mod:`kdjax.attributions`: integrated gradients as maps to learn from, overlay on images, and judge.
* :mod:`kdjax.curvature`: Hessian-vector products, extreme eigenpairs, spectral densities, traces.
* :mod:`kdjax.transforms`: Optax transformations; saddle point recruitment around any optimiser.
* :mod:`kdjax.train`: the step and the loop; :mod:`kdjax.parallel`: many devices, many hosts; :mod:`kdjax.vmapped`: many
  trainings in one program.
* :mod:`kdjax.checkpoints`: a whole run on disk, verified when it is read back.
* :mod:`kdjax.evaluate`: metrics as masked sums; :mod:`kdjax.significance`: what may be concluded from them.
* :mod:`kdjax.landscape`: losses along directions and over planes, and how rough they are.
* :mod:`kdjax.robustness`: the same metrics under corrupted images, noisy weights and attacks.
* :mod:`kdjax.results`, :mod:`kdjax.report`: one JSON per experiment; tables, figures and a page made from it.

Importing ``kdjax`` brings ``attributions``, ``curvature``, ``losses`` and ``transforms``, which need only jax, optax,
numpy and jaxtyping. The other modules are imported by name.
"""

from kdjax import attributions as attributions
from kdjax import curvature as curvature
from kdjax import losses as losses
from kdjax import transforms as transforms

__version__ = "0.1.0"
