"""What a run keeps on disk, and how several processes share it: a run's folder, checkpoints, and going on from them.

Nothing here knows what is trained.
"""
