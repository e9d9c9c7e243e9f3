"""One question a file, launched with absl flags: ``python -m experiments.NAME --help``."""

import sys

if sys.argv[:1] == ["-m"]:  # `python -m experiments.NAME` has just begun, and will import for seconds
    from experiments import huge_pages, stopping

    huge_pages.restart()
    stopping.end_on_signals()
