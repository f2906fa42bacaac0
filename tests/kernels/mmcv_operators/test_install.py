"""Who provides `mmcv._ext`: a compiled extension where there is one, the table where not."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def mmcv(tmp_path: Path) -> Path:
    """A package that calls itself mmcv, in front of an installed one."""
    package = tmp_path / "mmcv"
    package.mkdir()
    (package / "__init__.py").touch()
    return package


def outcome(mmcv: Path, code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=mmcv.parent,
        timeout=120,
    )
    return done.stdout.strip()


def test_table_where_nothing_is_compiled(mmcv):
    """And an operator that it lacks is there, and names itself when called."""
    code = (
        "import sys, linsight.kernels.mmcv_operators as operators, mmcv._ext as table\n"
        "print(table.nms.__module__)\n"
        "before = len(sys.meta_path); operators.install()\n"
        "print(len(sys.meta_path) - before)\n"
        "assert hasattr(table, 'some_operator')\n"
        "try: table.some_operator(1, key=2)\n"
        "except NotImplementedError as error: print(error)"
    )
    home, installed_again, message = outcome(mmcv, code).splitlines()
    assert home == "linsight.kernels.mmcv_operators.boxes"
    assert installed_again == "0"
    assert "'some_operator'" in message
    assert "Install an mmcv" in message


def test_compiled_extension_wins(mmcv):
    (mmcv / "_ext.py").write_text("nms = 'compiled'")
    code = "import linsight.kernels.mmcv_operators, mmcv._ext; print(mmcv._ext.nms)"
    assert outcome(mmcv, code) == "compiled"


def test_too_late_is_said(mmcv):
    code = (
        "import sys, types, warnings\n"
        "sys.modules['mmdet.models'] = types.ModuleType('mmdet.models')\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import linsight.kernels.mmcv_operators\n"
        "print([str(w.message) for w in caught if 'mmcv_operators first' in str(w.message)])"
    )
    assert "mmdet was imported before linsight.kernels.mmcv_operators" in outcome(mmcv, code)
