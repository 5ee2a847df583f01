"""What is measured inside a model, against plain loops and numpy in float64."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from scipy import stats

from models.lm import LM
from pipelines.lib.inspection.activations import Head, Running, States, add_heads, observe, slope
from tests.serving.tiny import foreign, gpt

IDS = torch.arange(60).reshape(3, 20) * 7 % 290


def exact(model):
    """[names, float64 arrays] of the residual stream after each block, from hooks on the blocks alone."""
    wide, found = copy.deepcopy(model).double(), []
    found.append(wide.embedding(IDS))
    handles = [b.register_forward_hook(lambda m, a, y: found.append(y[0])) for b in wide.applications()]
    with torch.no_grad():
        out = wide(input_ids=IDS, labels=IDS)
    for handle in handles:
        handle.remove()
    return [x.detach().numpy() for x in found], float(out.loss)


def test_the_residual_stream_is_that_of_a_float64_pass_and_batches_do_not_matter():
    model = gpt()
    arrays, loss = exact(model)
    for batches in ([IDS], [IDS[:1], IDS[1:]]):
        seen = observe(model, batches)
        assert list(seen.stream) == ["embedding", "layer 0", "layer 1", "final norm"]
        for running, array in zip(seen.stream.values(), arrays, strict=False):
            assert running.rms == pytest.approx(np.sqrt(np.mean(array**2)), rel=1e-5)
            assert running.kurtosis == pytest.approx(stats.kurtosis(array.ravel()), rel=1e-4, abs=1e-4)
            assert running.largest == pytest.approx(abs(array).max(), rel=1e-5) and running.bad == 0
        assert seen.nats_per_token == pytest.approx(loss, rel=1e-5) and seen.tokens == IDS.numel()
        assert len(torch.cat(seen.final)) == IDS.numel()


def test_branches_are_what_the_layers_add():
    model = gpt()
    seen = observe(model, [IDS])
    given: dict[str, list] = {"mixer": [], "mlp": []}
    for block in model.applications():
        block.mixer.register_forward_hook(lambda m, a, y: given["mixer"].append(y[0]))
        block.mlp.register_forward_hook(lambda m, a, y: given["mlp"].append(y))
    with torch.no_grad():
        model(input_ids=IDS)
    for running, x in zip([*seen.mixers, *seen.mlps], [*given["mixer"], *given["mlp"]], strict=True):
        assert running.rms == pytest.approx(float(x.double().square().mean().sqrt()), rel=1e-5)
    assert not any(hook for b in gpt().applications() for hook in b.mixer._forward_hooks)


def heads_by_hand(weights):
    """[H] of (entropy, share, distance, total), with loops over every row of [B, H, T, T]."""
    B, H, T, _ = weights.shape
    out = []
    for h in range(H):
        rows = []
        for b in range(B):
            for t in range(1, T):
                total = sum(weights[b, h, t, s] for s in range(t + 1))
                p = [weights[b, h, t, s] / total for s in range(t + 1)]
                entropy = -sum(x * math.log(x) for x in p if x > 0)
                back = sum(x * (t - s) for s, x in enumerate(p))
                rows.append((entropy, entropy / math.log(t + 1), back, total))
        out.append([sum(column) / len(rows) for column in zip(*rows, strict=True)])
    return out


def test_head_figures_are_those_of_loops_over_the_rows():
    torch.manual_seed(0)
    weights = (
        (2 * torch.randn(2, 3, 6, 6)).masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -math.inf).softmax(-1)
    )
    weights = weights * torch.tensor([1.0, 0.5, 2.0])[:, None, None]  # a sink, and weights that are no shares
    heads: list[Head] = []
    add_heads(heads, weights[:1])
    add_heads(heads, weights[1:])
    for head, wanted in zip(heads, heads_by_hand(weights.double().numpy()), strict=True):
        mean = head.mean()
        assert [mean[k] for k in ("entropy", "share", "distance", "total")] == pytest.approx(wanted, rel=1e-5)


def test_uniform_attention_has_share_one_and_a_look_at_oneself_zero():
    T = 8
    uniform = torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]
    heads: list[Head] = []
    add_heads(heads, torch.stack([uniform, torch.eye(T)])[None])
    assert heads[0].mean()["share"] == pytest.approx(1) and heads[0].mean()["distance"] == pytest.approx(
        np.mean([t / 2 for t in range(1, T)])
    )
    window = torch.ones(T, T).tril() * torch.ones(T, T).triu(-1) / 2  # two keys in sight, both alike
    add_heads(windowed := [], window[None, None])
    assert windowed[0].mean()["share"] == pytest.approx(1) and windowed[0].mean()["distance"] == pytest.approx(0.5)


@pytest.mark.parametrize("options", [{}, {"window": 5}])
def test_heads_of_our_models_are_those_of_queries_and_keys(options):
    """Recomputed here from the mixer's own matrix and rotation, with no code of its scores."""
    model = gpt(**options)
    seen = observe(model, [IDS])
    assert set(seen.heads) == {0, 1} and all(len(heads) == 4 for heads in seen.heads.values())
    for layer, block in enumerate(model.applications()):
        m, inputs = block.mixer, []
        handle = m.register_forward_hook(lambda mod, a, y, inputs=inputs: inputs.append(a[:2]))
        with torch.no_grad():
            model.hidden(IDS)
            handle.remove()
            x, at = inputs[0]
            q, k, _ = m.project(x, at)
            k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
            scores = (q @ k.transpose(-1, -2)).double() / math.sqrt(q.shape[-1])
            T = scores.shape[-1]
            near = torch.ones(T, T).tril() * torch.ones(T, T).triu(1 - options.get("window", T))
            weights = scores.masked_fill(near == 0, -math.inf).softmax(-1)
        add_heads(wanted := [], weights)
        for head, other in zip(seen.heads[layer], wanted, strict=True):
            assert head.mean() == pytest.approx(other.mean(), rel=1e-4)


