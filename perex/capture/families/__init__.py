"""Families of operators that carry the batch axis in the same way; importing this fills their table.

Each handler gets an `Operation` with at least one argument that has a batch axis, and returns the label of the
result: an `Axis`, or a `Lost` with the reason. A result that perex cannot be sure about is `Lost`. To add an operator,
add its name to the family that treats it rightly, or write a handler beside its kin.
"""

from perex.capture.families import elementwise, indexing, layers, losses, products, trials, views

__all__ = ["elementwise", "indexing", "layers", "losses", "products", "trials", "views"]
