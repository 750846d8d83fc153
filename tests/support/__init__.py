"""What several tests need: models, runs, faults, processes."""
