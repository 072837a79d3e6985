"""Virtual tokens: peft's own forward is the oracle, one sequence at a time; whatever the layout and the blocks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, PromptTuningInit, get_peft_model
from peft import PromptTuningConfig as PeftPromptTuning
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel

from tests.models.adapter_kinds import VIRTUAL, virtual_count
from tests.models.small_models import VOCABULARY, as_loaded, save_folder, small_gpt2, small_llama
from tunelab.config import ModelConfig
from tunelab.config.adapters import PrefixTuningConfig, PTuningConfig, PTuningV2Config
from tunelab.data import pack
from tunelab.errors import ConfigError
from tunelab.models.adapters import adapt_skeleton, adapter_disabled, attach_adapter
from tunelab.models.attention import plain_attention
from tunelab.models.checkpointing import enable_checkpointing
from tunelab.models.engine import check_checkpointing, choose_layout, compute_logprobs, sequence_logprobs
from tunelab.models.fused.decoding import Decoding
from tunelab.models.generation import GenerationSettings, generate
from tunelab.models.loaded import LoadedModel
from tunelab.models.loading import check_foldable, load_context_length, load_model
from tunelab.models.padded import _predictors, _rows
from tunelab.models.saving import adapter_fingerprint, save_model, weights_fingerprint
from tunelab.models.virtual_rows import expand, insert_virtual
from tunelab.parallel import resolve_precision
from tunelab.types import Batch, Completion, Example, Origin, Segment

Build = Callable[[], PreTrainedModel]


def still_gpt2() -> PreTrainedModel:
    """Without dropout, which the fused blocks leave to the model's own modules."""
    return small_gpt2(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)


MODELS: list[Build] = [still_gpt2, small_llama]
LAYOUTS = [("packed", "auto"), ("packed", "plain"), ("padded", "auto")]
each_model = pytest.mark.parametrize("build", MODELS, ids=["gpt2", "llama"])
each_kind = pytest.mark.parametrize("kind", VIRTUAL)


def adapted(build: Build, kind: str, layout: str = "packed", kernels: str = "auto") -> LoadedModel:
    loaded = as_loaded(build())
    attach_adapter(loaded, VIRTUAL[kind], seed=0)
    choose_layout(loaded, layout, 24, kernels)  # type: ignore[arg-type]
    assert loaded.layout == layout, loaded.layout_reason
    assert loaded.shortcuts.fused_blocks == (layout == "packed" and kernels == "auto"), loaded.blocks_reason
    return loaded


def examples(completions: int) -> list[Example]:
    """Records with prompts of 4, 1 and 0 tokens."""
    rng = np.random.default_rng(completions)

    def ids(count: int) -> np.ndarray:
        return rng.integers(0, VOCABULARY, count).astype(np.int32)

    def completion(length: int) -> Completion:
        return Completion(ids(length), np.ones(length, dtype=bool))

    return [
        Example(ids(prompt), tuple(completion(3 + prompt + 2 * i) for i in range(completions)), Origin("test", 1))
        for prompt in (4, 1, 0)
    ]


def batch_of(completions: int) -> Batch:
    return pack(examples(completions), [0, 1, 2])


def peft_logprobs(loaded: LoadedModel, batch: Batch) -> Tensor:
    """(S,) from peft's wrapper, each sequence alone."""
    rows = _rows(batch)
    owners, columns = _predictors(batch, rows)
    found = torch.zeros(len(batch.targets))
    assert loaded.adapter is not None
    with plain_attention(loaded.model):
        for number, row in enumerate(rows):
            ids = batch.input_ids[torch.tensor(row)][None]
            logits = loaded.adapter(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(row) :]
            mine = owners == number
            logprobs = torch.log_softmax(logits[columns[mine]], dim=-1)
            found = found.masked_scatter(mine, logprobs.gather(1, batch.targets[mine, None]))
    return found


def gradients(loaded: LoadedModel, logprobs: Tensor) -> dict[str, Tensor]:
    """Of a sum in which every log-probability has a weight of its own: no gradient is right by symmetry."""
    weights = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(3))
    (logprobs * weights).sum().backward()
    found = {name: p.grad.clone() for name, p in loaded.named_parameters() if p.grad is not None}
    for _, parameter in loaded.named_parameters():
        parameter.grad = None
    return found


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm(), name


