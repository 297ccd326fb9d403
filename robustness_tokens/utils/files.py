"""Reads small files strictly, and writes files whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


MAX_JSON_BYTES = 4 << 20  # a report of the full budget on 50,000 images at three eps has 2.8 MB
_MAX_JSON_DEPTH = 32
# Lone surrogates, and characters that steer a terminal or the direction of a text (all but tab and line feed).
_NOT_TEXT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")  # how Python holds a byte of a path that is not UTF-8


def local_path(path: str | os.PathLike[str]) -> str:
    """Returns a path that a user gave, with the home folder in place of a leading ~; a Hub id stays unchanged.

    `ValueError` for a path that is not UTF-8, which safetensors and datasets can't open; `PermissionError` for one in
    another user's folder, which would count as missing.
    """
    name = os.path.expanduser(os.fspath(path))
    if _SURROGATE.search(name):
        raise ValueError(f"{name!a} must be valid UTF-8, which other libraries need to open it: rename the folder")
    try:
        os.stat(name)
    except PermissionError:
        raise
    except (OSError, ValueError):
        pass  # to be made, or a Hub id
    return name


def read_json(path: Path) -> dict[str, Any]:
    """Reads a small JSON object; `ValueError` names the file if it is damaged or too large."""
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, expected at most {MAX_JSON_BYTES:,}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as exc:
        raise ValueError(f"{path} is not valid JSON, so it is damaged (load it again, or delete it): {exc}") from exc
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    for depth, value in json_values(content):
        if depth > _MAX_JSON_DEPTH:
            raise ValueError(f"{path} is nested more than {_MAX_JSON_DEPTH} deep, so it is damaged")
        if isinstance(value, str) and _NOT_TEXT.search(value):
            raise ValueError(f"{path} holds {value[:80]!r}, with characters that are no text, so it is damaged")
    return content


def json_values(content: Any) -> Iterator[tuple[int, Any]]:
    """Yields every key and value in parsed JSON, each with its depth."""
    waiting = [(0, content)]
    while waiting:
        depth, value = waiting.pop()
        yield depth, value
        if isinstance(value, dict):
            waiting += [(depth + 1, item) for pair in value.items() for item in pair]
        elif isinstance(value, list):
            waiting += [(depth + 1, item) for item in value]


def write_text(path: Path, text: str) -> None:
    """Writes a small text file, whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a small file, whole or not at all.

    For tensors, pass the bytes of `safetensors.torch.save`: `save_file` maps the file, and a full disk can then kill
    the process.
    """
    with replacing(path) as partial:
        partial.write_bytes(content)
        partial.chmod(0o644)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the file to errors of writing that name none, such as that of a full disk."""
    try:
        yield
    except OSError as exc:
        if exc.filename is not None:
            raise
        raise OSError(exc.errno, exc.strerror or str(exc), str(path)) from exc


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a file beside the target and renames it once it is on the disk: no reader ever sees half a file."""
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
        partial = Path(file.name)
    try:
        with naming(path):
            yield partial
            flush_to_disk(partial)
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Waits until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def has_cache_hash(file: Path) -> bool:
    """Tells whether a cached file matches the hash in its blob's name; True if the name is no hash."""
    if not file.is_symlink():
        return True  # a cache without symbolic links
    expected = file.readlink().name  # not resolve(): Xet's blobs are links to other names
    hashes: dict[int, Callable[[], Any]] = {
        40: lambda: hashlib.sha1(b"blob %d\0" % file.stat().st_size),  # git
        64: hashlib.sha256,  # LFS and Xet
    }
    if len(expected) not in hashes:
        return True
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, hashes[len(expected)]).hexdigest() == expected
