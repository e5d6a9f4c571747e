"""What a run of the profile leaves behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_hicache.bench.lab import profile
from sglang_hicache.bench.lab.profile_alone import ProfiledPart
from sglang_hicache.bench.measure.results import CPU_WATERMARK, Spread


def test_who_is_stopped_loses_the_part_that_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_: object) -> Iterator[ProfiledPart]:
        for number in (1, 2):
            yield ProfiledPart("gather", f"{number}", {"ms": Spread(1.0, 1.0, 1.0, 1)})
        raise KeyboardInterrupt

    monkeypatch.setattr(profile, "measure", measure)
    out = tmp_path / "profile.json"
    with pytest.raises(KeyboardInterrupt):
        profile.profile(out, cpu=True)
    saved = json.loads(out.read_text(encoding="utf-8"))
    assert [part["what"] for part in saved["parts"]] == ["1", "2"]
    assert (saved["ran_on"], saved["watermark"]) == ("CPU", CPU_WATERMARK)
