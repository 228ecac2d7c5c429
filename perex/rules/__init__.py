"""Rules: what the per-example gradient of a parameter looks like behind one operator.

`perex.rules.registry` has the decorators; every other file here is one family of layers.
"""