# --- the same as peft -----------------------------------------------------------------------------------------------


@each_model
@each_kind
@pytest.mark.parametrize(("layout", "kernels"), LAYOUTS)
@pytest.mark.parametrize("completions", [1, 2], ids=["sft", "pairs"])
def test_loss_and_every_gradient_are_pefts(
    build: Build, kind: str, layout: str, kernels: str, completions: int
) -> None:
    loaded, batch = adapted(build, kind, layout, kernels), batch_of(completions)
    found, expected = compute_logprobs(loaded, batch), peft_logprobs(loaded, batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    ours, pefts = gradients(loaded, found), gradients(loaded, expected)
    close(ours, pefts)
    assert ours.keys() == {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert all(name.startswith("prompt_encoder.") for name in ours)


@each_model
@each_kind
@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_gradient_checkpointing_gives_the_same_gradients(build: Build, kind: str, kernels: str) -> None:
    plain, checkpointed = (adapted(build, kind, kernels=kernels) for _ in range(2))
    check_checkpointing(checkpointed)
    enable_checkpointing(checkpointed.model)
    found = []
    for loaded in (plain, checkpointed):
        loaded.model.train()
        found.append(gradients(loaded, compute_logprobs(loaded, batch_of(2))))
    close(found[1], found[0])


@pytest.mark.parametrize("kind", ["prefix_tuning", "p_tuning_v2"])
def test_checkpointing_does_not_go_with_a_cache(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"training\.gradient_checkpointing: in padded rows .* asked for by model"):
        check_checkpointing(adapted(small_llama, kind, "padded"))
    check_checkpointing(adapted(small_llama, "prompt_tuning", "padded"))


@each_model
@each_kind
@pytest.mark.parametrize(("layout", "kernels"), LAYOUTS)
def test_switched_off_it_is_the_base_and_then_on_again(build: Build, kind: str, layout: str, kernels: str) -> None:
    loaded, plain, batch = adapted(build, kind, layout, kernels), as_loaded(build()), batch_of(2)
    choose_layout(plain, layout, 24, kernels)  # type: ignore[arg-type]
    with torch.no_grad():
        on = compute_logprobs(loaded, batch)
        with adapter_disabled(loaded):
            off = compute_logprobs(loaded, batch)
        assert torch.equal(off, compute_logprobs(plain, batch))
        assert torch.equal(on, compute_logprobs(loaded, batch))
    assert (on - off).abs().max() > 1e-3
    assert weights_fingerprint(loaded.model) == weights_fingerprint(plain.model)


@each_kind
def test_a_new_batch_beside_another_changes_nothing(kind: str) -> None:
    """Sequences do not see each other, nor each other's virtual tokens."""
    loaded = adapted(small_llama, kind)
    records = examples(2)
    together, _ = sequence_logprobs(loaded, [pack(records, [0, 1, 2])])
    alone = [sequence_logprobs(loaded, [pack([record], [0])])[0] for record in records]
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=1e-6)


def test_half_precision_weights_keep_a_float32_prompt() -> None:
    for kind in ("p_tuning_v2", "prompt_tuning"):
        loaded = as_loaded(still_gpt2().bfloat16())
        loaded.precision = resolve_precision("bf16-pure", loaded.device)
        attach_adapter(loaded, VIRTUAL[kind], seed=0)
        choose_layout(loaded, "packed", 24)
        expected = compute_logprobs(adapted(still_gpt2, kind), batch_of(2))
        found = compute_logprobs(loaded, batch_of(2))
        assert (found - expected).abs().max() < 0.2
        grads = gradients(loaded, found)
        assert {gradient.dtype for gradient in grads.values()} == {torch.float32}


# --- parameters -----------------------------------------------------------------------------------------------------


@each_model
@each_kind
def test_parameters_by_formula(build: Build, kind: str) -> None:
    loaded, base = adapted(build, kind), build()
    count = virtual_count(VIRTUAL[kind])(base)
    assert loaded.num_trainable_parameters == count
    assert loaded.num_parameters == base.num_parameters() + count
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_a_projection_is_as_wide_as_the_model_by_default() -> None:
    loaded = as_loaded(small_llama())
    attach_adapter(loaded, PrefixTuningConfig(num_virtual_tokens=2), seed=0)
    assert loaded.prompt_encoder.transform[0].out_features == 32


def test_a_text_is_where_a_prompt_starts(tmp_path: Path) -> None:
    """The embeddings of its tokens, over and over: what peft makes of the same text and a tokenizer on disk."""
    folder = save_folder(small_llama(), tmp_path)
    loaded = adapted(small_llama, "prompt_tuning_text")
    config: Any = VIRTUAL["prompt_tuning_text"]
    stock = get_peft_model(
        small_llama(),
        PeftPromptTuning(
            task_type="CAUSAL_LM",
            num_virtual_tokens=config.num_virtual_tokens,
            prompt_tuning_init=PromptTuningInit.TEXT,
            prompt_tuning_init_text=config.prompt_tuning_init_text,
            tokenizer_name_or_path=str(folder),
        ),
    )
    found = loaded.prompt_encoder.embedding.weight
    assert torch.equal(found, stock.prompt_encoder["default"].embedding.weight)
    assert 1 < len(found.unique(dim=0)) < len(loaded.tokenizer(config.prompt_tuning_init_text * 2)["input_ids"])


def test_a_text_without_a_token_is_refused() -> None:
    loaded = as_loaded(small_llama())
    loaded.tokenizer = lambda text: {"input_ids": []}  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"adapter\.prompt_tuning_init_text: the tokenizer makes no token of it"):
        attach_adapter(loaded, VIRTUAL["prompt_tuning_text"], seed=0)


