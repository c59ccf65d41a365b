"""What autograd lacks: formulas of ops without a second derivative; which passes are ours."""
