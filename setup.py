"""Packaging of megamoe: `pip install -e . -c constraints.txt` gives the versions that were tested together."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "megamoe" / "__init__.py").read_text(encoding="utf-8"))[1]
README = ROOT / "README.md"

setup(
    name="megamoe",
    version=VERSION,
    description="Training mixture-of-experts language models, from a laptop to 1.1T parameters",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    packages=find_packages(include=["megamoe", "megamoe.*"]),
    package_data={
        "megamoe.plan": ["*.yaml", "clusters/*.yaml"],
        "megamoe.priming": ["tasks/*.yaml"],
        "megamoe.report": ["*.css", "*.js"],
        "megamoe.submit": ["job.sbatch"],
    },
    python_requires=">=3.10,<3.13",
    install_requires=[
        "torch>=2.6",
        "deepspeed>=0.19.8",  # unmanaged gradient accumulation
        "megatron-core>=0.16.1,<0.17",  # 0.17 needs Python 3.12
        "numpy>=1.26",
        "pydantic>=2.9",
        "pyyaml>=6.0",
        "safetensors>=0.4",
        "sentencepiece>=0.2",
        "tokenizers>=0.20",
        "wandb>=0.19",
        "xxhash>=3.4",
        "zstandard>=0.22",
    ],
    extras_require={
        "tensorboard": ["tensorboard>=2.15"],  # for monitor.tensorboard
        "hf": ["transformers>=5.0"],  # to verify conversions, and for `import megamoe.hf`
        "eval": ["lm_eval[hf]>=0.4.9"],  # to score an exported model on what `megamoe prime --write-lm-eval` writes
        "report": ["matplotlib>=3.8"],  # for the PNGs of `megamoe report`; its page needs nothing
        "dev": [
            "hypothesis>=6.100",
            "lm_eval[hf]>=0.4.9",
            "matplotlib>=3.8",
            "mypy>=1.10",
            "pytest>=8.0",
            "pytest-timeout>=2.3",
            "ruff>=0.6",
            "tensorboard>=2.15",
            "transformers>=5.0",
        ],
    },
    entry_points={"console_scripts": ["megamoe=megamoe.cli:main"]},
)
