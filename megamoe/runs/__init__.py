"""What the folder of a run holds, written and read without torch: metrics, events, attempts, failures."""
