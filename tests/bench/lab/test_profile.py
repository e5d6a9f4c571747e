"""What a run of the profile leaves behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

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


def test_what_is_copied_and_read_beside_a_write(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    device = open_bench(True)
    reads = SimpleNamespace(read=lambda values: read.append(values.nbytes))
    monkeypatch.setattr(device, "small_reads", lambda: reads, raising=False)
    copies = profile._copies_of_forwards(device)
    copied: list[tuple[int, int]] = []
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda target, source, **_: copied.append((target.nbytes, source.nbytes))
    )
    assert copies.pop("pageable_")().nbytes == 12  # type: ignore[attr-defined]
    for kind in ("", "from_host_", "on_device_", "by_kernel_"):
        copies.pop(kind)()
    assert copied == [(n, n) for n in (1024, 1024, 2**24)]
    assert (read, copies) == ([12], {})


@pytest.mark.parametrize(
    ("only", "parts"),
    [
        (["alone"], {"gather", "shape", "sm_store", "drain", "order"}),
        (["write"], {"write"}),
        (["small_copy"], {"small_copy"}),
        (["turns"], {"turns"}),
        (["beside"], {"beside"}),
    ],
)
def test_only_what_is_asked_for_is_measured(only: list[str], parts: set[str]) -> None:
    found = {part.part for part in profile.measure(open_bench(True), profile.on_cpu(), only)}
    assert found <= parts
    assert found
