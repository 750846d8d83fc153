"""What fits on which machine, before a weight is read: `preflight` for a run, `run` for `qdora plan`."""
