"""The data room: sources → checked records → text with exact loss masks → token ids → packed rows.

    dataset = load_dataset("builtin:helpful-mini", tokenizer, Settings(method="dpo", max_length=512))
    batch = pack([dataset.examples[i] for i in indices], indices)

Records stream through in chunks, on all cores, into flat arrays on the disk (`loading.py`), so that memory does not
grow with the data and a second start finds it tokenised. `load_records` and `prepare` are the two halves for records
that are looked at, or made, in memory. The tokenizer is a transformers one, passed in; nothing here loads it. torch is
imported by `pack` alone.
"""

from tunelab.data.columns import Examples
from tunelab.data.dataset import Dataset
from tunelab.data.inspection import inspection, render_inspection, render_sample
from tunelab.data.loader import Loader, fixed_sample
from tunelab.data.loading import load_dataset, prepare
from tunelab.data.packing import pack, pack_batches, split_by_tokens
from tunelab.data.problems import Problem
from tunelab.data.prompts import GenerationPrompt, generation_prompts, render_prompt, stop_strings
from tunelab.data.records import RecordSet, load_records
from tunelab.data.summary import DataSummary
from tunelab.data.tokenising import Settings

__all__ = [
    "DataSummary",
    "Dataset",
    "Examples",
    "GenerationPrompt",
    "Loader",
    "Problem",
    "RecordSet",
    "Settings",
    "fixed_sample",
    "generation_prompts",
    "inspection",
    "load_dataset",
    "load_records",
    "pack",
    "pack_batches",
    "prepare",
    "render_inspection",
    "render_prompt",
    "render_sample",
    "split_by_tokens",
    "stop_strings",
]
