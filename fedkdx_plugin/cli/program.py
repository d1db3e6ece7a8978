"""Start of the programs `fedkdx` and `run.py`: Ctrl-C ends them in one piece also while they are being imported.

Nothing is imported here before the handler is set: Python's own prints the traceback of the import that it cuts off,
and another one where a further Ctrl-C comes while the program ends.
"""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored, as under nohup
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from fedkdx_plugin.cli.main import main

__all__ = ["main"]
