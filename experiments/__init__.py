"""One question a file, launched with absl flags: ``python -m experiments.NAME --help``."""
