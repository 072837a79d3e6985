"""Recipes: one frozen model per choice. Nothing here repairs a value; `loading.py` turns YAML into these."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=10**12, description="the upper end keeps sums within 64 bits")]


SFT_LEARNING_RATE, DPO_LEARNING_RATE = 2e-5, 5e-6
"""Defaults of adam and adamw by method, for training every weight."""


ADAPTER_LEARNING_RATE_FACTOR = 10
"""With an adapter, adam's and adamw's default learning rate is this many times the method's.

Schulman et al. 2025, "LoRA Without Regret" (Thinking Machines Lab): the best rate of LoRA is about ten times that of
full tuning, whatever the model, the rank (at alpha/r scaling) and the task. Hu et al. 2021, appendix D: 2e-4 for LoRA
on GPT-2 and GPT-3, 5e-6 for full tuning of GPT-3.
"""


SIMPO_BETA = 2.0
"""Default of `method.beta` for `loss: simpo`; 0.1 for every other loss."""


class Section(BaseModel):
    """Base of every recipe section: frozen, no unknown keys, no silent type coercion."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelConfig(Section):
    """What is fine-tuned."""

    name: str = Field(min_length=1, description="hub name, local folder, GGUF file, run folder, or built-in name")
    revision: str | None = None
    tokenizer: str | None = Field(None, description="where the tokenizer comes from, if not from the model")
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "float32", "bf16", "bf16-pure", "fp16"] = Field(
        "auto",
        description="float32; bf16: autocast over float32 weights; bf16-pure: bf16 weights; "
        "fp16: autocast over float32 weights with a gradient scaler",
    )
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    layout: Literal["auto", "packed", "padded"] = Field("auto", description="auto: packed where the model allows it")
    kernels: Literal["auto", "plain"] = Field(
        "auto",
        description="auto: our own block functions where they compute what the model does; plain: its own modules",
    )
    trust_remote_code: bool = False

    def at(self, place: str) -> ModelConfig:
        """The same choices for a model at another place; revision and tokenizer belong to the old one."""
        return self.model_copy(update={"name": place, "revision": None, "tokenizer": None})


class DataConfig(Section):
    """What it is fine-tuned on."""

    train: str = Field(min_length=1, description="file, folder, hub name or builtin:NAME")
    eval: str | None = None
    train_split: str = Field("train", min_length=1, description="split of a hub data set or of a built-in one")
    eval_split: str = Field("test", min_length=1)
    subset: str | None = Field(None, description="hub data_dir or configuration, e.g. helpful-base")
    render: Literal["auto", "chat", "transcript", "text"] = Field(
        "auto",
        description="chat: the tokenizer's chat template; transcript: Human/Assistant turns; text: as it stands; "
        "auto: turns as chat where the tokenizer has a template, else transcript; text as it stands",
    )
    max_length: Annotated[int, Field(ge=2)] = 512
    on_error: Literal["raise", "skip"] = "raise"
    limit_train: Count | None = Field(None, description="use only the first N records")
    limit_eval: Count | None = None
    shuffle: bool = True


TARGET_PRESETS = ("all-linear", "attention", "mlp")


def _check_targets(value: Any) -> Any:
    """A preset or a pattern (text), or a list of names. One message for all of them: a union's would name neither."""
    if isinstance(value, str) and value:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"'{value}' is no valid pattern ({error})") from None
        return value
    if isinstance(value, list | tuple) and value and all(isinstance(name, str) and name for name in value):
        return tuple(value)
    raise ValueError(f"expected {', '.join(TARGET_PRESETS)}, a list of module names, or a pattern for whole names")


class LoRAConfig(Section):
    """Low-rank adaptation (Hu et al. 2021): W stays, and s·B·A is learnt beside it; A has r rows, B has r columns.

    s is lora_alpha / r, or lora_alpha / √r with `use_rslora` (Kalajdzievski 2023). The names and their meaning are
    peft's. The output head and the embeddings are never adapted.
    """

    name: Literal["lora"] = "lora"
    r: Annotated[int, Field(ge=1, le=2**16)] = 16
    lora_alpha: Count = Field(
        32, description="at one alpha, the best learning rate hardly moves with r (Schulman 2025)"
    )
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    use_rslora: bool = False
    init_lora_weights: Literal[True, "gaussian"] = Field(
        True, description="of A: true is uniform in ±1/√in, as the authors' code; gaussian has variance 1/r². B is 0"
    )
    target_modules: Annotated[str | tuple[str, ...], BeforeValidator(_check_targets)] = Field(
        "all-linear",
        description="all-linear (but the output head), attention, mlp; a list of module names; or a regular expression "
        "for whole module names",
    )


