"""What a model name leads to, and what is refused."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2ForSequenceClassification,
    GPT2Model,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging

from tests.models.small_models import VOCABULARY, save_folder, small_gpt2, small_llama
from tunelab.config import ModelConfig
from tunelab.errors import ConfigError, MachineError
from tunelab.models import hub
from tunelab.models.builtin import BUILTIN_MODELS
from tunelab.models.dropout import read_dropout, set_dropout
from tunelab.models.loading import load_model, load_tokenizer
from tunelab.models.tiny import build_tiny_tokenizer, tiny_config, train_tiny_tokenizer

IDS = torch.tensor([[5, 9, 700, 3]])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2 as transformers saves it."""
    return save_folder(small_gpt2(), tmp_path_factory.mktemp("models") / "small-gpt2")


def load(name: str | Path, **options: object) -> object:
    return load_model(ModelConfig(name=str(name), device="cpu", **options))


# --- what is found -----------------------------------------------------------------------------------------------


def test_a_folder_computes_what_transformers_computes(saved: Path) -> None:
    loaded = load(saved)
    expected = AutoModelForCausalLM.from_pretrained(saved)(IDS).logits
    assert torch.equal(loaded.model(IDS).logits, expected)
    assert loaded.model.config._attn_implementation == "sdpa"
    assert not loaded.model.training
    assert loaded.tokenizer("a word").input_ids == build_tiny_tokenizer()("a word").input_ids
    assert loaded.tokenizer.pad_token is None, "padding is invented for nobody"
    assert (loaded.source, loaded.layout, str(loaded.device)) == (str(saved), "padded", "cpu")


def test_num_parameters_counts_tied_weights_once(saved: Path) -> None:
    """V·D + P·D + 2·(12·D² + 13·D) + 2·D for D = 32, V = 1024, P = 128 positions."""
    assert load(saved).num_parameters == 1024 * 32 + 128 * 32 + 2 * (12 * 32**2 + 13 * 32) + 2 * 32


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bf16-pure", torch.bfloat16)])
@pytest.mark.parametrize("name", ["tiny-gpt2", None])
def test_weights_are_in_the_precision_asked_for(
    saved: Path, name: str | None, precision: str, dtype: torch.dtype
) -> None:
    loaded = load(name or saved, precision=precision)
    assert {p.dtype for p in loaded.model.parameters()} == {dtype}


def test_shards_are_read(tmp_path: Path) -> None:
    model = small_llama()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    build_tiny_tokenizer().save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    assert torch.equal(load(tmp_path).model(IDS).logits, model(IDS).logits)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ConfigError, match=rf"{shard.name} is missing"):
        load(tmp_path)


def test_a_run_is_its_best_checkpoint_else_its_newest(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"run .*run has no checkpoint yet"):
        load(run)
    models = {step: small_gpt2(seed=step) for step in (2, 10, 9)}
    for step, model in models.items():
        save_folder(model, run / "checkpoints" / f"step-{step}")
    (run / "checkpoints" / "tmp-step-11").mkdir()
    assert torch.equal(load(run).model(IDS).logits, models[10](IDS).logits)  # 10 is newer than 9
    best = run / "best"
    best.symlink_to("checkpoints/step-2", target_is_directory=True)
    assert torch.equal(load(run).model(IDS).logits, models[2](IDS).logits)
    shutil.rmtree(run / "checkpoints" / "step-2")
    with pytest.raises(ConfigError, match=r"best points to checkpoints/step-2, which is gone"):
        load(run)


def test_the_tokenizer_can_come_from_elsewhere(saved: Path, tmp_path: Path) -> None:
    small_gpt2().save_pretrained(tmp_path)  # no tokenizer
    with pytest.raises(ConfigError, match=r"holds no tokenizer; set model\.tokenizer"):
        load(tmp_path)
    loaded = load(tmp_path, tokenizer="tiny-gpt2")
    assert len(loaded.tokenizer) == 1024
    assert len(load_tokenizer(ModelConfig(name=str(tmp_path), tokenizer=str(saved)))) == 1024