def test_a_prompt_of_the_vocabulary_is_made_of_embeddings() -> None:
    loaded = adapted(small_llama, "prompt_tuning_vocab")
    distances = torch.cdist(loaded.prompt_encoder.embedding.weight, loaded.model.get_input_embeddings().weight)
    assert torch.all(distances.min(dim=1).values == 0)


@each_kind
def test_the_start_is_a_function_of_the_seed(kind: str) -> None:
    first, same, other = (as_loaded(small_llama()) for _ in range(3))
    before = torch.get_rng_state()
    for loaded, seed in ((first, 0), (same, 0), (other, 1)):
        attach_adapter(loaded, VIRTUAL[kind], seed)
    assert torch.equal(torch.get_rng_state(), before)
    found = [torch.cat([p.flatten() for p in loaded.prompt_encoder.parameters()]) for loaded in (first, same, other)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2]) == (kind == "prompt_tuning_text")


def test_an_lstm_drops_out_while_training_alone(tmp_path: Path) -> None:
    config = PTuningConfig(num_virtual_tokens=3, encoder_reparameterization_type="lstm", encoder_dropout=0.5)
    loaded, batch = as_loaded(small_llama()), batch_of(1)
    attach_adapter(loaded, config, seed=0)
    choose_layout(loaded, "packed", 24)
    with torch.no_grad():
        still = compute_logprobs(loaded, batch)
        assert torch.equal(still, compute_logprobs(loaded, batch))
        loaded.model.train()
        assert not torch.equal(compute_logprobs(loaded, batch), compute_logprobs(loaded, batch))
        save_model(loaded, tmp_path)
        stock = PeftModel.from_pretrained(small_llama(), tmp_path).eval()
        loaded.model.eval()
        loaded.adapter = stock
        torch.testing.assert_close(peft_logprobs(loaded, batch), still, atol=1e-5, rtol=1e-5)


# --- on disk --------------------------------------------------------------------------------------------------------


