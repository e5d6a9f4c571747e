"""The virtual device stands alone."""

from __future__ import annotations

import subprocess
import sys


def test_it_knows_neither_torch_nor_sglang() -> None:
    """And matplotlib is needed where something is drawn, not before."""
    modules = ("device", "timeline", "plot", "races")
    program = "; ".join(
        [f"import sglang_hicache.io_backends.virtual.{module}" for module in modules]
        + ["import sys", "print(sorted({'torch', 'sglang', 'matplotlib', 'cuda'} & set(sys.modules)))"]
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
