"""`micota options`: explains the options of one verb or section, or lists what there is."""

from micota_fast.common.importing import imported
from micota_fast.config.option_help import option_lines, sections
from micota_fast.config.suggestions import OTHER_VERBS, did_you_mean
from micota_fast.errors import InputError
from micota_fast.pipeline.stages import SET, VERBS


def print_options(name: str | None) -> None:
    """Print the options of a verb ("serve"), of a section of one ("train.chat"), or of a recipe's section ("claims").

    Args:
        name: None: print the verbs and their sections.

    Raises:
        InputError: there is no such verb or section.
    """
    classes = {verb: imported(row.options) for verb, row in VERBS.items() if SET in row.arguments and row.options}
    if name is None:
        print("`micota options NAME` explains the options of one of these; those of `run` are a recipe's:")
        for verb, cls in classes.items():
            print("  " + " ".join(f"{verb}.{part}" if part else verb for part in sections(cls)))
        return
    verb, _, section = name.partition(".")
    if verb not in classes:
        verb, section = "run", name
    parts = sections(classes[verb])
    chosen = {key: rows for key, rows in parts.items() if not section or f"{key}.".startswith(f"{section}.")}
    if not chosen:
        asked = did_you_mean(name, [*classes, *parts], "`micota options` lists them", OTHER_VERBS)
        raise InputError(f"{name}: no verb or section has this name; {asked}")
    print(*option_lines(chosen), sep="\n")
