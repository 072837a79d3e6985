"""The papers' updates in float64, written from the papers and not from any code, with loops where those are clearer.

Each function takes a config and whether and how much a parameter decays, and returns an update (θ, g, t, state) → θ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from tunelab.config.optimizers import (
    AdafactorConfig,
    AdagradConfig,
    AdamMiniConfig,
    AdamWConfig,
    CAMEConfig,
    LionConfig,
    MuonConfig,
    RMSpropConfig,
    SM3Config,
)

Array = np.ndarray
State = dict[str, Array]
Update = Callable[[Array, Array, int, State], Array]


def adamw(config: object, decay: float) -> Update:
    """Loshchilov & Hutter 2019, algorithm 2."""
    beta1, beta2 = config.betas  # type: ignore[attr-defined]
    eta, eps = config.learning_rate, config.eps  # type: ignore[attr-defined]

    def update(theta: Array, g: Array, t: int, state: State) -> Array:
        m, v = adam_moments(g, state, beta1, beta2)
        return theta - eta * ((m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps) + decay * theta)

    return update


def adam_moments(g: Array, state: State, beta1: float, beta2: float) -> tuple[Array, Array]:
    state["m"] = beta1 * state.get("m", 0.0) + (1 - beta1) * g
    state["v"] = beta2 * state.get("v", 0.0) + (1 - beta2) * g * g
    return state["m"], state["v"]


def rmsprop(config: RMSpropConfig, decay: float) -> Update:
    """Hinton 2012, lecture 6e; centered as Graves 2013, eqs. 38-45, momentum on the normalised gradient."""

    def update(theta: Array, g: Array, t: int, state: State) -> Array:
        g = g + decay * theta
        state["n"] = config.alpha * state.get("n", 0.0) + (1 - config.alpha) * g * g
        n = state["n"]
        if config.centered:
            state["mean"] = config.alpha * state.get("mean", 0.0) + (1 - config.alpha) * g
            n = n - state["mean"] ** 2
        state["delta"] = config.momentum * state.get("delta", 0.0) + g / (np.sqrt(n) + config.eps)
        return theta - config.learning_rate * state["delta"]

    return update


def adagrad(config: AdagradConfig, decay: float) -> Update:
    """Duchi et al. 2011, eq. 1 with the diagonal of G."""

    def update(theta: Array, g: Array, t: int, state: State) -> Array:
        g = g + decay * theta
        state["sum"] = state.get("sum", config.initial_accumulator_value) + g * g
        return theta - config.learning_rate * g / (np.sqrt(state["sum"]) + config.eps)

    return update


def lion(config: LionConfig, decay: float) -> Update:
    """Chen et al. 2023, algorithm 2."""
    beta1, beta2 = config.betas

    def update(theta: Array, g: Array, t: int, state: State) -> Array:
        m = state.get("m", np.zeros_like(g))
        c = np.sign(beta1 * m + (1 - beta1) * g)
        state["m"] = beta2 * m + (1 - beta2) * g
        return theta - config.learning_rate * (c + decay * theta)

    return update


def root_mean_square(x: Array) -> float:
    return float(np.sqrt(np.mean(x**2)))


def factored_mean(values: Array, state: State, name: str, beta: float) -> Array:
    """Shazeer & Stern 2018, algorithm 4, lines 5-8: row and column sums, R Cᵀ / 1ᵀR. A vector is kept whole."""
    if values.ndim == 1:
        state[name] = beta * state.get(name, 0.0) + (1 - beta) * values
        return state[name]
    state[f"{name} R"] = beta * state.get(f"{name} R", 0.0) + (1 - beta) * values.sum(axis=1)
    state[f"{name} C"] = beta * state.get(f"{name} C", 0.0) + (1 - beta) * values.sum(axis=0)
    return np.outer(state[f"{name} R"], state[f"{name} C"]) / state[f"{name} R"].sum()


def adafactor(config: AdafactorConfig, decay: float) -> Update:
    """Shazeer & Stern 2018, algorithms 4 and 5 with β̂₂ = 1 − t^decay_rate; decoupled decay at the step's own size."""

    def update(theta: Array, g: Array, t: int, state: State) -> Array:
        v = factored_mean(g**2 + config.eps[0], state, "v", 1 - t**config.decay_rate)
        u = g / np.sqrt(v)
        u = u / max(1.0, root_mean_square(u) / config.clip_threshold)
        alpha = config.learning_rate
        if config.scale_parameter:
            alpha *= max(config.eps[1], root_mean_square(theta))
        return theta - alpha * (u + decay * theta)

    return update


