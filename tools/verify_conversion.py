#!/usr/bin/env python3
"""Compare the logits of a checkpoint and a Hugging Face folder: `megamoe convert verify`. See docs/convert.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from megamoe.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "verify", *sys.argv[1:]]))
