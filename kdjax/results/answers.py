"""Whether each student is right on each test example, one bit for each, as text in a result."""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np


def pack(correct: np.ndarray) -> str:
    """The answers of one student, bool[examples], as base64 of eight to a byte."""
    return base64.b64encode(np.packbits(np.asarray(correct, bool)).tobytes()).decode()


def unpack(packed: str, examples: int) -> np.ndarray:
    """What :func:`pack` packed, bool[examples].

    Raises:
      ValueError: if it is of another number of examples, or no base64.
    """
    bits = np.frombuffer(base64.b64decode(packed, validate=True), np.uint8)
    if len(bits) != -(-examples // 8):
        raise ValueError(f"{8 * len(bits)} packed answers cannot be those of {examples} examples.")
    return np.unpackbits(bits, count=examples).astype(bool)


def correct_of(result: Mapping[str, Any], arm: str) -> np.ndarray:
    """Whether the students of an arm are right, bool[seeds, examples].

    Raises:
      KeyError: if the result holds no answers of the arm.
    """
    stored = result["correct"]
    return np.stack([unpack(packed, stored["examples"]) for packed in stored["arms"][arm]])
