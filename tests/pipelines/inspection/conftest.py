"""One small trained run that the tests of this folder share; they only read it."""

from __future__ import annotations

import pytest

from tests.pipelines.tiny import make_tokens

SMALL = (
    "model.d_model=32 model.n_layers=2 model.seq_len=32 model.attention.n_heads=2 model.position=rotary "
    "batch_tokens=384 micro_batch=4 log_every=1 eval_every=10 sample_prompts=[] device=cpu threads=1 num_workers=0"
).split()


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run folder with checkpoints step_10 and step_20 of a two-layer model on bytes; its data lies in ../data."""
    from pipelines.train import main

    root = tmp_path_factory.mktemp("trained")
    data = make_tokens(root / "data")
    words = [f"data={data}", f"out={root / 'run'}", *SMALL, "steps=20", "keep_last=0", "track=none"]
    assert main(words) == 0
    return root / "run"
