"""Let waiting OpenMP threads sleep, as the command line does. To be imported before torch, which reads it then.

A user's own OMP_WAIT_POLICY wins.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
