"""How tokens are drawn. No torch."""

from dataclasses import dataclass

from megamoe.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """temperature 0: the likeliest token. top_k: of so many likeliest ones (0: of all). top_p: of the fewest whose
    probabilities sum to at least so much (1: of all; Holtzman et al., 2020, arXiv 1904.09751)."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature {self.temperature} is impossible: use 0 (the likeliest token) or more")
        if self.top_k < 0:
            raise ConfigError(f"top-k {self.top_k} is impossible: use 1 or more, or 0 for all tokens")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top-p {self.top_p} is impossible: use more than 0 and at most 1")
        if self.temperature == 0.0 and (self.top_k or self.top_p < 1.0):
            name = "top-k" if self.top_k else "top-p"
            raise ConfigError(f"{name} says how tokens are drawn, and temperature 0 draws none: give one above 0")
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed {self.seed} is impossible: use a whole number from 0 to 2**64 - 1")
