"""Reads small files strictly, and writes files whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any


logger = logging.getLogger(__name__)

MAX_JSON_BYTES = 4 << 20  # a report of the full budget on 50,000 images at three eps has 2.8 MB
_MAX_JSON_DEPTH = 32
LEFTOVERS = ".robtok-*.part"
"""Pattern of the files that a killed run may leave beside those that it was writing."""
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


def check_own_file(path: Path) -> None:
    """Refuses a pipe, a device, and a link that leads out of the file's folder; a missing file passes.

    In the Hub's cache, links lead from a snapshot to the blobs of its repo or of all repos.
    """
    folder, target = path.parent.resolve(), path.resolve()
    places = [folder]
    for parent in folder.parents:
        if parent.name == "snapshots":
            places += [parent.parent / "blobs", parent.parent.parent / "blobs"]
    if not any(target.is_relative_to(place) for place in places):
        raise ValueError(f"{path} is a link to {target}, outside of its folder: put a copy of that file there")
    if target.exists() and not target.is_file():
        raise ValueError(f"{path} must be a regular file: remove it, or put a file there")


def read_bytes(path: Path, *, max_bytes: int) -> bytes:
    """Reads a small file; `ValueError` if it is larger, or not a file of its folder, see [`check_own_file`]."""
    check_own_file(path)
    with path.open("rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > max_bytes:
            raise ValueError(f"{path} has {size:,} bytes, expected at most {max_bytes:,}")
        return file.read(max_bytes)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a small JSON object; `ValueError` names the file if it is damaged or too large.

    Numbers are finite and keys differ, which Python's reader does not check.
    """
    content = read_bytes(path, max_bytes=MAX_JSON_BYTES)
    try:
        parsed = json.loads(content.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as exc:
        raise ValueError(f"{path} is not valid JSON, so it is damaged (load it again, or delete it): {exc}") from exc
    if not isinstance(parsed, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(parsed).__name__}")
    for depth, value in json_values(parsed):
        if depth > _MAX_JSON_DEPTH:
            raise ValueError(f"{path} is nested more than {_MAX_JSON_DEPTH} deep, so it is damaged")
        if isinstance(value, str) and _NOT_TEXT.search(value):
            raise ValueError(f"{path} holds {value[:80]!r}, with characters that are no text, so it is damaged")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{path} holds {value}, which is no number in JSON, so it is damaged")
    return parsed


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"an object has a key twice, {next(key for key in keys if keys.count(key) > 1)[:80]!r}")
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
    with replacing(path, mode=0o666) as partial:
        partial.write_bytes(content)


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
def replacing(path: Path, *, mode: int = 0o600) -> Iterator[Path]:
    """Yields a file beside the target and renames it once it is on the disk: no reader ever sees half a file.

    `mode` is that of a new file, from which the user's umask takes away; by default only the owner may read it.
    """
    partial = path.with_name(LEFTOVERS.replace("*", secrets.token_hex(8)))
    os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
    try:
        with naming(path):
            yield partial
            flush_to_disk(partial)
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_together(folder: Path, contents: Mapping[str, bytes], *, last: str, secret: Collection[str] = ()) -> None:
    """Writes the files of one thing by name; a kill leaves the old ones, the new ones, or none that is named `last`.

    Those in `secret` are readable by their owner alone. `OSError` leaves the old ones.
    """
    with ExitStack() as renamings:  # in the reverse order
        for name in sorted(contents, key=lambda name: name != last):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            mode = 0o600 if name in secret else 0o666
            partial = renamings.enter_context(replacing(folder / name, mode=mode))
            partial.write_bytes(contents[name])
            flush_to_disk(partial)
        (folder / last).unlink(missing_ok=True)
        flush_to_disk(folder)


def flush_to_disk(path: Path) -> None:
    """Waits until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Makes a folder and keeps it for one run, until it ends or dies; `ValueError` if another run has it."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder} is in use by another run, which writes there: wait for its end, or choose another folder"
            ) from None
        except OSError:  # a file system without locks
            logger.debug("%s can't be locked", folder)
        try:
            yield
        finally:
            with suppress(OSError):  # not only closed: processes forked meanwhile hold the file open
                fcntl.flock(descriptor, fcntl.LOCK_UN)
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
