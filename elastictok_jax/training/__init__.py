"""Training runs: state, optimizer, step, loop, metrics."""
