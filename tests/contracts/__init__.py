"""Behaviour that every implementation of one contract shows."""
