"""One call on a machine with a GPU: correctness first, then figures, all of it saved as data.

    python -m sglang_hicache.bench.gpu_suite --out results [--skip-tests] [--budget 300] [--sglang]

With ``--sglang``, SGLang's own write-back takes part (see :mod:`sglang_hicache.bench.d2h_sglang`).

Writes ``results/gpu.json`` and prints what it finds. Exit status 1 if a test failed or a byte was wrong.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import time
from pathlib import Path

from sglang_hicache.bench import d2h, d2h_fence, d2h_sglang
from sglang_hicache.bench.d2h import Case

LAYOUTS = ("page_first", "layer_first", "page_first_direct")


def cases(model: str, tokens: tuple[int, ...]) -> list[Case]:
    """The grid of one model, most telling cells first."""
    return [
        Case(model, layout, page_size, n, fragmented)
        for n in tokens
        for layout in LAYOUTS
        for page_size in (1, 16, 64)
        for fragmented in (False, True)
    ]


def run_tests(out: Path) -> int:
    """``pytest -m gpu``; its output in ``out/gpu_tests.txt``."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests/io_backends"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    (out / "gpu_tests.txt").write_text(done.stdout)
    print(done.stdout[-3000:])
    return done.returncode


def prepare_sglang() -> dict[str, object]:
    """Compile SGLang's kernels; what took part, or why nothing did."""
    reason = d2h_sglang.why_not()
    if reason is not None:
        return {"missing": reason}
    # One warning for each of some hundred pools, about their size.
    logging.getLogger("sglang").setLevel(logging.ERROR)
    began = time.monotonic()
    rows = {row for model in (d2h.QWEN3_8B, d2h.DEEPSEEK_V3) for row in model.components}
    failed = d2h_sglang.compile_kernels(rows)
    return {**d2h_sglang.notes(), "compile_s": time.monotonic() - began, "failed": failed}


def main() -> int:
    """Run the suite."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--budget", type=float, default=240, help="seconds for the bandwidth grid")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 512, 32768])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--fence-only", action="store_true", help="measure the forward stall, then stop")
    parser.add_argument("--sglang", action="store_true", help="SGLang's own write-back takes part")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    failed = 0 if args.skip_tests else run_tests(args.out)
    began = time.monotonic()
    parts: dict[str, object] = {"hardware": d2h.hardware()}
    print(parts["hardware"], flush=True)
    parts["link_gb_per_s"] = d2h.link_ceiling()
    parts["hbm_gb_per_s"] = d2h.hbm_ceiling()
    print(f"link {parts['link_gb_per_s']:.1f} GB/s, HBM {parts['hbm_gb_per_s']:.0f} GB/s", flush=True)
    field: list[d2h.Contenders] = [d2h.contenders]
    if args.sglang:
        parts["sglang"] = prepare_sglang()
        print(parts["sglang"], flush=True)
        field.append(d2h_sglang.contenders)

    def say(line: str) -> None:
        print(line, flush=True)

    stalls = d2h_fence.fence(tuple(field[1:]), repeats=args.repeats, budget_s=args.budget, say=say)
    parts["fence"] = stalls
    d2h.write(args.out / "gpu.json", parts)
    if args.fence_only:
        return int(any(row.ms is not None and not row.checked for row in stalls))
    rows: list[d2h.Row] = []
    parts["bandwidth"] = rows
    share = {d2h.QWEN3_8B: 0.75, d2h.DEEPSEEK_V3: 0.25}
    for model, part in share.items():
        rows += d2h.bandwidth(
            model,
            cases(model.name, tuple(args.tokens)),
            repeats=args.repeats,
            budget_s=args.budget * part,
            field_of=field,
            say=say,
        )
        d2h.write(args.out / "gpu.json", parts)
    found = d2h.interference(Case(d2h.QWEN3_8B.name, "page_first", 16, 8192, True), field_of=field)
    parts["interference"] = found
    for each in found:
        print(
            f"{each.forward} beside {each.contender}: {each.slow_down:.3f}x, "
            f"D2H {each.d2h_gb_per_s:.1f} GB/s",
            flush=True,
        )
    parts["seconds"] = time.monotonic() - began
    d2h.write(args.out / "gpu.json", parts)
    wrong = [row for row in rows if row.ms is not None and not row.checked]
    return int(bool(failed or wrong))


if __name__ == "__main__":
    sys.exit(main())
