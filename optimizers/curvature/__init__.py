"""Curvatures that a step can use: Kronecker factors, their eigenbasis, diagonals."""
