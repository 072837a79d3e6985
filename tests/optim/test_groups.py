"""What a parameter is to an optimizer: by shape, and by its place in the model."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from tests.models.small_models import as_loaded, small_gpt2, small_llama
from tunelab.config import LoRAConfig
from tunelab.config.adapters import IA3Config, PromptTuningConfig
from tunelab.config.optimizers import (
    OPTIMIZER_KINDS,
    AdamWConfig,
    ApolloConfig,
    FiraConfig,
    GaLoreConfig,
    MuonConfig,
    OptimizerConfig,
)
from tunelab.errors import ConfigError, MachineError
from tunelab.models.adapters import adapt_skeleton, attach_adapter
from tunelab.optim import ParameterRoles, build_optimizer, check_optimizer, parameter_groups


def test_roles_of_gpt2() -> None:
    """Tied, with positions; Conv1D is (in, out); queries and keys are two thirds of c_attn, in heads of 32/4."""
    roles = ParameterRoles.of(small_gpt2(n_layer=1))
    block = "transformer.h.0."
    assert {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"} == roles.embeddings
    assert {block + name + ".weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")} == (
        roles.input_first
    )
    assert roles.heads == {block + "attn.c_attn.weight": (64, 8)}


@pytest.mark.parametrize("tied", [True, False])
def test_roles_of_llama(tied: bool) -> None:
    """Two key-value heads of 32/4 beside four query heads."""
    roles = ParameterRoles.of(small_llama(num_hidden_layers=1, tie_word_embeddings=tied))
    attention = "model.layers.0.self_attn."
    assert roles.embeddings == {"model.embed_tokens.weight", "lm_head.weight"}
    assert roles.input_first == frozenset()
    assert roles.heads == {attention + "q_proj.weight": (32, 8), attention + "k_proj.weight": (16, 8)}


def test_roles_under_lora() -> None:
    """The frozen base keeps its roles under its new name; the adapter's own matrices have none."""
    loaded = as_loaded(small_llama(num_hidden_layers=1))
    attach_adapter(loaded, LoRAConfig(r=4), seed=0)
    roles = ParameterRoles.of(loaded.model)
    attention = "model.layers.0.self_attn."
    assert roles.heads[attention + "q_proj.base_layer.weight"] == (32, 8)
    assert "model.embed_tokens.weight" in roles.embeddings
    trained = [name for name, parameter in loaded.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(name not in roles.heads and not roles.is_embedding(name) for name in trained)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("h.0.mlp.weight", (8, 4), True),
        ("h.0.ln.weight", (8,), False),
        ("h.0.ia3", (8, 1), False),
        ("wte.weight", (8, 4), False),
        ("experts", (2, 8, 4), False),
        ("prompt_encoder.mlp.0.weight", (8, 4), False),
    ],
)
def test_block_matrices(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert ParameterRoles(embeddings=frozenset({"wte.weight"})).is_block_matrix(name, shape) is expected


def test_groups_by_decay_kind_and_rate() -> None:
    names = ("a", "b", "bias", "c", "frozen")
    parameters = {name: nn.Parameter(torch.zeros(3) if name == "bias" else torch.zeros(3, 3)) for name in names}
    parameters["frozen"].requires_grad_(False)
    groups = parameter_groups(
        [*parameters.items(), ("a again", parameters["a"])],
        0.1,
        learning_rate_scales={"b": 16.0},
        kind=lambda name, parameter: "special" if name == "c" else "",
    )
    told = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    assert told == [
        {"names": ["a"], "weight_decay": 0.1},
        {"names": ["b"], "weight_decay": 0.1, "lr_scale": 16.0},
        {"names": ["c"], "weight_decay": 0.1, "kind": "special"},
        {"names": ["bias"], "weight_decay": 0.0},
    ]
    assert all(group["params"][0] is parameters[group["names"][0]] for group in groups)


@pytest.mark.parametrize("kind", OPTIMIZER_KINDS, ids=lambda kind: kind.model_fields["name"].default)
def test_a_missing_package_is_one_line_naming_its_extra(
    kind: type[OptimizerConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name != "torch" else object())
    needed = {"lion", "adafactor", "sm3", "came", "schedule_free_adamw"}
    name = kind.model_fields["name"].default
    extra = "optimizers" if name in needed else "quantization" if name == "adamw_8bit" else None
    if extra is None:
        check_optimizer(kind(), None)
        return
    with pytest.raises(MachineError, match=rf"^optimizer\.name: {name} needs .*pip install 'tunelab\[{extra}\]'$"):
        check_optimizer(kind(), None)
    with pytest.raises(MachineError):
        build_optimizer(nn.Linear(2, 2).named_parameters(), kind(), "cpu")


@pytest.mark.parametrize("config", [MuonConfig(), GaLoreConfig(), FiraConfig(), ApolloConfig()])
def test_methods_for_matrices_refuse_adapters_without(config: OptimizerConfig) -> None:
    prompt = small_gpt2(n_layer=1).to("meta")
    adapt_skeleton(prompt, PromptTuningConfig(num_virtual_tokens=4))
    factors = small_gpt2(n_layer=1).to("meta")
    adapt_skeleton(factors, IA3Config())
    for skeleton in (prompt, factors):
        with pytest.raises(ConfigError, match=rf"^optimizer\.name: {config.name} is for matrices inside blocks"):
            check_optimizer(config, skeleton)
        check_optimizer(AdamWConfig(), skeleton)
    lora = small_gpt2(n_layer=1).to("meta")
    adapt_skeleton(lora, LoRAConfig(r=4))
    check_optimizer(config, lora)
    check_optimizer(config, None)


def test_libraries_are_imported_when_used() -> None:
    """They take seconds, and may be missing."""
    code = (
        "import sys, tunelab.optim, tunelab.optim.footprint\n"
        "found = {'pytorch_optimizer', 'bitsandbytes', 'schedulefree', 'torchao'} & set(sys.modules)\n"
        "sys.exit(', '.join(found) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
