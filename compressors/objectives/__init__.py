"""Training objectives, one file each. Every module in this folder is imported, so that its objective registers itself."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
