"""Meshes, sharding rules, and start-up and liveness of several processes."""
