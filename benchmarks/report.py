"""Results on disk, and the tables made from them: stdout, results/README.md, the project's README."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.workloads import ROOT

RESULTS = Path(__file__).with_name("results")
README = ROOT / "README.md"
ENGINE_PAGE = ROOT / "docs" / "engine.md"
GAINS_START, GAINS_END = "<!-- gains:start -->", "<!-- gains:end -->"
START, END = "<!-- benchmark:start -->", "<!-- benchmark:end -->"

WORKS = {
    "sft": "SFT",
    "lora": "LoRA SFT, r = 8",
    "dpo": "DPO",
    "generate": "generation",
    "startup": "start",
    "adapters": "adapters against stock peft in the same engine",
}
ELSEWHERE = ("adapters",)
"""Work that is not of the README's table."""
MODELS = {"gpt2": "GPT-2 124M", "smollm2": "SmolLM2-135M"}
MIXES = {"short": "short dialogue", "long": "long prompts", "equal": "no padding"}


def result_name(result: Mapping[str, Any]) -> str:
    parts = [result.get("kind"), result["work"], result.get("model"), result.get("mix"), result["provenance"]["device"]]
    return "-".join(part for part in parts if part)


def write_result(folder: Path, result: Mapping[str, Any]) -> Path:
    """`folder`/WORK-MODEL-MIX-DEVICE.json, and the folder's README.md made anew from all results in it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result_name(result)}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    (folder / "README.md").write_text(results_page(read_results(folder)))
    return path


def read_results(folder: Path) -> list[dict[str, Any]]:
    """In the order of the tables: by device, work, model, mix. Files of benchmarks with pages of their own are left."""
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    results = [result for result in found if result.get("work") in WORKS]
    order = [*WORKS], [*MODELS, None], [*MIXES, None]
    return sorted(
        results,
        key=lambda r: (
            r["provenance"]["device"],
            order[0].index(r["work"]),
            order[1].index(r.get("model")),
            order[2].index(r.get("mix")),
            r.get("kind", ""),
        ),
    )


def title(result: Mapping[str, Any]) -> str:
    """What was done, for a table's first column."""
    prefix = "what each gain brings: " if result.get("kind") == "gains" else ""
    parts = [
        prefix + WORKS[result["work"]],
        MODELS.get(result.get("model", ""), ""),
        MIXES.get(result.get("mix", ""), ""),
    ]
    return ", ".join(part for part in parts if part)


# --- numbers --------------------------------------------------------------------------------------------------------


def _plain(figure: Mapping[str, Any], scale: float = 1.0, digits: int = 1) -> str:
    """Median [min – max]."""
    low, middle, high = (f"{figure[name] * scale:,.{digits}f}" for name in ("min", "median", "max"))
    return f"{middle} [{low} – {high}]"


def _times(figure: Mapping[str, Any]) -> str:
    return f"**{figure['median']:.2f}×** [{figure['min']:.2f} – {figure['max']:.2f}]"


