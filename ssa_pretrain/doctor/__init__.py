"""The doctor: what is wrong with a machine, or with the machines of a job, before a run finds out."""
