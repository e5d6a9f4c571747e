"""The gather's machine code, compiled for each architecture without a GPU: wide accesses, no spills."""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pools import make_pool

from sglang_hicache.io_backends.device.gather import Gather
from sglang_hicache.io_backends.device.gather_plan import WARPS, Launch, plan
from sglang_hicache.io_backends.plan.chunks import Chunk, staged

pytest.importorskip("triton", reason="the gather needs Triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter compiles nothing", allow_module_level=True)

ARCHITECTURES = (80, 90, 100, 120)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile for real, and leave nothing in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def launch_of(layout: str, row_bytes: int, *, heads: int = 1, address: int = 4096) -> Launch:
    """The launch for a pool whose device rows begin at ``address``."""
    pool = make_pool(layout, layers=32, page_size=16, row_bytes=(row_bytes, row_bytes), heads=heads, pages=1)
    parts = tuple(
        replace(part, device_rows=tuple(address + i * row_bytes * 64 for i in range(32)))
        for part in pool.geometry.components
    )
    geometry = replace(pool.geometry, components=parts)
    (launch,) = plan(staged(geometry, 16), 256)
    return launch


@cache
def compiled(arch: int, constants: tuple[tuple[str, int], ...]) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sglang_hicache.io_backends.device.gather_kernel import RUNTIME_INTEGERS, gather_rows

    signature = {"table": "*i64", "slots": "*i64"}
    signature |= dict.fromkeys(RUNTIME_INTEGERS, "i64")
    signature |= {name: "constexpr" for name, _ in constants}
    source = ASTSource(fn=gather_rows, signature=signature, constexprs=dict(constants), attrs={})
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": WARPS})


def code(arch: int, launch: Launch) -> Any:
    return compiled(arch, tuple(launch.constants.items()))


