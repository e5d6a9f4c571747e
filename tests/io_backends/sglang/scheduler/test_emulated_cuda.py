"""The CUDA side of the seam without a GPU: virtual streams, the stand-in driver, Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import preloaded
import pytest
from launching import CHILDREN, Machine, inject
from own_process import SHARD, fake_driver, run_cases
from repository import ROOT

from sglang_hicache.bench import tiny_model
from sglang_hicache.bench.demo.command import identity
from sglang_hicache.bench.demo.identity import DemoRun, DemoSetup
from sglang_hicache.bench.workload import EvictingWorkload

HERE = Path(__file__).parent
EMULATION = ROOT / "tests" / "support" / "emulated_cuda"

POLICY = """\
version: 1
rules:
  - name: here
    when: {attention_backend: [torch_native]}
    use: {backend: hybrid, fence_forward: [extend, decode], options: {staging_mb: 1}}
    because: a test
default: {use: {backend: copy_engine}, because: a test}
"""

EMULATED = """
def open_device(name):
    import emulated_server
    return emulated_server.open_device(name)
"""


# Three minutes of one core together.
@pytest.mark.parametrize("share", ["0/3", "1/3", "2/3"])
def test_writes_through_sglangs_pools_on_virtual_streams(
    subtests: pytest.Subtests, tmp_path: Path, share: str
) -> None:
    environment = {**fake_driver(tmp_path), "TRITON_INTERPRET": "1", SHARD: share}
    run_cases(subtests, HERE / "emulated_cases.py", environment)


# The device pool holds 4,096 tokens.
WORKLOAD = EvictingWorkload(tiny_model.VOCAB_SIZE, conversations=8, turns=2, output_tokens=8)


def serve(machine: Machine, folder: Path, backend: str | None, **env: str) -> DemoRun:
    given = DemoSetup(
        *(str(machine.model), True, 16, None, {**machine.env(), **env}, folder, WORKLOAD),
        launch=machine.launcher,
    )
    return identity.run(given, backend or "reference", backend, status=lambda *_: None)


@pytest.fixture(scope="module")
def emulated_machine(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """The stand-in driver and Triton's interpreter are chosen when they are imported."""
    folder = tmp_path_factory.mktemp("emulated")
    environment = {**machine.env(), **fake_driver(folder), "TRITON_INTERPRET": "1"}
    with preloaded.started(folder, environment) as python:
        yield replace(machine, python=python)


def serve_emulated(machine: Machine, folder: Path, **env: str) -> DemoRun:
    """Writes of 1.4 MiB (700 tokens) through a ring of 1 MiB, and forwards that wait for gathers."""
    (folder / "policy.yaml").write_text(POLICY)
    hooks = "sglang_hicache.io_backends.sglang.scheduler.scheduler_hooks"
    site = inject(CHILDREN, hooks, EMULATED)
    emulated = {
        **site,
        "PYTHONPATH": os.pathsep.join([site["PYTHONPATH"], str(EMULATION)]),
        "TRITON_INTERPRET": "1",
        "EMULATED_CUDA_SEED": "1",
        "SGLANG_HICACHE_IO_POLICY": str(folder / "policy.yaml"),
    }
    result = serve(machine, folder, "auto", **emulated, **env)
    assert result.plugin is not None
    assert result.plugin["rule"] == "here"
    assert result.count("fallback_writes") == 0
    return result


@pytest.fixture(scope="module")
def reference(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> DemoRun:
    return serve(machine, tmp_path_factory.mktemp("reference"), None)


@pytest.mark.server
def test_a_server_whose_writes_are_larger_than_the_ring(
    emulated_machine: Machine, tmp_path: Path, reference: DemoRun
) -> None:
    result = serve_emulated(emulated_machine, tmp_path)
    assert result.problem(reference) is None
    assert result.count("forward_fences") > 0
    assert result.plugin is not None
    did = result.plugin["emulated"]
    # The ring was full, and SGLang held an event that we recorded later.
    assert did["deferred completions"] > 0
    # More than one chunk a write, each with a gather and a batch of copies.
    assert did["gathers"] > 2 * result.count("writes")
    assert did["copies"] > 2 * result.count("writes")


@pytest.mark.server
def test_a_server_without_fences_answers_wrongly(
    emulated_machine: Machine, tmp_path: Path, reference: DemoRun
) -> None:
    """The check above can fail."""
    result = serve_emulated(emulated_machine, tmp_path, EMULATED_CUDA_UNFENCED="1")
    assert result.host_tokens > 0
    assert result.identical(reference) < len(reference.answers)
