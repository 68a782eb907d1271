"""The control of the runtime contract: first on PYTHONPATH, it gives each interpreter a runtime without memory limits."""

from tenure.runtimes.confine import Confinement

Confinement._write_memory = lambda self, size_bytes: None
