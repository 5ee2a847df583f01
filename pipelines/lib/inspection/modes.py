"""Names that a command's settings need before torch is there."""

from typing import Literal

Mode = Literal["none", "probability", "top_k", "entropy", "rank", "minmax", "cosine", "all"]
Chart = Literal["heatmap", "bars", "logits"]
