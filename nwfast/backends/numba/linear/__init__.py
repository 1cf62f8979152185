"""The linear method of the Numba backend, a fast Gauss transform; its public name is "fgt"."""
