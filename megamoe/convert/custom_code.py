"""The two files that let transformers run the megamoe architecture without megamoe: read as bytes, never imported."""

from pathlib import Path

AUTO_MAP = {
    "AutoConfig": "configuration_megamoe.MegamoeConfig",
    "AutoModel": "modeling_megamoe.MegamoeModel",
    "AutoModelForCausalLM": "modeling_megamoe.MegamoeForCausalLM",
    "AutoModelForSequenceClassification": "modeling_megamoe.MegamoeForSequenceClassification",
}
_FILES = ("configuration_megamoe.py", "modeling_megamoe.py")


def custom_files() -> dict[str, bytes]:
    """File name -> content, to lie beside a config.json whose "auto_map" is `AUTO_MAP`."""
    folder = Path(__file__).parents[1] / "hf"
    return {name: (folder / name).read_bytes() for name in _FILES}
