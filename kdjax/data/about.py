"""What is known of data sets by their name."""

from kdjax.data import tfds_cache

_LICENCES = {
    "digits": "CC BY 4.0 (UCI, Optical Recognition of Handwritten Digits)",
    "mnist": "CC BY-SA 3.0",
    "fashion_mnist": "MIT",
}


def licence_of(name: str) -> str:
    """The licence of a data set; "not stated" where its authors give none, or the data are a user's own."""
    return _LICENCES.get(name.partition(":")[0], "not stated")


def resize_of(name: str) -> str:
    """How an image of another size is made one of this data set: ``cover`` and cut, or ``stretch``."""
    return "stretch" if name.partition(":")[0] in tfds_cache.DEFAULT_SIZES else "cover"
