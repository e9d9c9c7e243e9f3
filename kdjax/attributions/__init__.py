"""Attributions of a network's score to its inputs, as maps to learn from and to evaluate.

::

    @jax.jit
    def explain(variables, images, labels):
        score_fn = attributions.class_score(lambda x: network(variables, x))
        found = attributions.integrated_gradients(score_fn, images, targets=labels, num_steps=50)
        return attributions.importance(found.values), found.relative_residual

Inputs are an array [batch, ...] or a pytree of them, such as a dict of an image and a spectrum. Attributions have the
same structure, and sum to the score difference over all of it. Labels are integers below the number of classes; a
negative label is void, and its map is zero.

Paths start at zeros by default, the published choice: the mean image, if images are normalised. Other ``baselines``,
normalised like the images, are black, the image after :func:`kdjax.robustness.gaussian_blur`, and several samples of
uniform noise, whose attributions are averaged.

* :func:`integrated_gradients` at a fixed number of nodes; :func:`adaptive_integrated_gradients` at as many as each
  example needs.
* :func:`trainable_input_gradients`: input gradients that a loss can train through.
* :func:`importance`, :func:`quantised`: maps, and their stored form; :func:`overlay`, :func:`random_overlay`: training
  images blended with maps. As a loss: :func:`kdjax.losses.attribution_map`.
* :func:`deletion_insertion`, :func:`pointing_game`, :func:`relevance_mass`, :func:`rank_correlation`: metrics of maps.

On a CPU use networks of :mod:`kdjax.models.layers`: XLA's own convolution gradients are slow inside a loop.
"""

from kdjax.attributions.gradients import trainable_input_gradients as trainable_input_gradients
from kdjax.attributions.integrated import Attributions as Attributions
from kdjax.attributions.integrated import adaptive_integrated_gradients as adaptive_integrated_gradients
from kdjax.attributions.integrated import class_score as class_score
from kdjax.attributions.integrated import integrated_gradients as integrated_gradients
from kdjax.attributions.integrated import quadrature as quadrature
from kdjax.attributions.metrics import deletion_insertion as deletion_insertion
from kdjax.attributions.metrics import pointing_game as pointing_game
from kdjax.attributions.metrics import rank_correlation as rank_correlation
from kdjax.attributions.metrics import relevance_mass as relevance_mass
from kdjax.attributions.overlay import importance as importance
from kdjax.attributions.overlay import overlay as overlay
from kdjax.attributions.overlay import quantised as quantised
from kdjax.attributions.overlay import random_overlay as random_overlay
