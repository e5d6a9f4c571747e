"""What ``hicache-io doctor`` says of memory: of a machine's, and of a server's on it."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
from machine_files import Machine

from sglang_hicache.io_backends.sglang.diagnose import memory_checks, server_memory
from sglang_hicache.io_backends.sglang.diagnose.checks import BAD, OK, WARNING, Finding
from sglang_hicache.io_backends.sglang.diagnose.command_line import CommandLine
from sglang_hicache.io_backends.sglang.diagnose.dry_run import Server
from sglang_hicache.io_backends.sglang.diagnose.pool_sizes import Sizing
from sglang_hicache.io_backends.sglang.pools.host_pools import HostPool
from sglang_hicache.policy.facts import Facts

KV = HostPool("kv", "MHATokenToKVPoolHost", "page_first", "mha", "token", 1000, 1, None, None)


def of(found: Any, about: str) -> Finding:
    return next(each for each in found if each.about == about)


class TestMachine:
    @pytest.fixture(autouse=True)
    def limited(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lock(monkeypatch, 8 * 2**20)

    def lock(self, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
        monkeypatch.setattr(memory_checks.resource, "getrlimit", lambda which: (limit, limit))

    def test_no_limit_on_locked_memory(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.lock(monkeypatch, resource.RLIM_INFINITY)
        found = of(memory_checks.machine(Machine(tmp_path).root), "locked memory")
        assert (found.status, found.text) == (OK, "no limit (ulimit -l)")

    def test_a_limit_on_locked_memory(self, tmp_path: Path) -> None:
        found = of(memory_checks.machine(Machine(tmp_path).root), "locked memory")
        assert found.status == WARNING
        assert "8,192 KiB: RDMA" in found.text
        assert "#21880" not in found.text, "that thread had no limit, and was slow nevertheless"
        assert "(#21880) are not cured by it" in found.advice

    @pytest.mark.parametrize(
        ("capabilities", "status"), [(1 << 14, OK), ((1 << 41) - 1, OK), (1 << 13, WARNING)]
    )
    def test_who_may_lock_all_has_no_limit(self, tmp_path: Path, capabilities: int, status: str) -> None:
        machine = Machine(tmp_path, capabilities=capabilities)
        assert of(memory_checks.machine(machine.root), "locked memory").status == status

    @pytest.mark.parametrize("version", [1, 2])
    def test_the_limit_with_the_least_left(self, tmp_path: Path, version: int) -> None:
        machine = Machine(tmp_path, cgroup=version, path="/pods/one")
        machine.limit("/pods/one", 48, used=2)
        machine.limit("/pods", 50, used=40)
        found = of(memory_checks.machine(machine.root), "container memory")
        assert found.status == OK
        assert found.text.startswith("10.0 GiB left of 50.0 GiB (/sys/fs/cgroup/")

    def test_no_limit(self, tmp_path: Path) -> None:
        found = of(memory_checks.machine(Machine(tmp_path).root), "container memory")
        assert (found.status, found.text) == (OK, "no limit seen (cgroup)")

    def test_a_limit_that_cannot_be_read(self, tmp_path: Path) -> None:
        machine = Machine(tmp_path, cgroup=2, path="/a")
        machine.limit("/a", "nonsense")
        found = of(memory_checks.machine(machine.root), "container memory")
        assert found.status == WARNING
        assert "nonsense" in found.text
        assert "--hicache-size" in found.advice

    def test_a_system_without_proc(self, tmp_path: Path) -> None:
        found = list(memory_checks.machine(tmp_path))
        assert of(found, "host memory").status == WARNING
        assert {each.about for each in found} == {"locked memory", "host memory"}

    @pytest.mark.parametrize(("huge", "status"), [((20, 20), WARNING), ((20, 0), OK)])
    def test_huge_pages(self, tmp_path: Path, huge: tuple[int, int], status: str) -> None:
        found = of(memory_checks.machine(Machine(tmp_path, huge=huge).root), "huge pages")
        assert found.status == status
        assert found.text.startswith("20.0 GiB are set aside")
        assert "SGLANG_HUGEPAGE_SIZE" in found.text

    @pytest.mark.parametrize(
        "version",
        [
            "Linux version 5.15.167.4-microsoft-standard-WSL2 (root@f9c826d3017f)",
            "Linux version 4.4.0-19041-Microsoft (Microsoft@Microsoft.com)",
        ],
    )
    def test_wsl(self, tmp_path: Path, version: str) -> None:
        found = of(memory_checks.machine(Machine(tmp_path, version=version).root), "WSL2")
        assert found.status == WARNING
        assert "#40232" in found.text
        assert "not on WSL2" in found.text

    def test_any_other_linux_has_nothing_of_it(self, tmp_path: Path) -> None:
        assert {each.about for each in memory_checks.machine(Machine(tmp_path).root)} == {
            "locked memory",
            "host memory",
            "container memory",
        }


def asked(
    *,
    arch: str = "sm90",
    gpu_name: str | None = None,
    sizing: dict[str, Any] | None = None,
    **more: Any,
) -> Server:
    facts = Facts.given(gpu_arch=arch, gpu_name=gpu_name)
    return Server(facts, "auto", None, True, sizing=Sizing(**sizing or {}), pools=(KV,), **more)


class TestHostPools:
    """On a machine of 64 GiB, 60 of them free."""

    def found(self, server: Server, machine: Machine, arch: str | None = "sm90") -> Finding:
        return of(server_memory.memory(server, arch, machine.root), "host pools")

    @pytest.mark.parametrize(
        ("sizing", "status", "words", "advice"),
        [
            ({"size_gb": 10}, OK, "9.3 GiB a machine: 1 rank x 9.3 GiB", ""),
            ({"size_gb": 6, "ranks": 8}, OK, "44.7 GiB a machine: 8 ranks x 5.6 GiB", ""),
            # 8 x 6.5 GiB: more than is free, less than there is, but for what SGLang leaves to others.
            ({"size_gb": 7, "ranks": 8}, WARNING, "SGLang would not start now", "--hicache-size 6 fits"),
            (
                {"size_gb": 8, "ranks": 8},
                BAD,
                "it can never start here, with 64.0 GiB",
                "7 fits at most here",
            ),
            ({"size_gb": 80}, BAD, "never", "57 fits"),
            # Each replica fits by itself; SGLang does not see the others.
            ({"size_gb": 15, "replicas": 4}, WARNING, "compares each replica alone", "13 fits"),
            ({"size_gb": 20, "replicas": 4}, BAD, "never", "14 fits"),
            # Two machines share the ranks.
            ({"size_gb": 6, "ranks": 16, "nodes": 2}, OK, "8 ranks x", ""),
            # The stages of a pipeline are not equally large: what the largest takes is known.
            (
                {"size_gb": 8, "ranks": 8, "stages": 8, "shared": False},
                WARNING,
                "60.0 GiB are free",
                "6 fits",
            ),
            # SGLang 0.5.18 compares each rank with the whole machine.
            ({"size_gb": 7, "ranks": 8, "shared": False}, WARNING, "would start, and leave less", "6 fits"),
        ],
    )
    def test_by_size(
        self, tmp_path: Path, sizing: dict[str, Any], status: str, words: str, advice: str
    ) -> None:
        found = self.found(asked(sizing=sizing), Machine(tmp_path))
        assert found.status == status, found
        assert words in found.text
        assert advice in found.advice

    @pytest.mark.parametrize("version", [1, 2])
    def test_within_a_cgroup(self, tmp_path: Path, version: int) -> None:
        machine = Machine(tmp_path, cgroup=version, path="/pods/one")
        machine.limit("/pods/one", None)
        machine.limit("/pods", 32, used=8)
        for size, status, words in (
            (10, OK, "24.0 GiB are free"),
            (18, WARNING, "24.0 GiB (/sys"),
            (26, BAD, "32.0"),
        ):
            found = self.found(asked(sizing={"size_gb": size}), machine)
            assert found.status == status, found
            assert words in found.text
        before = {"size_gb": 23, "in_cgroups": False}
        assert "does not look at cgroups, would start" in self.found(asked(sizing=before), machine).text

    def test_what_others_hold_is_never_bad(self, tmp_path: Path) -> None:
        """It may be the server that is asked about."""
        found = self.found(asked(sizing={"size_gb": 40}), Machine(tmp_path, available=3))
        assert found.status == WARNING
        assert "unless that is this server" in found.advice
        assert "no --hicache-size fits" in found.advice

    def test_huge_pages_take_memory_away(self, tmp_path: Path) -> None:
        machine = Machine(tmp_path, available=20, huge=(40, 40))
        server = asked(sizing={"size_gb": 20})
        assert self.found(server, machine).status == BAD
        with_them = CommandLine({"SGLANG_HUGEPAGE_SIZE": "2MB"}, [])
        assert self.found(asked(sizing={"size_gb": 20}, command=with_them), machine).status == WARNING

    @pytest.mark.parametrize(
        ("server_arch", "machine_arch", "inherits"),
        [("sm90", None, True), ("sm90", "sm80", True), ("sm90", "sm90", False)],
    )
    @pytest.mark.parametrize(
        "sizing", [{"size_gb": 8000}, {"ratio": 2.0}, {"ratio": 2.0, "fraction": 0.8}, {}, {"ratio": 99.0}]
    )
    def test_this_machine_says_nothing_of_another(
        self,
        tmp_path: Path,
        server_arch: str,
        machine_arch: str | None,
        inherits: bool,
        sizing: dict[str, Any],
    ) -> None:
        server = asked(
            arch=server_arch, sizing=sizing, command=CommandLine({}, [], inherits=inherits), gpu_gib=80
        )
        texts = {
            self.found(
                server, Machine(tmp_path / str(total), total=total, available=total // 2), machine_arch
            )
            for total in (2, 64, 4096)
        }
        (found,) = texts
        assert found.status == OK
        assert "not known here" in found.text

    def test_a_cpu_server_is_of_this_machine(self, tmp_path: Path) -> None:
        found = self.found(asked(arch="cpu", sizing={"size_gb": 80}), Machine(tmp_path), None)
        assert found.status == BAD

    @pytest.mark.parametrize(
        ("sizing", "more", "status", "words"),
        [
            ({"ratio": 2.0}, {}, WARNING, "2 times the device pool: not known without the GPU's memory"),
            ({"ratio": 2.0, "gpu_fraction": 0.25}, {"gpu_gib": 80}, OK, "at most 40.0 GiB a machine"),
            ({"ratio": 2.0, "gpu_fraction": 0.5}, {"gpu_gib": 80}, WARNING, "at most 80.0 GiB a machine"),
            (
                {"ratio": 2.0, "gpu_fraction": 0.5},
                {"gpu_name": "NVIDIA L4"},
                OK,
                "at most 24.0 GiB",
            ),
            ({"ratio": 2.0, "max_tokens": 10**6}, {}, OK, "1 rank x 2 times"),
            ({}, {}, WARNING, "SGLang decides the ratio"),
        ],
    )
    def test_by_ratio(
        self, tmp_path: Path, sizing: dict[str, Any], more: dict[str, Any], status: str, words: str
    ) -> None:
        found = self.found(asked(sizing=sizing, **more), Machine(tmp_path))
        assert found.status == status, found
        assert words in found.text
        assert bool(found.advice) == (status != OK)

    @pytest.mark.parametrize(
        ("total", "available", "status", "words"),
        [
            (64, 60, OK, "here at most 40.0 GiB for 8 ranks"),
            (64, 9, WARNING, "nothing is left now, 9.0 GiB are free"),
            (8, 8, BAD, "nothing is left of this machine's memory"),
        ],
    )
    def test_a_ratio_that_sglang_fits(
        self, tmp_path: Path, total: int, available: int, status: str, words: str
    ) -> None:
        server = asked(sizing={"ratio": 2.0, "fraction": 0.8, "ranks": 8})
        found = self.found(server, Machine(tmp_path, total=total, available=available))
        assert found.status == status, found
        assert words in found.text

    def test_a_ratio_that_sglang_cannot_fit(self, tmp_path: Path) -> None:
        machine = Machine(tmp_path, cgroup=2, path="/a")
        machine.limit("/a", "nonsense")
        server = asked(sizing={"ratio": 2.0, "fraction": 0.8})
        assert self.found(server, machine).status == BAD
        assert self.found(asked(sizing={"size_gb": 10}), machine).status == OK, "then SGLang goes on"

    def test_replicas_that_fit_by_themselves(self, tmp_path: Path) -> None:
        server = asked(sizing={"ratio": 2.0, "fraction": 0.8, "replicas": 4})
        found = self.found(server, Machine(tmp_path))
        assert found.status == WARNING
        assert "each of 4 replicas does so alone" in found.text

    def test_without_hicache_there_is_nothing_to_say(self, tmp_path: Path) -> None:
        server = Server(Facts.given(gpu_arch="sm90"), "auto", None, False, sizing=Sizing(size_gb=80))
        assert not list(server_memory.memory(server, "sm90", Machine(tmp_path).root))


class TestDevicePools:
    @pytest.fixture(autouse=True)
    def no_variables(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
            monkeypatch.delenv(name, raising=False)

    def found(self, tmp_path: Path, server: Server) -> list[Finding]:
        return [each for each in server_memory.memory(server, None, tmp_path) if each.about != "host pools"]

    @pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("expandable_segments:True", True),
            ("max_split_size_mb:128, expandable_segments : true", True),
            ("expandable_segments:False", False),
            ("backend:native", False),
            ("", False),
        ],
    )
    def test_expandable_segments(self, tmp_path: Path, name: str, text: str, said: bool) -> None:
        found = self.found(tmp_path, asked(command=CommandLine({name: text}, [])))
        assert [each.status for each in found] == [OK] * said
        assert not said or (name in found[0].text and "right on an H200" in found[0].text)

    @pytest.mark.parametrize(
        ("variables", "inherits", "said"),
        [
            ({}, True, True),
            ({}, False, False),  # a container has only what its text gives it
            ({"PYTORCH_CUDA_ALLOC_CONF": None}, True, False),
            ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, True, False),
        ],
    )
    def test_variables_around_the_server(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        variables: dict[str, str | None],
        inherits: bool,
        said: bool,
    ) -> None:
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        found = self.found(tmp_path, asked(command=CommandLine(variables, [], inherits=inherits)))
        assert len(found) == said

    def test_the_memory_saver(self, tmp_path: Path) -> None:
        (found,) = self.found(tmp_path, asked(memory_saver=True))
        assert (found.about, found.status) == ("memory saver", WARNING)
        assert "Not tried there: /release_memory_occupation" in found.text

    @pytest.mark.parametrize(
        ("name", "statuses"), [("PYTORCH_CUDA_ALLOC_CONF", [BAD]), ("PYTORCH_ALLOC_CONF", [OK, WARNING])]
    )
    def test_both(self, tmp_path: Path, name: str, statuses: list[str]) -> None:
        """The library looks for the words in one variable."""
        server = asked(memory_saver=True, command=CommandLine({name: "expandable_segments:True"}, []))
        assert [each.status for each in self.found(tmp_path, server)] == statuses

    def test_the_library_refuses_both(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from torch_memory_saver import entrypoint

        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        with pytest.raises(RuntimeError, match="expandable_segments is not supported"):
            entrypoint._sanity_checks()

    def test_a_cpu_server_has_none(self, tmp_path: Path) -> None:
        command = CommandLine({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, [])
        assert not self.found(tmp_path, asked(arch="cpu", memory_saver=True, command=command))