def moved(loaded: LoadedModel) -> LoadedModel:
    """Parameters other than those at the start."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in loaded.prompt_encoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return loaded


def saved(build: Build, kind: str, folder: Path) -> LoadedModel:
    """An adapter saved in folder/adapter on a base in folder/base."""
    base = save_folder(build(), folder / "base")
    loaded = load_model(ModelConfig(name=str(base), device="cpu"))
    attach_adapter(loaded, VIRTUAL[kind], seed=0)
    (folder / "adapter").mkdir()
    save_model(moved(loaded), folder / "adapter")
    choose_layout(loaded, "packed", 24)
    return loaded


COMPUTED = {"prefix_tuning", "p_tuning_mlp", "p_tuning_lstm"}
"""Kinds whose virtual tokens are not the parameters themselves."""


@each_model
@each_kind
def test_stock_peft_opens_what_is_saved(build: Build, kind: str, tmp_path: Path) -> None:
    loaded, batch = saved(build, kind, tmp_path), batch_of(1)
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    expected = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert names == expected | ({"prompt_encoder.safetensors"} if kind in COMPUTED else set())
    with torch.no_grad():
        ours = compute_logprobs(loaded, batch)
        loaded.adapter = PeftModel.from_pretrained(build(), tmp_path / "adapter").eval()
        torch.testing.assert_close(peft_logprobs(loaded, batch), ours, atol=1e-5, rtol=1e-5)


@each_model
@each_kind
def test_saved_and_loaded_it_computes_the_same(build: Build, kind: str, tmp_path: Path) -> None:
    loaded, batch, folder = saved(build, kind, tmp_path), batch_of(2), tmp_path / "adapter"
    expected = compute_logprobs(loaded, batch)
    kept = load_model(ModelConfig(name=str(folder), device="cpu"), adapters="keep")
    choose_layout(kept, "packed", 24)
    found = compute_logprobs(kept, batch)
    assert torch.equal(found, expected)
    close(gradients(kept, found), gradients(loaded, expected), tolerance=0.0)
    again = tmp_path / "again"
    again.mkdir()
    save_model(kept, again)
    for path in sorted(folder.iterdir()):
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name

    used = load_model(ModelConfig(name=str(folder), device="cpu"))  # to evaluate, to talk to
    choose_layout(used, "packed", 24)
    assert used.num_trainable_parameters == 0
    assert used.source == str(folder)
    with torch.no_grad():
        torch.testing.assert_close(compute_logprobs(used, batch), expected, atol=1e-6, rtol=1e-6)
    assert adapter_fingerprint(used) == adapter_fingerprint(load_model(ModelConfig(name=str(folder), device="cpu")))
    again = tmp_path / "third"
    again.mkdir()
    save_model(used, again)
    tensors = [load_file(place / "adapter_model.safetensors")["prompt_embeddings"] for place in (folder, again)]
    assert torch.equal(*tensors)


def test_the_text_is_on_record(tmp_path: Path) -> None:
    saved(small_llama, "prompt_tuning_text", tmp_path)
    described = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert described["prompt_tuning_init"] == "TEXT"
    assert described["prompt_tuning_init_text"] == "Answer truthfully:"
    assert described["tokenizer_name_or_path"] == described["base_model_name_or_path"] == str(tmp_path / "base")


def test_it_cannot_become_weights(tmp_path: Path) -> None:
    saved(small_llama, "prompt_tuning", tmp_path)
    config = ModelConfig(name=str(tmp_path / "adapter"), device="cpu")
    for refuse in (check_foldable, lambda config: load_model(config, adapters="fold")):
        with pytest.raises(
            ConfigError, match=r"model\.name: .*adapter is made of virtual tokens, which cannot become w"
        ):
            refuse(config)
    assert load_context_length(config) == 128 - 4


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


REFUSED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "encoder gone": (
        "p_tuning_mlp",
        lambda f: (f / "prompt_encoder.safetensors").unlink(),
        r"training cannot go on from it: .* and prompt_encoder\.safetensors, its parameters, is missing; resume from a",
    ),
    "encoder cut": (
        "prefix_tuning",
        lambda f: cut(f / "prompt_encoder.safetensors"),
        r"prompt_encoder\.safetensors is damaged \(.*\); copy it again",
    ),
    "other count": (
        "prompt_tuning",
        lambda f: edit(f, num_virtual_tokens=9),
        r"does not fit its base model .*: prompt_embeddings is of shape \[4, 32\] in the file and of shape \[9, 32\]",
    ),
    "other encoder": (
        "p_tuning_mlp",
        lambda f: edit(f, encoder_hidden_size=9),
        r"does not fit its base model .*: mlp_head\.0\.bias is of shape \[8\] in the file and of shape \[9\]",
    ),
}


def edit(folder: Path, **changes: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_is_refused(case: str, tmp_path: Path) -> None:
    kind, break_it, message = REFUSED[case]
    saved(small_llama, kind, tmp_path)
    break_it(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=message) as caught:
        load_model(ModelConfig(name=str(tmp_path / "adapter"), device="cpu"), adapters="keep")
    assert "\n" not in str(caught.value)


def other(model_type: str, **changes: Any) -> PreTrainedModel:
    options: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
    options |= {"num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 128}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(options | changes))
    return AutoModelForCausalLM.from_config(config).eval()


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "opt": ({"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}, "packed"),
    "qwen3": ({"num_key_value_heads": 2, "head_dim": 16}, "packed"),
    "bloom": ({"n_layer": 2, "n_head": 4}, "padded"),  # distances in its attention
    "mistral": ({"num_key_value_heads": 2, "sliding_window": 8}, "padded"),  # a window that ends within a sequence
}


@pytest.mark.parametrize("kind", ["p_tuning_v2", "prompt_tuning"])
@pytest.mark.parametrize("model_type", OTHERS)
def test_other_architectures_fall_back_where_they_must(kind: str, model_type: str) -> None:
    """Losses, gradients and answers are peft's, in whatever layout the model can take."""
    changes, layout = OTHERS[model_type]
    loaded = endless(as_loaded(other(model_type, **changes)))
    attach_adapter(loaded, VIRTUAL[kind], seed=0)
    choose_layout(loaded, "auto", 12)
    assert loaded.layout == layout, loaded.layout_reason
    batch = batch_of(2)
    found, expected = compute_logprobs(loaded, batch), peft_logprobs(loaded, batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    close(gradients(loaded, found), gradients(loaded, expected))
    answers = generate(loaded, PROMPTS, GenerationSettings(max_new_tokens=4))
    assert [list(answer.ids) for answer in answers] == [greedy(loaded, prompt, 4) for prompt in PROMPTS]


def test_keys_need_attention() -> None:
    for config in (PrefixTuningConfig(), PTuningV2Config()):
        with pytest.raises(ConfigError, match=rf"adapter\.name: {config.name} needs attention, and MambaForCausalLM"):
            attach_adapter(as_loaded(small_mamba()), config, seed=0)


@pytest.mark.parametrize("layout", ["auto", "padded"])
def test_keys_that_a_model_does_not_take_are_refused(layout: Any) -> None:
    """Falcon's heads share one key and value, which peft does not know of."""
    loaded = as_loaded(other("falcon", multi_query=True, alibi=False, new_decoder_architecture=False))
    attach_adapter(loaded, VIRTUAL["p_tuning_v2"], seed=0)
    with pytest.raises(ConfigError, match=r"adapter\.name: FalconForCausalLM takes no keys and values before its seq"):
        choose_layout(loaded, layout, 12)


def small_mamba() -> PreTrainedModel:
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4)
    return MambaForCausalLM(config).eval()


