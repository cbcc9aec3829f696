"""Tools for those who work on mpisjax itself."""
