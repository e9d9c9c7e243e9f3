"""Files that are whole or absent: every write goes under a temporary name and is renamed, here or in a bucket."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from typing import Any


def write_text(path: Any, text: str) -> None:
    """Writes text, as :func:`write_bytes` writes bytes."""
    write_bytes(path, text.encode())


def write_json(path: Any, content: Any) -> None:
    """Writes JSON that a person may read and another program too.

    Raises:
      ValueError: if the content holds NaN or infinity, which JSON has no word for.
    """
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_sealed(path: Any, body: Any) -> None:
    """Writes JSON with its own SHA-256, by rename, so that it is whole and any later change to it is noticed."""
    body = json_ready(body)
    sealed = {"sha256": digest_json(body), "body": body}
    write_bytes(path, json.dumps(sealed, indent=1, sort_keys=True).encode())


def read_sealed(path: Any) -> Any:
    """Reads what :func:`write_sealed` wrote; ValueError if a byte of it has changed."""
    try:
        sealed = json.loads(as_path(path).read_bytes())
        intact = sealed["sha256"] == digest_json(sealed["body"])
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise ValueError(f"{path} is damaged: its content does not match the digest inside it.")
    return sealed["body"]


def write_bytes(path: Any, data: bytes) -> None:
    """Writes a file under a temporary name and renames it: a reader sees all of it or none."""
    path = as_path(path)
    temporary = path.parent / f"{path.name}.tmp"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def json_ready(value: Any) -> Any:
    """Returns the value as JSON will give it back, or raises a ValueError."""
    try:
        return json.loads(json.dumps(value, sort_keys=True))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"meta and settings must be plain JSON (numbers, text, lists, dicts): {error}."
        ) from None


def digest_json(body: Any) -> str:
    """Returns the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def explained(doing: str, size: int) -> Iterator[None]:
    """Turns a failed write into one sentence that says what was needed."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and "os_error_code" not in str(
            error
        ):  # tensorstore's word for an OSError
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise OSError(
            f"could not {doing}, which needs about {size:,} bytes ({reason}): free some space or choose another "
            "directory, then start the same command again; what was saved before is intact."
        ) from error


def as_path(directory: Any) -> Any:
    """Returns an absolute path, which Orbax insists on; it may also be a bucket (``gs://...``)."""
    from etils import epath

    path = epath.Path(directory)
    return path if "://" in str(directory) else path.absolute()