AdapterConfig = LoRAConfig
"""What `adapter` may be; further kinds join a union here, told apart by `name`."""


class SFTConfig(Section):
    """Supervised fine-tuning: cross-entropy."""

    name: Literal["sft"] = "sft"
    loss_on: Literal["completions", "last_completion", "all"] = "completions"


class DPOConfig(Section):
    """Preference tuning. `sigmoid` is DPO; with `label_smoothing` it is conservative DPO.

    A knob that the chosen loss does not read is refused.
    """

    name: Literal["dpo"] = "dpo"
    loss: Literal["sigmoid", "robust", "ipo", "hinge", "simpo", "orpo"] = "sigmoid"
    beta: Positive = 0.1
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5, allow_inf_nan=False)] = 0.0
    ipo_normalization: Literal["sum", "mean"] | None = Field(
        None, description="ipo only: log-ratios summed over tokens (the paper; default) or averaged (as in TRL)"
    )
    simpo_gamma: NonNegative | None = Field(None, description="simpo only: target reward margin, default 0.5")
    reference: str | None = Field(None, description="reference model; default: the model as it starts")

    reference_free: ClassVar[frozenset[str]] = frozenset({"simpo", "orpo"})

    @property
    def needs_reference(self) -> bool:
        return self.loss not in self.reference_free

    @model_validator(mode="before")
    @classmethod
    def _default_beta_of_the_loss(cls, data: Any) -> Any:
        """SimPO's rewards are per token, so its scale is another (Meng et al. 2024 use 2.0 to 2.5)."""
        if isinstance(data, dict) and data.get("loss") == "simpo":
            return {"beta": SIMPO_BETA, **data}
        return data

    @model_validator(mode="after")
    def _only_knobs_the_loss_reads(self) -> DPOConfig:
        if self.label_smoothing and self.loss not in ("sigmoid", "robust"):
            raise ValueError(f"label_smoothing is not part of loss '{self.loss}'; it belongs to sigmoid and robust")
        if self.loss == "robust" and not self.label_smoothing:
            raise ValueError("loss 'robust' needs label_smoothing > 0 (the assumed rate of flipped labels)")
        if self.ipo_normalization is not None and self.loss != "ipo":
            raise ValueError(f"ipo_normalization is read by loss 'ipo' only, and loss is '{self.loss}'")
        if self.simpo_gamma is not None and self.loss != "simpo":
            raise ValueError(f"simpo_gamma is read by loss 'simpo' only, and loss is '{self.loss}'")
        if self.reference is not None and not self.needs_reference:
            raise ValueError(f"loss '{self.loss}' is reference-free; remove method.reference")
        return self


MethodConfig = Annotated[SFTConfig | DPOConfig, Field(discriminator="name")]


class _Warmup(Section):
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    warmup_ratio: Fraction | None = None

    @model_validator(mode="after")
    def _one_warmup(self) -> _Warmup:
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError("give warmup_steps or warmup_ratio, not both")
        return self


class ConstantSchedule(_Warmup):
    lr_scheduler_type: Literal["constant"] = "constant"


class LinearSchedule(_Warmup):
    lr_scheduler_type: Literal["linear"] = "linear"
    min_lr_ratio: Fraction = 0.0


class CosineSchedule(_Warmup):
    lr_scheduler_type: Literal["cosine"] = "cosine"
    min_lr_ratio: Fraction = 0.0


class InverseSqrtSchedule(_Warmup):
    lr_scheduler_type: Literal["inverse_sqrt"] = "inverse_sqrt"
    timescale: Count | None = Field(None, description="default: the warmup steps, or 10000 without warmup")


class WSDSchedule(_Warmup):
    """Warmup, stable, decay (Hu et al. 2024, MiniCPM)."""

    lr_scheduler_type: Literal["warmup_stable_decay"] = "warmup_stable_decay"
    decay_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    decay_type: Literal["linear", "cosine", "1-sqrt"] = "linear"
    min_lr_ratio: Fraction = 0.0


ScheduleConfig = Annotated[
    ConstantSchedule | LinearSchedule | CosineSchedule | InverseSqrtSchedule | WSDSchedule,
    Field(discriminator="lr_scheduler_type"),
]


class _Optimizer(Section):
    learning_rate: Positive
    weight_decay: NonNegative = 0.0
    schedule: ScheduleConfig = LinearSchedule()


class SGDConfig(_Optimizer):
    """Plain SGD; `momentum` > 0 is heavy-ball momentum, `nesterov` its look-ahead form."""

    name: Literal["sgd"] = "sgd"
    learning_rate: Positive = 1e-2
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    nesterov: bool = False

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> SGDConfig:
        if self.nesterov and self.momentum == 0.0:
            raise ValueError("nesterov needs momentum > 0")
        return self


