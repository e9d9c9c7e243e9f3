"""Packages that come with an extra of the wheel: imported where they are used, and named where they are missing."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Says which extra brings what an import within does not find.

    Args:
      name: of the extra, as in ``pip install 'kdjax[report]'``.

    Raises:
      ModuleNotFoundError: with that command.

    Examples:
      >>> with extra("report"):
      ...     from scipy import stats
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or str(error)).split(".")[0]
        raise ModuleNotFoundError(
            f"{missing} is not installed; it comes with pip install 'kdjax[{name}]'.", name=error.name
        ) from error
