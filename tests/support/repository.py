"""Where this checkout and what it unpacked are."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
VERSIONS = ROOT / ".sglang-versions"
"""The supported releases of SGLang, unpacked (``make versions``)."""
