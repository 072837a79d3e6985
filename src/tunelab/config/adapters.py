"""`adapter`: one frozen model per way of training less than every weight. Names and meanings are peft's."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from tunelab.config.section import Count, Positive, Section

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


def _check_init(value: Any) -> Any:
    """One message for all of them: a union's would name neither."""
    if value is not True and not (isinstance(value, str) and re.fullmatch(_INIT, value)):
        shown = str(value).lower() if isinstance(value, bool | int | float) else f"'{value!s:.40}'"
        raise ValueError(f"expected true, gaussian, pissa or pissa_niter_N (in N rounds), found {shown}")
    return value


_INIT = r"gaussian|pissa|pissa_niter_[1-9][0-9]*"
Targets = Annotated[str | tuple[str, ...], BeforeValidator(_check_targets)]
Dropout = Annotated[float, Field(ge=0.0, lt=1.0)]


class _Adapter(Section):
    learning_rate_factor: ClassVar[float] = 1.0
    """adam's and adamw's default learning rate is this many times the method's for full tuning."""

    is_removable: ClassVar[bool] = True
    """New weights beside old ones that stay: switched off, the model is what it was."""


class LoRAConfig(_Adapter):
    """Low-rank adaptation (Hu et al. 2021): W stays, and s·B·A is learnt beside it; A has r rows, B has r columns.

    s is lora_alpha / r, or lora_alpha / √r with `use_rslora` (Kalajdzievski 2023). With `use_dora` (Liu et al. 2024)
    the columns of W + s·B·A are brought to learnt lengths. The output head and the embeddings are never adapted.
    """

    learning_rate_factor: ClassVar[float] = 10.0
    # Schulman et al. 2025, "LoRA Without Regret" (Thinking Machines Lab): the best rate of LoRA is about ten times that
    # of full tuning, whatever the model, the rank (at alpha/r scaling) and the task. Hu et al. 2021, appendix D: 2e-4
    # for LoRA on GPT-2 and GPT-3, 5e-6 for full tuning of GPT-3.

    name: Literal["lora"] = "lora"
    r: Annotated[int, Field(ge=1, le=2**16)] = 16
    lora_alpha: Count = Field(
        32, description="at one alpha, the best learning rate hardly moves with r (Schulman 2025)"
    )
    lora_dropout: Dropout = 0.0
    lora_bias: bool = Field(False, description="a bias on B, learnt too")
    use_rslora: bool = False
    use_dora: bool = False
    ephemeral_gpu_offload: bool = Field(
        False, description="use_dora and CUDA: weights that lie on the CPU visit the GPU for the columns' lengths"
    )
    init_lora_weights: Annotated[str | Literal[True], BeforeValidator(_check_init)] = Field(
        True,
        description="true: A is uniform in ±1/√in, as the authors' code, and B 0; gaussian: A has variance 1/r²; "
        "pissa: the r largest singular directions of W move into B·A (Meng et al. 2024), exactly, or in n rounds "
        "of randomised SVD as pissa_niter_n",
    )
    loraplus_lr_ratio: Positive | None = Field(
        None, description="LoRA+ (Hayou et al. 2024): B learns this many times faster than A; they advise 16"
    )
    target_modules: Targets = Field(
        "all-linear",
        description="all-linear (but the output head), attention, mlp; a list of module names; or a regular expression "
        "for whole module names",
    )

    @model_validator(mode="after")
    def _only_what_combines(self) -> LoRAConfig:
        if self.ephemeral_gpu_offload and not self.use_dora:
            raise ValueError("ephemeral_gpu_offload is read with use_dora only")
        if self.lora_bias and self.use_dora:
            raise ValueError("lora_bias and use_dora do not combine (peft has no such layer); choose one")
        return self


class IA3Config(_Adapter):
    """(IA)³ (Liu et al. 2022): learnt factors, 1 at first, on keys, values and the MLP's inner activations.

    `target_modules` and `feedforward_modules` (those of them whose *input* is scaled) default to peft's choice for the
    model's type.
    """

    learning_rate_factor: ClassVar[float] = 150.0
    # 3e-3 in Liu et al. 2022, sec. 3.3.

    name: Literal["ia3"] = "ia3"
    target_modules: Targets | None = Field(None, description="default: keys, values and the MLP's down projection")
    feedforward_modules: Targets | None = Field(None, description="those of target_modules whose input is scaled")

    @model_validator(mode="after")
    def _both_or_neither(self) -> IA3Config:
        if (self.target_modules is None) != (self.feedforward_modules is None):
            raise ValueError("give target_modules and feedforward_modules, or neither")
        return self


