"""The package's source beside an adapter, for those who load it with `trust_remote_code=True` and without the package.

transformers fetches single modules that lie in one folder, no packages: so each module that the models need is written
flat (`report/schema.py` as `report_schema.py`), and its relative imports are renamed to match.
"""

from __future__ import annotations

import re
from importlib.util import find_spec, resolve_name
from pathlib import Path


_RELATIVE_IMPORT = re.compile(r"^(?P<indent> *)from (?P<module>\.+[\w.]*) import (?P<names>.*)", flags=re.MULTILINE)


def source_files(module: str) -> dict[str, str]:
    """The source of a module of this package, and of every module that it imports relatively.

    Args:
        module: Name inside the package, such as `"modeling"`.

    Returns:
        Sources by file name.
    """
    package = __package__
    assert package is not None
    files: dict[str, str] = {}
    waiting = [f"{package}.{module}"]
    while waiting:
        name = waiting.pop()
        file = f"{_flat(name, package)}.py"
        if file in files:
            continue
        spec = find_spec(name)
        assert spec is not None, f"{name} is a module"
        assert spec.origin is not None, f"{name} is a source file"
        assert spec.parent is not None, f"{name} is in a package"
        files[file], imported = _flatten(Path(spec.origin).read_text(encoding="utf-8"), spec.parent, package)
        waiting += imported
    return files


def _flatten(source: str, parent: str, package: str) -> tuple[str, list[str]]:
    """A source with flat relative imports, and the whole names of the modules that it imports."""
    imported = []

    def flatten(match: re.Match[str]) -> str:
        target = resolve_name(match["module"], parent)
        if target != package:
            imported.append(target)
            return f"{match['indent']}from .{_flat(target, package)} import {match['names']}"
        imported.extend(f"{package}.{name.strip()}" for name in match["names"].split(","))
        return f"{match['indent']}from . import {match['names']}"

    return _RELATIVE_IMPORT.sub(flatten, source), imported


def _flat(name: str, package: str) -> str:
    return name.removeprefix(f"{package}.").replace(".", "_")