def test_a_mixer_that_layers_share_counts_for_each_of_them():
    from models.parts.sharing import Sharing
    from models.spec import build

    model = gpt(n_layers=3, share_attention=build(Sharing, {"kind": "shared", "size": 3}))
    assert len({id(b.mixer) for b in model.applications()}) == 1
    seen = observe(model, [IDS[:1], IDS[1:]])
    assert len(seen.mixers) == len(seen.mlps) == len(seen.heads) == 3
    assert len({round(r.rms, 6) for r in seen.mixers}) == 3


def test_foreign_models_tell_their_own_states_and_weights():
    model = foreign("gpt2")
    model.set_attn_implementation("eager")
    seen = observe(model, [IDS])
    assert list(seen.stream) == ["embedding", "layer 0", "final norm"] and not isinstance(model, LM)
    with torch.no_grad():
        out = model(input_ids=IDS, labels=IDS, output_attentions=True, output_hidden_states=True)
    assert seen.nats_per_token == pytest.approx(float(out.loss), rel=1e-5)
    for heads, weights in zip(seen.heads.values(), out.attentions, strict=True):
        for head, wanted in zip(heads, heads_by_hand(weights.double().numpy()), strict=True):
            assert list(head.mean().values()) == pytest.approx(wanted, rel=1e-4)


def test_a_model_without_attention_weights_has_no_heads():
    seen = observe(foreign("mamba"), [IDS])
    assert seen.heads == {} and seen.stream["embedding"].n


def test_final_states_have_numpys_spectrum():
    torch.manual_seed(0)
    x = torch.randn(500, 24) @ torch.diag(torch.arange(1.0, 25) ** -0.7) + 0.3
    y = x.double().numpy()
    states = States.of(x)
    singular = np.linalg.svd(y, compute_uv=False)
    share = singular / singular.sum()
    assert states.rankme == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    eigen = np.sort(np.linalg.eigvalsh(np.cov(y.T)))[::-1]
    assert states.eigenvalues == pytest.approx(eigen)
    fit = np.polyfit(np.log(np.arange(1, 13)), np.log(eigen[:12]), 1)
    assert states.alpha_req == pytest.approx(-fit[0]) and slope(
        tuple(1 / i**1.4 for i in range(1, 60))
    ) == pytest.approx(1.4)
    assert States.of(torch.eye(6)).rankme == pytest.approx(6)
    assert math.isnan(slope(())) and math.isnan(slope((0.0, 0.0)))


def test_numbers_that_are_not_finite_are_counted():
    running = Running()
    running.add(torch.tensor([1.0, -1.0, math.nan, math.inf]))
    assert running.bad == 2 and running.rms == 1.0 and Running().n == 0 and math.isnan(Running().rms)
    constant = Running()
    constant.add(torch.full((9,), 0.1))
    assert math.isnan(constant.kurtosis)
