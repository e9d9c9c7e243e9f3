"""How good maps are: do they add up to what they should, how far are they from the integral, and how many nodes do."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

QUANTILE = 0.9
DIFFERENT = 1e-2  # of a map; float32 rounding moves it by far less, even where it turns a ReLU over


def relative_residuals(values: np.ndarray, difference: np.ndarray) -> np.ndarray:
    """Per image |sum of the map - difference of scores| / |difference of scores|."""
    total = values.reshape(len(values), -1).sum(-1, dtype=np.float64)
    return np.abs(total - difference) / np.maximum(np.abs(difference), np.finfo(np.float32).tiny)


def map_errors(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Per image |map - reference| / |reference|, of signed values, in the 2-norm."""
    off, whole = (
        np.linalg.norm(x.reshape(len(x), -1).astype(np.float64), axis=-1)
        for x in (values - reference, reference)
    )
    return off / np.maximum(whole, np.finfo(np.float32).tiny)


def reaches(residuals: np.ndarray, bound: float) -> bool:
    """Whether the 90 % quantile over the images is at most the bound."""
    return bool(np.quantile(residuals, QUANTILE) <= bound)


def fewest(residuals: Mapping[int, np.ndarray], bound: float) -> int | None:
    """The fewest of these numbers of nodes that reach the bound; None if none does."""
    return next((nodes for nodes, found in sorted(residuals.items()) if reaches(found, bound)), None)


class Quality(NamedTuple):
    """Residuals and map errors of all images."""

    residuals: np.ndarray
    errors: np.ndarray

    def summary(self) -> dict[str, float]:
        """Their medians and 90 % quantiles."""
        return summary("relative_residual", self.residuals) | summary("map_error", self.errors)


def summary(name: str, numbers: np.ndarray) -> dict[str, float]:
    """Median and 90 % quantile under two names."""
    return {
        f"{name}_median": float(np.median(numbers)),
        f"{name}_q90": float(np.quantile(numbers, QUANTILE)),
    }


def check_equal(network: str, maps: Mapping[str, np.ndarray], differences: Mapping[str, np.ndarray]) -> float:
    """Refuses to compare workers that do not explain the same network.

    Args:
      network: its name.
      maps: arm → attributions.
      differences: contender → differences of scores.

    Returns:
      The largest error of any image's map against the first arm's.

    Raises:
      ValueError: if differences of scores are more than 1e-3 of the largest apart, or a map more than 1e-2 of its size.
    """
    (first, reference), (scorer, scores) = (next(iter(x.items())) for x in (maps, differences))
    for contender, found in differences.items():
        apart = float(np.max(np.abs(found - scores)) / np.max(np.abs(scores)))
        if not apart < 1e-3:
            raise ValueError(
                f"{network}: {contender} has scores that are {apart:.2g} apart from those of {scorer}. A benchmark "
                "compares forms of the same network."
            )
    worst = 0.0
    for arm, found in maps.items():
        apart = float(np.max(map_errors(found, reference)))
        if not apart < DIFFERENT:
            raise ValueError(
                f"{network}: a map of {arm} is {apart:.2g} of its size apart from that of {first}. A benchmark "
                "compares forms of the same integral."
            )
        worst = max(worst, apart)
    return worst


def uniform_nodes(
    uniform: Mapping[int, Quality], bound: float, adaptive: Quality
) -> tuple[int | None, int | None]:
    """The fewest that reach the bound, and the fewest with at most the median map error of adaptive ones."""
    wanted = np.median(adaptive.errors)
    return (
        fewest({nodes: quality.residuals for nodes, quality in uniform.items()}, bound),
        next(
            (nodes for nodes, quality in sorted(uniform.items()) if np.median(quality.errors) <= wanted), None
        ),
    )
