"""Statistics for a handful of seeds: confidence intervals, and tests of the difference between two arms.

The tests are those of scipy and statsmodels; data that do not suit a test are refused.

* :func:`summarise`, :func:`t_interval`, :func:`accuracy_interval`: the mean of one arm.
* :func:`compare`: two arms by seed, in pairs (:func:`paired`) where they share seeds, else by :func:`welch`.
* :func:`compare_accuracies`: two arms by seed and test example.
* :func:`mcnemar`: two students on the same test examples, one run of each.
* :func:`median_time`, :func:`sooner`: when runs reached a target that some never did.
* :func:`equivalence`: whether two arms are equally good. A large p of :func:`compare` does not show that.
* :func:`holm`: corrects the p-values of a family of comparisons.
* :func:`seeds_needed`: how many seeds would show a difference of a given size. To be asked before the runs.
"""

from kdjax.significance.examples import McNemar as McNemar
from kdjax.significance.examples import accuracy_interval as accuracy_interval
from kdjax.significance.examples import compare_accuracies as compare_accuracies
from kdjax.significance.examples import mcnemar as mcnemar
from kdjax.significance.means import FEWEST as FEWEST
from kdjax.significance.means import ROUNDING as ROUNDING
from kdjax.significance.means import Comparison as Comparison
from kdjax.significance.means import Interval as Interval
from kdjax.significance.means import Margin as Margin
from kdjax.significance.means import Summary as Summary
from kdjax.significance.means import compare as compare
from kdjax.significance.means import equivalence as equivalence
from kdjax.significance.means import holm as holm
from kdjax.significance.means import paired as paired
from kdjax.significance.means import seeds_needed as seeds_needed
from kdjax.significance.means import summarise as summarise
from kdjax.significance.means import t_interval as t_interval
from kdjax.significance.means import welch as welch
from kdjax.significance.times import Sooner as Sooner
from kdjax.significance.times import Times as Times
from kdjax.significance.times import median_time as median_time
from kdjax.significance.times import sooner as sooner
