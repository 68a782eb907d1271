"""Whole runs as users have them: without root, in odd places."""
