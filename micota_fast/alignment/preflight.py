"""What a measurement would fail of later: found at once, before torch is imported, which can take many seconds."""

from micota_fast.common.files import require_folder
from micota_fast.config.evaluation import AlignConfig
from micota_fast.model.folder import require_checkpoint
from micota_fast.sources.rows import require_readable


def check(config: AlignConfig) -> None:
    """Check that the model, the corpora and the packages that read them are there.

    Raises:
        InputError: one is not.
    """
    require_folder(config.out)
    require_checkpoint(config.model)
    for source in filter(None, (*config.corpora.values(), config.student_answers)):
        require_readable(source)
