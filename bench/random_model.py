"""A model with random weights on disk."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_RECIPE = "recipe.json"


def write_random_model(
    folder: Path, config: Mapping[str, Any], *, model_type: str = "llama", seed: int = 0
) -> Path:
    """Write a model (bfloat16, no tokenizer) into `folder`, unless it is there already, and return that.

    Args:
        folder: of the model; its parents are made.
        config: keywords of transformers' configuration class.
        model_type: which class, by transformers' name for it.
        seed: of the weights.

    Raises:
        ModuleNotFoundError: transformers or torch is not installed (SGLang brings both).
        OSError: `folder` cannot be written.
    """
    recipe = json.dumps({"model_type": model_type, "seed": seed, **config}, sort_keys=True)
    marker = folder / _RECIPE
    if marker.exists() and marker.read_text(encoding="utf-8") == recipe:
        return folder

    import torch
    import transformers

    log: Any = transformers.utils.logging  # has no types
    log.disable_progress_bar()  # for half a megabyte

    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name))
    try:
        # The caller's random stream stays as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made: Any = transformers.AutoConfig.for_model(model_type, **config)
            new: Any = transformers.AutoModelForCausalLM.from_config
            model = new(made)
        model.to(torch.bfloat16).save_pretrained(scratch)
        # What transformers takes apart and does not write again, SGLang's own classes of some models read.
        written = scratch / "config.json"
        saved = json.loads(written.read_text(encoding="utf-8"))
        written.write_text(json.dumps({**config, **saved}, indent=2) + "\n", encoding="utf-8")
        (scratch / _RECIPE).write_text(recipe, encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        # A rename, so that a run that was interrupted leaves no half-written model behind.
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder
