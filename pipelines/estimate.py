"""Say what a stage would take before it runs: tokens, memory, disk, time and money.

python -m pipelines.estimate train gpt_debug data=data/demo out=runs/a
python -m pipelines.estimate tokenize source=book.txt price_per_hour=0.4
python -m pipelines.estimate train gpt_124m data=data/demo out=runs/b machine=aws-g5.xlarge

The same as `python -m pipelines.STAGE ... --estimate`. A few seconds of the work are measured on this machine; nothing
is written, tracked or started elsewhere. Money is said for price_per_hour= (USD for all machines together), or for
machine=NAME of pipelines/prices.yaml, or of a table like it given with prices=FILE.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from models.spec import near

STAGES = ("tokenize", "train", "sample", "evaluate", "search")  # the others take seconds


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    stage, *rest = words
    if stage not in STAGES:
        print(f"error: there is no estimate of a stage {stage!r}{near(stage, STAGES)}", file=sys.stderr)
        return 2
    return importlib.import_module(f"pipelines.{stage}").main([*rest, "--estimate"])


if __name__ == "__main__":
    sys.exit(main())
