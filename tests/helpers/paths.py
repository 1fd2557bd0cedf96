"""Where things are in the checkout."""

from pathlib import Path

HELPERS = Path(__file__).parent
ROOT = HELPERS.parents[1]
RECIPES = ROOT / "micota_fast" / "recipes"
DATA = ROOT.parent / "shared" / "data"  # public benchmarks, outside the repository: tests skip without them
CASES = ROOT.parent / "shared" / "cases"  # small inputs with their right outcome, likewise
