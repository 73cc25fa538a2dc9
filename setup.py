"""Installs jaxrl_sd; `pip install -e .[test]` adds what the tests need."""

from setuptools import find_packages, setup

setup(
    name="jaxrl_sd",
    version="0.1.0",
    description="Self-distillation for reinforcement learning with verifiable rewards, in JAX",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["jaxrl_sd*"]),
    package_data={"jaxrl_sd": ["assets/**/*"]},
    install_requires=[
        "absl-py>=2.5",
        "flax>=0.12.8",
        "grain>=0.2.18",
        "jax>=0.10.2",
        "jinja2>=3.1",
        "math-verify>=0.9.0",
        "matplotlib>=3.11",
        "ml_collections>=1.1",
        "numpy>=2.4",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "safetensors>=0.8",
        "sympy>=1.14",
        "tensorboardX>=2.6.5",
        "tqdm>=4.70",
        "transformers>=5.23",
    ],
    extras_require={
        "data": ["datasets>=5.2"],  # Parquet files, folders and data sets of the hub
        "tpu_aot": ["jax[tpu]>=0.10.2"],  # its libtpu compiles for TPUs on machines without one
        "test": [
            "datasets>=5.2",
            "ipykernel>=7.4",  # runs the notebooks, with nbclient
            "nbclient>=0.11",
            "peft>=0.21",
            "pytest>=9.2",
            "pytest-xdist>=3.8",
            "ruff>=0.14",
            "torch>=2.13",
        ],
    },
)
