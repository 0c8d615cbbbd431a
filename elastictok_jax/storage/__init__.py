"""Files: atomic writes, safetensors, Orbax checkpoints."""
