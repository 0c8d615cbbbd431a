"""The training run: state, optimizer, step, loop, checkpoints, metrics."""