# --- generation -----------------------------------------------------------------------------------------------------

PROMPTS = [[5, 9, 700], [3, 41, 8, 100, 200, 7, 9], [17]]


def greedy(loaded: LoadedModel, prompt: list[int], count: int) -> list[int]:
    """Each token from peft's forward of everything so far."""
    ids = list(prompt)
    assert loaded.adapter is not None
    with torch.no_grad(), plain_attention(loaded.model):
        for _ in range(count):
            whole = torch.tensor([ids])
            ids.append(
                int(loaded.adapter(input_ids=whole, attention_mask=torch.ones_like(whole)).logits[0, -1].argmax())
            )
    return ids[len(prompt) :]


def endless(loaded: LoadedModel) -> LoadedModel:
    loaded.model.generation_config.eos_token_id = None
    loaded.tokenizer.eos_token = None
    return loaded


@each_model
@each_kind
@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_answers_are_pefts(build: Build, kind: str, kernels: str) -> None:
    loaded = endless(adapted(build, kind, kernels=kernels))
    found = generate(loaded, PROMPTS, GenerationSettings(max_new_tokens=6))
    assert [list(answer.ids) for answer in found] == [greedy(loaded, prompt, 6) for prompt in PROMPTS]


@each_kind
def test_decoding_in_constant_shapes_is_the_same(kind: str) -> None:
    """As CUDA graphs need it."""
    from tunelab.models.adapters.virtual import virtual_tokens

    loaded = adapted(small_llama, kind)
    with torch.inference_mode():
        virtual = virtual_tokens(loaded)
        logits = []
        for static in (False, True):
            decoding = Decoding(loaded.model, torch.float32, 7 + 3, 3, static=static, virtual=virtual)
            decoding.start(PROMPTS)
            logits.append([decoding.next_logits()])
            for going in ([0, 1, 2], [0, 2]):
                decoding.advance(torch.tensor([4, 5, 6]), going)
                logits[-1].append(decoding.next_logits())
    for moving, still in zip(*logits, strict=True):
        torch.testing.assert_close(moving, still, atol=1e-5, rtol=1e-5)


