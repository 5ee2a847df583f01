"""What every model family shares: the door (padding, positions, memory), embedding and head, the Hugging Face protocol.

B batch, T time, D model width, V vocabulary, R memory rows. A family gives `applications` and `stack`; the engine knows
`run` and `memory` only; training calls `hidden` and builds its loss on it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from models.family import Family, FamilyConfig
from models.memory import At, Mem, Slots
from models.parts.block import Block
from models.parts.embedding import Widen
from models.roles import decay_names, initialise, mark
from models.spec import ConfigError, kind_of


class LM(PreTrainedModel, GenerationMixin):
    """A causal language model of some family.

    Subclasses build `blocks` (or what they have), define `applications` and `stack`, and call `self.post_init()` last.
    """

    config_class = FamilyConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Block"]
    spec: Family
    embedding: nn.Module
    position: nn.Module | None
    widen: Any
    output_softmax: Any
    norm: nn.Module
    head: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.spec = config.spec
        spec, last = self.spec, self.spec.blocks()[-1]
        position = next((b.position for b in spec.blocks() if b.position.embeds), None)
        d, width = spec.d_model, spec.embedding.width(spec.d_model)
        self.embedding = spec.embedding.table(spec.vocab, d)
        self.widen = spec.embedding.widen(d)
        self.embedding_norm = spec.embedding_norm.build(d, last.bias) if spec.embedding_norm is not None else None
        self.position = position.embedding(d, spec.seq_len) if position is not None else None
        self.position_norm = spec.position_norm.build(d, last.bias) if spec.position_norm is not None else None
        self.score_bias = last.position.shared_bias(last)
        self.norm = (spec.final_norm or last.norm).build(d, last.bias)
        self.narrow = spec.embedding.narrow(d)
        self.head = spec.embedding.head(spec.vocab, d)
        names = [name for name, _ in self.embedding.named_parameters()]
        self._tied_weights_keys = {f"head.{name}": f"embedding.{name}" for name in names}
        self.head_norm = spec.head_norm.build(width, last.bias) if spec.head_norm is not None else None
        self.output_softmax = None if spec.output_softmax.fused else spec.output_softmax.build(None)
        self.gradient_checkpointing = False

    # ---- what a family gives

    def applications(self) -> list[Block]:
        """The blocks in the order they run; one that runs twice stands here twice, each with its own memory."""
        raise NotImplementedError

    def stack(self, x: Tensor, at: At, mem: Slots | None = None, trace: list[Tensor] | None = None) -> Tensor:
        """x [B, T, D] through all applications; application k uses mem[k]. Appends each one's output to `trace`."""
        raise NotImplementedError

    def residual_branches(self) -> int:
        """Branches added to the residual stream, from which the `residual` role's initialisation follows."""
        return sum(1 + block.has_mlp for block in self.applications())

    # ---- inside: right-padded tokens that say where they stand

    def apply_block(self, block: Block, x: Tensor, at: At, mem: Mem | None, shared: tuple) -> tuple[Tensor, tuple]:
        """A block, with its activations recomputed in the backward pass when gradient checkpointing is on."""
        if self.gradient_checkpointing and self.training and mem is None:
            return self._gradient_checkpointing_func(block.__call__, x, at, None, shared)
        return block(x, at, mem, shared)

    def hidden(
        self, ids: Tensor, at: At | None = None, mem: Slots | None = None, trace: list[Tensor] | None = None
    ) -> Tensor:
        """ids [B, T] -> [B, T, D] after the final norm, ready for `logits` or a fused loss (with `head_weight`).

        A factored embedding narrows it to the head's width.

        at: where the tokens stand; None: whole rows from position 0.  mem: decoding memory, which is written.
        trace: a list that receives the embedding and every application's output.
        """
        if at is None:
            at = At.full(ids.shape[0], ids.shape[1], ids.device)
        at = at._replace(tables={} if at.tables is None else at.tables)
        assert at.tables is not None
        for block in self.applications():
            block.mixer.prepare(at, mem is not None, self.stored_dtype)
        if self.score_bias is not None:
            at.tables["score_bias"] = self.score_bias(at, at.upto if mem is not None else ids.shape[1], mem is not None)
        x = self.embedding(ids)
        if self.widen is not None:
            x = self.widen(x)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        if self.position is not None:
            x = self.position(x, at)
        if self.position_norm is not None:
            x = self.position_norm(x)
        if self.spec.dropout:
            x = F.dropout(x, self.spec.dropout, self.training)
        if trace is not None:
            trace.append(x)
        x = self.norm(self.stack(x, at, mem, trace))
        if self.narrow is not None:
            return self.narrow(x)
        return self.widen.back(x) if isinstance(self.widen, Widen) else x

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of the embedding's rows, and so of the residual stream without autocast."""
        return next(self.embedding.parameters()).dtype

    def head_weight(self) -> Tensor:
        """The head's rows as they are stored, [V, D] ([sum V_i, D] of streams), normed where the family says so."""
        rows = self.head.rows if self.spec.embedding.joins else self.head.weight
        return rows if self.head_norm is None else self.head_norm(rows)

    @property
    def has_link(self) -> bool:
        """Whether something stands between the head's product and the logits."""
        return self.spec.embedding.joins or self.spec.logit_softcap is not None or self.output_softmax is not None

    def link(self, z: Tensor) -> Tensor:
        """Products with the head's rows -> logits [..., V]: softmax(link(z)) is the model's distribution."""
        return self.spec.embedding.join([self.bend(part) for part in self.spec.embedding.apart(z)])

    def bend(self, logits: Tensor) -> Tensor:
        """Soft-cap and output softmax, elementwise over a row (of a stream, where there are several)."""
        if (cap := self.spec.logit_softcap) is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits if self.output_softmax is None else self.output_softmax.log_weights(logits)

    def logits(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, V]."""
        return self.spec.embedding.join(self.parts(x))

    def parts(self, x: Tensor) -> list[Tensor]:
        """[B, T, D] -> the logits of what is softmaxed apart: [B, T, V] alone, or k of [B, T, V_i] of streams."""
        z = F.linear(x, self.head_weight(), self.head.bias)
        return [self.bend(part) for part in self.spec.embedding.apart(z)]

    def run(self, ids: Tensor, at: At, mem: Slots, last: bool = False) -> Tensor:
        """All that the engine knows: right-padded ids [B, T] at explicit rows -> logits [B, T, V].

        last: only of each row's last real token, [B, 1, V], which spares the head on the rest of a prompt.
        """
        x = self.hidden(ids, at, mem)
        return self.logits(last_real(x, at) if last else x)

    def memory(self, rows: int, length: int = 64, dtype: torch.dtype | None = None) -> Slots:
        """Decoding memory of `rows` x `length` tokens, in the weights' dtype unless another is named."""
        specs = [block.mixer.memory() for block in self.applications()]
        return Slots(specs, rows, length, dtype or self.stored_dtype, self.device)

    # ---- outside: the Hugging Face protocol

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Slots | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """The transformers form, with padding on any side.

        input_ids: [B, T].  attention_mask: [B, past + T], 0 = pad; pads are moved to the right inside and back again.
        position_ids: used without memory only; with memory a key's index is its position.
        labels: [B, T], the same tokens (shifted inside), -100 = no target; gives `loss`, the mean in nats.
        logits_to_keep: the last so many positions, or indices; 0: all.  Raises ValueError for inputs that do not fit.
        """
        if input_ids is None or input_ids.dim() != 2:
            given = None if input_ids is None else tuple(input_ids.shape)
            raise ValueError(f"input_ids of shape [batch, tokens] are needed, got {given}")
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError("inputs_embeds are not supported; pass input_ids")
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("labels need all logits; leave logits_to_keep out")
        mem = past_key_values
        if mem is not None and not isinstance(mem, Slots):
            raise ValueError(f"past_key_values must be the model's own memory(rows), not {type(mem).__name__}")
        if mem is None and use_cache:
            mem = self.memory(input_ids.shape[0], max(64, input_ids.shape[1]))
        ids, at, back = self._door(input_ids, attention_mask, position_ids, mem.seen if mem is not None else None)
        if mem is not None:
            mem.seen += ids.shape[1]
            mem.grow(mem.seen)
        trace: list[Tensor] | None = [] if output_hidden_states else None
        x = self.hidden(ids, at, mem, trace)
        states = (*trace[:-1], x) if trace else None
        if back is not None:
            x = _take(x, back)
            states = tuple(_take(s, back) for s in states) if states else None
        if isinstance(logits_to_keep, Tensor):
            x = x[:, logits_to_keep]
        elif logits_to_keep:
            x = x[:, -logits_to_keep:]
        logits = self.logits(x)
        loss = None
        if labels is not None:
            reduction = "mean" if num_items_in_batch is None else "sum"
            loss = F.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100, reduction=reduction
            )
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        out = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=mem, hidden_states=states)
        return out if return_dict is not False else out.to_tuple()

    def _door(
        self, ids: Tensor, mask: Tensor | None, position_ids: Tensor | None, seen: int | None
    ) -> tuple[Tensor, At, Tensor | None]:
        """Tokens with the real ones first, where they stand, and the order that undoes it (None: nothing was moved)."""
        B, T = ids.shape
        past = seen or 0
        upto = past + T
        if mask is not None:
            if mask.dim() != 2 or mask.shape[0] != B or mask.shape[1] != past + T:
                raise ValueError(
                    f"attention_mask has shape {tuple(mask.shape)}; [{B}, {past + T}] is needed"
                    f" ({past} tokens in memory, {T} new)"
                )
            # Looking at the mask waits for the device once per call; the engine's path (`run`) never does.
            if not torch.compiler.is_compiling():
                least, upto = torch.stack(mask.sum(1).aminmax()).tolist()
                mask = None if least == past + T else mask
        if mask is None:
            at = At.full(B, T, ids.device, past)
            if position_ids is not None and seen is None:
                at = At(position_ids.expand(B, T), upto=T)
            return ids, at, None
        real = mask[:, past:].bool()
        order = real.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
        step = torch.arange(T, device=ids.device)
        pos = mask[:, :past].sum(1, keepdim=True) + step
        at = At(pos, real.sum(1), upto=max(int(upto), 1), start=None if past else 0)
        return ids.gather(1, order), at, order.argsort(dim=1)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = mark(cast(nn.Embedding, value), weight="embedding")

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.head = mark(cast(nn.Linear, new_embeddings), weight="head")

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As transformers': another vocabulary size, in weights, config and spec. Raises ConfigError for streams."""
        if self.spec.embedding.joins and (args or kwargs):
            raise ConfigError(
                f"embedding={kind_of(self.spec.embedding)}: the streams' sizes say how many ids there are"
            )
        embedding = super().resize_token_embeddings(*args, **kwargs)
        self.spec = self.config.spec
        return embedding

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes its own memory

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict, generation_mode: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Assisted generation wants the memory beforehand; everything else gets it from the first forward."""
        cast(Any, super())._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, *args, **kwargs
        )
        if generation_mode == GenerationMode.ASSISTED_GENERATION and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = self.memory(1)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs: Any) -> None:
        """Recompute each block's activations in the backward pass: memory of one block instead of all."""
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        self._set_gradient_checkpointing(True, partial(checkpoint, **options))

    def gradient_checkpointing_disable(self) -> None:
        self._set_gradient_checkpointing(False)

    # ---- roles

    def _init_weights(self, module: nn.Module) -> None:
        """transformers calls it for every module, after building and after loading. The table is models/roles.py."""
        if not hasattr(module, "roles") and all(own is not module for own in self.modules()):
            # Made by resize_token_embeddings, which initialises it before it is put in place.
            mark(module, weight="embedding" if isinstance(module, nn.Embedding) else "head")
        initialise(module, self.spec.init_std, self.residual_branches())

    def decay_parameters(self) -> set[str]:
        """Names of the parameters that weight decay pulls on: matrices and embeddings, no gains, no biases."""
        return decay_names(self)

    def flops_per_token(self, T: int) -> float:
        """Training FLOPs (forward and backward) per token at context T: 6 x matrix parameters + 3 x the mixers' own.

        Matrix parameters are those that every application multiplies by, the head's included and lookups excluded; the
        mixers' own are 4 n_heads head_dim T per layer for full attention; an MLP's own are those of stacked experts.
        Source: PaLM, arXiv:2204.02311, appendix B.
        """
        blocks = self.applications()
        outer = [part for part in (self.widen, self.narrow) if part is not None]
        matrices = self.head_weight().numel() + sum(block.matrix_parameters() for block in blocks)
        matrices += sum(p.numel() for part in outer for p in part.parameters() if p.dim() == 2)
        if isinstance(self.widen, Widen) and self.narrow is None:
            matrices += self.widen.up.weight.numel()  # it is used on the way back, too
        own = sum(block.mixer.flops_per_token(T) for block in blocks)
        own += sum(block.mlp.flops_per_token(T) for block in blocks if hasattr(block.mlp, "flops_per_token"))
        return 6.0 * matrices + 3.0 * own


def last_real(x: Tensor, at: At) -> Tensor:
    """[B, T, D] -> [B, 1, D] at each row's last real token."""
    return x[:, -1:] if at.n is None else _take(x, (at.n - 1).clamp(min=0)[:, None])


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x [B, T, D] at index [B, S] along time -> [B, S, D]."""
    return x.gather(1, index[..., None].expand(*index.shape, x.shape[-1]))
