"""How ranks come to be: what a rank reads from its environment, and ranks started on this machine.

Nothing here imports torch: the launcher of a run stays a light process.
"""
