r"""How many train steps should one call to the device run?

    python -m experiments.benchmarks.dispatch --output=experiments/results/benchmarks/dispatch.json

Takes about a minute. Three students train on images held on the device, by the pmapped function of kdjax.run,
with 1, 8 and 32 steps per call; every round times each of them once. A ratio is the time of a step alone over that of a
step among k, above 1 where running k together is faster.

Expect several times for a network whose step takes tens of microseconds, nothing for one whose step takes many
milliseconds, and no loss anywhere: the convolutions of kdjax are as fast inside a loop.
"""

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from experiments import cli
from experiments.benchmarks.timing import in_turns, over
from kdjax import data, models, parallel, results, train

OUTPUT = flags.DEFINE_string("output", None, "Result file to write.")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Times that each form is timed.", lower_bound=1)

CASES = {  # model: (batch, image shape, steps of one timing)
    "digits_student": (20, (8, 8, 1), 640),
    "keras_student": (64, (28, 28, 1), 128),
    "resnet8": (64, (32, 32, 3), 32),
}
TOGETHER = (1, 8, 32)


def objective(outputs, batch):
    """Cross-entropy with the labels."""
    hard = optax.losses.softmax_cross_entropy_with_integer_labels(outputs.logits, batch["label"])
    return {"hard": jnp.mean(hard)}


def make_case(name: str, batch: int, shape: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """The compiled run, its first state, and 1,000 images on the device."""
    rng, devices = np.random.default_rng(0), parallel.local_devices(1)
    arrays = {
        "image": rng.integers(0, 256, (1000, *shape), np.uint8),
        "label": np.arange(1000, dtype=np.int32) % 10,
    }
    network, tx = models.build(name, num_classes=10), optax.adam(1e-3)

    def make_batch(arrays, index, key):
        rows = data.gather(arrays, index)
        return rows | {
            "image": data.normalise(rows["image"], mean=(0.5,) * shape[-1], std=(0.3,) * shape[-1])
        }

    step = train.make_train_step(models.apply_fn(network), objective, tx, axis_name=parallel.AXIS)
    run = parallel.data_parallel(
        train.make_run(step, make_batch), replicated=2, devices=devices, donate_first=True
    )
    state = train.init_state(*models.init(network, shape, seed=0), tx, seed=0)
    return run, parallel.replicate(state, devices), parallel.replicate(arrays, devices)


def measure(name: str) -> dict[int, list[float]]:
    """Milliseconds per step, for each number of steps in a call, one value per round."""
    batch, shape, steps = CASES[name]
    run, state, arrays = make_case(name, batch, shape)
    index = np.random.default_rng(1).integers(0, 1000, (batch, max(TOGETHER)), np.int32)
    held = [state]

    def go(k):
        for _ in range(steps // k):
            held[0], metrics = run(held[0], arrays, index[:, :k])
        jax.block_until_ready(metrics)

    times = in_turns({k: partial(go, k) for k in TOGETHER}, ROUNDS.value, warmup=1)
    return {k: [value / steps for value in values] for k, values in times.items()}


def main() -> None:
    """All cases in one run."""
    start, arms, ratios = time.monotonic(), {}, {}
    for name in CASES:
        times = measure(name)
        for k, values in times.items():
            arms[f"{name}, {k} a call"] = {"step_ms": values}
            if k > 1:
                ratios[f"{name}: {k} a call over 1"] = over(times[1], values)
        cli.say(f"{name}: " + ", ".join(f"{k} a call {min(v):.3f} ms" for k, v in times.items()))
    result = results.make(
        "dispatch",
        question="How many train steps should one call to the device run?",
        flags={"rounds": ROUNDS.value},
        seeds=list(range(ROUNDS.value)),
        arms=arms,
        ratios=ratios,
        wall_clock_s=time.monotonic() - start,
    )
    if OUTPUT.value:
        results.write(OUTPUT.value, result)


if __name__ == "__main__":
    cli.launch(main)
