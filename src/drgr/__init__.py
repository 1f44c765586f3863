"""Distributionally-robust gradient routing for Mixture-of-Experts models.

Training for the worst domain, inside an exact compute budget.

Reading order: ``budgets`` (what may run), ``routing`` (who runs it), ``ambiguity`` (which domain
counts), ``integrations`` (how it attaches to a model), ``training`` (the loop that joins them).
"""

__version__ = "0.1.0"
