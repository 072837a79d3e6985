"""Decoding over a model's own parameters against transformers: every step's logits, and the tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.models.small_models import VOCABULARY, as_loaded, small_gpt2, small_llama
from tests.models.test_generation import PROMPTS, end_early, small_mistral, transformers_greedy
from tunelab.config import LoRAConfig
from tunelab.models import generation
from tunelab.models.adapters import attach_adapter
from tunelab.models.attention import plain_attention
from tunelab.models.engine import choose_layout
from tunelab.models.fused import decoding
from tunelab.models.fused.architecture import LowRank, Projection
from tunelab.models.fused.decoding import FEW_ROWS, Decoding
from tunelab.models.generation import GenerationSettings, generate
from tunelab.models.loaded import LoadedModel
from tunelab.parallel import resolve_precision

NEW = 24
LONGEST = max(map(len, PROMPTS))
STILL = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}


def still_gpt2(**changes: object) -> PreTrainedModel:
    """Without dropout, as tunelab loads models; biases and norms away from their initial zeros and ones."""
    return stirred(small_gpt2(**STILL, **changes))


def biased_llama() -> PreTrainedModel:
    return stirred(small_llama(attention_bias=True, mlp_bias=True))


def tied_llama() -> PreTrainedModel:
    return stirred(small_llama(tie_word_embeddings=True, head_dim=16))


def stirred(model: PreTrainedModel) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def adapted_llama() -> PreTrainedModel:
    return adapted(small_llama()).model


def adapted(model: PreTrainedModel) -> LoadedModel:
    """A LoRA that has learnt something: B is zero at first."""
    loaded = as_loaded(model)
    attach_adapter(loaded, LoRAConfig(r=4, lora_alpha=8), seed=0)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(2))
    return loaded


Build = Callable[[], PreTrainedModel]
BUILDS: list[Build] = [still_gpt2, small_llama, biased_llama, tied_llama, adapted_llama]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which forward passes `generate` took: 'fused' or 'modules' for every batch."""
    taken: list[str] = []

    def watch(passes: type, kind: str) -> None:
        start = passes.start  # type: ignore[attr-defined]

        def watched(self: Any, prompts: Any) -> None:
            taken.append(kind)
            start(self, prompts)

        monkeypatch.setattr(passes, "start", watched)

    watch(generation.Decoding, "fused")
    watch(generation._Step, "modules")
    return taken


def chosen(model: PreTrainedModel, precision: str = "float32") -> LoadedModel:
    loaded = as_loaded(model)
    loaded.precision = resolve_precision(precision, loaded.device)
    choose_layout(loaded, "packed", LONGEST + NEW)
    assert loaded.shortcuts.fused_blocks, loaded.blocks_reason
    return loaded


def steps(model: PreTrainedModel, told: list[list[int]], static: bool, leaving: dict[int, list[int]]) -> Iterator[Any]:
    """(rows, logits) of every step while the rows are told what they said: `told[row]`. At step n the rows
    `leaving[n]` end."""
    with torch.inference_mode():
        passes = Decoding(model, torch.float32, LONGEST + NEW, NEW, static=static)
        rows = list(range(len(PROMPTS)))
        passes.start(PROMPTS)
        for n in range(NEW):
            yield list(rows), passes.next_logits()
            going = [i for i, row in enumerate(rows) if row not in leaving.get(n, [])]
            passes.advance(torch.tensor([told[row][n] for row in rows]), going)
            rows = [rows[i] for i in going]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("build", BUILDS)
def test_every_steps_logits_are_the_plain_models(build: Build, static: bool) -> None:
    """Each row's alone, of the whole sequence anew, without cache or padding; rows end in the middle."""
    model = build()
    told = torch.randint(0, VOCABULARY, (len(PROMPTS), NEW), generator=torch.Generator().manual_seed(3)).tolist()
    with torch.no_grad():
        whole = [
            model(torch.tensor([prompt + said])).logits[0, len(prompt) - 1 :]
            for prompt, said in zip(PROMPTS, told, strict=True)
        ]
    compared = 0
    for n, (rows, logits) in enumerate(steps(model, told, static, leaving={4: [1], 9: [0, 3]})):
        assert rows == ([0, 1, 2, 3] if n <= 4 else [0, 2, 3] if n <= 9 else [2])
        torch.testing.assert_close(logits, torch.stack([whole[row][n] for row in rows]), atol=1e-4, rtol=0)
        compared += 1
    assert compared == NEW
    assert min(logits.std() for logits in whole) > 0.1, "the tolerance must be small against the logits"


