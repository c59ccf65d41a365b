"""Matrices and averages that know nothing of networks: factors, inverses, means, collectives."""
