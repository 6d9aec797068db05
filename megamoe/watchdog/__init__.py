"""Which rank stopped, and where: heartbeats between ranks beside the process group, a verdict, stacks. No torch."""
