"""Model merging: mergekit's configuration files, reproducible masks, one tensor in memory at a time.

`micota_fast.merge(config)` calls `micota_fast.merge.merge.merge`.
"""

from micota_fast.common.importing import make_callable

make_callable(__name__, f"{__name__}.merge:merge")
