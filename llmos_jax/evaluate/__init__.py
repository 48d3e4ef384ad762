"""Runs a task's evaluations on a state and writes reports."""
