"""What stands on a backbone: classification, and later segmentation and detection.

Importing it registers everything here with mmengine.
"""

from . import checkpoint, classification, figures, hooks, optim

__all__ = ["checkpoint", "classification", "figures", "hooks", "optim"]
