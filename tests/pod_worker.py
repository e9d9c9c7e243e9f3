"""One process of a pod of CPUs: trains, saves, resumes and evaluates as ``test_parallel`` asks, and prints what it got.

python pod_worker.py PROCESS_ID NUM_PROCESSES PORT DIRECTORY STOP_AT
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kdjax import checkpoints, data, evaluate, parallel, train
from kdjax.types import Outputs


def apply_fn(params, model_state, inputs, *, train, key=None):
    return Outputs(inputs.reshape(len(inputs), -1) @ params["kernel"], {}), model_state


def objective(outputs, batch):
    return {
        "hard": jnp.mean(
            optax.losses.softmax_cross_entropy_with_integer_labels(outputs.logits, batch["label"])
        )
    }


def main(directory: Path, *, stop_at: int) -> dict:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, 50).astype(np.int32)
    image = (rng.normal(size=(50, 2, 2, 1)) + label[:, None, None, None]).astype(np.float32)
    devices = parallel.local_devices()
    arrays = parallel.replicate({"image": image, "label": label}, devices)
    tx = optax.adam(0.05)
    step = train.make_train_step(apply_fn, objective, tx, axis_name=parallel.AXIS)
    run = parallel.data_parallel(
        train.make_run(step, lambda arrays, index, key: data.gather(arrays, index)),
        replicated=2,
        devices=devices,
        donate_first=True,
    )
    params = {"kernel": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)}
    state = parallel.replicate(train.init_state(params, {}, tx, seed=0), devices)
    ids = np.arange(40)
    feed = data.resident_feed(arrays, ids, seed=3, batch_size=8, rows_of=parallel.process_rows)
    sums = evaluate.make_evaluator(
        apply_fn, data.gather, arrays, np.arange(40, 50), batch_size=4, devices=devices
    )
    done = 0

    def progress(steps, record):
        nonlocal done
        done += steps
        if done == stop_at and jax.process_index() == jax.process_count() - 1:
            os.kill(os.getpid(), signal.SIGTERM)  # one process alone is told to stop
        if 0 <= stop_at <= done:
            time.sleep(
                1
            )  # the preemption service looks for the signal once a second; these steps take microseconds

    fitted = train.fit(
        run,
        state,
        feed,
        epochs=8,
        evaluate=lambda *weights: evaluate.summarise(sums(*weights)),
        directory=directory,
        save_every_s=0.02,  # clocks of two processes disagree on when that is over
        progress=progress,
    )
    return {
        "weights": checkpoints.digest_tree(fitted.last),
        "kernel": np.asarray(fitted.last.params["kernel"], np.float64).ravel().tolist(),
        "loss": [record["loss"] for record in fitted.history],
        "accuracy": [record["validation_accuracy"] for record in fitted.history],
        "steps": done,
    }


if __name__ == "__main__":
    number, processes, port, where, stop = sys.argv[1:]
    if int(processes) > 1:
        parallel.initialise(
            coordinator_address=f"localhost:{port}",
            num_processes=int(processes),
            process_id=int(number),
            heartbeat_timeout_seconds=20,
        )
    print("RESULT " + json.dumps(main(Path(where), stop_at=int(stop))))
