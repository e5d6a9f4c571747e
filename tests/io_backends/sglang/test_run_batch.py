"""Nothing writes to host memory between the hook before a forward and its launch, read as source.

The forward fence waits for write-back that was enqueued when `Scheduler.run_batch` is entered. A write that
SGLang submitted further down, before the launch, would run beside the forward that was to wait for it.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from functools import cache

import pytest
from repository import VERSIONS
from test_device_readers import CALLERS, HOOKED

from sglang_hicache.io_backends.sglang.versions import SUPPORTED

WHEELS = VERSIONS

LAUNCHES = frozenset({"forward_batch_generation", "forward_batch_embedding", "forward_batch_split_prefill"})
"""Methods of SGLang's workers that launch a batch."""

OWNERS = frozenset({"tree_cache", "cache_controller", "decode_offload_manager"})
"""Attributes of a scheduler behind which every caller of the hooked copy is. (A server with HiSparse, whose
forwards copy by themselves, is refused.)"""

WRITERS = OWNERS | {function.rpartition(".")[2] for names in CALLERS[HOOKED].values() for function in names}
"""What must not be named on the way to a launch."""

OTHERS: Mapping[str, str] = {
    "self.forward_stream": "streams wait for each other",
    "self.copy_stream": "streams wait for each other",
    "self.device_module": "makes an event",
    "self.future_map": "relays sampled tokens and lengths between steps",
    "self._confidence_budget_prepare": "decides how many draft tokens to verify",
    "self.scripted_scheduler_hook": "a test of SGLang's",
    "self.profiler_manager": "starts and stops a profile",
    "self.metrics_reporter": "counts",
    "self.spec_algorithm": "asks which algorithm",
    "self.batch_record_buf": "keeps tensors alive",
    "self.model_worker": "launches",
    "self.tp_worker": "launches",
    "allocator": "is told of the forward that runs (unified memory)",
    "batch": "is asked of its mode and lengths",
    "batch_result": "results to the host, to plain tensors",
    "ret": "results to the host, to plain tensors",
    "new_seq_lens": "a tensor",
    "forward_done": "records an event behind the launch",
    "resolve_forward_inputs": "fills in the input ids",
    "eagle_prepare_for_verify": "builds the input of a verification",
    "EmbeddingBatchResult": "holds results",
    "get_parallel": "asks for the parallel sizes",
    "partial": "of future_map.publish",
    "logger": "logs",
    "time": "the time, and a test's sleep",
    **dict.fromkeys(("getattr", "int", "list"), "Python's own"),
}
"""Whom `run_batch` calls until the last launch, but for the scheduler's own methods, and what for."""


