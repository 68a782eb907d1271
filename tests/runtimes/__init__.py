"""The runtimes of this machine."""
