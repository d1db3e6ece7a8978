"""The command line of this checkout: `python run.py -data SPAR -algo FedAvg,FedKDX -m cnn -jr 0.4 -gr 20`."""

import sys

from fedkdx_plugin.cli.program import main

if __name__ == "__main__":
    sys.exit(main())
