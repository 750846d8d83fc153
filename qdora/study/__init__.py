"""Methods compared fairly: the same data and steps, each at its own best learning rate, paired by seed and sample."""
