"""The Hessian minus the generalized Gauss-Newton: second derivatives of nodes and of a parameter's own ops."""
