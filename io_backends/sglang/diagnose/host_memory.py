"""Host memory that a machine has, and the cgroups of this process leave of it.

Files are read below a root folder, so that another tree than this machine's can be looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple


class Room(NamedTuple):
    """Bytes: of the whole machine, and within the limits of cgroups too; the file that says less, if any."""

    machine: int
    within: int
    limit: str = ""


@dataclass(frozen=True)
class Limit:
    """A limit of a cgroup that this process is in, or of one around it.

    Attributes:
        path: the file that says so.
        bytes: that its processes may have.
        free: of these, with pages of files as the kernel takes them back; not below 0.
    """

    path: str
    bytes: int
    free: int


@dataclass(frozen=True)
class MachineMemory:
    """A machine's, in bytes.

    Attributes:
        total: of the machine.
        available: without swapping, as the kernel estimates it.
        huge: set aside as huge pages, which nothing else can use.
        huge_free: of these, what nobody uses.
        limits: of cgroups, from the innermost outwards.
        unread: why limits could not be read; empty if they were.
    """

    total: int
    available: int
    huge: int = 0
    huge_free: int = 0
    limits: tuple[Limit, ...] = ()
    unread: str = ""

    @property
    def tightest(self) -> Limit | None:
        """The limit with the least left."""
        return min(self.limits, key=lambda limit: limit.free, default=None)

    def ever(self) -> Room:
        """What processes can have when nothing else runs."""
        return _room(self.total - self.huge, [(limit.bytes, limit.path) for limit in self.limits])

    def now(self) -> Room:
        """What is free."""
        return _room(self.available, [(limit.free, limit.path) for limit in self.limits])


def _room(machine: int, limits: Sequence[tuple[int, str]]) -> Room:
    return Room(machine, *min([(machine, ""), *limits]))


def memory(root: Path) -> MachineMemory | None:
    """As the files below `root` say; None where they say nothing (no Linux)."""
    try:
        text = (root / "proc/meminfo").read_text(encoding="ascii")
        fields = {name: int(value.split()[0]) for name, value in re.findall(r"^(\w+): *(\d.*)$", text, re.M)}
        total, available = fields["MemTotal"] * 1024, fields["MemAvailable"] * 1024
    except (OSError, ValueError, KeyError):
        return None
    size = fields.get("Hugepagesize", 0) * 1024
    huge = fields.get("Hugetlb", 0) * 1024 or fields.get("HugePages_Total", 0) * size
    limits, unread = list[Limit](), ""
    try:
        for limit in _limits(root):
            limits.append(limit)
    except (OSError, ValueError, KeyError) as error:
        unread = str(error)
    return MachineMemory(
        total, available, huge, fields.get("HugePages_Free", 0) * size, tuple(limits), unread
    )


_UNLIMITED = 2**62
"""From here on a number stands for no limit: cgroup v1 says the largest multiple of a page below 2**63."""


class _Files(NamedTuple):
    limits: tuple[str, ...]
    usage: str
    cache: tuple[str, ...]


# Of the pages that count as used, those of files are taken back before anything is refused; what is in shared
# memory, as host pools are, is not among them. In v1 only the fields that begin with total_ count children.
_FILES = {
    "cgroup2": _Files(("memory.max", "memory.high"), "memory.current", ("active_file", "inactive_file")),
    "cgroup": _Files(
        ("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")
    ),
}


def _limits(root: Path) -> Iterator[Limit]:
    """Every limit around this process; none on a system without cgroups.

    Raises:
        OSError, ValueError, KeyError: one cannot be read.
    """
    for mount, inner, files in _memory_cgroups(root):
        for path in (mount / inner, *(mount / inner).parents):
            folder = root / path.relative_to("/")
            for name in files.limits:
                text = _text_if_there(folder / name)
                if text in (None, "max") or (limit := int(text or "")) >= _UNLIMITED:
                    continue
                used = int((folder / files.usage).read_text(encoding="ascii"))
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                cache = 0 if _protected(folder) else sum(int(stat[name]) for name in files.cache)
                yield Limit(str(path / name), limit, max(0, limit - max(0, used - cache)))
            if path == mount:
                break


def _memory_cgroups(root: Path) -> Iterator[tuple[PurePosixPath, PurePosixPath, _Files]]:
    """Where each hierarchy with a memory controller is mounted, this process's cgroup in it, and its files.

    Raises:
        OSError: it cannot be read.
        ValueError: this process's cgroup is in none that is mounted.
    """
    member = dict[str, PurePosixPath]()
    for line in (_text_if_there(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            member["cgroup2"] = PurePosixPath(path)
        elif "memory" in controllers.split(","):
            member["cgroup"] = PurePosixPath(path)
    found = False
    for line in (_text_if_there(root / "proc/self/mountinfo") or "").splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split()[:3]
        if kind not in member or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        top, mount = (PurePosixPath(_unescaped(field)) for field in before.split()[3:5])
        own = member[kind]
        # In a namespace of its own a process may see itself below its own root and the mount by the host's.
        inner = own.relative_to(top if own.is_relative_to(top) else "/")
        if ".." in inner.parts:
            raise ValueError(f"the cgroup {own} is outside of what is mounted")
        if (root / (mount / inner).relative_to("/")).is_dir():
            found = True
            yield mount, inner, _FILES[kind]
    if member and not found:
        raise ValueError("the cgroup of this process is in no cgroup filesystem that is mounted")


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def _text_if_there(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None


def _protected(folder: Path) -> bool:
    """Whether a cgroup below keeps pages from being taken back, or may do so."""
    try:
        return any(int(path.read_text()) for path in folder.glob("*/**/memory.min"))
    except (OSError, ValueError):
        return True
