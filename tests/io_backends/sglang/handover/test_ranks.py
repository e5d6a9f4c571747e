"""All ranks start, or none: real processes over gloo (`ranks_cases`), and the comparison itself."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from sglang_hicache.io_backends.policy_files import default_policy
from sglang_hicache.io_backends.sglang import versions
from sglang_hicache.io_backends.sglang.errors import RefusedError
from sglang_hicache.io_backends.sglang.handover import decision_handover, ranks
from sglang_hicache.io_backends.sglang.handover.ranks import Standing, disagreement
from sglang_hicache.io_backends.sglang.scheduler import scheduler_hooks
from sglang_hicache.policy.decide import decide
from sglang_hicache.policy.facts import Facts

CASES = Path(__file__).parent / "ranks_cases.py"


WORLD = 3

DIFFERENT = {
    "another policy": ["rank 1 on HOST would not do the same as rank 0 on HOST", "fence_forward"],
    "another launcher's facts": ["rank 1 on HOST", "fact page_size is 32, not 64"],
    "another GPU": ["rank 1 on HOST refuses", "gpu_arch is sm100", "decision was made for sm90"],
    "an older driver": ["rank 1 on HOST refuses", "batch_copy is False"],
    "other kernels": ["rank 1 on HOST refuses", "sgl_kernel is 0.4.9", "made for 0.4.10"],
    "another attention backend": ["prefill_attention_backend is flashinfer", "made for fa3"],
    "a rank refuses": ["rank 1 on HOST refuses: no hook here"],
    "a rank cannot read its facts": ["rank 1 on HOST refuses", "cannot be read", "no_such_thing"],
}


def run(tmp_path: Path, *cases: str) -> list[tuple[int, list[str]]]:
    """Status and lines of each rank; a rank that is still there after a minute is a failure."""
    processes = [
        subprocess.Popen(
            [sys.executable, str(CASES), str(rank), str(WORLD), str(tmp_path / "store"), *cases],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(WORLD)
    ]
    end = time.monotonic() + 60
    try:
        outputs = [process.communicate(timeout=max(end - time.monotonic(), 1))[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(each.returncode, output.splitlines()) for each, output in zip(processes, outputs, strict=True)]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What each rank said, by case; one set of processes for all of them."""
    cases = ["all agree", *DIFFERENT, "all agree again"]
    by_rank = run(tmp_path_factory.mktemp("ranks"), *cases)
    assert [status for status, _ in by_rank] == [0] * WORLD
    assert [len(lines) for _, lines in by_rank] == [len(cases)] * WORLD
    return {case: [lines[index] for _, lines in by_rank] for index, case in enumerate(cases)}


@pytest.mark.parametrize("case", ["all agree", "all agree again"])
def test_ranks_that_agree_start(said: dict[str, list[str]], case: str) -> None:
    assert said[case] == ["started"] * WORLD


@pytest.mark.parametrize("case", DIFFERENT)
def test_one_rank_that_differs_stops_all_with_one_message(said: dict[str, list[str]], case: str) -> None:
    (message,) = set(said[case])
    assert message.startswith("sglang-hicache-io: ")
    for words in DIFFERENT[case]:
        assert words in message


@pytest.mark.parametrize("case", ["a rank dies", "a rank hangs"])
def test_a_rank_that_does_not_answer_stops_the_others(tmp_path: Path, case: str) -> None:
    others = run(tmp_path, case)
    assert others.pop(1) == (9, [])
    for _, (message,) in others:
        assert "does not start alone: not every rank answered" in message


def test_a_rank_that_is_alone_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "view", lambda server_args: server_args)
    monkeypatch.setattr(ranks, "running_facts", lambda scheduler: Facts.given(gpu_arch="sm90"))
    scheduler = SimpleNamespace(server_args=SimpleNamespace(tp_size=1, pp_size=1))
    ranks.agree(scheduler, decide(default_policy(), Facts.given(gpu_arch="sm90")))
    with pytest.raises(RefusedError, match=r"gpu_arch is sm90 .* made for sm100"):
        ranks.agree(scheduler, decide(default_policy(), Facts.given(gpu_arch="sm100")))


