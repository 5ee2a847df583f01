"""The rules that a search can go by, one registry: `rule: {kind: asha, eta: 3}`."""

from pipelines.lib.search.rules.greedy import Greedy
from pipelines.lib.search.rules.halving import Asha, Median
from pipelines.lib.search.rules.listed import Grid, Random, Sweep
from pipelines.lib.search.rules.population import Pbt
from pipelines.lib.search.rules.tpe import Tpe
from pipelines.lib.search.trials import Rule

__all__ = ["Asha", "Greedy", "Grid", "Median", "Pbt", "Random", "Rule", "Sweep", "Tpe"]

Rule.kinds = {
    "sweep": Sweep,
    "grid": Grid,
    "random": Random,
    "greedy": Greedy,
    "asha": Asha,
    "median": Median,
    "pbt": Pbt,
    "tpe": Tpe,
}
