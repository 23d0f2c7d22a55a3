"""The distribution `mambavision-triton`; its only top-level import name is `mambavision`.

The checkout keeps `kernels/` and `reference/` beside `mambavision/`. Installed, they live inside
it: top-level packages of those names would overwrite other people's files (`kernels` is on PyPI).
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

# The oldest releases that the tests pass with.
OLDEST_TORCH = "2.8"
OLDEST_TRITON = "3.4"

EXTRAS = {
    "bench": ["matplotlib>=3.8", "pytest-benchmark>=5", "timm>=1.0.31", "tqdm>=4.60"],
    "completion": ["argcomplete>=3"],
    "dense": [
        "matplotlib>=3.8",
        "pillow>=10",
        "pycocotools>=2.0.8",
        "safetensors>=0.4",
        "scikit-image>=0.25",
        "torchvision",
        "tqdm>=4.60",
        'transformers>=5.23; python_version >= "3.11"',
    ],
    "demo": ["matplotlib>=3.8", "scikit-learn>=1.4", "tqdm>=4.60"],
    "docs": ["furo>=2025.9", "myst-parser>=4", "sphinx>=8.1"],
    "tensorboard": ["tensorboard>=2.21"],
    "onnx": ["onnx>=1.22", "onnxscript>=0.7"],
    "timm": ["timm>=1.0.31"],
    "train": [
        "matplotlib>=3.8",
        "pyyaml>=6",
        "safetensors>=0.4",
        "scikit-learn>=1.4",
        "timm>=1.0.31",
        "tqdm>=4.60",
    ],
    "transformers": ["pillow>=10", 'transformers>=5.23; python_version >= "3.11"'],
    "wandb": ["wandb>=0.31"],
    "weights": ["huggingface_hub>=0.23", "safetensors>=0.4"],
    "test": ["hypothesis>=6.100", "numpy", "pytest>=8", "pytest-xdist>=3.5", "safetensors>=0.4"],
}
EXTRAS["dev"] = [*EXTRAS["demo"], *EXTRAS["train"], *EXTRAS["transformers"], *EXTRAS["weights"]]
EXTRAS["dev"] += [*EXTRAS["bench"], *EXTRAS["completion"], *EXTRAS["test"]]
EXTRAS["dev"] += [*EXTRAS["dense"], *EXTRAS["tensorboard"], *EXTRAS["wandb"]]
EXTRAS["dev"] += [*EXTRAS["docs"], *EXTRAS["onnx"], "onnxruntime>=1.20"]
EXTRAS["dev"] += ["build>=1", "mypy>=1.10", "ruff>=0.6"]

init = (ROOT / "mambavision" / "__init__.py").read_text(encoding="utf-8")
version = re.search(r'^__version__ = "(.+)"$', init, re.MULTILINE)
assert version is not None

setup(
    name="mambavision-triton",
    version=version.group(1),
    description="MambaVision backbones with a fused mixer in Triton, forward and backward",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=[
        *find_packages(include=["mambavision", "mambavision.*"]),
        "mambavision.kernels",
        "mambavision.reference",
    ],
    package_dir={"mambavision.kernels": "kernels", "mambavision.reference": "reference"},
    package_data={"mambavision": ["py.typed"]},
    zip_safe=False,
    python_requires=">=3.10,<3.14",
    install_requires=[
        f"torch>={OLDEST_TORCH}",
        "einops>=0.7",
        f'triton>={OLDEST_TRITON}; platform_system == "Linux"',
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["mambavision = mambavision.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
