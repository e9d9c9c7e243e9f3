"""Converters print and log about themselves; here they don't."""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within, nothing is printed to stdout, and neither notes nor warnings are logged."""
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # else the converter's C++ code says that it has them
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
