"""Training in several processes of one machine, through `accelerate launch`; in this process where one is enough.

Each process runs the same function on the same arguments; they differ from the first step on, where accelerate deals out the rows. Once
the training is over all but the first leave (`training.fit`), so that whatever is written is written once.
"""

import contextlib
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import Field

from irlign.config import Settings
from irlign.errors import ConfigError, IrlignError, RunError
from irlign.files import hash_path, remove
from irlign.machine import end_with_parent, freed_memory_kept, give_memory_back, has_cuda
from irlign.progress import hush, say

LOG, CONFIG = "launch.log", "accelerate.yaml"
ADDRESS, KEY = "IRLIGN_LAUNCH_ADDRESS", "IRLIGN_LAUNCH_KEY"  # where the processes are told what to do; the key is made anew each time
PATIENCE_S = 30  # for the processes to end by themselves
LAST_WORDS_S = 5  # to hear what a process that has ended had sent
COMMON = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "machine_rank": 0, "mixed_precision": "no", "main_process_port": 0}
PRESETS: dict[str | None, dict[str, Any]] = {  # what `accelerate config` would write
    None: {"distributed_type": "MULTI_GPU"},  # on a CPU too: the Trainer then takes gloo
    "fsdp2": {
        "distributed_type": "FSDP",
        "fsdp_config": {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_reshard_after_forward": True,
            "fsdp_state_dict_type": "FULL_STATE_DICT",
            "fsdp_cpu_ram_efficient_loading": False,
        },
    },
    "zero3": {
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {"zero_stage": 3, "zero3_init_flag": False, "zero3_save_16bit_model": True},
    },
}


class ProcessSettings(Settings):
    """In how many processes SFT, the reward and the policy method train."""

    num_processes: int = Field(
        1,
        ge=1,
        description="processes that train together, one a GPU; a step then has so many times per_device_train_batch_size rows. With a file of "
        "accelerate's: as it says",
    )
    accelerate_config: str | None = Field(
        None,
        description="how the model is split over them: fsdp2, zero3 (needs deepspeed) or a file of accelerate's; null = each has all of it",
    )

    @property
    def count(self) -> int:
        """How many processes there are: `num_processes`, or where that is 1 what the file says."""
        return self.num_processes if self.num_processes > 1 else self._count_in_file or 1

    @property
    def several(self) -> bool:
        """Whether anything is launched at all."""
        return self.num_processes > 1 or self.accelerate_config is not None

    @property
    def identity(self) -> dict[str, Any]:
        """What a manifest says of it, the content of a file too; nothing of one process."""
        if not self.several:
            return {}
        own = {} if self.accelerate_config in PRESETS else {"sha256": hash_path(Path(str(self.accelerate_config)))}
        return {"processes": {**self.model_dump(), "num_processes": self.count, **own}}

    @property
    def sharded(self) -> bool:
        """Whether each process has a part of the model only, as the preset or the file says."""
        if self.accelerate_config in PRESETS:
            return self.accelerate_config is not None
        return self._file.get("distributed_type") in ("FSDP", "DEEPSPEED", "MEGATRON_LM")

    @property
    def _file(self) -> dict[str, Any]:
        """What the user's own file says; nothing of a preset, or where it cannot be read (`check`)."""
        if self.accelerate_config in PRESETS:
            return {}
        with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
            found = yaml.safe_load(Path(str(self.accelerate_config)).read_text(encoding="utf-8"))
            return found if isinstance(found, dict) else {}
        return {}

    @property
    def _count_in_file(self) -> int | None:
        """None where the file leaves it open (accelerate's word for that is -1)."""
        found = self._file.get("num_processes")
        return found if isinstance(found, int) and found > 0 else None

    def check(self) -> None:
        """Raises ConfigError for a configuration file that is not there, no mapping or for another number of processes, zero3 without
        deepspeed, and sharding without a GPU, where accelerate would quietly give each process all of the model."""
        from importlib.util import find_spec

        where = "processes.accelerate_config"
        if self.accelerate_config not in PRESETS and not Path(str(self.accelerate_config)).is_file():
            what = f"there is no preset and no file {self.accelerate_config!r}"
            raise ConfigError(what, where=where, do="use fsdp2 or zero3, or what `accelerate config` writes")
        if self.accelerate_config not in PRESETS and not self._file:
            raise ConfigError(f"{self.accelerate_config} is no configuration", where=where, do="give what `accelerate config` writes")
        if self.num_processes > 1 and self._count_in_file not in (None, self.num_processes):
            what = f"{self.num_processes} processes, and {self.accelerate_config} says {self._count_in_file}"
            raise ConfigError(what, where="processes.num_processes", do="leave it out, or make the file say the same")
        if self.accelerate_config == "zero3" and find_spec("deepspeed") is None:
            raise ConfigError("deepspeed is not installed", where=where, do="pip install deepspeed, or use fsdp2")
        if self.sharded and not has_cuda():
            raise ConfigError("a model is split over GPUs, and torch finds none here", where=where, do="leave it out: num_processes alone")


