"""The training loss as one module: what DDP wraps and torch.compile compiles.   B rows, T tokens."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from kernels.cross_entropy import linear_cross_entropy
from models.lm import LM
from models.memory import At


class Loss(nn.Module):
    """Next-token loss of a language model over one micro-batch, summed over its targets.

    Summed, not averaged: the mean over the global batch is taken once, by whoever knows the global count.
    z_loss: weight of the squared log-normaliser (1e-4 is common); 0 = plain cross-entropy.
    """

    def __init__(self, model: LM, z_loss: float = 0.0):
        super().__init__()
        self.model, self.z_loss = model, z_loss

    def forward(
        self, ids: Tensor, targets: Tensor, pos: Tensor | None = None, doc: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """ids: [B, T].  targets: [B, T], -100 = none.  pos, doc: [B, T] positions and document ids of packed rows.

        Returns (loss, nll): sums in nats. nll is plain cross-entropy, whatever the training loss is.
        """
        b, t = ids.shape
        at = At.full(b, t, ids.device)
        if pos is not None or doc is not None:
            at = At(pos=at.pos if pos is None else pos, upto=t, doc=doc)
        x = self.model.hidden(ids, at)
        head = cast(nn.Linear, self.model.get_output_embeddings())
        return linear_cross_entropy(x.flatten(0, 1), head.weight, targets.flatten(), self.z_loss, head.bias)
