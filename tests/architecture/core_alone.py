"""Run where only torch and numpy are installed: the core must work, the rest say why not."""

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

CORE = [
    "drgr",
    "drgr.numerics",
    "drgr.budgets",
    "drgr.budgets.flops",
    "drgr.budgets.static",
    "drgr.ambiguity",
    "drgr.bilevel",
    "drgr.routing",
    "drgr.models",
    "drgr.collectives",
]
EXTRAS = ["transformers", "pydantic", "typer", "plotly", "datasets", "tokenizers"]

present = [name for name in EXTRAS if importlib.util.find_spec(name)]
if present:
    sys.exit(f"this check needs an environment without {present}")
for name in CORE:
    importlib.import_module(name)

import torch  # noqa: E402

from drgr.ambiguity import KL, CVaR, JensenShannon, RobustLoss, worst_case  # noqa: E402
from drgr.bilevel import hypergradient  # noqa: E402
from drgr.budgets import Budget, TokenBudget, project, select, select_exactly  # noqa: E402
from drgr.models import GatedExperts, MoELayer  # noqa: E402
from drgr.routing import NoPrices, RoutingPolicy  # noqa: E402
from drgr.routing.selection import BudgetedSelector  # noqa: E402

selection = select_exactly(torch.rand(10, 4), TokenBudget(minimum=1, maximum=3, average=1.5))
assert int(selection.spend) == 15, selection
assert worst_case(torch.tensor([1.0, 2.0]), divergence=KL(), radius=0.1).value > 1.5
assert worst_case(torch.arange(1.0, 11.0), divergence=CVaR(0.25)).status.succeeded
assert RobustLoss(JensenShannon(), penalty=1.0)(torch.rand(5)).isfinite()
x = torch.ones(2)
found = hypergradient(lambda _x, y: y.sum(), lambda x, y: (y - x).square().sum(), x, x)
assert found.status.succeeded
assert torch.allclose(found.grads, x)
budget = Budget(torch.tensor([1.0, 2.0, 1.5, 1.0]), per_token=(1.0, 3.0), per_batch=20.0)
assert project(torch.rand(10, 4), budget).spend <= 20.001
assert select(torch.rand(10, 4), budget).spend <= 20
budget = TokenBudget(minimum=1, maximum=3, average=1.5)
policy = RoutingPolicy(selector=BudgetedSelector(budget), controller=NoPrices(4))
layer = MoELayer(GatedExperts(4, width=6, expert_width=5), policy=policy)
assert int(layer(torch.rand(10, 6))[1].selection.spend) == 15

command = Path(sys.executable).with_name("drgr")
result = subprocess.run([command, "--help"], capture_output=True, text=True, check=False)
assert result.returncode == 2, result
assert "pip install 'drgr[train]'" in result.stderr, result.stderr
sys.stdout.write("the core works with torch and numpy alone\n")
