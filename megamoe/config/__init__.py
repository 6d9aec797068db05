"""The configuration of a run: its schema, where it comes from, what is checked, and the presets. No torch."""

from megamoe.config.loading import dump_yaml, load_config
from megamoe.config.schema import Config
from megamoe.config.validation import validate, validate_for_training

__all__ = ["Config", "dump_yaml", "load_config", "validate", "validate_for_training"]
