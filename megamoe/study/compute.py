"""What a token costs to train, as the paper counts it. No torch."""

from megamoe.config.schema import Config
from megamoe.topology.flops import layer_forward_flops_per_token
from megamoe.topology.parameters import dimensions, experts_by_layer

PAPER_VOCAB_SIZE = 50_000  # nominal: the size that the paper's tables count with


def paper_flops_per_token(config: Config, *, vocab_size: int | None = PAPER_VOCAB_SIZE) -> float:
    """Training FLOPs of one token by the formula behind the paper's ZFLOPs (Narayanan et al. 2021, eq. 3).

    Layers count four times their forward pass, whether this run recomputes or not: once forward, once again, twice
    backward; logits three times; all s x s scores of attention; experts as many as a token is sent to; no router, norm
    or bias. For the paper's shapes that is 96 L h^2 (1 + s / 6h + V / 16Lh) + 32 L h^2 with experts. vocab_size: V;
    None: the model's own, padding left out.
    """
    sizes = dimensions(config.model, config.moe)
    routers = 2.0 * sizes.hidden * sum(experts_by_layer(config.model, config.moe).values())
    layers = layer_forward_flops_per_token(config, attention="full") - routers
    logits = 2.0 * sizes.hidden * (vocab_size or config.model.vocab_size)
    return 4.0 * layers + 3.0 * logits
