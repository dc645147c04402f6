"""The stage name as a job: `ray job submit --working-dir . -- python -m jobs.name CONFIG key=value ...`."""

import sys

from jobs.job import main

if __name__ == "__main__":
    sys.exit(main("name"))
