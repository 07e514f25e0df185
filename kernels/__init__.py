"""Triton kernels of the symmetric transport; importing this package imports no Triton.

One file per operation, three functions per operation: `_name_kernel` (Triton), `name` (checks, allocates, launches)
and `name_ref` (the same in plain torch). Nothing here imports moecomm. docs/design/symmetric.md tells how they fit
together.
"""
