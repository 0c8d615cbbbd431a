"""Meshes, sharding rules, and the start and liveness of several processes."""
