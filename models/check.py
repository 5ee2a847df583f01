"""The conformance suite: what every model family promises, as functions that return results with figures.

`conformance(make)` runs all of it on the models that `make()` returns, and is used by the tests over every registered
part and preset (`variants`) and by `python -m pipelines.evaluate check`. It computes in float64: there an error of 1e-9
is a bug and no rounding.   B batch, T time, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig

from models.families import create, load
from models.family import Family
from models.gpt.config import GPT
from models.gpt.presets import PRESETS
from models.lm import LM
from models.memory import At
from models.parts.activation import Activation
from models.parts.attention import Attention, Causal
from models.parts.mlp import MLP, Plain, SwiGLU
from models.parts.norm import LayerNorm, Norm, RMSNorm
from models.parts.position import NoPosition, Position, Rotary
from models.roles import role_of
from models.spec import ConfigError, Part, fields, part_of

TOLERANCE = 1e-9  # of logits and gradients in float64, relative to the largest of them


class Result(NamedTuple):
    """One promise: whether it holds, and the figures that say so."""

    name: str
    ok: bool
    detail: str


Make = Callable[[], LM]
Verdict = tuple[bool, str]


def conformance(make: Make, backend: str = "eager", only: str | None = None) -> list[Result]:
    """All checks on one model.

    make: gives the model, with the same weights each time.  backend: of torch.compile ("eager" traces and runs no
    compiler; "inductor" is the real one).  only: checks whose name contains this.
    """
    results = []
    for name, check in CHECKS.items():
        if only is not None and only not in name:
            continue
        try:
            torch.manual_seed(0)
            ok, detail = check(make, backend) if check is compiled_equals_eager else check(make)
        except Exception as error:  # a check that cannot run is a promise that does not hold
            ok, detail = False, f"{type(error).__name__}: {error}".splitlines()[0]
        results.append(Result(name, ok, detail))
    return results


# ---- helpers


def exact(make: Make) -> LM:
    """The model in float64, in eval mode."""
    return nn.Module.to(make(), torch.float64).eval()


def stirred(make: Make, scale: float = 0.3) -> Make:
    """Models whose parameters are moved away from initialisation, so that every part has a say in the logits."""

    def make_stirred() -> LM:
        model = make()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * scale)
        return model

    return make_stirred


def tokens(model: LM, B: int, T: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.spec.vocab, (B, T), generator=generator).to(model.device)


def context(model: LM, T: int) -> int:
    return min(T, model.spec.seq_len)


def judge(error: float, scale: float, what: str) -> Verdict:
    limit = TOLERANCE * max(scale, 1.0)
    return error <= limit, f"{what}: largest error {error:.1e}, limit {limit:.1e}"


def apart(a: Tensor, b: Tensor) -> float:
    """Largest difference; infinite where either is not finite."""
    difference = (a - b).abs().max().item()
    return difference if difference == difference else float("inf")


def gradients(model: LM, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss = model(ids, labels=ids).loss
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor], what: str) -> Verdict:
    if ours.keys() != theirs.keys():
        return False, f"{what}: gradients of {sorted(ours.keys() ^ theirs.keys())} exist on one side only"
    error = max(apart(ours[name], theirs[name]) for name in ours)
    return judge(error, max(g.abs().max().item() for g in theirs.values()), what)


# ---- memory


@torch.no_grad()
def cached_equals_full(make: Make) -> Verdict:
    """Logits from memory, in chunks of several sizes, are those of one full call."""
    model = exact(make)
    ids = tokens(model, 2, context(model, 23))
    full, worst = model(ids).logits, 0.0
    for first, step in ((1, 1), (7, 1), (5, 4)):
        out = model(ids[:, :first], use_cache=True)
        parts = [out.logits]
        for start in range(first, ids.shape[1], step):
            parts.append(model(ids[:, start : start + step], past_key_values=out.past_key_values).logits)
        worst = max(worst, apart(torch.cat(parts, 1), full))
    return judge(worst, full.abs().max().item(), f"{ids.shape[1]} tokens in steps of 1 and 4")


@torch.no_grad()
def rows_equal_single(make: Make) -> Verdict:
    """Continuous batching with chunked prefill over explicit rows gives what each sequence gives alone.

    Rows are reused: the memory is poisoned with NaN first, and every admission resets its row.
    """
    model = exact(make)
    lengths = [min(n, context(model, n)) for n in (11, 3, 17, 1, 8)]
    rows, chunk, worst = 3, 4, 0.0
    prompts = [tokens(model, 1, n, seed=n)[0] for n in lengths]
    memory = model.memory(rows, max(lengths))
    for mem in memory.mem:
        for tensor in mem.tensors.values():
            tensor.fill_(float("nan"))
    waiting, live, done = list(range(len(prompts))), {}, [[] for _ in prompts]  # type: ignore[var-annotated]
    memory.reset_rows(slice(None))
    while waiting or live:
        while waiting and len(live) < rows:
            row = next(r for r in reversed(range(rows)) if r not in live)
            live[row] = waiting.pop(0)
            memory.reset_rows([row])
        used = sorted(live, key=lambda r: live[r])
        at_ = [sum(len(x) for x in done[live[r]]) for r in used]
        n = [min(chunk, lengths[live[r]] - a) for r, a in zip(used, at_, strict=True)]
        T = max(n)
        ids = torch.stack(
            [F.pad(prompts[live[r]][a : a + k], (0, T - k)) for r, a, k in zip(used, at_, n, strict=True)]
        )
        pos = torch.tensor(at_)[:, None] + torch.arange(T)
        upto = max(a + k for a, k in zip(at_, n, strict=True))
        at = At(pos.to(ids.device), torch.tensor(n, device=ids.device), torch.tensor(used, device=ids.device), upto)
        logits = model.run(ids, at, memory)
        for i, r in enumerate(used):
            done[live[r]].append(logits[i, : n[i]])
            if at_[i] + n[i] == lengths[live[r]]:
                del live[r]
    scale = 0.0
    for prompt, parts in zip(prompts, done, strict=True):
        full = model(prompt[None]).logits[0]
        worst, scale = max(worst, apart(torch.cat(parts), full)), max(scale, full.abs().max().item())
    return judge(worst, scale, f"{len(lengths)} sequences over {rows} rows, chunks of {chunk}")


@torch.no_grad()
def rollback_forgets(make: Make) -> Verdict:
    """Tokens that were rolled back (per-token memory) or restored from a snapshot (states) leave no trace."""
    model = exact(make)
    T = context(model, 12)
    ids, other = tokens(model, 2, T), tokens(model, 2, T, seed=9)
    memory = model(ids[:, : T - 4], use_cache=True).past_key_values
    snapshot = memory.snapshot()
    model(other[:, :3], past_key_values=memory)
    if memory.has_state:
        memory.restore(snapshot)
    else:
        memory.crop(-3)
    full = model(ids).logits
    again = model(ids[:, T - 4 :], past_key_values=memory).logits
    return judge(apart(again, full[:, T - 4 :]), full.abs().max().item(), "3 tokens taken back")


@torch.no_grad()
def padding_is_unseen(make: Make) -> Verdict:
    """A batch padded on the left, or on the right, gives each row's own logits, with memory and without."""
    model = exact(make)
    T = context(model, 10)
    lengths = [T, T - 3, 2, 1]
    rows = [tokens(model, 1, n, seed=n) for n in lengths]
    single = [model(row).logits[0] for row in rows]
    worst = 0.0
    for left in (True, False):
        pad = [(T - n, 0) if left else (0, T - n) for n in lengths]
        ids = torch.cat([F.pad(row, p, value=1) for row, p in zip(rows, pad, strict=True)])
        mask = torch.cat([F.pad(torch.ones_like(row), p) for row, p in zip(rows, pad, strict=True)])
        for use_cache in (False, True):
            logits = model(ids, attention_mask=mask, use_cache=use_cache).logits
            for i, (want, p) in enumerate(zip(single, pad, strict=True)):
                worst = max(worst, apart(logits[i, p[0] : T - p[1]], want))
    return judge(worst, max(s.abs().max().item() for s in single), "rows of 4 lengths, pads left and right")


