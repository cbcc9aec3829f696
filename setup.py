"""What pyproject.toml cannot say: the config files lie beside the package, and are installed in it."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["mpisjax", "mpisjax.*"]), "mpisjax.configs"],
    package_dir={"mpisjax.configs": "configs"},
)
