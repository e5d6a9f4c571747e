"""``docs/writing-a-backend.md``: its backend and its checks, run as they stand there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from sglang_hicache.bench.explain.explanation import Explanation
from sglang_hicache.io_backends import CopyBatch, direct_copies
from sglang_hicache.io_backends.device.cpu import CpuDevice
from sglang_hicache.io_backends.policy_files import load_policy_text, policy_json_schema
from sglang_hicache.io_backends.registry import (
    BACKENDS,
    make_backend,
    register_backend,
    unregister_backend,
    unsupported,
)
from sglang_hicache.io_backends.sglang.diagnose import checks
from sglang_hicache.policy.decide import decide
from sglang_hicache.policy.facts import Facts
from sglang_hicache.policy.format.errors import PolicyError
from sglang_hicache.policy.unfenced import losses

GUIDE = Path(__file__).parents[1] / "docs" / "writing-a-backend.md"
NAME = "small_batches"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


def module(name: str, text: str) -> ModuleType:
    made = ModuleType(name)
    exec(compile(text, f"{GUIDE.name}: {name}", "exec"), made.__dict__)
    return made


BACKEND, LAYERS, CHECKS = blocks("python")
(POLICY,) = blocks("yaml")


@pytest.fixture
def factory() -> Iterator[Any]:
    made = module(NAME, BACKEND).SmallBatchesBackend
    register_backend(NAME, made)
    yield made
    unregister_backend(NAME)


@pytest.fixture(autouse=True)
def _no_policy_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_HICACHE_IO_MACHINE_POLICY", "")


def test_its_bytes_are_right(factory: Any) -> None:
    checks = module("checks", CHECKS)
    assert checks.bytes_are_right(lambda device, options: make_backend(NAME, device, options))


def test_the_guides_check_of_bytes_can_fail(factory: Any) -> None:
    class Mixed(factory):
        def submit(self, transfer: Any, stream: Any) -> Any:
            return super().submit(replace(transfer, device_slots=transfer.device_slots[::-1].copy()), stream)

    assert not module("checks", CHECKS).bytes_are_right(Mixed)


@pytest.mark.parametrize("seed", range(10))
def test_it_races_without_the_producer_fence_and_only_then(factory: Any, seed: int) -> None:
    checks = module("checks", CHECKS)
    assert checks.races(factory, fenced=True, seed=seed) == []
    assert {race.kind for race in checks.races(factory, fenced=False, seed=seed)} == {"read_before_write"}


def test_a_policy_may_choose_it_with_options_that_are_checked(factory: Any) -> None:
    policy = load_policy_text(POLICY, "mine.yaml")
    decision = decide(policy, Facts.given(mem_layout="page_first"))
    assert (decision.backend, dict(decision.options)) == (NAME, {"copies_at_once": 128})
    wrong = {
        "copies_at_once: 128": (
            "copies_at_once: 5000",
            "at most 4,096, not 5,000: above it nothing is gained",
        ),
        "copies_at_once": (
            "copies_at_onc",
            r"unknown option of small_batches 'copies_at_onc' \(did you mean",
        ),
    }
    for right, (instead, message) in wrong.items():
        with pytest.raises(PolicyError, match=message):
            load_policy_text(POLICY.replace(right, instead), "mine.yaml")
    assert '"copies_at_once": {"type": "integer", "minimum": 1, "maximum": 4096}' in json.dumps(
        policy_json_schema()
    )


def test_its_policy_takes_no_fence_away(factory: Any) -> None:
    def rules_that_lose(text: str) -> set[str]:
        policy = load_policy_text(text, "mine.yaml")
        assert policy.below is not None
        return {loss.rule for loss in losses(policy.below, policy)}

    assert rules_that_lose(POLICY) == set()
    assert rules_that_lose(POLICY.replace("[extend, decode]", "[]")) == {"mine"}


def test_all_of_a_pool_may_be_copied_some_layers_at_a_time() -> None:
    some_layers, checks = module("layers", LAYERS).some_layers, module("checks", CHECKS)
    rows = np.zeros((checks.LAYERS, checks.SLOTS, checks.ROW), dtype=np.uint8)
    pool = checks.make_pool(1 << 20, rows)
    host, device = np.arange(4), np.array([5, 3, 9, 10])
    whole = direct_copies(pool, host, device)
    parts = [
        direct_copies(some_layers(pool, first, first + 1), host, device) for first in range(checks.LAYERS)
    ]

    def addresses(*batches: CopyBatch) -> list[list[int]]:
        return sorted(
            each for one in batches for each in np.stack([one.dst, one.src, one.nbytes], axis=1).tolist()
        )

    assert addresses(*parts) == addresses(whole)
    assert some_layers(pool, 1, 64).layers == checks.LAYERS - 1


def test_explain_knows_it(factory: Any) -> None:
    policy = load_policy_text(POLICY, "mine.yaml")
    said = Explanation.of(policy, Facts.given(mem_layout="page_first"), backend="auto").to_dict()
    assert said["fences"].startswith("No forward waits for small_batches, which has no work on the SMs")
    refused = Explanation.of(policy, Facts.given(mem_layout="page_head"), backend=NAME).to_dict()["refused"]
    assert refused == (
        "--hicache-io-backend small_batches cannot serve --hicache-mem-layout page_head "
        "(it can: layer_first, page_first)"
    )


def test_explain_knows_which_kinds_of_kv_cache_it_serves(factory: Any) -> None:
    """By name the server does not start, by a rule SGLang copies; never that it serves what it refuses."""
    spec = replace(factory.spec, kv_kinds=frozenset({"mha"}))
    unregister_backend(NAME)
    register_backend(NAME, factory, spec)
    policy = load_policy_text(POLICY, "mine.yaml")
    rows = np.zeros((2, 64, 32), dtype=np.uint8)
    mla = module("checks", CHECKS).make_pool(1 << 20, rows)
    assert mla.kv_kind == "mla"
    server = unsupported(make_backend(NAME, CpuDevice(), {}), mla)
    assert server == f"{NAME} cannot serve KV cache of kind mla (it can: mha)"
    facts = Facts.given(mem_layout="page_first", kv_kind="mla")
    by_name = Explanation.of(policy, facts, backend=NAME).to_dict()
    assert by_name["refused"] == f"--hicache-io-backend {server}"
    by_rule = Explanation.of(policy, facts, backend="auto").to_dict()
    assert by_rule["refused"] is None
    assert by_rule["fallback"] == (
        f"{server}: SGLang's own copy runs instead, and extend and decode would wait for it"
    )
    for served in (Facts.given(mem_layout="page_first", kv_kind="mha"), Facts.given(mem_layout="page_first")):
        said = Explanation.of(policy, served, backend="auto").to_dict()
        assert (said["refused"], said["fallback"]) == (None, None)
    found = {each.about: each.text for each in checks._backends("cpu", Facts.given(gpu_arch="sm90"))}
    assert "layouts layer_first, page_first; KV cache of kind mha" in found[NAME]
    assert "KV cache of kind" not in found["hybrid"]


def test_its_spec_is_read_from_the_class(factory: Any) -> None:
    assert BACKENDS[NAME] is factory.spec
    assert NAME in BACKENDS


@pytest.mark.sglang
def test_the_race_command_finds_nothing_either(tmp_path: Path) -> None:
    """Installed as the guide says, with an entry point."""
    (tmp_path / "small_batches.py").write_text(BACKEND, encoding="utf-8")
    (pyproject,) = map(tomllib.loads, blocks("ini"))
    assert pyproject["tool"]["setuptools"]["py-modules"] == ["small_batches"]
    ((group, points),) = pyproject["project"]["entry-points"].items()
    ((name, factory),) = points.items()
    info = tmp_path / "small_batches-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: small-batches\nVersion: 1\n", encoding="utf-8"
    )
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {factory}\n", encoding="utf-8")
    (command,) = re.findall(r"`(hicache-io race\s[^`]*)`", GUIDE.read_text(encoding="utf-8"))
    arguments = command.replace("--seeds 20", "--seeds 2").split()[1:]
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from sglang_hicache.bench.cli import app; app()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments, "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["races"] == []
