"""Starts the processes of a run: what each launcher runs, and how all of them end."""