def accesses(ptx: str) -> Counter[tuple[str, int]]:
    """("ld" or "st", bytes) of every access to global memory."""
    found: Counter[tuple[str, int]] = Counter()
    for kind, count, bits in re.findall(r"\b(ld|st)\.global(?:(?:\.|::)\w+)*?(?:\.v(\d))?\.[bsuf](\d+)", ptx):
        found[kind, int(count or 1) * int(bits) // 8] += 1
    return found


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers, stack bytes (spills live there) and local bytes, as cuobjdump reports them."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton ships no cuobjdump")
    (folder / "gather.cubin").write_bytes(cubin)
    command = [str(tool), "--dump-resource-usage", str(folder / "gather.cubin")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", said)}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_aligned_rows_move_in_16_byte_accesses_without_spills(arch: int, tmp_path: Path) -> None:
    built = code(arch, launch_of("layer_first", 2048))
    found = accesses(built.asm["ptx"])
    assert found["ld", 16] == found["st", 16] == 8
    # What else is loaded: the row table, and one index for each of the 8 rows.
    assert set(found) == {("ld", 16), ("st", 16), ("ld", 8)}
    assert "bar.sync" not in built.asm["ptx"], "the tile goes through shared memory"
    assert len(re.findall(r"ld\.global\.\S*evict_first\S*v2", built.asm["ptx"])) == 8
    assert len(re.findall(r"st\.global\.cs\.v2", built.asm["ptx"])) == 8
    used = resources(built.asm["cubin"], tmp_path)
    assert used["STACK"] == 0
    assert used["LOCAL"] == 0
    # 64 with Triton 3.6 and 3.8 on sm_90; up to 128 would still leave room for two blocks a multiprocessor.
    assert used["REG"] <= 96


@pytest.mark.parametrize(
    ("layout", "row_bytes", "heads"),
    # MLA's row; page_head's pieces of one head; a paged layout's division.
    [("page_first", 1152, 1), ("page_head", 2048, 8), ("page_first_direct", 1024, 1)],
)
def test_other_shapes_are_as_wide(layout: str, row_bytes: int, heads: int, tmp_path: Path) -> None:
    built = code(90, launch_of(layout, row_bytes, heads=heads))
    found = accesses(built.asm["ptx"])
    assert found["ld", 16] == found["st", 16] == 8
    used = resources(built.asm["cubin"], tmp_path)
    assert (used["STACK"], used["LOCAL"]) == (0, 0)
    assert used["REG"] <= 128


@pytest.mark.parametrize(
    ("row_bytes", "address", "width"),
    [(24, 4096, 8), (2048, 4100, 4), (2048, 4098, 2), (6, 4096, 2), (2048, 4097, 1)],
)
def test_narrower_rows_never_straddle(row_bytes: int, address: int, width: int, tmp_path: Path) -> None:
    launch = launch_of("layer_first", row_bytes, address=address)
    assert launch.constants["WIDTH"] == width
    built = code(90, launch)
    found = accesses(built.asm["ptx"])
    assert {size for kind, size in found if kind == "st"} == {width}
    # Indices and the row table are 8 bytes an entry and aligned to that.
    assert {size for kind, size in found if kind == "ld"} <= {width, 8, 16} - ({16} if width < 16 else set())
    assert resources(built.asm["cubin"], tmp_path)["STACK"] == 0


def test_what_varies_between_chunks_is_not_compiled_in() -> None:
    """Else a chunk of another size would compile again, under a write."""
    from sglang_hicache.io_backends.device.gather_kernel import RUNTIME_INTEGERS, gather_rows

    by_name = {parameter.name: parameter for parameter in gather_rows.params}
    for name in RUNTIME_INTEGERS:
        assert by_name[name].do_not_specialize
        assert by_name[name].annotation_type == "i64", "its type would follow its value"
    for name in ("table", "slots"):
        assert by_name[name].do_not_specialize_on_alignment, "indices may begin anywhere"


class RecordingDriver:
    """As much of a Triton driver as a launch needs; keeps what would be launched."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []
        self.looked_up = 0
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (1, 2, 64, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": 1 << 17},
        )
        # (metadata and hooks, which are Triton's own, left out)
        self.launcher_cls = lambda source, metadata: (
            lambda x, y, z, stream, function, *rest: self.launched.append(
                (x, y, z, stream, function, rest[4:])
            )
        )

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        self.looked_up += 1
        return 77


def test_later_launches_skip_tritons_look_up_and_launch_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from triton.runtime import driver

    recording = RecordingDriver()
    monkeypatch.setattr(driver, "_active", recording)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    pool = make_pool("page_first", layers=2, page_size=1, row_bytes=(32, 32), pages=64)
    gather, stream = Gather(), SimpleNamespace(cuda_stream=77)
    for dtype in (torch.int64, torch.int32):
        slots = torch.arange(10, dtype=dtype)
        for _ in range(2):
            gather.launch(staged(pool.geometry, 10), 1 << 20, slots, Chunk(2, 9), 4, stream)
        first, second = recording.launched[-2:]
        assert first == second
        assert first[:4] == (4, 1, 1, 77)
        assert recording.looked_up == 1, "the second launch asked Triton for the kernel again"
        recording.looked_up = 0


def test_a_launch_has_the_kernels_arguments_in_its_order() -> None:
    """A compiled kernel is called with all of them by position."""
    from sglang_hicache.io_backends.device.gather_kernel import gather_rows

    launch = launch_of("page_head", 2048, heads=8)
    first = ["table", "slots", "base", "start", "tokens", "first_slot"]
    assert gather_rows.arg_names == [*first, *launch.strides, *launch.constants]
    assert launch.arguments == (*launch.strides.values(), *launch.constants.values())


def test_a_chunk_of_any_size_and_place_has_the_same_constants() -> None:
    pool = make_pool("page_first_direct", layers=3, page_size=16, row_bytes=(64, 64), pages=4)
    constants = [
        launch.constants
        for slots in (16, 32, 64)
        for base in (256, 512, 1 << 40)
        for launch in plan(staged(pool.geometry, slots), base)
    ]
    assert all(each == constants[0] for each in constants)
