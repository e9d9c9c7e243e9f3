"""One step on many devices and many hosts: pmap, and its shard_map twin, behind one function.

A function to be spread takes some arguments that every device holds whole (state, data set) and some whose leading axis
is cut into equal parts (indices). It names its axis :data:`AXIS` and reduces over it itself, at its top, so what it
returns is the same on every device. On one device the same path costs what ``jax.jit`` costs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "batch"


def initialise(**options: Any) -> None:
    """Joins the processes of a pod into one program; call it first, before any other use of JAX.

    On Cloud TPU pods and under SLURM or Open MPI everything is found in the environment. Elsewhere pass what
    ``jax.distributed.initialize`` takes. Does nothing if the processes are already joined.

    Args:
      **options: for ``jax.distributed.initialize``: ``coordinator_address``, ``num_processes``, ``process_id``,
        ``heartbeat_timeout_seconds`` (100 s unless told: how long a dead peer goes unnoticed).
    """
    if not jax.distributed.is_initialized():
        jax.distributed.initialize(**options)


def local_devices(count: int | None = None) -> list[jax.Device]:
    """The first ``count`` devices of this process, all of them by default.

    Raises:
      ValueError: if there are fewer.
    """
    devices = jax.local_devices()
    if count is None:
        return devices
    if not 1 <= count <= len(devices):
        raise ValueError(
            f"{count} devices were asked for, this process has {len(devices)} ({jax.default_backend()}). On a CPU, "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count} simulates more."
        )
    return devices[:count]


def check_batch_size(batch_size: int, devices: Sequence[jax.Device]) -> None:
    """Raises a ValueError unless the batch divides evenly over the devices of all processes."""
    total = len(devices) * jax.process_count()
    if batch_size < 1 or batch_size % total:
        lower = max(batch_size // total, 1) * total
        raise ValueError(
            f"a batch of {batch_size} does not divide over {total} devices; use {lower} or {lower + total}, "
            "or fewer devices."
        )


def process_rows(rows: np.ndarray) -> np.ndarray:
    """This process's equal share of the leading axis of a global batch."""
    share = len(rows) // jax.process_count()
    return rows[jax.process_index() * share :][:share]


def replicate(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Puts a copy of every array on each device once, so that later calls move nothing."""
    return jax.device_put(tree, NamedSharding(Mesh(np.asarray(devices), (AXIS,)), PartitionSpec()))


def data_parallel(
    function: Callable[..., Any],
    *,
    replicated: int,
    devices: Sequence[jax.Device],
    implementation: str = "pmap",
    donate_first: bool = False,
) -> Callable[..., Any]:
    """Compiles ``function`` to run on every device, each with its part of the batch.

    Args:
      function: pure; reduces over the axis :data:`AXIS` (``jax.lax.pmean`` or ``psum``) whatever depends on the batch.
      replicated: how many of its leading arguments every device holds whole; the leading axis of the others is cut.
      devices: of this process; all processes together form the axis under ``pmap``.
      implementation: ``pmap``, or ``shard_map`` under ``jit`` over a mesh of these devices (one process). The two
        agree to rounding and cost the same.
      donate_first: reuse the memory of the first argument, which the caller must not touch again.

    Returns:
      A function of the same arguments. The leading axis of each cut argument must divide by ``len(devices)``. On
      several simulated devices of a CPU it returns when it has ended, elsewhere at once.
    """
    donate = (0,) if donate_first else ()
    if implementation == "shard_map":
        # No varying-axis check: under it, the gradient of replicated parameters arrives already summed, and the mean
        # that the step takes itself would be wrong by the number of devices.
        mesh = Mesh(np.asarray(devices), (AXIS,))

        def spread(*arguments):
            specs = tuple(
                PartitionSpec() if i < replicated else PartitionSpec(AXIS) for i in range(len(arguments))
            )
            mapped = jax.shard_map(
                function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
            )
            return mapped(*arguments)

        return _one_at_a_time(jax.jit(spread, donate_argnums=donate), devices)
    if implementation != "pmap":
        raise ValueError(
            f"data_parallel knows the implementations 'pmap' and 'shard_map', got {implementation!r}."
        )

    compiled: dict[int, Callable[..., Any]] = {}  # one per number of arguments

    def call(*arguments):
        if len(arguments) not in compiled:
            axes = tuple(None if i < replicated else 0 for i in range(len(arguments)))
            compiled[len(arguments)] = jax.pmap(
                function,
                axis_name=AXIS,
                in_axes=axes,
                out_axes=None,
                devices=_all(devices),
                donate_argnums=donate,
            )
        cut = (x.reshape(len(devices), -1, *x.shape[1:]) for x in arguments[replicated:])
        return compiled[len(arguments)](*arguments[:replicated], *cut)

    return _one_at_a_time(call, devices)


def _one_at_a_time(call: Callable[..., Any], devices: Sequence[jax.Device]) -> Callable[..., Any]:
    # Calls that do not need each other's results can deadlock on simulated devices: XLA's threads on a CPU, as many as
    # there are devices or cores, may all sit in the sums of several calls, waiting for a device that finds none left.
    if len(devices) == 1 or devices[0].platform != "cpu":
        return call
    return lambda *arguments: jax.block_until_ready(call(*arguments))


def _all(devices: Sequence[jax.Device]) -> Sequence[jax.Device] | None:
    # Across processes pmap wants every process's devices, which is its default.
    return devices if jax.process_count() == 1 else None
