import sys

from lib.benchmark.show import main

if __name__ == "__main__":
    sys.exit(main())
