"""``python -m mpscale`` is the ``mpscale`` command."""

import sys

from mpscale.cli import main

sys.exit(main())
