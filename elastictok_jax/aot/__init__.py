"""Compiles programs ahead of time for TPUs and GPUs that are not attached, and estimates costs."""
