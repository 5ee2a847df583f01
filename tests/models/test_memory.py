"""Decoding memory against a dictionary, and the moves that generate(), beams and an engine make on it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.memory import At, Field, Mem, Slots, visible


def slots(rows=3, length=8, state=False):
    fields = {"k": Field((2, 4)), "c": Field((5,))}
    if state:
        fields["h"] = Field((3, 2), per_token=False)
    return Slots([fields, fields], rows, length)


def test_token_axis_is_second_to_last_and_states_have_none():
    mem = Mem({"k": Field((2, 4)), "c": Field((5,)), "h": Field((3, 2), False)}, 3, 8, torch.float32, "cpu")
    assert {n: tuple(t.shape) for n, t in mem.tensors.items()} == {"k": (3, 2, 9, 4), "c": (3, 9, 5), "h": (3, 3, 2)}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_append_remembers_what_a_dictionary_remembers(data):
    """Any schedule of calls over any rows, with pads, by tensor or slice rows or a common start."""
    R, L = 3, 12
    mem = Mem({"k": Field((2, 2)), "c": Field((3,))}, R, L, torch.float32, "cpu")
    truth: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
    filled = [0] * R
    for _ in range(data.draw(st.integers(1, 6))):
        form = data.draw(st.sampled_from(["tensor", "slice", "start"]))
        if form == "tensor":
            used = data.draw(st.permutations(range(R)))[: data.draw(st.integers(1, R))]
        elif form == "slice":
            first = data.draw(st.integers(0, R - 1))
            used = list(range(first, data.draw(st.integers(first + 1, R))))
        else:
            used = list(range(R))
            filled = [min(filled)] * R  # a common start: rows that are ahead are rolled back, which is only an integer
        T = data.draw(st.integers(1, 4))
        n = [min(data.draw(st.integers(0, T)), L - filled[r]) for r in used]
        if form == "start":
            T = min(T, L - filled[0])
            n = [T] * R
        if T == 0:
            continue
        k, c = torch.randn(len(used), 2, T, 2), torch.randn(len(used), T, 3)
        upto = max(filled[r] + m for r, m in zip(used, n, strict=True))
        pos = torch.tensor([[filled[r] + j for j in range(T)] for r in used])
        rows = {"tensor": torch.tensor(used), "slice": slice(used[0], used[-1] + 1), "start": None}[form]
        at = At(
            pos, None if form == "start" else torch.tensor(n), rows, upto, start=filled[0] if form == "start" else None
        )
        all_k, all_c = mem.append(at, k=k, c=c)
        assert all_k.shape == (len(used), 2, upto, 2) and all_c.shape == (len(used), upto, 3)
        for i, r in enumerate(used):
            for j in range(n[i]):
                truth[r, filled[r] + j] = (k[i, :, j], c[i, j])
            filled[r] += n[i]
            for p in range(filled[r]):
                assert torch.equal(all_k[i, :, p], truth[r, p][0]) and torch.equal(all_c[i, p], truth[r, p][1])


def test_neighbouring_rows_are_read_without_a_copy():
    mem = Mem({"k": Field((2, 4))}, 4, 8, torch.float32, "cpu")
    at = At(torch.zeros(2, 1, dtype=torch.long), rows=slice(1, 3), upto=1)
    (k,) = mem.append(at, k=torch.ones(2, 2, 1, 4))
    assert k.data_ptr() == mem.tensors["k"][1].data_ptr()
    assert mem.tensors["k"][:, :, 0].sum(dim=(1, 2)).tolist() == [0, 8, 8, 0]


def test_too_many_tokens_name_both_numbers():
    mem = Mem({"c": Field((3,))}, 1, 4, torch.float32, "cpu")
    with pytest.raises(ValueError, match="5 tokens do not fit in a memory of length 4"):
        mem.append(At(torch.tensor([[4]]), upto=5), c=torch.zeros(1, 1, 3))


def test_growing_keeps_what_was_written_and_at_least_doubles():
    s = slots(length=4)
    x = torch.randn(3, 2, 4, 4)
    s[0].append(At.full(3, 4), k=x)
    s.grow(5)
    assert s.length == 8
    assert torch.equal(s[0].tensors["k"][:, :, :4], x)
    s.grow(100)
    assert s.length == 100 and s[1].tensors["c"].shape == (3, 101, 5)


def test_reset_rows_clears_states_and_even_nan():
    s = slots(state=True)
    for mem in s.mem:
        for t in mem.tensors.values():
            t.fill_(float("nan"))
    s.reset_rows([1])
    for mem in s.mem:
        for t in mem.tensors.values():
            assert (t[1] == 0).all() and t[0].isnan().all()


def test_reordering_moves_tokens_and_states_of_every_application():
    s = slots(state=True)
    for mem in s.mem:
        for t in mem.tensors.values():
            t.copy_(torch.arange(3.0).view(3, *[1] * (t.dim() - 1)).expand_as(t))
    s.reorder_cache(torch.tensor([2, 2, 0]))
    for mem in s.mem:
        for t in mem.tensors.values():
            assert t.flatten(1)[:, 0].tolist() == [2, 2, 0]
    s.batch_repeat_interleave(2)
    assert s.batch_size == 6 and s[0].tensors["h"].flatten(1)[:, 0].tolist() == [2, 2, 2, 2, 0, 0]
    s.batch_select_indices(torch.tensor([5]))
    assert s.batch_size == 1


def test_rolling_back_is_an_integer_without_states():
    s = slots()
    s.seen = 6
    s.crop(-2)
    assert s.get_seq_length() == 4
    s.crop(3)  # transformers before 5.20: the length to keep
    assert s.seen == 3 and s.is_croppable
    with pytest.raises(ValueError, match="only 3 were seen"):
        s.rollback(4)


def test_rolling_back_a_state_needs_its_snapshot():
    s = slots(state=True)
    s.seen = 2
    s[0].tensors["h"].fill_(1.0)
    before = s.snapshot()
    some = s.snapshot(torch.tensor([1]))
    s[0].tensors["h"].fill_(2.0)
    s.seen = 5
    with pytest.raises(ValueError, match="take snapshot"):
        s.rollback(2)
    assert not s.is_croppable
    s.restore(some)
    assert s[0].tensors["h"].flatten(1)[:, 0].tolist() == [2, 1, 2]
    s.restore(before)
    assert s.seen == 2 and (s[0].tensors["h"] == 1).all()


def test_states_are_read_and_written_by_row():
    mem = Mem({"h": Field((2,), False)}, 4, 1, torch.float32, "cpu")
    pos = torch.zeros(2, 1, dtype=torch.long)
    mem.write(At(pos, rows=torch.tensor([3, 0])), "h", torch.tensor([[1.0, 1.0], [2.0, 2.0]]))
    assert mem.read(At(pos), "h")[:, 0].tolist() == [2, 0, 0, 1]
    assert mem.read(At(pos, rows=slice(2, 4)), "h")[:, 0].tolist() == [0, 1]


def test_visible_is_the_definition():
    """Key j of position p is seen from q iff p <= q, within the window and in the same document."""
    pos = torch.tensor([[0, 1, 2, 0, 1]])
    doc = torch.tensor([[0, 0, 0, 1, 1]])
    got = visible(At(pos, upto=5, doc=doc), False, window=2)
    for i in range(5):
        for j in range(5):
            want = doc[0, i] == doc[0, j] and pos[0, j] <= pos[0, i] and pos[0, j] > pos[0, i] - 2
            assert bool(got[0, i, j]) == bool(want)
    at = At(torch.tensor([[2], [4]]), rows=torch.tensor([0, 1]), upto=5)
    assert visible(at, True).int().tolist() == [[[1, 1, 1, 0, 0]], [[1, 1, 1, 1, 1]]]
    assert visible(at, True, window=2).int().tolist() == [[[0, 1, 1, 0, 0]], [[0, 0, 0, 1, 1]]]


def test_every_query_sees_a_key_even_a_pad_far_behind_its_row():
    at = At(torch.tensor([[3, 90, 91]]), torch.tensor([1]), torch.tensor([0]), upto=4)
    for window in (None, 2):
        assert visible(at, True, window).any(-1).all()


def test_bytes_held_are_those_of_the_tensors():
    s = slots(rows=3, length=8)
    assert s.nbytes() == 2 * (3 * 2 * 9 * 4 + 3 * 9 * 5) * 4
