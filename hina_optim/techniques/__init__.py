"""Techniques: one idea of one paper a file, as pure functions on batches of tensors. :mod:`.base` has their contract.

This package imports none of them: an optimizer imports the ones that it lists.
"""
