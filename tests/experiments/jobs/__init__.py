"""Small programs for tests of whole runs."""
