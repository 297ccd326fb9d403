"""Checks of values and tensors that came from a file.

Each raises `ValueError` with the name, what came and what was expected.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .files import check_own_file


MAX_TEXT = 2000
MAX_NAME = 200
MAX_INT = 2**63 - 1
_MAX_HEADER_BYTES = 1 << 16


def check_keys(
    name: str, content: Any, expected: set[str], *, optional: Collection[str] = (), schema: int | None = None
) -> None:
    """Refuses anything but a dictionary, then a schema newer than `schema`, then missing and unknown keys."""
    check_dict(name, content)
    if schema is not None:
        check_schema(name, content.get("schema_version"), schema)
    missing = sorted(expected - content.keys())
    unknown = sorted(map(str, content.keys() - expected - set(optional)))
    if missing or unknown:
        raise ValueError(
            f"{name} has missing keys {missing} and unknown keys {unknown}: it is damaged, or was not written by "
            "robustness_tokens"
        )


def check_schema(name: str, version: Any, newest: int) -> None:
    """Refuses a schema version that this package can't read."""
    check_int(f"{name}: schema_version", version, 1)
    if version > newest:
        raise ValueError(
            f"{name} has schema_version {version}, this package reads up to {newest}: "
            "pip install --upgrade robustness-tokens"
        )


