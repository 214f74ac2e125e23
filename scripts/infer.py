"""`python -m scripts.infer`: the command `earlytom-infer` from a checkout."""

import sys

from engines.infer import main

if __name__ == "__main__":
    sys.exit(main())
