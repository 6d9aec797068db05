"""What a run needs before it runs: bytes by rank, collectives by link, time by kind. No torch."""
