r"""Is the best mixing weight of a regression the one that theory gives? Closed form and one-shot estimate, beside it.

    python -m experiments.regression_weight --output=experiments/results/regression_weight.json

A student with squared error learns from noisy labels (weight a) and from a teacher (1 - a), as in equation 7.1 of Hao
(2023). Each row of the result is a setting: the standard deviation of the labels' noise, the training examples of the
student, and the teacher, who saw more examples with the same noise, or has a bias, or is the student itself. Per seed:

* best_weight: the weight with the least error on new examples, of a grid (-3 to 4; networks -1 to 2);
* closed_form_weight: of ``losses.best_hard_weight``, from the noise and the numbers of examples of least squares
  (nothing is measured but the teacher's bias), or, for two layers, from the errors of the two students that learn from
  labels alone and from the teacher alone;
* one_shot_weight: of ``losses.one_shot_hard_weight``, from the training examples alone, for linear students;
* excess_X: the error on new examples, over that of the best weight, at the weight X: closed form, one shot, a = 1 and
  a = .1, the usual weight.

Students are least squares, ridge regression (its own teacher, as in Dang et al., arXiv 2602.17565, 2026), and networks
with one hidden layer. It takes about two minutes on two CPU cores.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from experiments import cli
from kdjax import losses, report, results
from kdjax.callbacks import bar

SEEDS = cli.define_seeds(",".join(map(str, range(20))))
OUTPUT = flags.DEFINE_string("output", None, "Where the result is written, as JSON; its figure beside it.")
SUPERSEDES = flags.DEFINE_string("supersedes", "", "Why it supersedes the result that is there.")
SMOKE = flags.DEFINE_bool("smoke", False, "Three seeds and few steps.")

HIDDEN, STEPS, RATE = 32, 1500, 0.01
NEW = 4000  # examples that errors of networks are measured on
WIDE, NARROW = (
    np.linspace(-3, 4, 141),
    np.linspace(-1, 2, 61),
)  # weights, for linear students and for networks
USUAL = 0.1


class Setting(NamedTuple):
    """One row: a kind of student, its examples, the noise of labels, and its teacher."""

    student: str
    examples: int
    noise: float
    teacher_examples: int = 0  # 0: the student is its own teacher
    bias: float = 0.0  # length of what is added to the teacher's coefficients
    penalty: float = 0.0
    inputs: int = 20

    @property
    def name(self) -> str:
        """The arm."""
        teacher = f"teacher of {self.teacher_examples}" if self.teacher_examples else "own teacher"
        more = [f"bias {self.bias:g}"] * bool(self.bias) + [f"penalty {self.penalty:g}"] * bool(self.penalty)
        return ", ".join([f"{self.student}, n = {self.examples}", f"noise {self.noise:g}", teacher, *more])


SETTINGS = (
    *(Setting("least squares", 60, noise, 200) for noise in (0.5, 2.0)),
    *(Setting("least squares", n, 1.0, 200) for n in (40, 200, 1000)),
    *(Setting("least squares", 60, noise, 200, bias=0.5) for noise in (0.5, 2.0)),
    *(Setting("ridge", 300, 1.0, penalty=penalty, inputs=150) for penalty in (0.1, 0.5, 2.0)),
    *(Setting("ridge", 300, 1.0, 300, penalty=penalty, inputs=150) for penalty in (0.1, 2.0)),
    *(Setting("two layers", 60, noise, 200, inputs=5) for noise in (0.2, 1.0)),
    *(Setting("two layers", 60, 0.5, teacher, inputs=5) for teacher in (0, 60)),
)


def main() -> dict[str, Any]:
    """Measures every setting with every seed, and writes the result."""
    start, seeds = time.monotonic(), SEEDS.value[: 3 if SMOKE.value else None]
    if OUTPUT.value is not None and not SUPERSEDES.value and Path(OUTPUT.value).exists():
        raise ValueError(
            f"--output={OUTPUT.value} is there already; say with --supersedes why this supersedes it."
        )
    arms = {}
    with bar("settings", total=len(SETTINGS), unit="setting") as meter:
        for setting in SETTINGS:
            measure = networks if setting.student == "two layers" else linear
            grid = NARROW if measure is networks else WIDE
            found = [judged(grid, *measure(setting, np.random.default_rng(seed))) for seed in seeds]
            arms[setting.name] = {name: [one[name] for one in found] for name in found[0]}
            meter.update()
    result = results.make(
        "regression_weight",
        question="Is the best mixing weight of a regression the one that theory gives?",
        flags=cli.settings(__name__),
        seeds=seeds,
        arms=arms,
        wall_clock_s=time.monotonic() - start,
        notes=[
            f"Errors are of new examples without noise: exact for linear students, of {NEW:,} for networks."
        ],
        comparisons=[],
    )
    if OUTPUT.value is not None:
        results.write(OUTPUT.value, result, supersedes=SUPERSEDES.value)
    cli.say(report.markdown_table(result, metrics=("best_weight", "closed_form_weight", "one_shot_weight")))
    return result


def judged(grid: np.ndarray, error: Callable[[Any], Any], weights: dict[str, float]) -> dict[str, float]:
    """The best weight of a grid, those that are suggested, and what each costs in error."""
    errors = np.array([error(a) for a in grid])
    best = float(grid[errors.argmin()])
    weights = {name: float(np.clip(a, grid[0], grid[-1])) for name, a in weights.items()}
    found = {"best_weight": best, **{f"{name}_weight": a for name, a in weights.items()}}
    for name, a in {**weights, "labels": 1.0, "usual": USUAL}.items():
        found[f"excess_{name}"] = float(error(a) - errors.min()) / float(errors.min())
    return found


def linear(setting: Setting, rng: np.random.Generator) -> tuple[Callable[[Any], Any], dict[str, float]]:
    """Least squares and ridge regression: coefficients are linear in the targets, so two fits give all others."""
    n, theirs, inputs = setting.examples, setting.teacher_examples, setting.inputs
    truth = rng.normal(size=inputs) / np.sqrt(inputs)
    x = rng.normal(size=(n, inputs))
    y = x @ truth + setting.noise * rng.normal(size=n)
    fit = solver(x, setting.penalty)
    of_labels = fit @ y
    teacher = of_labels
    if theirs:
        other = rng.normal(size=(theirs, inputs))
        teacher = solver(other, setting.penalty) @ (other @ truth + setting.noise * rng.normal(size=theirs))
        direction = rng.normal(size=inputs)
        teacher = teacher + setting.bias * direction / np.linalg.norm(direction)
    of_teacher = fit @ (x @ teacher)
    smoother = x @ fit
    own = None if theirs else np.sum(smoother**2)  # the trace of S², since S is symmetric
    fits = (jnp.asarray(v, jnp.float32)[:, None] for v in (y, x @ teacher, x @ of_labels, x @ of_teacher))
    one_shot = losses.one_shot_hard_weight(*fits, freedom=np.trace(smoother), own_freedom=own)
    weights = {"one_shot": float(one_shot)}
    if theirs and not setting.penalty:
        variances = [setting.noise**2 * inputs / (count - inputs - 1) for count in (n, theirs)]
        best = losses.best_hard_weight(variances[0], variances[1] + setting.bias**2)
        weights = {"closed_form": float(best), **weights}

    def error(a: float) -> float:  # of new examples, whose inputs have unit covariance
        return float(np.sum((a * of_labels + (1 - a) * of_teacher - truth) ** 2))

    return error, weights


def solver(x: np.ndarray, penalty: float) -> np.ndarray:
    """The matrix from targets to coefficients."""
    return np.linalg.solve(x.T @ x + len(x) * penalty * np.eye(x.shape[1]), x.T)


def networks(setting: Setting, rng: np.random.Generator) -> tuple[Callable[[Any], Any], dict[str, float]]:
    """Students with one hidden layer, one for every weight, in one program; errors in between by interpolation."""
    dims, few = setting.inputs, 13
    inner, outer = rng.normal(size=(dims, 8)), rng.normal(size=8) / np.sqrt(8)
    start = rng.normal(size=(dims + 1, HIDDEN)) / np.sqrt(dims), rng.normal(size=HIDDEN) / np.sqrt(HIDDEN)

    def draw(count: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
        x = rng.normal(size=(count, dims))
        return x, np.tanh(x @ inner) @ outer + noise * rng.normal(size=count)

    x, y = draw(setting.examples, setting.noise)
    x_theirs, y_theirs = (
        (x, y) if not setting.teacher_examples else draw(setting.teacher_examples, setting.noise)
    )
    new, truth = draw(NEW, 0.0)
    known, known_truth = draw(NEW, 0.0)  # to see errors on before a weight is chosen
    steps = 20 if SMOKE.value else STEPS
    teacher = trained(start, x_theirs, y_theirs, y_theirs, steps=steps, weights=np.ones(1))
    said = np.asarray(predicted(jax.tree.map(lambda w: w[0], teacher), x))
    weights = np.linspace(NARROW[0], NARROW[-1], few)
    students = trained(start, x, said, y, steps=steps, weights=weights)
    of_all = [np.asarray(jax.vmap(lambda w, x=x: predicted(w, x))(students)) for x in (new, known)]
    errors = np.mean((of_all[0] - truth) ** 2, axis=1)
    labels, alone = (of_all[1][np.argmin(np.abs(weights - a))] - known_truth for a in (1, 0))
    best = losses.best_hard_weight(
        float(np.mean(labels**2)), float(np.mean(alone**2)), covariance=float(np.mean(labels * alone))
    )
    return lambda a: np.interp(a, weights, errors), {"closed_form": float(best)}


def predicted(parameters: Any, x: Any) -> jax.Array:
    """Outputs of a network with one hidden layer."""
    first, last = parameters
    return jnp.tanh(x @ first[:-1] + first[-1:]) @ last


def trained(start: Any, x: Any, teacher: Any, y: Any, *, steps: int, weights: np.ndarray) -> Any:
    """The parameters of one student per weight, trained on all examples at once."""
    arrays = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), (start, x, teacher, y, weights))
    return _trained(*arrays, steps)


@jax.jit(static_argnums=5)
def _trained(start: Any, x: Any, teacher: Any, y: Any, weights: Any, steps: int) -> Any:
    tx = optax.adam(RATE)

    def student(a: Any) -> Any:
        def loss(parameters: Any) -> Any:
            own = predicted(parameters, x)[:, None]
            return jnp.mean(losses.squared_error(own, teacher[:, None], y[:, None], hard_weight=a))

        def step(carry: Any, _: None) -> Any:
            parameters, state = carry
            updates, state = tx.update(jax.grad(loss)(parameters), state)
            return (optax.apply_updates(parameters, updates), state), None

        return jax.lax.scan(step, (start, tx.init(start)), None, length=steps)[0][0]

    return jax.vmap(student)(weights)


if __name__ == "__main__":
    cli.launch(main)
