"""The package as an index gets it: sdist and wheel are built, checked, and the wheel is installed."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from robustness_tokens import __version__


ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (find_spec("build") and find_spec("twine")), reason="needs the extra dev"),
]


def run(*words: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist of the files that git tracks, and the wheel built from it."""
    folder = tmp_path_factory.mktemp("packaging")
    tracked = run("git", "ls-files", cwd=ROOT).splitlines()
    for name in tracked:
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--outdir", folder / "dist", folder / "source", cwd=folder)
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    (wheel,) = (folder / "dist").glob("*.whl")
    return sdist, wheel


def test_an_index_takes_them(distributions: tuple[Path, Path]) -> None:
    run(sys.executable, "-m", "twine", "check", "--strict", *distributions, cwd=ROOT)


def test_the_index_page_has_no_dead_link(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[1]) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        page = archive.read(name).decode()
    links = re.findall(r"\]\(([^)]*)\)", page)
    assert links
    assert [link for link in links if not link.startswith("https://")] == []
    assert "docs/training_at_scale.md" in page


def test_they_hold_the_package_whole_and_no_test(distributions: tuple[Path, Path]) -> None:
    sdist, wheel = distributions
    tracked = run("git", "ls-files", "robustness_tokens", "robtok.py", cwd=ROOT).splitlines()
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    assert set(tracked) <= in_sdist
    assert set(tracked) <= in_wheel
    assert not [name for name in in_sdist | in_wheel if name.startswith("tests")]


def test_the_wheel_runs_in_a_clean_environment(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    """Without its dependencies: help and version need none."""
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    run(tmp_path / "venv/bin/pip", "install", "--no-deps", distributions[1], cwd=tmp_path)
    assert run(tmp_path / "venv/bin/robtok", "--version", cwd=tmp_path).strip() == __version__
    assert "import-tokens" in run(tmp_path / "venv/bin/robtok", "--help", cwd=tmp_path)
