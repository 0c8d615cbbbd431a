"""From files to batches: media, sources, packing, pipeline."""