# ---- causality and masks


def no_look_ahead(make: Make) -> Verdict:
    """No logit depends on a later token, by value and by gradient; each depends on its own and on the one before."""
    model = exact(make)
    T = context(model, 12)
    cut = T // 2
    ids, other = tokens(model, 1, T), tokens(model, 1, T, seed=5)
    changed = torch.cat([ids[:, :cut], other[:, cut:]], 1)
    with torch.no_grad():
        full = model(ids).logits
        error = apart(full[:, :cut], model(changed).logits[:, :cut])
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[0]

    hook = model.embedding.register_forward_hook(keep)
    try:
        logits = model(ids).logits
    finally:
        hook.remove()
    weight = torch.randn(logits.shape[-1], dtype=logits.dtype, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((logits[0, cut - 1] * weight.to(logits.device)).sum(), kept[0])
    size = gradient[0].abs().amax(-1)
    if not bool((size[max(0, cut - 2) : cut] > 0).all()):
        return False, f"the logit at {cut - 1} does not depend on its own token and the one before"
    return judge(max(error, size[cut:].max().item()), full.abs().max().item(), "values and gradients")


@torch.no_grad()
def documents_are_apart(make: Make) -> Verdict:
    """Documents packed into a row give the logits that each gives alone, with positions that restart."""
    model = exact(make)
    lengths = [5, 1, 4] if model.spec.seq_len >= 10 else [1, 1]
    parts = [tokens(model, 1, n, seed=n) for n in lengths]
    ids = torch.cat(parts, 1)
    pos = torch.cat([torch.arange(n) for n in lengths])[None].to(ids.device)
    doc = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None].to(ids.device)
    packed = model.logits(model.hidden(ids, At(pos, upto=ids.shape[1], doc=doc)))
    alone = torch.cat([model(part).logits for part in parts], 1)
    return judge(apart(packed, alone), alone.abs().max().item(), f"documents of {lengths} tokens")


