"""Training of any task: state, optimizer, step, loop and metrics."""