def sm3(config: SM3Config, decay: float) -> Update:
    """Anil et al. 2019, algorithm SM3-II, coordinate by coordinate; its sets are the rows and the columns (for a
    vector, each coordinate). Momentum as in the authors' code: a running mean of the updates.
    """

    def update(theta: Array, g: Array, t: int, state: State) -> Array:
        previous = {key: value for key, value in state.items() if isinstance(key, tuple)}
        for key in previous:
            state[key] = 0.0  # μ'_t
        scaled = np.zeros_like(g)
        for place in np.ndindex(g.shape):
            sets = list(enumerate(place))
            nu = min(previous.get(each, 0.0) for each in sets) + g[place] ** 2
            for each in sets:
                state[each] = max(state.get(each, 0.0), nu)
            scaled[place] = g[place] / math.sqrt(nu) if nu > 0 else 0.0
        if config.momentum:
            state["m"] = config.momentum * state.get("m", 0.0) + (1 - config.momentum) * scaled
            scaled = state["m"]
        return theta - config.learning_rate * (scaled + decay * theta)

    return update


def came(config: CAMEConfig, decay: float) -> Update:
    """Luo et al. 2023, algorithm 2. Of a vector the authors' code keeps the momentum undamped."""
    beta1, beta2, beta3 = config.betas

    def update(theta: Array, g: Array, t: int, state: State) -> Array:
        u = g / np.sqrt(factored_mean(g**2 + config.eps[0], state, "v", beta2))
        u = u / max(1.0, root_mean_square(u) / config.clip_threshold)
        state["m"] = beta1 * state.get("m", 0.0) + (1 - beta1) * u
        move = state["m"]
        if g.ndim > 1:
            move = move / np.sqrt(factored_mean((u - state["m"]) ** 2 + config.eps[1], state, "U", beta3))
        return theta - config.learning_rate * (move + decay * theta)

    return update


def adam_mini(config: AdamMiniConfig, decay: float, blocks: Sequence[tuple]) -> Update:
    """Zhang et al. 2024, algorithm 1: in each of `blocks` (indices into the parameter) v is of the mean of g²."""
    beta1, beta2 = config.betas

    def update(theta: Array, g: Array, t: int, state: State) -> Array:
        theta = theta - config.learning_rate * decay * theta
        state["m"] = beta1 * state.get("m", 0.0) + (1 - beta1) * g
        for number, block in enumerate(blocks):
            v = state[f"v{number}"] = beta2 * state.get(f"v{number}", 0.0) + (1 - beta2) * np.mean(g[block] ** 2)
            m_hat, v_hat = state["m"][block] / (1 - beta1**t), v / (1 - beta2**t)
            theta[block] -= config.learning_rate * m_hat / (np.sqrt(v_hat) + config.eps)
        return theta

    return update


def muon(config: MuonConfig, decay: float) -> Update:
    """Jordan et al. 2024: momentum, Nesterov, the quintic Newton-Schulz iteration; steps of Liu et al. 2025, eq. 4."""

    def update(theta: Array, g: Array, t: int, state: State) -> Array:
        state["B"] = config.momentum * state.get("B", 0.0) + g
        x = g + config.momentum * state["B"] if config.nesterov else state["B"]
        x = x / np.linalg.norm(x)
        for _ in range(config.ns_steps):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return theta - config.learning_rate * (0.2 * math.sqrt(max(g.shape)) * x + decay * theta)

    return update


