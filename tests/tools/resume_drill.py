"""Kill trainings by SIGKILL, resume them, and compare their final weights with an unbroken run's.

They are killed at every step that they take on the file system, and at random times; the weights
must agree bit for bit. This is a process of its own, because it forks trainings from a state in
which torch has run nothing. Run as ``python resume_drill.py CONFIG LEAST SECONDS``: at least LEAST
trainings are killed, and more until SECONDS are over. tests/tools/test_resume.py and
tests/detection/test_resume.py run it.
"""

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import mmengine.config.config
import torch

from linsight.tools.config import load_config
from linsight.tools.train import train

# mmengine formats the config for every checkpoint, which takes longer than these trainings.
mmengine.config.config.FormatCode = lambda code, **style: (code, True)


def start(config: Path, work_dir: Path, resume: bool, kill_at: int | None = None) -> int:
    """Fork a training that kills itself at its nth file system step in the work dir."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        log = os.open(
            work_dir.parent / f"{work_dir.name}.log", os.O_CREAT | os.O_APPEND | os.O_RDWR
        )
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        steps = 0

        def count(event: str, args: tuple) -> None:
            nonlocal steps
            writing = event == "open" and args[1] is not None and "w" in str(args[1])
            inside = args and str(args[0]).startswith(str(work_dir)) and str(args[0])[-4:] != "json"
            if inside and (writing or event in ("os.rename", "os.remove")):
                steps += 1
                if steps == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        # Figures take longer than these trainings.
        words = ["default_hooks.learning_curve=None", "default_hooks.predictions=None"]
        train(str(config), words, work_dir=work_dir, resume=resume)
        Path(f"{work_dir}.steps").write_text(str(steps))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def finish(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(config: Path, least: int, seconds: float) -> None:
    folder = config.parent
    load_config(config)  # Once for all trainings: it imports what the config names.
    begin = time.monotonic()
    assert finish(start(config, folder / "unbroken", resume=False)) == 0
    length = time.monotonic() - begin
    steps = int((folder / "unbroken.steps").read_text())
    last = Path((folder / "unbroken" / "last_checkpoint").read_text()).name
    wanted = torch.load(folder / "unbroken" / last, weights_only=False)

    rng = random.Random(0)
    # Trainings are killed at random times, twice in one run, and at every step that a checkpoint
    # takes, in random order, as long as there is time.
    kills = [None, *rng.sample(range(1, steps + 1), steps)]
    kills.insert(2, None)
    done = 0
    for number, kill_at in enumerate(kills):
        if number >= least and time.monotonic() - begin > seconds:
            break
        work_dir = folder / f"killed_{number}"
        pid = start(config, work_dir, resume=False, kill_at=kill_at)
        for again in (True, False):
            if kill_at is None:
                time.sleep(rng.uniform(0.1, 0.9) * length)
                os.kill(pid, signal.SIGKILL)
            code = finish(pid)
            assert code in (-signal.SIGKILL, 0), f"{work_dir}.log: exit code {code}"
            if kill_at is not None or not again:
                break
            pid = start(config, work_dir, resume=True)
        code = finish(start(config, work_dir, resume=True))
        assert code == 0, Path(f"{work_dir}.log").read_text()[-2000:]
        found = torch.load(work_dir / last, weights_only=False)
        for part in wanted.keys() & {"state_dict", "ema_state_dict"}:
            for key, value in wanted[part].items():
                assert torch.equal(value, found[part][key]), f"{work_dir}, step {kill_at}: {key}"
        assert sorted(p.name for p in work_dir.glob("best*")), work_dir
        assert Path((work_dir / "last_checkpoint").read_text()).is_file()
        done += 1
    print(f"{done} killed trainings of {length:.1f} s and {steps} steps each end alike")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
