r"""From how many images on do maps lie rows first on a CPU?

    python -m experiments.benchmarks.batch_sizes --output=experiments/results/benchmarks/batch_sizes.json

Takes about ten minutes on one core, most of it compiling. A training step and a forward pass of two networks take turns
in both layouts (:mod:`kdjax.models.rows_first` explains them) at 1 to 512 images; below 8, where the library does not
offer rows first, it is made to. A ratio is the time of NHWC over that of rows first in the same round. Expect NHWC to
be faster for one image and rows first from 8 on.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
from absl import flags

from experiments import cli
from experiments.benchmarks.layers_cases import NETWORKS, network_case
from experiments.benchmarks.timing import clock, clock_note, in_turns, over, pin, said
from kdjax import results
from kdjax.models import rows_first

OUTPUT = flags.DEFINE_string("output", None, "Result file to write.", required=True)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Times that each form is timed.", lower_bound=1)
SECONDS = flags.DEFINE_float("seconds", 0.15, "Length of one timing; at least one call.", lower_bound=0.0)
SIZES = flags.DEFINE_list("sizes", ["1", "2", "4", "8", "16", "32", "64", "128", "512"], "Numbers of images.")

MODELS = ("resnet8", "malaria_student")


@contextlib.contextmanager
def laid_out(images: int | None) -> Iterator[None]:
    """While a function is traced in here, a batch is cut into groups of so many images, or stays NHWC for None."""
    with mock.patch.object(rows_first, "images_per_group", return_value=images):
        yield


def compiled(name: str, size: int, *, trains: bool, images: int | None) -> Callable[[], Any]:
    """A call that takes a step, or scores a batch, and blocks until the result is there."""
    _, _, shape, classes, _ = NETWORKS[f"{name} step"]
    run, carry = network_case(name, size, shape, classes, trains, native=False)
    with laid_out(images):
        program = jax.jit(run).lower(carry).compile()
    return lambda: jax.block_until_ready(program(carry))


def main() -> None:
    """Times every size and writes one result file."""
    pin(1)
    start = time.perf_counter()
    arms, ratios = {}, {}
    for name in MODELS:
        for trains in (True, False):
            for size in map(int, SIZES.value):
                case = f"{name} {'step' if trains else 'forward'} of {size}"
                groups = {"NHWC": None, "rows first": rows_first.images_per_group(size) or size}
                calls = {
                    layout: compiled(name, size, trains=trains, images=images)
                    for layout, images in groups.items()
                }
                times = in_turns(calls, ROUNDS.value, seconds=SECONDS.value, read=clock(1))
                arms |= {f"{case}: {layout}": {"ms": values} for layout, values in times.items()}
                ratios[f"{case}: NHWC"] = over(times["NHWC"], times["rows first"])
                print(f"{case}: {said(ratios[f'{case}: NHWC'])}", flush=True)
    content = results.make(
        "batch_sizes",
        question="From how many images on do maps lie rows first on a CPU?",
        flags={"rounds": ROUNDS.value, "seconds": SECONDS.value, "sizes": SIZES.value},
        seeds=range(ROUNDS.value),
        arms=arms,
        ratios=ratios,
        wall_clock_s=time.perf_counter() - start,
        notes=[clock_note(1)],
    )
    results.write(OUTPUT.value, content)


if __name__ == "__main__":
    cli.launch(main)
