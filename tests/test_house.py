"""The house in order: imports point one way, nothing heavy comes with models."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A folder may import from those before it, and from itself.
ORDER = ("kernels", "backbones", "data", "heads", "tools")
# Reading the embedded data needs no model, and the models no data.
APART = {"data": {"kernels", "backbones"}}
# Whatever imports mmdet imports first what mmdet's operators come from.
STAND_IN = "linsight.kernels.mmcv_operators"


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
    parts = [name.split(".") for name in names if name != STAND_IN]
    return {p[1] for p in parts if p[0] == "linsight" and len(p) > 1 and p[1] in ORDER}


@pytest.mark.parametrize("folder", ORDER)
def test_imports_point_one_way(folder):
    allowed = set(ORDER[: ORDER.index(folder) + 1]) - APART.get(folder, set())
    for file in sorted((ROOT / folder).rglob("*.py")):
        assert imported_folders(file) <= allowed, file


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """What two imports change in one process that has imported timm: lists of names by their keys.

    A key is a statement, for the top-level modules that are new after it, or says what is new after
    the first one: "finders" of modules, "operators" of mmcv, and "models" of timm, which are to be
    those of the "zoo".
    """
    code = """
import json, sys, timm
modules, finders, models = set(sys.modules), list(sys.meta_path), set(timm.list_models())
def new():
    return sorted({name.split('.')[0] for name in set(sys.modules) - modules})
import linsight
found = {"import linsight": new()}
found["finders"] = [str(finder) for finder in sys.meta_path if finder not in finders]
found["operators"] = [name for name in sys.modules if name == "linsight.kernels.mmcv_operators"]
found["models"] = sorted(set(timm.list_models()) - models)
found["zoo"] = sorted(linsight.backbones.ZOO)
import linsight.data.digits
found["import linsight.data.digits"] = new()
print(json.dumps(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path("/")
    )
    return {key: set(names) for key, names in json.loads(done.stdout).items()}


def test_models_need_neither_mmengine_nor_triton(imports):
    heavy = {"mmengine", "mmcv", "mmdet", "triton", "sklearn", "typer", "rich"}
    assert not imports["import linsight"] & heavy


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["models", "rala_*"], ["configs", "*digits"]]
)
def test_commands_that_only_list_import_neither_torch_nor_linsight(words):
    code = (
        f"import sys; sys.argv = ['linsight', *{words}]; from linsight_command import main\n"
        "try: main()\n"
        "finally: print(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "rala_vit_nano" in done.stdout or words[0].startswith("--")
    imported = set(done.stderr.split())
    assert "typer" in imported
    assert not imported & {"torch", "timm", "mmengine", "numpy", "linsight"}


def test_importing_models_changes_nothing_else(imports):
    assert imports["finders"] == imports["operators"] == set()
    assert imports["models"] == imports["zoo"] != set()


def test_other_packages_stay_as_they_are():
    """No function of another package is replaced: subclass, register or pass instead."""
    code = """
import sys, types
import mmengine.config, mmengine.fileio, mmengine.hooks, mmengine.logging, mmengine.model
import mmengine.optim, mmengine.registry, mmengine.runner, timm.data, timm.optim, torch

def attributes():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in ("mmengine", "timm", "torchvision", "logging"):
            continue
        owners = [module] + [x for x in vars(module).values() if isinstance(x, type)]
        for owner in owners:
            for key, value in vars(owner).items():
                if isinstance(value, (types.FunctionType, staticmethod, classmethod)):
                    found[name, getattr(owner, "__qualname__", ""), key] = value
        if name == "timm.data.auto_augment":
            found |= {(name, "NAME_TO_OP", key): x for key, x in module.NAME_TO_OP.items()}
        if name == "mmengine.fileio.backends.registry_utils":
            found |= {(name, "backends", key): x for key, x in module.backends.items()}
        if name == "mmengine.runner.checkpoint":
            schemes = module.CheckpointLoader._schemes
            found |= {(name, "schemes", key): x for key, x in schemes.items()}
    return found

before = attributes()
import linsight.data.classification, linsight.data.segmentation, linsight.heads
import linsight.tools.config, linsight_command
for command in linsight_command.COMMANDS:
    linsight_command.load(command)
after = attributes()
changed = [key for key, value in before.items() if after[key] is not value]
assert not changed, changed
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path("/"))


def test_digits_need_no_mmengine(imports):
    assert "mmengine" not in imports["import linsight.data.digits"]
