"""The Lightning that the user runs: ``pytorch_lightning``, ``lightning.pytorch``, or both.

The two are the same code under two names, and each knows only its own base classes: a callback of one is refused by the
command line of the other, and an exception of one is not caught as the other's. What is defined here therefore gets its base
classes from whichever is imported, before us or after us, and nothing here imports either.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

__all__ = [
    "Callback",
    "LightningModule",
    "MisconfigurationException",
    "Trainer",
    "rank_zero_info",
    "rank_zero_warn",
]

if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.utilities.exceptions import MisconfigurationException
else:
    LightningModule = Trainer = Any  # they stand in annotations only

    # A class cannot be given other bases than `object` later on, but other bases than one like this.
    class _Plain:
        pass

    class _PlainError(Exception):
        pass

    class Callback(_Plain):
        """Base class of our callbacks: a ``Callback`` of every Lightning that is imported."""

    class MisconfigurationException(_PlainError):
        """The exception of that name of every Lightning that is imported."""

    _DEFINED_IN = {
        "pytorch_lightning.callbacks.callback": Callback,
        "lightning.pytorch.callbacks.callback": Callback,
        "lightning_fabric.utilities.exceptions": MisconfigurationException,
        "lightning.fabric.utilities.exceptions": MisconfigurationException,
    }

    def _adopt(module: ModuleType) -> None:
        """Inherit from the class of the same name in one of Lightning's modules, too."""
        ours = _DEFINED_IN[module.__name__]
        kept = tuple(base for base in ours.__bases__ if base not in (_Plain, _PlainError))
        ours.__bases__ = (*kept, getattr(module, ours.__name__))

    class _Watch(MetaPathFinder):
        """Notices when one of these modules is imported."""

        def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
            if name not in _DEFINED_IN:
                return None
            others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
            spec = next((found for found in others if found is not None), None)
            if spec is not None and spec.loader is not None:
                execute = spec.loader.exec_module

                def exec_module(module: ModuleType) -> None:
                    execute(module)
                    _adopt(module)

                spec.loader.exec_module = exec_module
            return spec

    for _name in _DEFINED_IN:
        if _name in sys.modules:
            _adopt(sys.modules[_name])
    sys.meta_path.insert(0, _Watch())
