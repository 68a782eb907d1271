"""Programs that run in the peers' environments, not in ours."""
