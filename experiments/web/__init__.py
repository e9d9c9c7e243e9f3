"""A page that one can try a student on: one HTML file with the networks and their runtime inside.

The runtime is LiteRT.js in WebAssembly, one thread, as its package has it; ``package-lock.json`` beside this file pins
it. Everything binary is compressed and written in base64, so that the page opens by a double click, without a network.
"""

import base64
import gzip
import html
import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdjax import export

HERE = Path(__file__).parent
RUNTIME = HERE / "node_modules" / "@litertjs"
DRAWN = ("digits", "mnist")  # data sets whose images one can draw


def install() -> None:
    """Brings LiteRT.js from the npm registry, as the lock file says, unless it is there.

    Raises:
      ValueError: if there is no npm, or it fails.
    """
    if (RUNTIME / "core" / "wasm").is_dir():
        return
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(
            "--web needs npm, which comes with Node.js 20 or newer: install it, then start again."
        )
    done = subprocess.run([npm, "ci", "--ignore-scripts", f"--prefix={HERE}"], capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"npm ci in {HERE.name} failed: {said}")


def build(networks: Mapping[str, export.Bundle], *, runtime: Path = RUNTIME) -> str:
    """The page of a student, and of its teacher beside it.

    Args:
      networks: role → bundle with a LiteRT file; ``student`` first, and ``teacher``, of the same images and classes.
      runtime: folder of the packages ``core`` and ``wasm-utils``.
    """
    bundle = networks["student"]
    said = bundle.description
    page = {
        "shape": said["image_shape"],
        "classes": list(bundle.class_names),
        "mean": list(bundle.normalisation.mean),
        "resize": said["preprocessing"]["resize"],
        "draw": _drawing(said),
        "about": about(networks),
        "origin": origin(said),
        "networks": [_network(role, one) for role, one in networks.items()],
        "runtime": {
            "wasm": _packed((runtime / "core" / "wasm" / "litert_wasm_internal.wasm").read_bytes()),
            "loader": _packed((runtime / "core" / "wasm" / "litert_wasm_internal.js").read_bytes()),
        },
    }
    modules = {
        f"@litertjs/{name}": _module(runtime / name / "dist" / "index.js") for name in ("core", "wasm-utils")
    }
    parts = {
        "title": html.escape(f"{said['data']['name']}: a student to try"),
        "style": (HERE / "page.css").read_text(),
        "importmap": json.dumps({"imports": modules}),
        "page": json.dumps(page).replace("<", "\\u003c"),
        "script": (HERE / "page.js").read_text(),
    }
    text = (HERE / "page.html").read_text()
    for name, part in parts.items():
        text = text.replace("{{" + name + "}}", part)
    return text


def about(networks: Mapping[str, export.Bundle]) -> str:
    """A sentence on each network: what it is, and how good."""
    sentences = []
    for role, bundle in networks.items():
        said = bundle.description
        metrics = said["metrics"]
        measured = ""
        if "accuracy" in metrics:
            measured = f", {metrics['accuracy']:.1%} right on {metrics['n']:,} {metrics['split']} images"
        sentences.append(f"The {role} has {said['parameters']:,} parameters{measured}.")
    return " ".join(sentences)


def origin(said: Mapping[str, Any]) -> str:
    """Where the student comes from, for the foot of the page."""
    made, trained = said["exported"], said["provenance"].get("trained", {})
    arm = f"Arm {trained['arm']}, seed {trained['seed']}. " if trained else ""
    data = f"Data: {said['data']['name']}, licence {said['data']['licence']}."
    return f"{arm}{data} Weights {said['weights'][:12]}, commit {made['commit'][:8]}."


def _drawing(said: Mapping[str, Any]) -> dict[str, Any] | None:
    """How one draws an image of this data set; None where one can't."""
    if said["data"]["name"].partition(":")[0] not in DRAWN or said["image_shape"][2] != 1:
        return None
    tiny = said["image_shape"][0] <= 8
    return {"ask": "Draw a digit", "margin": 0 if tiny else 0.2, "stroke": 44 if tiny else 24}


def _network(role: str, bundle: export.Bundle) -> dict[str, str]:
    form = bundle.description["formats"]["litert"]
    return {
        "role": role,
        "title": role.capitalize(),
        "size": f"{form['bytes'] / 1e3:,.0f} kB",
        "file": _packed((bundle.directory / form["file"]).read_bytes()),
    }


def _packed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, 9, mtime=0)).decode()


def _module(path: Path) -> str:
    """A JavaScript module as an address that an import map takes, without the source map it has no file for."""
    lines: Sequence[str] = path.read_text().splitlines()
    text = "\n".join(line for line in lines if not line.startswith("//# sourceMappingURL"))
    return f"data:text/javascript;base64,{base64.b64encode(text.encode()).decode()}"
