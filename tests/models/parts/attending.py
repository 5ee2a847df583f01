"""Attention by loops: one query, head and key at a time, from the formulas, in float64. Also how tests call a mixer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.gpt.config import GPT
from models.memory import At
from models.parts.attention import Causal
from models.parts.block import BlockSpec
from models.parts.position import NoPosition
from tests.models.parts.exact import exact


def block_of(attention=None, position=None, d_model=8, seq_len=16, **options) -> BlockSpec:
    spec = GPT(
        vocab_size=9,
        d_model=d_model,
        n_layers=1,
        seq_len=seq_len,
        attention=attention or Causal(n_heads=2),
        position=position or NoPosition(),
        **options,
    )
    return spec.blocks()[0]


def mixer_of(block: BlockSpec, stir: float = 0.4, seed: int = 0) -> nn.Module:
    """The block's mixer in float64, with parameters away from where they start."""
    torch.manual_seed(seed)
    mixer = block.attention.build(block)
    for module in mixer.modules():
        for name, start in getattr(module, "initial", {}).items():
            if (parameter := getattr(module, name, None)) is not None:
                start(parameter.data) if callable(start) else parameter.data.fill_(start)
    return exact(mixer, stir).eval()


def prepared(mixer: nn.Module, at: At, cached: bool = False, shared_bias: nn.Module | None = None) -> At:
    at = at._replace(tables={})
    mixer.prepare(at, cached, torch.float64)
    if shared_bias is not None:
        at.tables["score_bias"] = shared_bias(at, at.upto if cached else at.pos.shape[1], cached)
    return at


class Call(nn.Module):
    """A mixer with what a call needs: x [B, T, D] -> y [B, T, D]."""

    def __init__(self, mixer: nn.Module, at: At | None = None) -> None:
        super().__init__()
        self.mixer, self.at = mixer, at

    def forward(self, x: Tensor) -> Tensor:
        at = At.full(*x.shape[:2]) if self.at is None else self.at
        return self.mixer(x, prepared(self.mixer, at))[0]


def triangle(t: int, s: int) -> bool:
    return s <= t


def length(v: Tensor) -> Tensor:
    return sum(c * c for c in v).sqrt()


def owners(H: int, K: int) -> list[int]:
    """Which key head each query head reads: the first H mod K serve one more."""
    return [j for j in range(K) for _ in range(H // K + (1 if j < H % K else 0))]


def attended(scores: list[Tensor], values: list[Tensor], sink: Tensor | float | None = None) -> Tensor:
    """sum e^s v / (e^l + sum e^s)."""
    weights = [s.exp() for s in scores]
    total = sum(weights) + (0 if sink is None else torch.as_tensor(sink, dtype=torch.float64).exp())
    return sum(w * v for w, v in zip(weights, values, strict=True)) / total


def causal_by_loops(spec, block: BlockSpec, seen=triangle, bias=None, turn=None):
    """(x, parameters) -> y of `causal` and `infinite`. seen(t, s).  bias(head, t, s).  turn(vector, position)."""
    (H, K), h, hv = spec.heads(), spec.width(block.d_model), spec.v_width(block.d_model)
    kind = {name: type(getattr(spec, name)).__name__ for name in ("qk_norm", "sink", "gate")}

    def run(x: Tensor, p: dict[str, Tensor]) -> Tensor:
        p = {name.removeprefix("mixer."): value for name, value in p.items()}
        W = p["qkv.weight"]

        def rows(x_t, first, n):
            y = torch.stack([(W[r] * x_t).sum() for r in range(first, first + n)])
            return y + p["qkv.bias"][first : first + n] if "qkv.bias" in p else y

        def normed(v, which):
            if kind["qk_norm"] == "L2QKNorm":
                g = (
                    p.get("qk_norm.g", torch.tensor(spec.qk_norm.start(h, block.seq_len), dtype=torch.float64))
                    if which == "q"
                    else 1.0
                )
                return v / (length(v) + spec.qk_norm.eps) * g
            if kind["qk_norm"] == "RMSQKNorm":
                return v / (sum(c * c for c in v) / h + spec.qk_norm.eps).sqrt() * p[f"qk_norm.{which}"]
            return v

        def place(v, t):
            return v if turn is None else turn(v, t)

        out = []
        for row in x:
            T = len(row)
            q = [[place(normed(rows(row[t], i * h, h), "q"), t) for t in range(T)] for i in range(H)]
            k = [[place(normed(rows(row[t], (H + j) * h, h), "k"), t) for t in range(T)] for j in range(K)]
            v = [[rows(row[t], (H + K) * h + j * hv, hv) for t in range(T)] for j in range(K)]
            if spec.v_norm:
                v = [[u / (length(u) + 1e-6) for u in head] for head in v]
            tokens = []
            for t in range(T):
                heads = []
                for i, j in enumerate(owners(H, K)):
                    scores, values = [], []
                    for s in range(T):
                        if not seen(t, s):
                            continue
                        score = sum(a * b for a, b in zip(q[i][t], k[j][s], strict=True))
                        score = score if kind["qk_norm"] == "L2QKNorm" else score / h**0.5
                        score = score if spec.softcap is None else spec.softcap * torch.tanh(score / spec.softcap)
                        scores.append(score if bias is None else score + bias(i, t, s))
                        values.append(v[j][s])
                    sink = {
                        "NoSink": lambda: None,
                        "FixedSink": lambda: spec.sink.score,
                        "LearnedSink": lambda: p["scores.sink.score"],
                        "HeadSink": lambda i=i: p["scores.sink.score"][i],
                    }[kind["sink"]]()
                    y = attended(scores, values, sink)
                    if kind["gate"] != "NoGate":
                        G, n = p["gate.linear.weight"], hv if kind["gate"] == "ElementwiseGate" else 1
                        y = y / (1 + torch.stack([-(G[i * n + c] * row[t]).sum() for c in range(n)]).exp())
                    heads.append(y)
                merged = sum(heads) if spec.sums else torch.cat(heads)
                y = torch.stack([(w * merged).sum() for w in p["out.weight"]])
                tokens.append(y + p["out.bias"] if "out.bias" in p else y)
            out.append(torch.stack(tokens))
        return torch.stack(out)

    return run


def turned(base=10000.0, r=None):
    """(vector, position) -> the leading r channels turned, by complex numbers."""

    def turn(v: Tensor, t: int) -> Tensor:
        n = (r or len(v)) // 2
        parts = list(v.unbind())
        for m in range(n):
            angle = torch.tensor(t * base ** (-m / n), dtype=torch.float64)
            z = torch.complex(v[m], v[m + n]) * torch.polar(torch.ones((), dtype=torch.float64), angle)
            parts[m], parts[m + n] = z.real, z.imag
        return torch.stack(parts)

    return turn
