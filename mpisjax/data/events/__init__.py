"""Event cameras and spike trains: how recordings are read, and how they become frames."""
