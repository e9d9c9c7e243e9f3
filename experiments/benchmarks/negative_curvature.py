r"""Is what ``Eigenpairs.negative`` says true, from 10⁴ to 10⁷ parameters and at scales from 1e-30 to 1e30?

    python -m experiments.benchmarks.negative_curvature --workdir=runs/negative_curvature \
        --output=experiments/results/benchmarks/negative_curvature.json

A trial draws a positive semi-definite matrix, of which no direction may be called negative, and the same matrix with
one eigenvalue of -1e-3 of the largest, which should be found from a start that lies mostly along it. Matrices are
diagonal of low rank, diagonal of full rank, or the Gauss-Newton matrix of a network with random weights and images;
each trial takes another scale, spectrum and start. They are multiplied with in both loops, on one device and on two
that each hold half of the batch, and every second trial also measures the residuals by products. For diagonal matrices
v'Hv is known from NumPy in float64, so the error of an eigenvalue stands beside the bound that is said to hold. Every
twentieth trial measures how far the basis is from orthonormal, also in float64.

Trials are written down one by one. A run that was killed goes on where it was, by the same command; --minutes ends one
by itself, with the result of what is complete. 200 trials up to 10⁶ parameters take hours on two cores, at 10⁷ days.
Expect no false claim, all negative eigenvalues found, and a basis orthonormal to 5e-6. `--smoke` runs the same code in
a minute.
"""

import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from experiments import cli
from kdjax import curvature, files, parallel, results
from kdjax.types import Params

WORKDIR = flags.DEFINE_string("workdir", "runs/negative_curvature", "Where the trials are written down.")
OUTPUT = flags.DEFINE_string("output", None, "Result file to write.")
SIZES = flags.DEFINE_list("sizes", ["10000", "100000", "1000000", "10000000"], "Numbers of parameters.")
KINDS = flags.DEFINE_list("kinds", ["low_rank", "full_rank", "gauss_newton"], "Kinds of matrices.")
FORMS = flags.DEFINE_list("forms", ["host", "compiled", "host_2", "compiled_2"], "Loops; _2 on two devices.")
TRIALS = flags.DEFINE_integer("trials", 200, "Trials of each size, kind and form.", lower_bound=1)
MINUTES = flags.DEFINE_float("minutes", float("inf"), "When to stop and write what is complete.")
SMOKE = flags.DEFINE_bool("smoke", False, "One thousand parameters, three trials.")

SCALES = tuple(10.0**power for power in range(-30, 31, 10))
RANKS = (5, 20, 28)
STEPS = 30  # products of a run
PLANTED = 1e-3  # of the largest eigenvalue, below zero
EXAMPLES, INPUTS, CLASSES = 32, 64, 10
GRAM_PERIOD = 20  # trials from one look at the basis to the next


# Matrices


def spectrum(kind: str, n: int, trial: int) -> np.ndarray:
    """A diagonal that is not negative anywhere, of numbers up to about 5."""
    rng = np.random.default_rng(trial)
    if kind == "low_rank":
        found = np.zeros(n)
        found[: RANKS[trial % len(RANKS)]] = rng.uniform(1, 5, RANKS[trial % len(RANKS)])
        return found
    if trial % 3 == 0:
        return 10 ** rng.uniform(-6, np.log10(5), n)
    return rng.uniform(1, 5, n) if trial % 3 == 1 else np.minimum(rng.standard_normal(n) ** 2, 5)


def quadratic(p: Params, weights: jax.Array, diagonal: jax.Array) -> jax.Array:
    """A loss whose Hessian is diagonal; the mean of the weights is 1, but not on one device alone."""
    return 0.5 * jnp.mean(weights) * jnp.sum(diagonal * p**2)


def network(params: Params, batch: Any, scale: jax.Array) -> jax.Array:
    """Two hidden layers; w² + 76 w + 10 parameters."""
    del scale
    x = batch["image"]
    for name in ("first", "second"):
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params["last"]["kernel"] + params["last"]["bias"]


def entropy(logits: jax.Array, batch: Any, scale: jax.Array) -> jax.Array:
    """Cross-entropy times the scale."""
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return scale * jnp.mean(losses)


def weights_of(n: int, trial: int) -> Params:
    """Random parameters, about n of them."""
    width, rng = round(np.sqrt(n + 38**2) - 38), np.random.default_rng(trial)
    sizes = {"first": (INPUTS, width), "second": (width, width), "last": (width, CLASSES)}
    return {
        name: {
            "kernel": rng.standard_normal(shape, np.float32) / np.float32(shape[0] ** 0.5),
            "bias": np.zeros(shape[1], np.float32),
        }
        for name, shape in sizes.items()
    }


