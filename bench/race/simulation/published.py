"""What the loaded SGLang orders by itself: read from its code, not from its version."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from ....io_backends.sglang.versions import RELEASES

SIMULATED = tuple(release.version for release in RELEASES if release.one_radix_cache)
"""Releases whose cache the modelled scheduler drives. Before, SGLang had other trees and other calls."""

_SCHEDULER = "sglang.srt.managers.scheduler"


@dataclass(frozen=True, slots=True)
class Published:
    """Fences of the SGLang that this process imports.

    Attributes:
        load_fence: H2D loads wait for the forward (``load_fence_stream``).
        write_fence: D2H writes wait for the forward (``write_fence_stream``).
        forward_fence: ``Scheduler.run_batch`` makes the forward stream wait for something but the schedule
        stream.
    """

    version: str
    load_fence: bool
    write_fence: bool
    forward_fence: bool

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    def __str__(self) -> str:
        said = {
            "H2D waits for the forward": self.load_fence,
            "D2H waits for the forward": self.write_fence,
            "the forward waits for D2H": self.forward_fence,
        }
        return f"SGLang {self.version}: " + ", ".join(
            f"{what}: {'yes' if has else 'no'}" for what, has in said.items()
        )


@cache
def published() -> Published:
    """Raises ImportError where SGLang cannot be imported."""
    from sglang.version import __version__

    spec = importlib.util.find_spec(_SCHEDULER)
    if spec is None or spec.origin is None:
        raise ImportError(f"{_SCHEDULER} has no source file")
    source = Path(spec.origin).read_text(encoding="utf-8")
    return Published(
        version=str(__version__),
        load_fence=_sets(source, "load_fence_stream"),
        write_fence=_sets(source, "write_fence_stream"),
        forward_fence="forward_stream.wait_event(" in _body(source, "run_batch"),
    )


def _sets(source: str, name: str) -> bool:
    """Whether the scheduler hands its forward stream to the controller under this name."""
    return re.search(rf"\.{name} = \(?\s*self\.", source) is not None


def _body(source: str, method: str) -> str:
    """A method of the class, up to the next one."""
    found = re.search(rf"\n    def {method}\(.*?(?=\n    def |\n    @)", source, re.DOTALL)
    return found.group() if found else ""
