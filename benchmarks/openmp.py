"""Let waiting OpenMP threads sleep, as the command line does. Import this before torch, which reads the variable.

An OMP_WAIT_POLICY that is already set takes precedence.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
