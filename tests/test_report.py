"""What the report prints equals what NumPy and SciPy compute, says no more than p allows, and stands alone."""

import base64
import copy
import html
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from kdjax import report, results, significance
from kdjax.report import tables
from kdjax.report.figures import curvature, networks, runs, searches, style

pytest.importorskip("matplotlib", reason="needs the extra [experiments]")
stats = pytest.importorskip("scipy.stats", reason="needs the extra [experiments]")

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


def everything(arms=("teacher", "scratch", "kd"), *, n=5):
    """A result with every field that a figure is drawn of."""
    rng = np.random.default_rng(0)

    def per_seed(mean, scale=0.01):
        return np.clip(mean + scale * rng.standard_normal(n), 0, 1).tolist()

    def disturbed(mean):
        sizes = {"gaussian_noise": (1, 3, 5), "weight_noise": (0.1,), "fgsm": (2, 8), "pgd": (8,)}
        names = ["clean", *(f"{kind}/{size}" for kind, strengths in sizes.items() for size in strengths)]
        found = {name: per_seed(mean - 0.1 * i) for i, name in enumerate([*names, "mean_corruption"])}
        return found | {"fgsm/8/loss": [3.5] * n}

    grid = np.linspace(-1, 9, 21)
    density = np.exp(-(grid**2))
    return make(
        {arm: {"accuracy": per_seed(0.9 + 0.01 * i), "ece": per_seed(0.04)} for i, arm in enumerate(arms)},
        n=n,
        robustness={arm: disturbed(0.9) for arm in arms},
        calibration={arm: copy.deepcopy(BINS) for arm in arms},
        confusion={arm: copy.deepcopy(COUNTS) for arm in arms},
        class_names=["cat", "dog", "sea lion"],
        costs={
            arm: {"parameters": 1000 // 4**i or 1, "latency_ms": [1.0 + i, 1.5 + i, 9.0]}
            for i, arm in enumerate(arms)
        },
        swept=[
            {
                "name": "temperature",
                "values": [1, 2, 64],
                "arms": {arms[-1]: {"accuracy": [per_seed(0.9 + 0.02 * i) for i in range(3)]}},
            },
            {
                "name": "hard_weight",
                "values": [0, 1],
                "arms": {arms[-1]: {"loss": [per_seed(0.5), per_seed(0.4)]}},
            },
        ],
        trials=copy.deepcopy(TRIALS),
        trials_metric="validation_accuracy",
        flatness={arm: flat_measures(rng, n) for arm in arms},
        densities={arm: {"grid": grid.tolist(), "density": [density.tolist()] * n} for arm in arms},
        surfaces={arm: bowl(0.1 * 2**i) for i, arm in enumerate(arms)},
        overlays=[
            {"title": "a cat, by kd", "image": [[[0], [255]], [[9], [90]]], "map": [[-1.0, 0.0], [0.25, 0.5]]}
        ],
    )


def bowl(loss, wide=(-1.0, -0.5, 0.0, 0.5, 1.0)):
    """A surface that rises from that loss to four more in the corners."""
    return {
        "x": list(wide),
        "y": list(wide),
        "loss": [[loss + 2 * (x * x + y * y) for y in wide] for x in wide],
    }


def flat_measures(rng, n):
    """Of an arm, with every name that a table knows."""
    names = [
        name + kind for name in ("lambda_max", "trace", "sharpness") for kind in ("", "/filter_normalised")
    ]
    names += ["loss", "gradient_norm", "lambda_min", "lambda_max_residual", "trace_error"]
    return {name: rng.uniform(1, 2, n).tolist() for name in names}


BINS = {
    "confidence": [0.0, 0.35, 0.65, 0.95],
    "accuracy": [0.0, 1.0, 0.5, 0.9],
    "count": [0.0, 1.0, 99.0, 300.0],
}
COUNTS = [[80, 20, 0], [0, 50, 0], [1, 9, 390]]
TRIALS = [
    {
        "number": 3,
        "settings": {"rate": 0.1, "kind": "sgd"},
        "outcome": "finished",
        "value": 0.9,
        "seconds": 7.25,
    },
    {
        "number": 4,
        "settings": {"rate": 0.001, "kind": "adam"},
        "outcome": "pruned",
        "value": 0.95,
        "seconds": 1.0,
    },
    {
        "number": 5,
        "settings": {"rate": 0.01, "kind": "adam"},
        "outcome": "finished",
        "value": 0.925,
        "seconds": 7.0,
    },
    {
        "number": 6,
        "settings": {"rate": 9.0, "kind": "sgd"},
        "outcome": "failed",
        "value": None,
        "seconds": 0.5,
    },
]


def page_of(content, tmp_path, **options):
    """The HTML page of one result, or of several by their headings."""
    several = content if "schema" not in content else {content["name"]: content}
    report.page(several, path=tmp_path / "report.html", **options)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def filled(mark, content, tmp_path):
    """A document with one mark, filled from a result called x."""
    results.write(tmp_path / "x.json", content)
    (tmp_path / "a.md").write_text(f"<!-- results: {mark} -->\n<!-- end -->\n")
    return report.fill_tables(tmp_path / "a.md", tmp_path)


def drawings(page):
    """The SVG files inside a page."""
    sources = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    return [base64.b64decode(source).decode() for source in sources]


class Reader(HTMLParser):
    """Collects elements, attributes and text, and checks that every element is closed."""

    VOID = ("meta", "br", "wbr", "img")

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
    assert stats.ttest_rel(KD, SCRATCH).pvalue < 0.001
    mean, sd = 100 * np.mean(KD), 100 * np.std(KD, ddof=1)
    assert found["kd"] == {
        "arm": "kd",
        "n": "5",
        "accuracy, % ↑": f"**{mean:.1f} ± {sd:.1f}** (p < .001 ***)",
    }
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


def test_a_result_that_compares_nothing_has_no_tests_and_nothing_in_bold():
    apart = {"a": {"loss": [1.0, 1.1, 1.2, 1.1, 1.1]}, "b": {"loss": [2.0, 2.1, 2.2, 2.1, 2.3]}}
    table = report.markdown_table(make(apart), metrics=["loss"])
    assert "**1.1" in table
    assert "p " in table
    table = report.markdown_table(make(apart, comparisons=[]), metrics=["loss"])
    assert "**" not in table
    assert "p " not in table


def test_best_is_bold_only_where_it_is_told_from_every_other_arm():
    close = [value - shift for value, shift in zip(KD, [0.004, -0.003, 0.002, 0.001, -0.002], strict=True)]
    arms = {"scratch": {"accuracy": SCRATCH}, "kd": {"accuracy": KD}, "other": {"accuracy": close}}
    assert stats.ttest_rel(KD, close).pvalue > 0.05
    assert "| **" not in report.markdown_table(make(arms))
    assert "| **" in report.markdown_table(make({k: arms[k] for k in ("scratch", "kd")}))


def test_lower_is_better_where_it_is():
    arms = {"scratch": {"loss": [0.5, 0.51, 0.52]}, "kd": {"loss": [0.31, 0.3, 0.32]}}
    assert "**0.310 ± 0.010**" in report.markdown_table(make(arms, n=3))
    said = report.finding(make(arms, n=3))
    assert said.startswith("kd beats scratch in loss by 0.200 (95 % interval ")


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


def test_columns_are_chosen_by_name_and_the_baseline_is_that_of_the_comparison():
    arms = {"scratch": {"accuracy": SCRATCH, "loss": KD}, "kd": {"accuracy": KD}}
    turned = {**comparison(SCRATCH, KD), "a": "scratch", "b": "kd"}
    table = report.markdown_table(make(arms, comparisons=[turned]), metrics=["loss", "accuracy"])
    assert table.split("\n")[0] == "| arm | n | loss ↓ | accuracy, % ↑ |"
    found = cells(table)
    assert found["kd"]["loss ↓"] == "–"
    assert "p < .001" in found["scratch"]["accuracy, % ↑"]
    assert "p" not in found["kd"]["accuracy, % ↑"]
    with pytest.raises(ValueError, match="no metric 'acuracy'; write one of accuracy, loss"):
        report.markdown_table(make(arms), metrics=["acuracy"])


def test_times_to_a_target_are_medians_that_rank_runs_which_never_reached_it_last(tmp_path):
    some = {"steps_to_0.3": [30, 60, 900, 75], "paid_to_0.3": [30, 61, 905, 80], "reached_0.3": [1, 1, 0, 1]}
    always = {"steps_to_0.3": [3, 6, 9, 7], "paid_to_0.3": [30.0, 61.0, 91.0, 64.5], "reached_0.3": [1] * 4}
    few = {"steps_to_0.3": [30, 900, 900, 900], "reached_0.3": [1, 0, 0, 0]}
    result = make({"scratch": always, "kd": some, "other": few}, n=4)
    raw = [significance.sooner(always["steps_to_0.3"], [1] * 4, arm["steps_to_0.3"], arm["reached_0.3"]).p
           for arm in (some, few)]  # fmt: skip
    p = significance.holm(dict(zip(("kd", "other"), raw, strict=True)))
    found = cells(report.markdown_table(result))
    median = float(significance.median_time(some["steps_to_0.3"], some["reached_0.3"]).median)
    assert median == 60
    starred = [f"p = {p[arm]:.3f}".replace("0.", ".", 1) for arm in ("kd", "other")]
    assert found["kd"]["steps to 0.3"] == f"60.0 (3 of 4 reached; {starred[0]})"
    assert found["other"]["steps to 0.3"] == f"> 900 (1 of 4 reached; {starred[1]})"
    assert found["scratch"]["steps to 0.3"] == "6.00"
    said = (
        "Steps and payments to a target are medians; the test ranks runs, those that never reached it last."
    )
    assert said in Reader(page_of(result, tmp_path)).all_text()
    alone = make({"kd": some}, n=4)  # without a p to explain
    assert tables.legend(alone, tables.table(alone)[1]) == said


# -------------------------------------------------------------------------------------------------- findings


def test_finding_is_the_comparison_in_words():
    low, high = stats.ttest_rel(KD, SCRATCH).confidence_interval(0.95)
    points = 100 * (np.mean(KD) - np.mean(SCRATCH))
    expected = (
        f"kd beats scratch in accuracy by {points:.1f} points (95 % interval {100 * low:.1f} to {100 * high:.1f}, "
        "p < .001, paired t, n = 5)."
    )
    assert report.finding(make()) == expected
    assert report.finding(make(comparisons=[comparison(KD, SCRATCH)])) == expected
    # The same comparison written from the other side reads the same.
    turned = {**comparison(SCRATCH, KD), "a": "scratch", "b": "kd"}
    assert report.finding(make(comparisons=[turned])) == expected


def test_arms_of_other_seeds_are_compared_by_welch():
    result = make(arm_seeds={"kd": [5, 6, 7, 8, 9]})
    low, high = stats.ttest_ind(KD, SCRATCH, equal_var=False).confidence_interval(0.95)
    assert f"{100 * low:.1f} to {100 * high:.1f}, p < .001, Welch, n = 5 + 5)" in report.finding(result)


def test_headline_table_and_bold_say_the_same_p():
    """An arm that looks good alone among eighteen that were compared."""
    rng = np.random.default_rng(0)
    noise = {f"arm {i}": {"accuracy": (0.95 + 0.005 * rng.standard_normal(5)).tolist()} for i in range(17)}
    kd = [
        value + 0.01 + shift for value, shift in zip(SCRATCH, [0.01, -0.004, 0, 0.006, -0.004], strict=True)
    ]
    arms = {"scratch": {"accuracy": SCRATCH}, "kd": {"accuracy": kd}, **noise}
    raw = stats.ttest_rel(kd, SCRATCH).pvalue
    assert 0.01 < raw < 0.05
    alone = make({arm: arms[arm] for arm in ("scratch", "kd")})
    assert report.finding(alone).startswith("kd beats scratch")
    assert cells(report.markdown_table(alone))["kd"]["accuracy, % ↑"].startswith("**")
    pairs = [{"metric": "accuracy", "a": arm, "b": "scratch"} for arm in ("kd", *noise)]
    many = make(arms)
    many["comparisons"] = [{**pair, **report.compare(many, *pair.values())._asdict()} for pair in pairs]
    results.check(many)
    p = min(1, 18 * raw)
    said = report.finding(many)
    assert said.startswith("No difference in accuracy between kd and scratch was found: +1.2 points")
    assert f"p = {p:.2f} after Holm's correction for 18".replace("0.", ".", 1) in said
    assert f"(p = {p:.2f})".replace("0.", ".", 1) in cells(report.markdown_table(many))["kd"]["accuracy, % ↑"]
    assert "**" not in report.markdown_table(many)


def test_only_what_a_study_is_about_is_tested_and_settings_cost_it_nothing():
    settings = {f"a = {i}": {"accuracy": [value + 0.001 * i for value in KD]} for i in range(9)}
    result = make({"scratch": {"accuracy": SCRATCH}, "kd": {"accuracy": KD}, **settings})
    result["comparisons"] = [comparison(KD, SCRATCH)]
    found = cells(report.markdown_table(result))
    assert found["kd"]["accuracy, % ↑"].endswith("(p < .001 ***)")
    assert all("p" not in found[arm]["accuracy, % ↑"] for arm in settings)
    assert "after Holm" not in report.finding(result)


def test_weak_and_strong_teachers_are_no_rivals():
    teachers = {
        f"{kind}_teacher": {"accuracy": [0.99, 0.98, 0.99, 0.99, 0.98]} for kind in ("weak", "strong")
    }
    found = cells(report.markdown_table(make({**make()["arms"], **teachers})))
    assert found["weak_teacher"]["accuracy, % ↑"] == "98.6 ± 0.5"
    assert found["kd"]["accuracy, % ↑"].startswith("**97.2")


def test_accuracies_are_told_for_other_test_examples_too():
    rng = np.random.default_rng(4)
    answers = {"scratch": rng.random((5, 200)) < 0.95, "kd": rng.random((5, 200)) < 0.97}
    arms = {arm: {"accuracy": own.mean(1).tolist()} for arm, own in answers.items()}
    stored = {
        "split": "test",
        "examples": 200,
        "arms": {a: [*map(results.pack, own)] for a, own in answers.items()},
    }
    result = make(arms, correct=stored)
    wanted = significance.compare_accuracies(answers["kd"], answers["scratch"])
    low, high = (f"{100 * value:+.1f}".replace("-", "−") for value in (wanted.low, wanted.high))
    assert f"{low.lstrip('+')} to {high.lstrip('+')}, " in report.finding(result).replace("+", "")
    assert "seeds and test examples, n = 5" in report.finding(result)
    assert "of accuracy also by test example" in tables.legend(result, tables.table(result)[1])
    turned = {**result, "arm_seeds": {"kd": [4, 3, 2, 1, 0]}}  # rows of one seed are a pair
    assert report.compare(turned, "accuracy", "kd", "scratch") == significance.compare_accuracies(
        answers["kd"][::-1], answers["scratch"]
    )


def test_no_difference_is_no_claim(tmp_path):
    near = [
        value + shift for value, shift in zip(SCRATCH, [0.004, -0.003, 0.002, 0.001, -0.002], strict=True)
    ]
    result = with_curves(make({"scratch": {"accuracy": SCRATCH}, "kd": {"accuracy": near}}))
    test = stats.ttest_rel(near, SCRATCH)
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
        "metric": "validation_accuracy",  # of which the numbers are not here, so that p is as it is written
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
    assert len(reader.of("img")) == 2
    assert said in reader.all_text()
    assert "25.6×" in reader.of("img")[0]["alt"]


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
    assert "url(" not in page
    for tag, attributes in reader.elements:
        assert tag not in ("script", "link", "iframe", "object")
        assert attributes.get("src", "data:image/svg+xml;base64,").startswith("data:image/svg+xml;base64,")
        assert attributes.get("href", "#").startswith("#")
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page


def test_page_reads_on_a_phone_light_and_dark(page):
    assert 'name="viewport" content="width=device-width' in page
    assert "prefers-color-scheme:dark" in page
    used, (light, dark) = set(re.findall(r"var\((--\w+)\)", page)), re.findall(r":root{([^}]*)}", page)
    assert used <= set(re.findall(r"(--\w+):", light)) & set(re.findall(r"(--\w+):", dark))


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
    paper = luminance(style.PAPER)
    for colour in (style.INK, style.MUTED, *style.SERIES):
        assert (paper + 0.05) / (luminance(colour) + 0.05) >= 4.5, colour


def test_figures_are_inside_the_page_and_have_a_text_alternative(page):
    reader = Reader(page)
    images = reader.of("img")
    assert len(images) == len(drawings(page)) == len(reader.of("figure")) == 2
    assert images[0]["alt"] == (
        "Dot plot of accuracy by arm, means: teacher 99.0 %, scratch 95.1 % and kd 97.2 %."
    )
    assert "validation accuracy" in images[1]["alt"]
    assert ">scratch</text>" in drawings(page)[0]  # text stays text


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
    text = page_of({HOSTILE: result, "b": result}, tmp_path, title=HOSTILE, problems=[HOSTILE])
    reader = Reader(text)
    assert "script" not in {tag for tag, _ in reader.elements}
    assert not any("evil" in attributes.get("src", "") for _, attributes in reader.elements)
    assert html.unescape(HOSTILE) in reader.all_text()
    table = report.markdown_table(result)
    assert "<script" not in table
    assert len({line.count("|") for line in table.strip().split("\n")}) == 1


def test_many_results_are_listed_with_their_findings(tmp_path):
    reader = Reader(page_of({"a": with_curves(make()), "b": benchmark()}, tmp_path))
    links = [attributes["href"] for attributes in reader.of("a")]
    assert links == ["#r0", "#r1"]
    assert {"r0", "r1"} <= {attributes.get("id") for attributes in reader.of("section")}
    assert reader.all_text().count(report.finding(make())) == 2


@pytest.mark.parametrize(
    "ragged", [[[0.5, 0.6, 0.7], [0.5, 0.6]], [[0.5, None, 0.7]] * 2, [[0.5]], [[None, None]]]
)
def test_curves_of_any_length(ragged):
    result = make(n=2) | {"curves": {"kd": {"loss": ragged}}}
    (panel,) = runs.curve_panels(result)
    assert style.svg(panel).count(b">epoch</text>") == 1


def test_result_without_arms(tmp_path):
    assert "no measured arms" in page_of(make({}), tmp_path)
    with pytest.raises(ValueError, match="no arms, ratios or curves to draw"):
        report.save_figure(tmp_path / "figure.png", make({}))
    assert not (tmp_path / "figure.png").exists()


@pytest.mark.parametrize("content", [with_curves(make()), make(n=1), benchmark()])
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


# What each damaged file is called by the command; a wrong optional field stands for those of test_results.
NAMED = {
    "empty": ("", "it is empty"),
    "cut": (json.dumps(make())[:300], "is not a result file"),
    "list": ("[1, 2]", "not a result of kdjax"),
    "foreign": ('{"epochs": 3}', "not a result of kdjax"),
    "newer": (json.dumps({**make(), "schema": results.SCHEMA + 1}), "update kdjax"),
    "nan": (
        json.dumps({**make(), "arms": {"kd": {"accuracy": [float("nan")] * 5}}}),
        "kd/accuracy holds a value",
    ),
    "robust": (
        json.dumps({**make(), "robustness": {"kd": {"clean": [2.0] * 5}}}),
        "robustness/kd/clean needs",
    ),
    "binary": ("\x00\ufffd", "is not a result file"),
    "deep": ("[" * 100_000, "is not a result file"),
}


@pytest.fixture(scope="module")
def command(alone):
    with alone("experiments.report") as module:
        flags.FLAGS.mark_as_parsed()
        yield module


def test_command_reports_a_directory_and_names_every_damaged_file(command, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "found"
    results.write(folder / "quickstart.json", with_curves(make()))
    results.write(folder / "benchmarks" / "step.json", benchmark())
    first = {**make({"hint": {"accuracy": KD}}), "schema": 1, "name": "first_schema"}
    (folder / "older.json").write_text(json.dumps(first))
    for name, (content, _) in NAMED.items():
        (folder / f"{name}.json").write_text(content)
    monkeypatch.chdir(tmp_path)
    with (
        flagsaver.flagsaver((command.RESULTS, "found"), (command.OUTPUT, "all.html")),
        pytest.raises(SystemExit, match="1"),
    ):
        command.main()
    stdout, stderr = capsys.readouterr()
    assert stdout.startswith(f"all.html: 3 of {3 + len(NAMED)} results, ")
    assert stdout.endswith(f"{(tmp_path / 'all.html').stat().st_size / 1e6:.1f} MB.\n")
    lines = [line for line in stderr.splitlines() if line.startswith("left out: ")]
    assert len(lines) == len(NAMED)
    text = Reader((tmp_path / "all.html").read_text(encoding="utf-8")).all_text()
    for name, (_, said) in NAMED.items():
        (line,) = [line for line in lines if f"found/{name}.json" in line]
        assert said in line
        assert f"found/{name}.json" in text
    for expected in (report.finding(make()), "kdjax is ahead of keras", "benchmarks/step", "older"):
        assert expected in text


def test_runs_are_reported_by_their_names(command, tmp_path):
    for run in ("one", "group/two"):
        results.write(tmp_path / "runs" / run / "results.json", make())
        (tmp_path / "runs" / run / "run.json").write_text("{}")  # a run's own record is not a result
    found, problems = command.load(tmp_path / "runs")
    assert (sorted(found), problems) == (["group/two", "one"], [])
    with pytest.raises(ValueError, match="none holds no result file"):
        command.load(tmp_path / "none")


def test_a_page_or_documents_must_be_named(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--output is missing"):
        command.main()
    with pytest.raises(ValueError, match=r"--documents=no\*\.md matches no Markdown file"):
        command.expand(["no*.md"])


def test_command_fills_the_tables_of_files_patterns_and_directories(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    results.write("results/one.json", DESCRIBED)
    paths = [Path(name) for name in ("a.md", "b1.md", "b2.md", "docs/deep/c.md")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("<!-- results: one -->\nof last week\n<!-- end -->\n")
    Path("docs/none.md").write_text("no table\n")
    documents = (command.DOCUMENTS, ["docs", "a.md", "b*.md", "a.md"])
    with flagsaver.flagsaver((command.RESULTS, "results"), documents):
        command.main()
    assert capsys.readouterr().out == "".join(
        f"{name}: 1 table from results.\n" for name in ("docs/deep/c.md", "a.md", "b1.md", "b2.md")
    )
    for path in paths:
        text = path.read_text()
        assert "| scratch | 5 |" in text
        (link,) = re.findall(r"\[one\.json\]\((.+?)\)", text)
        assert (path.parent / link).exists()
        assert "of last week" not in text
    assert not [*tmp_path.rglob("*.html")]


class TestFiguresInSentences:
    """A number in a document's prose comes from its result file."""

    def filled(self, mark, tmp_path, **content):
        results.write(tmp_path / "x.json", {**DESCRIBED, **content})
        (tmp_path / "a.md").write_text(f"KD gains <!-- value: {mark} -->9.9<!-- end --> here.\n")
        return re.sub("<!--.*?-->", "", report.fill_tables(tmp_path / "a.md", tmp_path)).strip()

    def test_a_mean_and_a_difference_with_its_parts(self, tmp_path):
        assert self.filled("x | accuracy | kd", tmp_path) == "KD gains 97.2 ± 0.5 here."
        low, high = (100 * v for v in stats.ttest_rel(KD, SCRATCH).confidence_interval(0.95))
        size, interval = (
            f"+{100 * np.mean(np.subtract(KD, SCRATCH)):.1f} points",
            f"+{low:.1f} to +{high:.1f}",
        )
        for part, text in {
            "": f"{size} ({interval})",
            "size": size,
            "interval": interval,
            "p": "p < .001",
        }.items():
            mark = f"x | accuracy | kd - scratch{' | ' * bool(part)}{part}"
            assert self.filled(mark, tmp_path) == f"KD gains {text} here."

    def test_p_is_corrected_as_in_the_headline(self, tmp_path):
        hint = [0.953, 0.946, 0.960, 0.951, 0.957]
        values = {"scratch": SCRATCH, "kd": KD, "hint": hint}
        pairs = [comparison(KD, SCRATCH), {**comparison(hint, SCRATCH), "a": "hint"}]
        of = {"arms": {arm: {"accuracy": v} for arm, v in values.items()}, "comparisons": pairs}
        p = stats.ttest_rel(hint, SCRATCH).pvalue  # the larger one, which Holm leaves as it is
        assert 0.01 < p < 0.1
        said = self.filled("x | accuracy | hint - scratch | corrected p", tmp_path, **of)
        assert said == f"KD gains p = {p:.3f} here.".replace("0.", ".")
        fewer = stats.ttest_rel(KD[:3], SCRATCH[:3]).pvalue
        assert 0.0005 < fewer < 0.001 < 2 * fewer
        of["arms"] = {arm: {"accuracy": v[:3]} for arm, v in values.items()}
        said = self.filled("x | accuracy | kd - scratch | corrected p", tmp_path, **of, seeds=[0, 1, 2])
        assert said == f"KD gains p = {2 * fewer:.3f} here.".replace("0.", ".")

    def test_a_ratio_of_a_benchmark(self, tmp_path):
        ratios = {"step: torch": {"median": 1.1649, "low": 0.98, "high": 12.345}}
        for part, text in (
            ("", "1.16× (0.98× to 12.3×)"),
            (" | size", "1.16×"),
            (" | interval", "0.98× to 12.3×"),
        ):
            said = self.filled(f"x | times | step: torch{part}", tmp_path, ratios=ratios)
            assert said == f"KD gains {text} here."

    def test_a_time_with_how_many_runs_got_there(self, tmp_path):
        times = {"accuracy": KD, "steps_to_1": [3, 9, 4, 9, 5], "reached_1": [1, 0, 1, 0, 1]}
        said = self.filled("x | steps_to_1 | kd", tmp_path, arms={"kd": times})
        assert said == "KD gains 5.00 (3 of 5 reached) here."

    def test_times_are_compared_by_rank(self, tmp_path):
        kd, scratch = [3, 9, 4, 9, 5], [9, 9, 8, 9, 9]
        arms = {
            "scratch": {"steps_to_1": scratch, "reached_1": [0, 0, 1, 0, 0]},
            "kd": {"steps_to_1": kd, "reached_1": [1, 0, 1, 0, 1]},
        }
        p = stats.mannwhitneyu([3, 99, 4, 99, 5], [99, 99, 8, 99, 99], method="asymptotic").pvalue
        for part in ("p", "corrected p"):
            said = self.filled(f"x | steps_to_1 | kd - scratch | {part}", tmp_path, arms=arms)
            assert float(said.split("= ")[1].split()[0]) == pytest.approx(p, abs=0.005)
        with pytest.raises(ValueError, match="has no 'size'"):
            self.filled("x | steps_to_1 | kd - scratch | size", tmp_path, arms=arms)

    @pytest.mark.parametrize(
        ("mark", "said"),
        [
            ("x | accuracy | hint", "quickstart has no accuracy of an arm 'hint', which a document asks for"),
            ("x | loss | kd", "no loss of an arm 'kd'"),
            (
                "x | accuracy | kd - scratch | q",
                "no 'q' of accuracy 'kd - scratch', which a document asks for; there",
            ),
            ("x | accuracy | kd | p", "there is no part of it"),
            ("x | accuracy | scratch - kd | corrected p", "there is size, interval, p."),
            ("x | times | torch", "no ratio 'torch'"),
        ],
    )
    def test_what_is_not_there_is_named(self, mark, said, tmp_path):
        with pytest.raises(ValueError, match=re.escape(said)):
            self.filled(mark, tmp_path)


def test_small_print_counts_teachers_and_images_and_names_what_is_superseded(tmp_path):
    arms = {"teacher": {"accuracy": [0.99]}, **make()["arms"]}
    history = [{"result": "history/x_0.json", "why": "Another arm was read on the test split."}]
    more = {"examples": {"train": 1234, "test": 369}, "supersedes": history, "arm_seeds": {"teacher": [0]}}
    text = filled("x", {**make(arms, **more), "hardware": DESCRIBED["hardware"]}, tmp_path)
    assert "; n = 5, 1 teacher, 1,234 train images, 369 test images; " in text
    assert (
        "supersedes [history/x_0.json](./history/x_0.json): Another arm was read on the test split.</sub>"
        in text
    )
    assert "One teacher: what holds of it may not hold of another." in text
    assert "One teacher" not in filled("x", DESCRIBED, tmp_path)


def test_a_page_tells_what_was_declared_and_what_is_superseded(tmp_path):
    first = {"declared": "2026-11-30T10:00:00+00:00", "metric": "accuracy", "baseline": "scratch"}
    first |= {"primary": [["kd", "scratch"]], "chosen_on": "the rate: validation", "margin": 0.01}
    later = {**first, "declared": "2026-12-01T10:00:00+00:00", "primary": [], "margin": None, "chosen_on": ""}
    history = [{"result": "history/x_0.json", "why": "A fault."}]
    words = Reader(page_of(make(plan=[first, later], supersedes=history), tmp_path)).all_text()
    declared = "2026-11-30T10:00: accuracy of kd with scratch; equal within 0.01; chosen before: the rate: validation"
    assert declared in words
    assert "Changed since" in words
    assert "2026-12-01T10:00: accuracy of no pair" in words
    assert "history/x_0.json: A fault." in words
    plain = Reader(page_of(make(), tmp_path)).all_text()
    assert "Declared" not in plain
    assert "Supersedes" not in plain


def test_comparisons_that_stand_in_no_cell_are_sentences(tmp_path):
    arms = {**make()["arms"], "hint": {"accuracy": [0.966, 0.962, 0.975, 0.961, 0.968]}}
    pairs = [{**comparison(KD, SCRATCH)}, {**comparison(KD, SCRATCH), "b": "hint"}]
    text = filled("x", {**make(arms, comparisons=pairs), "hardware": DESCRIBED["hardware"]}, tmp_path)
    assert "\n- kd beats hint in accuracy by 0.5 points (" in text


def test_a_page_tells_how_many_results_are_drawn(tmp_path):
    seen = []
    report.page({"a": make(), "b": make()}, path=tmp_path / "page.html", progress=seen.append)
    assert seen == [1, 2]


def test_p_of_several_arms_are_corrected_by_holm():
    weak = [0.956, 0.945, 0.963, 0.955, 0.954]
    arms = {
        name: {"accuracy": values} for name, values in {"scratch": SCRATCH, "kd": KD, "hint": weak}.items()
    }
    p = {arm: stats.ttest_rel(arms[arm]["accuracy"], SCRATCH).pvalue for arm in ("kd", "hint")}
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


@pytest.mark.parametrize(
    ("p", "stars"), [(0.0009, " ***"), (0.001, " **"), (0.009, " **"), (0.01, " *"), (0.0499, " *")]
)
def test_stars_say_how_small_p_is(p, stars, monkeypatch):
    monkeypatch.setattr(significance, "holm", lambda tests: dict.fromkeys(tests, p))
    row = report.markdown_table(make(), metrics=["accuracy"]).splitlines()[-1]
    assert re.search(r"\(p [=<] \.\d+( \**)?\)", row)[1] == stars


def test_stars_are_explained_where_there_are_any(tmp_path):
    text = filled("x", DESCRIBED, tmp_path)
    legend = "p: against scratch, by seed, with a single comparison; * p < .05, ** p < .01"
    assert "***)" in text
    assert legend in text
    assert legend in Reader(page_of(make(), tmp_path)).all_text()
    near = {
        "scratch": {"accuracy": SCRATCH},
        "kd": {"accuracy": [v + d for v, d in zip(SCRATCH, (2e-3, -1e-3, 0, 2e-3, -1e-3), strict=True)]},
    }
    for text in (report.markdown_table(make(near)), Reader(page_of(make(near), tmp_path)).all_text()):
        assert "p = " in text
        assert not re.search(r"\.\d+ \*|\* p <", text)


DESCRIBED = {**make(), "hardware": {"backend": "cpu", "cores": 2, "cpu": "some"}}


def test_many_ratios_are_counted():
    ahead = {
        f"a{i}": {"median": m, "low": m * 0.9, "high": m * 1.1} for i, m in enumerate((2.0, 3.0, 10.0, 4.0))
    }
    behind = {f"b{i}": {"median": m, "low": m * 0.9, "high": m * 1.1} for i, m in enumerate((0.5, 0.25))}
    level = {"c": {"median": 1.0, "low": 0.9, "high": 1.1}}
    said = report.finding(make({"ours": {"ms": [1.0]}}, n=1, ratios=ahead | behind | level))
    assert said == (
        "Of 7 comparisons kdjax is ahead in 4 (2.00× to 10.0×), behind in 2 (2.00× to 4.00×) and level in 1."
    )


# ------------------------------------------------------------------------------- figures of the optional fields


@pytest.fixture(scope="module")
def all_figures(tmp_path_factory):
    return page_of(everything(), tmp_path_factory.mktemp("all"))


def drawn(panel):
    """The axes after a panel was drawn on them."""
    from matplotlib.figure import Figure

    ax = Figure(figsize=(4.2, panel.height)).subplots()
    panel.draw(ax)
    return ax


def marks(ax):
    """(x, y) of every line that is a single mark."""
    return [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in single(ax)]


def single(ax):
    return [line for line in ax.lines if len(line.get_xdata()) == 1]


def intervals(ax, *, upright):
    """Ends of every line between two points that is not a grid line."""
    pairs = [line.get_data() for line in ax.lines if len(line.get_xdata()) == 2]
    along = [(x, y) if upright else (y, x) for x, y in pairs]
    return [tuple(map(float, ends)) for fixed, ends in along if fixed[0] == fixed[1]]


def t_interval(values):
    values = 100 * np.asarray(values)
    return stats.t.interval(0.95, len(values) - 1, loc=values.mean(), scale=stats.sem(values))


def test_every_field_has_its_figures(all_figures):
    alts = [drawing["alt"].split()[0:2] for drawing in Reader(all_figures).of("img")]
    expected = [
        "Dot plot",
        "Lines of",
        "Lines of",
        "Scatter plot",
        "Scatter plot",
        "Accuracy by",
        "Accuracy by",
    ]
    expected += [
        "Reliability diagram,",
        *["Confusion matrix"] * 3,
        "Images with",
        "Densities of",
        "Contours of",
    ]
    assert [" ".join(alt) for alt in alts] == expected
    reader = Reader(all_figures)
    assert len(reader.of("figcaption")) == len(reader.of("figure")) == len(expected)
    for field in (
        "robustness",
        "calibration",
        "confusion",
        "costs",
        "swept",
        "trials",
        "densities",
        "surfaces",
        "overlays",
    ):
        assert len(report.panels({k: v for k, v in everything().items() if k != field})) < len(expected)


def test_all_figures_need_nothing_else(all_figures):
    test_page_needs_nothing_else(all_figures)
    for drawing in drawings(all_figures):
        assert not re.search(r'href="(?!#|data:)', drawing.replace('href="http://creativecommons', ""))


def test_page_goes_from_the_finding_to_how_it_was_made(tmp_path):
    arms = {
        name: {"accuracy": [v + shift for v in SCRATCH]}
        for name, shift in (("a", 0), ("b", 0.01), ("c", 0.02))
    }
    text = page_of(make(arms), tmp_path)
    order = [
        'class="finding"',
        'class="question"',
        "<table>",
        "Further comparisons",
        "<img",
        "How this was made",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)


def test_one_seed_and_many_arms_are_drawn(tmp_path):
    text = Reader(page_of(everything(("scratch", "kd"), n=1), tmp_path)).all_text()
    assert "interval" not in text
    assert "One seed." in text
    many = everything([f"an_arm_with_a_rather_long_name_{i}" for i in range(12)], n=3)
    shown = [p for p in report.panels(many) if p.alt.startswith(("Accuracy by", "Reliability"))]
    assert len(shown) == 2 + 3
    labels = set()
    for panel in shown[1:]:
        ax = drawn(panel)
        texts = [*ax.texts, *(text for legend in ax.figure.legends for text in legend.get_texts())]
        labels |= {
            match[1] for text in texts if (match := re.search(r"^an_arm.*_name_(\d+)", text.get_text()))
        }
    assert labels == set(map(str, range(12)))


def test_robustness_is_averaged_over_strengths_with_its_interval_over_seeds():
    result = everything()
    panel = networks.robustness_panel(result)
    ax = drawn(panel)
    rows = [label.get_text() for label in ax.get_yticklabels()]
    assert rows == ["clean", "gaussian noise", "all corruptions", "weight noise", "FGSM attack", "PGD attack"]
    found = result["robustness"]["kd"]
    noise = np.mean([found[f"gaussian_noise/{s}"] for s in (1, 3, 5)], axis=0)
    for values in (found["clean"], noise, np.mean([found["fgsm/2"], found["fgsm/8"]], axis=0)):
        expected = np.clip(t_interval(values), 0, 100)
        assert any(np.allclose(ends, expected) for ends in intervals(ax, upright=False))
        assert any(np.isclose(x, 100 * np.mean(values)) for x, _ in marks(ax))
    assert len(marks(ax)) == 6 * 3
    assert f"kd {100 * noise.mean():.1f} %; all corruptions" in panel.alt
    assert panel.table.head == ["perturbation", "teacher", "scratch", "kd"]
    rows = {row[0]: row[1:] for row in panel.table.rows}
    assert [name for name in rows if name.startswith("g")] == [
        f"gaussian noise, severity {i}" for i in (1, 3, 5)
    ]
    cell = f"{100 * np.mean(found['gaussian_noise/3']):.1f} ± {100 * np.std(found['gaussian_noise/3'], ddof=1):.1f}"
    assert rows["gaussian noise, severity 3"][-1] == cell
    assert {"clean", "FGSM attack, grey levels 2", "FGSM attack, grey levels 8"} <= rows.keys()


def test_reliability_shows_filled_bins_by_their_weight():
    result = everything(("kd",))
    panel = networks.reliability_panel(result, ["kd"])
    (points,) = (ax := drawn(panel)).collections
    filled = np.asarray(BINS["count"]) > 0
    expected = 100 * np.stack([BINS["confidence"], BINS["accuracy"]], 1)[filled]
    np.testing.assert_allclose(points.get_offsets(), expected)
    sizes = points.get_sizes()
    assert sizes[0] < 0.05 * sizes[2]
    assert (np.diff(sizes) > 0).all()
    diagonal, line = ax.lines
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, 100]
    np.testing.assert_allclose(line.get_xdata(), [65, 95])  # none to the bin with one example of 400
    error = (1 * 0.65 + 99 * 0.15 + 300 * 0.05) / 400
    assert f"kd {100 * error:.1f} %" in panel.alt
    assert f"kd, ECE {100 * error:.1f} %" in style.svg(panel).decode()


def test_confusion_is_in_percent_of_the_true_class():
    panel = networks.confusion_panel(everything(), "kd")
    ax = drawn(panel)
    cells = {(int(x), int(y)): t.get_text() for t in ax.texts for x, y in [t.get_position()]}
    assert cells == {(0, 0): "80", (1, 0): "20", (1, 1): "100", (0, 2): "<1", (1, 2): "2", (2, 2): "98"}
    assert [label.get_text() for label in ax.get_xticklabels()] == ["cat", "dog", "sea lion"]
    assert f"{100 * (80 + 50 + 390) / 550:.1f} %" in panel.caption
    assert "cat is taken for dog (20.0 % of cat)" in panel.alt


def test_confusion_of_many_classes_is_only_colours():
    counts = np.diag(np.full(40, 3)) + np.eye(40, k=1, dtype=int)
    result = make(confusion={"kd": counts.tolist()})
    ax = drawn(networks.confusion_panel(result, "kd"))
    assert not ax.texts
    (image,) = ax.images
    share = counts / counts.sum(1, keepdims=True)
    np.testing.assert_allclose(np.asarray(image.get_array())[..., 3], np.sqrt(share))
    perfect = make(confusion={"kd": np.eye(3, dtype=int).tolist()})
    assert "error" not in networks.confusion_panel(perfect, "kd").alt


def test_only_the_first_arms_get_a_confusion_matrix():
    result = everything([f"arm{i}" for i in range(6)], n=3)
    assert sum(panel.alt.startswith("Confusion") for panel in report.panels(result)) == 3


def test_sweep_is_drawn_with_intervals_and_logarithmic_only_where_it_is_wide():
    result = everything()
    wide, narrow = result["swept"]
    panel = searches.swept_panel(result, wide, metric="accuracy")
    ax = drawn(panel)
    assert ax.get_xscale() == "log"
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2", "64"]
    runs = wide["arms"]["kd"]["accuracy"]
    line = max(ax.lines, key=lambda line: len(line.get_xdata()))
    np.testing.assert_allclose(line.get_ydata(), 100 * np.mean(runs, axis=1))
    np.testing.assert_allclose(intervals(ax, upright=True), [t_interval(values) for values in runs])
    assert "at 64" in panel.alt
    _, head, rows = panel.table
    assert head == ["temperature", "kd"]
    assert rows[1] == ["2", f"{100 * np.mean(runs[1]):.1f} ± {100 * np.std(runs[1], ddof=1):.1f}"]
    panel = searches.swept_panel(result, narrow, metric="loss")
    assert drawn(panel).get_xscale() == "linear"
    assert "lowest" in panel.alt  # of a loss
    assert "at 1" in panel.alt
    zero = {**wide, "values": [0, 1, 64]}
    assert drawn(searches.swept_panel(result, zero, metric="accuracy")).get_xscale() == "linear"


def test_trials_are_drawn_by_outcome_and_listed_with_the_best_first():
    result = everything()
    panels = [panel for panel in report.panels(result) if panel.alt.startswith("Scatter")]
    ax = drawn(panels[0])
    assert ax.get_xscale() == "log"
    assert sorted(marks(ax)) == [(0.001, 95.0), (0.01, 92.5), (0.1, 90.0)]
    hollow = [line.get_xdata()[0] for line in single(ax) if line.get_markerfacecolor() == "none"]
    assert hollow == [0.001]  # which was stopped, and so is not the best
    assert "the best is trial 5 with 92.5 %, rate 0.01" in panels[0].alt
    assert "1 trial without a value is not drawn" in panels[0].caption
    _, head, rows = panels[0].table
    assert head == ["trial", "validation accuracy, %", "outcome", "rate", "kind", "seconds"]
    assert [row[0] for row in rows] == ["4", "5", "3", "6"]
    assert rows[-1] == ["6", "–", "failed", "9", "sgd", "0.5"]
    assert [label.get_text() for label in drawn(panels[1]).get_xticklabels()] == ["sgd", "adam"]
    lower = searches.trial_panel({**result, "trials_metric": "validation_loss"}, flag="rate")
    assert "the best is trial 3" in lower.alt


def test_compression_is_told_by_parameters_accuracy_and_time():
    result = everything()
    panel = networks.compression_panel(result)
    ax = drawn(panel)
    points = marks(ax)
    np.testing.assert_allclose([x for x, _ in points], [1, 4, 1000 / 62], rtol=0.05)
    means = [100 * np.mean(result["arms"][arm]["accuracy"]) for arm in result["arms"]]
    np.testing.assert_allclose([y for _, y in points], means)
    expected = [t_interval(result["arms"][arm]["accuracy"]) for arm in result["arms"]]
    np.testing.assert_allclose(intervals(ax, upright=True), expected)
    text = style.svg(panel).decode()
    for said in ("teacher, 1.50 ms", "scratch, 2.50 ms", "kd, 3.50 ms"):
        assert said in text
    assert "4.00×" in panel.alt
    # An arm without accuracy, or a result without costs, has none.
    assert not any(
        p.alt.startswith("Accuracy by comp") for p in report.panels(make({"a": {"ms": [1.0] * 5}}))
    )


def test_densities_are_mean_and_band_on_a_logarithmic_axis():
    runs = [[0.0, 1.0, 0.5], [0.0, 3.0, 1.5]]
    result = make(densities={"kd": {"grid": [-1.0, 0.0, 2.0], "density": runs}})
    (panel,) = [p for p in report.panels(result) if p.alt.startswith("Densities")]
    ax = drawn(panel)
    assert ax.get_yscale() == "log"
    np.testing.assert_allclose(ax.lines[0].get_ydata()[1:], [2.0, 1.0])
    assert 0 < ax.lines[0].get_ydata()[0] < 1e-5  # zero, at the foot of the axis
    (band,) = ax.collections
    assert band.get_paths()[0].get_extents().ymax == 3.0
    assert "kd up to 2" in panel.alt
    assert re.search("10⁻[³⁴]", style.svg(panel).decode())


class TestSurfaces:
    def test_squares_stand_in_the_order_of_the_arms_with_the_same_levels(self):
        panel = curvature.surface_panel(everything())
        ax = drawn(panel)
        said = [text.get_text() for text in ax.texts]
        assert said[:6] == ["teacher", "dot: 0.100", "scratch", "dot: 0.200", "kd", "dot: 0.400"]
        filled = [c for c in ax.collections if getattr(c, "filled", False)]
        assert len(filled) == 3
        assert (
            len({tuple(c.levels) for c in filled}) == len({c.get_facecolor().tobytes() for c in filled}) == 1
        )
        lines = [c for c in ax.collections if not getattr(c, "filled", True)]
        assert [float(text) for text in said[7:]] == list(lines[0].levels)
        assert "scratch 0.200 there and up to 4.20" in panel.alt

    def test_contours_lie_where_the_loss_has_their_level(self):
        wide = np.linspace(-1, 1, 41).tolist()
        slope = {"x": wide, "y": wide, "loss": [[1 + x] * 41 for x in wide]}
        ax = drawn(curvature.surface_panel(make(surfaces={"kd": slope})))
        (lines,) = [c for c in ax.collections if not getattr(c, "filled", True)]
        (square, *_) = ax.patches
        for level, path in zip(lines.levels, lines.get_paths(), strict=True):
            # The loss grows along x, which goes to the right.
            where = square.get_x() + square.get_width() * level / 2
            np.testing.assert_allclose(path.vertices[:, 0], where)

    @pytest.mark.parametrize(
        "losses", [[0.0, 0.0], [0.5, 0.5], [0.0, 30.0], [-3.0, 2.0], [1e-9, 1e9], [1.0, 1.01]]
    )
    def test_any_range_of_losses_has_few_levels_inside_it(self, losses):
        flat = {"x": [0.0, 1.0], "y": [0.0, 1.0], "loss": [[losses[0]] * 2, [losses[1]] * 2]}
        arms = {f"arm {i}": {"accuracy": SCRATCH} for i in range(2)}
        panel = curvature.surface_panel(make(arms, surfaces=dict.fromkeys(arms, flat)))
        filled = [c for c in drawn(panel).collections if getattr(c, "filled", False)]
        assert len(filled) == 2
        inner = filled[0].levels[1:-1]
        assert 1 <= len(inner) <= 9
        assert all(min(losses) <= level <= max(losses) for level in inner)


MEASURES = {
    "scratch": {"loss": [0.1, 0.2, 0.3], "trace": [10.0, 20.0, 30.0], "trace_error": [1.0, 1.0, 1.0]},
    "kd": {"loss": [0.2, 0.3, 0.4], "trace": [110.0, 120.0, 130.0], "trace_error": [1.0, 1.0, 1.0]},
}


class TestFlatness:
    def test_columns_are_mean_and_sd_with_p_and_no_better_or_worse(self):
        text = report.markdown_flatness(make(n=3, flatness=MEASURES))
        table, _ = text.split("<sub>")
        head, _, *rows = [[c.strip() for c in line.split("|")[1:-1]] for line in table.strip().splitlines()]
        assert head == ["arm", "n", "loss on these images", "trace, raw"]
        assert rows[0] == ["scratch", "3", "0.200 ± 0.100", "20.0 ± 10.0"]
        p = significance.welch(MEASURES["kd"]["trace"], MEASURES["scratch"]["trace"]).p
        assert p < 0.001
        assert rows[1][3] == "120 ± 10 (p < .001 ***)"
        assert "**" not in table.replace("***", "")

    def test_loss_stands_beside_and_the_legend_says_why(self, tmp_path):
        text = Reader(page_of(make(n=3, flatness=MEASURES), tmp_path)).all_text()
        for said in ("Flatness at the final weights", "loss on these images", "Granziol", "Dinh"):
            assert said in text
        assert "the traces within 5.0 %." in text

    def test_raw_and_filter_normalised_stand_side_by_side(self, all_figures):
        (shown,) = re.findall(r"Flatness at the final weights</h3>.*?</table>", all_figures, re.DOTALL)
        titles = re.findall(r'<th scope="col">([^<]+)</th>', shown)
        places = {title: i for i, title in enumerate(titles)}
        for name in ("largest eigenvalue", "trace", "sharpness"):
            assert places[f"{name}, filter-normalised"] == places[f"{name}, raw"] + 1

    def test_has_a_place_in_documents(self, tmp_path):
        made = {**make(n=3, flatness=MEASURES), "hardware": DESCRIBED["hardware"]}
        text = filled("x flatness", made, tmp_path)
        assert report.markdown_flatness(made) in text
        assert "[x.json]" in text


def test_overlays_hold_image_map_and_both(all_figures):
    image = pytest.importorskip("matplotlib.image")
    (drawing,) = [d for d in drawings(all_figures) if "a cat, by kd" in d]
    sources = re.findall(r'href="data:image/png;base64,([^"]+)"', drawing)
    pixels = [image.imread(io.BytesIO(base64.b64decode(source))) for source in sources]
    assert [p.shape[:2] for p in pixels] == [(2, 2)] * 4  # not scaled up
    picture, tinted, grey, again = pixels
    flip = slice(None) if np.allclose(picture[0, :, 0], [0, 1]) else slice(None, None, -1)
    np.testing.assert_allclose(picture[flip][..., 0], np.array([[0, 255], [9, 90]]) / 255, atol=1e-6)
    np.testing.assert_allclose(tinted[flip][..., 3], 0.92 * np.array([[1, 0], [0.25, 0.5]]), atol=0.01)
    assert tinted[flip][0, 0, 2] > tinted[flip][0, 0, 0]  # below zero blue,
    assert tinted[flip][1, 1, 0] > tinted[flip][1, 1, 2]  # above it orange
    np.testing.assert_array_equal(tinted, again)
    np.testing.assert_array_equal(picture, grey)


def test_long_names_stay_apart(tmp_path):
    names = [
        "Keras Distiller (JAX), 1 thread",
        "Keras Distiller (Torch), 1 thread",
        "Keras Distiller (JAX), 2 threads",
    ]
    ax = drawn(runs.dot_panel(make({name: {"accuracy": KD} for name in names}), metric="accuracy"))
    assert [label.get_text().replace("\n", " ") for label in ax.get_yticklabels()] == names
