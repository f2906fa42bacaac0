"""Token mixers: one attention mechanism per file, any of which any skeleton can hold.

Every file of this folder registers its mixers by name; a new one needs no change elsewhere.
"""

from importlib import import_module
from pkgutil import iter_modules

from .base import MIXERS, MixerNames, MixerOptions, TokenMixer, build_mixer

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["MIXERS", "MixerNames", "MixerOptions", "TokenMixer", "build_mixer"]
