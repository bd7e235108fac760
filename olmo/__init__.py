"""Train OLMo-compatible language models, inject knowledge into them, and look at their memories."""

import os

# OpenMP threads that wait for each other spin. On a machine with other work, a spinning thread keeps the one it waits
# for from running, and training falls to a tenth of its speed; a short spin costs nothing on an idle machine.
# The OpenMP runtime reads this once, when torch loads it, therefore it is set here.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
