"""`python -m moecomm`."""

import sys

from moecomm.cli import main

if __name__ == "__main__":
    sys.exit(main())
