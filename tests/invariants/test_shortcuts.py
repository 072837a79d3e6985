"""Every shortcut of the engine, alone and together, trains as the plain padded computation does.

20 optimizer steps in float32 over dialogue-like records: losses within 1e-4 (relative) at each step, the first step's
gradient with a cosine of at least 0.9999 for every parameter. The plain side is the padded layout: each sequence a row
of its own, the model's own modules, transformers' attention, full logits, one record a micro-batch.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tunelab.config import AdamWConfig, DPOConfig, LoRAConfig, SFTConfig
from tunelab.data import pack, split_by_tokens
from tunelab.models.adapters import attach_adapter
from tunelab.models.checkpointing import enable_checkpointing
from tunelab.models.engine import choose_layout, sequence_logprobs
from tunelab.models.loaded import LoadedModel
from tunelab.models.shortcuts import OWN_MODULES, Shortcuts
from tunelab.models.tiny import build_tiny_tokenizer
from tunelab.objectives import build_objective
from tunelab.optim import build_optimizer
from tunelab.parallel import resolve_precision
from tunelab.training.state import TrainState
from tunelab.training.step import MicroBatch, train_step
from tunelab.types import Completion, Example, Origin

STEPS, RECORDS_PER_STEP = 20, 4
LEARNING_RATE = {False: 1e-3, True: 1e-2}  # full, adapter
CPU = torch.device("cpu")

SHORTCUTS = {
    "packed rows, shared prompts": OWN_MODULES,
    "and fused blocks": Shortcuts(prune_last_block=False, gradient_in_forward=False),
    "and a pruned last block": Shortcuts(gradient_in_forward=False),
    "and gradients in the forward pass": Shortcuts(prune_last_block=False),
    "all": Shortcuts(),
}


def build(kind: str, adapter: bool) -> LoadedModel:
    torch.manual_seed(0)
    tokenizer = build_tiny_tokenizer()
    if kind == "gpt2":
        shape = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
        config = GPT2Config(vocab_size=len(tokenizer), resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **shape)
        model = GPT2LMHeadModel(config)
    else:
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
        shape |= {"num_key_value_heads": 2, "max_position_embeddings": 128}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **shape))
    with torch.no_grad():  # far from uniform distributions, so that mistakes show
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3.0)
    loaded = LoadedModel(model, tokenizer, "test", CPU, resolve_precision("float32", CPU))
    if adapter:
        attach_adapter(loaded, LoRAConfig(r=4, lora_alpha=8), seed=0)
    return loaded


def records(pairs: bool) -> list[Example]:
    """Prompts and answers of very unequal lengths, some with loss on a part of the answer only."""
    rng = np.random.default_rng(0)

    def ids(low: int, high: int) -> np.ndarray:
        return rng.integers(1, 200, rng.integers(low, high)).astype(np.int32)

    def completion() -> Completion:
        tokens = ids(2, 25)
        mask = np.ones(len(tokens), dtype=bool)
        if not pairs and rng.random() < 0.3:
            mask[: len(tokens) // 2] = False
        return Completion(tokens, mask)

    count = STEPS * RECORDS_PER_STEP
    return [
        Example(ids(1, 40), tuple(completion() for _ in range(2 if pairs else 1)), Origin("test", line))
        for line in range(1, count + 1)
    ]


def train(
    loaded: LoadedModel, method: SFTConfig | DPOConfig, budget: int | None
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of 20 steps, and the first step's gradients. budget: tokens a micro-batch; None for one record each."""
    examples = records(isinstance(method, DPOConfig))
    objective = build_objective(method)
    reference = None
    if objective.needs_reference:
        sums, _ = sequence_logprobs(loaded, [pack([example], [i]) for i, example in enumerate(examples)])
        # A reference other than the start, so that the loss is not at its symmetric point.
        reference = torch.from_numpy(sums.reshape(-1, 2)).float() + torch.tensor([0.5, -0.5])
    optimizer = build_optimizer(loaded.model.named_parameters(), AdamWConfig(), "cpu")
    state = TrainState(loaded, optimizer, None)
    losses: list[float] = []
    gradients: dict[str, torch.Tensor] = {}

    def remember(*_: object) -> None:
        if not gradients:
            gradients.update({n: p.grad.clone() for n, p in loaded.model.named_parameters() if p.requires_grad})

    optimizer.register_step_pre_hook(remember)
    for step in range(STEPS):
        indices = np.arange(step * RECORDS_PER_STEP, (step + 1) * RECORDS_PER_STEP)
        lengths = np.array([examples[i].num_tokens for i in indices])
        rows = split_by_tokens(indices, lengths, budget) if budget else np.split(indices, RECORDS_PER_STEP)
        micro_batches = [
            MicroBatch(pack([examples[i] for i in row], row.tolist()), None if reference is None else reference[row])
            for row in rows
        ]
        metrics = train_step(
            state, objective, micro_batches, learning_rate=LEARNING_RATE[loaded.adapter is not None], max_grad_norm=1.0
        )
        losses.append(metrics["train/loss"])
    return losses, gradients


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).item()


@pytest.mark.parametrize("method", [SFTConfig(), DPOConfig(), DPOConfig(loss="orpo")], ids=["sft", "dpo", "orpo"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_twenty_steps_equal_the_plain_padded_computation(
    kind: str, adapter: bool, method: SFTConfig | DPOConfig
) -> None:
    plain = build(kind, adapter)
    choose_layout(plain, "padded", 128)
    expected, expected_gradients = train(plain, method, budget=None)
    assert expected[0] != pytest.approx(expected[-1], rel=1e-3), "nothing was learnt, so nothing was compared"

    for name, shortcuts in SHORTCUTS.items():
        loaded = build(kind, adapter)
        choose_layout(loaded, "packed", 128)
        assert loaded.shortcuts.fused_blocks, loaded.blocks_reason
        loaded.shortcuts = shortcuts
        losses, gradients = train(loaded, method, budget=60 if name == "all" else 10_000)
        assert losses == pytest.approx(expected, rel=1e-4), name
        assert gradients.keys() == expected_gradients.keys()
        for parameter, gradient in gradients.items():
            if expected_gradients[parameter].abs().max() < 1e-6:
                continue  # a key's bias, or LoRA's A while B is zero: true gradient zero, so no direction
            assert cosine(gradient, expected_gradients[parameter]) >= 0.9999, (name, parameter)


def test_gradient_checkpointing_trains_the_same() -> None:
    curves = []
    for checkpointing in (False, True):
        loaded = build("llama", adapter=True)
        choose_layout(loaded, "packed", 128)
        if checkpointing:
            enable_checkpointing(loaded.model)
        curves.append(train(loaded, DPOConfig(), budget=100)[0])
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)


def test_frozen_weights_get_no_gradient() -> None:
    loaded = build("llama", adapter=True)
    choose_layout(loaded, "packed", 128)
    _, gradients = train(loaded, SFTConfig(), budget=10_000)
    assert all("lora_" in name for name in gradients)
    assert all(p.grad is None for name, p in loaded.model.named_parameters() if "lora_" not in name)
