"""What a trained network does: convergence, spectral radius, spikes and energy, gradients, a report."""
