r"""How long do optimisers take to leave saddles, and what does a look for negative curvature cost where there are none?

    python -m experiments.benchmarks.escape --output=experiments/results/benchmarks/escape.json

Takes about a minute. Functions whose saddles are known, and two convex ones, are descended by SGD, by Adam, by what
else is known to leave saddles, and by `kdjax.transforms.sprkd` around SGD and Adam, from the same start. Each problem
has a step size for SGD and what is built on it; Adam's is the same for all. Seeds are those of noise, perturbations and
Lanczos' starts; what draws nothing is the same for all of them.

A run is over at the first loss below its target. It costs its gradients and what it looked at besides, in gradients: a
Hessian-vector product 1.5, the linearisation before the first of a look 1.5, a loss 1/3. Those are stated, not measured
here: the upper ends of what convolutional networks were measured to take on a CPU. Steps and cost are there only where
all seeds arrived. A ratio is the cost of the cheapest other method that always arrives over that of sprkd around SGD,
above 1 where sprkd is cheaper.

Expect SGD to arrive only from beside the saddle and on convex losses; sprkd everywhere, but to cost more than its base
where that arrives by itself.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from experiments import cli
from experiments.benchmarks.timing import over
from kdjax import results, transforms
from kdjax.types import Params

OUTPUT = flags.DEFINE_string("output", None, "Result file to write.")
SEEDS = flags.DEFINE_integer("seeds", 5, "Runs of each method.", lower_bound=1)
SMOKE = flags.DEFINE_bool(
    "smoke", False, "The same code in seconds: two problems, methods and seeds, 60 steps."
)

HVP, LINEARISATION, LOSS = 1.5, 1.5, 1 / 3  # gradients
OURS = "sprkd(SGD)"
ADAM = 0.05  # its step size


class Problem(NamedTuple):
    """What is descended."""

    loss: Callable[[Params], jax.Array]
    start: Params
    target: float  # a run is over below this loss
    limit: int  # steps
    rate: float  # of SGD; Adam's is ADAM

    @property
    def num_matvecs(self) -> int:
        """Hessian-vector products of a look."""
        return min(8, sum(x.size for x in jax.tree.leaves(self.start)))


def strict_saddle(p):
    """Minima of -1 at (0, ±√2)."""
    return p[0] ** 2 - p[1] ** 2 + p[1] ** 4 / 4


def monkey_saddle(p):
    """Minima of -27/4; at 0 there is no curvature."""
    x, y = p
    return x**3 - 3 * x * y**2 + (x**2 + y**2) ** 2 / 4


def deep_linear(weights):
    """Half the squared distance of a product of matrices from the identity; at zero, from three on, no curvature."""
    product = functools.reduce(jnp.matmul, weights)
    return jnp.sum((product - jnp.eye(3)) ** 2) / 2


def octopus(p):
    """A chain of saddles after Du et al., 2017: each variable is drawn to zero until the one before it has left zero.

    Gradient descent needs (1 + 4 / 1) times as long for each as for all before, since they shrink at the rate 4 and
    grow at 1. Minima of -d/4 where all are ±1.
    """
    share = jnp.clip((p[:-1] ** 2 - 0.25) / 0.5, 0, 1)
    free = jnp.concatenate([jnp.ones(1), share**2 * (3 - 2 * share)])
    return jnp.sum(free * (p**4 / 4 - p**2 / 2) + (1 - free) * 2 * p**2)


def chained_wells(p):
    """Double wells with springs between them; two minima of -5/4."""
    return jnp.sum(p**4 / 4 - p**2 / 2) + 0.05 * jnp.sum(jnp.diff(p) ** 2)


def convex(kind: str) -> tuple[Callable[[Params], jax.Array], float]:
    """A loss of four parameters on twenty examples, and a loss within 1 % of the way from ones to its minimum."""
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(20, 4)), jnp.float32)
    labels = jnp.asarray(np.sign(rng.normal(size=20)), jnp.float32)

    def loss(p):
        outputs = inputs @ p
        if kind == "logistic":
            return jnp.mean(jax.nn.softplus(-labels * outputs))
        return jnp.mean((outputs - labels) ** 2)

    newton = jax.jit(lambda p: p - jnp.linalg.solve(jax.hessian(loss)(p), jax.grad(loss)(p)))
    best = jnp.zeros(4)
    for _ in range(20):
        best = newton(best)
    return loss, float(0.99 * loss(best) + 0.01 * loss(jnp.ones(4)))


def problems() -> dict[str, Problem]:
    """The saddles, and two losses that have none."""
    (squares, close), (logistic, closer) = convex("least squares"), convex("logistic")
    zero = jnp.zeros((3, 3))
    return {
        "strict_saddle": Problem(strict_saddle, jnp.array([1.0, 0.0]), -0.99, 400, 0.1),
        "beside_it": Problem(strict_saddle, jnp.array([1.0, 1e-8]), -0.99, 400, 0.1),
        "monkey_saddle": Problem(monkey_saddle, jnp.zeros(2), -6.7, 600, 0.02),
        "deep_linear_2": Problem(deep_linear, (zero,) * 2, 0.05 * 1.5, 600, 0.1),
        "deep_linear_3": Problem(deep_linear, (zero,) * 3, 0.05 * 1.5, 1500, 0.1),
        "octopus": Problem(octopus, jnp.full(5, 0.1), -0.99 * 5 / 4, 3000, 0.1),
        "double_wells": Problem(chained_wells, jnp.zeros(5), -1.2, 600, 0.1),
        "least_squares": Problem(squares, jnp.ones(4), close, 400, 0.1),
        "logistic": Problem(logistic, jnp.ones(4), closer, 400, 1.0),
    }


def methods(problem: Problem, key: jax.Array) -> dict[str, optax.GradientTransformation]:
    """What descends it; settings that are not here are the defaults, and none is of one problem alone."""
    sgd, adam = optax.sgd(problem.rate), optax.adam(ADAM)
    sprkd = functools.partial(
        transforms.sprkd, key=key, period=10, cooldown=0, num_matvecs=problem.num_matvecs
    )
    return {
        "SGD": sgd,
        "Adam": adam,
        "SGD + optax.add_noise": optax.chain(optax.add_noise(0.01, 0.55, key), sgd),
        "perturbed gradient descent": transforms.perturbed_gradient_descent(problem.rate, key=key),
        "saddle-free Newton": transforms.saddle_free_newton(num_matvecs=problem.num_matvecs),
        OURS: sprkd(sgd),
        "sprkd(Adam)": sprkd(adam),
        "sprkd(SGD), no perturbation": sprkd(sgd, perturbation_radius=0.0),
        "sprkd(SGD), strength 0.3": sprkd(sgd, negative_curvature_ratio=0.3),
    }


def cost(state: Any, steps: jax.Array, num_matvecs: int) -> jax.Array:
    """Gradient-equivalents that a method has spent after so many steps."""
    if isinstance(state, transforms.SprkdState):
        besides = HVP * state.hvps + LINEARISATION * state.num_checks + LOSS * state.evaluations
        return steps + besides
    if isinstance(state, transforms.SaddleFreeState):
        return steps * (1 + LINEARISATION + HVP * num_matvecs)
    return 1.0 * steps


def descend(problem: Problem, method: str, seeds: int) -> dict[str, np.ndarray]:
    """Losses before every step, what was spent by then, and the escapes and looks made by then: each [seeds, steps]."""

    def run(key):
        tx = optax.with_extra_args_support(methods(problem, key)[method])

        def body(carry, step):
            params, state = carry
            value, grads = jax.value_and_grad(problem.loss)(params)
            counts = (
                (state.events, state.num_checks)
                if isinstance(state, transforms.SprkdState)
                else (jnp.int32(0),) * 2
            )
            seen = (value, cost(state, step, problem.num_matvecs), *counts)
            updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=problem.loss)
            return (optax.apply_updates(params, updates), state), seen

        return jax.lax.scan(body, (problem.start, tx.init(problem.start)), jnp.arange(problem.limit + 1))[1]

    # Unoptimised, these programs compile in half the time. In map, unlike vmap, only what is due is computed.
    compiled = jax.jit(
        lambda keys: jax.lax.map(run, keys), compiler_options={"xla_backend_optimization_level": 0}
    )
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    seen = jax.tree.map(np.asarray, compiled(keys))
    return dict(zip(("loss", "gradients", "escapes", "looks"), seen, strict=True))


def measure(problem: Problem, method: str, seeds: int) -> dict[str, list[float]]:
    """Who arrived; and if all did, after how many steps, and what they had spent and done by then."""
    seen = descend(problem, method, seeds)
    below = seen.pop("loss") < problem.target
    arrived = below.any(1)
    if not arrived.all():
        return {"reached": arrived.astype(float).tolist()}
    steps = below.argmax(1)
    spent = {name: np.take_along_axis(values, steps[:, None], 1)[:, 0] for name, values in seen.items()}
    if "sprkd" not in method:
        del spent["escapes"], spent["looks"]
    found = {"reached": arrived, "steps": steps} | spent
    return {name: values.astype(float).tolist() for name, values in found.items()}


def against_the_best(found: dict[str, dict[str, list[float]]]) -> tuple[str, dict[str, float]] | None:
    """The cheapest of the other methods that always arrive, and its cost over ours; None without it or us."""
    costs = {m: v["gradients"] for m, v in found.items() if "gradients" in v}
    others = [m for m in costs if "sprkd" not in m]
    if OURS not in costs or not others:
        return None
    best = min(others, key=lambda m: statistics.median(costs[m]))
    return best, over(costs[best], costs[OURS])


def main() -> None:
    """All problems and methods in one run."""
    start, ratios = time.monotonic(), {}
    seeds, cases = SEEDS.value, problems()
    if SMOKE.value:
        seeds = 2
        cases = {name: cases[name]._replace(limit=60) for name in ("strict_saddle", "least_squares")}
    arms: dict[str, dict[str, list[float]]] = {}
    for name, problem in cases.items():
        names = ("SGD", OURS) if SMOKE.value else methods(problem, jax.random.key(0))
        found = {method: measure(problem, method, seeds) for method in names}
        for method, measured in found.items():
            arms.setdefault(method, {}).update({f"{name}_{k}": values for k, values in measured.items()})
            medians = [f"{statistics.median(v):.0f} {k}" for k, v in measured.items() if k != "reached"]
            cli.say(f"{name}: {method}: {sum(measured['reached']):.0f} of {seeds}; {', '.join(medians)}")
        best = against_the_best(found)
        if best is not None:
            ratios[f"{name}: {best[0]} over {OURS}"] = best[1]
    result = results.make(
        "escape",
        question="How long do optimisers take to leave saddles, and what does a look for negative curvature cost where "
        "there are none?",
        flags={"seeds": seeds, "smoke": SMOKE.value},
        seeds=list(range(seeds)),
        arms=arms,
        ratios=ratios,
        wall_clock_s=time.monotonic() - start,
        scaled_down="smoke: two problems, methods and seeds" if SMOKE.value else "",
        notes=[
            "Steps and gradients are missing where a seed did not arrive within the limit of steps.",
            "Gradients: one a step; a Hessian-vector product counts 1.5, linearising 1.5, a loss 1/3 (stated).",
        ],
    )
    if OUTPUT.value:
        results.write(OUTPUT.value, result)


if __name__ == "__main__":
    cli.launch(main)
