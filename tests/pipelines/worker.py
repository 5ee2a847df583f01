"""One worker process of a training test: `python -m tests.pipelines.worker JOB.json RANK SIZE PORT [FAULT]`.

FAULT: `step:N` kills this process (SIGKILL) in the middle of update N, `save:N` while checkpoint N is being written.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path


def arm(fault: str) -> None:
    """Arrange for the kill."""
    kind, _, at = fault.partition(":")
    if kind == "step":
        from pipelines.lib import loop

        apply = loop.Trainer._apply

        def dies(self, *args):
            if self.state.step + 1 == int(at):
                self.checkpoints.wait()  # `save` is the other case; on a busy machine this one would become it
                os.kill(os.getpid(), signal.SIGKILL)
            return apply(self, *args)

        loop.Trainer._apply = dies
    elif kind == "save":
        from pipelines.lib import checkpoint

        save = checkpoint.save_file

        def dies_writing(tensors, path, *args):
            if f"step_{at}/" in str(path).replace(".writing_", ""):
                save(tensors, path, *args)
                os.truncate(path, os.path.getsize(path) // 2)  # as if half of it had reached the disk
                os.kill(os.getpid(), signal.SIGKILL)
            return save(tensors, path, *args)

        checkpoint.save_file = dies_writing


def main() -> None:
    job_file, rank, size, port, *fault = sys.argv[1:]
    import torch

    torch.set_num_threads(1)
    if int(size) > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=int(rank), world_size=int(size)
        )
    from pipelines.lib.loop import train

    for f in fault:
        arm(f)
    outcome = train(json.loads(Path(job_file).read_text()))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    print(json.dumps(vars(outcome)))


if __name__ == "__main__":
    main()