def test_transformers_is_quiet_and_as_loud_as_before_afterwards(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    load(saved)
    assert capfd.readouterr() == ("", "")
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before


# --- the built-in tiny model -------------------------------------------------------------------------------------


def test_tiny_gpt2_is_the_same_every_time_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = load("tiny-gpt2").model.state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = load("tiny-gpt2").model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "198k" in BUILTIN_MODELS["tiny-gpt2"]
    assert round(load("tiny-gpt2").num_parameters, -3) == 198_000


def test_tiny_tokenizer_is_the_one_its_corpus_gives_and_encodes_every_text() -> None:
    tokenizer = build_tiny_tokenizer()
    trained = train_tiny_tokenizer()
    assert tokenizer.get_vocab() == trained.get_vocab()
    for text in ("\n\nHuman: How are you?\n\nAssistant: I'm fine.", "  a\t\n é 漢字 🤗 2024", "<|endoftext|>x"):
        ids = tokenizer(text).input_ids
        assert ids == trained.encode(text).ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == 0
    assert tokenizer("Human:").input_ids[-1] != 0, "no end of sequence is added"


# --- dropout -----------------------------------------------------------------------------------------------------

SHAPE = {"num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 64}


def small_opt() -> PreTrainedModel:
    config = OPTConfig(hidden_size=16, ffn_dim=32, word_embed_proj_dim=16, layerdrop=0.5, **SHAPE)
    return OPTForCausalLM(config)


def small_neox() -> PreTrainedModel:
    config = GPTNeoXConfig(hidden_size=16, intermediate_size=32, hidden_dropout=0.2, attention_dropout=0.2, **SHAPE)
    return GPTNeoXForCausalLM(config)


def small_bloom() -> PreTrainedModel:
    config = BloomConfig(hidden_size=16, n_head=2, n_layer=2, vocab_size=64, hidden_dropout=0.2, attention_dropout=0.2)
    return BloomForCausalLM(config)


def small_llama_with_dropout() -> PreTrainedModel:
    return small_llama(attention_dropout=0.3)


@pytest.mark.parametrize("build", [small_gpt2, small_opt, small_neox, small_bloom, small_llama_with_dropout])
def test_dropout_is_off_unless_asked(build: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_folder(build(), tmp_path)
    ids = torch.tensor([[5, 9, 60, 3]])
    model = load(tmp_path, tokenizer=None).model if build in (small_gpt2, small_llama_with_dropout) else None
    if model is None:  # its vocabulary is smaller than the tokenizer's, which is not the point here
        config = AutoModelForCausalLM.from_pretrained(tmp_path).config
        set_dropout(config, 0.0)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
    evaluated = model.eval()(ids).logits
    for _ in range(5):
        assert torch.equal(model.train()(ids).logits, evaluated)
    as_saved = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    assert any(not torch.equal(as_saved(ids).logits, evaluated) for _ in range(5)), "nothing to switch off"


def test_dropout_is_what_is_asked(saved: Path) -> None:
    loaded = load(saved, dropout=0.25)
    rates = {module.p for module in loaded.model.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.25}
    assert loaded.original_dropout == {
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "summary_first_dropout": 0.1,
    }
    config = OPTConfig(layerdrop=0.5)
    set_dropout(config, 0.3)
    assert read_dropout(config)["layerdrop"] == 0.0


# --- what is refused ---------------------------------------------------------------------------------------------


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def drop_tensor(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.pop("transformer.h.1.mlp.c_fc.weight"))


def reshape_tensor(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({"transformer.ln_f.weight": torch.ones(7)}))


def only_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut_weights(folder: Path, size: int) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:size])


def replace_by(model: PreTrainedModel) -> Callable[[Path], None]:
    return lambda folder: model.save_pretrained(folder)


def big_tokenizer(folder: Path) -> None:
    tokenizer = build_tiny_tokenizer()
    tokenizer.add_tokens([f"<extra {i}>" for i in range(3)])
    tokenizer.save_pretrained(folder)


def turn_into_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


BERT = BertConfig(
    vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
)
T5 = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda f: [p.unlink() for p in f.iterdir()], r"no model folder: it has no config\.json; it is empty"),
    "no config": (lambda f: (f / "config.json").unlink(), r"has no config\.json; it holds .*model\.safetensors"),
    "adapter": (turn_into_adapter, r"is an adapter without adapter_model\.safetensors; it has none"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), r"cannot be read by transformers"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), r"cannot be read by transformers"),
    "no model type": (lambda f: (f / "config.json").write_text("{}"), r"cannot be read by transformers"),
    "unknown model type": (lambda f: edit_config(f, model_type="gpt9"), r"cannot be read by transformers.*gpt9"),
    "wrong type": (lambda f: edit_config(f, n_embd="wide"), r"cannot be read by transformers.*expected int, got str"),
    "impossible size": (lambda f: edit_config(f, n_embd=-1), r"cannot be read by transformers"),
    "other size": (lambda f: edit_config(f, n_embd=64), r"has shape \[.*\], and config\.json makes it"),
    "more layers": (lambda f: edit_config(f, n_layer=3), r"lacks 12 of the model's tensors \(transformer\.h\.2"),
    "quantised": (lambda f: edit_config(f, quantization_config={"quant_method": "gptq", "bits": 4}), r"is quantised"),
    "names a pickle": (lambda f: edit_config(f, transformers_weights="adapter_model.bin"), r"names pickled weights"),
    "own code": (
        lambda f: edit_config(f, model_type="mine", auto_map={"AutoConfig": "mine.Config"}),
        r"set model\.trust_remote_code: true",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"has no model\.safetensors; it holds"),
    "pickle only": (only_pickle, r"only pickled weights \(pytorch_model\.bin\), which can run any code"),
    "weights empty": (lambda f: cut_weights(f, 0), r"model\.safetensors is damaged or cut short"),
    "header cut": (lambda f: cut_weights(f, 100), r"model\.safetensors is damaged or cut short"),
    "data cut": (lambda f: cut_weights(f, -1), r"model\.safetensors is damaged or cut short"),
    "no safetensors": (
        lambda f: (f / "model.safetensors").write_bytes(b"<html>not found</html>" * 9),
        r"model\.safetensors is damaged or cut short",
    ),
    "tensor missing": (drop_tensor, r"lacks 1 of the model's tensors \(transformer\.h\.1\.mlp\.c_fc\.weight"),
    "tensor reshaped": (
        reshape_tensor,
        r"transformer\.ln_f\.weight has shape \[7\], and config\.json makes it \[32\] \(1 such\)",
    ),
    "BERT": (replace_by(BertForMaskedLM(BERT)), r"no causal language model \(BertForMaskedLM\)"),
    "T5": (replace_by(T5ForConditionalGeneration(T5)), r"no causal language model \(T5ForConditionalGeneration\)"),
    "classifier": (
        replace_by(GPT2ForSequenceClassification(small_gpt2().config)),
        r"another head than a language model's \(GPT2ForSequenceClassification\)",
    ),
    "tokenizer too large": (big_tokenizer, r"has 1027 tokens and the model embeds 1024"),
    "tokenizer broken": (lambda f: (f / "tokenizer.json").write_text("{"), r"cannot be read by transformers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_is_refused(saved: Path, tmp_path: Path, case: str) -> None:
    break_it, message = REFUSED[case]
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    break_it(folder)
    with pytest.raises(ConfigError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_nothing_in_a_pickle_is_run(saved: Path, tmp_path: Path) -> None:
    marker = tmp_path / "run by the pickle"

    class Attack:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return Path.touch, (marker,)

    import pickle

    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Attack()))
    load(folder)  # the safetensors beside it are read
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="pickled weights"):
        load(folder)
    assert not marker.exists()


