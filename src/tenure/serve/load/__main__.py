"""`python -m tenure.serve.load SPEC.json`: one load application (see `closed`)."""

import sys

from tenure.serve.load.closed import main

sys.exit(main(sys.argv[1:]))