class AdamConfig(_Optimizer):
    """Adam with L2 regularisation in the gradient (Kingma & Ba 2015)."""

    name: Literal["adam"] = "adam"
    learning_rate: Positive = SFT_LEARNING_RATE
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), strict=False
    )
    eps: Positive = 1e-8


class AdamWConfig(AdamConfig):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

    name: Literal["adamw"] = "adamw"  # type: ignore[assignment]


OptimizerConfig = Annotated[SGDConfig | AdamConfig | AdamWConfig, Field(discriminator="name")]


class TrainingConfig(Section):
    """How long, in what portions, and what is kept."""

    per_device_train_batch_size: Count = Field(8, description="records (sequences or pairs) per micro-batch")
    gradient_accumulation_steps: Count = 1
    max_tokens_per_micro_batch: Count | None = Field(
        None, description="a micro-batch with more tokens is split (never a record); default: by device"
    )
    num_train_epochs: Positive = 1.0
    max_steps: Count | None = Field(None, description="optimizer steps; overrides num_train_epochs")
    max_grad_norm: Positive | None = Field(1.0, description="null: no clipping")
    gradient_checkpointing: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    num_threads: Count | None = Field(None, description="CPU threads; default: the machine's cores")
    logging_steps: Count = 1
    save_steps: Count = 100
    save_total_limit: Count = 2
    output_dir: str = "runs"
    run_name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")


class EvaluationConfig(Section):
    """What is measured while training."""

    eval_steps: Count | None = Field(None, description="default: five times a run")
    eval_samples: Count = Field(200, description="fixed random records of each of train and eval")
    per_device_eval_batch_size: Count = 8
    early_stopping_patience: Count | None = Field(None, description="evaluations without improvement before stopping")
    early_stopping_threshold: NonNegative = 0.0
    generation_prompts: Annotated[int, Field(ge=0)] = 3
    max_new_tokens: Count = 64
    temperature: NonNegative = 0.0


class TrackingConfig(Section):
    """Where metrics go beside the run folder. Every tracker is an optional extra."""

    trackers: tuple[Literal["wandb", "tensorboard", "trackio", "mlflow"], ...] = Field((), strict=False)
    project: str = "tunelab"


class Recipe(Section):
    """A whole run. `config.yaml` in the run folder is exactly this, resolved."""

    model: ModelConfig
    data: DataConfig
    adapter: AdapterConfig | None = Field(None, description="null: every weight is trained")
    method: MethodConfig
    optimizer: OptimizerConfig = AdamWConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="before")
    @classmethod
    def _default_learning_rate(cls, data: Any) -> Any:
        """Preference tuning starts from a tuned model and needs smaller steps than SFT; adapters need larger ones."""
        if not isinstance(data, dict):
            return data
        method, optimizer = data.get("method"), data.get("optimizer", {"name": "adamw"})
        if not isinstance(optimizer, dict) or optimizer.get("name") not in ("adam", "adamw"):
            return data
        preference = isinstance(method, dict) and method.get("name") == "dpo"
        rate = DPO_LEARNING_RATE if preference else SFT_LEARNING_RATE
        factor = 1 if data.get("adapter") is None else ADAPTER_LEARNING_RATE_FACTOR
        return {**data, "optimizer": {"learning_rate": rate * factor, **optimizer}}

    def resolved(self) -> dict[str, Any]:
        """Every value, defaults included, as plain JSON-able data."""
        return self.model_dump(mode="json")

    def differences(self, other: Recipe) -> list[tuple[str, Any, Any]]:
        """(key path, value here, value there) of every key that differs and can change the numbers."""
        here, there = _flat(self._decisive()), _flat(other._decisive())
        keys = [*here, *(key for key in there if key not in here)]
        return [(key, here.get(key), there.get(key)) for key in keys if here.get(key) != there.get(key)]

    def fingerprint(self) -> str:
        """SHA-256 of everything that can change the numbers."""
        return hashlib.sha256(json.dumps(self._decisive(), sort_keys=True).encode()).hexdigest()

    def _decisive(self) -> dict[str, Any]:
        """The resolved recipe without names, folders, trackers and logging."""
        data = self.resolved()
        del data["tracking"]
        for key in ("output_dir", "run_name", "logging_steps", "save_steps", "save_total_limit"):
            del data["training"][key]
        return data


def _flat(node: Any, path: str = "") -> dict[str, Any]:
    """Nested sections as {"training.seed": 0, …}."""
    if not isinstance(node, dict):
        return {path: node}
    return {k: v for key, value in node.items() for k, v in _flat(value, f"{path}.{key}".lstrip(".")).items()}
