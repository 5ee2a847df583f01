"""Searches: a space says what varies, a rule which trial comes next, the ledger what is known, Ray Tune runs them."""
