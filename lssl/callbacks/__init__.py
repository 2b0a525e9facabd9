"""Callbacks: what a run shows of itself."""
