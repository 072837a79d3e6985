"""The data room: sources → checked records → text with exact loss masks → token ids → packed rows.

    records = load_records("builtin:helpful-mini", split="train")
    dataset = prepare(records, tokenizer, method="dpo", render="auto", loss_on="completions", max_length=512)
    batch = pack([dataset.examples[i] for i in indices], indices)

The tokenizer is a transformers one, passed in; nothing here loads it. torch is imported by `pack` alone.
"""

from tunelab.data.examples import Dataset, prepare
from tunelab.data.inspection import inspection, render_inspection, render_sample
from tunelab.data.loader import Loader, fixed_sample
from tunelab.data.packing import pack, pack_batches
from tunelab.data.problems import Problem
from tunelab.data.prompts import GenerationPrompt, generation_prompts, render_prompt, stop_strings
from tunelab.data.records import RecordSet, load_records
from tunelab.data.summary import DataSummary

__all__ = [
    "DataSummary",
    "Dataset",
    "GenerationPrompt",
    "Loader",
    "Problem",
    "RecordSet",
    "fixed_sample",
    "generation_prompts",
    "inspection",
    "load_records",
    "pack",
    "pack_batches",
    "prepare",
    "render_inspection",
    "render_prompt",
    "render_sample",
    "stop_strings",
]
