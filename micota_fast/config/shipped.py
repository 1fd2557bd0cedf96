"""The recipes that the package ships."""

from pathlib import Path

RECIPES = Path(__file__).parent.parent / "recipes"


def recipe_names() -> list[str]:
    """Return what the shipped recipes are called, sorted."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def recipe_file(name: str) -> Path:
    """Return the file of this name or, if there is none, that of the shipped recipe; neither need exist."""
    shipped = RECIPES / f"{name}.yaml"
    return shipped if not Path(name).is_file() and shipped.exists() else Path(name)
