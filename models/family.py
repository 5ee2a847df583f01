"""What the specs and configs of all model families share; apart from lm.py so that `--help` loads no model."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from models.cost import Ops, product
from models.parts.block import BlockSpec
from models.parts.embedding import Embedding, Table
from models.parts.norm import Norm
from models.parts.softmax import PlainSoftmax, Softmax
from models.spec import ConfigError, Part, build, fields, near, plain

FORMAT_VERSION = 1  # of config.json; raised when a field changes its meaning, with a migration in FamilyConfig


class Family(Part):
    """A family's spec: a frozen dataclass of plain numbers and parts.

    All of them have the fields that are only named here. Those with a value are what a family may offer: it has the
    value unless its own dataclass makes a field of it (`GPT` says what each means).
    """

    kinds: ClassVar[dict[str, type]]
    vocab_size: int | None
    d_model: int
    seq_len: int
    dropout: float
    tie_embeddings: bool
    init_std: float
    embedding: Embedding = Table()
    embedding_norm: Norm | None = None
    position_norm: Norm | None = None
    final_norm: Norm | None = None
    head_norm: Norm | None = None
    logit_softcap: float | None = None
    output_softmax: Softmax = PlainSoftmax()

    def blocks(self) -> tuple[BlockSpec, ...]:
        """One spec per layer, per-layer lists resolved."""
        raise NotImplementedError

    def n_parameters(self) -> int:
        """Trainable parameters, by formula; a tied head counts once. Needs vocab_size."""
        raise NotImplementedError

    def ops(self, T: int) -> Ops:
        """Operations of one forward pass per token at context T, the head's included. Needs vocab_size."""
        raise NotImplementedError

    def outer_norms(self) -> tuple[tuple[Norm, int], ...]:
        """The norms outside the blocks that every token passes, with their widths."""
        last, d = self.blocks()[-1], self.d_model
        norms = (self.embedding_norm, self.position_norm, self.final_norm or last.norm)
        return tuple((norm, d) for norm in norms if norm is not None)

    def outer_parameters(self) -> int:
        """Parameters outside the blocks: table, head, their change of width and norms, positions, the output's own."""
        last, d = self.blocks()[-1], self.d_model
        width = self.embedding.width(d)
        total = self.embedding.rows(self.vocab) * width * (1 if self.tie_embeddings else 2)
        total += self.embedding.n_parameters(d)
        total += sum(norm.n_parameters(d, last.bias) for norm, d in self.outer_norms())
        total += self.head_norm.n_parameters(width, last.bias) if self.head_norm is not None else 0
        total += last.position.n_parameters(d, self.seq_len) if last.position.embeds else 0
        total += last.position.bias_parameters(last) if last.position.shared else 0
        return total + self.output_softmax.n_parameters(None)

    def outer_ops(self, T: int) -> Ops:
        """Operations per token outside the blocks. The head's rows are normed once for all tokens, so not counted.

        Streams are softmaxed, and can be drawn, each on its own, so their sums over all ids are not counted either.
        """
        last, d = self.blocks()[-1], self.d_model
        rows = self.embedding.rows(self.vocab)
        total = self.embedding.ops(d) + product(self.embedding.width(d), rows)
        total += sum((norm.ops(d, last.bias) for norm, d in self.outer_norms()), Ops())
        total += last.position.embedding_ops(d) if last.position.embeds else Ops()
        total += last.position.bias_ops(last, T) if last.position.shared else Ops()
        if self.logit_softcap is not None:
            total += Ops(multiplies=2 * rows, exponentials=rows)
        return total + self.output_softmax.ops(rows)

    @property
    def vocab(self) -> int:
        """vocab_size, which must be known by now. Raises ConfigError."""
        if self.vocab_size is None:
            raise ConfigError("vocab_size is not known yet; it comes with the tokenizer, or set model.vocab_size")
        return self.vocab_size


class FamilyConfig(PreTrainedConfig):
    """A PreTrainedConfig around a Family: its JSON holds the declared fields, `spec` is the dataclass.

    Takes the family's fields as keywords, as plain data or as built parts.  Raises ConfigError for what does not fit.
    """

    family: ClassVar[type]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "max_position_embeddings": "seq_len",
        "tie_word_embeddings": "tie_embeddings",
    }
    format_version: int = FORMAT_VERSION

    # transformers makes a dataclass of every subclass and passes what it does not know to __post_init__.
    def __post_init__(self, **kwargs: Any) -> None:
        if self.format_version > FORMAT_VERSION:
            raise ConfigError(
                f"config.json has format_version={self.format_version}, this version reads up to {FORMAT_VERSION}; "
                "update novella"
            )
        names = fields(self.family)
        for alias, name in self.attribute_map.items():
            if alias in kwargs:
                kwargs[name] = kwargs.pop(alias)
        declared = {name: kwargs.pop(name) for name in names if name in kwargs}
        for key in kwargs:
            if "did you mean" in near(key, names) and not hasattr(PreTrainedConfig, key):
                raise ConfigError(f"{self.family.__name__} has no field {key!r}{near(key, names)}")
        spec = build(self.family, {name: plain(value) for name, value in declared.items()})
        for name in names:
            setattr(self, name, plain(getattr(spec, name)))
        super().__post_init__(**kwargs)

    @property
    def spec(self) -> Any:
        """The family's frozen dataclass, from the present attributes (vocab_size follows resize_token_embeddings)."""
        return build(self.family, {name: getattr(self, name) for name in fields(self.family)})

    @classmethod
    def of(cls, spec: Any, **kwargs: Any) -> Any:
        """The config around a spec."""
        return cls(**{name: plain(getattr(spec, name)) for name in fields(cls.family)}, **kwargs)
