"""Result files: whole or absent, checked when written and when read."""

import json

import pytest

from kdjax import files, results


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
