"""Reads and writes files: atomic writes, safetensors and Orbax checkpoints."""
