"""The Hessian minus the GGN: second derivatives of nodes and of a parameter's own ops."""
