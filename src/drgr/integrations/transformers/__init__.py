"""Robust, budgeted routing for the MoE models of Hugging Face transformers.

Reading order: ``sites`` (where a model routes), ``contract`` (what its router computes), ``rules``
(that rule, or a scorer in its place), ``experts`` (computing only what runs), ``attaching`` and
``attachment`` (the hooks that join them).
"""

from drgr.integrations.transformers.attaching import attach
from drgr.integrations.transformers.attachment import Attachment
from drgr.integrations.transformers.checkpointing import enable_checkpointing
from drgr.integrations.transformers.contract import RouterContract, find_contract
from drgr.integrations.transformers.experts import ExpertActivations
from drgr.integrations.transformers.sites import MoeSite, find_sites

__all__ = [
    "Attachment",
    "ExpertActivations",
    "MoeSite",
    "RouterContract",
    "attach",
    "enable_checkpointing",
    "find_contract",
    "find_sites",
]
