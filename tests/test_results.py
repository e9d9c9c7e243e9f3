"""Result files: whole or absent, checked when written and when read."""

import copy
import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from kdjax import files, results

ROOT = Path(__file__).resolve().parent.parent

# A small value of every optional field.
OPTIONAL = {
    "arm_seeds": {"a": [0, 1, 2]},
    "curves": {"a": {"loss": [[0.5, None, 0.25]] * 3}},
    "comparisons": [
        {
            "metric": "accuracy",
            "a": "a",
            "b": "c",
            "difference": 0.1,
            "low": 0.0,
            "high": 0.2,
            "p": 0.04,
            "n": [3, 3],
        }
    ],
    "plan": [
        {
            "declared": "2026-11-30T10:00:00+00:00",
            "metric": "accuracy",
            "baseline": "a",
            "primary": [["a", "c"]],
            "chosen_on": "the rate: validation",
            "margin": 0.01,
        }
    ],
    "examples": {"train": 100, "test": 10},
    "correct": {
        "split": "test",
        "examples": 10,
        "arms": {"a": [results.pack(np.array([True, False] * 5))] * 3},
    },
    "supersedes": [{"result": "history/x.json", "why": "More seeds."}],
    "ratios": {"keras": {"median": 2.0, "low": 1.5, "high": 3.0}},
    "notes": ["A note."],
    "robustness": {
        "a": {"clean": [0.5, 0.6, 0.7], "fgsm/8": [0.0, 0.1, 1.0], "fgsm/8/loss": [3.0, 4.0, 5.0]}
    },
    "calibration": {"a": {"confidence": [0.0, 0.9], "accuracy": [0.0, 0.8], "count": [0.0, 30.0]}},
    "confusion": {"a": [[5, 1], [0, 6]]},
    "class_names": ["cat", "dog"],
    "costs": {"a": {"parameters": 100, "latency_ms": [1.0, 1.1]}},
    "swept": [{"name": "rate", "values": [0.1, 1], "arms": {"a": {"accuracy": [[0.5, 0.6], [0.7, 0.8]]}}}],
    "trials": [
        {
            "number": 0,
            "settings": {"rate": 0.1, "kind": "x"},
            "outcome": "finished",
            "value": 0.5,
            "seconds": 1.5,
        },
        {
            "number": 1,
            "settings": {"rate": 0.2, "kind": None},
            "outcome": "failed",
            "value": None,
            "seconds": 0,
        },
    ],
    "trials_metric": "validation_accuracy",
    "flatness": {"a": {"loss": [0.1, 0.2, 0.3], "trace/filter_normalised": [-1.0, 5.0, 9.0]}},
    "densities": {"a": {"grid": [-1.0, 0.0, 2.0], "density": [[0.1, 0.5, 0.0]]}},
    "surfaces": {"a": {"x": [-1.0, 0.0, 1.0], "y": [0, 2], "loss": [[0.5, 0.9], [0.1, 0.6], [0.5, 1.0]]}},
    "overlays": [{"title": "a cat", "image": [[[0], [255]]], "map": [[-0.5, 0.25]]}],
}


def result(**changes):
    made = results.make(
        "example",
        question="Does it?",
        flags={"rate": 0.1},
        seeds=[0, 1, 2],
        arms={"a": {"accuracy": [0.1, 0.2, 0.3]}},
        wall_clock_s=1.5,
    )
    return made | changes


def test_what_is_written_is_read_back(tmp_path):
    made = result()
    results.write(tmp_path / "deep" / "x.json", made)
    assert results.read(tmp_path / "deep" / "x.json") == made
    assert list(results.read(tmp_path / "deep" / "x.json")["arms"]) == list(made["arms"])
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x.json"]


