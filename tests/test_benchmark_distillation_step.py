"""The benchmark of distillation steps: like is compared with like, and who may be missing."""

from types import SimpleNamespace

import pytest

from experiments.benchmarks import distillation_baselines as baselines
from experiments.benchmarks import distillation_workload

STEPS = {"plain": 1.0, "cached": 2.0, "online": 20.0}  # milliseconds of kdjax


@pytest.fixture(scope="module")
def benchmark(alone):
    with alone("experiments.benchmarks.distillation_step") as found:
        yield found


def worker(contender, threads=1, *, slower=1, losses=None, absent=None):
    """Answers for a framework whose steps take as many times those of kdjax, and 0.1 ms to precompute an image."""

    def seconds(ms):
        return {"wall": 1e-3 * slower * ms / threads, "cpu": 1e-3 * slower * ms}

    def ask(job):
        if job == "losses":
            if isinstance(losses, str):
                raise ValueError(losses)
            return losses or {"plain": [2.0, 1.5, 1.0], "cached": [4.0, 3.0, 2.0], "online": [4.0, 3.0, 2.0]}
        assert job == "steps"
        return {form: seconds(ms) for form, ms in STEPS.items()} | {"precompute": seconds(0.1)}

    return SimpleNamespace(contender=contender, threads=threads, absent=absent, ask=ask)


def test_every_form_is_compared_with_its_own_and_caching_with_the_teacher_in_the_step(benchmark):
    workers = [worker(name, n, slower=s) for name, s in (("kdjax", 1), ("torch", 3)) for n in (1, 2)]
    arms = benchmark.measure(workers, rounds=2)
    assert len(arms) == 2 * 2 * 3
    ours = arms["kdjax, cached answers, 2 threads"]
    assert ours["epochs_per_s"] == pytest.approx([1000 / (156 * 1.0)] * 2)
    # 10,000 images of .05 ms, shared by the epochs.
    assert [ours[f"epoch_of_{n}_ms"][0] for n in (5, 20, 100)] == pytest.approx(
        [156 + 100, 156 + 25, 156 + 5]
    )
    assert "epoch_of_5_ms" not in arms["kdjax, teacher in the step, 1 thread"]
    ratios, cpu, goals = benchmark.judge(arms, ["torch"])
    for form in ("teacher in the step", "cached answers", "student alone"):
        assert ratios[f"PyTorch loop, {form}"]["median"] == pytest.approx(3)
    online = 156 * 10.0
    for epochs, ms in {5: 256, 20: 181, 100: 161}.items():
        name = f"teacher in the step; kdjax caches for {epochs} epochs"
        assert ratios[f"kdjax, {name}"]["median"] == pytest.approx(online / ms)
        assert ratios[f"PyTorch loop, {name}"]["median"] == pytest.approx(3 * online / ms)
    assert len(ratios) == 3 + 3 * 2
    assert cpu.keys() == ratios.keys()
    assert cpu["PyTorch loop, cached answers"]["median"] == pytest.approx(3)
    met = {goal["goal"]: goal["met"] for goal in goals}
    assert met["epochs per second ≥ 1× PyTorch loop, cached answers"]
    assert not met["step with cached answers ≤ 1.05× a plain student step"]


def test_each_framework_is_taken_at_its_faster_number_of_threads(benchmark):
    arms = benchmark.measure([worker("kdjax", 1), worker("torch", 1), worker("torch", 2, slower=5)], rounds=1)
    ratios, _, _ = benchmark.judge(arms, ["torch"])
    assert ratios["PyTorch loop, cached answers"]["median"] == pytest.approx(1)


def test_cached_answers_must_give_the_losses_of_the_teacher_in_the_step(benchmark):
    losses = {"plain": [2.0, 1.5, 1.0], "cached": [4.0, 3.0, 2.0], "online": [4.0, 3.0, 2.0]}
    assert distillation_workload.check_losses({"kdjax": losses, "torch": losses}) == 0
    other = losses | {"cached": [4.1, 3.0, 2.0]}
    with pytest.raises(ValueError, match="torch does other work: its cached losses are"):
        distillation_workload.check_losses({"kdjax": losses, "torch": other})
    with pytest.raises(ValueError, match="kdjax does other work: its cached losses are"):
        distillation_workload.check_losses({"kdjax": other, "torch": other})


def test_only_a_compiled_loop_may_be_left_out_and_the_reason_is_kept(benchmark):
    there, missing = worker("kdjax"), worker("torch", absent="no torch")
    with pytest.raises(ValueError, match=r"PyTorch loop, 1 thread cannot be measured: no torch\. Install"):
        benchmark.first_losses([there, missing])
    with pytest.raises(ValueError, match="killed"):
        benchmark.first_losses([there, worker("torch", losses="killed")])
    compiled = [worker("torch_compile", 1), worker("torch_compile", 2, losses="no C++ compiler")]
    losses, left_out = benchmark.first_losses([there, worker("torch"), *compiled])
    assert losses.keys() == {"kdjax, 1 thread", "PyTorch loop, 1 thread"}
    assert left_out == ["PyTorch loop, compiled, 2 threads was left out: no C++ compiler"]
    assert len(benchmark.first_losses([there, compiled[0]])[0]) == 2


def test_the_fastest_setting_is_kept_for_each_arm():
    class Peer(baselines.Peer):
        candidates = ("a", "b")

        def __init__(self):
            self.options = dict.fromkeys(baselines.ARMS, "a")

        def load(self, work):
            del work

        def losses(self, arm):
            return []

        def measure(self, arm):
            return {"wall": 1.0 if (self.options[arm] == "b") == (arm == "cached") else 2.0}

        def precompute(self):
            return {"wall": {16: 3.0, 32: 1.0, 64: 2.0}[self.teacher_batch]}

    peer = Peer()
    found = peer.settle()
    assert found["settings"] == {"plain": "a", "cached": "b", "online": "a", "teacher_batch": 32}
    assert peer.teacher_batch == 32
    assert {f"first_{arm}_epoch_s" for arm in baselines.ARMS} < found.keys()


def test_a_sweep_is_its_steps_and_the_answers_once_or_once_per_student(alone):
    own = {"cached": {"wall": 1e-3}, "online": {"wall": 0.5}, "precompute": {"wall": 2e-3}}
    theirs = {"cached": {"wall": 4e-3}, "online": {"wall": 0.1}, "precompute": {"wall": 3e-3}}
    together = {"map": {"wall": 24e-3}, "vmap": {"wall": 36e-3}}
    with alone("experiments.benchmarks.sweep") as sweep:
        found = sweep.sweeps([(own, together, theirs)] * 2, "keras_tensorflow", 30)
    steps, answers = 100 * 156, 10_000
    assert found["kdjax, all at once by map"] == pytest.approx([answers * 2e-3 + steps * 24e-3] * 2)
    assert found["kdjax, one by one, cached answers"] == pytest.approx(
        [answers * 2e-3 + 30 * steps * 1e-3] * 2
    )
    assert found["keras_tensorflow, one by one, cached answers"][0] == pytest.approx(30 + 30 * steps * 4e-3)
    assert found["keras_tensorflow, one by one, teacher in the step"][0] == pytest.approx(30 * steps * 0.1)
