"""Perceptual networks (LPIPS, I3D) with their pinned weights."""
