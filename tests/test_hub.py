"""`torch.hub` on a checkout, in which linsight is not installed."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = """
import sys
# What `pip install -e` puts there.
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
import torch

root = sys.argv[1]
model = torch.hub.load(root, "rala_vit_nano", source="local", num_classes=3).eval()
assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)

import linsight
assert linsight.__file__ == f"{root}/linsight/__init__.py"
sys.path.insert(0, root)
import hubconf
# As torch.hub.list and torch.hub.help find them.
names = {name for name in dir(hubconf) if callable(getattr(hubconf, name)) and name[0] != "_"}
assert names == set(linsight.backbones.ZOO), names
assert "timm.create_model('rala_vit_nano'" in hubconf.rala_vit_nano.__doc__
print("done")
"""


def test_models_by_name(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(ROOT)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.endswith("done\n"), done.stderr