def test_says_what_the_numbers_depend_on():
    made = result()
    assert made["versions"]["jax"]
    assert made["hardware"]["backend"] == "cpu"
    assert made["hardware"]["cores"] >= 1
    assert len(made["commit"]) == 40 or made["commit"] == "unknown"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arms": {"a": {"accuracy": [0.1, 0.2]}}}, "a/accuracy has 2 values for 3 seeds"),
        (
            {"arms": {"a": {"accuracy": [0.1, 0.2, float("nan")]}}},
            "a/accuracy holds a value that is no finite number",
        ),
        ({"arms": {"a": {"accuracy": [0.1, 0.2, "0.3"]}}}, "no finite number"),
        ({"question": None}, "needs the field 'question'"),
        ({"dirty": "no"}, "needs the field 'dirty'"),
    ],
)
def test_refuses_what_breaks_the_schema(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        results.write(tmp_path / "x.json", result(**changes))
    assert not (tmp_path / "x.json").exists()
    (tmp_path / "y.json").write_text(json.dumps(result(**changes)))
    with pytest.raises(ValueError, match=rf"y\.json.*{said}"):
        results.read(tmp_path / "y.json")


def test_an_arm_may_have_seeds_of_its_own(tmp_path):
    made = result(
        arms={"teacher": {"accuracy": [0.9]}, "a": {"accuracy": [0.1, 0.2, 0.3]}}, arm_seeds={"teacher": [0]}
    )
    results.write(tmp_path / "x.json", made)
    assert results.read(tmp_path / "x.json") == made


@functools.cache
def full():
    return result(**OPTIONAL)


def changed(path, value):
    """The result with every field, one of them replaced."""
    made = copy.deepcopy(full())
    *parents, last = path
    inner = made
    for key in parents:
        inner = inner[key]
    inner[last] = value
    return made


def test_every_optional_field_is_written_and_read_back(tmp_path):
    made = result(**OPTIONAL, anything_else={"of": ["an", "experiment", 1]})
    results.write(tmp_path / "x.json", made)
    assert results.read(tmp_path / "x.json") == made
    documented = re.findall(r"^``(\w+)``$", results.__doc__, flags=re.MULTILINE)
    assert set(documented) - {"sha256"} == set(OPTIONAL)


def test_answers_come_back_as_they_were():
    rng = np.random.default_rng(0)
    for examples in (1, 7, 8, 9, 369):
        answers = rng.random((3, examples)) < 0.8
        stored = {"examples": examples, "arms": {"kd": [results.pack(own) for own in answers]}}
        np.testing.assert_array_equal(results.correct_of({"correct": stored}, "kd"), answers)
    assert len(results.pack(np.ones(10_000, bool))) < 1700  # bytes of a student on the CIFAR-10 test split


class TestHistory:
    """A result that is superseded stays, and the later one says why."""

    def test_the_earlier_file_is_kept_byte_for_byte_and_named(self, tmp_path):
        path = tmp_path / "study.json"
        for number, why in enumerate(["", "More seeds.", "A fault."]):
            results.write(path, {**result(), "wall_clock_s": number, "commit": "0123456789"}, supersedes=why)
        there = results.read(path)["supersedes"]
        kept = ["history/study_01234567_.json", "history/study_01234567.json"]
        assert there == [
            {"result": kept[0], "why": "A fault."},
            {"result": kept[1], "why": "More seeds."},
        ]
        assert [results.read(tmp_path / name)["wall_clock_s"] for name in kept] == [1, 0]
        assert results.read(tmp_path / kept[0])["supersedes"] == there[1:]

    def test_a_run_that_goes_on_writes_its_own_file_again(self, tmp_path):
        path, plan = tmp_path / "study.json", OPTIONAL["plan"]
        results.write(path, {**result(), "plan": [{**plan[0], "declared": "2025"}]})
        results.write(path, {**result(), "plan": plan}, supersedes="A fault.")
        results.write(path, {**result(), "plan": [*plan, plan[0]], "wall_clock_s": 9}, supersedes="A fault.")
        assert len(list((tmp_path / "history").iterdir())) == 1
        assert [one["why"] for one in results.read(path)["supersedes"]] == ["A fault."]
        assert results.read(path)["wall_clock_s"] == 9


NAN = float("nan")


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (["wall_clock_s"], NAN, "wall_clock_s needs a finite number, got nan"),
        (["schema"], True, "schema.*, got True"),
        (["seeds"], [0, 1, 2.5], "seeds needs whole numbers"),
        (["seeds"], [], "seeds needs at least one seed"),
        (["arms", "a"], [0.1], "arms/a needs an object"),
        (["arms", "a", "accuracy"], [True, 0.1, 0.2], "a/accuracy holds a value that is no finite number"),
        (["arms", "a", "accuracy"], [10**400, 0.1, 0.2], "a/accuracy holds a value that is no finite number"),
        (["arms", "a", "accuracy"], 3, "a/accuracy needs a list, got 3"),
        (["arm_seeds", "b"], [0], "arm_seeds/b needs an arm of the result .a., got 'b'"),
        (["arm_seeds", "a"], [0], "a/accuracy has 3 values for 1 seeds"),
        (["curves", "b"], {}, "curves/b needs an arm of the result .a., got 'b'"),
        (
            ["curves", "a", "loss"],
            [[0.5]],
            "curves/a/loss needs one non-empty list .* for each of the 3 seeds",
        ),
        (["curves", "a", "loss"], [0.1, 0.2, 0.3], "curves/a/loss needs one non-empty list"),
        (["curves", "a", "loss"], [[0.5], [], [0.5]], "curves/a/loss needs one non-empty list"),
        (["curves", "a", "loss"], [[0.5], [NAN], [0.5]], "curves/a/loss needs .* finite numbers or null"),
        (["comparisons"], {}, "comparisons needs a list, got {}"),
        (["comparisons", 0], {"metric": "accuracy"}, "comparisons/0 needs an object with 'a'"),
        (["comparisons", 0, "b"], ["x"], "comparisons/0/b needs a text"),
        (["comparisons", 0, "low"], None, "comparisons/0/low needs a finite number"),
        (["comparisons", 0, "p"], 1.5, "comparisons/0/p needs a number between 0 and 1"),
        (["comparisons", 0, "n"], "five", "comparisons/0/n needs one number of repeats"),
        (["plan", 0, "primary"], [["a"]], "plan/0/primary needs a list of pairs of arms"),
        (["plan", 0, "margin"], 0, "plan/0/margin needs a number above 0 or null"),
        (["plan", 0], {}, "plan/0 needs an object with 'declared'"),
        (["examples", "test"], -1, "examples/test needs a number of examples"),
        (["correct", "examples"], 17, "correct/arms/a needs the answers of 3 seeds to 17 examples, packed"),
        (["correct", "arms", "a"], ["qoA="], "correct/arms/a needs the answers of 3 seeds"),
        (["correct", "arms", "a"], [1, 2, 3], "correct/arms/a needs the answers of 3 seeds"),
        (["correct", "arms", "b"], [], "correct/arms/b needs an arm of the result"),
        (["supersedes", 0], {"result": "x"}, "supersedes/0 needs an object with 'why'"),
        (["ratios", "keras", "low"], 2.5, "ratios/keras needs 0 < low <= median <= high"),
        (["ratios", "keras"], 2.5, "ratios/keras needs an object with 'low'"),
        (["notes"], [1], "notes/0 needs a text, got 1"),
        (["robustness", "b"], {"clean": [0.5]}, "robustness/b needs an arm of the result .a."),
        (["robustness", "a", "clean"], [0.5], "robustness/a/clean has 1 values for 3 seeds"),
        (
            ["robustness", "a", "clean"],
            [0.5, 0.6, 97.0],
            "robustness/a/clean needs accuracies between 0 and 1",
        ),
        (["robustness", "a", "fgsm/big"], [0.5] * 3, "robustness/a/fgsm/big needs a name of the form"),
        (
            ["calibration", "a", "count"],
            [0.0, 0.0],
            "calibration/a/count needs counts of at least one example",
        ),
        (["calibration", "a", "count"], [1.0], "calibration/a needs as many bins in each list"),
        (["calibration", "a", "accuracy"], [0.0, 1.2], "calibration/a/accuracy needs fractions"),
        (["calibration", "a", "confidence"], [], "calibration/a/confidence needs a non-empty list"),
        (["confusion", "a"], [[1, 2]], "confusion/a needs a square matrix"),
        (["confusion", "a"], [[1, -2], [0, 1]], "confusion/a needs counts"),
        (["confusion", "a"], [[0, 0], [0, 0]], "confusion/a needs counts of at least one example"),
        (["class_names"], ["cat"], "class_names needs a name for each of the 2 classes of confusion/a"),
        (["class_names"], ["cat", 1], "class_names needs a text, got 1"),
        (["costs", "a", "parameters"], 0, "costs/a/parameters needs a whole number above 0"),
        (["costs", "a", "parameters"], 1.5, "costs/a/parameters needs a whole number above 0"),
        (["costs", "a", "latency_ms"], [], "costs/a/latency_ms needs a non-empty list"),
        (["costs", "a", "latency_ms"], [0.0], "costs/a/latency_ms needs milliseconds above 0"),
        (["swept", 0, "values"], [1, 0.1], "swept/0/values needs rising numbers"),
        (["swept", 0, "arms"], {}, "swept/0/arms needs at least one arm"),
        (
            ["swept", 0, "arms", "a", "accuracy"],
            [[0.5]],
            "swept/0/arms/a/accuracy needs one list for each of 2 values",
        ),
        (
            ["swept", 0, "arms", "a", "accuracy"],
            [[0.5], []],
            "swept/0/arms/a/accuracy needs a non-empty list",
        ),
        (
            ["trials", 0, "outcome"],
            "done",
            "trials/0/outcome needs one of finished, pruned, failed, got 'done'",
        ),
        (["trials", 0, "value"], None, "trials/0/value needs a number, as the trial finished"),
        (["trials", 0, "settings", "rate"], [1], "trials/0/settings/rate needs a number, a text"),
        (["trials", 0, "seconds"], -1, "trials/0/seconds needs a number of 0 or more"),
        (["trials", 0, "number"], 1, "trials needs a number of its own for each trial"),
        (["trials_metric"], None, "trials_metric needs a text, got None"),
        (["flatness", "a"], {"trace": [1.0] * 3}, "flatness/a needs an object with 'loss'"),
        (["flatness", "a", "trace"], [1.0], "a/trace has 1 values for 3 seeds"),
        (["flatness", "a", "trace/other"], [1.0] * 3, "flatness/a/trace/other needs a name of the form"),
        (["flatness", "b"], {"loss": [1.0] * 3}, "flatness/b needs an arm of the result"),
        (["densities", "a", "grid"], [0.0, 0.0, 1.0], "densities/a/grid needs at least two rising numbers"),
        (["densities", "a", "density"], [[0.1, 0.2]], "densities/a/density needs 3 numbers of 0 or more"),
        (["densities", "a", "density"], [], "densities/a/density needs at least one list"),
        (["surfaces", "a", "x"], [-1.0, 0.5, 1.0], "surfaces/a/x needs at least two rising numbers, 0 among"),
        (["surfaces", "a", "y"], [0, 0], "surfaces/a/y needs at least two rising numbers, 0 among them"),
        (["surfaces", "a", "loss"], [[0.5, 0.9]] * 2, "surfaces/a/loss needs 3 lists of 2 finite numbers"),
        (["surfaces", "a", "loss"], [[0.5]] * 3, "surfaces/a/loss needs 3 lists of 2 finite numbers"),
        (
            ["surfaces", "a", "loss", 0],
            [0.5, NAN],
            "surfaces/a/loss needs a non-empty list of finite numbers",
        ),
        (["surfaces", "b"], {}, "surfaces/b needs an arm of the result"),
        (["overlays", 0, "image"], [[[0], [256]]], "overlays/0/image needs whole numbers from 0 to 255"),
        (["overlays", 0, "image"], [[0, 255]], "overlays/0/image needs whole numbers"),
        (["overlays", 0, "image"], [[[0], [1, 2]]], "overlays/0/image needs whole numbers"),
        (["overlays", 0, "map"], [[0.5]], r"overlays/0/map needs finite numbers as \[1\]\[2\]"),
        (["overlays", 0, "map"], [[0.5, NAN]], "overlays/0/map needs finite numbers"),
        (["flags", "rate"], NAN, "flags/rate needs a finite number"),
    ],
)
def test_a_wrong_field_is_named_when_written_and_when_read(tmp_path, path, value, said):
    made = changed(path, value)
    with pytest.raises(ValueError, match=said):
        results.write(tmp_path / "x.json", made)
    assert not (tmp_path / "x.json").exists()
    (tmp_path / "y.json").write_text(json.dumps(made))
    with pytest.raises(ValueError, match=rf"y\.json: .*{said}"):
        results.read(tmp_path / "y.json")


