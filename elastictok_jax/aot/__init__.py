"""Ahead-of-time compilation for TPUs and GPUs that are not attached, and what it costs."""
