"""Rows of sliding layers: SGLang keeps those of a write until it takes the write as done.

SGLang's own tree, pools and controller, on ordinary memory. Everything that gives such rows away is tried
while writes wait: requests that go past their window, or are over, evictions of either kind of rows, splits,
rows that are taken over from another request, and others that write whatever is free. Run by test_race.py for
each release, in a process that SGLang is changed in for good.
"""

from __future__ import annotations

from functools import cache

import pytest
import unheld
import window_tree

window_tree.install()

from sglang_hicache.io_backends.sglang import versions  # noqa: E402

POLICIES = ["write_through", "write_through_selective", "write_back"]
CORES = ["rust", "python"]
STEPS = 120
SEEDS = range(150)
# Of 0.5.20 and 0.5.21 only the tree in Python can be played here: no backend is given their rows either.
HELD = versions.current().version not in ("0.5.18", "0.5.19")
held = pytest.mark.skipif(not HELD, reason="this release does not hold rows of sliding layers")


@cache
def tree(policy: str, core: str, page: int = 1) -> window_tree.Tree:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND", core)
        try:
            made = window_tree.Tree(policy, page)
        except RuntimeError as error:
            # 0.5.20: its tree in Rust takes no PyTorch as new as the newest release's.
            if core == "rust" and "supports PyTorch" in str(error):
                pytest.skip(str(error))
            raise
    if core == "rust" and core not in type(made.tree.tree_core).__module__:
        pytest.skip("this SGLang has no tree in Rust here")
    return made


def play(made: window_tree.Tree, seeds: range = SEEDS) -> tuple[int, int, int]:
    """Rows that are wrong on the host, of sliding layers and of others; rows of sliding layers written."""
    wrong = others = written = 0
    for seed in seeds:
        made.restart(seed)
        made.play(STEPS)
        wrong += made.rows.wrong["swa"]
        others += made.rows.wrong["full"]
        written += made.rows.written["swa"]
    return wrong, others, written


@held
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("core", CORES)
def test_rows_of_a_write_stay(core: str, policy: str) -> None:
    wrong, others, written = play(tree(policy, core))
    assert (wrong, others) == (0, 0)
    assert written > 2 * len(SEEDS)


@held
@pytest.mark.parametrize("core", CORES)
def test_rows_in_pages(core: str) -> None:
    wrong, others, written = play(tree("write_through", core, 4), range(20))
    assert (wrong, others) == (0, 0)
    assert written > 20 * window_tree.WINDOW


@held
@pytest.mark.parametrize("core", CORES)
def test_the_lock_of_a_write_is_what_holds_them(core: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.mem_cache.unified_cache.components import ComponentType

    made = tree("write_through", core)
    unheld.without_lock(monkeypatch, made.tree, ComponentType.SWA)
    wrong, others, _ = play(made)
    assert wrong
    assert not others


@held
@pytest.mark.parametrize("core", CORES)
def test_a_write_back_holds_them_by_waiting(core: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tree("write_back", core)
    unheld.without_wait(monkeypatch, made.tree, made.controller)
    wrong, _, _ = play(made)
    assert wrong


@pytest.mark.skipif(HELD, reason="rows of sliding layers are held in this release")
@pytest.mark.parametrize("policy", ["write_through", "write_through_selective"])
def test_why_an_older_release_keeps_its_own_copy(policy: str) -> None:
    """What a decode server releases without having taken it are locks of writes."""
    wrong, others, _ = play(tree(policy, "python"), range(100))
    assert wrong
    assert not others
