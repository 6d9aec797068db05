"""Ranks and parameters as arithmetic: the grid and its foldings, pipeline stages, the parameter table. No torch."""