def lowered(arrays: tuple[Any, Params, jax.Array], vector: Params) -> Params:
    """The product of an operator, less a multiple of the projection on a unit vector."""
    multiply, direction, by = arrays
    share = -by * optax.tree.vdot(direction, vector)
    return optax.tree.add_scale(multiply(vector), share, direction)


def operator(kind: str, axis_name: str | None, params: Params, extra: Any, *parts: jax.Array) -> Any:
    """The matrix of a trial as a function of a vector; ``extra`` is the diagonal or the scale."""
    batch: Any = parts[0]
    if kind == "gauss_newton":
        batch = dict(zip(("image", "label"), parts, strict=True))
        return curvature.gauss_newton(network, entropy, params, batch, extra, axis_name=axis_name)
    return curvature.hessian(quadratic, params, batch, extra, axis_name=axis_name)


# One trial


def measure(
    kind: str,
    loop: Any,
    axis_name: str | None,
    explicit: bool,
    params: Params,
    extra: Any,
    start: Params,
    direction: Params | None,
    by: jax.Array,
    *batch: jax.Array,
) -> dict[str, Any]:
    """Both ends of the spectrum: of the matrix, or of it with a negative eigenvalue along a direction."""
    matvec = operator(kind, axis_name, params, extra, *batch)
    if direction is not None:
        matvec = jax.tree_util.Partial(lowered, (matvec, direction, by))
    found = curvature.extreme_eigenpairs(
        matvec, start, num_matvecs=STEPS, explicit_residuals=explicit, loop=loop
    )
    low = found.bottom
    return {
        "negative": low.negative[0],
        "lowest": low.values[0],
        "rounding": low.rounding[0],
        "highest": found.top.values[0],
        "vector": None if kind == "gauss_newton" else low.vectors[0],
    }


@functools.cache
def measurer(kind: str, form: str, explicit: bool) -> Any:
    """:func:`measure` as it is called in a form."""
    loop, _, devices = form.partition("_")
    if not devices:
        return functools.partial(measure, kind, loop, None, explicit)
    function = functools.partial(measure, kind, loop, parallel.AXIS, explicit)
    return parallel.data_parallel(function, replicated=5, devices=parallel.local_devices(int(devices)))


def run(n: int, kind: str, form: str, trial: int) -> dict[str, float]:
    """One trial; sizes are shares of the largest eigenvalue."""
    scale, rng = SCALES[trial % len(SCALES)], np.random.default_rng(trial)
    find = measurer(kind, form, explicit=trial % 2 == 1 and "_" not in form)
    zero = jnp.zeros(())
    if kind == "gauss_newton":
        params = jax.tree.map(jnp.asarray, weights_of(n, trial))
        images = rng.standard_normal((EXAMPLES, INPUTS), np.float32)
        images[:, -1] = 0  # so that its weights have no curvature
        batch = (jnp.asarray(images), jnp.arange(EXAMPLES) % CLASSES)
        extra, diagonal = jnp.float32(scale), None
        direction = jax.tree.map(jnp.zeros_like, params)
        direction["first"]["kernel"] = direction["first"]["kernel"].at[-1].set(1)
    else:
        diagonal = (spectrum(kind, n, trial) * scale).astype(np.float32)
        params, batch, extra = jnp.zeros(n), (jnp.repeat(jnp.array([0.5, 1.5]), 2),), jnp.asarray(diagonal)
        direction = jnp.zeros(n).at[-1].set(1)
    start = curvature.random_like(jax.random.key(trial), params)
    start, direction = (optax.tree.scale(1 / optax.tree.norm(x), x) for x in (start, direction))
    found = find(params, extra, start, None, zero, *batch)
    highest = float(found["highest"])
    both = optax.tree.add_scale(direction, 0.1, start)
    if diagonal is None:
        planted = find(params, extra, both, direction, jnp.float32(PLANTED * highest), *batch)
    else:
        below = jnp.asarray(diagonal).at[-1].set(-PLANTED * diagonal.max())
        planted = find(params, below, both, None, zero, *batch)
    row = {
        "claimed": float(found["negative"]),
        "found": float(planted["negative"]),
        "lowest": float(found["lowest"]) / highest,
        "rounding": float(found["rounding"]) / highest,
    }
    if diagonal is not None:
        row["error"] = rayleigh_error(diagonal, found) / highest
    if trial % GRAM_PERIOD == 0 and "_" not in form:
        row["orthogonality"] = orthogonality(kind, form, params, extra, start, *batch)
    return row


