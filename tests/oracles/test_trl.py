"""TRL 1.16's trainers on the same texts, weights and batch: loss and every gradient, in float32.

TRL tokenises, collates, pads and runs the model; ours packs the same token ids, each prompt once. The definitions
agree except where a test says so:

- `sigmoid`: TRL ignores `label_smoothing`. Ours applies it (conservative DPO, Mitchell 2023).
- `ipo`: TRL averages log-ratios over each completion; that is our `ipo_normalization: mean`, not our default.
  Its reward metrics are of sums even then; ours are of what the loss compares.
- `orpo` (TRL's experimental trainer): its NLL term runs over the prompt too and is averaged over the tokens of the
  batch; the odds-ratio term is the same. Its metric `log_odds_ratio` is a log-sigmoid.
- `rewards/accuracies`: TRL gives a tie 0, we give it 1/2.
- `sft`: the same, a mean over the target tokens of the batch (or, told `num_items_in_batch`, of the step).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tunelab.config import DPOConfig, SFTConfig
from tunelab.models.packed import enable_packing, packed_logprobs
from tunelab.objectives import build_objective, log_odds_ratio, simpo_loss, sum_by_sequence
from tunelab.types import Batch, Segment

pytestmark = pytest.mark.oracle

PAIRS = [
    {"prompt": "the cat", "chosen": " sat on the mat", "rejected": " ran"},
    {"prompt": "a", "chosen": " dog", "rejected": " dog and a cat sat and sat and sat on a mat"},
    {"prompt": "the dog ran to the cat and", "chosen": " the cat ran", "rejected": " the mat"},
]
Ids = list[int]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with 64 tokens beyond the alphabet it needs. No merge crosses a space."""
    alphabet = sorted(set("".join("".join(pair.values()) for pair in PAIRS)))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=64, special_tokens=["<eos>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([text for pair in PAIRS for text in pair.values()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>")


def tiny_gpt2(seed: int) -> GPT2LMHeadModel:
    """Two layers of width 32, dropout 0, weights large enough for the log-ratios to matter."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0,
                        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(5.0)
    return model.eval()


def pack(records: list[tuple[Ids, tuple[Ids, ...]]]) -> Batch:
    """A packed row of (prompt, completions) records, written out here so as to owe nothing to the data room."""
    ids: Ids = []
    positions: Ids = []
    segments: list[Segment] = []
    predictors: Ids = []
    targets: Ids = []
    owners: Ids = []
    sequences = 0
    for prompt, completions in records:
        start, stop = len(ids), len(ids) + len(prompt)
        ids += prompt
        positions += range(len(prompt))
        segments.append(Segment(start, stop))
        for completion in completions:
            first = len(ids)
            ids += completion
            positions += range(len(prompt), len(prompt) + len(completion))
            segments.append(Segment(first, len(ids), start, stop))
            predictors += [stop - 1, *range(first, len(ids) - 1)]
            targets += completion
            owners += [sequences] * len(completion)
            sequences += 1
    columns = (torch.tensor(column) for column in (ids, positions))
    rest = (torch.tensor(column) for column in (predictors, targets, owners))
    return Batch(*columns, tuple(segments), *rest, sequences, tuple(range(len(records))))


def our_logprobs(model: GPT2LMHeadModel, batch: Batch) -> Tensor:
    """The packed engine on a copy that shares TRL's starting weights."""
    assert enable_packing(model) is None
    return packed_logprobs(model, batch)


def our_loss(
    model: GPT2LMHeadModel, reference: GPT2LMHeadModel | None, batch: Batch, method: SFTConfig | DPOConfig
) -> tuple[Tensor, dict[str, float]]:
    """Loss and metrics divided by the weight, as the training step does."""
    objective = build_objective(method)
    scores = None
    if objective.needs_reference:
        with torch.no_grad():
            scores = sum_by_sequence(our_logprobs(reference, batch), batch).view(-1, 2)
    loss, metrics = objective.loss_sum(our_logprobs(model, batch), batch, scores)
    weight = objective.weight(batch)
    return loss / weight, {name: (value / weight).item() for name, value in metrics.items()}


def assert_same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-6, msg=name)


