"""`tunelab quickstart`: a real model, fine-tuned twice on real text, measured before and after, in minutes on a laptop.

Two ordinary recipes and one ordinary evaluation: nothing here that a user could not write as YAML.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tunelab.config import Recipe, parse_recipe
from tunelab.evaluation.evaluate import evaluate_run
from tunelab.progress import Progress
from tunelab.report import write_report
from tunelab.train import train

DATA = "builtin:helpful-mini"

# Sized so that everything, evaluation included, takes at most five minutes on two CPU cores with SmolLM2-135M.
SFT_RECORDS = 72
DPO_PAIRS = 48
HELDOUT_PAIRS = 40
BATCH_SIZE = 4


def quickstart(*, output_dir: str, progress: Progress, model: str = "smollm2-135m") -> dict[str, Any]:
    """SFT, then DPO from that SFT model, then base, SFT and DPO side by side on held-out conversations.

    Returns {"report": path, "table": {"columns", "rows"}, "next_commands", "seconds", "runs"}.
    """
    began = time.perf_counter()
    stamp = f"{datetime.now(UTC):%Y%m%d-%H%M%S}"
    progress.note("1/3 supervised fine-tuning (sft)")
    sft = train(_recipe("sft", model, output_dir, f"quickstart-{stamp}-sft"), progress=progress)
    progress.note("2/3 preference tuning (dpo) from the sft model")
    dpo = train(_recipe("dpo", str(sft.path), output_dir, f"quickstart-{stamp}-dpo"), progress=progress)
    progress.note("3/3 base, sft and dpo on the same held-out conversations")
    evaluation = evaluate_run(dpo, progress=progress)
    report = write_report(dpo, previous=[sft])
    return {
        "report": str(report),
        "table": _table(evaluation),
        "next_commands": [f"tunelab chat {dpo.path}", "tunelab sft recipes/smollm2-sft-cpu.yaml"],
        "seconds": time.perf_counter() - began,
        "runs": [str(sft.path), str(dpo.path)],
    }


def _recipe(method: str, model: str, output_dir: str, run_name: str) -> Recipe:
    supervised = method == "sft"
    return parse_recipe(
        {
            "model": {"name": model},
            "data": {
                "train": DATA,
                "eval": DATA,
                "limit_train": SFT_RECORDS if supervised else DPO_PAIRS,
                "limit_eval": HELDOUT_PAIRS,
                "max_length": 256,
            },
            "method": {"name": method},
            "optimizer": {
                "learning_rate": 5e-5 if supervised else 1e-5,
                "schedule": {"lr_scheduler_type": "cosine", "warmup_ratio": 0.1},
            },
            "training": {
                "per_device_train_batch_size": BATCH_SIZE,
                "save_total_limit": 1,
                "output_dir": str(Path(output_dir)),
                "run_name": run_name,
            },
            # Curves need few points here; the comparison at the end uses every held-out record.
            "evaluation": {"eval_steps": 6, "eval_samples": 8, "generation_prompts": 0, "max_new_tokens": 64},
        }
    )


def _table(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Rows of metric, one column an arm: value [low, high]."""
    labels = {
        "eval/nll": "held-out loss (nats/token)",
        "eval/perplexity": "held-out perplexity",
        "rewards/margins": "reward margin over base (nats)",
        "rewards/accuracies": "reward accuracy over base",
        "stage/accuracies": "reward accuracy over last stage",
    }
    arms = evaluation["arms"]

    def cell(metric: dict[str, Any]) -> str:
        return f"{metric['value']:.3f} [{metric['low']:.3f}, {metric['high']:.3f}]"

    rows = [
        [label, *(cell(arm["metrics"][name]) for arm in arms)]
        for name, label in labels.items()
        if name in arms[0]["metrics"]
    ]
    return {"columns": ["", *(arm["name"] for arm in arms)], "rows": rows}
