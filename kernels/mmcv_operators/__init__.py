"""The operators that mmcv compiles into `mmcv._ext`, for a machine that has no such build.

Import this package before mmdet::

    import linsight.kernels.mmcv_operators

mmcv's Python files import their operators from one module, ``mmcv._ext``, whose C++ sources have
no wheel for current torch. Importing this package puts a module of that name behind the import
system: where nothing else provides ``mmcv._ext``, it is made of torchvision's operators and ours
(`table.py`), on CPU and CUDA, and mmcv and mmdet work as installed by pip. A compiled extension is
found first and wins. Neither mmcv nor mmdet is imported before it is asked for.

An operator that the table lacks exists by name, since mmcv asserts so at import, and raises
NotImplementedError when it is called: the message names the operator and the way out.
"""

import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["install"]

EXTENSION = "mmcv._ext"


def _missing(name: str) -> Callable:
    if name.startswith("__"):
        raise AttributeError(f"module {EXTENSION!r} has no attribute {name!r}")

    def operator(*args, **kwargs):
        raise NotImplementedError(
            f"mmcv's operator {name!r} is not among those that linsight provides where mmcv is "
            "installed without its compiled extension. Install an mmcv that is built for this "
            "version of torch (its extension is then used instead of linsight's table), or "
            "choose a model that does not call the operator"
        )

    operator.__name__ = operator.__qualname__ = name
    return operator


class _Loader(Loader):
    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        from .table import OPERATORS

        module.__doc__ = __doc__
        module.__getattr__ = _missing
        vars(module).update(OPERATORS)


class _Finder(MetaPathFinder):
    """Finds ``mmcv._ext`` after every other finder has failed to."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != EXTENSION:
            return None
        return importlib.util.spec_from_loader(fullname, _Loader(), origin=__name__)


def install() -> None:
    """Provide ``mmcv._ext`` where mmcv has no compiled extension; a second call changes nothing.

    Importing the package calls it. It has to run before mmdet is imported: some versions of mmdet
    replace an operator that they cannot import by a function that raises, for the rest of the
    process. A RuntimeWarning says so where mmdet was imported first.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
        if "mmdet.models" in sys.modules and EXTENSION not in sys.modules:
            warnings.warn(
                "mmdet was imported before linsight.kernels.mmcv_operators and may have given up "
                "on mmcv's operators: import linsight.kernels.mmcv_operators first",
                RuntimeWarning,
                stacklevel=2,
            )


install()
