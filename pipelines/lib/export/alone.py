"""Opens an exported folder as a stranger would, with transformers and torch alone, and writes down what it finds.

    python -I alone.py FOLDER QUESTIONS.json ANSWERS

A script of its own: `verify` runs it by its path, so nothing of ours is imported, and what the installation would offer
under the names in QUESTIONS["hide"] is hidden. ANSWERS.json and ANSWERS.safetensors hold what it found.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any


class Hidden:
    """A finder of modules that does not find some packages."""

    def __init__(self, finder: Any, names: set[str]) -> None:
        self.finder, self.names = finder, names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return None if name.partition(".")[0] in self.names else self.finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


def digest(tensor: Any) -> str:
    """sha256 of a tensor's dtype, shape and bytes."""
    import torch

    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + content).hexdigest()


def main(folder: str, questions: str, answers: str) -> None:
    asked = json.loads(Path(questions).read_text(encoding="utf-8"))
    hide = set(asked["hide"])
    sys.meta_path[:] = [Hidden(finder, hide) for finder in sys.meta_path]

    import torch
    import transformers
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    torch.set_num_threads(asked["threads"])
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    code = {"trust_remote_code": True} if asked["code"] else {}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", local_files_only=True, output_loading_info=True, **code
    )
    model, info = loaded
    found: dict[str, Any] = {
        "class": type(model).__name__,
        "missing": sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"]),
        "weights": {name: digest(tensor) for name, tensor in model.state_dict().items()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    model.eval()
    prompt = torch.tensor(asked["rows"][0])[None]
    model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1)  # by its own settings
    model = model.float()
    width = max(map(len, asked["rows"]))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in asked["rows"]])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in asked["rows"]])
    with torch.no_grad():
        logits = {f"row_{i}": model(torch.tensor([row])).logits[0] for i, row in enumerate(asked["rows"])}
    model.generation_config = GenerationConfig(max_new_tokens=asked["new"], do_sample=False, pad_token_id=0)
    found["generated"] = model.generate(ids, attention_mask=mask)[:, width:].tolist()
    if asked["text"] is not None:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **code)  # it opens the config, too
        found["tokens"] = tokenizer(asked["text"])["input_ids"]
        found["decoded"] = tokenizer.decode(found["tokens"], skip_special_tokens=True)
        if asked["chat"] is not None:
            found["chat"] = tokenizer.apply_chat_template(asked["chat"], tokenize=False, add_generation_prompt=True)
    found["imported"] = sorted(hide & {name.partition(".")[0] for name in sys.modules})
    save_file({name: tensor.contiguous() for name, tensor in logits.items()}, f"{answers}.safetensors")
    Path(f"{answers}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
