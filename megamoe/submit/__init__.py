"""A run as a job of SLURM: its settings, the checks before it is submitted, its script, the calls of sbatch and squeue.

The script is `job.sbatch` beside this file with the job's own lines in it: what it does can be read there.
"""