def rayleigh_error(diagonal: np.ndarray, found: dict[str, Any]) -> float:
    """Distance of the smallest Ritz value from v'Hv, which is computed in float64."""
    vector = np.asarray(found["vector"], np.float64)
    squares = vector * vector
    return abs(float(found["lowest"]) - float(squares @ diagonal.astype(np.float64) / squares.sum()))


def orthogonality(
    kind: str, loop: Any, params: Params, extra: Any, start: Params, *batch: jax.Array
) -> float:
    """Largest entry of QQ' - I over the rows that there are, in float64."""
    matvec = operator(kind, None, params, extra, *batch)
    found = curvature.lanczos(matvec, start, num_matvecs=STEPS, loop=loop)
    basis = np.asarray(found.basis)
    basis = basis[np.any(basis != 0, axis=1)]
    gram = np.zeros((len(basis), len(basis)))
    for begin in range(0, basis.shape[1], 10**5):
        part = basis[:, begin : begin + 10**5].astype(np.float64)
        gram += part @ part.T
    return float(np.abs(gram - np.eye(len(basis))).max())


# All trials


def cells() -> Iterator[tuple[int, str, str]]:
    """Size, kind and form, small ones first."""
    for n in (1000,) if SMOKE.value else map(int, SIZES.value):
        for kind in KINDS.value:
            for form in FORMS.value:
                yield n, kind, form


def campaign(
    journal: Path, trials: int, deadline: float
) -> dict[tuple[int, str, str], dict[int, dict[str, float]]]:
    """All trials there are: those of the journal, and those that are made until the deadline."""
    done: dict[tuple[int, str, str], dict[int, dict[str, float]]] = {cell: {} for cell in cells()}
    for line in journal.read_text().splitlines() if journal.exists() else ():
        try:
            n, kind, form, trial, row = json.loads(line)
        except ValueError:  # written in part when the run was killed
            continue
        if (n, kind, form) in done:
            done[n, kind, form][trial] = row
    wanted = [(cell, trial) for trial in range(trials) for cell in done if trial not in done[cell]]
    with journal.open("a") as file:
        for cell, trial in wanted:
            if time.monotonic() > deadline:
                break
            done[cell][trial] = row = run(*cell, trial)
            print(json.dumps([*cell, trial, row]), file=file, flush=True)
    return done


def main() -> None:
    """Runs what is missing and writes the result."""
    begin = time.monotonic()
    trials = 3 if SMOKE.value else TRIALS.value
    workdir = Path(WORKDIR.value)
    workdir.mkdir(parents=True, exist_ok=True)
    done = campaign(workdir / "trials.jsonl", trials, begin + 60 * MINUTES.value)
    clock = workdir / "seconds.json"  # of all starts
    seconds = time.monotonic() - begin + (json.loads(clock.read_text()) if clock.exists() else 0.0)
    files.write_json(clock, seconds)
    arms, seeds, worst = {}, {}, {}
    for (n, kind, form), rows in done.items():
        if not rows:
            continue
        arm = f"{n}, {kind}, {form}"
        seeds[arm] = sorted(rows)
        names = [name for name in rows[seeds[arm][0]] if name != "orthogonality"]
        arms[arm] = {name: [rows[trial][name] for trial in seeds[arm]] for name in names}
        if looks := [row["orthogonality"] for row in rows.values() if "orthogonality" in row]:
            worst[arm] = max(looks)
        print(
            f"{arm}: {len(rows)} trials, {sum(arms[arm]['claimed']):.0f} false claims, "
            f"{sum(arms[arm]['found']):.0f} negative eigenvalues found"
        )
    if OUTPUT.value:
        fewest, most = (count(map(len, done.values())) for count in (min, max))
        content = results.make(
            "negative_curvature",
            question="Is what Eigenpairs.negative says true?",
            flags={
                "steps": STEPS,
                "planted": PLANTED,
                "scales": SCALES,
                "trials": trials,
                "smoke": SMOKE.value,
            },
            seeds=range(most),
            arms=arms,
            arm_seeds=seeds,
            wall_clock_s=seconds,
            scaled_down="" if fewest >= trials else f"{fewest} to {most} of {trials} trials are complete.",
            orthogonality=worst,
        )
        results.write(OUTPUT.value, content)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)
    cli.launch(main)
