"""Meshes, and which logical axis lies on which mesh axis."""
