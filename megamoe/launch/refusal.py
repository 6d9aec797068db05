"""What a command refuses before its ranks have met: said once, or once a node."""

import sys

from megamoe.errors import MegamoeError
from megamoe.launch.environment import RankEnvironment, node_name


def refused(error: MegamoeError, environment: RankEnvironment) -> int:
    """What a process that is a rank found before it met the others: raises it on the first rank, else its exit code.

    Mostly every rank finds the same, and one says it. What one node alone finds, a file that is missing there, would be
    said by nobody: so the first rank of every other node says it with the node's name.
    """
    if environment.rank == 0:
        raise error
    if environment.local_rank == 0:
        print(f"megamoe: error on node {node_name()}: {error}", file=sys.stderr)
    return error.exit_code
