"""What a model is known by where its checkpoint is not the same file twice, as one that is imported anew. No torch."""

import hashlib
import json

from megamoe.checkpoint.manifest import Manifest


def model_digest(manifest: Manifest) -> str:
    """Of the model's settings and weights: the same wherever, and whenever, the checkpoint was written."""
    weights = [entry.content for entry in manifest.tensors.values() if entry.kind in ("weight", "balance_bias")]
    settings = {key: manifest.config[key] for key in ("model", "moe")}
    return hashlib.sha256(json.dumps([settings, weights], sort_keys=True, default=str).encode()).hexdigest()[:32]
