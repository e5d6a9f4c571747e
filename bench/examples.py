"""Examples of every command, at the end of its help. Each fits 80 columns, and can be pasted."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "": (
        "hicache-io explain --attention-backend fa3 --gpu-arch H100",
        "hicache-io doctor --server-args 'sglang serve MODEL ...'",
        "hicache-io --install-completion",
    ),
    "explain": (
        "hicache-io explain --attention-backend fa3 --gpu-arch H100",
        "hicache-io explain --gpu-arch sm90 --server-args 'sglang serve MODEL ...'",
        "hicache-io explain --gpu-arch H100 --what-if gpu_arch=B200",
        "hicache-io explain --matrix",
    ),
    "doctor": (
        "hicache-io doctor",
        "hicache-io doctor --gpu-arch H100 --server-args 'sglang serve MODEL ...'",
    ),
    "policy": ("hicache-io policy init policy.yaml", "hicache-io policy validate policy.yaml"),
    "policy init": (
        "hicache-io policy init policy.yaml",
        "hicache-io policy init --gpu-arch H100 --fact attention_backend=fa3",
    ),
    "policy show": ("hicache-io policy show", "hicache-io policy show policy.yaml --yaml"),
    "policy validate": ("hicache-io policy validate policy.yaml",),
    "policy schema": ("hicache-io policy schema > policy.schema.json",),
    "race": (
        "hicache-io race",
        "hicache-io race --fences none --backend kernel",
        "hicache-io race --mode all --seeds 20 --json > races.json",
        "hicache-io race --trace timeline.json",
    ),
    "calibrate": ("hicache-io calibrate", "hicache-io calibrate --dry-run --quick"),
    "stress": (
        "hicache-io stress http://127.0.0.1:30000 --duration 10m --out stress.json",
        "hicache-io stress http://127.0.0.1:30000 --compare http://127.0.0.1:30001",
    ),
    "demo": ("hicache-io demo", "hicache-io demo --backend hybrid --page-size 64"),
    "bench": (
        "hicache-io bench all --quick --out results",
        "hicache-io bench compare a/bench.json b/bench.json",
    ),
    "bench measurement": (
        "hicache-io bench {name} --quick",
        "hicache-io bench {name} --layout page_first --page-size 64 --all",
    ),
    "bench serve": (
        "hicache-io bench serve --model MODEL --rounds 2 --out results",
        "hicache-io bench serve --arm kernel --arm auto --workload prefill",
    ),
    "bench list": ("hicache-io bench list bench/results",),
    "bench show": (
        "hicache-io bench show results/bench.json",
        "hicache-io bench show results/bench.json --only bandwidth --all",
    ),
    "bench compare": (
        "hicache-io bench compare a/bench.json b/bench.json",
        "hicache-io bench compare a/bench.json b/bench.json --fail-over 5%",
    ),
    "bench report": ("hicache-io bench report results/bench.json --out report",),
}
"""By command; ``bench measurement`` stands for each of them."""


def epilog(command: str, **names: str) -> str:
    """The end of a command's help. ``names`` fill in what the examples leave open."""
    lines = (each.format(**names) for each in EXAMPLES[command])
    # click leaves a paragraph that begins with \b as it is.
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)
