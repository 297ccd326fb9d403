"""Adapters as the Hub's cache holds them."""

import shutil
from pathlib import Path


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cache_as_repo(folder: Path, cache_dir: Path, repo_id: str = "user/adapter") -> Path:
    """Puts a folder into a Hub cache, as if it had been downloaded."""
    repo = cache_dir / f"models--{repo_id.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    return Path(shutil.copytree(folder, repo / "snapshots" / COMMIT))
