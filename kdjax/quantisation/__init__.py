"""Quantisation-aware training: a network that computes as its int8 file will, as a transformation of the float one.

::

    small = quantisation.quantised(network)
    make = run.make_trainer(small, methods.kd(), dataset, recipe, teacher=signal)
    student = make(0, init=methods.start_at(*small.calibrated(trained.weights, images)))
    export.write("student", student, dataset, formats=["litert_int8"])  # with the ranges that it learnt
"""

from kdjax.quantisation.fake import fake_quantise as fake_quantise
from kdjax.quantisation.fake import fake_quantise_kernel as fake_quantise_kernel
from kdjax.quantisation.fake import grid as grid
from kdjax.quantisation.network import RANGES as RANGES
from kdjax.quantisation.network import Quantised as Quantised
from kdjax.quantisation.network import quantised as quantised
