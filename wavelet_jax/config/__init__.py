"""The keys of a config: their types and ranges, and configs that runs have saved."""
