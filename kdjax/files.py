"""Files that are whole or absent: every write goes under a temporary name and is renamed, here or in a bucket.

What is written to be read again is *sealed*: it holds the digest of its content and the identity of what it belongs to.
"""

import contextlib
import errno
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import jax


class Damaged(ValueError):
    """A file is not what was written."""


class Mismatch(ValueError):
    """A file is whole, and belongs to something else than the caller asked for."""


def write_text(path: Any, text: str) -> None:
    """Writes text, as :func:`write_bytes` writes bytes."""
    write_bytes(path, text.encode())


def write_json(path: Any, content: Any) -> None:
    """Writes JSON that a person may read and another program too.

    Raises:
      ValueError: if the content holds NaN or infinity, which JSON has no word for.
    """
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_sealed(path: Any, body: Any, *, identity: Mapping[str, Any] | None = None) -> None:
    """Writes JSON with its own SHA-256, by rename, so that it is whole and any later change to it is noticed.

    Args:
      path: of the file.
      body: what to keep: plain JSON.
      identity: what the body belongs to and was made from, such as data, settings, arm and seed, so that a file that is
        whole but another run's is noticed too.
    """
    content = {"identity": json_ready(dict(identity or {})), "body": json_ready(body)}
    write_bytes(path, json.dumps({"sha256": digest_json(content), **content}, indent=1).encode())


def read_sealed(path: Any, *, identity: Mapping[str, Any] | None = None) -> Any:
    """Reads what :func:`write_sealed` wrote.

    Args:
      path: of the file.
      identity: what it must have been written with; None takes any.

    Raises:
      Damaged: if a byte of it has changed.
      Mismatch: if it was written with another identity; the message says what differs.
      FileNotFoundError: if there is none.
    """
    content = _opened(path)
    if identity is not None and (different := differences(content["identity"], json_ready(dict(identity)))):
        raise Mismatch(f"{path} was written by another run ({different}).")
    return content["body"]


def identity_of(path: Any) -> dict[str, Any]:
    """What :func:`write_sealed` was told that a file belongs to; raises as :func:`read_sealed` does."""
    return _opened(path)["identity"]


def _opened(path: Any) -> dict[str, Any]:
    """Identity and body of a sealed file that is intact."""
    data = as_path(path).read_bytes()
    try:
        sealed = json.loads(data)
        content = {name: sealed[name] for name in ("identity", "body")}
        intact = sealed["sha256"] == digest_json(content)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Damaged(
            f"{path} is damaged, or of an earlier version: it is not JSON with the digest of its content."
        ) from None
    if not intact:
        raise Damaged(f"{path} is damaged: its content does not match the digest inside it.")
    return content


def cached(path: Any, compute: Callable[[], Any], *, identity: Mapping[str, Any], writes: bool = True) -> Any:
    """The body of a sealed file, or what ``compute`` returns, which is then written there.

    A file that is damaged or of another identity is named in a warning and computed again.

    Args:
      path: of the file.
      compute: returns plain JSON.
      identity: everything that decides what ``compute`` returns.
      writes: whether this process is the one that writes.
    """
    try:
        return read_sealed(path, identity=identity)
    except FileNotFoundError:
        pass
    except (Damaged, Mismatch) as error:
        warnings.warn(f"{error} It is computed again.", stacklevel=2)
    body = json_ready(compute())
    if writes:
        write_sealed(path, body, identity=identity)
    return body


def differences(there: Mapping[str, Any], here: Mapping[str, Any], *, most: int = 4) -> str:
    """What two nested mappings disagree on, as in ``seed 0 there and 1 here``; empty where they are equal."""
    there, here = _flat(there), _flat(here)
    names = [name for name in sorted(there | here) if there.get(name, _ABSENT) != here.get(name, _ABSENT)]
    said = [f"{name} {_brief(there, name)} there and {_brief(here, name)} here" for name in names[:most]]
    return ", ".join(said + [f"and {len(names) - most} more"] * (len(names) > most))


_ABSENT = object()


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in mapping.items():
        inside = isinstance(value, Mapping) and value
        flat |= _flat(value, f"{prefix}{name}.") if inside else {f"{prefix}{name}": value}
    return flat


def _brief(flat: Mapping[str, Any], name: str) -> str:
    if name not in flat:
        return "missing"
    text = repr(flat[name])
    return text if len(text) <= 60 else f"{text[:24]}..."


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
        return json.loads(json.dumps(value))
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


@contextlib.contextmanager
def lock(path: Any) -> Iterator[None]:
    """Waits until no other process is within; the lock on this file ends with the process that holds it."""
    as_path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as handle:
        if jax.process_index() == 0:  # the other processes of a pod follow the first
            lock_file(handle, wait=True)
        yield


def lock_file(handle: IO[str], *, wait: bool) -> bool:
    """Locks a file for as long as it is open; False if another process holds it and ``wait`` is False.

    Where files cannot be locked, as on Windows and some network disks, it does nothing and returns True.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return True
