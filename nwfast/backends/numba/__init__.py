"""The Numba backend: its two methods, `dense` and `linear`, and `choose`, which takes the faster.

Importing this package loads nothing: `nwfast.backends.load` imports what a call needs.
"""
