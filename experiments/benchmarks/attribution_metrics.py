"""How accurate maps are, how many nodes reach an accuracy, and how the times of all arms compare."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmarks.timing import goal, over

QUANTILE = 0.9
DIFFERENT = 1e-2  # of a map; float32 rounding changes it by far less, even where it switches a ReLU
DEFAULT, FLOOR = "captum default", "kdjax gradients"
GOALS = {DEFAULT: 2.0, "captum's best chunk": 1.0}  # times kdjax
FLOOR_GOAL = 1.1


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
      ValueError: if differences of scores are more than 1e-3 of the largest apart, or a map
        is more than 1e-2 of its size from the first.
    """
    (first, reference), (scorer, scores) = (next(iter(x.items())) for x in (maps, differences))
    for contender, found in differences.items():
        difference = float(np.max(np.abs(found - scores)) / np.max(np.abs(scores)))
        if not difference < 1e-3:
            raise ValueError(
                f"{network}: {contender} has scores that are {difference:.2g} away from those of {scorer}. A benchmark "
                "compares forms of the same network."
            )
    worst = 0.0
    for arm, found in maps.items():
        difference = float(np.max(map_errors(found, reference)))
        if not difference < DIFFERENT:
            raise ValueError(
                f"{network}: a map of {arm} is {difference:.2g} of its size away from that of {first}. A benchmark "
                "compares forms of the same integral."
            )
        worst = max(worst, difference)
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


# Times


def captum_arm(chunk: int) -> str:
    """The name of captum with so many nodes at once."""
    return f"captum by {chunk}"


def adaptive_arm(bound: float) -> str:
    """The name of adaptive nodes with a bound."""
    return f"kdjax adaptive {bound:g}"


def uniform_arm(nodes: int) -> str:
    """The name of captum with so many nodes in its best chunks."""
    return f"captum, {nodes} nodes"


def clock_of(threads: int) -> str:
    """The metric that is compared."""
    return "cpu_ms" if threads == 1 else "ms"


def judge(
    found: Mapping[str, Any], equal: Sequence[Mapping[str, Any]], where: str, threads: int, nodes: int
) -> tuple[dict[str, dict], list[dict[str, Any]]]:
    """The ratios to the peers, and what became of each goal."""
    speed, fixed, later = clock_of(threads), found["fixed"], found["equal"]
    ours, ratios, goals = fixed["kdjax"], {}, []
    for arm, metrics in fixed.items():
        if arm not in ("kdjax", FLOOR):
            ratios[f"{where}: {arm}"] = over(metrics[speed], ours[speed])
            if "peak_mib" in ours and min(ours["peak_mib"]) > 0 and min(metrics["peak_mib"]) > 0:
                ratios[f"{where}: {arm} memory"] = over(metrics["peak_mib"], ours["peak_mib"])
    ratios[f"{where}: the floor, {nodes} gradients"] = over(fixed[FLOOR][speed], ours[speed])
    best = None if found["best"] is None else captum_arm(found["best"])
    for said, arm in {DEFAULT: DEFAULT, "captum's best chunk": best}.items():
        if arm in fixed:
            text = f"{where}: {nodes} nodes ≥ {GOALS[said]:g}× {said}"
            goals.append(goal(text, GOALS[said], ratios[f"{where}: {arm}"]))
    floor, text = over(ours[speed], fixed[FLOOR][speed]), f"{nodes} nodes ≤ {FLOOR_GOAL:g}× {nodes} gradients"
    goals.append(goal(f"{where}: {text}", FLOOR_GOAL, floor, at_most=True))
    for row in equal:
        mine, bound = later[adaptive_arm(row["bound"])][speed], f"residual ≤ {row['bound']:g}"
        needed, same_error = row["uniform_nodes"], row["uniform_nodes_of_equal_map_error"]
        arm = uniform_arm(needed or 0)
        if arm in later and row["adaptive"]["reached"]:
            ratios[f"{where}: {bound}, {arm}"] = ratio = over(later[arm][speed], mine)
            goals.append(goal(f"{where}: {bound} ≥ 1× {arm} in its best chunks", 1.0, ratio))
            if DEFAULT in fixed:
                # Hundreds of nodes in one batch would not fit; they take at least as long in proportion.
                default = statistics.median(fixed[DEFAULT][speed]) * needed / nodes
                said = f"{DEFAULT}, {needed} nodes extrapolated"
                ratios[f"{where}: {bound}, {said}"] = ratio = over([default] * len(mine), mine)
                goals.append(goal(f"{where}: {bound} ≥ {GOALS[DEFAULT]:g}× {said}", GOALS[DEFAULT], ratio))
        arm = uniform_arm(same_error or 0)
        if arm in later:
            ratios[f"{where}: map error as at {bound}, {arm}"] = over(later[arm][speed], mine)
    return ratios, goals


def with_times(
    row: Mapping[str, Any], later: Mapping[str, Mapping[str, Sequence[float]]], threads: int, images: int
) -> dict[str, Any]:
    """A row of "equal" with the milliseconds per map of both, by the wall clock."""
    found: dict[str, Any] = {**row, "threads": threads}
    arms = {"adaptive": adaptive_arm(row["bound"]), "uniform": uniform_arm(row["uniform_nodes"] or 0)}
    for kind, arm in arms.items():
        if arm in later:
            found[kind] = row[kind] | {"ms_per_map": statistics.median(later[arm]["ms"]) / images}
    return found