def leaves(value, path=()):
    """The path of everything inside, of a list only the first."""
    inner = (
        value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    )
    for key, child in inner:
        yield [*path, key]
        yield from leaves(child, [*path, key])


def test_whatever_a_field_holds_the_check_ends_in_a_sentence():
    strange = [None, "x", -1, NAN, 10**400, [], {}, [["x"], 1]]
    made, said = copy.deepcopy(full()), []
    for i, (*parents, last) in enumerate(leaves(full())):
        inner = functools.reduce(lambda found, key: found[key], parents, made)
        before = inner[last]
        for inner[last] in strange[i % 3 :: 3]:
            try:
                results.check(made)
            except ValueError as error:
                said.append(str(error))
        inner[last] = before
    results.check(made)
    assert len(said) > 150
    assert all(text.endswith(".") for text in said)


def test_files_of_the_first_schema_are_read():
    paths = sorted((ROOT / "experiments" / "results").rglob("*.json"))
    assert paths
    for path in paths:
        stored = json.loads(path.read_text())
        stored.pop("sha256", None)
        assert results.read(path) == {**stored, "schema": results.SCHEMA}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            {"schema": results.SCHEMA + 1},
            f"this kdjax reads schema 1 to {results.SCHEMA}, .* newer .*; update kdjax",
        ),
        ({"schema": 0}, "schema needs a version from 1 to"),
        ({"schema": "two"}, "schema needs a version from 1 to"),
        ({"epochs": 3}, "not a result of kdjax"),
        ([1, 2], "not a result of kdjax"),
        (3, "not a result of kdjax"),
    ],
)
def test_newer_and_foreign_files_are_named_as_such(tmp_path, content, said):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"x\.json: .*{said}"):
        results.read(path)
    # A newer file may hold anything else.
    if isinstance(content, dict) and content.get("schema", 0) == results.SCHEMA + 1:
        path.write_text(json.dumps(result(**content, arms={"of": "another form"})))
        with pytest.raises(ValueError, match="update kdjax"):
            results.read(path)


@pytest.mark.parametrize(
    "damage", [lambda text: text[: len(text) // 2], lambda text: "", lambda text: "[1, 2]"]
)
def test_names_a_file_that_is_no_result(tmp_path, damage):
    path = tmp_path / "x.json"
    results.write(path, result())
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=r"x\.json"):
        results.read(path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(path, {"a": float("inf")})
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_changed_number_is_noticed_when_it_is_read(tmp_path):
    path = tmp_path / "x.json"
    made = result(arms={"scratch": {"accuracy": [0.8645, 0.5, 0.5]}})
    results.write(path, made)
    path.write_text(path.read_text().replace("0.8645", "0.8665"))
    with pytest.raises(ValueError, match=r"x\.json: its content has changed since it was written"):
        results.read(path)
    path.write_text(json.dumps(made))  # as versions without a digest wrote it
    assert results.read(path) == made
