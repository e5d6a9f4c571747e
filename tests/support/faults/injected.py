"""Runs code in a process of SGLang right after one of its modules was imported."""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import os
import sys
from typing import Any

FAULT = "INJECTED_FAULT"
"""Variable that holds the fault as JSON: ``where``, ``module`` and ``code``."""

LAUNCHER, CHILDREN = "launcher", "children"
"""Where a fault goes: the process that was started, or those that it spawned."""


def inject(here: str) -> None:
    """Inject what the variable says into this process, if ``here`` is where it goes."""
    if not (said := os.environ.get(FAULT)):
        return
    fault = json.loads(said)
    if fault["where"] != here:
        return
    if module := sys.modules.get(fault["module"]):
        exec(fault["code"], vars(module))
    else:
        sys.meta_path.insert(0, _Finder(fault["module"], fault["code"]))


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, module: str, code: str) -> None:
        self._module, self._code = module, code

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self._module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        run = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            exec(self._code, vars(module))

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