def masked_rows_are_finite(make: Make) -> Verdict:
    """A row of pads only, documents of one token and every gradient stay finite."""
    model = exact(make).train()
    T = context(model, 6)
    ids = tokens(model, 3, T)
    mask = torch.ones_like(ids)
    mask[1] = 0
    mask[2, :-1] = 0
    outputs = [model(ids, attention_mask=mask, use_cache=use_cache).logits for use_cache in (False, True)]
    doc = torch.arange(T, device=ids.device).expand(3, T)
    outputs.append(model.logits(model.hidden(ids, At(doc, upto=T, doc=doc))))
    for name, out in zip(("no memory", "memory", "documents"), outputs, strict=True):
        model.zero_grad(set_to_none=True)
        if name != "memory":
            out.sum().backward()
        bad = [n for n, p in model.named_parameters() if p.grad is not None and not bool(p.grad.isfinite().all())]
        if bad or not bool(out.isfinite().all()):
            return False, f"{name}: not finite: {', '.join(bad) or 'logits'}"
    return True, "all-pad row, one-token documents: logits and gradients finite"


# ---- training


def every_parameter_learns(make: Make) -> Verdict:
    """Every parameter gets a gradient that is not zero (DDP waits for all of them) and has a role."""
    model = exact(make).train()
    found = gradients(model, tokens(model, 2, context(model, 12)))
    for module in model.modules():
        for name, _ in module.named_parameters(recurse=False):
            role_of(module, name)
    silent = [n for n, p in model.named_parameters() if p.requires_grad and (n not in found or not found[n].any())]
    return not silent, f"without gradient: {', '.join(silent)}" if silent else f"{len(found)} parameters"


def learns_by_heart(make: Make, steps: int = 60) -> Verdict:
    """One batch is learned by heart: the loss falls below a tenth within 60 steps of Adam."""
    model = make().train()
    ids = tokens(model, 2, context(model, 8))
    optimizer = torch.optim.Adam(model.parameters(), lr=min(0.02, 0.64 / model.spec.d_model))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        last = model.eval()(ids, labels=ids).loss.item()
    return last < 0.1 * max(losses[0], 1.0), f"loss {losses[0]:.3f} -> {last:.3f} in {steps} steps"