def test_a_base_model_without_head_takes_the_tied_one(tmp_path: Path) -> None:
    """GPT-2's output layer is its embedding: `GPT2Model` files hold all there is."""
    model = small_gpt2()
    base = GPT2Model(model.config)
    base.load_state_dict(model.transformer.state_dict())
    save_folder(base, tmp_path)
    assert torch.equal(load(tmp_path).model(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", r"\./nowhere does not exist; without a network: smollm2-135m, tiny-gpt2"),
        ("{folder}/small-gpt", r"does not exist \(did you mean '.*small-gpt2'\?\)"),
        ("{folder}/small-gpt2/config.json", r"is a file but no \.gguf"),
        ("models/2024/mine", r"does not exist"),
        ("nothing.gguf", r"nothing\.gguf does not exist"),
        ("no such model", r"no such model does not exist"),
        ("{folder}", r"has no config\.json; did you mean .*small-gpt2\?"),
    ],
)
def test_a_path_is_refused(saved: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(name.format(folder=saved.parent))


def test_a_revision_belongs_to_hub_models(saved: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.revision: .* is not a hub model"):
        load(saved, revision="main")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt2", r"'gpt2' is no built-in model or local folder.*, it is not in the hub cache.*tiny-gpt2"),
        ("openai-community/gpt2", r"HF_HUB_OFFLINE is set; without a network: smollm2-135m"),
        ("smollm2-135", r"did you mean 'smollm2-135m'\?"),
    ],
)
@pytest.mark.parametrize("what", [load_model, load_tokenizer])
def test_offline_a_hub_name_says_what_works(name: str, message: str, what: Callable) -> None:
    with pytest.raises(MachineError, match=message):
        what(ModelConfig(name=name, device="cpu"))


def test_an_unreachable_hub_is_noticed_by_one_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        monkeypatch.setattr(hub.constants, "is_offline_mode", lambda: False)
        monkeypatch.setattr(hub, "getproxies", dict)
        monkeypatch.setattr(hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        assert not hub.hub_is_reachable()  # bound, but nobody listens
        free.listen()
        assert hub.hub_is_reachable()
    monkeypatch.setattr(hub, "getproxies", lambda: {"http": "http://proxy:3128"})
    assert hub.hub_is_reachable(), "only the proxy knows"


def test_names_of_built_ins_cost_no_torch() -> None:
    code = "import sys; from tunelab.models.builtin import BUILTIN_MODELS; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tiny_config_keeps_its_own_dropout_until_a_recipe_sets_it() -> None:
    assert tiny_config().resid_pdrop == 0.1
    assert load("tiny-gpt2").model.config.resid_pdrop == 0.0
