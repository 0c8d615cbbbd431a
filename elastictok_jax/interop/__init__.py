"""Converts published ElasticTok checkpoints to our format."""
