"""Training: groups, engine, step, loop, hooks, checkpoint. Importing the package itself loads nothing heavy."""