@pytest.mark.parametrize("build", BUILDS)
def test_greedy_tokens_are_transformers(build: Build, engine: list[str]) -> None:
    model = build()
    expected = [transformers_greedy(model, prompt, NEW) for prompt in PROMPTS]
    loaded = chosen(model)
    for size in (16, 3, 1):
        answers = generate(loaded, PROMPTS, GenerationSettings(max_new_tokens=NEW, batch_size=size))
        assert [list(answer.ids) for answer in answers] == expected
    assert set(engine) == {"fused"}
    assert len({tuple(ids) for ids in expected}) == len(PROMPTS), "the answers must differ for this to say anything"


def test_rows_end_each_for_itself(engine: list[str]) -> None:
    model = small_llama()
    eos = end_early(model, transformers_greedy(model, PROMPTS[1], NEW))
    expected = [transformers_greedy(model, prompt, NEW) for prompt in PROMPTS]
    answers = generate(chosen(model), PROMPTS, GenerationSettings(max_new_tokens=NEW))
    assert engine == ["fused"]
    assert [list(answer.ids) for answer in answers] == expected
    assert answers[1].ids[-1] == eos
    assert {answer.finish_reason for answer in answers} == {"eos", "length"}


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0, "top_k": 50, "top_p": 0.9}, {"repetition_penalty": 1.3}], ids=str
)
def test_same_answers_by_both_ways_and_in_any_company(options: dict, engine: list[str]) -> None:
    model = small_llama()
    plain = generate(as_loaded(model), PROMPTS, GenerationSettings(max_new_tokens=NEW, **options))
    loaded = chosen(model)
    assert generate(loaded, PROMPTS, GenerationSettings(max_new_tokens=NEW, **options)) == plain
    assert generate(loaded, PROMPTS, GenerationSettings(max_new_tokens=NEW, batch_size=2, **options)) == plain
    assert generate(loaded, PROMPTS[:1], GenerationSettings(max_new_tokens=NEW, **options)) == plain[:1]
    assert engine == ["modules", "fused", "fused", "fused", "fused"]


def test_prompts_of_about_one_length_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[list[int]] = []
    start = Decoding.start

    def record(self: Decoding, prompts: Any) -> None:
        batches.append([len(prompt) for prompt in prompts])
        start(self, prompts)

    monkeypatch.setattr(Decoding, "start", record)
    loaded = chosen(small_llama())
    pieces = dict.fromkeys(range(len(PROMPTS)), "")

    def collect(index: int, piece: str) -> None:
        pieces[index] += piece

    answers = generate(loaded, PROMPTS, GenerationSettings(max_new_tokens=8, batch_size=2), collect)
    assert batches == [[1, 3], [5, 7]]
    assert [answer.text for answer in answers] == list(pieces.values()), "in the order of the prompts"


def test_prompts_beyond_the_prefill_budget_are_read_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = chosen(small_llama())
    together = generate(loaded, PROMPTS, GenerationSettings(max_new_tokens=8))
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 8)
    assert list(decoding._groups(PROMPTS)) == [range(2), range(2, 4)]
    assert generate(loaded, PROMPTS, GenerationSettings(max_new_tokens=8)) == together
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 1)
    assert generate(loaded, PROMPTS, GenerationSettings(max_new_tokens=8)) == together


def test_an_adapter_counts_while_it_is_on() -> None:
    loaded = adapted(small_llama())
    choose_layout(loaded, "packed", LONGEST + NEW)
    settings = GenerationSettings(max_new_tokens=NEW)
    with_adapter = generate(loaded, PROMPTS, settings)
    assert loaded.adapter is not None
    with loaded.adapter.disable_adapter():
        without = generate(loaded, PROMPTS, settings)
    assert [a.ids for a in without] == [tuple(transformers_greedy(small_llama(), p, NEW)) for p in PROMPTS]
    assert without != with_adapter
    assert generate(loaded, PROMPTS, settings) == with_adapter


