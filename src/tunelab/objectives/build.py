"""From `method` of a recipe to an objective. A new method is a new file and one line here."""

from __future__ import annotations

from tunelab.config import DPOConfig, SFTConfig
from tunelab.objectives.pairwise import build_preference_objective
from tunelab.objectives.protocol import Objective
from tunelab.objectives.sft import SFTObjective


def build_objective(method: SFTConfig | DPOConfig) -> Objective:
    """The objective that `method` names."""
    match method:
        case SFTConfig():
            return SFTObjective()
        case DPOConfig():
            return build_preference_objective(method)
