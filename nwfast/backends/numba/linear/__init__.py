"""The fast Gauss transform: the linear-time method of the Numba backend."""
