"""All stages as one job: `ray job submit --working-dir . -- python -m jobs.run CONFIG key=value ...`."""

import sys

from jobs.job import ALL, main

if __name__ == "__main__":
    sys.exit(main(ALL))
