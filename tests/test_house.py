"""The house in order: imports point one way, files are short, nothing heavy comes with models."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A folder may import from those before it, and from itself.
ORDER = ("kernels", "backbones", "data", "heads", "tools")
# Reading the embedded data needs no model, and the models no data.
APART = {"data": {"kernels", "backbones"}}


def imported_folders(file: Path) -> set[str]:
    """The house's folders that a file imports from."""
    names = []
    package = ["linsight", *file.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            names += [f"{base}.{alias.name}" for alias in node.names]
    parts = [name.split(".") for name in names]
    return {p[1] for p in parts if p[0] == "linsight" and len(p) > 1 and p[1] in ORDER}


@pytest.mark.parametrize("folder", ORDER)
def test_imports_point_one_way(folder):
    allowed = set(ORDER[: ORDER.index(folder) + 1]) - APART.get(folder, set())
    for file in sorted((ROOT / folder).rglob("*.py")):
        assert imported_folders(file) <= allowed, file


@pytest.mark.parametrize("folder", ORDER)
def test_a_file_is_read_in_one_sitting(folder):
    for file in sorted((ROOT / folder).rglob("*.py")):
        assert len(file.read_text().splitlines()) <= 500, f"{file}: split it at its natural seam"


def modules_after(statement: str) -> set[str]:
    """Top-level modules that a statement adds to those that timm brings."""
    code = (
        f"import sys, timm; before = set(sys.modules); {statement};"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path("/")
    )
    return set(done.stdout.split())


def test_models_need_neither_mmengine_nor_triton():
    heavy = {"mmengine", "mmcv", "mmdet", "triton", "sklearn", "typer", "rich"}
    assert not modules_after("import linsight") & heavy


def test_digits_need_no_mmengine():
    assert "mmengine" not in modules_after("import linsight.data.digits")