def test_a_model_without_a_cache_reads_its_prompt_every_time() -> None:
    loaded = endless(as_loaded(small_mamba()))
    attach_adapter(loaded, VIRTUAL["prompt_tuning"], seed=0)
    found = generate(loaded, PROMPTS[:1], GenerationSettings(max_new_tokens=4))
    assert list(found[0].ids) == greedy(loaded, PROMPTS[0], 4)


def test_virtual_tokens_count_in_the_context() -> None:
    loaded = adapted(small_llama, "p_tuning_v2")
    assert loaded.context_length == 128 - 5
    generate(loaded, [[1] * 113], GenerationSettings(max_new_tokens=10))
    with pytest.raises(ConfigError, match=r"exceeds the model's context of 123 \(its 5 virtual tokens taken off\)"):
        generate(loaded, [[1] * 114], GenerationSettings(max_new_tokens=10))


# --- rows -----------------------------------------------------------------------------------------------------------


def test_where_everything_goes() -> None:
    """Prompt [0, 2) of two completions, and a lone sequence; two virtual tokens before each of the two roots."""
    segments = (Segment(0, 2), Segment(2, 5, 0, 2), Segment(5, 6, 0, 2), Segment(6, 8))
    found = expand(segments, 2, torch.device("cpu"))
    assert found.segments == (Segment(0, 4), Segment(4, 7, 0, 4), Segment(7, 8, 0, 4), Segment(8, 12))
    assert found.tokens == ((2, 4), (4, 7), (7, 8), (10, 12))
    assert found.rows.tolist() == [2, 3, 4, 5, 6, 7, 10, 11]
    assert found.virtual.tolist() == [0, 1, 8, 9]
    assert found.moved(((1, 2), (2, 4), (0, 0), (6, 7)), segments) == ((3, 4), (4, 6), (0, 0), (10, 11))


@pytest.mark.parametrize("completions", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 4])
def test_a_longer_row_is_that_of_longer_prompts(completions: int, count: int) -> None:
    """Inserting placeholders gives what packing records gives whose prompts begin with them."""
    records = [record for record in examples(completions) if len(record.prompt_ids)]
    short = pack(records, [0, 1])
    longer = [
        Example(np.concatenate((np.zeros(count, np.int32), r.prompt_ids)), r.completions, r.origin) for r in records
    ]
    found, _ = insert_virtual(short, count)
    expected = pack(longer, [0, 1])
    for name in ("input_ids", "position_ids", "loss_positions", "targets", "sequence_ids"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.segments == expected.segments
    assert found.tail.ranges == expected.tail.ranges
    assert torch.equal(found.tail.kept, expected.tail.kept)
    assert torch.equal(found.tail.index, expected.tail.index)


@each_model
@each_kind
def test_a_skeleton_counts_what_a_model_has(build: Build, kind: str) -> None:
    """For forecasts: the same parameters under the same names, and the encoder's alone are trained."""
    loaded = adapted(build, kind)
    with torch.device("meta"):
        skeleton = build()
    adapt_skeleton(skeleton, VIRTUAL[kind])
    shapes = {name: (p.shape, p.requires_grad) for name, p in skeleton.named_parameters()}
    assert shapes == {name: (p.shape, p.requires_grad) for name, p in loaded.named_parameters()}