@pytest.mark.parametrize("precision", ["bf16", "bf16-pure"])
@pytest.mark.parametrize("build", [still_gpt2, small_llama, adapted_llama])
def test_bf16_is_near_the_plain_models(build: Build, precision: str) -> None:
    model = build()
    weights = resolve_precision(precision, torch.device("cpu"))
    model.to(weights.weights_dtype)
    with torch.inference_mode():
        passes = Decoding(model, torch.bfloat16, LONGEST + NEW, NEW)
        passes.start(PROMPTS)
        found = [passes.next_logits()]
        passes.advance(torch.tensor([3, 3, 3, 3]), [0, 1, 2, 3])
        found.append(passes.next_logits())
        with weights.autocast():
            expected = [
                torch.cat([model(torch.tensor([p + more])).logits[:, -1] for p in PROMPTS]) for more in ([], [3])
            ]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == torch.float32
        cosine = torch.nn.functional.cosine_similarity(mine, theirs.float(), dim=-1)
        assert cosine.min() > 0.999


@pytest.mark.parametrize("cause", ["dropout", "not asked", "window", "dynamic rotary", "head"])
def test_the_models_own_modules_where_decoding_does_not_apply(cause: str, engine: list[str]) -> None:
    if cause == "dropout":
        loaded = as_loaded(small_gpt2())
        choose_layout(loaded, "auto", LONGEST + NEW)
        assert not loaded.shortcuts.fused_blocks
    elif cause == "not asked":
        loaded = as_loaded(small_llama())
    elif cause == "window":
        loaded = as_loaded(small_mistral(window=16))
        choose_layout(loaded, "packed", 16)  # as long as the window: packed training is fine
        assert loaded.shortcuts.fused_blocks
    elif cause == "dynamic rotary":
        rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
        loaded = chosen(small_llama(rope_parameters=rope, max_position_embeddings=128))
    else:
        model = small_llama()
        loaded = chosen(model)
        model.set_output_embeddings(OtherHead(model.lm_head))
    with plain_attention(loaded.model):
        expected = [transformers_greedy(loaded.model, prompt, NEW) for prompt in PROMPTS]
    answers = generate(loaded, PROMPTS, GenerationSettings(max_new_tokens=NEW))
    assert engine == ["modules"]
    assert [list(answer.ids) for answer in answers] == expected


class OtherHead(torch.nn.Module):
    """A head that does something more than its weight says."""

    def __init__(self, head: torch.nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, None

    def forward(self, x: Tensor) -> Tensor:
        return -torch.nn.functional.linear(x, self.weight)


def test_nothing_is_left_behind() -> None:
    """The model in its mode, with its attention and its weights, which can still be trained."""
    model = still_gpt2()
    loaded = chosen(model)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attention = model.config._attn_implementation
    generate(loaded, PROMPTS, GenerationSettings(max_new_tokens=4))
    assert model.training
    assert model.config._attn_implementation == attention
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(parameter.is_inference() for parameter in model.parameters())


def test_no_prompts_no_answers() -> None:
    assert generate(as_loaded(small_llama()), [], GenerationSettings()) == []


@pytest.mark.parametrize("rows", [1, 2, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("input_first", [False, True])
@pytest.mark.parametrize("by_column", [False, True])
def test_products_are_the_exact_ones(rows: int, bias: bool, adapter: bool, input_first: bool, by_column: bool) -> None:
    """Against float64, for weights and inputs in either layout."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, b = random(rows, 48), random(72) if bias else None
    low = LowRank(random(4, 48), random(72, 4), 0.5) if adapter else None
    weight = random(48, 72) if input_first else random(72, 48)
    with torch.inference_mode():
        found = decoding._Product(Projection(weight, b, input_first, low), torch.float32)(
            x.T.contiguous().T if by_column else x
        )
    expected = x.double() @ (weight if input_first else weight.T).double()
    if b is not None:
        expected += b
    if low is not None:
        expected += 0.5 * (x.double() @ low.down.double().T) @ low.up.double().T
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=1e-5)
