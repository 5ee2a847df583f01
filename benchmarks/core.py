"""CORE of small models: the tables of `pipelines.evaluate core`, and its speed beside one forward pass per item.

    python -m benchmarks.core bundle=BUNDLE NAME=RESULTS.json ... [out=benchmarks/results] [items=48]

RESULTS.json are what the command has written. Peer, written here: every item by itself, its choices stacked, logits of
every position, as the public evaluation does it (karpathy/nanochat: nanochat/core_eval.py). Both answer the same items
of SAMPLE with the model of each results file, in turns; times are CPU seconds of this process, one thread, so that a
busy machine does not change them much. Data: the task files, by name and sha256, as the results say.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from pipelines.lib.core.prompts import spans_of, texts_of
from pipelines.lib.core.scorer import judge
from pipelines.lib.core.tasks import Task, open_bundle, read_items
from pipelines.lib.core.workers import open_reader
from pipelines.lib.model_folder import open_folder

SAMPLE = ("hellaswag_zeroshot", "copa", "openbook_qa", "winogrande", "bigbench_qa_wikidata", "commonsense_qa")


@torch.no_grad()
def one_by_one(model: Any, encode: Any, prefix: int | None, task: Task, n: int, context: int) -> list[bool]:
    """The peer: a forward pass per item over all its answers."""
    items, correct = read_items(task), []
    for i in range(n):
        spans = spans_of(task, texts_of(task, items, i), encode, prefix)
        cut = [(s.ids[-context:], s.start - max(0, len(s.ids) - context)) for s in spans]
        ids = torch.zeros(len(cut), max(len(t) for t, _ in cut), dtype=torch.long)
        for row, (t, _) in enumerate(cut):
            ids[row, : len(t)] = torch.from_numpy(t)
        logits = model(ids).logits
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(
            len(cut), -1
        )
        if task.kind == "language_modeling":
            t, start = cut[0]
            correct.append(bool((logits[0, start - 1 : len(t) - 1].argmax(-1) == ids[0, start : len(t)]).all()))
        else:
            means = [float(losses[row, start - 1 : len(t) - 1].mean()) for row, (t, start) in enumerate(cut)]
            correct.append(means.index(min(means)) == items[i]["gold"])
    return correct


def speed(folder: Path, tasks: tuple[Task, ...], n: int, context: int) -> list[dict[str, Any]]:
    """CPU seconds of both on the first n items of each task, and whether every answer is the same."""
    model, (encode, prefix) = open_folder(folder), open_reader(folder)
    rows = []
    for task in tasks:
        count = min(n, len(read_items(task)))
        ours_s, peer_s = float("inf"), float("inf")
        for _ in range(2):
            began = time.process_time()
            ours = list(judge(model, encode, prefix, task, range(count), context).correct)
            between = time.process_time()
            theirs = one_by_one(model, encode, prefix, task, count, context)
            ours_s, peer_s = min(ours_s, between - began), min(peer_s, time.process_time() - between)
        row = {
            "task": task.label,
            "items": count,
            "ours_items_per_cpu_s": round(count / ours_s, 1),
            "peer_items_per_cpu_s": round(count / peer_s, 1),
            "ratio": round(peer_s / ours_s, 2),
            "same_answers": ours == theirs,
        }
        print(row, flush=True)
        rows.append(row)
    return rows


def table(results: dict[str, Any]) -> list[str]:
    """The per-task table of one results file as Markdown."""
    lines = [
        "| task | accuracy | chance | centred | items | shots | cut | items per worker second |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    entries = dict(results["tasks"])
    core = entries.pop("core")["metrics"]["core"]
    for name, row in entries.items():
        acc, score = row["metrics"]["acc"], row["metrics"]["centred"]
        lines.append(
            f"| {name.removeprefix('core/')} | {acc['value']:.3f} ± {acc['stderr']:.3f} | {row['chance']:.3f} "
            f"| {score['value']:+.3f} ± {score['stderr']:.3f} | {row['documents']} of {row['documents_in_all']} "
            f"| {row['num_fewshot']} | {row['cut']} | {row['documents'] / row['seconds']:.1f} |"
        )
    told = results["core"]
    lines.append("")
    lines.append(
        f"**CORE {core['value']:+.4f} ± {core['stderr']:.4f}** over {len(entries)} tasks; {told['items']:,} items in "
        f"{told['wall_seconds']:,.0f} s ({told['items_per_second']:.1f} items/s); {results['cut_prompts']:,} prompts "
        f"longer than the context of {told['context']} tokens were cut on the left."
    )
    return lines


def main(words: list[str]) -> None:
    settings = dict(word.split("=", 1) for word in words)
    out, n = Path(settings.pop("out", "benchmarks/results")), int(settings.pop("items", 48))
    bundle = Path(settings.pop("bundle"))
    torch.set_num_threads(1)
    tasks = tuple(task for task in open_bundle(bundle) if task.label in SAMPLE)
    models: dict[str, Any] = {}
    given = " ".join(f"{name}=RESULTS.json" for name in settings)
    lines = [
        "# CORE of two small models",
        "",
        f"Command of this page: `python -m benchmarks.core bundle=BUNDLE {given}`; of each table: below it. "
        f"{time.strftime('%Y-%m-%d', time.gmtime())}, {platform.machine()}, torch {torch.__version__}.",
    ]
    for name, path in settings.items():
        results = json.loads(Path(path).read_text(encoding="utf-8"))
        config, model = results["config"], results["model"]
        rows = speed(Path(model["folder"]), tasks, n, results["core"]["context"])
        models[name] = {"tasks": results["tasks"], "core": results["core"], "model": model, "speed": rows}
        lines += ["", f"## {name}", "", *table(results), ""]
        lines += [
            f"{model['class']}, {model['parameters']:,} parameters, {model['dtype']}, weights sha256 "
            f"`{next(iter(model['sha256'].values()))}`. Command: `python -m pipelines.evaluate core RUN bundle=BUNDLE "
            f"limit={config['limit']} device={config['device']} threads={config['threads']}`, {results['date'][:10]}.",
            "",
            "| task | items | batched by length, items per CPU second | one forward per item | ratio | same answers |",
            "| --- | ---: | ---: | ---: | ---: | --- |",
        ]
        lines += [
            f"| {r['task']} | {r['items']} | {r['ours_items_per_cpu_s']} | {r['peer_items_per_cpu_s']} | {r['ratio']} "
            f"| {'yes' if r['same_answers'] else 'NO'} |"
            for r in rows
        ]
    lines += ["", "## Data", "", "| file | sha256 |", "| --- | --- |"]
    lines += [f"| CORE, {label} | `{digest}` |" for label, digest in results["core"]["files"].items()]
    out.mkdir(parents=True, exist_ok=True)
    for kept in models.values():  # paths of one machine say nothing elsewhere
        kept["core"]["bundle"] = {"sha256": kept["core"]["bundle"]["sha256"]}
        kept["model"] = {k: v for k, v in kept["model"].items() if k not in ("folder", "run")}
    (out / "core_tiny.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / "core_tiny.json").write_text(json.dumps(models, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {out / 'core_tiny.md'}")


if __name__ == "__main__":
    main(sys.argv[1:])
