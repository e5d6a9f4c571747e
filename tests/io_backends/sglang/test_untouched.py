"""With SGLang's own io backends the plug-in changes nothing: same functions, same resolution, same calls."""

from __future__ import annotations

import json
import subprocess

import pytest
from launching import Machine

from sglang_hicache.io_backends.registry import UPSTREAM_NAMES

LAYOUTS = ("layer_first", "page_first", "page_first_direct", "page_head")

PROBE = """
import hashlib, inspect, json, pkgutil, sys
from sglang.srt.plugins import load_plugins
from sglang_hicache.io_backends.sglang import versions
import sglang.srt.managers.scheduler

points = [p.target for p in versions.current().scheduler_points]

def functions():
    found = {}
    for target in points:
        owner, _, name = target.rpartition('.')
        found[target] = getattr(pkgutil.resolve_name(owner), name)
    return found

before = functions()
load_plugins()
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.server_args import prepare_server_args

resolved = {}
for name in %(names)r:
    for layout in %(layouts)r:
        options = ['--hicache-io-backend', name, '--hicache-mem-layout', layout]
        args = prepare_server_args(sys.argv[1:] + options)
        args.resolve_once()
        values = args.resolved_dict()
        # A seed is drawn for each server.
        values.pop('random_seed', None)
        resolved[name + '/' + layout] = json.dumps(values, sort_keys=True, default=str)
        assert not hasattr(args, '_hicache_io'), 'a decision was attached'
        # What a scheduler does with these arguments: its constructor gets them and nothing else happens.
        calls = []
        import sglang.srt.managers.scheduler as module
        wrapped = module.Scheduler.__init__
        inner = inspect.unwrap(wrapped)
        if wrapped is not inner:
            from sglang_hicache.io_backends.sglang.scheduler import scheduler_hooks
            scheduler_hooks.around_scheduler_init(
                lambda *a, **k: calls.append((a, k)), 'scheduler', args, 'ports', extra=1)
            assert calls == [(('scheduler', args, 'ports'), {'extra': 1})]
            assert scheduler_hooks.active() is None

after = functions()
changed = [target for target in points if before[target] is not after[target]]
print(json.dumps({'changed': changed, 'hooks': sorted(HookRegistry._hooks), 'resolved': resolved}))
"""


def probe(machine: Machine, plugins: str) -> dict[str, object]:
    from sglang_hicache.bench import server_options

    code = PROBE % {"names": UPSTREAM_NAMES, "layouts": LAYOUTS}
    import os

    args = server_options.base_args(machine.model, cpu_engine=True)
    done = subprocess.run(
        [*machine.python, "-c", code, *args, "--enable-hierarchical-cache", "--port", "1"],
        env={**os.environ, **machine.env(), "SGLANG_PLUGINS": plugins},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def without(machine: Machine) -> dict[str, object]:
    return probe(machine, "another")


@pytest.fixture(scope="module")
def with_plugin(machine: Machine) -> dict[str, object]:
    return probe(machine, "hicache_io")


def test_the_functions_that_run_are_sglangs_own_objects(with_plugin: dict[str, object]) -> None:
    """Only the scheduler's constructor is wrapped, to find out that there is nothing to do."""
    assert with_plugin["changed"] == ["sglang.srt.managers.scheduler.Scheduler.__init__"]


def test_only_arguments_and_the_constructor_are_hooked(with_plugin: dict[str, object]) -> None:
    assert with_plugin["hooks"] == [
        "sglang.srt.arg_groups.hicache_hook.handle_hicache",
        "sglang.srt.arg_groups.pipeline.run_resolution_pipeline",
        "sglang.srt.managers.scheduler.Scheduler.__init__",
        "sglang.srt.server_args.ServerArgs.add_cli_args",
        "sglang.srt.server_args.ServerArgs.from_cli_args",
    ]


def test_every_option_resolves_as_without_the_plugin(
    with_plugin: dict[str, object], without: dict[str, object]
) -> None:
    assert without["hooks"] == []
    assert len(with_plugin["resolved"]) == len(UPSTREAM_NAMES) * len(LAYOUTS)  # type: ignore[arg-type]
    assert with_plugin["resolved"] == without["resolved"]
