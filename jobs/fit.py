"""The stage fit as a job: `ray job submit --working-dir . -- python -m jobs.fit CONFIG key=value ...`."""

import sys

from jobs.job import main

if __name__ == "__main__":
    sys.exit(main("fit"))
