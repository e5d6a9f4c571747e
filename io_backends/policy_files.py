"""Policies, checked against the backends that are registered in this process."""

from __future__ import annotations

import os
from typing import Any

from ..policy.format import json_schema, load
from ..policy.format.layers import Policy
from .registry import BACKENDS


def policy_in_force(path: str | os.PathLike[str] | None = None) -> Policy:
    """See :func:`~sglang_hicache.policy.format.load.policy_in_force`."""
    return load.policy_in_force(BACKENDS, path)


def default_policy() -> Policy:
    """The policy that this package ships."""
    return load.default_policy(BACKENDS)


def load_policy(path: str | os.PathLike[str]) -> Policy:
    """The policy in the file at `path`. Raises PolicyError, also for a file that cannot be read."""
    return load.load_policy(BACKENDS, path)


def load_policy_text(text: str, filename: str) -> Policy:
    """The policy written in `text`; `filename` is what errors call it. Raises PolicyError."""
    return load.load_policy_text(BACKENDS, text, filename)


def policy_json_schema() -> dict[str, Any]:
    """The policy format as JSON Schema, with these backends and their options."""
    return json_schema.policy_json_schema(BACKENDS)
