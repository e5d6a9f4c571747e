"""SGLang on a machine without a driver, and servers to start."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import preloaded
import pytest
from hypothesis import HealthCheck, settings
from launching import Machine
from own_process import SHARD

from sglang_hicache.io_backends.sglang.diagnose import dry_run
from sglang_hicache.io_backends.sglang.no_gpu import fake_libcuda

# What the tests say of a commit is the same each time; `make properties` looks for what they have not seen.
# How long a draw takes says nothing of the code: the first one reads every source file outside site-packages.
_NO_CLOCK = [HealthCheck.too_slow]
settings.register_profile("same", deadline=None, suppress_health_check=_NO_CLOCK, derandomize=True)
settings.register_profile("search", deadline=None, suppress_health_check=_NO_CLOCK, print_blob=True)
settings.load_profile("same")

# Terminals of those who run the tests differ, and workers have one where nobody has: what is said is whole.
os.environ.pop("COLUMNS", None)

SGLANG = Path(__file__).parent / "io_backends" / "sglang"
FIXTURES = {"libcuda", "cpu_sglang", "machine", "fresh_machine", "plain_python", "quick_dry_runs"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        asked = FIXTURES.intersection(getattr(item, "fixturenames", ()))
        if asked or (SGLANG in item.path.parents and not getattr(item.module, "WITHOUT_SGLANG", False)):
            item.add_marker("sglang")
    if SHARD in os.environ:
        nth, of = map(int, os.environ[SHARD].split("/"))
        items[:] = items[nth::of]


@pytest.fixture(scope="session")
def libcuda(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Lets this process import ``sgl_kernel``, driver or not."""
    if not fake_libcuda.loader_finds_libcuda():
        folder = fake_libcuda.build(tmp_path_factory.mktemp("libcuda"))
        ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)


@pytest.fixture(scope="session")
def cpu_sglang(libcuda: None) -> None:
    """SGLang in this process, published for the CPU, with what HiCache lacks there."""
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import ServerArgs

    from sglang_hicache.io_backends.sglang.no_gpu import cpu_engine

    publish(ServerArgs(model_path="dummy", device="cpu"), role="scheduler")
    cpu_engine.install()


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A folder to start servers from, by a Python that has SGLang imported already."""
    fresh = Machine(tmp_path_factory.mktemp("machine"))
    with preloaded.started(fresh.cache, fresh.env()) as python:
        yield replace(fresh, python=python)


@pytest.fixture(scope="session")
def plain_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ...]]:
    """A Python that has SGLang imported already, on a machine without a GPU, for no device in particular."""
    folder = tmp_path_factory.mktemp("plain")
    environment = {**fake_libcuda.environment(folder / "libcuda"), "CUDA_VISIBLE_DEVICES": ""}
    with preloaded.started(folder, {**environment, "OMP_NUM_THREADS": "1"}) as python:
        yield python


@pytest.fixture(scope="session")
def sm90_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ...]]:
    """A Python that has SGLang imported already, on a machine that seems to have a GPU of sm90."""
    folder = tmp_path_factory.mktemp("sm90")
    environment = {**fake_libcuda.environment(folder / "libcuda"), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with preloaded.started(folder, environment, "sm90") as python:
        yield python


@pytest.fixture
def quick_dry_runs(sm90_python: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """What `explain` and `doctor` ask SGLang for a GPU of sm90, without its import."""
    monkeypatch.setattr(dry_run, "PYTHON", sm90_python)


@pytest.fixture(scope="session")
def fresh_machine(machine: Machine) -> Machine:
    """The same, started as users start it: every process imports SGLang itself."""
    return machine.with_python_of_its_own()
