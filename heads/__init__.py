"""What stands on a backbone: classification and detection, and later segmentation.

Importing it registers everything here with mmengine.
"""

from . import checkpoint, classification, detection, figures, hooks, optim

__all__ = ["checkpoint", "classification", "detection", "figures", "hooks", "optim"]
