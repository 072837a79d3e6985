"""Every shipped recipe goes through `--dry-run`: on `tiny-gpt2` and built-in data where its own are on the hub, or are
weights that a test does not download. What is said of an adapter's size in a comment is held against the model.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig

from tests.cli.conftest import Ended, tunelab
from tunelab.config import load_recipe
from tunelab.config.adapters import LoRAConfig

__all__ = ["Ended", "tunelab"]

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))
TINY = (
    "model.name=tiny-gpt2",
    "model.device=cpu",
    "model.precision=float32",
    "data.limit_train=8",
    "data.limit_eval=4",
)
BUILTIN = ("data.train=builtin:helpful-mini", "data.eval=builtin:helpful-mini", "data.subset=null")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_dry_run(path: Path, tunelab, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    own_data = recipe.data.train.startswith("builtin:")
    words = [*TINY, f"training.output_dir={tmp_path}", *(() if own_data else BUILTIN)]
    if recipe.data.max_length > 480:
        words.append("data.max_length=480")  # tiny-gpt2 has 512 positions, virtual tokens included
    if recipe.optimizer.schedule.warmup_steps:
        words.append("optimizer.schedule.warmup_steps=1")  # of a run of few records
    ended = tunelab(recipe.method.name, path, "--dry-run", "--json", "-q", *words)
    assert ended.code == 0, ended.err
    assert not list(tmp_path.iterdir())


def test_an_8b_model_in_four_bits_is_planned_for_a_card_that_is_not_here(tunelab, tmp_path: Path) -> None:
    """From the configuration alone, with nothing else of the model here. Of r = 16 on every linear layer of a block:
    16·(in + out) = 16·(2·8192 + 2·5120 + 3·18432) numbers.
    """
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "llama")
    path = FOLDER / "llama3-8b-qlora-sft-16gb.yaml"
    ended = tunelab("plan", path, f"model.name={tmp_path / 'llama'}", "--memory", "16GB", "--json", "-q")
    assert ended.code == 0, ended.err
    assert ended.json["fits"] is True
    assert ended.json["model"]["trainable_parameters"] == 32 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18432)
    # 7.0 B weights of the blocks in 4.13 bits each, 1.05 B of embeddings and head in 16.
    assert ended.json["memory"]["parts"]["weights"] == pytest.approx(6.98e9 * 4.127 / 8 + 2 * 1.05e9, rel=0.02)


def test_every_classic_method_has_a_recipe() -> None:
    adapters = [recipe.adapter for recipe in map(load_recipe, RECIPES) if recipe.adapter is not None]
    assert {"lora", "prefix_tuning", "prompt_tuning", "p_tuning"} <= {adapter.name for adapter in adapters}
    assert any(isinstance(adapter, LoRAConfig) and adapter.use_dora for adapter in adapters)
    assert any(recipe.model.load_in_4bit for recipe in map(load_recipe, RECIPES))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_says_how_it_is_run(path: Path) -> None:
    recipe = load_recipe(path)
    text = path.read_text()
    assert text.startswith("# ")
    assert f"tunelab {recipe.method.name} {path.relative_to(FOLDER.parent)}" in text
    assert max(len(line) for line in text.splitlines()) <= 120
