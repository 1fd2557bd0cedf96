"""The table of verbs: what stands in it exists, and fits together."""

import inspect

import pytest

from micota_fast.common.importing import imported
from micota_fast.pipeline.stages import VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_the_function_of_a_verb_takes_what_its_arguments_give(verb: str) -> None:
    row = VERBS[verb]
    keywords = {
        argument.keywords.get("dest") or argument.names[0].strip("-").replace("-", "_") for argument in row.arguments
    }
    if "recipe" in keywords:
        keywords = keywords - {"overrides", "out"} | {"path", "folder"}
    elif "overrides" in keywords:
        keywords = keywords - {"overrides"} | {"config"}
    elif row.options is not None:
        inspect.signature(imported(row.options)).bind(**dict.fromkeys(keywords))
        keywords = {"config"}
    inspect.signature(imported(row.function)).bind(**dict.fromkeys(keywords))
    if row.cost is not None:
        inspect.signature(imported(row.cost)).bind("planner", "stage")
