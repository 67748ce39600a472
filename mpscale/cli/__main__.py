"""``python -m mpscale.cli`` is the ``mpscale`` command."""

import sys

from mpscale.cli import main

sys.exit(main())
