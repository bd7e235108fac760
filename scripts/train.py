"""Train a model: one process, or any number under torchrun, srun or mpirun.

    python -m scripts.train CONFIG [--device=cpu] [--key.sub=value ...]
    torchrun --nproc_per_node=2 -m scripts.train CONFIG [--key.sub=value ...]
    srun --ntasks=8 python -m scripts.train CONFIG [--key.sub=value ...]
    python -m scripts.train --help-config [KEY]

The last prints what the keys of a configuration mean and what they may be: all, one, or those of a section.

The default device is CUDA if there is one, else Apple's GPU (mps, one process only), else the CPU.

SIGTERM, control-C and SIGUSR1 (SLURM's warning) let a run finish its step, save and end; a second signal ends it at
once. The same command with --try_load_latest_save resumes it.

Exit status: 0 when the last step is done; 75 if a signal or time_limit ended the run early, and it is saved; 2 for a
wrong command line or configuration; 1 for a failure while running; 128 + its number for a second signal. `--debug`
prints the traceback of an error.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from olmo.checkpoint import complete
from olmo.config import load
from olmo.config.help import LEGEND, describe
from olmo.console import StdoutHandler
from olmo.distributed import adopt_launcher, disable_malloc_trim, exit_process
from olmo.exceptions import ConfigurationError, FailedOnAllRanks, Interrupted, exit_status


def main(argv: Sequence[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__.strip())
        if not argv:
            raise ConfigurationError("no configuration given")
        return
    if argv[0] == "--help-config":
        if len(argv) > 2:
            raise ConfigurationError(f"--help-config: expected one key, got {' '.join(argv[1:])}")
        return print(f"{describe(*argv[1:])}\n({LEGEND})")
    adopt_launcher()
    named = [flag for flag in argv[1:] if flag.partition("=")[0] == "--device"]
    try:
        config = load(argv[0], [flag for flag in argv[1:] if flag not in named], complete)
    except ConfigurationError:
        raise
    except (ValueError, OSError) as error:  # of the model's folder, which all processes read
        raise FailedOnAllRanks(str(error)) from error
    logging.basicConfig(format="%(message)s", handlers=[StdoutHandler()])
    from olmo.distributed import pick_device, process_group  # torch, which no check so far needs
    from olmo.train import Signals, Trainer

    disable_malloc_trim()
    device = pick_device(named[-1].partition("=")[2] if named else None)
    # Signals are handled only after all processes have joined: until then they end a process that waits for another.
    with process_group(device, config.collective_timeout) as ranks, Signals() as signals:
        try:
            Trainer(config, device, ranks, signals).fit()
        except Interrupted:  # the run is saved: a late signal must not change the exit status
            signals.ignored = True
            raise


if __name__ == "__main__":
    exit_process(exit_status(main))
