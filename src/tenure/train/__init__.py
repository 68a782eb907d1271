"""Training in small bounded workers: events, a shared store, programs, and the one function that plays three roles.

Knows nothing of leases or brokers: the means to start a role (`invoke`), the deadline and the clock are handed in.
This file imports nothing, so that a worker (`python -m tenure.train.worker`) loads the standard library and NumPy only.
"""
