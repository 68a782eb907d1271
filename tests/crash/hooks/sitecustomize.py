"""Put first on PYTHONPATH by the explorer: every Python process of a run installs the hooks before it runs anything else."""

import os

if os.environ.get("TENURE_CRASH"):
    import hooked

    hooked.install(os.environ["TENURE_CRASH"])
