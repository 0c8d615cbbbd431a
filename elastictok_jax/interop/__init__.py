"""Converts published ElasticTok checkpoints to ours."""