@cache
def methods(version: str) -> dict[str, list[ast.FunctionDef]]:
    """Methods of the scheduler by name, of its mixins included."""
    root = WHEELS / version / "sglang/srt"
    assert root.is_dir(), f"SGLang {version} is not unpacked: run `make versions`"
    found: dict[str, list[ast.FunctionDef]] = {}
    for folder in ("managers", "disaggregation", "multiplex"):
        for path in (root / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8-sig"))):
                if isinstance(node, ast.ClassDef) and node.name.startswith("Scheduler"):
                    for each in node.body:
                        if isinstance(each, ast.FunctionDef):
                            found.setdefault(each.name, []).append(each)
    return found


def calls_until_launch(function: ast.FunctionDef) -> list[ast.Call]:
    """Calls in the body that stand no further down than the last launch; all where nothing is launched."""
    calls = [node for each in function.body for node in ast.walk(each) if isinstance(node, ast.Call)]
    last = max((call.lineno for call in calls if name_of(call) in LAUNCHES), default=function.end_lineno or 0)
    return [call for call in calls if call.lineno <= last]


def name_of(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def receiver_of(call: ast.Call) -> str:
    """Who is called: ``self.x`` of ``self.x.y[z].f()``, ``x`` of ``x.y.f()``, ``f`` of ``f()``."""
    path: list[str] = []
    node: ast.expr = call.func
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Attribute):
            path.append(node.attr)
        assert isinstance(node, ast.Attribute | ast.Subscript | ast.Call), ast.unparse(call.func)
        node = node.func if isinstance(node, ast.Call) else node.value
    return f"self.{path[-1]}" if node.id == "self" and path else node.id


def run_batch(version: str) -> ast.FunctionDef:
    """The scheduler's; its mixins only declare one."""
    return max(methods(version)["run_batch"], key=lambda each: len(each.body))


def own_methods(version: str, calls: list[ast.Call]) -> set[str]:
    """Of the scheduler, called here or by one another."""
    known = methods(version)
    found: set[str] = set()
    left = [
        receiver_of(call).removeprefix("self.") for call in calls if receiver_of(call).startswith("self.")
    ]
    while left:
        name = left.pop()
        if name in known and name not in found and name != "run_batch":
            found.add(name)
            for function in known[name]:
                left += [
                    node.attr
                    for node in ast.walk(function)
                    if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "self"
                ]
    return found


def named(node: ast.AST) -> Iterator[str]:
    for each in ast.walk(node):
        if isinstance(each, ast.Attribute):
            yield each.attr
        elif isinstance(each, ast.Name):
            yield each.id
        elif isinstance(each, ast.Constant) and isinstance(each.value, str):
            yield each.value  # getattr(self, "tree_cache")


@pytest.mark.parametrize("version", SUPPORTED)
def test_whom_it_calls_until_the_launch_is_known(version: str) -> None:
    calls = calls_until_launch(run_batch(version))
    assert {name_of(call) for call in calls} >= LAUNCHES
    own = {f"self.{name}" for name in methods(version)}
    assert {receiver_of(call) for call in calls} - own - OTHERS.keys() == set()


@pytest.mark.parametrize("version", SUPPORTED)
def test_none_of_them_writes_to_the_host(version: str) -> None:
    """Neither `run_batch` itself nor a method of the scheduler that it calls, nor one that that may call."""
    calls = calls_until_launch(run_batch(version))
    assert WRITERS.isdisjoint(name for call in calls for name in named(call))
    for method in own_methods(version, calls):
        for function in methods(version)[method]:
            assert WRITERS.isdisjoint(named(function)), f"{method} of SGLang {version}"


@pytest.mark.parametrize("version", SUPPORTED)
@pytest.mark.parametrize("path", ["managers/tp_worker.py", "model_executor/model_runner.py"])
def test_what_launches_does_not_know_who_writes(version: str, path: str) -> None:
    source = WHEELS / version / "sglang/srt" / path
    assert WRITERS.isdisjoint(named(ast.parse(source.read_text(encoding="utf-8"))))


def test_each_that_is_known_is_called() -> None:
    called = {receiver_of(call) for version in SUPPORTED for call in calls_until_launch(run_batch(version))}
    assert OTHERS.keys() - called == set()


@pytest.mark.parametrize(
    ("line", "found_by"),
    [
        ("flush(self)", test_whom_it_calls_until_the_launch_is_known),
        ("self.writer.submit(batch)", test_whom_it_calls_until_the_launch_is_known),
        ("self.future_map.publish(self.tree_cache)", test_none_of_them_writes_to_the_host),
        ("self.check_hicache_events()", test_none_of_them_writes_to_the_host),
    ],
)
def test_a_call_that_comes_new_is_found(
    line: str, found_by: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    version = SUPPORTED[-1]
    added = "def check_hicache_events(self): self._later()\ndef _later(self): self.tree_cache.x()"
    changed, *others = ast.parse(f"{ast.unparse(run_batch(version))}\n{added}").body
    assert isinstance(changed, ast.FunctionDef)
    changed.body.insert(0, ast.parse(line).body[0])
    for function in (changed, *others):
        assert isinstance(function, ast.FunctionDef)
        monkeypatch.setitem(methods(version), function.name, [function])
    with pytest.raises(AssertionError):
        found_by(version)
