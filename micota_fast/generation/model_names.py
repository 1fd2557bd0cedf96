"""Whether a server's model is ours: servers elsewhere name the same model by other folders."""

import os
from pathlib import Path

from micota_fast.common.records import model_name
from micota_fast.model.folder import names_adapter


def is_model(served: str, wanted: str, checkpoint: Path) -> bool:
    """Return whether a server's model is the one that is wanted.

    That is the same folder or hub name; or, as another machine's folders lie elsewhere, the same last component.
    MODEL+ADAPTER is that name alone: a server of MODEL without the adapter is another.
    """
    theirs = Path(served)
    if names_adapter(wanted):
        return served == wanted
    if served == wanted or os.path.realpath(checkpoint) == os.path.realpath(served):
        return True
    # NAME/model is called NAME: of our own making, all of them end in `model`.
    last = theirs.parent.name if theirs.name == "model" else theirs.name
    return last in {model_name(wanted).rpartition("/")[2], checkpoint.name} - {"model"}
