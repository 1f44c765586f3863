"""Stochastic bilevel methods that never solve the inner problem: one machine, many estimators.

Reading order: ``problem`` (finite sums), ``oracle`` (derivatives of batches, counted),
``estimator`` (what a method is), ``inner_variable`` and ``machine`` (state and steps), then the
estimators: ``plain``, ``moving_average``, ``saga``, ``sarah``, ``nested``, ``penalty``,
``block_wise``, ``subspace`` and ``galerkin`` (both on ``basis``).
"""
