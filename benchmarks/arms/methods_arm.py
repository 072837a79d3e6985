"""One method of `benchmarks methods`, in a process of its own: `tunelab.train` with an ordinary recipe, then the
held-out loss of what it learnt, record by record.

    python -m benchmarks.arms.methods_arm JOB.json RESULT.json
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tunelab.config import Recipe, parse_recipe
from tunelab.data import Dataset, Settings, fixed_sample, load_dataset
from tunelab.evaluation.heldout import score_records
from tunelab.models.adapters import adapter_disabled
from tunelab.models.engine import choose_layout
from tunelab.models.loaded import LoadedModel
from tunelab.models.loading import load_model, load_tokenizer
from tunelab.parallel import deterministic, set_threads
from tunelab.progress import PlainProgress, Progress
from tunelab.train import train

BATCH_SIZE = 8


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Train unless `steps` is 0; score the held-out records. `recipe`: plain data; `heldout`: {data, records, seed}."""
    recipe, progress = parse_recipe(job["recipe"]), PlainProgress()
    dataset, records = _heldout(recipe, job["heldout"], progress)
    result: dict[str, Any] = {"records": records.tolist()}
    if job["steps"] == 0:
        set_threads(recipe.training.num_threads)
        with deterministic():
            loaded = load_model(recipe.model)
            return result | {"parameters": loaded.num_parameters, **_scores(loaded, recipe, dataset, records)}
    folder = Path(recipe.training.output_dir) / str(recipe.training.run_name)
    shutil.rmtree(folder, ignore_errors=True)  # what a killed process left
    run = train(recipe, progress=progress)
    with deterministic():
        loaded = load_model(recipe.model.at(str(run.path)), adapters="merge" if recipe.adapter is None else "keep")
        result |= _scores(loaded, recipe, dataset, records)
        if recipe.model.load_in_4bit:  # what it started from is not the model the others started from
            with adapter_disabled(loaded):
                result["before"] = _scores(loaded, recipe, dataset, records)
    record = run.record()
    shutil.rmtree(run.checkpoints)  # full tuning's alone takes 1.6 GB
    (run.path / "best").unlink(missing_ok=True)
    return result | {
        "parameters": record["model"]["parameters"],
        "trainable_parameters": record["model"]["trainable_parameters"],
        "cost": record["cost"],
        "forecast_and_measured": record["forecast_and_measured"],
        "train_losses": [row["train/loss"] for row in run.metrics("train")],
        "learning_rate": recipe.optimizer.learning_rate,
        "layout": f"{record['model']['layout']}, {record['model']['blocks']}",
    }


def _heldout(recipe: Recipe, heldout: dict[str, Any], progress: Progress) -> tuple[Dataset, np.ndarray]:
    settings = Settings(
        method="sft", render=recipe.data.render, max_length=recipe.data.max_length, on_error=recipe.data.on_error
    )
    source, tokenizer = heldout["data"], load_tokenizer(recipe.model)
    dataset = load_dataset(source, tokenizer, settings, split="test", subset=None, limit=None, progress=progress)
    return dataset, fixed_sample(len(dataset), heldout["records"], heldout["seed"])


def _scores(loaded: LoadedModel, recipe: Recipe, dataset: Dataset, records: np.ndarray) -> dict[str, Any]:
    """Of each record the negative log-likelihood of its answers' tokens, summed, and how many they are."""
    choose_layout(loaded, recipe.model.layout, dataset.longest, recipe.model.kernels)
    scores = score_records(loaded, dataset, records, batch_size=BATCH_SIZE)
    return {"nll": (-scores.logprobs[:, 0]).tolist(), "tokens": scores.counts[:, 0].tolist()}


def main() -> None:
    job_path, result_path = map(Path, sys.argv[1:3])
    result = measure(json.loads(job_path.read_text()))
    temporary = result_path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1))
    temporary.replace(result_path)


if __name__ == "__main__":
    main()
