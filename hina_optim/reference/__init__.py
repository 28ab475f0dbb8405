"""The mathematics of the optimizers, written slowly: float64, one parameter at a time, plain loops.

Nothing here is shared with the techniques, so that the two can be held against each other. Start reading at
:class:`~hina_optim.reference.hina_adaptive.ReferenceHinaAdaptive`.
"""