def launch(
    processes: ProcessSettings, function: Callable[..., dict[str, Any]], *args: Any, checkpoints: Path, **options: Any
) -> dict[str, Any]:
    """`function(*args, checkpoints=checkpoints, **options)`, which trains once by `training.fit`, in so many processes; what it returns in
    the first of them. Raises the IrlignError of any of them, RunError where one ends without a word."""
    options = {"checkpoints": checkpoints, **options}
    if not processes.several:
        return function(*args, **options)
    place = checkpoints / "launch"
    remove(place)
    place.mkdir(parents=True)
    key, count, call = os.urandom(32), processes.count, bytes(ForkingPickler.dumps((function, args, options)))
    with Listener(authkey=key) as listener:  # nothing that could be run is ever read from a file
        exchange = Exchange(listener, call, count)
        code = _run(_command(processes, place), place / LOG, count, {ADDRESS: str(listener.address), KEY: key.hex()})
        exchange.close()
    if exchange.errors:
        raise exchange.errors[min(exchange.errors)]
    if 0 not in exchange.answers:
        raise RunError(f"training in {count} processes ended without a result, exit code {code}", where=place / LOG)
    return exchange.answers[0]


class Exchange:
    """Tells each process the call that it is to make (pickled), and keeps what it answers, or its error, by its rank."""

    def __init__(self, listener: Listener, call: bytes, count: int):
        self.answers: dict[int, Any] = {}
        self.errors: dict[int, Exception] = {}
        self.talks = [threading.Thread(target=self._talk, args=(listener, call), daemon=True) for _ in range(count)]
        for talk in self.talks:
            talk.start()

    def _talk(self, listener: Listener, call: bytes) -> None:
        # it may have ended without a word, or the wait is over
        with contextlib.suppress(EOFError, OSError), listener.accept() as told:
            told.send_bytes(call)
            rank, error, answer = told.recv()
            if error is not None:
                self.errors[rank] = error
            else:
                self.answers[rank] = answer

    def close(self) -> None:
        """Hear out what is still on its way."""
        for talk in self.talks:
            talk.join(LAST_WORDS_S if self.answers.keys() | self.errors.keys() else 1)


def _command(processes: ProcessSettings, place: Path) -> list[str]:
    file = processes.accelerate_config
    if file in PRESETS:
        file = str(place / CONFIG)
        Path(file).write_text(yaml.safe_dump({**COMMON, **PRESETS[processes.accelerate_config]}), encoding="utf-8")
    count = ["--num_processes", str(processes.count)]  # a file may leave it open
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), *count]
    return [*launcher, "--module", "irlign.launch", str(place)]


def _run(command: list[str], log: Path, count: int, told: dict[str, str]) -> int:
    """The launcher's exit code. What the first process says is said here; what the libraries print goes to the log."""
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)), **os.environ, **told}
    give_memory_back()
    with log.open("wb") as errors, subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True, preexec_fn=end_with_parent
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            for line in process.stdout:
                say(line.rstrip())
            return process.wait()
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE_S)
            process.kill()


def main() -> None:
    """One of the processes: `python -m irlign.launch PLACE`, started by accelerate."""
    hush()
    end_with_parent()
    place, rank = Path(sys.argv[1]), int(os.environ.get("RANK", "0"))
    sys.stderr = sys.stdout  # progress is for the user, and the libraries' own words are not
    if rank:
        os.environ["IRLIGN_QUIET"] = "1"
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # before a model is put on "the" device
    address, key = os.environ.pop(ADDRESS), bytes.fromhex(os.environ.pop(KEY))
    with freed_memory_kept(), Client(address, authkey=key) as told:
        function, args, options = told.recv()
        _answer(told, place, rank, function, args, options)


def _answer(told: Connection, place: Path, rank: int, function: Callable[..., Any], args: Any, options: Any) -> None:
    try:
        answer = function(*args, **options)
    except SystemExit:  # its share is done
        _leave()
    except IrlignError as error:
        told.send((rank, error, None))
        sys.exit(error.exit_code)
    except Exception as error:
        traceback.print_exception(error, file=sys.__stderr__)
        line = (str(error).strip() or "no message").splitlines()[0]
        told.send((rank, RunError(f"unexpected {type(error).__name__} in process {rank}: {line}", where=place / LOG), None))
        sys.exit(1)
    told.send((rank, None, answer))
    _leave()


def _leave() -> NoReturn:
    """End at once and well: threads of the process group may abort an interpreter that is being taken down, and the launcher then ends the others."""
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
