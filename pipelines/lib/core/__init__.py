"""CORE: 22 tasks of in-context learning that a base model of any size can be ranked by, from DCLM (arXiv:2406.11794).

tasks.py      the bundle of task files: which tasks, their settings, chance levels and items
archive.py    the public download, or any archive of the same layout
prompts.py    an item as token sequences with a scored span
scorer.py     log-likelihoods of spans, batched by length
workers.py    the work as Ray tasks, or here
aggregate.py  accuracy -> centred score -> CORE, with standard errors
command.py    `python -m pipelines.evaluate core RUN`
"""
