"""Names of experiments.cli under which experiments know them; gone when experiments/common is."""

from experiments.cli.workers import in_children as in_children
from experiments.cli.workers import my_task as my_task


def end_with_parent() -> None:
    """Nothing: my_task does it."""
