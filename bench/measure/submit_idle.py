"""The measurement ``submit`` against a driver that does nothing, in a process of its own.

:func:`measure` starts it; ``python -m sglang_hicache.bench.measure.submit_idle`` reads what to measure from
standard input and writes rows to standard output, both as JSON.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...io_backends.policy_files import policy_in_force
from ...io_backends.sglang.handover.machine_facts import detect
from ...io_backends.virtual.model import CostModel
from ...policy.decide import decide
from .cases import MODELS, Case, pool_of, slots_of
from .contenders import Task
from .one_write import Setting
from .results import Row, Spread
from .submit import index_row, index_wait, submissions
from .timing import interleaved, spreads

_HERE = "sglang_hicache.bench.measure.submit_idle"
_NO_KERNEL = "SGLang's copy kernels need a GPU"


def measure(
    cases: Sequence[Case],
    *,
    repeats: int,
    policy: str | None,
    wanted: Collection[str] | None,
    options: Mapping[str, Mapping[str, Any]],
) -> list[Row]:
    """Rows of every case, from a new process.

    Raises:
        RuntimeError: it failed (there is no C compiler, say); the message is its last line.
    """
    asked = {
        "cases": [asdict(case) for case in cases],
        "repeats": repeats,
        "policy": policy,
        "wanted": None if wanted is None else sorted(wanted),
        "options": {name: dict(each) for name, each in options.items()},
    }
    done = subprocess.run(
        [sys.executable, "-m", _HERE], input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(next(reversed(done.stderr.strip().splitlines()), "it failed without a word"))
    return [
        Row(
            **{
                **row,
                "case": Case(**row["case"]),
                "metrics": {name: Spread(**each) for name, each in row["metrics"].items()},
            }
        )
        for row in json.loads(done.stdout)
    ]


def _rows(asked: Mapping[str, Any]) -> list[Row]:
    from . import idle_gpu

    with tempfile.TemporaryDirectory() as folder:
        idle_gpu.install(Path(folder))
        found: list[Row] = []
        for each in asked["cases"]:
            case = Case(**each)
            setting = Setting(
                idle_gpu.make_device(),
                policy_in_force(asked["policy"]),
                asked["repeats"],
                asked["wanted"],
                asked["options"],
            )
            task = _task(setting, case)
            found += [_with_model(row) for row in submissions(setting, task)]
            row = index_row(task, None)
            repeats, _ = interleaved({"idle": functools.partial(index_wait, task)}, setting.repeats)
            row.metrics = spreads(repeats["idle"])
            found.append(row)
        return found


def _with_model(row: Row) -> Row:
    """With ``model_us``: what was measured, and what a working driver takes for the entries. **A model.**"""
    if row.metrics and row.copies is not None:
        submit, later = row.metrics["submit_us"], row.metrics["later_us"]
        driver = CostModel().copy_us * row.copies
        row.metrics["model_us"] = Spread(
            median=submit.median + later.median + driver,
            low=submit.low + later.low + driver,
            high=submit.high + later.high + driver,
            n=submit.n,
        )
    return row


def _task(setting: Setting, case: Case) -> Task:
    model, device = MODELS[case.model], setting.device
    geometry = pool_of(case)
    device.prepare_copies(geometry)
    host, rows = slots_of(case)
    facts: dict[str, Any] = {
        "attention_backend": case.attention,
        "kv_kind": model.kv_kind,
        "mem_layout": case.layout,
        "page_size": case.page_size,
        "row_bytes": model.components[0],
        # What the stand-in for Triton's driver compiles for.
        "gpu_arch": "sm90",
        "device": "cuda",
    }
    decision = decide(setting.policy, detect(facts))
    return Task(
        case=case,
        memory=None,
        geometry=geometry,
        host=host,
        rows=rows,
        device_slots=device.indices(rows),
        stream=device.new_stream(),
        device=device,
        decision=decision,
        forwards_wait=bool(decision.fences()),
        options=setting.options,
        upstream=lambda task: _NO_KERNEL,
    )


if __name__ == "__main__":
    print(json.dumps([asdict(row) for row in _rows(json.load(sys.stdin))]))
