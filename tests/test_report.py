"""What the report prints equals what NumPy and SciPy compute, says no more than p allows, and stands alone."""

import copy
import html
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from kdjax import report, results, significance

pytest.importorskip("matplotlib", reason="needs the extra [experiments]")
stats = pytest.importorskip("scipy.stats", reason="needs the extra [experiments]")

ROOT = Path(__file__).resolve().parent.parent
SCRATCH, KD = [0.951, 0.946, 0.957, 0.949, 0.953], [0.971, 0.968, 0.979, 0.966, 0.975]
HOSTILE = "<script src='http://evil.example/x.js'>&\"|$\\frac{a}$ 99 %"


def make(arms=None, *, n=5, **optional):
    """A result as an experiment would write it, of some other machine."""
    arms = {"scratch": {"accuracy": SCRATCH[:n]}, "kd": {"accuracy": KD[:n]}} if arms is None else arms
    content = {
        "schema": results.SCHEMA,
        "name": "quickstart",
        "question": "Does a soft answer teach more than a label?",
        "command": "python -m experiments.quickstart",
        "flags": {"epochs": 3, "temperature": 4.0},
        "created": "2026-11-21T02:40:00+00:00",
        "commit": "0123456789abcdef",
        "dirty": True,
        "versions": {"jax": "0.10.2"},
        "hardware": {"backend": "cpu", "cores": 2},
        "wall_clock_s": 61.2,
        "scaled_down": "400 images.",
        "seeds": list(range(n)),
        "arms": arms,
        **optional,
    }
    results.check(content)
    return content


def with_curves(result, epochs=12):
    runs = [[1 - 0.9 / (e + 1) for e in range(epochs)] for _ in result["seeds"]]
    return {**result, "curves": {arm: {"validation_accuracy": runs} for arm in result["arms"]}}


def comparison(a, b):
    return {"metric": "accuracy", "a": "kd", "b": "scratch", **significance.welch(a, b)._asdict()}


def benchmark():
    arms = {
        "ours": {"epochs_per_second": [4.1, 4.0, 4.2]},
        "keras": {"epochs_per_second": [0.16, 0.17, 0.15]},
    }
    ratios = {
        "keras": {"median": 25.6, "low": 23.5, "high": 28.0},
        "plain step": {"median": 0.99, "low": 0.96, "high": 1.02},
        "onnxruntime": {"median": 0.5, "low": 0.4, "high": 0.8},
    }
    return make(arms, n=3, ratios=ratios)