def _share(figure: Mapping[str, Any]) -> str:
    return f"{figure['median']:.0%}"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown."""
    head = list(header)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


# --- the page of all figures ----------------------------------------------------------------------------------------


def results_page(results: list[dict[str, Any]]) -> str:
    """Every figure of every result, with where it was measured."""
    parts = [
        "# Results\n\nWritten by `python -m benchmarks`; how they are made, and what the columns mean, is in\n"
        "[../README.md](../README.md). Medians over repeats, [smallest – largest]. Ratios above 1: tunelab is faster, "
        "or needs\nmore memory.\n"
    ]
    parts += [_section(result) for result in results]
    if not any(result["provenance"]["device"] == "cuda" for result in results):
        parts.append("## CUDA\n\nUnmeasured: no card was at hand. The same commands run there with `--device cuda`.\n")
    return "\n".join(parts)


def _section(result: Mapping[str, Any]) -> str:
    origin = result["provenance"]
    place = origin["accelerator"] or f"{origin['cpu']}, {origin['threads']} threads"
    dirty = " with uncommitted changes" if origin["uncommitted_changes"] else ""
    heading = f"## {title(result)}\n\n`{origin['command']}` on {place}, {origin['date'][:10]}, commit "
    heading += f"`{origin['commit'][:10]}`{dirty}.\n\n"
    if result.get("kind") == "gains":
        return heading + gains_table(result)
    if result["work"] == "startup":
        return heading + startup_table(result)
    if result["work"] == "adapters":
        return heading + adapters_table(result)
    if result["work"] == "generate":
        return heading + generation_table(result)
    return heading + _training_tables(result)


def _training_tables(result: Mapping[str, Any]) -> str:
    unit = "pairs/s" if result["work"] == "dpo" else "examples/s"
    text = (
        f"{result['batch_size']} examples a step, {result['steps']} steps, {result['repeats']} repeats, "
        f"{result['precision']}.\n\n"
    )
    rows = []
    for entry in result["comparisons"]:
        for side, name in (("ours", f"tunelab ({entry['order']})"), ("peer", f"TRL: {entry['says']}")):
            figures = entry[side]
            rows.append(
                [
                    name,
                    _plain(figures["examples_per_second_all"], digits=2),
                    _plain(figures["tokens_per_second"], digits=0),
                    _plain(figures["step_seconds"], digits=2),
                    _plain(figures["seconds_to_n"]),
                    _plain(figures["peak_memory_bytes"], 2**-20, 0),
                    _share(figures["ceiling_share"]),
                ]
            )
    header = ["side", unit, "real tokens/s", "s a step", f"s to {result['steps']} steps", "peak MiB", "of ceiling"]
    return text + table(header, rows) + "\n" + _ratio_table(result) + _shared_machine(result)


SHARED_BELOW = 0.85
"""Share of its threads' time below which a process had company."""


def _shared_machine(result: Mapping[str, Any]) -> str:
    if result["provenance"]["device"] != "cpu":
        return ""
    least = min(entry[side]["cpu_share"]["min"] for entry in result["comparisons"] for side in ("ours", "peer"))
    if least >= SHARED_BELOW:
        return ""
    return (
        f"\nThe machine was busy with other work: a process got only {least:.0%} of its threads' time. Measure again.\n"
    )


def _ratio_table(result: Mapping[str, Any]) -> str:
    rows = []
    for entry in result["comparisons"]:
        ratios, losses = entry["ratios"], entry["losses"]
        agreement = f"{losses['max_relative_difference']:.0e}"
        if not losses["agree"]:
            agreement += " — **another loss: does not count**"
        against = entry["says"] + (" (its best)" if entry["arm"] == result["best"] else "")
        if not entry["interleaved"]:
            against += " (measured in another session)"
        rows.append(
            [
                against,
                _times(ratios["examples_per_second_all"]),
                _times(ratios["examples_per_second"]),
                _times(ratios["step_seconds"]),
                _times(ratios["seconds_to_n"]),
                _times(ratios["peak_memory"]),
                agreement,
            ]
        )
    header = [
        "against TRL with",
        "speed",
        "speed of the steps alone",
        "median step",
        "speed to N steps",
        "memory",
        "losses differ by",
    ]
    return table(header, rows)


def generation_table(result: Mapping[str, Any]) -> str:
    """tokens/s, memory, and whether the same tokens came out."""
    rows = []
    for entry in result["comparisons"]:
        for side, name in (("ours", "tunelab"), ("peer", f"transformers: {entry['says']}")):
            figures = entry[side]
            rows.append(
                [name, _plain(figures["tokens_per_second"]), _plain(figures["peak_memory_bytes"], 2**-20, 0), "", ""]
            )
        rows[-1][3] = _times(entry["ratios"]["tokens_per_second"])
        rows[-1][4] = f"{entry['same_tokens']:.1%}"
    return table(["side", "new tokens/s", "peak MiB", "tunelab's speed", "same tokens"], rows)


def gains_table(result: Mapping[str, Any]) -> str:
    """What a step costs without each gain, against the whole engine in the same round."""
    rows = [
        [
            row["gain"],
            row["instead"],
            _times(row["slower"]),
            _times(row["memory"]),
            f"{row['losses_differ_by']:.0e}",
        ]
        for row in result["rows"]
    ]
    header = ["switched off", "instead", "time of a step", "peak memory", "losses differ by"]
    text = f"{result['batch_size']} examples a step, {result['steps']} steps, {result['repeats']} rounds; with all: "
    return text + f"{_plain(result['step_seconds'], digits=2)} s a step.\n\n" + table(header, rows)


