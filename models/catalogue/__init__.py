"""The catalogue of parts, read from the registries alone: `python -m models.catalogue` prints it."""
