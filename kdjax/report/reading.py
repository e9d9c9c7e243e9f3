"""Reading many result files: a damaged one is named, the others are still read."""

import math
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from kdjax import results
from kdjax.report.words import Result


def load(paths: Iterable[str | os.PathLike[str]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Reads result files; a damaged one is named and the others are still read.

    Returns:
      The results in the order of the paths, and one sentence for each file that could not be read.
    """
    found, problems = [], []
    for path in paths:
        try:
            content = results.read(path)
            _check_optional(content)
            found.append(content)
        except OSError as error:
            problems.append(f"{path} cannot be read: {error.strerror or error}.")
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            text = str(error) if isinstance(error, ValueError) else f"a field has another form ({error!r})"
            problems.append(text if str(path) in text else f"{path} breaks the result schema: {text}")
    return found, problems


def _check_optional(content: Result) -> None:
    """Refuses seeds, curves, comparisons, ratios or notes that could not be drawn or printed."""
    if content["arms"] and not content["seeds"]:
        raise ValueError("a result with arms needs at least one seed, got none.")
    for arm, metrics in content.get("curves", {}).items():
        for metric, runs in metrics.items():
            if not runs or any(np.ndim(run) != 1 or np.size(run) == 0 for run in runs):
                raise ValueError(f"curves/{arm}/{metric} needs one non-empty list of numbers per seed.")
            for run in runs:
                np.asarray(run, np.float64)
    for comparison in content.get("comparisons", []):
        names = [comparison[k] for k in ("metric", "a", "b")]
        numbers = [comparison[k] for k in ("difference", "low", "high", "p")]
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"a comparison needs the names metric, a and b, got {names}.")
        if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in numbers):
            raise ValueError(f"the comparison {names} holds numbers that are not finite: {numbers}.")
    for peer, ratio in content.get("ratios", {}).items():
        if not 0 < ratio["low"] <= ratio["median"] <= ratio["high"] < math.inf:
            raise ValueError(f"ratios/{peer} needs 0 < low <= median <= high, got {ratio}.")
    if not all(isinstance(note, str) for note in content.get("notes", [])):
        raise ValueError(f"notes must be sentences, got {content['notes']!r}.")
