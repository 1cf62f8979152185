"""The op. Imports go one way: call -> schema -> autograd -> by_reference; prepared -> schema.

`call` routes one call, `schema` registers the operators with PyTorch, `autograd` has the formulas of their gradients,
`by_reference` the derivatives that no kernel computes, and `prepared` what serves keys that are compressed once.
"""
