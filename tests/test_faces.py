"""From outside, a wing of the package is imported by its `__init__` alone; tests may look inside."""

import ast
import re
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import robustness_tokens


ROOT = Path(__file__).parents[1]


def imported(code: str, package: str) -> set[tuple[str, ...]]:
    """Returns the modules of the package that code imports, as parts of their names."""
    modules = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            modules |= {f"{base}.{alias.name}" for alias in node.names} if node.module is None else {base}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    return {tuple(name.split(".")) for name in modules if name.split(".")[0] == "robustness_tokens"}


def test_a_wing_is_imported_by_its_face() -> None:
    files = [
        path for folder in ("robustness_tokens", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    ]
    assert len(files) > 80
    inside = [
        (str(path.relative_to(ROOT)), ".".join(parts))
        for path in files
        for parts in imported(path.read_text(encoding="utf-8"), ".".join(path.relative_to(ROOT).parts[:-1]))
        if len(parts) > 2 and parts[:2] != path.relative_to(ROOT).parts[:2]
    ]
    assert inside == []


def documented_code() -> Iterator[tuple[str, str]]:
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")):
        for code in re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
            yield path.name, code


def test_the_documents_import_public_names() -> None:
    blocks = list(documented_code())
    assert len(blocks) >= 4
    for name, code in blocks:
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "robustness_tokens":
                assert node.module == "robustness_tokens", f"{name}: {ast.unparse(node)}"
                assert {alias.name for alias in node.names} <= set(robustness_tokens.__all__), name
        assert all(parts == ("robustness_tokens",) for parts in imported(code, "")), name
