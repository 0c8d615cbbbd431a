"""Pretrained weights of other people's networks: see README.md here for whose they are."""
