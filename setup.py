"""Rewrites the README's links to files, which a package index does not have.

They lead to the Repository in `[project.urls]` of pyproject.toml; without one, only their text stays.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup


ROOT = Path(__file__).parent
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {}).get("Repository")

setup(
    long_description=re.sub(
        r"\[([^]]+)\]\((?!https?:)([^)]+)\)",
        rf"[\1]({REPOSITORY}/blob/main/\2)" if REPOSITORY else r"\1",
        (ROOT / "README.md").read_text(encoding="utf-8"),
    ),
    long_description_content_type="text/markdown",
)
