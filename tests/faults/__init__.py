"""The fault matrix: faults in real processes, what came of them as JSON, and the page that is rendered from it. `make test-faults` runs it."""
