"""What the solvers need and give: gradients, tolerances, warm starts."""
