"""Programs that look at data, models and many runs: each a package of its own."""
