"""Host memory of a machine and its cgroups, read from trees of files; SGLang reads them alike."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machine_files import V1_UNLIMITED, Machine
from repository import VERSIONS

from sglang_hicache.io_backends.sglang.diagnose import host_memory
from sglang_hicache.io_backends.sglang.diagnose.host_memory import MachineMemory
from sglang_hicache.io_backends.sglang.versions import SUPPORTED

GIB = 2**30


@functools.cache
def sglangs() -> Any:
    """SGLang's module that reads cgroups, without the rest of SGLang."""
    path = VERSIONS / SUPPORTED[-1] / "sglang/srt/mem_cache/host_memory.py"
    spec = importlib.util.spec_from_file_location("sglangs_host_memory", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(machine: Machine) -> MachineMemory:
    found = host_memory.memory(machine.root)
    assert found is not None
    return found


def test_a_machine_without_limits(tmp_path: Path) -> None:
    found = read(Machine(tmp_path, total=64, available=50))
    assert (found.total, found.available, found.limits, found.unread) == (64 * GIB, 50 * GIB, (), "")
    assert found.ever() == (64 * GIB, 64 * GIB, "")
    assert found.now() == (50 * GIB, 50 * GIB, "")


def test_huge_pages_are_nobody_elses(tmp_path: Path) -> None:
    found = read(Machine(tmp_path, total=64, available=30, huge=(20, 5)))
    assert (found.huge, found.huge_free) == (20 * GIB, 5 * GIB)
    assert found.ever().machine == 44 * GIB


def test_huge_pages_of_an_older_kernel(tmp_path: Path) -> None:
    machine = Machine(tmp_path, huge=(20, 5))
    path = machine.root / "proc/meminfo"
    path.write_text("".join(line for line in path.open() if not line.startswith("Hugetlb")))
    assert read(machine).huge == 20 * GIB


@pytest.mark.parametrize("version", [1, 2])
def test_the_smallest_limit_of_all_around(tmp_path: Path, version: int) -> None:
    machine = Machine(tmp_path, cgroup=version, path="/a/b/c")
    machine.limit("/a/b/c", 40, used=1)
    machine.limit("/a/b", None)
    machine.limit("/a", 32, used=30, cache=4)
    found = read(machine)
    assert [(each.bytes, each.free) for each in found.limits] == [
        (40 * GIB, 39 * GIB),
        (32 * GIB, 6 * GIB),
    ]
    assert found.tightest is not None
    assert found.now() == (found.available, 6 * GIB, found.tightest.path)
    assert found.ever() == (found.total, 32 * GIB, found.tightest.path)
    names = {1: "/sys/fs/cgroup/memory/a/memory.limit_in_bytes", 2: "/sys/fs/cgroup/a/memory.max"}
    assert found.tightest.path == names[version]


def test_a_limit_that_throttles_counts(tmp_path: Path) -> None:
    machine = Machine(tmp_path, cgroup=2, path="/a")
    machine.limit("/a", None, high=8)
    assert read(machine).ever().limit == "/sys/fs/cgroup/a/memory.high"


def test_unlimited_in_both_versions(tmp_path: Path) -> None:
    for version, said in ((1, str(V1_UNLIMITED)), (1, str(2**63 - 65536)), (2, "max")):
        machine = Machine(tmp_path / said, cgroup=version, path="/a")
        machine.limit("/a", said)
        assert read(machine).limits == (), said


def test_the_root_cgroup_has_no_files(tmp_path: Path) -> None:
    assert read(Machine(tmp_path, cgroup=2, path="/")).limits == ()


def test_a_namespace_of_its_own(tmp_path: Path) -> None:
    """The mount is told by the host's path, the process by its own: `docker run` with cgroup v1."""
    machine = Machine(tmp_path, cgroup=1, path="/", mounted="/docker/0123")
    machine.limit("/", 16, used=1)
    assert read(machine).ever().within == 16 * GIB


@pytest.mark.parametrize("file", ["memory.current", "memory.stat", "memory.max"])
@pytest.mark.parametrize("text", [None, "", "many\n"])
def test_what_cannot_be_read_is_said(tmp_path: Path, file: str, text: str | None) -> None:
    """As root every file can be read: one that is not there, a folder and nonsense stand for it."""
    machine = Machine(tmp_path, cgroup=2, path="/a")
    machine.limit("/a", 16, used=1)
    path = machine.folder("/a") / file
    path.unlink()
    if text is None and file == "memory.max":
        path.mkdir()
    elif text is not None:
        path.write_text(text)
    found = read(machine)
    assert found.unread
    assert found.limits == ()


def test_a_cgroup_that_is_nowhere_is_said(tmp_path: Path) -> None:
    for path in ("/not/there", "/../outside"):
        machine = Machine(tmp_path / path.strip("/."), cgroup=2, path="/a")
        (machine.root / "proc/self/cgroup").write_text(f"0::{path}\n")
        assert "cgroup" in read(machine).unread, path


@pytest.mark.parametrize("text", [None, "", "MemTotal: many kB\n", "MemTotal: 1 kB\n"])
def test_no_meminfo(tmp_path: Path, text: str | None) -> None:
    machine = Machine(tmp_path)
    (machine.root / "proc/meminfo").unlink()
    if text is not None:
        (machine.root / "proc/meminfo").write_text(text)
    assert host_memory.memory(machine.root) is None


sizes = st.one_of(st.none(), st.integers(0, 64))
levels = st.fixed_dictionaries(
    {
        "limit": sizes,
        "high": sizes,
        "used": st.integers(0, 64),
        "cache": st.integers(0, 64),
        "protected": st.booleans(),
    }
)


@settings(deadline=None, max_examples=60)
@given(version=st.sampled_from([1, 2]), each=st.lists(levels, min_size=1, max_size=4))
def test_what_is_left_is_what_sglang_takes_for_it(
    tmp_path_factory: pytest.TempPathFactory, version: int, each: list[Mapping[str, Any]]
) -> None:
    path = "".join(f"/level{index}" for index in range(len(each)))
    machine = Machine(tmp_path_factory.mktemp("machine"), cgroup=version, path=path)
    for index, level in enumerate(each):
        machine.limit("".join(f"/level{i}" for i in range(index + 1)), **level)
    expected = sglangs()._cgroup_memory_headroom(machine.proc_of_absolute_paths())
    found = read(machine)
    assert not found.unread
    # To SGLang v1's number for no limit is one, and what is used is less of it.
    left = min((limit.free for limit in found.limits), default=None)
    assert left == (None if expected is None or expected > 2**62 else expected)
