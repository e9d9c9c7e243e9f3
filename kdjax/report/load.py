"""Reading many result files: a damaged one is named, the others are still read."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kdjax import results


def load(paths: Iterable[str | os.PathLike[str]]) -> tuple[dict[Path, dict[str, Any]], list[str]]:
    """Reads result files; a damaged one is named and the others are still read.

    Returns:
      Path → result, in the order of the paths, and one sentence for each file that could not be read.
    """
    found: dict[Path, dict[str, Any]] = {}
    problems = []
    for path in paths:
        try:
            found[Path(path)] = results.read(path)
        except OSError as error:
            problems.append(f"{path} cannot be read: {error.strerror or error}.")
        except ValueError as error:
            problems.append(str(error))
    return found, problems
