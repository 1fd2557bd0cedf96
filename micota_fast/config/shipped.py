"""The recipes that the package ships."""

import os
from pathlib import Path

from micota_fast.config.suggestions import did_you_mean
from micota_fast.errors import InputError

RECIPES = Path(__file__).parent.parent / "recipes"


def recipe_names() -> list[str]:
    """Return what the shipped recipes are called, sorted."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def recipe_file(name: str) -> Path:
    """Return the file of this name or, if there is none, that of the shipped recipe.

    Raises:
        InputError: there is neither; names the shipped recipes.
    """
    shipped = RECIPES / f"{name}.yaml"
    if os.path.lexists(name):
        return shipped if shipped.exists() and not Path(name).is_file() else Path(name)
    if not shipped.exists():
        known = recipe_names()
        asked = did_you_mean(Path(name).stem, known, f"shipped: {', '.join(known)}")
        raise InputError(f"{name}: no such file, and no shipped recipe; {asked}")
    return shipped