def page_of(content, tmp_path, **options):
    report.page(content, path=tmp_path / "report.html", **options)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Collects elements, attributes and text, and checks that every element is closed."""

    VOID = ("meta", "br", "wbr")

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.open = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all_text(self):
        return " ".join("".join(self.text).replace("\N{NO-BREAK SPACE}", " ").split())

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def cells(table):
    lines = [line for line in table.strip().split("\n") if not line.startswith("| :--")]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[1:]}


# ------------------------------------------------------------------------------------------------- numbers


def test_table_is_what_numpy_and_scipy_compute():
    found = cells(report.markdown_table(make()))
    p = stats.ttest_ind(KD, SCRATCH, equal_var=False).pvalue
    assert p < 0.001
    mean, sd = 100 * np.mean(KD), 100 * np.std(KD, ddof=1)
    assert found["kd"] == {"arm": "kd", "n": "5", "accuracy, % ↑": f"**{mean:.1f} ± {sd:.1f}** (p < .001 ***)"}
    mean, sd = 100 * np.mean(SCRATCH), 100 * np.std(SCRATCH, ddof=1)
    assert found["scratch"]["accuracy, % ↑"] == f"{mean:.1f} ± {sd:.1f}"


@pytest.mark.parametrize(
    ("metric", "values", "expected"),
    [
        ("accuracy", [0.981, 0.983], "98.2 ± 0.1"),
        (
            "accuracy",
            [0.9866, 0.9868],
            "98.67 ± 0.01",
        ),  # one decimal more, where the spread would print as zero
        ("accuracy", [0.98, 0.98], "98.0 ± 0.0"),
        ("validation_accuracy", [0.5, 0.5], "50.0 ± 0.0"),
        ("ece", [0.02, 0.03], "2.5 ± 0.7"),
        ("f1", [1.0, 1.0], "100.0 ± 0.0"),
        ("loss", [0.5, 0.75], "0.625 ± 0.177"),
        ("parameters", [25546, 25546], "25,546"),
        ("epochs_per_second", [4.1, 4.0], "4.05 ± 0.07"),
        ("images_per_second", [227100, 226100], "226,600 ± 707"),
        ("something_else", [0.0123, 0.0123], "0.0123 ± 0.0000"),
        ("something_else", [-2.0, -4.0], "−3.00 ± 1.41"),
    ],
)
def test_formats(metric, values, expected):
    table = report.markdown_table(make({"a": {metric: values}}, n=2))
    assert table.strip().split("\n")[-1] == f"| a | 2 | {expected} |"


def test_heading_names_unit_and_direction():
    arms = {"a": {"worst_class_accuracy": [0.5], "teacher_kl": [0.1], "novel_number": [1.0]}}
    head = report.markdown_table(make(arms, n=1)).split("\n")[0]
    assert head == "| arm | n | worst class accuracy, % ↑ | KL from the teacher ↓ | novel number |"


def test_best_is_bold_only_where_it_is_told_from_the_runner_up():
    close = [value - 0.001 for value in KD]
    arms = {"scratch": {"accuracy": SCRATCH}, "kd": {"accuracy": KD}, "other": {"accuracy": close}}
    assert stats.ttest_ind(KD, close, equal_var=False).pvalue > 0.05
    assert "**" not in report.markdown_table(make(arms))
    assert "**" in report.markdown_table(make({k: arms[k] for k in ("scratch", "kd")}))


def test_lower_is_better_where_it_is():
    arms = {"scratch": {"loss": [0.5, 0.51, 0.52]}, "kd": {"loss": [0.3, 0.31, 0.32]}}
    assert "**0.310 ± 0.010**" in report.markdown_table(make(arms, n=3))
    said = report.finding(make(arms, n=3))
    assert said.startswith("kd beats scratch in loss by 0.200 (95 % interval 0.177 to 0.223, p < .001")


def test_teacher_is_shown_but_neither_tested_nor_bold():
    result = make({"teacher": {"accuracy": [0.99, 0.992, 0.991, 0.993, 0.99]}, **make()["arms"]})
    found = cells(report.markdown_table(result))
    assert found["teacher"]["accuracy, % ↑"] == "99.1 ± 0.1"
    assert found["kd"]["accuracy, % ↑"].startswith("**97.2")
    assert report.finding(result).startswith("kd beats scratch")


def test_arms_of_different_seeds():
    arms = {"teacher": {"accuracy": [0.99]}, **make()["arms"]}
    result = make(arms, arm_seeds={"teacher": [0]}, comparisons=[comparison(KD, SCRATCH)])
    found = cells(report.markdown_table(result))
    assert (found["teacher"]["n"], found["teacher"]["accuracy, % ↑"]) == ("1", "99.0")
    assert found["kd"]["n"] == "5"
    assert report.panels(result)


def test_columns_and_baseline_are_chosen_by_name():
    arms = {"scratch": {"accuracy": SCRATCH, "loss": KD}, "kd": {"accuracy": KD}}
    table = report.markdown_table(make(arms), metrics=["loss", "accuracy"], baseline="kd")
    assert table.split("\n")[0] == "| arm | n | loss ↓ | accuracy, % ↑ |"
    found = cells(table)
    assert found["kd"]["loss ↓"] == "–"
    assert "p < .001" in found["scratch"]["accuracy, % ↑"]
    assert "p" not in found["kd"]["accuracy, % ↑"]
    with pytest.raises(ValueError, match="no metric 'acuracy'; write one of accuracy, loss"):
        report.markdown_table(make(arms), metrics=["acuracy"])
    with pytest.raises(ValueError, match="no arm 'none'; write one of scratch, kd"):
        report.markdown_table(make(arms), baseline="none")


# -------------------------------------------------------------------------------------------------- findings


def test_finding_is_the_comparison_in_words():
    test = stats.ttest_ind(KD, SCRATCH, equal_var=False)
    low, high = test.confidence_interval(0.95)
    points = 100 * (np.mean(KD) - np.mean(SCRATCH))
    expected = (
        f"kd beats scratch in accuracy by {points:.1f} points (95 % interval {100 * low:.1f} to {100 * high:.1f}, "
        "p < .001, Welch, n = 5 + 5)."
    )
    assert report.finding(make()) == expected
    assert report.finding(make(comparisons=[comparison(KD, SCRATCH)])) == expected
    # The same comparison written from the other side reads the same but for the order of n.
    turned = {**comparison(SCRATCH, KD), "a": "scratch", "b": "kd"}
    assert report.finding(make(comparisons=[turned])) == expected


def test_no_difference_is_no_claim(tmp_path):
    near = [
        value + shift for value, shift in zip(SCRATCH, [0.004, -0.003, 0.002, 0.001, -0.002], strict=True)
    ]
    result = with_curves(make({"scratch": {"accuracy": SCRATCH}, "kd": {"accuracy": near}}))
    test = stats.ttest_ind(near, SCRATCH, equal_var=False)
    assert test.pvalue > 0.5
    low, high = test.confidence_interval(0.95)
    said = report.finding(result)
    assert said.startswith("No difference in accuracy between kd and scratch was found: +0.0 points")
    assert f"−{-100 * low:.1f} to +{100 * high:.1f}, p = {test.pvalue:.2f}".replace("0.", ".", 0)[:9] in said
    assert f"p = {test.pvalue:.2f}".replace("= 0", "= ") in said
    text = page_of(result, tmp_path).lower()
    for word in ("significan", "beats", "<b>9"):
        assert word not in text
    assert "**" not in report.markdown_table(result)


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (0.0, "p < .001"),
        (0.00099, "p < .001"),
        (0.0021, "p = .002"),
        (0.04996, "p = .04996"),
        (0.05, "p = .050"),
        (0.0504, "p = .050"),
        (0.38, "p = .38"),
        (0.997, "p > .99"),
    ],
)
def test_p_never_seems_to_be_on_the_other_side(p, expected):
    given = {
        "metric": "accuracy",
        "a": "kd",
        "b": "scratch",
        "difference": 0.01,
        "low": 0.0,
        "high": 0.02,
        "p": p,
    }
    said = report.finding(make(comparisons=[given]))
    assert f", {expected}, Welch)." in said
    assert said.startswith("kd beats") == (p < 0.05)


def test_one_seed_is_told_as_such(tmp_path):
    result = with_curves(make(n=1))
    assert (
        report.finding(result)
        == "Accuracy: scratch 95.1 % and kd 97.1 % (1 run per arm, too few for a test)."
    )
    assert cells(report.markdown_table(result))["kd"] == {"arm": "kd", "n": "1", "accuracy, % ↑": "97.1"}
    text = Reader(page_of(result, tmp_path)).all_text()
    assert "±" not in text
    assert "interval" not in text
    assert "p <" not in text


def test_benchmark_speaks_of_ratios_and_tests_nothing(tmp_path):
    said = report.finding(benchmark())
    assert said == (
        "kdjax is ahead of keras (25.6×, 23.5× to 28.0×); behind onnxruntime (2.00×, 1.25× to 2.50×); "
        "level with plain step (0.99×, 0.96× to 1.02×)."
    )
    table = report.markdown_table(benchmark())
    assert "**" not in table
    assert "p <" not in table
    reader = Reader(page_of(benchmark(), tmp_path))
    assert len(reader.of("svg")) == 2
    assert said in reader.all_text()
    assert "25.6×" in reader.of("svg")[0]["aria-label"]


# ------------------------------------------------------------------------------------------------------ page


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    full = with_curves(make({"teacher": {"accuracy": [0.99] * 5}, **make()["arms"]}, notes=["One teacher."]))
    return page_of(full, tmp_path_factory.mktemp("page"), title="Digits")


def test_page_says_everything(page):
    text = Reader(page).all_text()
    for expected in (
        "Digits",
        report.finding(make()),
        "Does a soft answer teach more than a label?",
        "97.2 ± 0.5",
        "One teacher.",
        "400 images.",
        "python -m experiments.quickstart",
        "0123456789ab, with uncommitted changes",
        "jax 0.10.2",
        "cores 2",
        "--temperature=4.0",
        "0, 1, 2, 3, 4",
        "1 min 1 s",
    ):
        assert expected in text


def test_page_needs_nothing_else(page):
    reader = Reader(page)
    assert "http" not in page.replace("http-equiv", "")
    assert "@import" not in page
    for tag, attributes in reader.elements:
        assert tag not in ("img", "script", "link", "iframe", "object")
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith("#")
    assert not re.search(r"url\((?!#)", page)
    assert "default-src 'none'" in page


def test_page_reads_on_a_phone_light_and_dark(page):
    assert 'name="viewport" content="width=device-width' in page
    assert "prefers-color-scheme:dark" in page
    used, (light, dark) = set(re.findall(r"var\((--\w+)\)", page)), re.findall(r":root{([^}]*)}", page)
    assert used <= set(re.findall(r"(--\w+):", light)) & set(re.findall(r"(--\w+):", dark))
    for drawing in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        assert not re.search(r"#[0-9a-fA-F]{6}", drawing), "a colour that does not follow the theme"


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_colours_are_readable(page):
    for theme in re.findall(r":root{([^}]*)}", page):
        colours = dict(re.findall(r"--(\w+):(#\w+)", theme))
        paper = luminance(colours.pop("paper"))
        colours.pop("grid")
        for name, colour in colours.items():
            high, low = sorted([luminance(colour), paper], reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5, name


def test_figures_are_inline_and_told_in_words(page):
    reader = Reader(page)
    drawings = reader.of("svg")
    assert len(drawings) == len(reader.of("figure")) == 2
    assert (
        drawings[0]["aria-label"]
        == "Dot plot of accuracy by arm, means: teacher 99.0 %, scratch 95.1 % and kd 97.2 %."
    )
    assert "validation accuracy" in drawings[1]["aria-label"]
    assert all(drawing["role"] == "img" and "viewbox" in drawing for drawing in drawings)
    names = [attributes["id"] for _, attributes in reader.elements if "id" in attributes]
    assert len(names) == len(set(names))
    for target in re.findall(r'(?:href="|url\()#([^")]+)', page):
        assert target in names


def test_page_is_the_same_for_the_same_results(tmp_path):
    assert page_of(with_curves(make()), tmp_path) == page_of(copy.deepcopy(with_curves(make())), tmp_path)


def test_hostile_names_are_only_text(tmp_path):
    arms = {HOSTILE: {HOSTILE: KD, "accuracy": KD}, "b\n": {"accuracy": SCRATCH}}
    result = with_curves(
        make(arms, notes=[HOSTILE], comparisons=[{**comparison(KD, SCRATCH), "a": HOSTILE, "b": "b\n"}])
    )
    result |= {"name": HOSTILE, "question": HOSTILE, "command": HOSTILE, "flags": {HOSTILE: HOSTILE}}
    result |= {
        "versions": {HOSTILE: HOSTILE},
        "hardware": {HOSTILE: HOSTILE},
        "commit": HOSTILE,
        "created": HOSTILE,
    }
    text = page_of([result, result], tmp_path, title=HOSTILE, problems=[HOSTILE])
    reader = Reader(text)
    assert "script" not in {tag for tag, _ in reader.elements}
    assert not any("src" in attributes for _, attributes in reader.elements)
    assert html.unescape(HOSTILE) in reader.all_text()
    table = report.markdown_table(result)
    assert "<script" not in table
    assert len({line.count("|") for line in table.strip().split("\n")}) == 1


def test_many_results_are_listed_with_their_findings(tmp_path):
    reader = Reader(page_of([with_curves(make()), benchmark()], tmp_path))
    links = [attributes["href"] for attributes in reader.of("a")]
    assert links == ["#r0", "#r1"]
    assert {"r0", "r1"} <= {attributes.get("id") for attributes in reader.of("section")}
    assert reader.all_text().count(report.finding(make())) == 2


@pytest.mark.parametrize(
    "ragged", [[[0.5, 0.6, 0.7], [0.5, 0.6]], [[0.5, None, 0.7]] * 2, [[0.5]], [[None, None]]]
)
def test_curves_of_any_length(ragged, tmp_path):
    result = make(n=2) | {"curves": {"kd": {"loss": ragged}}}
    assert len(Reader(page_of(result, tmp_path)).of("svg")) == 2


def test_result_without_arms(tmp_path):
    assert "no measured arms" in page_of(make({}), tmp_path)
    with pytest.raises(ValueError, match="no arms, ratios or curves to draw"):
        report.save_figure(tmp_path / "figure.png", make({}))
    assert not (tmp_path / "figure.png").exists()


def test_many_arms(tmp_path):
    arms = {f"an_arm_with_a_rather_long_name_{i}": {"accuracy": KD} for i in range(16)}
    reader = Reader(page_of(with_curves(make(arms)), tmp_path))
    assert len(reader.of("tr")) == 17


@pytest.mark.parametrize("content", [with_curves(make()), make(), make(n=1), benchmark()])
def test_figure_file(content, tmp_path):
    report.save_figure(tmp_path / "figure.png", content)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]


def test_matplotlib_is_left_as_it_was(tmp_path):
    import matplotlib

    before = matplotlib.rcParams.copy()
    page_of(with_curves(make()), tmp_path)
    report.save_figure(tmp_path / "figure.png", make())
    assert matplotlib.rcParams.copy() == before
    assert "matplotlib.pyplot" not in sys.modules


# -------------------------------------------------------------------------------------------- damaged files


def without(field):
    return json.dumps({k: v for k, v in make().items() if k != field})


DAMAGED = {
    "truncated": json.dumps(make())[:200],
    "empty": "",
    "foreign": "[1, 2]",
    "binary": b"\x89PNG\r\n\xff",
    "older": json.dumps({**make(), "schema": 0}),
    "no_arms": without("arms"),
    "odd_arms": json.dumps({**make(), "arms": {"kd": 3}}),
    "nan": json.dumps({**make(), "arms": {"kd": {"accuracy": [float("nan")] * 5}}}),
    "huge": json.dumps({**make(), "arms": {"kd": {"accuracy": [10**400] * 5}}}),
    "no_seeds": json.dumps({**make(), "seeds": [], "arms": {"kd": {"accuracy": []}}}),
    "curves": json.dumps({**make(), "curves": {"kd": {"loss": [["a"]]}}}),
    "curves_flat": json.dumps({**make(), "curves": {"kd": {"loss": [0.1, 0.2]}}}),
    "comparison": json.dumps({**make(), "comparisons": [{"metric": "accuracy", "a": "kd"}]}),
    "comparison_name": json.dumps({**make(), "comparisons": [{**comparison(KD, SCRATCH), "b": ["x"]}]}),
    "ratios": json.dumps({**make(), "ratios": {"keras": {"median": 2.0, "low": 3.0, "high": 4.0}}}),
    "notes": json.dumps({**make(), "notes": [1]}),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_file_is_named_and_the_others_are_reported(name, tmp_path):
    content = DAMAGED[name]
    damaged, good = tmp_path / f"{name}.json", tmp_path / "z_good.json"
    damaged.write_bytes(content if isinstance(content, bytes) else content.encode())
    results.write(good, make())
    found, problems = report.load([damaged, tmp_path / "missing.json", good])
    assert found == [json.loads(good.read_text())]
    assert len(problems) == 2
    assert problems[0].count(str(damaged)) == problems[1].count("missing.json") == 1
    text = Reader(page_of(found, tmp_path, problems=problems)).all_text()
    assert f"{name}.json" in text
    assert report.finding(make()) in text


def run_report(*arguments, directory):
    command = [sys.executable, "-m", "experiments.report", *arguments]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(directory), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=120
    )


def test_command_reports_a_directory(tmp_path):
    folder = tmp_path / "found" / "benchmarks"
    results.write(folder.parent / "quickstart.json", with_curves(make()))
    results.write(folder / "step.json", benchmark())
    (folder / "cut.json").write_text("{")
    done = run_report("--results=found", "--output=all.html", directory=tmp_path)
    assert (done.returncode, done.stdout) == (1, "all.html: 2 of 3 results.\n"), done.stderr
    assert "not in it: found/benchmarks/cut.json is not a result file" in done.stderr
    text = Reader((tmp_path / "all.html").read_text(encoding="utf-8")).all_text()
    for expected in ("cut.json", "kd beats scratch", "kdjax is ahead of keras"):
        assert expected in text


def test_p_of_several_arms_are_corrected_by_holm():
    weak = [0.955, 0.950, 0.962, 0.953, 0.957]
    arms = {
        name: {"accuracy": values} for name, values in {"scratch": SCRATCH, "kd": KD, "hint": weak}.items()
    }
    p = {
        arm: stats.ttest_ind(arms[arm]["accuracy"], SCRATCH, equal_var=False).pvalue for arm in ("kd", "hint")
    }
    assert p["kd"] < p["hint"]
    text = report.markdown_table(make(arms), metrics=["accuracy"])
    for arm, wanted in {"kd": 2 * p["kd"], "hint": max(p["hint"], 2 * p["kd"])}.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {arm} "))
        shown = re.search(r"p (=|<) (\.\d+)", row)
        assert shown, row
        if shown[1] == "=":
            np.testing.assert_allclose(float(shown[2]), wanted, atol=6e-4 if wanted < 0.1 else 6e-3)
        else:
            assert wanted < float(shown[2])
