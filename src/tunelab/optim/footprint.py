"""How many bytes an optimizer's state takes, from shapes alone: the formulas of docs/optimizers.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from tunelab.config.optimizers import (
    AdafactorConfig,
    AdagradConfig,
    AdaLomoConfig,
    AdamConfig,
    AdamMiniConfig,
    AdamW8bitConfig,
    AdamWConfig,
    ApolloConfig,
    ApolloMiniConfig,
    BAdamConfig,
    CAMEConfig,
    FiraConfig,
    GaLoreConfig,
    LionConfig,
    LISAConfig,
    LOMOConfig,
    MuonConfig,
    OptimizerConfig,
    QuarterConfig,
    RMSpropConfig,
    ScheduleFreeAdamWConfig,
    SGDConfig,
    SM3Config,
)
from tunelab.optim.adam_mini import Blocks
from tunelab.optim.groups import ParameterRoles
from tunelab.optim.quarter import CHUNK, quarter_state_bytes

Shape = tuple[int, ...]
Parameter = tuple[str, Shape, int]
"""Name, shape and bytes per value of a trained parameter, tied ones once. As the optimizer sees it: 2 for bf16, but 4
where bf16 weights are lent to it as float32 (`storage.py`)."""

STEP_BYTES = 4
"""torch's own optimizers count steps in a float32 tensor per parameter."""

QUANTISED_FROM, QUANTISED_BLOCK = 4096, 256
"""bitsandbytes keeps smaller tensors in float32, and a float32 scale for each block of an 8-bit one."""


def state_bytes(config: OptimizerConfig, parameters: Iterable[Parameter], roles: ParameterRoles | None = None) -> int:
    """Bytes of all state tensors after the first step, of the fullest one with lisa and badam. `roles` as for
    `build_optimizer`.
    """
    of_one, roles = STATE[type(config)], roles or ParameterRoles()
    by_layer: dict[int | None, int] = {}
    for parameter in parameters:
        layer = _layer(parameter[0])
        by_layer[layer] = by_layer.get(layer, 0) + of_one(config, parameter, roles)
    outside = by_layer.pop(None, 0)
    layers = sorted(by_layer.values(), reverse=True)
    match config:
        case LISAConfig():
            return outside + sum(layers[: config.lisa_activated_layers])
        case BAdamConfig():
            return max([*layers, outside if config.include_embedding or config.include_lm_head else 0])
    return outside + sum(layers)


def transient_bytes(
    config: OptimizerConfig,
    parameters: Iterable[Parameter],
    roles: ParameterRoles | None = None,
    device_type: str = "cpu",
) -> int:
    """Bytes that a step takes for a moment, beside weights, gradients and state: those of the parameter that takes
    most, since none but torch's fused kernels, which take nothing, updates several at once.
    """
    if isinstance(config, AdamW8bitConfig) and device_type != "cpu":
        return 0  # one kernel there
    of_one, roles = TRANSIENT.get(type(config), _times(0, 0)), roles or ParameterRoles()
    return max((of_one(config, parameter, roles) for parameter in parameters), default=0)


def _layer(name: str) -> int | None:
    """The number of a block in a parameter's name: 3 in `transformer.h.3.mlp.c_fc.weight`."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _copies(count: Callable[[Any], int], step: int = STEP_BYTES) -> Callable[[Any, Parameter, ParameterRoles], int]:
    """As many values as the parameter has, `count` times, in its own dtype."""

    def of_one(config: Any, parameter: Parameter, roles: ParameterRoles) -> int:
        copies = count(config)
        return copies * math.prod(parameter[1]) * parameter[2] + (step if copies else 0)

    return of_one


_adam = _copies(lambda config: 2)


def _rmsprop(config: RMSpropConfig, parameter: Parameter, roles: ParameterRoles) -> int:
    return _copies(lambda config: 1 + (config.momentum > 0) + config.centered)(config, parameter, roles)


def _factored(shape: Shape) -> int:
    """Values of a row and a column mean per matrix; a vector is kept whole."""
    return math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1] if len(shape) > 1 else math.prod(shape)


def _adafactor(config: AdafactorConfig, parameter: Parameter, roles: ParameterRoles) -> int:
    _, shape, itemsize = parameter
    return (_factored(shape) + 1) * itemsize  # and the library's note of the weight's root mean square


def _came(config: CAMEConfig, parameter: Parameter, roles: ParameterRoles) -> int:
    _, shape, itemsize = parameter
    moments = 2 * _factored(shape) if len(shape) > 1 else _factored(shape)
    return (math.prod(shape) + moments + 1) * itemsize


def _sm3(config: SM3Config, parameter: Parameter, roles: ParameterRoles) -> int:
    _, shape, itemsize = parameter
    return (sum(shape) + (math.prod(shape) if config.momentum else 0)) * itemsize


def _adam_mini(config: AdamMiniConfig, parameter: Parameter, roles: ParameterRoles) -> int:
    name, shape, itemsize = parameter
    blocks = Blocks(shape, name in roles.input_first, *roles.heads.get(name, (0, 1)))
    return (math.prod(shape) + blocks.count) * max(4, itemsize)


def _adamw_8bit(config: AdamW8bitConfig, parameter: Parameter, roles: ParameterRoles) -> int:
    size = math.prod(parameter[1])
    if not _is_8bit(config, parameter, roles):
        return 2 * 4 * size
    return 2 * (size + 4 * -(-size // QUANTISED_BLOCK))


def _is_8bit(config: AdamW8bitConfig, parameter: Parameter, roles: ParameterRoles) -> bool:
    name, shape, _ = parameter
    return math.prod(shape) >= QUANTISED_FROM and not (config.embeddings_32bit and roles.is_embedding(name))


def _muon(config: MuonConfig, parameter: Parameter, roles: ParameterRoles) -> int:
    name, shape, itemsize = parameter
    if not roles.is_block_matrix(name, shape):
        return _adam(config, parameter, roles)
    return math.prod(shape) * itemsize


def _low_rank(config: GaLoreConfig | FiraConfig | ApolloConfig, parameter: Parameter, roles: ParameterRoles) -> int:
    name, shape, itemsize = parameter
    if not roles.is_block_matrix(name, shape):
        return _adam(config, parameter, roles)
    longer, shorter = max(shape), min(shape)
    rank = min(config.rank, shorter)
    projection = 0 if isinstance(config, ApolloConfig) else rank * shorter
    norm = 0 if isinstance(config, GaLoreConfig) else 1
    return (2 * longer * rank + projection + norm) * max(4, itemsize)


STATE: dict[type, Callable[[Any, Parameter, ParameterRoles], int]] = {
    SGDConfig: _copies(lambda config: int(config.momentum > 0), step=0),
    RMSpropConfig: _rmsprop,
    AdagradConfig: _copies(lambda config: 1),
    AdamConfig: _adam,
    AdamWConfig: _adam,
    AdamW8bitConfig: _adamw_8bit,
    LionConfig: _copies(lambda config: 1, step=0),
    AdafactorConfig: _adafactor,
    SM3Config: _sm3,
    CAMEConfig: _came,
    AdamMiniConfig: _adam_mini,
    MuonConfig: _muon,
    GaLoreConfig: _low_rank,
    FiraConfig: _low_rank,
    ApolloConfig: _low_rank,
    ApolloMiniConfig: _low_rank,
    ScheduleFreeAdamWConfig: _copies(lambda config: 2, step=0),
    LISAConfig: _adam,
    BAdamConfig: _adam,
    LOMOConfig: _copies(lambda config: 0),
    AdaLomoConfig: lambda config, parameter, roles: 4 * _factored(parameter[1]),
    QuarterConfig: lambda config, parameter, roles: quarter_state_bytes(parameter[1]),
}
"""Bytes of one parameter's state."""