def schedule_free(config: AdamWConfig, decay: float) -> Update:
    """Defazio et al. 2024, algorithm 1, at a constant rate, so that c_{t+1} = 1/t; θ is y, and the state has x."""
    beta1, beta2 = config.betas

    def update(y: Array, g: Array, t: int, state: State) -> Array:
        x, z = state.get("x", y), state.get("z", y)
        state["v"] = beta2 * state.get("v", 0.0) + (1 - beta2) * g * g
        state["z"] = z - config.learning_rate * (g / (np.sqrt(state["v"] / (1 - beta2**t)) + config.eps) + decay * y)
        state["x"] = (1 - 1 / t) * x + state["z"] / t
        return (1 - beta1) * state["z"] + beta1 * state["x"]

    return update


def low_rank(config: object, decay: float, projection: Callable[[Array, int], Array]) -> Update:
    """GaLore (Zhao et al. 2024, algorithm 2), Fira (Chen et al. 2024, algorithm 1), APOLLO (Zhu et al. 2024, algorithm
    1). `projection`: of a gradient (long, short) and a step from 1, P (k, short).
    """
    name, scale, eps = config.name, config.scale, config.eps  # type: ignore[attr-defined]
    beta1, beta2 = config.betas  # type: ignore[attr-defined]

    def update(theta: Array, g: Array, t: int, state: State) -> Array:
        if g.shape[0] < g.shape[1]:
            return update(theta.T, g.T, t, state).T
        p = projection(g, t)
        r = g @ p.T
        m, v = adam_moments(r, state, beta1, beta2)
        corrected = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps / math.sqrt(1 - beta2**t))
        phi = np.linalg.norm(corrected, axis=1, keepdims=True) / (np.linalg.norm(r, axis=1, keepdims=True) + 1e-8)
        if name == "apollo_mini":
            phi = np.linalg.norm(corrected) / (np.linalg.norm(r) + 1e-8)
        back = scale * corrected @ p
        if name == "galore":
            move = back
        else:
            # The limiter compares lengths without the bias corrections, as the authors' code does.
            correction = math.sqrt(1 - beta2**t) / (1 - beta1**t)
            term = phi / correction * (g - scale * r @ p if name == "fira" else g)
            length, last = np.linalg.norm(term), state.get("length")
            if last is not None and length > 1.01 * last:
                term *= 1.01 * (last + 1e-8) / length
            state["length"] = np.linalg.norm(term)
            move = correction * term + back if name == "fira" else correction * term * math.sqrt(scale)
        return theta - config.learning_rate * (move + decay * theta)  # type: ignore[attr-defined]

    return update


def adamw_8bit(config: AdamWConfig, decay: float, signed: Array, unsigned: Array) -> Update:
    """Dettmers et al. 2022, sec. 2: moments kept as the nearest code, by blocks of 256 over their largest magnitude."""
    beta1, beta2 = config.betas

    def kept(values: Array, codes: Array) -> Array:
        flat = np.pad(values.ravel(), (0, -values.size % 256)).reshape(-1, 256)
        scale = np.abs(flat).max(axis=1, keepdims=True)
        shares = flat / np.where(scale > 0, scale, 1.0)
        nearest = codes[np.abs(shares[:, :, None] - codes).argmin(axis=2)]
        return (nearest * scale).ravel()[: values.size].reshape(values.shape)

    def update(theta: Array, g: Array, t: int, state: State) -> Array:
        m, v = adam_moments(g, state, beta1, beta2)
        state["m"], state["v"] = kept(m, signed), kept(v, unsigned)
        move = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + config.eps)
        return theta - config.learning_rate * (move + decay * theta)

    return update
