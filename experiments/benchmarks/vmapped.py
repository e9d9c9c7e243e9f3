r"""Is it faster to train many students in one program than one after the other, and in which form?

    python -m experiments.benchmarks.vmapped --output=experiments/results/benchmarks/vmapped.json

Takes about five minutes. Students of different seeds, each with a weight of its own in the loss, train on images held
on the device, 32 steps in each call, or 5 as an epoch of few labels has: one after the other by the pmapped function
of kdjax.run, and at once by the two forms of kdjax.vmapped. A ratio is the time of one after the other over that of the
form, above 1 where training at once is faster. The time that compiling adds to the first call is listed separately; one
after the other, it is paid once for all students.

Every number of students is timed by itself, in turns of many calls after a warm-up. When all numbers shared a round of
single calls, one student alone always came right after 55 of them: with cold caches, which made the others look up to
1.2 times as fast as it. One student by map compiles to the program of one alone, so its ratio is 1 but for noise, and
checks the measurement; by vmap it is another program, with more copies and transposes, and may fall behind.

Expect vmap ahead by most where a network is small and a call has few steps, since calls are then what costs; level
where steps are many, and behind where a step takes a millisecond. map is seldom ahead of vmap.
"""

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
from experiments.benchmarks.timing import in_turns, over, timed
from kdjax import data, models, parallel, results, train, vmapped

OUTPUT = flags.DEFINE_string("output", None, "Result file to write.")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Times that each form is timed.", lower_bound=1)


class Case(NamedTuple):
    """What is trained, and how many of it."""

    model: str
    batch: int
    shape: tuple[int, int, int]
    steps: int  # in each call
    students: tuple[int, ...]
    widths: tuple[int, ...] = ()  # of the mlp


CASES = {
    "digits_student": Case("digits_student", 20, (8, 8, 1), 32, (1, 5, 20, 55)),
    "digits_student, 5 steps a call": Case("digits_student", 20, (8, 8, 1), 5, (1, 5, 20, 55)),
    "mlp": Case("mlp", 20, (8, 8, 1), 32, (1, 5, 20, 55), (64, 64)),
    "keras_student": Case("keras_student", 64, (28, 28, 1), 32, (1, 5)),
}
STEPS = 64  # of every student in one call that is timed, to the nearest whole dispatch
SECONDS = 0.3  # of a turn, in which a cold first call is one of many
ONE_BY_ONE = "one by one"


def objective(outputs, batch):
    """Cross-entropy with the labels, with each student's own weight."""
    hard = optax.losses.softmax_cross_entropy_with_integer_labels(outputs.logits, batch["label"])
    return {"hard": batch["settings"]["hard_weight"] * jnp.mean(hard)}


def make_ways(case: Case) -> dict[int, dict[str, Callable[[], Any]]]:
    """Number of students → way of training them → a function that trains each for some steps and waits."""
    _, batch, shape, steps, counts, widths = case
    fields = {"widths": widths} if widths else {}
    rng, devices = np.random.default_rng(0), parallel.local_devices(1)
    examples = {
        "image": rng.integers(0, 256, (1000, *shape), np.uint8),
        "label": np.arange(1000, dtype=np.int32) % 10,
    }
    network, tx = models.build(case.model, num_classes=10, **fields), optax.adam(1e-3)

    def make_batch(arrays, index, key):
        rows = data.gather(arrays["data"], index)
        image = data.normalise(rows["image"], mean=(0.5,) * shape[-1], std=(0.3,) * shape[-1])
        return rows | {"image": image, "settings": arrays["settings"]}

    step = train.make_train_step(models.apply_fn(network), objective, tx, axis_name=parallel.AXIS)
    run = train.make_run(step, make_batch)

    def spread(run):
        return parallel.data_parallel(run, replicated=2, devices=devices, donate_first=True)

    examples = parallel.replicate(examples, devices)
    states = [train.init_state(*models.init(network, shape, seed=k), tx, seed=k) for k in range(max(counts))]
    weights = np.linspace(0, 1, max(counts), dtype=np.float32)
    index = rng.integers(0, 1000, (batch, steps, max(counts)), np.int32)

    def call(run, states, weights, index):
        """One training, or many at once."""
        arrays = {"data": examples, "settings": parallel.replicate({"hard_weight": weights}, devices)}
        held = [parallel.replicate(states, devices)]

        def go():
            for _ in range(round(STEPS / steps)):
                held[0], metrics = run(held[0], arrays, index)
            return metrics

        return go

    single = spread(run)
    alone = [call(single, states[k], weights[k], index[..., k]) for k in range(max(counts))]

    def one_by_one(count):
        return lambda: jax.block_until_ready([go() for go in alone[:count]])

    def at_once(count, mapping):
        built = spread(vmapped.make_run(run, mapping=mapping))
        go = call(built, vmapped.stack(states[:count]), weights[:count], index[..., :count])
        return lambda: jax.block_until_ready(go())

    return {
        count: {ONE_BY_ONE: one_by_one(count)}
        | {mapping: at_once(count, mapping) for mapping in vmapped.MAPPINGS}
        for count in counts
    }


def measure(name: str) -> tuple[dict[int, dict[str, list[float]]], dict[int, dict[str, float]]]:
    """Milliseconds per round, and what compiling added to the first call, for each number of students and way."""
    times: dict[int, dict[str, list[float]]] = {}
    added: dict[int, dict[str, float]] = {}
    for count, ways in make_ways(CASES[name]).items():
        first = {way: 1e3 * timed(go)[0]["wall"] for way, go in ways.items()}
        times[count] = in_turns(ways, ROUNDS.value, seconds=SECONDS)
        added[count] = {way: first[way] - statistics.median(values) for way, values in times[count].items()}
    return times, added


def main() -> None:
    """All cases in one run."""
    jax.config.update("jax_enable_compilation_cache", False)  # compiling is part of what is measured
    start, arms, arm_seeds, ratios = time.monotonic(), {}, {}, {}
    for name, case in CASES.items():
        times, added = measure(name)
        for count, ways in times.items():
            for way, values in ways.items():
                arms[f"{name}, {count} {way}"] = {"ms": values}
                if way != ONE_BY_ONE or count == min(case.students):
                    compiling = f"{name}, {count} {way}, compiling"
                    arms[compiling], arm_seeds[compiling] = {"ms": [added[count][way]]}, [0]
                if way != ONE_BY_ONE:
                    ratios[f"{name}: {count} by {way} over {ONE_BY_ONE}"] = over(ways[ONE_BY_ONE], values)
            cli.say(
                f"{name}, {count}: "
                + ", ".join(
                    f"{way} {min(v):.1f} ms (+ {max(added[count][way], 0) / 1e3:.1f} s)"
                    for way, v in ways.items()
                )
            )
    result = results.make(
        "vmapped",
        question="Is it faster to train many students in one program than one after the other, and in which form?",
        flags={"rounds": ROUNDS.value},
        seeds=list(range(ROUNDS.value)),
        arm_seeds=arm_seeds,
        arms=arms,
        ratios=ratios,
        wall_clock_s=time.monotonic() - start,
        notes=[
            "Every student takes 64 or 65 steps in the times listed, 32 in a dispatch unless the name says otherwise.",
            "One student by map compiles to the program of one alone: its ratio is a check of the measurement.",
        ],
    )
    if OUTPUT.value:
        results.write(OUTPUT.value, result)


if __name__ == "__main__":
    cli.launch(main)
