"""Offline operations on experts and weights, in bounded memory: from checkpoints to the folder of a new run."""
