"""Are the nodes of a job good? Measured before training by one process a rank, which name the bad nodes.

`findings` judges what was measured, `local_checks` and `links` know no torch either; `measure`, `meeting` and `run` do.
"""
