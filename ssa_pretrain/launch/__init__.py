"""Starts the processes of a run: each launcher's command, its supervision, and how the processes end."""