def test_a_rank_whose_hooks_cannot_be_switched_on_still_meets_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Behind the guard, which comes with the decision, before SGLang loads the plug-in."""
    module = ModuleType("sglang.srt.managers.scheduler")
    built, met = [], []

    class Scheduler:
        def __init__(self, server_args: object) -> None:
            built.append(self)

    def fails(*_: object) -> None:
        raise RefusedError("a hook is missing")

    def agree(scheduler: object, decision: object, refusal: Exception | None) -> None:
        met.append((scheduler, str(refusal)))
        raise RefusedError(f"rank 1 refuses: {refusal}")

    module.Scheduler = Scheduler  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(decision_handover, "_taken_over", False)
    monkeypatch.setattr(scheduler_hooks, "_activate", fails)
    monkeypatch.setattr(scheduler_hooks, "_built", False)
    monkeypatch.setattr(ranks, "alone", lambda server_args: False)
    monkeypatch.setattr(ranks, "agree", agree)
    decision = decide(default_policy(), Facts.given(gpu_arch="sm90"))
    arguments = SimpleNamespace(
        **{decision_handover.ATTRIBUTE: decision_handover.Carried(decision.to_dict())}
    )
    decision_handover._guard_scheduler()
    scheduler = object.__new__(Scheduler)
    with pytest.raises(SystemExit):
        scheduler_hooks.around_scheduler_init(Scheduler.__init__, scheduler, arguments)
    assert built == [scheduler]
    assert [each for each, _ in met] == [scheduler]
    assert "a hook is missing" in met[0][1]


@pytest.mark.parametrize("seen", [True, False], ids=["hooked", "before the hook"])
@pytest.mark.parametrize(("first", "second"), [("ours", "ours"), ("ours", "sglangs"), ("sglangs", "ours")])
def test_a_second_scheduler_in_a_process_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    first: str,
    second: str,
    seen: bool,
) -> None:
    """Forwards of one would wait by the other's fences, or its rows be copied behind the other's forwards."""
    module = ModuleType("sglang.srt.managers.scheduler")
    module.Scheduler = type("Scheduler", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    kept = module.Scheduler()  # the first one
    active = object() if first == "ours" else None
    monkeypatch.setattr(scheduler_hooks, "_active", active)
    monkeypatch.setattr(scheduler_hooks, "_built", seen)
    monkeypatch.setattr(decision_handover, "_taken_over", True)
    monkeypatch.setattr(ranks, "alone", lambda server_args: True)
    decision = decide(default_policy(), Facts.given(gpu_arch="sm90"))
    carried = {decision_handover.ATTRIBUTE: decision_handover.Carried(decision.to_dict())}
    built: list[object] = []
    with pytest.raises(SystemExit):
        scheduler_hooks.around_scheduler_init(
            lambda *each: built.append(each),
            module.Scheduler(),
            SimpleNamespace(**(carried if second == "ours" else {})),
        )
    assert built == []
    assert scheduler_hooks.active() is active
    assert "has a scheduler already" in capsys.readouterr().err
    del kept


def test_schedulers_of_sglangs_own_are_none_of_our_business(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_hooks, "_active", None)
    monkeypatch.setattr(scheduler_hooks, "_built", False)
    searched = "their objects are not searched either"
    monkeypatch.setattr(scheduler_hooks, "_is_another_there", lambda _: pytest.fail(searched))
    built: list[object] = []
    for _ in range(2):
        scheduler_hooks.around_scheduler_init(
            lambda *each: built.append(each), object(), SimpleNamespace(hicache_io_backend="kernel")
        )
    assert len(built) == 2


def test_a_scheduler_that_the_decision_reaches_without_the_plug_in_is_not_built(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = ModuleType("sglang.srt.managers.scheduler")
    built: list[object] = []
    module.Scheduler = type("Scheduler", (), {"__init__": built.append})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(decision_handover, "_taken_over", False)
    decision_handover._guard_scheduler()
    with pytest.raises(SystemExit):
        module.Scheduler()
    assert built == []
    assert "was not loaded in this process" in capsys.readouterr().err


def standing(rank: int = 0) -> Standing:
    return Standing(f"rank {rank} on a", "0.1.0", {"backend": "hybrid"}, {"gpu_arch": "sm90"}, None)


def test_another_plugin_version_is_named() -> None:
    problem = disagreement([standing(), replace(standing(1), plugin="0.2.0")])
    assert problem is not None
    assert "sglang-hicache-io is 0.2.0, not 0.1.0" in problem


def test_what_one_rank_does_not_know_is_a_difference() -> None:
    problem = disagreement([standing(), replace(standing(1), machine={"gpu_arch": None})])
    assert problem is not None
    assert "gpu_arch is unknown, not sm90" in problem


def test_refusals_come_before_differences() -> None:
    refusing = replace(standing(1), problem="no hook", plugin="0.2.0")
    assert disagreement([standing(), refusing, refusing]) == (
        "rank 1 on a refuses: no hook (and so do 1 more)"
    )
    assert disagreement([refusing]) == "no hook"


def test_the_same_from_all_is_no_disagreement() -> None:
    assert disagreement([standing(), standing(1), standing(2)]) is None
