"""One short script a stage, for `ray job submit -- python -m jobs.extract CONFIG key=value ...`."""
