# SPDX-License-Identifier: Apache-2.0
"""One backbone paper, one file. Importing this package registers every model."""

import importlib
import pkgutil

for _found in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_found.name}")
