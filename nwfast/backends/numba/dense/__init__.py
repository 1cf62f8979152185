"""All pairs of queries and keys: the dense method of the Numba backend."""
