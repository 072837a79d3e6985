"""Run folders as training and `tunelab evaluate` write them, with invented numbers. No model, no torch."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from tunelab.config import parse_recipe
from tunelab.runs import RunFolder

PROMPTS = (
    "My basil plant on the kitchen windowsill is drooping even though I water it every day. What is wrong?",
    "Human: I need a birthday message for my colleague.\n\nAssistant: Happy to help! What is she like?\n\n"
    "Human: She loves hiking and bad puns. Keep it to two sentences.",
)
ANSWERS = {
    "base": "I am not sure what you mean by that. I am not sure what you mean by that. I am not sure what you mean.",
    "sft": "It is probably getting too much water. Let the soil dry out before watering it again.",
    "dpo": "Daily watering is the likely cause: basil droops when its roots sit in wet soil. Push a finger two "
    "centimetres in, and water only when it feels dry. Check that the pot has a hole, and empty the saucer.",
}


def build_run(
    root: Path, name: str, method: str = "sft", *, steps: int = 120, seed: int = 0, model: str = ""
) -> RunFolder:
    """A completed run with curves, samples, data summaries and costs."""
    recipe = parse_recipe(
        {
            "model": {"name": model or "smollm2-135m"},
            "data": {"train": "builtin:helpful-mini", "eval": "builtin:helpful-mini", "max_length": 256},
            "method": {"name": method},
            "training": {"output_dir": str(root), "run_name": name},
        }
    )
    run = RunFolder.create(recipe)
    log_curves(run, method, steps, seed)
    for step in (0, steps // 2, steps):
        run.log_sample(step, PROMPTS[0], ANSWERS["base" if step == 0 else "sft"][: 60 + step], "Let it dry out.")
    rows = run.metrics("eval")
    best = min(rows, key=lambda row: row["eval/loss"])
    run.update(
        status="completed",
        created="2026-03-04T09:12:44+00:00",
        finished="2026-03-04T09:15:02+00:00",
        model={
            "source": model or "smollm2-135m",
            "architecture": "LlamaForCausalLM",
            "parameters": 134_515_008,
            "trainable_parameters": 134_515_008,
            "device": "cpu",
            "precision": "float32",
            "layout": "packed",
            "layout_reason": None,
        },
        data={"train": data_summary("train", method, dropped=2), "eval": data_summary("test", method)},
        cost=cost(steps),
        forecast_and_measured=forecast_and_measured(steps),
        best={"step": best["step"], "eval/loss": best["eval/loss"]},
        result={key: value for key, value in rows[-1].items() if "/" in key},
        resumes=[],
        error=None,
    )
    return run


def log_curves(run: RunFolder, method: str, steps: int, seed: int = 0, every: int = 12) -> None:
    """Train and eval rows: a decaying loss with noise, overfitting a little at the end; rewards for preference runs."""
    noise = random.Random(seed)
    for step in range(steps + 1):
        progress = step / steps
        floor, drop = (2.10, 0.42) if method == "sft" else (0.52, 0.17)
        level = floor + drop * math.exp(-4 * progress)
        margin = 1.4 * (1 - math.exp(-3 * progress))
        if step % every == 0 or step == steps:
            rising = 0.05 * max(0.0, progress - 0.7)
            metrics = {"eval/loss": level + rising, "eval_train/loss": level - 0.12 * progress}
            if method == "dpo":
                metrics |= _rewards("eval/", margin * 0.8, 0.5 + 0.16 * progress)
                metrics |= _rewards("eval_train/", margin, 0.5 + 0.3 * progress)
            run.log_metrics(step, "eval", metrics)
        if step < steps:
            rate = 2e-5 * min(1.0, (step + 1) / 12) * (1 - progress)
            row = {
                "train/loss": level + noise.gauss(0, 0.11),
                "grad_norm": 1.1 + abs(noise.gauss(0, 0.5)) + 2 * math.exp(-9 * progress),
                "learning_rate": rate,
                "tokens_per_second": 1400 + noise.gauss(0, 60),
                "memory/peak_bytes": 3.2 * 2**30,
                "samples": 8 * (step + 1),
                "tokens": 1800 * (step + 1),
            }
            if method == "dpo":
                row |= _rewards(
                    "", margin + noise.gauss(0, 0.4), min(1.0, max(0.0, noise.gauss(0.55 + 0.25 * progress, 0.15)))
                )
            run.log_metrics(step + 1, "train", row)


def _rewards(prefix: str, margin: float, accuracy: float) -> dict[str, float]:
    return {
        f"{prefix}rewards/chosen": 0.25 * margin,
        f"{prefix}rewards/rejected": -0.75 * margin,
        f"{prefix}rewards/margins": margin,
        f"{prefix}rewards/accuracies": accuracy,
    }


def cost(steps: int) -> dict[str, Any]:
    tokens = 1800 * steps
    return {
        "step": steps,
        "steps": steps,
        "samples": 8 * steps,
        "tokens": tokens,
        "loss_tokens": tokens // 3,
        "flops": 7.1e8 * tokens,
        "floor_flops": 5.58e8 * tokens,
        "flops_6nd": 8.07e8 * tokens,
        "seconds": {"training": 95.2, "evaluation": 21.4, "checkpoint": 3.1, "loading": 2.2, "total": 121.9},
        "tokens_per_second": tokens / 95.2,
        "peak_memory_bytes": 3.2 * 2**30,
    }


def forecast_and_measured(steps: int) -> dict[str, dict[str, float]]:
    """Memory foretold 3.1% too low, time 12% too long, all that can be counted exactly right."""
    paid = cost(steps)
    measured = {key: paid[key] for key in ("tokens", "flops", "floor_flops", "peak_memory_bytes")}
    measured |= {"seconds": paid["seconds"]["total"], "checkpoint_bytes": 1.61e9}
    factors = {"peak_memory_bytes": 0.969, "seconds": 1.12}
    return {key: {"forecast": value * factors.get(key, 1.0), "measured": value} for key, value in measured.items()}


def data_summary(split: str, method: str, dropped: int = 0) -> dict[str, Any]:
    """The shape of data.summary.DataSummary.to_json()."""
    lengths = {"p5": 12.0, "p50": 58.5, "p95": 161.0, "mean": 70.3, "max": 233}
    names = ("prompt", "chosen", "rejected", "total") if method == "dpo" else ("prompt", "completion", "total")
    nothing: dict[str, Any] = {"count": 0, "origins": []}
    return {
        "source": "builtin:helpful-mini",
        "split": split,
        "shape": "preference pairs",
        "render": "chat",
        "max_length": 256,
        "records": 400,
        "used": 400 - dropped,
        "skipped": nothing,
        "dropped": {"count": dropped, "origins": [f"helpful-mini.{split}.jsonl.gz:{17 + i}" for i in range(dropped)]},
        "ignored_columns": ["id"],
        "lengths": dict.fromkeys(names, lengths),
        "total_tokens": 28_120,
        "padding_avoided": 0.412,
    }


def write_evaluation(run: RunFolder, arms: tuple[str, ...] = ("base", "sft", "dpo"), n: int = 200) -> dict[str, Any]:
    """evaluation.json: the loss falls with sft, the preference accuracy rises with dpo, at the price of some loss."""
    losses, accuracies = (2.412, 2.131, 2.164), (0.52, 0.535, 0.615)
    rows = []
    for index, name in enumerate(arms):
        loss, accuracy = losses[index], accuracies[index]
        metrics = {
            "eval/nll": interval(loss, 0.09, n),
            "eval/perplexity": {
                "value": math.exp(loss),
                "low": math.exp(loss - 0.09),
                "high": math.exp(loss + 0.09),
                "n": n,
            },
            "preference/accuracy": interval(accuracy, 0.068, n),
            "preference/margin": interval(accuracy - 0.5, 0.04, n),
        }
        rows.append({"name": name, "model": name, "metrics": metrics})
    pairs = [(0, 1), (1, 2), (0, 2)] if len(arms) == 3 else [(0, 1)] if len(arms) == 2 else []
    widths = {"eval/nll": 0.026, "preference/accuracy": 0.05, "preference/margin": 0.02}
    differences = [
        {
            "metric": metric,
            "from": arms[first],
            "to": arms[second],
            **interval(rows[second]["metrics"][metric]["value"] - rows[first]["metrics"][metric]["value"], width, n),
        }
        for first, second in pairs
        for metric, width in widths.items()
    ]
    evaluation = {
        "schema_version": 1,
        "data": "builtin:helpful-mini",
        "num_records": n,
        "confidence": 0.95,
        "arms": rows,
        "differences": differences,
        "generations": [
            {"prompt": prompt, "reference": "Let the soil dry first.", "answers": {a: ANSWERS.get(a, "") for a in arms}}
            for prompt in PROMPTS
        ],
    }
    (run.path / "evaluation.json").write_text(json.dumps(evaluation))
    return evaluation


def interval(value: float, half_width: float, n: int) -> dict[str, Any]:
    return {"value": value, "low": value - half_width, "high": value + half_width, "n": n}
