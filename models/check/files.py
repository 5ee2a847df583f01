"""Checks of files and counts: saving, ties, formulas."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import torch
from torch import nn

from models.check.helpers import Make, Verdict, context, tokens
from models.families import load


def save_load_is_bitwise(make: Make) -> Verdict:
    """save -> load -> save writes the same bytes and the loaded model gives the same logits, bit for bit."""
    model = make().eval()
    ids = tokens(model, 1, context(model, 8))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        first, second = Path(folder, "a"), Path(folder, "b")
        model.save_pretrained(first)
        loaded = load(first)
        loaded.save_pretrained(second)
        for tensor in (*loaded.parameters(), *loaded.buffers()):  # a file's bytes lie where they lie in memory, and
            tensor.data = tensor.data.clone()  # matrix products of unaligned rows differ in the last bit
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


def operations_are_counted(make: Make) -> Verdict:
    """The operations that the spec counts are finite, no fewer than the matrices ask for, and grow with the context.

    A multiply-accumulate is a product and a sum, either of which a part may do without (ternary weights, a table).
    """
    model = make()
    spec, T = model.spec, model.spec.seq_len
    ops = spec.ops(T).counts()
    wrong = [name for name, value in ops.items() if not 0 <= value < float("inf")]
    if wrong:
        return False, f"negative or not finite: {', '.join(wrong)}"
    x = torch.randn(1, spec.d_model, dtype=torch.float64)
    for block in spec.blocks():
        norm = nn.Module.to(block.norm.build(spec.d_model, block.bias), torch.float64)
        if not any(block.norm.ops(spec.d_model, block.bias).counts().values()) and not torch.equal(norm(x), x):
            return False, f"{type(block.norm).__name__} changes its input and counts no operation"
    macs = model.flops_per_token(T) / 6
    if max(ops["multiplies"], ops["additions"]) < 0.99 * macs:
        return (
            False,
            f"{ops['multiplies']:,.0f} products and {ops['additions']:,.0f} sums; the model has {macs:,.0f} MAC",
        )
    fewer = [name for name, value in spec.ops(1).counts().items() if value > ops[name]]
    detail = f"{ops['multiplies']:,.0f} products and {ops['additions']:,.0f} sums for {macs:,.0f} MAC"
    return not fewer, f"more of it at context 1: {', '.join(fewer)}" if fewer else detail
