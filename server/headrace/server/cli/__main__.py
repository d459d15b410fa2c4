"""`python -m headrace.server.cli`: the `headrace` command without its script; the benches start servers so."""

import sys

from headrace.server.cli import main

sys.exit(main())
