"""Proof that a converted model is the same function: logits of both sides on the same token ids."""
