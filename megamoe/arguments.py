"""Arguments that several commands take."""

import argparse


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """`source` and `overrides`: what `megamoe.config.loading.load_config` is given."""
    source_help = "a preset's name (see `megamoe presets`) or a YAML file"
    parser.add_argument("source", metavar="CONFIG|PRESET", help=source_help)
    override_help = "settings that win over it; values are YAML"
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help=override_help)


def positive(text: str) -> int:
    """For `type=`: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'"{text}" is not a whole number of at least 1')
    return int(text)
