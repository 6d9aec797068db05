"""Tracking services: each is fed from the run's own files by a process of its own, and training never waits for it."""
