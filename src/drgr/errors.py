"""Errors that a caller can react to.

Bad arguments of a function raise ``ValueError`` or ``TypeError``. The classes here are for
conditions that a program may want to catch by name. Messages name the setting, its value, and the
remedy.
"""


class DrgrError(Exception):
    """Base of every error that this package defines."""


class ConfigError(DrgrError):
    """A run configuration cannot be used: unknown key, wrong value, or two settings that clash."""


class DataError(DrgrError):
    """A corpus, a domain or one of its files cannot be used."""


class InfeasibleBudgetError(DrgrError, ValueError):
    """No routing plan satisfies the budget."""


class UnknownRouterError(DrgrError):
    """A model's MoE blocks do not follow a router contract that this package can verify."""


class CheckpointError(DrgrError):
    """A checkpoint is truncated, belongs to another configuration, or could not be written."""


class NonFiniteLossError(DrgrError, ValueError):
    """A loss, or its gradient, is not a finite number."""
