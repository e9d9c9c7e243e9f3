r"""What a student says of photos.

    python -m experiments.predict --bundle=student photo.jpg other.png

Reads a bundle of experiments.export and prints, for each image, its most probable classes. Images are prepared as in
training: upright, opaque, resized, grey or colour as the student takes them.
"""

from absl import flags

from experiments import cli
from kdjax import export

BUNDLE = flags.DEFINE_string("bundle", None, "Folder that experiments.export wrote.", required=True)
TOP = flags.DEFINE_integer("top", 3, "Classes to print of each image.", 1)


def main(photos: list[str]) -> None:
    """Prints a line per image."""
    if not photos:
        raise ValueError("name one or more image files, as in --bundle=student photo.jpg.")
    bundle = export.load(BUNDLE.value)
    for photo, row in zip(photos, export.predict(bundle, photos), strict=True):
        best = row.argsort()[::-1][: TOP.value]
        print(f"{photo}: {', '.join(f'{bundle.class_names[i]} {row[i]:.1%}' for i in best)}")


if __name__ == "__main__":
    cli.launch(main, takes="photos")
