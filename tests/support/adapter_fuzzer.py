"""Reads thousands of damaged adapters, in a process of its own: audit hooks and the memory limit can't be undone. Run
by tests/integration/test_fuzz_adapter.py:

    python tests/support/adapter_fuzzer.py FOLDER WAY COUNT SEED

FOLDER holds `adapter/` and `base/`; WAY is a key of `WAYS`. Prints what happened as JSON.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import resource
import runpy
import shutil
import signal
import struct
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any


os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub reads it

from transformers import AutoModel, logging

from robustness_tokens.cli.commands import info
from robustness_tokens.hub.adapter_folder import load_adapter
from robustness_tokens.models.injection import find_injector
from robustness_tokens.models.modeling import RobustnessTokenModel


SECONDS_PER_CASE = 10
MEMORY = 1 << 30  # bytes, beyond what the imports took
# What a name in a file must not cause.
FORBIDDEN_EVENTS: tuple[str, ...] = tuple(
    f"os.{name}" for name in ("system", "exec", "posix_spawn", "spawn", "fork", "remove", "rename")
)
FORBIDDEN_EVENTS += ("os.rmdir", "subprocess.", "socket.", "pickle.", "ctypes.", "shutil.", "urllib.", "webbrowser.")

NUMBERS: list[Any] = [0, -1, 1, 2, 3, 31, 33, 2**20, 2**31, 2**63, -(2**64), 10**400, 0.5, 1e308, -0.0]
NUMBERS += [float("nan"), float("inf"), float("-inf")]
TEXTS: list[Any] = ["", " ", "x", "../../x", "/etc/passwd", "file:///etc/passwd", "C:\\x", "a\0b", "\ud800", "\x1b[2J"]
TEXTS += ["evil", "evil.Evil", "user/evil--evil.Evil", "os.system", "__import__('os').system('true')", "AutoModel"]
TEXTS += ["Trainer", "pipeline", "BertModel", "PreTrainedModel", "ViTImageProcessor", "float16", "load", "0" * 64]
TEXTS += ["x" * 100_000, "cls", "token", "${HOME}", "%s%n", "{0.__class__}", "1", "nan", "F32", "I64", "U8", "é"]
NAMES = ["auto_map", "_auto_class", "__class__", "__float__", "trust_remote_code", "attn_implementation", "dtype"]
NAMES += [
    "_attn_implementation",
    "quantization_config",
    "custom_pipelines",
    "__metadata__",
    "per_layer_config",
    "id2label",
]
NAMES += [
    "preprocess",
    "size",
    "device",
    "image_processor_type",
    "feature_extractor_type",
    "return_unused_kwargs",
    "self",
]
NAMES += ["robustness_tokens", "model_type", "architectures", "torch_dtype", "use_fast", "backend", "attribute_map"]


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value] if depth % 2 else {"a": value}
    return value


def odd_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(5 if depth < 2 else 3)
    if kind == 0:
        return rng.choice(NUMBERS)
    if kind == 1:
        return rng.choice(TEXTS)
    if kind == 2:
        return rng.choice([None, True, False, [], {}, [None], {"": None}, nested(40), nested(201)])
    if kind == 3:
        return [odd_value(rng, depth + 1) for _ in range(rng.choice([1, 2, 3, 3, 3, 20]))]
    return {rng.choice(TEXTS[:20] + NAMES): odd_value(rng, depth + 1) for _ in range(rng.choice([1, 1, 2, 5]))}


def change_json(content: Any, rng: random.Random) -> Any:
    """Returns a copy of the JSON with one value, key or element changed, added or removed."""
    spots: list[Any] = []
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict | list):
            spots.append(value)
            waiting += value.values() if isinstance(value, dict) else value
    if not spots:
        return odd_value(rng)
    spot = rng.choice(spots)
    if isinstance(spot, dict):
        key = rng.choice([*spot, rng.choice(NAMES)])
        if rng.random() < 0.15:
            spot.pop(key, None)
        elif rng.random() < 0.15:
            spot[rng.choice([key[:-1], key.upper(), key + "\0", *NAMES])] = spot.pop(key, None)
        else:
            spot[key] = odd_value(rng)
    else:
        spot.insert(rng.randint(0, len(spot)), odd_value(rng))
        if rng.random() < 0.5:
            spot.pop(rng.randrange(len(spot)))
    return content if rng.random() < 0.98 else odd_value(rng)


def change_bytes(content: bytes, rng: random.Random) -> bytes:
    """Returns a copy with bytes flipped, cut, doubled or inserted."""
    at, length = rng.randint(0, len(content)), rng.choice([1, 1, 2, 8, 100])
    kind = rng.randrange(5)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + content[at + length :]
    if kind == 2:
        return content[:at] + rng.randbytes(length) + content[at:]
    if kind == 3:
        return content[:at] + content[at : at + length] * 2 + content[at + length :]
    return content[:at] + bytes(byte ^ (1 << rng.randrange(8)) for byte in content[at : at + 1]) + content[at + 1 :]


def damaged_json(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.25:
        return change_bytes(content, rng)
    changed = json.loads(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        changed = change_json(changed, rng)
    return json.dumps(changed).encode()


def damaged_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Returns a copy with another header (its JSON, length or bytes) or other data."""
    kind = rng.randrange(4)
    if kind == 0:
        return change_bytes(content, rng)
    length = struct.unpack("<Q", content[:8])[0]
    header, data = content[8 : 8 + length], content[8 + length :]
    if kind == 1:
        header = change_bytes(header, rng)
    elif kind == 2:
        header = damaged_json(header.rstrip(), rng)
    else:
        claimed = rng.choice([0, 1, length - 1, length + 1, len(content), 2**31, 2**63, 2**64 - 1, 100_000_001])
        return struct.pack("<Q", claimed) + header + data
    if rng.random() < 0.2:
        data = change_bytes(data, rng)
    return struct.pack("<Q", len(header)) + header + data


