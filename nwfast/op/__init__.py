"""The op: its operators, their registration with PyTorch, and its derivatives."""
