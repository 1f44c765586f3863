"""Complete run configurations, one function each.

A recipe is any function without arguments that returns a :class:`drgr.training.RunConfig`; the
command line also takes ``package.module:function``.
"""

from drgr.recipes.baselines import doge, doremi, drgr, drgr_bilevel, drmoet, group_dro
from drgr.recipes.drgr_8 import demo, erm, qwen3_moe, uniform

RECIPES = {
    "demo": demo,
    "drgr": drgr,
    "drgr-bilevel": drgr_bilevel,
    "erm": erm,
    "uniform": uniform,
    "group-dro": group_dro,
    "doremi": doremi,
    "doge": doge,
    "drmoet": drmoet,
    "qwen3-moe": qwen3_moe,
}
"""Recipes by the name that the command line takes."""

__all__ = [
    "RECIPES",
    "demo",
    "doge",
    "doremi",
    "drgr",
    "drgr_bilevel",
    "drmoet",
    "erm",
    "group_dro",
    "qwen3_moe",
    "uniform",
]
