"""Real SGLang servers on the CPU engine: prefixes come back from the host tier, and every output is right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import preloaded
import pytest
from launching import Machine
from repository import VERSIONS

from sglang_hicache.bench import damaged, tiny_model
from sglang_hicache.bench.demo.command import identity
from sglang_hicache.bench.demo.identity import DemoRun, DemoSetup
from sglang_hicache.bench.workload import EvictingWorkload

pytestmark = pytest.mark.server


# Enough to overflow the device pool of 4,096 tokens twice over.
WORKLOAD = EvictingWorkload(tiny_model.VOCAB_SIZE, conversations=12, turns=2, output_tokens=12)


def setup(machine: Machine, tmp_path: Path, *, page_size: int = 16, layout: str | None = None) -> DemoSetup:
    return DemoSetup(
        model=str(machine.model),
        cpu_engine=True,
        page_size=page_size,
        mem_layout=layout,
        env=machine.env(),
        logs=tmp_path,
        workload=WORKLOAD,
        launch=machine.launcher,
    )


def run(given: DemoSetup, backend: str | None) -> DemoRun:
    return identity.run(given, backend or "reference", backend, status=lambda *_: None)


@pytest.fixture(scope="module")
def reference(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> DemoRun:
    """The same server without HiCache. Its outputs depend on no page size and no layout."""
    return run(setup(machine, tmp_path_factory.mktemp("reference")), None)


def assert_right(result: DemoRun, reference: DemoRun) -> None:
    assert result.problem(reference) is None
    assert result.count("bytes") > 0
    assert result.count("fallback_writes") == 0
    assert result.count("producer_fences") == result.count("writes") > 0


@pytest.mark.parametrize(
    ("backend", "layout", "page_size"),
    [
        ("auto", None, 16),
        ("hybrid", "layer_first", 16),
        ("hybrid", "page_first", 1),
        ("hybrid", "page_first_direct", 64),
        ("hybrid", "page_head", 16),
        ("copy_engine", "layer_first", 64),
        ("copy_engine", "page_first", 16),
        ("copy_engine", "page_first_direct", 16),
        ("fenced_kernel", "layer_first", 1),
        ("fenced_kernel", "page_first", 64),
        ("fenced_kernel", "page_first_direct", 16),
    ],
)
def test_prefixes_come_back_right(
    machine: Machine, tmp_path: Path, reference: DemoRun, backend: str, layout: str | None, page_size: int
) -> None:
    if backend == "auto":
        machine = machine.with_python_of_its_own()  # as users start it
    result = run(setup(machine, tmp_path, page_size=page_size, layout=layout), backend)
    assert_right(result, reference)
    assert result.plugin is not None
    log = result.log.read_text()
    said = [line for line in log.splitlines() if "hicache-io: D2H backend" in line]
    assert len(said) == 1, "each scheduler logs the decision once"
    assert f"D2H backend {result.plugin['backend']}" in said[0]
    if backend != "auto":
        assert result.plugin["backend"] == backend
    if backend == "fenced_kernel":
        # By hand it fences every forward, and each write is waited for at most once.
        assert result.plugin["fence_forward"] == ["extend", "decode"]
        assert 0 < result.count("forward_fences") <= result.count("writes")
    if backend == "copy_engine":
        assert result.count("forward_fences") == 0


def test_only_the_listed_forwards_wait(machine: Machine, tmp_path: Path, reference: DemoRun) -> None:
    """torch_native stands for a backend that needs a fence, for extends only."""
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        "version: 1\nrules:\n  - name: here\n    when: {attention_backend: [torch_native]}\n"
        "    use: {backend: hybrid, fence_forward: [extend], options: {staging_mb: 1}}\n"
        "    because: a test\ndefault: {use: {backend: copy_engine}, because: a test}\n"
    )
    given = setup(machine, tmp_path)
    result = run(replace(given, env={**given.env, "SGLANG_HICACHE_IO_POLICY": str(policy)}), "auto")
    assert_right(result, reference)
    assert result.plugin is not None
    assert result.plugin["rule"] == "here"
    assert result.plugin["fence_forward"] == ["extend"]
    # Every write has a gather; at most the extends wait for one.
    assert 0 < result.count("forward_fences") <= len(result.answers)


def test_a_damaged_write_back_is_noticed(machine: Machine, tmp_path: Path, reference: DemoRun) -> None:
    """The check above can fail: without the last layer's V, outputs differ."""
    given = setup(machine, tmp_path)
    env = {**given.env, **damaged.environment(tmp_path / "installed")}
    result = run(replace(given, env=env), damaged.NAME)
    assert result.host_tokens > 0
    assert result.identical(reference) < len(reference.answers)


THIRD_PARTY = '''
from sglang_hicache.io_backends import Submission, direct_copies


class RowByRow:
    """Moves every row on its own, on the stream it is given."""

    name = "row_by_row"

    def __init__(self, device, options):
        self.device = device

    def supports(self, geometry):
        return None if geometry.kv_kind == "mha" else "row_by_row knows MHA only"

    def prepare(self, geometry):
        pass

    def submit(self, transfer, stream):
        copies = nbytes = 0
        device_slots = self.device.host_values(transfer.device_slots)
        for i in range(len(transfer.host_slots)):
            batch = direct_copies(transfer.geometry, transfer.host_slots[i : i + 1], device_slots[i : i + 1])
            self.device.copy(batch, stream)
            copies, nbytes = copies + len(batch), nbytes + batch.total_bytes
        return Submission(copies, nbytes)
'''


def test_a_third_partys_backend_is_picked_by_name(
    machine: Machine, tmp_path: Path, reference: DemoRun
) -> None:
    assert len(THIRD_PARTY.strip().splitlines()) < 40
    installed = tmp_path / "installed"
    installed.mkdir()
    (installed / "their_backend.py").write_text(THIRD_PARTY)
    given = setup(machine, tmp_path)
    env = {**given.env, **damaged.third_party(installed, "row_by_row", "their_backend:RowByRow")}
    result = run(replace(given, env=env), "row_by_row")
    assert_right(result, reference)
    assert result.plugin is not None
    assert result.plugin["backend"] == "row_by_row"


def test_an_sglang_without_a_write_fence(fresh_machine: Machine, tmp_path: Path) -> None:
    """0.5.22 has no `write_fence_stream`: the producer fence is ours alone."""
    other = VERSIONS / "0.5.22"
    assert other.is_dir(), "run `make versions`"
    other_release = {**fresh_machine.env(), "PYTHONPATH": str(other)}
    with preloaded.started(tmp_path, other_release) as python:
        given = setup(replace(fresh_machine, python=python), tmp_path)
        given = replace(given, env={**given.env, **other_release})
        reference = run(given, None)
        result = run(given, "hybrid")
    assert result.version == "0.5.22"
    assert_right(result, reference)
