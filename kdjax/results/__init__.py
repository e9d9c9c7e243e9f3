"""One JSON file per experiment: question, command, environment, and the value of every metric for every seed.

Schema 2, by example::

    {"schema": 2, "name": "quickstart", "question": "Does ...?", "command": "python -m ...", "flags": {...},
     "created": "2026-11-21T02:40:00+00:00", "commit": "3f2a...", "dirty": false, "versions": {"jax": "0.10.2", ...},
     "hardware": {"backend": "cpu", "devices": 1, "cores": 2, ...}, "wall_clock_s": 61.2, "scaled_down": "...",
     "seeds": [0, 1, 2], "arms": {"scratch": {"accuracy": [0.91, 0.92, 0.90]}, ...}}

Every result has these fields. ``arms`` maps an arm to its metrics, and a metric to one number per seed (per repeat in a
benchmark). ``flags`` holds every setting that influenced the numbers. ``dirty`` says whether tracked files differed
from ``commit``. ``scaled_down`` says what is smaller than in the paper that the experiment follows; empty if nothing
is. Fractions are stored as fractions, not as percent. Runs of equal seed in two arms are a pair: they share the order
of images, the teacher, and, where their networks are equal and no weights are given to them, the first weights.

Optional fields; each arm in them is one of ``arms``:

``arm_seeds``
    arm → its seeds, if these are not ``seeds``, as for a single teacher.
``plan``
    what was written down before the first run, and each change since: a list of ``{"declared": time, "metric",
    "baseline", "primary": [[a, b]], "chosen_on": text, "margin": number or null}``. ``primary`` are the comparisons
    that the study is about, corrected as one family; ``chosen_on`` says what was chosen, and on which data; ``margin``
    is the smallest difference that would matter.
``examples``
    split → number of examples.
``correct``
    ``{"split", "examples": int, "arms": {arm: [one text per seed]}}``: whether each student is right on each example of
    the split, in the order of the data set; :func:`correct_of` unpacks it.
``supersedes``
    list of ``{"result": path of a result beside this file, "why": text}``: earlier results of the same question, which
    stay. :func:`write` adds to it.
``curves``
    arm → metric → one list per seed, with one number or null per epoch.
``comparisons``
    list of ``{"metric", "a", "b", "difference", "low", "high", "p", "n", "test"}``: a - b with its 95 % interval and p,
    not corrected; the last two may be missing. They are one family: :mod:`kdjax.report` corrects them for their number.
``ratios``
    peer → ``{"median", "low", "high"}``: how many times faster or smaller kdjax is.
``notes``
    list of sentences for the reader.
``robustness``
    arm → perturbation → one accuracy per seed, with the names of :func:`kdjax.robustness.make_evaluator`: "clean",
    "gaussian_noise/3", "mean_corruption", "weight_noise/0.1", "fgsm/8". The name of another metric than accuracy is
    appended: "fgsm/8/ece".
``calibration``
    arm → ``{"confidence": [...], "accuracy": [...], "count": [...]}``, a number per bin, as
    :func:`kdjax.evaluate.reliability` returns it, pooled over the seeds.
``confusion``
    arm → square matrix of counts, true class by predicted class, pooled over the seeds.
``class_names``
    list of str, the classes of ``confusion`` in order.
``costs``
    arm → ``{"parameters": int, "latency_ms": [...]}``: latencies of one image in JAX on ``hardware``, one per repeat.
``swept``
    list of ``{"name": flag, "values": [...], "arms": {arm: {metric: [[one number per seed] per value]}}}``, the values
    rising. These arms are the lines of the figure, and need not be among ``arms``.
``trials``
    list of ``{"number": int, "settings": {flag: value}, "outcome": "finished", "pruned" or "failed", "value": number or
    null, "seconds": number}``, one per trial of a search.
``trials_metric``
    the metric that is a trial's value, such as "validation_accuracy"; more is better unless it is an error or a loss.
``flatness``
    arm → measure → one number per seed, of the curvature at the final weights, on the same examples for all arms:
    "loss" (required: curvature depends on it) and "gradient_norm"; "lambda_max", "lambda_min", "trace" and "sharpness";
    their accuracy, with "_residual" or "_error" appended; and all of these filter-normalised, with
    "/filter_normalised" appended.
``densities``
    arm → ``{"grid": [x], "density": [[one per x] per seed or probe]}``: eigenvalue densities of the Hessian.
``surfaces``
    arm → ``{"x": [...], "y": [...], "loss": [[one per y] per x]}``: losses over the plane of two filter-normalised
    directions (:func:`kdjax.landscape.surface`). x and y rise; the final weights of the arm's first run are at 0, 0.
``overlays``
    list of ``{"title": str, "image": uint8 [height][width][1 or 3], "map": numbers [height][width]}``: attribution
    maps, which may be signed.

``sha256``
    digest of all other fields, added by :func:`write`; :func:`read` checks and removes it.

An experiment may add fields of its own. Schema 1 had the fields up to ``notes``; :func:`read` reads it too.
"""

from kdjax.results.answers import correct_of as correct_of
from kdjax.results.answers import pack as pack
from kdjax.results.answers import unpack as unpack
from kdjax.results.records import command_line as command_line
from kdjax.results.records import environment as environment
from kdjax.results.records import make as make
from kdjax.results.records import read as read
from kdjax.results.records import write as write
from kdjax.results.schema import SCHEMA as SCHEMA
from kdjax.results.schema import check as check
