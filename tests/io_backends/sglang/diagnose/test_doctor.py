"""``hicache-io doctor``: each check, and the whole command on this machine."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from repository import VERSIONS
from typer.testing import CliRunner

from sglang_hicache.bench import tiny_model
from sglang_hicache.bench.cli import app
from sglang_hicache.io_backends.policy_files import default_policy, load_policy_text
from sglang_hicache.io_backends.sglang import versions
from sglang_hicache.io_backends.sglang.diagnose import checks, server_checks
from sglang_hicache.io_backends.sglang.diagnose.checks import BAD, OK, WARNING, Finding
from sglang_hicache.io_backends.sglang.diagnose.dry_run import Server
from sglang_hicache.policy.decide import decide
from sglang_hicache.policy.facts import Fact, Facts

UNFENCED = """\
version: 1
rules: []
default: {use: {backend: hybrid, fence_forward: []}, because: a test}
"""


def of(found: Any, about: str) -> Finding:
    return next(each for each in found if each.about == about)


def worst(found: Any) -> str:
    return checks.worst({"one": list(found)})


@pytest.fixture
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hook points are compared in `test_the_command`."""
    monkeypatch.setattr(checks, "_hook_points", lambda version: Finding("hook points", OK, version))


@pytest.mark.usefixtures("no_child")
class TestInstallation:
    def test_this_one_is_good(self) -> None:
        assert worst(checks.installation()) == OK

    def test_sglangs_fences_are_read_off_its_code(self) -> None:
        assert checks.upstream_fences() == {
            "H2D waits for the forward": True,
            "D2H waits for the forward": True,
            "forwards wait for D2H": False,
        }

    @pytest.mark.parametrize(("version", "d2h", "h2d"), [("0.5.18", False, False), ("0.5.22", False, True)])
    def test_older_releases_have_fewer(
        self, monkeypatch: pytest.MonkeyPatch, version: str, d2h: bool, h2d: bool
    ) -> None:
        tree = VERSIONS / version / "sglang"
        spec = SimpleNamespace(submodule_search_locations=[str(tree)])
        monkeypatch.setattr(checks, "find_spec", lambda name: spec)
        found = checks.upstream_fences()
        assert found is not None
        assert (found["D2H waits for the forward"], found["H2D waits for the forward"]) == (d2h, h2d)
        assert of(checks.installation(), "SGLang's fences").status == WARNING

    def test_a_plug_in_that_is_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SGLANG_PLUGINS", "another, one")
        found = of(checks.installation(), "plug-in")
        assert (found.status, found.advice) == (BAD, "add hicache_io to it, or unset it")
        monkeypatch.setenv("SGLANG_PLUGINS", "another, hicache_io")
        assert of(checks.installation(), "plug-in").status == OK

    def test_a_plug_in_that_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(checks, "entry_points", lambda group: [])
        assert of(checks.installation(), "plug-in").status == BAD

    def test_an_sglang_that_is_not_known(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(versions, "installed", lambda: "0.5.24")
        found = of(checks.installation(), "SGLang")
        assert found.status == BAD
        assert "0.5.18 to 0.5.23" in found.text

    def test_no_sglang(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing() -> str:
            raise ImportError("No module named 'sglang'")

        monkeypatch.setattr(versions, "installed", missing)
        (found,) = checks.installation()
        assert found.status == WARNING


class TestMachine:
    @pytest.fixture(autouse=True)
    def a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(checks, "unavailable", lambda device: None)

    def facts(self, **other: Any) -> Facts:
        return Facts.given(**{"gpu_arch": "sm90", "device": "cuda", "batch_copy": True, **other})

    def test_every_backend_is_listed(self) -> None:
        found = list(checks.machine(self.facts()))
        assert {of(found, name).status for name in ("fenced_kernel", "copy_engine", "hybrid")} == {OK}
        assert "page_head" in of(found, "hybrid").text

    def test_without_a_gpu_nothing_is_bad(self) -> None:
        found = list(checks.machine(Facts()))
        assert worst(found) == WARNING
        assert of(found, "hybrid").status == of(found, "GPU").status == WARNING

    def test_a_driver_without_batches(self) -> None:
        found = of(checks.machine(self.facts(batch_copy=False)), "batch copy")
        assert found.status == WARNING
        assert "12.8" in found.advice

    @pytest.mark.parametrize(
        ("facts", "status", "words"),
        [
            ({"fa3_binary": "sgl_kernel", "sgl_kernel": "0.4.10"}, OK, "0.4.10"),
            ({"fa3_binary": "sgl_kernel", "sgl_kernel": "0.3.21"}, WARNING, "ACQBULK"),
            ({"fa3_binary": "kernels_community", "sgl_kernel": "0.4.10"}, WARNING, "nobody has examined it"),
        ],
    )
    def test_fa3_binaries(self, facts: dict[str, Any], status: str, words: str) -> None:
        found = of(checks.machine(self.facts(**facts)), "FA3 binary")
        assert found.status == status
        assert words in found.text


class TestPolicy:
    def test_the_shipped_one_is_good(self) -> None:
        found, policy = checks.in_force(None)
        assert worst(found) == OK
        assert policy is not None

    def test_a_broken_one_is_bad(self, tmp_path: Path) -> None:
        path = tmp_path / "policy.yaml"
        path.write_text(UNFENCED.replace("hybrid", "hybird"))
        (found,), policy = checks.in_force(str(path))
        assert (found.status, policy) == (BAD, None)
        assert "did you mean 'hybrid'?" in found.text

    def test_one_that_takes_a_fence_away_is_a_warning(self, tmp_path: Path) -> None:
        path = tmp_path / "policy.yaml"
        path.write_text(UNFENCED)
        found, _ = checks.in_force(str(path))
        assert worst(found) == WARNING
        assert "extend no longer waits for D2H work on the SMs" in found[0].text
        assert "rule 'trtllm-on-blackwell' of the shipped default makes it wait" in found[0].text


class TestServer:
    def server(self, backend: str = "auto", *, hicache: bool = True, **facts: Any) -> Server:
        known = {"gpu_arch": "sm90", "attention_backend": "fa3", "sglang": "0.5.23", "speculative": "none"}
        return Server(Facts.given(**{**known, **facts}), backend, None, hicache)

    def found(self, server: Server, policy: str | None = None) -> list[Finding]:
        in_force = default_policy() if policy is None else load_policy_text(policy, "policy.yaml")
        return list(server_checks.server(server, in_force))

    # What is there, and how much is known against SGLang's `kernel` there: exit status 1 for bad alone.
    HOPPER = (
        # layout, attention, sglang-kernel, SGLang: status, words
        ("page_first", "fa3", "0.4.10", "0.5.23", WARNING, "plausible, nobody has seen it"),
        ("page_first", "fa3", "0.4.6.post1", "0.5.18", WARNING, "(staged)"),
        ("page_first", "fa3", "0.3.21", "0.5.23", WARNING, "no report since SGLang 0.5.14"),
        ("page_first", "fa3", "0.3.21", "0.5.13", BAD, "known to break"),
        ("layer_first", "fa3", "0.4.10", "0.5.23", WARNING, "the TMA kernel"),
        ("layer_first", "fa3", "0.4.6.post1", "0.5.20", WARNING, "the register kernel"),
        ("layer_first", "fa3", None, "0.5.23", WARNING, "of unknown version"),
        ("layer_first", "fa3", "0.3.21", "0.5.23", BAD, "#20611"),
        ("layer_first", "minicpm_flashattn", "0.3.21", "0.5.23", WARNING, "nobody has seen it"),
        ("page_head", "fa3", "0.4.10", "0.5.23", WARNING, "the register kernel"),
        ("page_head", "fa3", "0.3.21", "0.5.23", BAD, "illegal memory access"),
        ("page_first_direct", "fa3", "0.3.21", "0.5.23", OK, "memory copies alone"),
        ("layer_first", "flashinfer", "0.4.10", "0.5.23", OK, "no report"),
        ("layer_first", "triton", "0.3.21", "0.5.23", OK, "no report"),
    )

    @pytest.mark.parametrize(("layout", "attention", "kernels", "sglang", "status", "words"), HOPPER)
    def test_what_is_known_of_sglangs_kernel_on_hopper(
        self, layout: str, attention: str, kernels: str | None, sglang: str, status: str, words: str
    ) -> None:
        more = {} if kernels is None else {"sgl_kernel": kernels}
        asked = self.server("kernel", attention_backend=attention, mem_layout=layout, sglang="0.5.23", **more)
        facts = Facts({**asked.facts, "sglang": Fact(sglang, "given")})
        found = [
            each for each in self.found(replace(asked, facts=facts)) if "does not make D2H" not in each.text
        ]
        assert worst(found) == status
        assert words in found[-1].text
        because = decide(default_policy(), facts, backend="kernel").because
        assert found[-1].text.partition(": ")[2] in because, "explain says the same"

    @pytest.mark.parametrize(
        ("arch", "attention", "tp", "status"),
        [
            ("sm103", "dsa", 2, BAD),
            ("sm103", "nsa", 8, BAD),
            ("sm103", "dsa", 1, WARNING),  # what hung was TP
            ("sm103", "trtllm_mha", 2, WARNING),
            ("sm100", "dsa", 2, WARNING),
            ("sm100", "fa4", 2, OK),
            ("sm90", "dsa", 2, OK),
            ("sm80", "fa3", 2, OK),
        ],
    )
    def test_what_is_known_of_sglangs_kernel_elsewhere(
        self, arch: str, attention: str, tp: int, status: str
    ) -> None:
        found = self.found(self.server("kernel", gpu_arch=arch, attention_backend=attention, tp=tp))
        assert worst(found) == status
        assert ("#38300" in found[-1].text) == (status != OK)

    def test_fa3_of_another_make_is_not_the_reports(self) -> None:
        found = self.found(
            self.server(
                "kernel", mem_layout="layer_first", sgl_kernel="0.3.21", fa3_binary="kernels_community"
            )
        )
        assert worst(found) == WARNING
        assert "nobody has examined" in found[-1].text

    @pytest.mark.parametrize("backend", ["auto", "hybrid", "copy_engine", "fenced_kernel"])
    def test_ours_is_good_there(self, backend: str) -> None:
        assert worst(self.found(self.server(backend))) == OK

    @pytest.mark.parametrize(
        ("backend", "layout", "kernels", "status", "words"),
        [
            ("hybrid", "page_first", "0.3.21", BAD, "a gather within GPU memory"),
            ("hybrid", "layer_first", "0.4.10", BAD, "takes away a fence of the shipped policy"),
            ("copy_engine", "layer_first", "0.3.21", OK, "forwards that wait: none"),
            ("fenced_kernel", "layer_first", "0.4.10", BAD, "writes host memory"),
            ("fenced_kernel", "page_first", "0.4.10", BAD, "the register kernel"),
            ("fenced_kernel", "layer_first", "0.3.21", BAD, "known to break"),
        ],
    )
    def test_ours_with_a_policy_that_fences_nothing(
        self, backend: str, layout: str, kernels: str, status: str, words: str
    ) -> None:
        policy = UNFENCED.replace("hybrid", backend)
        found = self.found(self.server("auto", mem_layout=layout, sgl_kernel=kernels), policy)
        assert worst(found) == status
        assert words in found[-1].text

    def test_direct_beside_fa3_has_no_report(self) -> None:
        assert worst(self.found(self.server("direct", mem_layout="page_first_direct"))) == OK

    @pytest.mark.parametrize("backend", ["auto", "direct"])
    def test_loads_by_a_copy_for_each_token_are_slow(self, backend: str) -> None:
        slow = of(self.found(self.server(backend, mem_layout="page_first_direct", page_size=1)), "loads")
        assert slow.status == WARNING
        assert "mem-layout page_first with --hicache-io-backend auto or kernel" in slow.advice
        larger = self.found(self.server(backend, mem_layout="page_first_direct", page_size=64))
        other = self.found(self.server("kernel", mem_layout="page_first", page_size=1))
        assert "loads" not in {each.about for each in (*larger, *other)}

    @pytest.mark.parametrize("about", ["decode retraction", "decode offload"])
    @pytest.mark.parametrize(("backend", "status"), [("kernel", WARNING), ("direct", WARNING), ("auto", OK)])
    def test_what_a_decode_server_writes_past_sglangs_fence(
        self, about: str, backend: str, status: str
    ) -> None:
        where = {
            "decode retraction": {"retraction": "a host pool"},
            "decode offload": {"offload": "a host pool"},
        }
        asked = self.server(backend, attention_backend="triton")
        assert about not in {each.about for each in self.found(asked)}
        found = of(self.found(replace(asked, **where[about])), about)
        assert found.status == status
        assert ("submit_device_to_host wait" in found.text) == (status == OK)

    def test_an_sglang_without_its_own_producer_fence(self) -> None:
        found = self.found(self.server("kernel", gpu_arch="sm80", sglang="0.5.22"))
        assert worst(found) == WARNING

    def test_a_server_that_would_not_start(self) -> None:
        found = self.found(self.server("copy_engine", mem_layout="page_head"))
        assert found[-1].status == BAD
        assert "would not start" in found[-1].text

    def test_without_hicache_there_is_nothing_to_say(self) -> None:
        (found,) = self.found(self.server("kernel", hicache=False))
        assert found.status == OK


def test_the_command(tmp_path: Path) -> None:
    """On this machine, with the hook points compared and SGLang's default on Hopper: nothing known breaks."""
    model = tiny_model.write(tmp_path / "model")
    line = f"sglang serve --model-path {model} --skip-tokenizer-init --enable-hierarchical-cache"
    result = CliRunner().invoke(app, ["doctor", "--server-args", line, "--gpu-arch", "sm90", "--json"])
    report = json.loads(result.stdout)
    assert (result.exit_code, report["status"]) == (0, "warning")
    sections = report["sections"]
    points = next(each for each in sections["SGLang and this plug-in"] if each["about"] == "hook points")
    assert points["status"] == OK
    assert any("#20611" in each["text"] for each in sections["The server"])


OPEN = """\
version: 1
rules: []
default: {use: {backend: fenced_kernel, fence_forward: []}, because: a test that leaves fa3 open}
"""


@pytest.mark.usefixtures("quick_dry_runs", "no_child")
@pytest.mark.parametrize(
    "form",
    [
        "SGLANG_HICACHE_IO_POLICY={policy} {server}",
        "export SGLANG_HICACHE_IO_POLICY={policy} && {server}",
        "docker run --gpus all -v ~/m:/m -e SGLANG_HICACHE_IO_POLICY={policy} lmsysorg/sglang {server}",
    ],
)
def test_a_policy_that_leaves_fa3_open_is_bad_in_every_form(tmp_path: Path, form: str) -> None:
    """Other forms are read alike (test_command_line.py); these take the real way."""
    policy = tmp_path / "p q.yaml"
    policy.write_text(OPEN)
    model = tiny_model.write(tmp_path / "model")
    server = (
        f"sglang serve {model} --skip-tokenizer-init --enable-hierarchical-cache --hicache-io-backend auto"
    )
    line = form.format(policy=shlex.quote(str(policy)), server=server)
    result = CliRunner().invoke(app, ["doctor", "--server-args", line, "--gpu-arch", "sm90", "--json"])
    assert result.exit_code == 1, result.output
    report = json.loads(result.stdout)
    assert report["status"] == BAD
    (bad,) = (each for each in report["sections"]["The server"] if each["status"] == BAD)
    assert "#20611" in bad["text"]


def test_a_command_line_that_sglang_refuses() -> None:
    result = CliRunner().invoke(app, ["doctor", "--server-args", "--model-path 'x", "--gpu-arch", "sm90"])
    assert result.exit_code == 2
    assert result.stderr == "--server-args: the command line cannot be read: No closing quotation\n"


def test_the_report_is_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = Finding("locked memory", BAD, "[8] KiB", "raise it")
    monkeypatch.setattr(
        "sglang_hicache.io_backends.sglang.diagnose.doctor.examine", lambda *_: iter([("This", iter([bad]))])
    )
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert [line.split() for line in result.stdout.splitlines() if line.strip()][:3] == [
        ["This"],
        ["bad", "locked", "memory", "[8]", "KiB"],
        ["->", "raise", "it"],
    ]
