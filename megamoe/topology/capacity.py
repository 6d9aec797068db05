"""How many tokens an expert takes. No torch."""


def expert_capacity(num_tokens: int, num_experts: int, top_k: int, capacity_factor: float) -> int:
    """Tokens one expert takes from one rank's micro-batch: top_k * ceil(capacity_factor * S / E).

    With factor 1 and two choices this is the 2 * ceil(S / E) of Artetxe et al. (2021), "C = 2".
    """
    # Integer arithmetic where the factor is whole: 0.1 + 0.2 must not add a slot.
    if float(capacity_factor).is_integer():
        return top_k * -(-num_tokens * int(capacity_factor) // num_experts)
    scaled = capacity_factor * num_tokens / num_experts
    nearest = round(scaled)
    return top_k * (nearest if abs(scaled - nearest) < 1e-9 * max(1.0, scaled) else int(scaled) + 1)
