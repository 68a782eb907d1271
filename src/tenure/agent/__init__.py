"""The agent: one process per node that starts shims on the broker's orders and finds them after its own death."""