SETTINGS: dict[str, Any] = {
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "max_length": None,
    "disable_tqdm": True,
}  # fmt: skip


def dpo_trainer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, **settings: Any) -> Any:
    import trl
    from datasets import Dataset

    return trl.DPOTrainer(
        model=tiny_gpt2(0),
        ref_model=tiny_gpt2(1),
        args=trl.DPOConfig(output_dir=str(tmp_path), **SETTINGS | settings),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )


def trl_dpo(trainer: Any) -> tuple[Tensor, Batch, dict[str, float]]:
    """TRL's loss on all its records as one batch; the same ids packed; its metrics."""
    rows = list(trainer.train_dataset)
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    batch = pack([(row["prompt_ids"], (row["chosen_ids"], row["rejected_ids"])) for row in rows])
    metrics = {name: values[-1] for name, values in trainer._metrics["eval"].items()}  # the mode `model` is in
    return loss, batch, metrics


AGREEING = {
    "sigmoid": (DPOConfig(), {"loss_type": "sigmoid", "beta": 0.1}),
    "sigmoid, large beta": (DPOConfig(beta=0.5), {"loss_type": "sigmoid", "beta": 0.5}),
    "hinge": (DPOConfig(loss="hinge"), {"loss_type": "hinge", "beta": 0.1}),
    "ipo": (DPOConfig(loss="ipo", ipo_normalization="mean"), {"loss_type": "ipo", "beta": 0.1}),
    "robust": (
        DPOConfig(loss="robust", label_smoothing=0.2),
        {"loss_type": "robust", "beta": 0.1, "label_smoothing": 0.2},
    ),
}


