"""What is missing without an extra is named together with the command that brings it."""

import sys

import jax.numpy as jnp
import pytest

from kdjax import data, report, robustness, significance
from kdjax.export import FORMATS, Source

SOURCE = Source(lambda images: jnp.mean(images, (1, 2)), (8, 8, 1), 1)
RESULT = {"name": "x", "arms": {"kd": {"accuracy": [0.9, 0.8, 0.7]}}}


@pytest.mark.parametrize(
    ("package", "use"),
    [
        ("sklearn", lambda: data.load("digits")),
        ("scipy", lambda: significance.welch([0.1, 0.2, 0.3], [0.2, 0.3, 0.5])),
        ("statsmodels", lambda: significance.seeds_needed(1.0, 0.5)),
        ("matplotlib", lambda: report.save_figure("x.png", RESULT)),
        ("litert_converter", lambda: FORMATS["litert"].convert(SOURCE)),
        ("flatbuffers", lambda: FORMATS["stablehlo"].convert(SOURCE)),
        (
            "PIL",
            lambda: robustness.jpeg(jnp.zeros((1, 8, 8, 3)), quality=50),
        ),
    ],
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, package, use):
    for module in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ModuleNotFoundError, match=rf"{package} is not installed.*'kdjax\[(data|report|export)\]'"
    ):
        use()
