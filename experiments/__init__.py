"""One question a file, launched with absl flags: ``python -m experiments.NAME --help``."""

import sys

if sys.argv[:1] == [
    "-m"
]:  # python -m experiments.NAME is under way, and imports for seconds before it can do more
    from experiments import process

    process.end_on_signals()
