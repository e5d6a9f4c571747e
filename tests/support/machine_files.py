"""Files of ``/proc`` and cgroups of a machine that is not there."""

from __future__ import annotations

from pathlib import Path

V1_UNLIMITED = 9223372036854771712
_GIB = 2**30

_NAMES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    2: ("memory.max", "memory.current", ""),
}


class Machine:
    """A folder like a machine's root.

    Args:
        root: the folder.
        total, available: GiB of memory.
        huge: GiB set aside as huge pages, and unused of these.
        cgroup: version of the memory controller; 0: there is none.
        path: of this process's cgroup.
        mounted: what of the hierarchy is mounted.
        version: of the kernel, as it says.
        capabilities: effective ones of this process.
    """

    def __init__(
        self,
        root: Path,
        *,
        total: int = 64,
        available: int = 60,
        huge: tuple[int, int] = (0, 0),
        cgroup: int = 0,
        path: str = "/",
        mounted: str = "/",
        version: str = "Linux version 6.8.0-generic",
        capabilities: int = 0,
    ) -> None:
        self.root, self._cgroup = root, cgroup
        self._mount = Path("sys/fs/cgroup", *(["memory"] if cgroup == 1 else []))
        proc = root / "proc/self"
        proc.mkdir(parents=True)
        pages = [part * _GIB // 2**21 for part in huge]
        (root / "proc/meminfo").write_text(
            f"MemTotal:       {total * 2**20} kB\nMemAvailable:   {available * 2**20} kB\n"
            f"HugePages_Total:    {pages[0]}\nHugePages_Free:     {pages[1]}\n"
            f"Hugepagesize:       2048 kB\nHugetlb:        {huge[0] * 2**20} kB\n"
        )
        (root / "proc/version").write_text(f"{version}\n")
        (proc / "status").write_text(f"Name:\tpython\nCapEff:\t{capabilities:016x}\n")
        lines = {0: "", 1: f"4:memory:{path}\n1:cpu:/\n", 2: f"0::{path}\n"}
        (proc / "cgroup").write_text(lines[cgroup])
        kind = {0: "tmpfs tmpfs rw", 1: "cgroup cgroup rw,memory", 2: "cgroup2 cgroup2 rw"}[cgroup]
        self._mountinfo = f"30 23 0:26 {mounted} {{mount}} rw,nosuid - {kind}\n"
        (proc / "mountinfo").write_text(self._mountinfo.format(mount=f"/{self._mount}"))
        self.folder(path).mkdir(parents=True)

    def folder(self, path: str) -> Path:
        """Of a cgroup."""
        return self.root / self._mount / path.strip("/")

    def limit(
        self,
        path: str,
        limit: int | str | None,
        *,
        high: int | None = None,
        used: int = 0,
        cache: int = 0,
        protected: bool = False,
    ) -> None:
        """Limit a cgroup.

        Args:
            path: of the cgroup.
            limit: GiB, or the text as it is; None: no limit.
            high: GiB above which it is throttled (v2).
            used: GiB, with pages of files.
            cache: GiB of these pages.
            protected: a cgroup below keeps some.
        """
        max_name, usage_name, prefix = _NAMES[self._cgroup]
        unlimited = "max" if self._cgroup == 2 else str(V1_UNLIMITED)
        folder = self.folder(path)
        text = limit if isinstance(limit, str) else unlimited if limit is None else str(limit * _GIB)
        (folder / max_name).write_text(f"{text}\n")
        (folder / usage_name).write_text(f"{used * _GIB}\n")
        half = cache * _GIB // 2
        (folder / "memory.stat").write_text(
            f"anon 0\n{prefix}active_file {half}\n{prefix}inactive_file {cache * _GIB - half}\n"
        )
        if self._cgroup == 2:
            (folder / "memory.high").write_text("max\n" if high is None else f"{high * _GIB}\n")
            (folder / "memory.min").write_text("0\n")
            sibling = folder / "sibling"
            sibling.mkdir(exist_ok=True)
            (sibling / "memory.min").write_text("4096\n" if protected else "0\n")

    def proc_of_absolute_paths(self) -> Path:
        """``proc`` for a reader that takes the mount's path as it is."""
        path = self.root / "proc/self/mountinfo"
        text = path.read_text()
        absolute = self.root / "absolute/self"
        absolute.mkdir(parents=True, exist_ok=True)
        (absolute / "mountinfo").write_text(text.replace(f"/{self._mount}", str(self.root / self._mount), 1))
        (absolute / "cgroup").write_text((self.root / "proc/self/cgroup").read_text())
        return absolute.parent
