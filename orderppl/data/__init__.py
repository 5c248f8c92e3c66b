"""Data sets, tokenisers and collation, with `datasets.Dataset` as the container."""
