r"""Saddle point recruitment: score a teacher's snapshots, store them, and start a student from a saddle.

The method is SPRKD (Dewan, arXiv 2607.23346). The student does not imitate the teacher. Snapshots of the teacher's
training show where its loss has saddles; the student starts near one and trains from there.

* :func:`score_saddle`: summarises a Hessian spectrum, from ``kdjax.curvature`` or elsewhere, in eight numbers.
* :func:`magnitude_rule`, :func:`ratio_rule`, :func:`both_rule`, :func:`extreme_rule`: the published criteria of a
  strong saddle. :func:`gated_rule`: the one this library recommends. :func:`certified`: negative curvature for certain.
* :func:`add`, :func:`entries`, :func:`read`: a repository of snapshots, one directory per teacher.
* :func:`choose`, :func:`aggregate`: one snapshot per teacher, and the mean over teachers.
* :func:`select_weights`: the teacher's parameters in the student's shapes.

Scores and rules are pure: they work under ``jax.jit`` and ``jax.vmap``, and rules also on stacked scores. The other
functions run on the host.
"""

from kdjax.saddles.scores import Rule as Rule
from kdjax.saddles.scores import SaddleScore as SaddleScore
from kdjax.saddles.scores import both_rule as both_rule
from kdjax.saddles.scores import certified as certified
from kdjax.saddles.scores import extreme_rule as extreme_rule
from kdjax.saddles.scores import gated_rule as gated_rule
from kdjax.saddles.scores import magnitude_rule as magnitude_rule
from kdjax.saddles.scores import ratio_rule as ratio_rule
from kdjax.saddles.scores import score_saddle as score_saddle
from kdjax.saddles.select_weights import select_weights as select_weights
from kdjax.saddles.snapshots import Entry as Entry
from kdjax.saddles.snapshots import Snapshot as Snapshot
from kdjax.saddles.snapshots import add as add
from kdjax.saddles.snapshots import aggregate as aggregate
from kdjax.saddles.snapshots import choose as choose
from kdjax.saddles.snapshots import entries as entries
from kdjax.saddles.snapshots import read as read
