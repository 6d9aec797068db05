"""What the engines warn of on every start, and nobody can mend. To be silenced before they are imported."""

import warnings


def silence() -> None:
    """Let those warnings pass in silence in this process; all others are shown."""
    # They warn about every optional CUDA package that a CPU run cannot have.
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*")
    warnings.filterwarnings("ignore", message=".*full scope is deprecated.*")
    # Megatron-core still calls collectives by names that torch is renaming.
    warnings.filterwarnings("ignore", message=".*torch.distributed.*is deprecated.*", category=FutureWarning)
