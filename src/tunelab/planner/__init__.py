"""What a recipe would take before anything is paid, and the nearest changes that fit: `tunelab plan`, `--dry-run`.

plan_recipe(recipe, progress, memory_bytes=..., device=..., records=...)
"""

from tunelab.planner.plan import plan_recipe
from tunelab.planner.sizes import parse_size

__all__ = ["parse_size", "plan_recipe"]
