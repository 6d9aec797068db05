"""What a plan takes for granted, as a list that its report prints: figures of the cluster, and what is set in code."""

from dataclasses import dataclass

from megamoe.plan import compute, lifetime, network, timing
from megamoe.plan.cluster import Cluster, figures


@dataclass(frozen=True)
class Assumption:
    """One number, what it is, and where it is from."""

    name: str
    value: float
    source: str


def assumptions(cluster: Cluster) -> tuple[Assumption, ...]:
    """Those of the cluster first, each with its file's source; then those that are the same for every plan."""
    of_cluster = (
        Assumption(key, value, cluster.sources.get(key, f"set in the file of cluster {cluster.name}"))
        for key, value in figures(cluster).items()
        if value is not None
    )
    return (*of_cluster, *_OF_EVERY_PLAN)


_NCCL = "NCCL 2.18, src/graph/tuning.cc"
_OF_EVERY_PLAN = (
    Assumption("seconds to start a collective", network.BASE_LATENCY_SECONDS, f"{_NCCL}, baseLat"),
    Assumption("bandwidth of a tree, as a share of a ring's", network.TREE_BANDWIDTH_SHARE, _NCCL),
    Assumption("messages of an all-to-all under way at once", network.MESSAGES_AT_ONCE,
               "half of NCCL_MAX_WORK_ELEMENTS_P2P"),
    Assumption("FLOPs of attention backward, of its forward pass", compute.ATTENTION_BACKWARD,
               "FlashAttention (arXiv 2205.14135): scores again, and four products"),
    Assumption("passes of unfused attention over its scores", compute.SCORE_PASSES, "counted in the operations"),
    Assumption("bytes moved for an entry of a one-hot mask", compute.MASK_BYTES,
               "counted in DeepSpeed 0.19.3's gate: three fp32 masks, one of booleans, two of 16 bits"),
    Assumption("overheads of a layer that routing and dispatch add", compute.MOE_OVERHEADS,
               "assumption: about twice as many operations as attention and a dense FFN start"),
    Assumption("bytes that the optimizer moves for an element", timing.UPDATE_BYTES,
               "counted: gradient twice, master and moments in and out, the weight out"),
    Assumption("seconds from a failure to the next step, loading apart", lifetime.RESTART_SECONDS,
               "Kokolis et al. 2024 (arXiv 2410.21680): 5 to 20 minutes"),
)  # fmt: skip
