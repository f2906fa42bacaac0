"""The embedded data set, and readers for the real ones.

Importing it registers them with mmengine.
"""

from . import classification

__all__ = ["classification"]
