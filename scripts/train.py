"""Train a model: one process, or any number under torchrun.

    python -m scripts.train CONFIG [--key.sub=value ...]
    torchrun --nproc_per_node=2 -m scripts.train CONFIG [--key.sub=value ...]

Exit status 0 when the last step is done, 2 for a wrong command line or configuration, 1 for a failure while running.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from olmo.config import load
from olmo.distributed import keep_large_blocks, leave, pick_device, process_group
from olmo.exceptions import ConfigurationError, exit_status
from olmo.train import Trainer


def main(argv: Sequence[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__.strip())
        if not argv:
            raise ConfigurationError("no configuration given")
        return
    config = load(argv[0], argv[1:])
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    keep_large_blocks()
    device = pick_device()
    with process_group(device) as ranks:
        Trainer(config, device, ranks).fit()


if __name__ == "__main__":
    leave(exit_status(main))
