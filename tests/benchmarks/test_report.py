"""Tables from results: the numbers in the right cells, and what does not count said so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import END, START, readme_block, results_page, update_readme, write_result
from benchmarks.summary import spread


def figures(scale: float) -> dict[str, Any]:
    names = (
        "examples_per_second_all", "tokens_per_second", "step_seconds", "seconds_to_n", "peak_memory_bytes",
        "ceiling_share", "cpu_share",
    )  # fmt: skip
    return {name: spread([scale]) for name in names} | {"ceiling_share": spread([0.9 * scale])}


def comparison(arm: str, speed: float, *, agree: bool = True) -> dict[str, Any]:
    ratios = {
        "examples_per_second": speed, "examples_per_second_all": speed, "step_seconds": speed,
        "seconds_to_n": speed / 2, "peak_memory": 0.3,
    }  # fmt: skip
    return {
        "arm": arm, "says": f"flags of {arm}", "order": "sequential", "interleaved": True,
        "ours": figures(1.0), "peer": figures(0.5),
        "ratios": {name: spread([value]) for name, value in ratios.items()},
        "losses": {"max_relative_difference": 1e-7 if agree else 0.5, "agree": agree},
    }  # fmt: skip


def result(*comparisons: dict[str, Any], work: str = "sft") -> dict[str, Any]:
    origin = {
        "command": "python -m benchmarks sft", "date": "2026-01-02T03:04:05", "commit": "abcdef0123456", "cpu": "a CPU",
        "threads": 2, "uncommitted_changes": False, "device": "cpu", "accelerator": None,
    }  # fmt: skip
    return {
        "work": work, "model": "gpt2", "mix": "short", "batch_size": 8, "steps": 10, "repeats": 3,
        "precision": "float32", "comparisons": list(comparisons), "provenance": origin, "best": "grouped",
    }  # fmt: skip


def test_the_readmes_line() -> None:
    block = readme_block(
        [result(comparison("defaults", 4.51), comparison("padding-free", 9.0), comparison("grouped", 3.0))]
    )
    assert block.splitlines()[2] == "| SFT, GPT-2 124M, short dialogue | 4.5× | 3.0× | 0.30 | 90% |"


def test_another_loss_does_not_count() -> None:
    wrong = result(comparison("defaults", 9.0, agree=False))
    assert "9.0×" not in readme_block([wrong])
    assert "does not count" in readme_block([wrong])
    assert "does not count" in results_page([wrong])


def test_the_page_says_where_and_how() -> None:
    page = results_page([result(comparison("defaults", 4.5), comparison("grouped", 3.0))])
    for said in (
        "python -m benchmarks sft",
        "a CPU, 2 threads",
        "2026-01-02",
        "abcdef0123",
        "flags of grouped (its best)",
    ):
        assert said in page
    assert "Unmeasured: no card" in page
    assert "uncommitted" not in page


def test_a_shared_machine_is_said() -> None:
    entry = comparison("defaults", 4.5)
    entry["ours"]["cpu_share"] = spread([0.6])
    entry["peer"]["cpu_share"] = spread([0.9])
    assert "only 60%" in results_page([result(entry)])
    entry["ours"]["cpu_share"] = spread([0.95])
    assert "busy with other work" not in results_page([result(entry)])


def test_results_and_readme_on_disk(tmp_path: Path) -> None:
    path = write_result(tmp_path, result(comparison("defaults", 4.5)))
    assert path.name == "sft-gpt2-short-cpu.json"
    assert "4.50×" in (tmp_path / "README.md").read_text()
    readme = tmp_path / "PROJECT.md"
    readme.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    update_readme(readme, [result(comparison("defaults", 4.5))])
    text = readme.read_text()
    assert text.startswith(f"before\n{START}\n| work |")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text


def test_a_readme_without_markers_is_refused(tmp_path: Path) -> None:
    readme = tmp_path / "PROJECT.md"
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="benchmark:start"):
        update_readme(readme, [])


def test_starts_and_generation() -> None:
    starts = result(work="startup") | {
        "model": None, "mix": None, "starts": [{"says": "`tunelab --help`", "seconds": spread([0.3, 0.4, 0.5]),
        "target": 0.5}],
    }  # fmt: skip
    entry: dict[str, Any] = {
        "arm": "defaults", "says": "defaults", "same_tokens": 0.995,
        "ours": {"tokens_per_second": spread([100.0]), "peak_memory_bytes": spread([2**30])},
        "peer": {"tokens_per_second": spread([40.0]), "peak_memory_bytes": spread([2**31])},
        "ratios": {"tokens_per_second": spread([2.5]), "peak_memory": spread([0.5])},
    }  # fmt: skip
    generated = result(entry, work="generate") | {"mix": None, "best": None}
    page, block = results_page([generated, starts]), readme_block([generated, starts])
    assert "| `tunelab --help` | 0.40 [0.30 – 0.50] | ≤ 0.5 |" in page
    assert "| 40.0 [40.0 – 40.0] | 2,048 [2,048 – 2,048] | **2.50×** [2.50 – 2.50] | 99.5% |" in page
    assert "| generation, GPT-2 124M | 2.5× | – | 0.50 | – |" in block
    assert "`tunelab --help`: 0.40 s." in block
