"""The Hugging Face hub: whether it is there, and what went wrong when it was not."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tunelab.errors import ConfigError, MachineError, TunelabError, did_you_mean
from tunelab.models.builtin import BUILTIN_MODELS
from tunelab.models.sources import Source, what_works_offline

CONNECT_SECONDS = 5.0


def hub_is_reachable() -> bool:
    """Whether a connection to the hub opens within `CONNECT_SECONDS`.

    Asked once before a load: left alone, the hub's client retries every file for 23 seconds before it looks into its
    cache. Behind a proxy only the proxy can tell, so the answer is yes.
    """
    if constants.is_offline_mode():
        return False
    url = urlsplit(constants.ENDPOINT)
    if url.scheme in getproxies() or "all" in getproxies():
        return True
    try:
        address = (url.hostname or "", url.port or (443 if url.scheme == "https" else 80))
        socket.create_connection(address, timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def explain_hub_error(source: Source, error: Exception, key: str, offline: bool) -> TunelabError | None:
    """The one-line error for what only a hub model can suffer; None if `error` is about its contents.

    `offline`: the load was asked to use the hub's cache alone.
    """
    name, chain = source.name, _causes(error)
    guess = did_you_mean(name, BUILTIN_MODELS)
    if any(isinstance(cause, GatedRepoError) for cause in chain):
        return MachineError(f"{key}: {name} is gated; accept its terms on the hub, then log in with `hf auth login`")
    if any(isinstance(cause, RevisionNotFoundError) for cause in chain):
        return ConfigError(f"model.revision: {name} has no such revision on the hub")
    if any(isinstance(cause, RepositoryNotFoundError) for cause in chain):
        return ConfigError(f"{key}: there is no '{name}' on the hub, or it is private{guess}")
    if any(isinstance(cause, LocalEntryNotFoundError) for cause in chain) or (offline and isinstance(error, OSError)):
        why = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else f"{constants.ENDPOINT} cannot be reached"
        return MachineError(
            f"{key}: '{name}' is no built-in model or local folder{guess}, it is not in the hub cache, and {why}; "
            f"{what_works_offline()}"
        )
    if isinstance(error, OSError) and "safetensors" in str(error):
        return ConfigError(f"{key}: {name} has no safetensors weights, and pickled ones are never read")
    return None


def _causes(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain
