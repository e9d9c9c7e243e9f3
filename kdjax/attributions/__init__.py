"""What a network looks at: attributions of a score to the input, as maps to learn from and to judge.

::

    @jax.jit
    def explain(variables, images, labels):
        score_fn = attributions.class_score(lambda x: network(variables, x))
        found = attributions.integrated_gradients(score_fn, images, targets=labels, num_steps=50)
        return attributions.importance(found.values), found.relative_residual

Inputs are an array [batch, ...] or a pytree of them, such as a dict of an image and a spectrum; attributions come back
in the same structure, and add up over all of it. Labels are integers below the number of classes; a negative one is
void, and its map is zero.

A path begins at zeros by default, which is the mean image if images are normalised, the published choice. Others are
``baselines=``, normalised as the images are: black, ``jnp.zeros_like(pixels)``; the image itself after
:func:`kdjax.robustness.gaussian_blur`; and several of uniform noise, over which the mean is taken.

* :func:`integrated_gradients`, of a number of nodes by a rule; :func:`adaptive_integrated_gradients`, of as many as
  each example needs; :func:`integrated_gradients_of_classes`, of all logits.
* :func:`input_gradients`, :func:`gradient_times_input`, :func:`smoothgrad` to compare them with;
  :func:`trainable_input_gradients`, through which a loss of them trains weights.
* :func:`importance`, :func:`quantised`: maps, and how they are stored as columns; :func:`overlay`,
  :func:`random_overlay`: training images blended with them. As a loss: :func:`kdjax.losses.attribution_map`.
* :func:`deletion_insertion`, :func:`pointing_game`, :func:`relevance_mass`, :func:`rank_correlation`:
  how far to trust a map.

On a CPU use networks of :mod:`kdjax.models.layers`: XLA computes gradients of its own convolutions slowly in a loop.
"""

from kdjax.attributions.gradients import gradient_times_input as gradient_times_input
from kdjax.attributions.gradients import input_gradients as input_gradients
from kdjax.attributions.gradients import smoothgrad as smoothgrad
from kdjax.attributions.gradients import trainable_input_gradients as trainable_input_gradients
from kdjax.attributions.integrated import Attributions as Attributions
from kdjax.attributions.integrated import adaptive_integrated_gradients as adaptive_integrated_gradients
from kdjax.attributions.integrated import class_score as class_score
from kdjax.attributions.integrated import integrated_gradients as integrated_gradients
from kdjax.attributions.integrated import integrated_gradients_of_classes as integrated_gradients_of_classes
from kdjax.attributions.integrated import quadrature as quadrature
from kdjax.attributions.metrics import deletion_insertion as deletion_insertion
from kdjax.attributions.metrics import pointing_game as pointing_game
from kdjax.attributions.metrics import rank_correlation as rank_correlation
from kdjax.attributions.metrics import relevance_mass as relevance_mass
from kdjax.attributions.overlay import importance as importance
from kdjax.attributions.overlay import overlay as overlay
from kdjax.attributions.overlay import quantised as quantised
from kdjax.attributions.overlay import random_overlay as random_overlay