# --- temporaries ----------------------------------------------------------------------------------------------------


def _times(wide: int, narrow: int) -> Callable[[Any, Parameter, ParameterRoles], int]:
    """Bytes per value of a float32 parameter and of one in half precision."""
    return lambda config, parameter, roles: math.prod(parameter[1]) * (wide if parameter[2] >= 4 else narrow)


def _adamw_8bit_transient(config: AdamW8bitConfig, parameter: Parameter, roles: ParameterRoles) -> int:
    of_one = _times(20, 24) if _is_8bit(config, parameter, roles) else _times(12, 16)
    return of_one(config, parameter, roles)


def _muon_transient(config: MuonConfig, parameter: Parameter, roles: ParameterRoles) -> int:
    """Nesterov's update, and two iterates with three Gram matrices in bf16."""
    name, shape, itemsize = parameter
    if not roles.is_block_matrix(name, shape):
        return 0
    return math.prod(shape) * (itemsize * config.nesterov + 4) + 7 * min(shape) ** 2


def _low_rank_transient(
    config: GaLoreConfig | FiraConfig | ApolloConfig, parameter: Parameter, roles: ParameterRoles
) -> int:
    """In float32: R, Ñ and the update, with Fira what is left beside it too, or for GaLore and Fira the factors of the
    singular value decomposition. A narrower parameter's gradient is widened, and at the end the parameter itself.
    """
    name, shape, itemsize = parameter
    if not roles.is_block_matrix(name, shape):
        return 0
    size, longer, shorter = math.prod(shape), max(shape), min(shape)
    rank, widened = min(config.rank, shorter), size if itemsize < 4 else 0
    low = 2 * longer * rank + (rank * shorter if isinstance(config, ApolloConfig) else 0)
    moments = [low + size + 3 * widened]
    if isinstance(config, FiraConfig):
        moments.append(low + 2 * size + widened)
    if isinstance(config, GaLoreConfig | FiraConfig):
        moments.append(2 * size + shorter**2 + widened)
    return 4 * max(moments)


def _quarter_transient(config: QuarterConfig, parameter: Parameter, roles: ParameterRoles) -> int:
    return min(math.prod(parameter[1]), CHUNK) * (29 if parameter[2] >= 4 else 31)


TRANSIENT: dict[type, Callable[[Any, Parameter, ParameterRoles], int]] = {
    RMSpropConfig: _times(4, 2),
    AdagradConfig: _times(4, 2),
    AdamW8bitConfig: _adamw_8bit_transient,
    LionConfig: _times(4, 2),
    AdafactorConfig: _times(4, 6),
    SM3Config: _times(4, 2),
    CAMEConfig: _times(8, 8),
    AdamMiniConfig: _times(0, 8),
    MuonConfig: _muon_transient,
    GaLoreConfig: _low_rank_transient,
    FiraConfig: _low_rank_transient,
    ApolloConfig: _low_rank_transient,
    ApolloMiniConfig: _low_rank_transient,
    ScheduleFreeAdamWConfig: _times(4, 2),
    AdaLomoConfig: _times(12, 20),
    QuarterConfig: _quarter_transient,
}
"""Bytes of the temporaries of one parameter's update, measured: tests/optim/test_footprint.py."""
