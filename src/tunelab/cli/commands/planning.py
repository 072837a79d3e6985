"""`tunelab plan`, and the words of every forecast."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Annotated, Any

import typer

from tunelab.cli.options import Json, Overrides, Quiet
from tunelab.cli.output import paint, print_json, print_line, print_pairs, wrap
from tunelab.errors import EXIT_ENVIRONMENT
from tunelab.progress import choose_progress, format_bytes, format_seconds

BAR = 24
"""Columns of the longest bar: with names and sizes a line has less than 80."""

PART_NAMES = {
    "weights": "weights",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "logits": "logits chunk",
    "kv_cache": "KV cache",
    "copies": "copies",
    "allocator": "allocator",
    "framework": "framework",
}

PlanRecipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file.", show_default=False)]
Memory = Annotated[
    str | None,
    typer.Option("--memory", metavar="SIZE", help="Plan for so much memory, e.g. 15GB.", show_default=False),
]
Device = Annotated[
    str | None,
    typer.Option("--device", metavar="cpu|cuda|mps", help="Plan for this device, here or not.", show_default=False),
]
Time = Annotated[bool, typer.Option("--time/--no-time", help="Time this machine where no time is known yet.")]
Records = Annotated[
    int | None,
    typer.Option("--records", min=1, metavar="N", help="Read no data: N records of data.max_length tokens."),
]


def plan(
    recipe: PlanRecipe,
    overrides: Overrides = None,
    memory: Memory = None,
    device: Device = None,
    records: Records = None,
    time: Time = True,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """\b
    Example: tunelab plan recipes/gpt2-lora-sft-hh-15gb.yaml --memory 15GB

    What a run would take before anything is paid: memory by part, FLOPs, tokens, time and disk, whether it fits, and
    the nearest changes that would. A model's config.json is enough; no weights are read. With --memory and no device
    in the recipe, a CUDA card is meant. Exits with 4 if it does not fit.
    """
    from tunelab.config import load_recipe
    from tunelab.planner import parse_size, plan_recipe

    size = None if memory is None else parse_size(memory)
    with closing(choose_progress(quiet)) as progress:
        found = plan_recipe(
            load_recipe(recipe, overrides or ()),
            progress,
            device=device,
            memory_bytes=size,
            records=records,
            calibrate=time,
        )
    print_json(found) if json else print_forecast(found)
    if found["fits"] is False:
        raise typer.Exit(EXIT_ENVIRONMENT)


def print_forecast(found: Mapping[str, Any]) -> None:
    """A forecast for people."""
    model, counts, compute = found["model"], found["counts"], found["compute"]
    print_pairs(
        {
            "method": found["method"],
            "model": f"{model['name']}, {model['parameters']:,} parameters{_part(model)}",
            "on": f"{found['target']['name']}, {found['precision']}, {_path(found)}",
            "data": found["assumption"] or _data(found["data"]["train"]),
            "steps": f"{counts['steps']:,} of {counts['micro_batches'] / counts['steps']:.3g} micro-batches, up to "
            f"{counts['largest_micro_batch_tokens']:,} tokens",
            "sees": f"{counts['records']:,} records, {counts['tokens']:,} tokens ({counts['loss_tokens']:,} with loss)",
            "compute": f"{compute['flops']:.3g} FLOPs by formula ({compute['flops_6nd']:.3g} by 6ND), "
            f"{compute['floor_flops']:.3g} of them unavoidable",
            "time": _time(found),
            "disk": f"{format_bytes(found['disk']['total_bytes'])}: {found['disk']['checkpoints']} checkpoints of "
            f"{format_bytes(found['disk']['checkpoint_bytes'])}",
        }
    )
    print_line()
    for line in _memory_lines(found["memory"]):
        print_line(line)
    print_line()
    for line in _verdict(found):
        print_line(line)


def _memory_lines(memory: Mapping[str, Any]) -> Iterator[str]:
    """A bar for every part that is there at the fullest moment, and their sum."""
    parts = {PART_NAMES[name]: size for name, size in memory["parts"].items() if size}
    longest, width = max(parts.values()), max(map(len, parts))
    for name, size in parts.items():
        bar = "█" * max(1, round(BAR * size / longest))
        share = size / memory["peak_bytes"]
        yield f"{paint(name.ljust(width), '2')}  {format_bytes(size):>10}  {bar:<{BAR}}  {share:4.0%}"
    total = f"{'peak'.ljust(width)}  {format_bytes(memory['peak_bytes']):>10}"
    yield f"{paint(total, '1')}  at its fullest moment: {memory['moment']}"


def _verdict(found: Mapping[str, Any]) -> Iterator[str]:
    target, peak = found["target"], found["memory"]["peak_bytes"]
    available = target["memory_bytes"]
    if available is None:
        yield f"Whether it fits is not known: {target['memory_source']}."
        return
    of = f"{format_bytes(available)} ({target['memory_source']})"
    if found["fits"]:
        yield f"{paint('Fits', '32;1')} in {of}, with {format_bytes(available - peak)} to spare."
        return
    yield f"{paint('Does not fit', '31;1')} in {of}: {format_bytes(peak - available)} too much."
    if not found["advice"]:
        yield "No change that is known here makes it fit: take a smaller model, or shorter sequences."
        return
    yield "The nearest changes that fit:"
    for change in found["advice"]:
        yield ""
        yield f"  {format_bytes(change['peak_bytes']):>10}  {' '.join(change['overrides'])}"
        for effect in change["effects"]:
            yield from (f"              {line}" for line in wrap(effect))


def _path(found: Mapping[str, Any]) -> str:
    names = {"fused": "fused blocks", "own": "its own blocks", "padded": "padded rows"}
    reason = found["path_reason"]
    return names[found["path"]] + (f" ({reason})" if reason else "")


def _data(summary: Mapping[str, Any]) -> str:
    return f"{summary['used']:,} of {summary['records']:,} records of {summary['source']}"


def _part(model: Mapping[str, Any]) -> str:
    """A clause on how many of the parameters are trained, where that is not all."""
    trained: int = model["trainable_parameters"]
    return "" if trained == model["parameters"] else f", {trained:,} of them trained"


def _time(found: Mapping[str, Any]) -> str:
    time = found.get("time")
    if not time:
        return ""
    if time["seconds"] is None:
        return f"not known: {time['reason']}"
    return f"about {format_seconds(time['seconds'])} (± {time['uncertainty']:.0%}), {time['reason']}"
