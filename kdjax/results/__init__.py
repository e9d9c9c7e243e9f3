"""One JSON file per experiment: what was asked, run and measured, on what, with every value of every seed.

The schema (version 2) is flat enough to read by eye::

    {"schema": 2, "name": "quickstart", "question": "Does ...?", "command": "python -m ...", "flags": {...},
     "created": "2026-11-21T02:40:00+00:00", "commit": "3f2a...", "dirty": false, "versions": {"jax": "0.10.2", ...},
     "hardware": {"backend": "cpu", "devices": 1, "cores": 2, ...}, "wall_clock_s": 61.2, "scaled_down": "...",
     "seeds": [0, 1, 2], "arms": {"scratch": {"accuracy": [0.91, 0.92, 0.90]}, ...}}

These fields every result has. ``arms`` maps an arm to its metrics and a metric to one number per seed (or per repeat,
in a benchmark). ``flags`` is every setting that decided the numbers, ``dirty`` says that tracked files differed from
``commit``, and ``scaled_down`` what is smaller than in the study that the experiment follows, empty if nothing is.
Fractions stay fractions; percent signs belong to the report.

What else an experiment has measured stands in optional fields. An arm in one of them is one of ``arms``:

``arm_seeds``
    arm → its seeds, for an arm that ran on others than ``seeds``, such as a single teacher.
``curves``
    arm → metric → one list per seed, with one number or null per epoch.
``comparisons``
    list of ``{"metric", "a", "b", "difference", "low", "high", "p", "n", "test"}``: a less b with its 95 % interval;
    the last two may be missing.
``ratios``
    peer → ``{"median", "low", "high"}``: how many times faster or smaller kdjax is.
``notes``
    list of sentences for the reader.
``robustness``
    arm → disturbance → one accuracy per seed. Disturbances are named as :func:`kdjax.robustness.make_evaluator` returns
    them, by kind and size: "clean", "gaussian_noise/3", "mean_corruption", "weight_noise/0.1", "fgsm/8"; another metric
    than accuracy stands behind its size, "fgsm/8/ece".
``calibration``
    arm → ``{"confidence": [...], "accuracy": [...], "count": [...]}``, a number per bin, as
    :func:`kdjax.evaluate.reliability` returns it, pooled over the seeds.
``confusion``
    arm → square matrix of counts, true class by predicted class, pooled over the seeds.
``class_names``
    list of str, the classes of ``confusion`` in its order.
``costs``
    arm → ``{"parameters": int, "latency_ms": [...]}``, one latency per repeat, of one image in JAX on ``hardware``.
``swept``
    list of ``{"name": flag, "values": [...], "arms": {arm: {metric: [[one number per seed] per value]}}}``; the values
    rise, and an arm here is a line of the figure, which need not be among ``arms``.
``trials``
    list of ``{"number": int, "settings": {flag: value}, "outcome": "finished", "pruned" or "failed", "value": number or
    null, "seconds": number}``, one per setting that a search has tried.
``trials_metric``
    what the value of a trial is, such as "validation_accuracy"; more is better unless the metric is an error or a loss.
``flatness``
    arm → measure → one number per seed, of the curvature at the final weights, on the same examples for all arms:
    "loss" and "gradient_norm"; "lambda_max", "lambda_min", "trace" and "sharpness", where "_residual" or "_error"
    behind a name says how exact it is; each of these raw, and filter-normalised with "/filter_normalised" behind its
    name. "loss" is never missing, since flatness means nothing without it.
``densities``
    arm → ``{"grid": [x], "density": [[one per x] per seed or probe]}``: eigenvalue densities of the Hessian.
``surfaces``
    arm → ``{"x": [...], "y": [...], "loss": [[one per y] per x]}``: losses over the plane of two filter-normalised
    directions (:func:`kdjax.landscape.surface`), with the final weights of the arm's first run at x = y = 0. The steps
    x and y rise, and 0 is among them.
``overlays``
    list of ``{"title": str, "image": uint8 [height][width][1 or 3], "map": numbers [height][width]}``: what a network
    looked at; a map may be signed.

``sha256``
    digest of all other fields, put there by :func:`write`; :func:`read` checks it and leaves it out.

Any other field is the experiment's own and is kept. Version 1 had the fields up to ``notes``; :func:`read` reads it
too.
"""

from kdjax.results.records import PACKAGES as PACKAGES
from kdjax.results.records import command_line as command_line
from kdjax.results.records import environment as environment
from kdjax.results.records import make as make
from kdjax.results.records import read as read
from kdjax.results.records import write as write
from kdjax.results.schema import REQUIRED as REQUIRED
from kdjax.results.schema import SCHEMA as SCHEMA
from kdjax.results.schema import check as check
from kdjax.results.schema import upgrade as upgrade
