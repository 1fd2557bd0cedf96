"""`python -m micota_fast`: the command line."""

import sys

from micota_fast.cli import main

sys.exit(main())
