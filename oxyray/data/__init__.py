"""Tables in, requests out: canonical tables and their checks, importers, splits, the prepared form on disk, batches, and the embedded
shop."""
