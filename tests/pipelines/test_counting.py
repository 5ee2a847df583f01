"""What is counted of a training step equals the bytes of the real one."""

from __future__ import annotations

import pytest
import torch

from models.families import create
from models.loss import Loss
from models.spec import build
from pipelines.lib.counting import Live, count
from pipelines.lib.training import TrainConfig
from tests.pipelines.tiny import tiny_config


def config(**changes) -> TrainConfig:
    return build(TrainConfig, tiny_config("data", "out", **changes))


def size(tensors) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("tied", [True, False])
def test_weights_gradients_and_optimizer_state_are_those_of_a_real_update(tied):
    c = config(model={"tie_embeddings": tied})
    counted = count(c)
    model = create(c.model).train()
    optimizers = c.optim.build(model)
    batch = torch.zeros(c.micro_batch, c.context, dtype=torch.int64)
    Loss(model)(batch, batch)[0].backward()
    for optimizer in optimizers.values():
        optimizer.step()
    parameters = list(model.parameters())
    assert counted.parameters == c.model.n_parameters() == sum(p.numel() for p in parameters)
    assert counted.weights == size([*parameters, *model.buffers()])
    assert counted.gradients == size(p.grad for p in parameters)
    state = [v for o in optimizers.values() for s in o.state.values() for v in s.values() if torch.is_tensor(v)]
    assert counted.optimizer == size(state)
    assert counted.macs_per_token == model.flops_per_token(c.context) / 6


def test_activations_hold_at_least_what_autograd_saves_and_grow_with_the_rows():
    c = config()
    saved: dict[int, int] = {}

    def keep(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    model = create(c.model).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    batch = torch.zeros(c.micro_batch, c.context, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss, _ = Loss(model)(batch, batch)
    truth = sum(n for pointer, n in saved.items() if pointer not in own)
    counted = count(c)
    assert truth <= counted.activations <= 1.6 * truth
    double = count(config(micro_batch=8, batch_tokens=32 * 16))
    assert double.activations == pytest.approx(2 * counted.activations, rel=0.2)
    assert double.logits == 2 * counted.logits == 2 * (2 * 4 * 4 * 32 * 128)
    assert count(config(activation_checkpointing=True)).activations < 0.8 * counted.activations
    loss.backward()


def test_a_peak_has_the_gradients_twice_only_where_micro_batches_add_up():
    counted = count(config())
    assert counted.peak(True) - counted.peak(False) == counted.gradients
    assert counted.peak(False) == counted.weights + counted.optimizer + counted.activations


def test_counting_leaves_the_random_generator_and_the_memory_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    count(config(model={"dropout": 0.1}, mask_documents=True, precision="bf16"))
    assert torch.equal(before, torch.get_rng_state())


def test_what_is_alive_is_counted_by_storage_and_only_while_it_is():
    with Live() as live:
        a = torch.zeros(1000)
        b = a[10:]
        c = a + 1
        assert live.now == 8000
        del c
        assert (live.now, live.most) == (4000, 8000)
        live.mark()
        del a
        assert (live.now, live.most) == (4000, 4000), "a view keeps the storage"
        del b
        assert live.now == 0
