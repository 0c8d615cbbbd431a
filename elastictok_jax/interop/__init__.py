"""Weights in and out: safetensors files and published ElasticTok checkpoints."""
