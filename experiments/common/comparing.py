"""What tests say of finished arms, in sentences: the notes of a result."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.tasks import Task
from experiments.common.teachers import Teacher
from experiments.common.training import Trained
from kdjax import data, models, significance

Runs = Mapping[str, Sequence[Trained | Teacher]]

DELTA = 0.01  # accuracies nearer than this are equal for practical purposes


def apart(a: str, b: str, runs: Runs) -> str:
    """Welch's test of the accuracies of two arms, and the interval of their differences seed by seed.

    What two students of one seed have in common, their first weights and the order of images, is in both accuracies;
    it widens the first interval and not the second.
    """
    ours, theirs = _accuracies(runs[a]), _accuracies(runs[b])
    found = significance.welch(ours, theirs)
    paired = significance.t_interval((100 * np.subtract(ours, theirs)).tolist())
    return (
        f"{a} against {b}: {100 * found.difference:+.2f} points of accuracy (95 % interval {100 * found.low:+.2f} to "
        f"{100 * found.high:+.2f}, p = {found.p:.2g}, Welch, not corrected; {paired.low:+.2f} to {paired.high:+.2f} "
        "seed by seed)."
    )


def equal(runs: Runs, *, baseline: str) -> str:
    """Which arms a test of equivalence finds equal to the baseline, in accuracy."""
    plain = _accuracies(runs[baseline])
    others = {name: _accuracies(arm) for name, arm in runs.items() if name != baseline}
    p = {name: significance.equivalence(own, plain, delta=DELTA).p for name, own in others.items()}
    found = ", ".join(f"{name} (p = {value:.2g})" for name, value in p.items() if value < 0.05)
    return (
        f"Equal to {baseline} within {100 * DELTA:g} point of accuracy by two one-sided tests: {found or 'no arm'}; "
        "not shown for the others, which are better, worse or vary too much."
    )


def disagreements(task: Task, runs: Mapping[str, Sequence[Trained]], *, baseline: str, split: str) -> str:
    """McNemar's test of each student against that of the same seed in the baseline, on the same images."""
    ids = task.split[split]
    apply_fn = models.apply_fn(runs[baseline][0].module)

    @jax.jit
    def right(weights, images, labels):
        inputs = data.normalise(images, mean=task.mean, std=task.std)
        outputs, _ = apply_fn(weights.params, weights.model_state, inputs, train=False)
        return jnp.argmax(outputs.logits, -1) == labels

    def correct(run: Trained) -> np.ndarray:
        return np.asarray(right(run.weights, task.source.images[ids], task.source.labels[ids]))

    plain = [correct(run) for run in runs[baseline]]

    def differing(name: str) -> int:
        pairs = zip(map(correct, runs[name]), plain, strict=True)
        return sum(significance.mcnemar(a, b, ids_a=ids, ids_b=ids).mid_p < 0.05 for a, b in pairs)

    counts = ", ".join(f"{name} {differing(name)}" for name in runs if name != baseline)
    return (
        f"Students out of {len(plain)} that differ from that of the same seed of {baseline} by McNemar's test on the "
        f"same images (mid-p below .05): {counts}."
    )


def main_effect(factor: str, pairs: Sequence[tuple[str, str]], runs: Runs) -> str:
    """The mean difference in accuracy over the pairs of arms, without and with a factor, that differ in it alone.

    Its interval is over seeds, each of which has all arms.
    """
    each = np.mean([np.subtract(_accuracies(runs[b]), _accuracies(runs[a])) for a, b in pairs], axis=0)
    found = significance.t_interval((100 * each).tolist())
    return (
        f"Main effect of {factor} over {len(pairs)} pairs of arms: {found.estimate:+.2f} points of accuracy (95 % "
        f"interval {found.low:+.2f} to {found.high:+.2f} over {len(each)} seeds)."
    )


def _accuracies(arm: Sequence[Trained | Teacher]) -> list[float]:
    return [run.metrics["accuracy"] for run in arm]
