"""Package metadata. Tool settings (ruff, mypy, pytest) are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
_version = re.search(r'^__version__ = "([^"]+)"', (ROOT / "megatron_bdpo" / "__init__.py").read_text("utf-8"), re.M)
if _version is None:
    raise RuntimeError('megatron_bdpo/__init__.py has no line of the form __version__ = "..."')
_readme = ROOT / "README.md"

# Only what the package and the parts of Megatron it drives need. No upper bound on torch: the user's build of it
# (a container's, a cluster's) has to stay as it is, and pip keeps an installed torch that satisfies the lower bound.
# The bounds of torch and megatron-core are those of megatron_bdpo/platform/versions.py, which says why.
#
# Deliberately absent:
# - `apex`: that name on PyPI is an unrelated package. NVIDIA Apex is installed from its source, and Megatron falls
#   back to Transformer Engine or torch without it.
# - `triton`: megatron-core 0.19.2 imports it without declaring it. CUDA builds of torch bring the one they were built
#   for, and another would break those that ship their own. The `cpu` extra is for torch builds that bring none.
# - flask-restful, accelerate, omegaconf, tiktoken, wandb, transformers of megatron-core's extra `training`: neither
#   `import megatron.training.training` nor pretraining on SentencePiece tokens loads them.
INSTALL_REQUIRES = [
    "torch>=2.8.0a0",
    "megatron-core>=0.19.2,<0.20",  # the first with megatron.training in the wheel; internals move between minors
    "numpy",
    "packaging",
    "datasets",
    "sentencepiece",
    "safetensors",  # reference values on disk
    "tqdm",
    "click>=8.2",  # the program megatron-bdpo
    "pyyaml",  # recipes
    "rich>=13",  # tables in a terminal; pure Python, and transformers brings it along
    "jinja2",  # the page of a report; torch brings it along
    "psutil",  # megatron-core imports it if it can, and fails on saving a checkpoint if it cannot
]

HF = ["transformers"]
REPORT = ["matplotlib"]
# What examples/smollm2 reads its model with, a GGUF file, for which transformers wants accelerate.
SMOLLM2 = [*HF, *REPORT, "gguf", "accelerate"]

EXTRAS_REQUIRE = {
    # The Transformer Engine build that this release of megatron-core names.
    "gpu": ["megatron-core[te]>=0.19.2,<0.20"],
    # Hugging Face tokenizers and chat templates; import and export of Hugging Face checkpoints.
    "hf": HF,
    "logging": ["tensorboard", "wandb"],
    # The pictures of `megatron-bdpo report` and of examples/ablation.py.
    "report": REPORT,
    "smollm2": SMOLLM2,
    # `make docs`.
    "docs": ["mkdocs-material"],
    # For a torch build without CUDA, which does not bring triton.
    "cpu": ["triton; sys_platform == 'linux'"],
    # The coverage-guided engine of `python -m tests.reliability.fuzz`; Hypothesis is the other.
    "fuzz": ["atheris>=3"],
    # Linters are held to one line of releases, so that a new rule does not turn an unchanged commit red.
    "test": [
        *SMOLLM2,
        "build",  # tests/first_hour builds the wheel,
        "setuptools>=77",  # with the environment's own backend
        "hypothesis",
        "jsonschema",  # recipes are checked by their schema
        "mypy>=2.4,<3",
        "peft",
        "pytest>=8",
        "pytest-xdist",  # make pytest runs tests/unit on all cores
        "ruff>=0.17,<0.18",
        "tensorboard",
        "tiktoken",
        "trl",
    ],
}

setup(
    name="megatron_bdpo",
    version=_version.group(1),
    description="Balanced DPO and its sister preference losses as a plugin for NVIDIA Megatron",
    long_description=_readme.read_text("utf-8") if _readme.exists() else "",
    long_description_content_type="text/markdown",
    project_urls={"Method": "https://arxiv.org/abs/2603.22829"},
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.12",
    packages=find_packages(include=["megatron_bdpo", "megatron_bdpo.*"]),
    package_data={"megatron_bdpo": ["training/flags/flag_table.json", "py.typed", "report/*.html"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={"console_scripts": ["megatron-bdpo = megatron_bdpo.cli.main:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
