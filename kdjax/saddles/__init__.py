r"""Saddles that teachers pass: how to tell one, where to keep it, and how a student starts from it.

The method is SPRKD (Dewan, arXiv 2607.23346): a teacher is not imitated, it shows where its loss has saddles, and the
student is put near them and descends from there.

* :func:`score_saddle`: a spectrum, as ``kdjax.curvature`` or any other code computes it, as a dozen numbers.
* :func:`magnitude_rule`, :func:`ratio_rule`, :func:`both_rule`, :func:`extreme_rule`: what was published as a strong
  saddle. :func:`gated_rule`: what this library recommends. :func:`certified`: whether any curvature is negative.
* :func:`add`, :func:`entries`, :func:`read`: a repository of snapshots, one directory per teacher.
* :func:`choose`, :func:`aggregate`: one snapshot per teacher, and the mean over teachers.
* :func:`select_weights`: the teacher's parameters in the student's shapes.

Scores and rules are pure: they work under ``jax.jit`` and ``jax.vmap``, and rules also on scores stacked along any
axes. The others run on the host.
"""

from kdjax.saddles.scores import Rule as Rule
from kdjax.saddles.scores import SaddleScore as SaddleScore
from kdjax.saddles.scores import Sums as Sums
from kdjax.saddles.scores import both_rule as both_rule
from kdjax.saddles.scores import certified as certified
from kdjax.saddles.scores import extreme_rule as extreme_rule
from kdjax.saddles.scores import gated_rule as gated_rule
from kdjax.saddles.scores import magnitude_rule as magnitude_rule
from kdjax.saddles.scores import ratio_rule as ratio_rule
from kdjax.saddles.scores import score_saddle as score_saddle
from kdjax.saddles.select_weights import select_weights as select_weights
from kdjax.saddles.select_weights import select_weights_with_state as select_weights_with_state
from kdjax.saddles.snapshots import Entry as Entry
from kdjax.saddles.snapshots import Snapshot as Snapshot
from kdjax.saddles.snapshots import add as add
from kdjax.saddles.snapshots import aggregate as aggregate
from kdjax.saddles.snapshots import choose as choose
from kdjax.saddles.snapshots import entries as entries
from kdjax.saddles.snapshots import read as read
