"""Several runs trained and evaluated together."""
