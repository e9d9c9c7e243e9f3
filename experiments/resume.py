r"""Does a run that is killed at a random moment, and started again, end bitwise equal to one that was not?

    python -m experiments.resume --output=experiments/results/resume.json

Takes about ten minutes on two cores. A small distillation of the digits (a teacher, its cached answers, two students by
two methods, a checkpoint after every epoch) runs once without interruption. Then, --trials times, the same command is
started and killed with SIGKILL at a random moment, started and killed again, and then left to finish; every digest
of final weights and every measured number must equal that of the uninterrupted run, bit for bit.

Expect as many equal trials as there are trials.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import flags

from experiments import cli
from kdjax import results

OUTPUT = flags.DEFINE_string("output", None, "Write the counts to this file.")
TRIALS = flags.DEFINE_integer("trials", 20, "Interrupted runs.", lower_bound=1)
KILLS = flags.DEFINE_integer("kills", 2, "Times that each of them is killed.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Of the moments.")
SMOKE = flags.DEFINE_bool("smoke", False, "The same code in less time: two trials.")


def command(workdir: Path) -> list[str]:
    """The run that is interrupted."""
    return [
        sys.executable,
        "-m",
        "experiments.distill",
        "--dataset=digits",
        "--num_train=200",
        "--epochs=8",
        "--teacher_epochs=4",
        "--batch_size=20",
        "--seeds=0,1",
        "--ema=0.9",
        "--save_every_s=0",
        f"--workdir={workdir}",
    ]


def ending(workdir: Path) -> dict:
    """What must not change: every run's summary (digest of the weights, test metrics, history), the arms' numbers."""
    summaries = {
        str(path.relative_to(workdir)): json.loads(path.read_text())
        for path in sorted(workdir.rglob("summary_*.json"))
    }
    return {"summaries": summaries, "arms": results.read(workdir / "results.json")["arms"]}


def finish(workdir: Path) -> float:
    """Runs to the end; returns the seconds it took."""
    start = time.monotonic()
    done = subprocess.run(command(workdir), capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"the run failed, with or without interruptions: {done.stderr.strip()[-500:]}")
    return time.monotonic() - start


def kill(workdir: Path, after_s: float) -> bool:
    """Starts the run and kills it after so many seconds; returns whether it was still running then."""
    with subprocess.Popen(command(workdir), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        time.sleep(after_s)
        running = process.poll() is None
        process.kill()
    return running


def main() -> None:
    """One whole run, then the interrupted ones."""
    start, chosen = time.monotonic(), random.Random(SEED.value)
    equal, killed = [], []
    with tempfile.TemporaryDirectory() as directory:
        finish(Path(directory) / "warm")  # compiles, so that kills hit the training
        duration = finish(Path(directory) / "whole")
        whole = ending(Path(directory) / "whole")
        for trial in range(2 if SMOKE.value else TRIALS.value):
            workdir = Path(directory) / str(trial)
            killed.append(sum(kill(workdir, chosen.uniform(0, duration)) for _ in range(KILLS.value)))
            finish(workdir)
            equal.append(int(ending(workdir) == whole))
            cli.say(f"trial {trial}: killed {killed[-1]} times, {'equal' if equal[-1] else 'DIFFERENT'}")
    if not all(equal):
        raise ValueError(
            f"{equal.count(0)} of {len(equal)} resumed runs differ: this is a bug in kdjax, please report it."
        )
    result = results.make(
        "resume",
        question="Does a run that is killed at a random moment and started again end bitwise equal?",
        flags={"trials": len(equal), "kills": KILLS.value, "seed": SEED.value},
        seeds=list(range(len(equal))),
        arms={"resumed": {"bitwise_equal": equal, "times_killed": killed}},
        wall_clock_s=time.monotonic() - start,
    )
    if OUTPUT.value:
        results.write(OUTPUT.value, result)


if __name__ == "__main__":
    cli.launch(main)
