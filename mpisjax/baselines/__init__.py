"""What the implicit method is compared with, on the same transition: training through time."""
