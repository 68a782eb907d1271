"""Runs of job files: measure, recommend, lease, observe, report. Joins the rooms below; the edges only show what it does."""
