"""The zoo: one file per paper registers its models, one row per model.

A new paper adds its file and its row in `papers`; nothing else names it.
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
