r"""From a finished run to files for a phone, a browser or a server, each checked against JAX.

    python -m experiments.export --run=runs/quickstart/kd/0 --output=student
    python -m experiments.export --run=runs/zoo/kd/0 --data_dir=data --formats=litert,litert_int8 --output=student
    python -m experiments.export --run=runs/quickstart/kd/0 --web --output=student

Writes a bundle: weights, architecture, preprocessing, class names, metrics, provenance, and a file per format. Every
file takes uint8 pixels, normalises them itself, and returns logits. It is run on a thousand images beside JAX first: a
float file may differ by a ten-thousandth of the range of the logits, an int8 file may lose --max_drop of accuracy. If
one does not pass, nothing is written. Takes seconds for small networks.

stablehlo runs wherever XLA does; litert and litert_int8 (uint8 in, float out, activations calibrated on training
images) on phones and in browsers; onnx needs an installation of its own, which an error message names.

--web also writes page.html, one file with the student, its teacher and their runtime inside, which opens by a double
click on a laptop or a phone, without a network: draw a digit or drop an image, and see both answers, how long they
take, and where the student looks. It needs npm, which brings LiteRT.js.

The data set is that of the run; what its flags don't say, such as --data_dir, is given again.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli, web
from kdjax import data, export, files, run

RUN = flags.DEFINE_string("run", None, "A finished run, such as runs/quickstart/kd/0.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "Folder of the bundle.", required=True)
FORMATS = flags.DEFINE_list(
    "formats", ["stablehlo", "litert", "litert_int8"], f"Of {', '.join(export.FORMATS)}."
)
BATCH = flags.DEFINE_integer(
    "batch", 0, "Images per call of a file; 0 for any number where the format allows it, and 1 elsewhere.", 0
)
MAX_DROP = flags.DEFINE_float(
    "max_drop", 0.02, "Accuracy that an int8 file may lose, as a fraction.", 0.0, 1.0
)
WEB = flags.DEFINE_bool("web", False, "Also write a page that one can try the student on.")
TEACHER_RUN = flags.DEFINE_string(
    "teacher_run",
    None,
    "The teacher's run, for the page; teacher/0 of the same workdir, if there is one, by default.",
)
NETWORK = flags.DEFINE_string("network", None, "The run's network if it is your own: path/mine.py:build.")
DATA = cli.define(cli.Data())


def main() -> export.Bundle:
    """Reads the run and its data set, writes the bundle, and says what is in it."""
    directory, output = Path(RUN.value), Path(OUTPUT.value)
    there = run.describe(directory)
    dataset = data_of(directory, there["identity"])
    own = None if NETWORK.value is None else cli.network(NETWORK.value, dataset)
    formats = list(dict.fromkeys([*FORMATS.value, *["litert"] * WEB.value]))
    if WEB.value:
        web.install()
    bundle = written(directory, dataset, output, formats, network=own)
    for line in export.summary(bundle):
        cli.say(line)
    if WEB.value:
        files.write_text(output / "page.html", page(bundle, dataset))
        cli.say(f"page: {output / 'page.html'} ({(output / 'page.html').stat().st_size / 1e6:.1f} MB)")
    return bundle


def written(
    directory: Path, dataset: data.Dataset, output: Path, formats: Sequence[str], **options: Any
) -> export.Bundle:
    """A finished run as a bundle."""
    there = run.describe(directory)
    return export.write(
        output,
        run.load(directory, dataset, **options),
        dataset,
        formats=formats,
        batch_size=BATCH.value or None,
        metrics={"split": there["split"], "n": len(dataset.splits[there["split"]]), **there["metrics"]},
        provenance={"trained": there["identity"], "launch": recorded(directory)},
        limits=export.Limits(accuracy_drop=MAX_DROP.value),
    )


def page(bundle: export.Bundle, dataset: data.Dataset) -> str:
    """The page of a student, with its teacher if there is one."""
    beside = Path(RUN.value).parent.parent / "teacher" / "0"
    teacher = Path(TEACHER_RUN.value) if TEACHER_RUN.value else beside if beside.is_dir() else None
    if teacher is None or teacher.resolve() == Path(RUN.value).resolve():
        return web.build({"student": bundle})
    with tempfile.TemporaryDirectory() as folder:
        return web.build(
            {"student": bundle, "teacher": written(teacher, dataset, Path(folder) / "teacher", ["litert"])}
        )


def data_of(directory: Path, identity: Mapping[str, Any]) -> data.Dataset:
    """The data set of a run: by the flags of its record, where they are not given here.

    Raises:
      ValueError: if it is not the one that the run was trained and measured on.
    """
    for name, value in recorded(directory).items():
        flag = cli.flags_of(__name__).get(name)
        if flag is not None and flag.using_default_value and name in vars(DATA.value):
            flag.value = value
    dataset = DATA.value.load()
    # Not the images themselves: a teacher or a smoke run may have had others of the same data set.
    of_run, here = (
        {"image_shape": known["shape"][1:], "class_names": known["class_names"], "test images": known["test"]}
        for known in (identity["data"], dataset.fingerprint)
    )
    if different := files.differences(of_run, here):
        raise ValueError(
            f"--dataset={DATA.value.dataset} is not the data set of {directory} ({different}); give the flags of the "
            "run's data, such as --dataset and --image_size."
        )
    return dataset


def recorded(directory: Path) -> dict[str, Any]:
    """The settings of the launch that a run is part of; none if it has no record."""
    try:
        return files.read_sealed(directory.parent.parent / "run.json")
    except (FileNotFoundError, files.Damaged):
        return {}


if __name__ == "__main__":
    cli.launch(main)
