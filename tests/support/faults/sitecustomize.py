"""Imported by Python itself as it starts, where this folder is on ``PYTHONPATH``."""

import sys

import injected

spawned = any("multiprocessing.spawn" in word for word in getattr(sys, "orig_argv", []))
injected.inject(injected.CHILDREN if spawned else injected.LAUNCHER)
