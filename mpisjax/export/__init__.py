"""Trained networks for other programs: as a NIR graph of spiking neurons, or as a StableHLO program.

    python -m mpisjax.export --pretrained digits --format stablehlo --out digits.stablehlo
    python -m mpisjax.export --workdir runs/digits --format nir --out digits.nir

docs/export.md says what a file holds and how it is run without this package.
"""
