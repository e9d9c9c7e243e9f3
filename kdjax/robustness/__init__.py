"""Accuracy of a network on corrupted images, with noisy weights, and under adversarial attack.

::

    evaluate = robustness.make_evaluator(
        apply_fn, images, labels, mean=mean, std=std, batch_size=360, devices=devices
    )
    evaluate(params, model_state, jax.random.key(0))  # {"clean": .98, "gaussian_noise/1": .97, ..., "pgd/8": .41}

A corruption is a pure function ``(images, strength, keys) -> images`` of images in [0, 1] of any size and number of
channels. :data:`CORRUPTIONS` gives each one five strengths; ``CORRUPTIONS["contrast"](images, 3, key)`` is severity 3.
The constants of Gaussian noise, Gaussian blur, contrast and JPEG are those of CIFAR-10-C. Lengths are in pixels of a
32x32 image and are *not* scaled, so the same blur damages an 8x8 digit more. For larger images choose other strengths:
``dataclasses.replace(corruption, strengths=...)``.

Random numbers depend on the key and the example's index alone. An image therefore has the same noise, of growing
strength, at all severities, in every batch and on every device.

References:
  Hendrycks and Dietterich, `Benchmarking Neural Network Robustness to Common Corruptions and Perturbations
  <https://arxiv.org/abs/1903.12261>`_, 2019, section 4; the constants are those of ``make_cifar_c.py`` in
  https://github.com/hendrycks/robustness.
"""

from kdjax.robustness.attacks import EPSILONS as EPSILONS
from kdjax.robustness.attacks import WEIGHT_NOISE as WEIGHT_NOISE
from kdjax.robustness.attacks import attack as attack
from kdjax.robustness.attacks import offset as offset
from kdjax.robustness.attacks import perturb_weights as perturb_weights
from kdjax.robustness.corruptions import CORRUPTIONS as CORRUPTIONS
from kdjax.robustness.corruptions import Corruption as Corruption
from kdjax.robustness.corruptions import contrast as contrast
from kdjax.robustness.corruptions import gaussian_blur as gaussian_blur
from kdjax.robustness.corruptions import gaussian_noise as gaussian_noise
from kdjax.robustness.corruptions import jpeg as jpeg
from kdjax.robustness.corruptions import occlusion as occlusion
from kdjax.robustness.corruptions import translation as translation
from kdjax.robustness.evaluator import make_evaluator as make_evaluator