@pytest.mark.parametrize("name", AGREEING)
def test_dpo_trainer_computes_the_same_loss(name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    method, settings = AGREEING[name]
    trainer = dpo_trainer(tmp_path, tokenizer, **settings)
    model, reference = tiny_gpt2(0), tiny_gpt2(1)
    theirs, batch, their_metrics = trl_dpo(trainer)
    ours, metrics = our_loss(model, reference, batch, method)

    assert batch.num_sequences == 6
    assert len(set(torch.bincount(batch.sequence_ids).tolist())) > 3  # unequal lengths
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    theirs.backward()
    ours.backward()
    assert_same_gradients(model, trainer.model)
    same = ["rewards/accuracies", "logps/chosen", "logps/rejected"]
    same += [] if name == "ipo" else ["rewards/chosen", "rewards/rejected", "rewards/margins"]
    for metric in same:
        assert metrics[metric] == pytest.approx(their_metrics[metric], rel=1e-4, abs=1e-5), metric


def test_trl_ignores_label_smoothing_and_we_do_not(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Asked for ε = 0.2, TRL's `sigmoid` gives plain DPO. Ours differs by ε β mean(h): ℓ(-z) = ℓ(z) + z."""
    trainer = dpo_trainer(tmp_path, tokenizer, loss_type="sigmoid", beta=0.1, label_smoothing=0.2)
    theirs, batch, _ = trl_dpo(trainer)
    plain, metrics = our_loss(tiny_gpt2(0), tiny_gpt2(1), batch, DPOConfig())
    conservative, _ = our_loss(tiny_gpt2(0), tiny_gpt2(1), batch, DPOConfig(label_smoothing=0.2))
    assert theirs.item() == pytest.approx(plain.item(), rel=1e-5)
    assert conservative.item() == pytest.approx(plain.item() + 0.2 * metrics["rewards/margins"], rel=1e-5)
    assert abs(conservative.item() - theirs.item()) > 1e-3


def test_trl_has_no_summed_ipo(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    theirs, batch, _ = trl_dpo(dpo_trainer(tmp_path, tokenizer, loss_type="ipo", beta=0.1))
    summed, _ = our_loss(tiny_gpt2(0), tiny_gpt2(1), batch, DPOConfig(loss="ipo"))
    assert abs(summed.item() - theirs.item()) > 0.1


def test_a_tie_is_wrong_to_trl_and_half_right_to_us(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    trainer = dpo_trainer(tmp_path, tokenizer, loss_type="sigmoid")
    trainer.ref_model.load_state_dict(trainer.model.state_dict())
    theirs, batch, their_metrics = trl_dpo(trainer)
    ours, metrics = our_loss(tiny_gpt2(0), tiny_gpt2(0), batch, DPOConfig())
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert (metrics["rewards/accuracies"], their_metrics["rewards/accuracies"]) == (0.5, 0.0)


@pytest.fixture
def sft(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> tuple[Any, list[dict[str, Any]]]:
    """TRL's SFT trainer over prompt-completion records, and its tokenised rows."""
    import trl
    from datasets import Dataset

    trainer = trl.SFTTrainer(
        model=tiny_gpt2(0),
        args=trl.SFTConfig(output_dir=str(tmp_path), **SETTINGS),
        train_dataset=Dataset.from_list([{"prompt": p["prompt"], "completion": p["rejected"]} for p in PAIRS]),
        processing_class=tokenizer,
    )
    return trainer, list(trainer.train_dataset)


def pack_sft(rows: list[dict[str, Any]]) -> Batch:
    """TRL marks the prompt by label -100."""
    records = []
    for row in rows:
        prompt = sum(label == -100 for label in row["labels"])
        records.append((row["input_ids"][:prompt], (row["input_ids"][prompt:],)))
    return pack(records)


def test_sft_trainer_computes_the_same_loss(sft: tuple[Any, list[dict[str, Any]]]) -> None:
    trainer, rows = sft
    theirs = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    model = tiny_gpt2(0)
    ours, metrics = our_loss(model, None, pack_sft(rows), SFTConfig())
    assert ours.item() == metrics["nll"] == pytest.approx(theirs.item(), rel=1e-5)
    theirs.backward()
    ours.backward()
    assert_same_gradients(model, trainer.model)


def test_sft_accumulation_divides_once_in_both(sft: tuple[Any, list[dict[str, Any]]]) -> None:
    """Micro-batches of 1 and 2 records, each divided by the whole step's tokens, add up to the batch of 3."""
    trainer, rows = sft
    model, objective = tiny_gpt2(0), build_objective(SFTConfig())
    weight = objective.weight(pack_sft(rows))
    for part in (rows[:1], rows[1:]):
        theirs = trainer.compute_loss(
            trainer.model, trainer.data_collator(copy.deepcopy(part)), num_items_in_batch=weight.long()
        )
        batch = pack_sft(part)
        ours = objective.loss_sum(our_logprobs(model, batch), batch, None)[0] / weight
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
        theirs.backward()
        ours.backward()
    assert_same_gradients(model, trainer.model)


def averages() -> Tensor:
    return -4 * torch.rand(16, 2, generator=torch.Generator().manual_seed(0)) - 0.01


def test_simpo_is_trls() -> None:
    """CPOTrainer.cpo_loss with `loss_type: simpo`, whose `simpo_gamma` is the paper's γ as well."""
    from trl.experimental.cpo import CPOTrainer

    settings = SimpleNamespace(
        alpha=0.0, beta=2.0, loss_type="simpo", simpo_gamma=0.7, label_smoothing=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    theirs, chosen_rewards, _ = CPOTrainer.cpo_loss(settings, *averages().unbind(1))
    torch.testing.assert_close(simpo_loss(averages(), beta=2.0, gamma=0.7), theirs)
    torch.testing.assert_close(2.0 * averages()[:, 0], chosen_rewards)


def test_orpos_odds_ratio_is_trls() -> None:
    """ORPOTrainer.odds_ratio_loss returns β log σ(log odds ratio); rewards are β × average log-probabilities."""
    from trl.experimental.orpo import ORPOTrainer

    settings = SimpleNamespace(beta=0.1, accelerator=SimpleNamespace(device="cpu"))
    ratio, chosen_rewards, _, _, log_odds = ORPOTrainer.odds_ratio_loss(settings, *averages().unbind(1))
    ours = log_odds_ratio(averages())
    torch.testing.assert_close(0.1 * torch.nn.functional.logsigmoid(ours), ratio)
    torch.testing.assert_close(ours.mean(), log_odds)
    torch.testing.assert_close(0.1 * averages()[:, 0], chosen_rewards)
