"""What outlives a process of a run: its folder, checkpoints and how it goes on from them, several processes, signals.

Nothing here knows what is trained.
"""