DAMAGE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "config.json": damaged_json,
    "model.safetensors": damaged_safetensors,
    "preprocessor_config.json": damaged_json,
    "evaluation.json": damaged_json,
}
ODDS = [4, 4, 2, 1]


class Watch:
    """An audit hook that notes what reading an adapter must never do."""

    def __init__(self, folder: Path) -> None:
        self.trusted = tuple({str(Path(path).resolve()) for path in (*sys.path, sys.prefix, sys.base_prefix) if path})
        self.folder = str(folder)
        self.seen: list[str] = []
        self.is_on = False
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_on:
            return
        if event.startswith(FORBIDDEN_EVENTS):
            self.seen.append(f"{event} {arguments!r:.200}")
        elif event == "exec":
            file = arguments[0].co_filename
            # Names in angle brackets are Python's own: dataclasses and the import system make code.
            if self.folder in file or not (file.startswith("<") or os.path.realpath(file).startswith(self.trusted)):
                self.seen.append(f"exec {file}")
        elif event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not isinstance(path, int):
                self.seen.append(f"open {path!r} to write")


def read(folder: Path, base: Any) -> None:
    adapter = load_adapter(folder)
    _ = adapter.image_processor, adapter.report  # reads them


def load(folder: Path, base: Any) -> None:
    try:
        RobustnessTokenModel.from_pretrained(folder, base_model=base).unload()
    finally:
        assert find_injector(base) is None, "a base that an adapter doesn't fit is left as it was"


def print_info(folder: Path, base: Any) -> None:
    with redirect_stdout(io.StringIO()):
        info(str(folder))


WAYS: dict[str, Callable[[Path, Any], None]] = {"read": read, "load": load, "info": print_info}


def provoke(watch: Watch, folder: Path) -> list[str]:
    """Does forbidden things and returns what the watch noted: this shows that it would notice."""
    watch.seen.clear()
    watch.is_on = True
    runpy.run_path(str(folder / "evil.py"))
    os.system("true")
    pickle.loads(b"cos\nsystem\n.")
    watch.is_on = False
    return [event.split()[0] for event in watch.seen]


def too_long(*_: Any) -> None:
    raise TimeoutError(f"more than {SECONDS_PER_CASE} s")


def main(root: Path, way: str, count: int, seed: int) -> dict[str, Any]:
    logging.set_verbosity_error()
    original, folder = root / "adapter", root / f"damaged_{way}"
    shutil.copytree(original, folder)
    for name in ("evil", "modeling", "configuration"):
        (folder / f"{name}.py").write_text(f"open({str(root / 'ran')!r}, 'w')\nclass Evil: ...\n")
    base = AutoModel.from_pretrained(root / "base")
    for name in WAYS:  # whatever they import lazily is imported now, and the adapter itself is whole
        WAYS[name](folder, base)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, too_long)
    watch, outcomes, failures = Watch(folder), Counter[str](), []
    contents = {name: (original / name).read_bytes() for name in DAMAGE}
    for index in range(count):
        rng = random.Random(f"{seed} {way} {index}")
        name = rng.choices(list(DAMAGE), ODDS)[0]
        (folder / name).write_bytes(DAMAGE[name](contents[name], rng))
        signal.alarm(SECONDS_PER_CASE)
        watch.is_on = True
        try:
            WAYS[way](folder, base)
            outcomes[f"{name} accepted"] += 1
        except ValueError as error:
            outcomes[f"{name} refused"] += 1
            # The file may also be another that it no longer fits; of a fingerprint both bases are named.
            clear = (*(str(folder / other) for other in DAMAGE), "the tokens were trained on", "cannot tell whether")
            if not any(text in str(error) for text in clear):
                failures.append(f"{index} {name}: names no file: {type(error).__name__} {error!s:.300}")
        except BaseException as error:  # also what only a crash or a hang would be
            failures.append(f"{index} {name}: {type(error).__name__} {error!s:.300}")
        finally:
            watch.is_on = False
            signal.alarm(0)
        (folder / name).write_bytes(contents[name])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    kilobytes = grown // 1024 if sys.platform == "darwin" else grown
    ran, seen = (root / "ran").exists(), list(watch.seen)
    heard = provoke(watch, folder)
    return {
        "outcomes": outcomes,
        "failures": failures,
        "seen": seen,
        "kilobytes": kilobytes,
        "ran": ran,
        "heard": heard,
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
