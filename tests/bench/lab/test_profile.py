"""What a run of the profile leaves behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_hicache.bench.lab import profile
from sglang_hicache.bench.lab.profile_alone import ProfiledPart
from sglang_hicache.bench.measure.devices import open_bench
from sglang_hicache.bench.measure.one_write import Setting
from sglang_hicache.bench.measure.results import CPU_WATERMARK, Spread
from sglang_hicache.io_backends.policy_files import default_policy


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


def test_each_kind_of_copy_that_forwards_make_is_timed_beside_a_write() -> None:
    size = profile.on_cpu()
    setting = Setting(open_bench(True), default_policy(), 1, ("hybrid",))
    (part,) = profile._small_copies(setting, size.long[0], 1)
    assert part.part == "small_copy"
    times = ("alone_us", "first_us", "median_us", "most_us")
    kinds = ("", "pageable_", "from_host_", "on_device_")
    assert {name for name in part.metrics if name.endswith(times)} == {a + b for a in kinds for b in times}
    copies = profile._copies_of_forwards(setting.device)
    assert [copies[kind][0].nbytes for kind in kinds] == [1024, 12, 1024, 2**24]
    assert all(target.nbytes == source.nbytes for target, source in copies.values())