class _VirtualTokens(_Adapter):
    num_virtual_tokens: Annotated[int, Field(ge=1, le=2**14)] = 20


class PrefixTuningConfig(_VirtualTokens):
    """Prefix tuning (Li & Liang 2021): learnt keys and values before every sequence, in every layer.

    With `prefix_projection` they are the output of an MLP of hidden size `encoder_hidden_size` (default: the model's),
    as in the paper's training (sec. 4.3).
    """

    learning_rate_factor: ClassVar[float] = 50.0
    # Starting points rather than optima, here and below: 1e-3 for what an encoder computes, as in peft's P-tuning
    # guide; more for bare keys and values, and most for bare embeddings (Lester et al. 2021 use 0.3 with Adafactor,
    # peft's prompt-tuning guide 3e-2 with AdamW).

    name: Literal["prefix_tuning"] = "prefix_tuning"
    prefix_projection: bool = True
    encoder_hidden_size: Count | None = Field(
        None, description="prefix_projection only; default: the model's hidden size"
    )

    @model_validator(mode="after")
    def _hidden_size_of_the_projection(self) -> PrefixTuningConfig:
        if self.encoder_hidden_size is not None and not self.prefix_projection:
            raise ValueError("encoder_hidden_size is read with prefix_projection: true only")
        return self


class PTuningV2Config(_VirtualTokens):
    """P-tuning v2 (Liu et al. 2022): prefix tuning whose keys and values are the parameters themselves."""

    learning_rate_factor: ClassVar[float] = 250.0

    name: Literal["p_tuning_v2"] = "p_tuning_v2"


class PromptTuningConfig(_VirtualTokens):
    """Prompt tuning (Lester et al. 2021): learnt embeddings before every sequence.

    They start as standard normal numbers (`random`), as the embeddings of random tokens (`sample_vocab`), or as those
    of `prompt_tuning_init_text`, repeated or cut to length (`text`; the paper's sec. 3.2 compares the three).
    """

    learning_rate_factor: ClassVar[float] = 500.0

    name: Literal["prompt_tuning"] = "prompt_tuning"
    prompt_tuning_init: Literal["random", "sample_vocab", "text"] = "random"
    prompt_tuning_init_text: str | None = Field(None, min_length=1, description="prompt_tuning_init: text only")

    @model_validator(mode="after")
    def _text_for_text(self) -> PromptTuningConfig:
        if (self.prompt_tuning_init == "text") != (self.prompt_tuning_init_text is not None):
            raise ValueError("prompt_tuning_init: text and prompt_tuning_init_text belong together")
        return self


class PTuningConfig(_VirtualTokens):
    """P-tuning (Liu et al. 2021): embeddings before every sequence that a small encoder computes."""

    learning_rate_factor: ClassVar[float] = 50.0

    name: Literal["p_tuning"] = "p_tuning"
    encoder_reparameterization_type: Literal["mlp", "lstm"] = "mlp"
    encoder_hidden_size: Count = 128
    encoder_num_layers: Annotated[int, Field(ge=1, le=16)] = Field(2, description="lstm only; the mlp has two")
    encoder_dropout: Dropout = Field(0.0, description="lstm only, between its layers")

    @model_validator(mode="after")
    def _knobs_of_the_lstm(self) -> PTuningConfig:
        if self.encoder_reparameterization_type != "lstm" and (self.encoder_dropout or self.encoder_num_layers != 2):
            raise ValueError("encoder_num_layers and encoder_dropout are read by encoder_reparameterization_type: lstm")
        if self.encoder_dropout and self.encoder_num_layers == 1:
            raise ValueError("encoder_dropout acts between the layers of the lstm, and encoder_num_layers is 1")
        return self


class PartialConfig(_Adapter):
    """No new weights: the last `last_layers` blocks and the final norm learn, or every bias does (BitFit, Zaken et al.
    2021). A checkpoint is a whole model.
    """

    is_removable: ClassVar[bool] = False

    name: Literal["partial"] = "partial"
    last_layers: Count | None = None
    biases: bool = False

    @model_validator(mode="after")
    def _one_choice(self) -> PartialConfig:
        if (self.last_layers is not None) == self.biases:
            raise ValueError("give last_layers: K or biases: true")
        return self


ADAPTER_KINDS: tuple[type[_Adapter], ...] = (
    LoRAConfig,
    IA3Config,
    PrefixTuningConfig,
    PTuningV2Config,
    PromptTuningConfig,
    PTuningConfig,
    PartialConfig,
)

AdapterConfig = Annotated[
    LoRAConfig | IA3Config | PrefixTuningConfig | PTuningV2Config | PromptTuningConfig | PTuningConfig | PartialConfig,
    Field(discriminator="name"),
]
