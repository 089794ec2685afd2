"""Renders one launch spec (spec.py) for each kind of cluster: shell commands, Slurm, Docker, Kubernetes, SkyPilot."""
