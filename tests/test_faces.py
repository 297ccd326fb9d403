"""From outside, a wing of the package is imported by its `__init__` alone; tests may look inside."""

import ast
from importlib.util import resolve_name
from pathlib import Path


ROOT = Path(__file__).parents[1]


def imported(path: Path) -> set[tuple[str, ...]]:
    """Modules of the package that a file imports, as parts of their names."""
    package = ".".join(path.relative_to(ROOT).parts[:-1])
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
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
        for parts in imported(path)
        if len(parts) > 2 and parts[:2] != path.relative_to(ROOT).parts[:2]
    ]
    assert inside == []
