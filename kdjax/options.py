"""Options as dataclass fields that say what a command line says of them."""

import dataclasses
from typing import Any


def option(
    default: Any, help: str, *, least: float | None = None, most: float | None = None, choices: Any = None
) -> Any:
    """A dataclass field with what a command line says of it: a sentence, a range or its choices."""
    return dataclasses.field(
        default=default, metadata={"help": help, "least": least, "most": most, "choices": choices}
    )