_SIDES = {"ours": "tunelab", "blocks alone": "tunelab, torch's own products", "peft": "peft's modules"}


def adapters_table(result: Mapping[str, Any]) -> str:
    """Every side of every adapter, against peft's modules in the same round."""
    rows = []
    for row in result["rows"]:
        for side, name in _SIDES.items():
            figures = row["sides"][side]
            speed = _times(figures["speed"]) if figures["agree"] else "another loss: does not count"
            rows.append(
                [
                    row["adapter"],
                    name,
                    _plain(figures["step_seconds"], digits=2),
                    _plain(figures["tokens_per_second"], digits=0),
                    _plain(figures["peak_memory_bytes"], 2**-20, 0),
                    "" if side == "peft" else speed,
                    "" if side == "peft" else _times(figures["memory"]),
                    "" if side == "peft" else f"{figures['losses_differ_by']:.0e}",
                ]
            )
    header = ["adapter", "side", "s a step", "real tokens/s", "peak MiB", "speed", "memory", "losses differ by"]
    text = f"{result['batch_size']} examples a step, {result['steps']} steps, {result['repeats']} rounds, "
    return f"{text}{result['precision']}.\n\n{table(header, rows)}"


def startup_table(result: Mapping[str, Any]) -> str:
    """Seconds of each start."""
    rows = [[entry["says"], _plain(entry["seconds"], digits=2), f"≤ {entry['target']:g}"] for entry in result["starts"]]
    return table(["start", "seconds", "target"], rows)


# --- the project's README -------------------------------------------------------------------------------------------


def readme_block(results: list[dict[str, Any]]) -> str:
    """The short table: one line a piece of work."""
    rows = []
    for result in results:
        if result["work"] in ("startup", *ELSEWHERE) or result.get("kind") == "gains":
            continue
        entries = {entry["arm"]: entry for entry in result["comparisons"]}
        rows.append([title(result), *_short_cells(result, entries)])
    header = ["work", "speed against TRL's defaults", "against its best flags", "memory against defaults"]
    written = table([*header, "share of the matmul ceiling"], rows)
    starts = [entry for result in results if result["work"] == "startup" for entry in result["starts"]]
    said = "".join(f"\n{entry['says']}: {entry['seconds']['median']:.2f} s." for entry in starts)
    return written + said + ("\n" if said else "")


def _short_cells(result: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    speed = "tokens_per_second" if result["work"] == "generate" else "examples_per_second_all"
    cells = [_counted(entries[arm], speed) if arm in entries else "–" for arm in ("defaults", result["best"])]
    default = entries.get("defaults")
    memory = f"{default['ratios']['peak_memory']['median']:.2f}" if default else "–"
    has_share = default is not None and "ceiling_share" in default["ours"]
    return [*cells, memory, _share(default["ours"]["ceiling_share"]) if default and has_share else "–"]


def _counted(entry: Mapping[str, Any], speed: str) -> str:
    if "losses" in entry and not entry["losses"]["agree"]:
        return "another loss: does not count"
    return f"{entry['ratios'][speed]['median']:.1f}×"


def update_readme(readme: Path, results: list[dict[str, Any]]) -> None:
    """Replace the README's table. Raises ValueError where the file has not both markers."""
    replace_between(readme, START, END, readme_block(results))


def update_engine_page(page: Path, results: list[dict[str, Any]]) -> None:
    """Replace the tables of what each gain brings. Raises ValueError where the file has not both markers."""
    gains = [result for result in results if result.get("kind") == "gains"]
    text = "\n".join(f"{title(result).capitalize()}. {gains_table(result)}" for result in gains)
    replace_between(page, GAINS_START, GAINS_END, text or "Not measured yet.\n")


def replace_between(path: Path, start: str, end: str, new: str) -> None:
    """Put `new` between two markers of a page. Raises ValueError where it has not both."""
    text = path.read_text()
    if start not in text or end not in text:
        raise ValueError(f"{path}: no {start} … {end} to write the table between")
    before, rest = text.split(start, 1)
    after = rest.split(end, 1)[1]
    path.write_text(f"{before}{start}\n{new}{end}{after}")