def compiled_equals_eager(make: Make, backend: str = "eager") -> Verdict:
    """torch.compile makes one graph of the loss, with equal loss and gradients; of packed documents too."""
    model = exact(make)
    T = context(model, 9)
    ids = tokens(model, 2, T)
    doc = (torch.arange(T, device=ids.device) // 4).expand(2, T)

    def loss(pos: Tensor | None, doc: Tensor | None) -> Tensor:
        at = None if pos is None else At(pos, upto=T, doc=doc)
        logits = model.logits(model.hidden(ids, at))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    verdicts = []
    for pos, documents in ((None, None), (torch.arange(T, device=ids.device).expand(2, T), doc)):
        grads = []
        for f in (compiled, loss):
            model.zero_grad(set_to_none=True)
            f(pos, documents).backward()
            grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        verdicts.append(compare(grads[0], grads[1], f"one graph, backend {backend}"))
    return min(verdicts)


def checkpointing_equals_plain(make: Make) -> Verdict:
    """Gradient checkpointing gives the gradients of a plain backward pass, with dropout too."""
    model = exact(make).train()
    ids = tokens(model, 2, context(model, 9))
    torch.manual_seed(3)
    plain_gradients = gradients(model, ids)
    model.gradient_checkpointing_enable()
    torch.manual_seed(3)
    again = gradients(model, ids)
    model.gradient_checkpointing_disable()
    return compare(again, plain_gradients, "gradients")


# ---- generation


@torch.no_grad()
def uncached_greedy(model: LM, ids: Tensor, n: int) -> Tensor:
    """Greedy decoding that runs the whole sequence for every token."""
    for _ in range(n):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids


def generated(model: Any, ids: Tensor, mask: Tensor, n: int, **options: Any) -> Tensor:
    """transformers' `generate` for exactly n tokens, whatever the folder's generation_config says of ends."""
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model.generate(ids, attention_mask=mask, max_new_tokens=n, do_sample=False, **options)


def generate_equals_greedy(make: Make) -> Verdict:
    """transformers' `generate`, with memory and left padding, is our uncached greedy decoding, token for token."""
    model = exact(make)
    n = min(8, model.spec.seq_len - 4)
    rows = [tokens(model, 1, 4), tokens(model, 1, 2, seed=4)]
    ids = torch.cat([rows[0], F.pad(rows[1], (2, 0))])
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    out = generated(model, ids, mask, n)
    for row, got, skip in zip(rows, out, (0, 2), strict=True):
        want = uncached_greedy(model, row, n)[0]
        if not torch.equal(got[skip:], want):
            return False, f"{got[skip:].tolist()} instead of {want.tolist()}"
    return True, f"2 rows, one left-padded, {n} tokens"


def beams_equal_uncached(make: Make) -> Verdict:
    """Beam search over reordered memory finds what it finds without memory."""
    model = exact(make)
    n = min(6, model.spec.seq_len - 3)
    ids = tokens(model, 2, 3)
    beams = min(3, model.spec.vocab)
    ours, want = (
        generated(model, ids, torch.ones_like(ids), n, num_beams=beams, use_cache=use_cache)
        for use_cache in (True, False)
    )
    return torch.equal(ours, want), f"{beams} beams, {n} tokens: {ours[0].tolist()} and {want[0].tolist()}"


# ---- files and configs


def save_load_is_bitwise(make: Make) -> Verdict:
    """save -> load -> save writes the same bytes and the loaded model gives the same logits, bit for bit."""
    model = make().eval()
    ids = tokens(model, 1, context(model, 8))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        first, second = Path(folder, "a"), Path(folder, "b")
        model.save_pretrained(first)
        loaded = load(first)
        loaded.save_pretrained(second)
        hashes = [{p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in f.iterdir()} for f in (first, second)]
        different = sorted(n for n in hashes[0].keys() | hashes[1].keys() if hashes[0].get(n) != hashes[1].get(n))
        if different:
            return False, f"differ after loading: {', '.join(different)}"
        if loaded.config.spec != model.config.spec:
            return False, f"spec {loaded.config.spec} instead of {model.config.spec}"
        same = torch.equal(model(ids).logits, loaded(ids).logits)
    return same, f"{len(hashes[0])} files" if same else "logits differ after loading"


def ties_are_declared(make: Make) -> Verdict:
    """Names that share storage are those in `_tied_weights_keys`, and they share it after loading too."""
    model = make()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = load(folder)
    declared = {frozenset(pair) for pair in model.get_expanded_tied_weights_keys(all_submodels=False).items()}
    for state in (model.state_dict(keep_vars=True), loaded.state_dict(keep_vars=True)):
        names: dict[int, list[str]] = {}
        for name, tensor in state.items():
            names.setdefault(tensor.data_ptr(), []).append(name)
        shared = {frozenset(group) for group in names.values() if len(group) > 1}
        if shared != declared:
            return False, f"shared {[sorted(g) for g in shared]}, declared {[sorted(g) for g in declared]}"
    return True, f"{len(declared)} declared"


def parameters_follow_formula(make: Make) -> Verdict:
    """The number of parameters is what the spec's formula says."""
    model = make()
    have, formula = sum(p.numel() for p in model.parameters()), model.spec.n_parameters()
    return have == formula, f"{have} parameters, formula {formula}"


# Fields that limit or describe and are read by stages, so that changing them may change neither output nor parameters.
LIMITS = {"seq_len": "the longest trained context: a learned position table has so many rows, other schemes none"}


def every_field_matters(make: Make) -> Verdict:
    """Every config field, of the family and of each part, changes the output or the parameters, or is refused."""
    spec = make().spec
    base = effect(spec)
    silent, tried, refused = [], 0, 0
    for name, others in alternatives(spec):
        if name in LIMITS:
            continue
        changed, valid = False, 0
        for other in others:
            try:
                changed = changed or effect(other()) != base
                valid += 1
            except ConfigError:
                refused += 1
        tried += valid
        if valid and not changed:
            silent.append(name)
    detail = f"{tried} changes, {refused} refused"
    return not silent, f"no effect: {', '.join(silent)}" if silent else detail


def effect(spec: Family) -> tuple:
    """What a spec does: shapes and values of the initial parameters, and logits in training and in eval mode."""
    torch.manual_seed(0)
    model = nn.Module.to(create(spec), torch.float64)
    shapes = tuple((name, tuple(p.shape), p.sum().item()) for name, p in model.named_parameters())
    with torch.no_grad():
        for p in model.parameters():  # from initialisation alone, attention is nearly uniform and a gain is 1
            p.add_(torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(p.numel())) * 0.3)
        ids = tokens(model, 2, min(12, spec.seq_len))
        out = []
        for mode in (True, False):
            torch.manual_seed(1)
            out.append(model.train(mode)(ids).logits.sum((0, 1)).tolist())
    return shapes, out