def check_dict(name: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a dictionary, got {type(value).__name__}")


def check_list(name: str, value: Any) -> None:
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list, got {type(value).__name__}")


def check_bool(name: str, value: Any) -> None:
    if type(value) is not bool:
        raise ValueError(f"{name} must be true or false, got {value!r:.200}")


def check_fields(values: Any, *, from_zero: Collection[str] = (), free: Collection[str] = ()) -> None:
    """Checks the fields of a dataclass by their types, see [`check_type`]: whole numbers from 1, or from 0.

    Those named in `free` pass.
    """
    for name, kind in get_type_hints(type(values)).items():
        if name not in free:
            check_type(name, getattr(values, name), kind, lowest=0 if name in from_zero else 1)


def check_choice(name: str, value: Any, allowed: Collection[str]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r:.200}")


def check_text(name: str, value: Any, longest: int = MAX_TEXT) -> None:
    if not isinstance(value, str) or len(value) > longest:
        raise ValueError(f"{name} must be a text of at most {longest} characters, got {value!r:.200}")


def check_pattern(name: str, value: Any, pattern: str, meaning: str) -> None:
    """Refuses anything but a text that matches the whole pattern; `meaning` describes it in the error."""
    if not isinstance(value, str) or not re.fullmatch(pattern, value):
        raise ValueError(f"{name} must be {meaning}, got {value!r:.200}")


def check_fingerprint(name: str, value: Any) -> None:
    """Refuses anything but sha256 digests by name."""
    check_dict(name, value)
    for key, digest in value.items():
        check_pattern(f"{name}[{key!r:.200}]", digest, r"[0-9a-f]{64}", "64 hexadecimal digits")


def check_int(name: str, value: Any, lowest: int, highest: int = MAX_INT) -> None:
    if type(value) is not int or not lowest <= value <= highest:
        is_low = type(value) is not int or value < lowest
        expected = f"of at least {lowest}" if highest == MAX_INT and is_low else f"from {lowest} to {highest}"
        raise ValueError(f"{name} must be a whole number {expected}, got {value!r:.200}")


def check_number(name: str, value: Any, lowest: float = -math.inf, highest: float = math.inf) -> None:
    if not _is_finite_number(value) or not lowest <= value <= highest:
        expected = f" of at least {lowest:g}" if lowest > -math.inf else ""
        if highest < math.inf:
            expected = f" from {lowest:g} to {highest:g}"
        raise ValueError(f"{name} must be a finite number{expected}, got {value!r:.200}")


def check_numbers(name: str, values: Any, lowest: float = -math.inf, highest: float = math.inf) -> None:
    check_list(name, values)
    for index, value in enumerate(values):
        check_number(f"{name}[{index}]", value, lowest, highest)


def check_type(name: str, value: Any, kind: Any, *, lowest: int = 0) -> None:
    """Refuses a value that is not of the type of a dataclass's field; whole numbers start at `lowest`."""
    origin, kinds = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        others = [one for one in kinds if one is not NoneType]
        if (value is None and len(others) < len(kinds)) or any(_has_type(value, one, lowest) for one in others[:-1]):
            return
        check_type(name, value, others[-1], lowest=lowest)
    elif origin is Literal:
        check_choice(name, value, kinds)
    elif origin is list:
        check_list(name, value)
        for index, element in enumerate(value):
            check_type(f"{name}[{index}]", element, kinds[0], lowest=lowest)
    elif origin is dict:
        check_dict(name, value)
        for key, element in value.items():
            check_text(f"a key of {name}", key, MAX_NAME)
            check_type(f"{name}[{key!r}]", element, kinds[1], lowest=lowest)
    elif kind is int:
        check_int(name, value, lowest)
    elif kind is not Any:
        {bool: check_bool, float: check_number, str: check_text}[kind](name, value)


def _has_type(value: Any, kind: Any, lowest: int) -> bool:
    try:
        check_type("", value, kind, lowest=lowest)
    except ValueError:
        return False
    return True


def check_parameters(name: str, parameters: Any) -> None:
    """Refuses anything but a dictionary of plain values, or of lists of them."""
    check_dict(name, parameters)
    for key, value in parameters.items():
        check_text(f"the name of a value in {name}", key, MAX_NAME)
        for element in value if isinstance(value, list) else [value]:
            if not (element is None or isinstance(element, bool) or _is_finite_number(element)):
                check_text(f"{name}[{key!r}]", element, MAX_NAME)


def _is_finite_number(value: Any) -> bool:
    if type(value) is int:
        return abs(value) <= MAX_INT  # larger ones may not fit into a float
    return isinstance(value, float) and math.isfinite(value)


def read_tensors(
    path: Path,
    expected: Mapping[str, Tensor],
    *,
    config_file: str,
    others: str | None = None,
    max_other_bytes: int = 0,
) -> dict[str, Tensor]:
    """Reads finite tensors of exactly the names, shapes and dtypes of `expected`, which may be on the meta device.

    `config_file` is named in errors as the origin of `expected`. The size is checked before anything is read. With
    `others`, a regular expression, the file may also hold float32 tensors of any shape whose names match it.
    """
    check_own_file(path)
    largest = sum(tensor.nbytes for tensor in expected.values()) + _MAX_HEADER_BYTES + max_other_bytes
    if (size := path.stat().st_size) > largest:
        raise ValueError(
            f"{path} has {size:,} bytes, expected at most {largest:,} for {_describe(expected)} as {config_file} says"
        )
    try:
        with path.open("rb") as file:
            if (header := int.from_bytes(file.read(8), "little")) > _MAX_HEADER_BYTES:
                raise ValueError(f"its header has {header:,} bytes, expected at most {_MAX_HEADER_BYTES:,}")
        tensors = load_file(path)
    except (SafetensorError, ValueError, KeyError, OverflowError) as exc:
        raise ValueError(f"{path} is not a valid safetensors file, so it is damaged (load it again): {exc}") from exc
    further = {name: tensor for name, tensor in tensors.items() if name not in expected}
    if others is not None and all(
        re.fullmatch(others, name) and tensor.dtype == torch.float32 for name, tensor in further.items()
    ):
        expected = {**expected, **further}
    if (found := _describe(tensors)) != (wanted := _describe(expected)):
        raise ValueError(f"{path} must hold {wanted} as {config_file} says, got {found}: take both from one folder")
    check_finite(f"{path} holds tensors", tensors)
    return tensors


def check_finite(what: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuses tensors with a value that is not finite; `what` begins the message."""
    if broken := sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all()):
        raise ValueError(f"{what} whose {' and '.join(broken)} is not finite: the training diverged, or it is damaged")


def _describe(tensors: Mapping[str, Tensor]) -> str:
    kinds = (f"{name!r} ({tensor.dtype} of shape {tuple(tensor.shape)})" for name, tensor in sorted(tensors.items()))
    return ", ".join(kinds) or "no tensors"


def digest_json(content: Any, *, default: Any = None) -> str:
    """Returns the sha256 of content as JSON, in which the order of keys does not count."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=default).encode()).hexdigest()


def digest(tensors: Iterable[Tensor] | Mapping[str, Tensor]) -> str:
    """Returns the sha256 of shapes, dtypes and bytes, and of the names in a mapping, whose order does not count."""
    sha = hashlib.sha256()
    if isinstance(tensors, Mapping):
        sha.update(repr(sorted(tensors)).encode())
        tensors = [tensors[name] for name in sorted(tensors)]
    for tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        sha.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
