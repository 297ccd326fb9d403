import ast
import re
from pathlib import Path

import pytest

import robustness_tokens


PACKAGE = Path(robustness_tokens.__file__).parent

# A module may import those before it in this list, and no other.
PICTURE = Path(__file__).parent.parent / "CONTRIBUTING.md"
# The modules in the order of the picture in CONTRIBUTING.md: two spaces deep, `name.py` or `name/`.
ORDER = tuple(re.findall(r"^  (\w+)(?:\.py|/) ", PICTURE.read_text(encoding="utf-8"), flags=re.MULTILINE))


def imported_modules(source: str, package: tuple[str, ...]) -> set[str]:
    """The top-level modules of robustness_tokens that a source imports, wherever in it; `package` is where it lies."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            anchor = package[: len(package) + 1 - node.level] if node.level else ()
            module = (*anchor, *(node.module or "").split(".")) if node.module else anchor
            targets = [(*module, alias.name) for alias in node.names]
        else:
            continue
        found |= {target[1] for target in targets if target[0] == PACKAGE.name and len(target) > 1}
    return found


def package_imports() -> dict[Path, set[str]]:
    imports = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        package = (PACKAGE.name, *path.relative_to(PACKAGE).parent.parts)
        imports[path.relative_to(PACKAGE)] = imported_modules(path.read_text(encoding="utf-8"), package)
    return imports


IMPORTS = package_imports()


@pytest.mark.parametrize(
    ("source", "package", "expected"),
    [
        ("from .hub import read_json", ("robustness_tokens",), {"hub"}),
        ("from . import hub, cli", ("robustness_tokens",), {"hub", "cli"}),
        ("from ..hub import read_json", ("robustness_tokens", "attacks"), {"hub"}),
        ("from .pgd import pgd_attack", ("robustness_tokens", "attacks"), {"attacks"}),
        ("import robustness_tokens.hub as h", ("robustness_tokens",), {"hub"}),
        ("from robustness_tokens.hub import x", ("robustness_tokens", "attacks"), {"hub"}),
        ("def f():\n    from robustness_tokens import hub", ("robustness_tokens",), {"hub"}),
        ("import torch\nfrom transformers import hub", ("robustness_tokens",), set()),
    ],
)
def test_the_reader_of_imports_sees_every_form(source: str, package: tuple[str, ...], expected: set[str]) -> None:
    assert imported_modules(source, package) == expected


def test_every_module_has_its_place_in_the_order() -> None:
    tops = {path.parts[0].removesuffix(".py") for path in IMPORTS} - {"__init__"}
    assert tops == set(ORDER), "the picture in CONTRIBUTING.md is the tree"


@pytest.mark.parametrize("path", [path for path in IMPORTS if path.parts != ("__init__.py",)], ids=str)
def test_a_module_imports_only_modules_above_it(path: Path) -> None:
    own = path.parts[0].removesuffix(".py")
    allowed = set(ORDER[: ORDER.index(own)]) | ({own} if len(path.parts) > 1 else set())
    # The package itself holds the version; its public names would close a circle.
    assert IMPORTS[path] - {"__version__"} <= allowed


def test_attacks_import_nothing_of_the_package() -> None:
    assert {module for path, found in IMPORTS.items() if path.parts[0] == "attacks" for module in found} == {"attacks"}
