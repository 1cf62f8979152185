"""The Triton backend: see `call`. Importing this package loads nothing."""
