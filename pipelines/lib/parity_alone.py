"""lm-eval on an exported folder as a stranger has it: a script that pipelines.lib.parity runs by its path.

    python -I parity_alone.py ASKED.json ANSWERS.json

Packages named in ASKED["hide"] cannot be imported, so the folder must bring all it needs.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main(asked: str, answers: str) -> None:
    tree: dict[str, Any] = json.loads(Path(asked).read_text(encoding="utf-8"))
    for name in tree["hide"]:
        sys.modules[name] = None  # type: ignore[assignment]  # importing it now fails

    import transformers
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tree["folder"], trust_remote_code=True)
    if tokenizer.pad_token is None and tokenizer.eos_token is None and tokenizer.unk_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)  # else a new id, beyond the model's, is added
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tree["folder"], trust_remote_code=True, dtype="float32", local_files_only=True
    )
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=tree["context"])
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        encode = tokenizer.encode  # lm-eval would look for the prefix that is not there
        harness.tok_encode = lambda string, *more, **options: encode(string, add_special_tokens=False)
    requests = [Instance("loglikelihood", {}, tuple(pair), i) for i, pair in enumerate(tree["pairs"])]
    found = harness.loglikelihood(requests, disable_tqdm=True)
    Path(answers).write_text(json.dumps([[float(a), bool(b)] for a, b in found]), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
