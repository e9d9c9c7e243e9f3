"""A trained student for other machines: a bundle of files, each of which was run beside JAX before it counts.

::

    bundle = export.write("student", trained, dataset, formats=["litert", "litert_int8"])
    export.predict(export.load("student"), ["photo.jpg"])
"""

from kdjax.export.bundle import Bundle as Bundle
from kdjax.export.bundle import load as load
from kdjax.export.bundle import predict as predict
from kdjax.export.bundle import read_images as read_images
from kdjax.export.checks import Limits as Limits
from kdjax.export.checks import compare as compare
from kdjax.export.source import Source as Source
from kdjax.export.source import function_of as function_of
from kdjax.export.source import logits_of as logits_of
from kdjax.export.writing import FORMATS as FORMATS
from kdjax.export.writing import Format as Format
from kdjax.export.writing import summary as summary
from kdjax.export.writing import write as write
