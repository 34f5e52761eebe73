"""A training run: its options, folder, record, loop, checkpoints, metrics and report."""