def alternatives(x: Any, name: str = "") -> Iterator[tuple[str, list[Callable[[], Any]]]]:
    """Dotted field name -> ways to build `x` with another value there; raises ConfigError when called and refused."""
    cls: Any = type(x)
    for key, (annotation, _) in fields(cls).items():
        value, path = getattr(x, key), f"{name}.{key}" if name else key
        base = part_of(annotation)

        def changed(new: Callable[[], Any], key: str = key) -> Callable[[], Any]:
            return lambda: dataclasses.replace(x, **{key: new()})

        if isinstance(value, tuple):  # one per layer: vary the first
            first, rest = value[0], value[1:]
            if isinstance(first, Part):
                for sub, others in alternatives(first, path):
                    yield sub, [changed(lambda o=o, rest=rest: (o(), *rest)) for o in others]  # type: ignore[misc]
            continue
        if base is not None:
            kinds = [kind for kind in base.kinds.values() if kind is not type(value)]
            if kinds:
                yield path, [changed(kind) for kind in kinds]
            for sub, others in alternatives(value, path):
                yield sub, [changed(other) for other in others]
            continue
        yield path, [changed(lambda v=v: v) for v in _values(annotation, value) if v != value]  # type: ignore[misc]


def _values(annotation: Any, value: Any) -> list[Any]:
    """Other values of a scalar field."""
    text = str(annotation)
    if isinstance(value, bool) or "bool" in text:
        return [not value] if isinstance(value, bool) else [True, False]
    if isinstance(value, float) or "float" in text:
        return [0.25] if value in (None, 0.0) else [value * 3, value / 3]
    return [1, 2, 3, 8] if value is None else [value * 2, max(1, value // 2), value + 1]


CHECKS: dict[str, Callable[..., Verdict]] = {
    f.__name__: f
    for f in (
        cached_equals_full,
        rows_equal_single,
        rollback_forgets,
        padding_is_unseen,
        no_look_ahead,
        documents_are_apart,
        masked_rows_are_finite,
        every_parameter_learns,
        learns_by_heart,
        compiled_equals_eager,
        checkpointing_equals_plain,
        generate_equals_greedy,
        beams_equal_uncached,
        save_load_is_bitwise,
        ties_are_declared,
        parameters_follow_formula,
        every_field_matters,
    )
}


# ---- what the suite is run over


def shrunk(spec: GPT) -> GPT:
    """A preset at a size for tests: same parts and options, small numbers, the ratio of query to key heads kept."""
    attention, mlp = spec.attention, spec.mlp
    assert isinstance(attention, Causal) and isinstance(mlp, (Plain, SwiGLU))
    H, K = attention.heads()
    G = H // K
    heads: dict[str, Any] = {"n_heads": 2 * G, "n_kv_heads": None if attention.n_kv_heads is None else 2}
    return dataclasses.replace(
        spec,
        vocab_size=31,
        d_model=16 * G,
        n_layers=2,
        seq_len=32,
        attention=dataclasses.replace(attention, **heads),
        mlp=dataclasses.replace(mlp, hidden=None if mlp.hidden is None else 24 * G),
    )


def variants() -> dict[str, Family]:
    """Small specs that between them hold every preset, every registered part and every kind of option."""
    base = GPT(
        vocab_size=31,
        d_model=16,
        n_layers=2,
        seq_len=32,
        attention=Causal.small(),
        mlp=Plain.small(),
        norm=RMSNorm(),
        position=Rotary(),
    )
    specs: dict[GPT, list[str]] = {}  # names that mean the same spec stand together and are checked once

    def add(name: str, spec: GPT) -> None:
        specs.setdefault(spec, []).append(name)

    for name, make in PRESETS.items():
        add(name, shrunk(make()))
    registries: dict[str, type[Part]] = {"attention": Attention, "mlp": MLP, "norm": Norm, "position": Position}
    for field, registry in registries.items():
        for kind, cls in registry.kinds.items():
            small = getattr(cls, "small", cls)  # a part whose defaults do not fit this width says what does
            changes: dict[str, Any] = {field: small()}
            add(f"{field}={kind}", dataclasses.replace(base, **changes))
    activations = tuple(Plain(hidden=24, activation=cls()) for cls in Activation.kinds.values())
    add("every activation", dataclasses.replace(base, n_layers=len(activations), mlp=activations))
    add("one key head", dataclasses.replace(base, attention=Causal(n_heads=4, n_kv_heads=1, head_dim=6)))
    add("window", dataclasses.replace(base, attention=Causal(n_heads=4, window=3)))
    add("biases", dataclasses.replace(base, bias=True, norm=LayerNorm()))
    add("dropout", dataclasses.replace(base, dropout=0.2))
    add("untied", dataclasses.replace(base, tie_embeddings=False))
    add("one layer", dataclasses.replace(base, n_layers=1))
    lists = dataclasses.replace(
        base,
        n_layers=3,
        attention=Causal(n_heads=(2, 4, 1), n_kv_heads=1, window=(3, None, 5), head_dim=4),
        mlp=(Plain(hidden=24), SwiGLU(hidden=8), Plain()),
        norm=(RMSNorm(), LayerNorm(), RMSNorm(eps=1e-3)),
        position=(Rotary(), NoPosition(), Rotary(base=100.0)),
    )
    add("a list per layer", lists)
    return {", ".join(names): spec for spec, names in specs.items()}
