"""Tests of serve: engines, data plane, doors, client, load."""
