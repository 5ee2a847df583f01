"""Runs of words by numbers against runs of words by text."""

from __future__ import annotations

import random

import numpy as np

from pipelines.lib.ngrams import hashes_of, index_of, runs_of, size_for, words_of


def test_words_are_letters_and_digits_in_lower_case():
    assert words_of("«Où est LE chat?» it's 3.5_x — ok") == ["où", "est", "le", "chat", "it", "s", "3", "5", "x", "ok"]
    assert words_of(" ... ") == []


def test_equal_runs_have_equal_numbers_and_others_do_not():
    pick = random.Random(0)
    words = [pick.choice("abcdefg") for _ in range(3000)]
    for n, numbers in runs_of(hashes_of(words), [1, 3, 8]):
        texts = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
        assert len(numbers) == len(texts) and len(set(numbers.tolist())) == len(set(texts))
        assert len(set(zip(numbers.tolist(), texts, strict=True))) == len(set(texts))
    assert [n for n, _ in runs_of(hashes_of(["a", "b"]), [1, 2, 3])] == [1, 2]


def test_what_is_found_is_what_both_texts_have():
    pick = random.Random(1)
    items = {n: [[pick.choice("abcde") for _ in range(pick.randint(n, 20))] for _ in range(20)] for n in (4, 6)}
    text = [pick.choice("abcde") for _ in range(500)]
    index = index_of(items)
    found = index.found(text)
    in_text = lambda n: {" ".join(text[i : i + n]) for i in range(len(text) - n + 1)}
    for n, several in items.items():
        of_items = {" ".join(w[i : i + n]) for w in several for i in range(len(w) - n + 1)}
        shared = of_items & in_text(n)
        assert shared and len(found[n]) == len(shared)
        expected = {int(next(runs_of(hashes_of(run.split()), [n]))[1][0]) for run in shared}
        assert set(found[n].tolist()) == expected
    assert index_of({5: []}).found(text) == {} and index.found([]) == {}


def test_the_length_of_runs_is_the_5th_percentile_within_bounds():
    lengths = list(range(1, 101))
    assert size_for(lengths, 1, 100) == int(np.percentile(lengths, 5)) == 5
    assert size_for(lengths, 8, 13) == 8 and size_for([100] * 9, 8, 13) == 13 and size_for([], 8, 13) == 13
