"""The mathematics of the optimizers, written slowly: float64, one parameter at a time, plain loops.

Nothing here is shared with the techniques, so that the two can be held against each other. Start reading at
:mod:`~hina_optim.reference.adamw_family` or :mod:`~hina_optim.reference.came_family`: each has one family of optimizers
on a page.
"""
