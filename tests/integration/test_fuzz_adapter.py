"""Damaged adapters are refused with a clear error, thousands of them (see adapter_fuzzer.py)."""

import json
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.adapter_fuzzer import damaged_json, damaged_safetensors
from tests.support.reports import MEASURED, make_report


@pytest.fixture
def fuzzed(adapter_folder: Path, base_folders: dict[str, Path], tmp_path: Path) -> Path:
    """A folder with a whole adapter, report included, and its base."""
    make_report(**MEASURED).save(adapter_folder)
    shutil.copytree(base_folders["dinov2"], tmp_path / "base")
    return tmp_path


def fuzz(folder: Path, way: str, count: int, seed: int = 0) -> dict[str, Any]:
    command = [
        sys.executable,
        str(Path(__file__).parents[1] / "support" / "adapter_fuzzer.py"),
        str(folder),
        way,
        str(count),
        str(seed),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    assert result.returncode == 0, f"crashed: {result.stderr[-2000:]}"
    outcome: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return outcome


def check(outcome: dict[str, Any], count: int) -> None:
    assert outcome["failures"] == []
    assert outcome["seen"] == [], "something was run, removed, or written"
    assert set(outcome["heard"]) == {"exec", "open", "os.system", "pickle.find_class"}, "the watch was deaf"
    assert not outcome["ran"], "code beside the adapter was run"
    assert outcome["kilobytes"] < 1 << 20
    assert sum(outcome["outcomes"].values()) == count


def test_damaged_files_are_refused(fuzzed: Path) -> None:
    outcome = fuzz(fuzzed, "read", 2750)
    check(outcome, 2750)
    for name in ("config.json", "model.safetensors", "preprocessor_config.json", "evaluation.json"):
        assert outcome["outcomes"][f"{name} refused"] > 125
        assert outcome["outcomes"][f"{name} accepted"] > 5, "some damage does no harm, so these were read to the end"


@pytest.mark.slow
@pytest.mark.parametrize(("way", "count"), [("read", 50_000), ("load", 5000), ("info", 3000)])
def test_damaged_files_are_refused_by_every_way_in(fuzzed: Path, way: str, count: int) -> None:
    check(fuzz(fuzzed, way, count, seed=1), count)


def test_the_damage_is_the_same_in_every_run() -> None:
    header = json.dumps({"robustness_tokens": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}}).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(8)
    for seed in range(50):
        for damage, data in ((damaged_json, header), (damaged_safetensors, content)):
            assert damage(data, random.Random(seed)) == damage(data, random.Random(seed))
