# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5.1", "numpy>=1.26", "pillow>=10.1", "clean-fid"]
# ///
"""Catch-Up Distillation (CUD) on ImageNet 64x64 by class: train a flow model once, sample it in few steps.

A flow model learns the velocity that carries noise to data. CUD also lets it catch up with itself: its output
at time t is pulled towards its output a little nearer to the data, at a point of its own trajectory that one
Runge-Kutta step finds. The trajectories become straight, so few steps suffice. There is no teacher and no
second training, unless you ask for one with --teacher or --one-step (paper: arXiv 2305.10769).

    x, z          data in [-1, 1] and noise, [B, C, H, W]
    t in [0, 1]   time: t = 0 is data, t = 1 is noise
    x_t           t z + (1 - t) x
    u             dx_t/dt = z - x, the velocity of this pair
    v_1 .. v_k    the network's heads at (x_t, t); samples follow the last of them, or --head: with S steps of
                  Euler's method, x <- x - v(x, t) / S from noise at t = 1 to data at t = 0
    k             --rk-order: 1, 2, 3 are the paper's RK12, RK23, RK34; 0 is rectified flow: one head, no y
    h             the step of each sample, by --step-rule; its N is --intervals
    k_1 .. k_k    the Runge-Kutta slopes: k_i is v_1 at time t - (i - 1) h
    X_j           x_t - h sum_i b_i(j) k_i: the trajectory's point at time t - j h, j = 1 .. k
    y_j           v_1(X_j, t - j h) without gradient; it is u, for every j, where t - k h would pass the data

    loss = w_1 sum_j |v_j - y_j|^2  +  w_2 sum_j |v_j - u|^2  +  w_3 |detail(z - v_k) - detail(x)|_1
           catch up with itself        stay true to the data     the largest fifth of wavelet differences
    |.|^2 is a mean over an image's values; w_1 = w_2 = 1, except with --loss-ramp. Slopes and y_j are made
    with dropout on, as released, except an EMA's y_j. The network is told the class of x; no encoder draws z.

    python cud_imagenet64.py --quick                              a tour on a CPU in 11 minutes; no download
    torchrun --nproc-per-node 8 cud_imagenet64.py --data FOLDER   the paper's recipe on eight GPUs (README)
    python cud_imagenet64.py --classes 207 360                    evaluates that run; pictures of two classes

Measured (--quick: drawn digits, a small network, seed 0; no FID): FD (classifier) is 312, 56 and 51 at 1, 4
and 15 Euler steps, and 96 at one step after the one-step stage. The recipe was not run.
"""
import argparse
import copy
import gc
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

import common
from common import InputError, progress, tqdm

# ------------------------------------------------------------------------------------------------ the method

EPS = 1e-5  # the smallest t in training (the paper's)
STEP_RULES = ("uniform", "proportional", "constant")
RK_A = {2: [1], 3: [7/4, 1/4]}  # [i]: slope k_i is taken at x_t - h (a_1 k_1 + ..); these are the paper's a
RK_B = {  # [k][j - 1]: b_1(j) .. b_k(j) of point X_j (the paper's). As b(j) = j b(1), the local error of X_1
    # is of order 2, 3, 3 for k = 1, 2, 3, and that of the points after it of order 2
    1: [[1]],
    2: [[1/2, 1/2], [1, 1]],
    3: [[5/12, 2/3, -1/12], [10/12, 4/3, -2/12], [15/12, 2, -3/12]]}


def step_size(rule, t, n, r):
    """The step h [B] by one of the paper's STEP_RULES, from t [B], N and draws r [B] of U(0, 1)."""
    if rule == "uniform":
        return r / n
    if rule == "proportional":
        return t / n
    return torch.full_like(t, 1 / n)


def align(t, x):
    """t [B] as [B, 1, ...], to be multiplied with x [B, ...]."""
    return t.view(-1, *[1] * (x.dim() - 1))


@torch.no_grad()
def catch_up_points(velocity, x_t, t, h, k_1, order=1):
    """The next `order` points of the trajectory through x_t, by one Runge-Kutta step (paper, section 3).

    velocity: callable (x [B, ...], t [B]) -> [B, ...], called order - 1 times; k_1: its value at (x_t, t);
    h [B] >= 0. Returns X [order, B, ...], X[j - 1] at time t - j h, and these times [order, B], at least EPS.
    """
    h_x, slopes = align(h, x_t), [k_1]
    for i in range(2, order + 1):
        x = x_t - h_x * sum(a * k for a, k in zip(RK_A[i], slopes))
        slopes.append(velocity(x, (t - (i - 1) * h).clamp(min=EPS)))
    points = [x_t - h_x * sum(b * k for b, k in zip(weights, slopes)) for weights in RK_B[order]]
    times = [(t - j * h).clamp(min=EPS) for j in range(1, order + 1)]
    return torch.stack(points), torch.stack(times)


def catch_up_loss(network, x, z, t, h, order=1, velocity=None, target=None):
    """L_catchup and L_truth, each [B]: squared errors, means over a sample's dimensions, sums over the heads.

    network: callable (x_t [B, ...], t [B]) -> v_1 .. v_k [max(order, 1), B, ...]; x data, z noise [B, ...].
    velocity: makes the slopes; None: the first head of `network`. target: makes the y_j; None: `velocity`. It
    is given the points j = 1 .. k concatenated along the batch, [k B, ...].
    ValueError if the network's output has another shape.
    """
    velocity = velocity if velocity is not None else lambda x, t: network(x, t)[0]
    target = target if target is not None else velocity
    x_t, u = align(t, x) * z + (1 - align(t, x)) * x, z - x
    v = network(x_t, t)  # the one evaluation with gradient
    if v.shape != (max(order, 1), *x.shape):
        raise ValueError(f"the network returned {list(v.shape)}, not its heads {[max(order, 1), *x.shape]}")
    truth = (v - u).square().flatten(2).mean(2).sum(0)  # its gradient reaches an encoder through u as well
    if order == 0:
        return torch.zeros_like(truth), truth
    with torch.no_grad():  # the output moves towards the target, never the target towards the output
        points, times = catch_up_points(velocity, x_t, t, h, v[0], order)
        y = target(points.flatten(0, 1), times.flatten()).view_as(v)
        y = torch.where(align(t - order * h < EPS, x), u, y)
    return (v - y).square().flatten(2).mean(2).sum(0), truth


def distillation_loss(network, teacher, average, x, z, t, h, rule):
    """The loss [B] of a one-head student of a frozen teacher: there is no truth term and no encoder.

    teacher, average (the student's EMA): callables (x [B, ...], t [B]) -> velocity [B, ...]. By `rule`, with
    X_1 one Euler step of the teacher from x_t,
    "consistency": x_t - t v lands where the EMA lands from X_1 (Song et al. 2023, eq. 7);
    "progressive": v is the teacher's mean slope over two such steps (Salimans & Ho 2022);
    "ema": v is the EMA's velocity at X_1 (what the released code calls consistency distillation).
    The steps are shortened to end at EPS or later, so every t has a target and u replaces none.
    """
    h = torch.minimum(h, (t - EPS) / (2 if rule == "progressive" else 1))
    x_t = align(t, x) * z + (1 - align(t, x)) * x
    v = network(x_t, t)[0]
    with torch.no_grad():
        k_1 = teacher(x_t, t)
        points, times = catch_up_points(teacher, x_t, t, h, k_1)
        y = (teacher if rule == "progressive" else average)(points[0], times[0])
    if rule == "progressive":
        y = (k_1 + y) / 2
    error = v - y
    if rule == "consistency":
        error = x_t - align(t, x) * v - (points[0] - align(times[0], x) * y)
    return error.square().flatten(1).mean(1)


DB3 = (  # Daubechies' low-pass filter with three vanishing moments
    0.035226291882100656, -0.08544127388224149, -0.13501102001039084, 0.4598775021193313, 0.8068915093133388,
    0.3326705529509569)


@cache
def detail_filters(device, dtype):
    """The filters of `details`, [3, 1, 6, 6]: low- and high-pass, high- and low-pass, high-pass twice."""
    low = torch.tensor(DB3, dtype=dtype)
    high = low.flip(0) * torch.tensor([-1, 1, -1, 1, -1, 1])
    bands = [torch.outer(a, b).flip(0, 1) for a, b in ((low, high), (high, low), (high, high))]
    return torch.stack(bands)[:, None].to(device)


def details(x):
    """The three detail bands of the finest level of a db3 transform with zero padding, as convolution:
    [B, C, H, W] -> [B, 3 C, H', W'], H' = floor((H + 5) / 2); linear in x."""
    filters = detail_filters(x.device, x.dtype).repeat(x.shape[1], 1, 1, 1)
    return F.conv2d(F.pad(x, (4, 5, 4, 5)), filters, stride=2, groups=x.shape[1])


def wavelet_loss(landing, x):
    """Mean of the largest fifth of |differences in detail|, images scaled to [0, 1]: [B, C, H, W] -> [B]."""
    differences = details((landing - x) / 2).abs().flatten(1)
    return differences.topk(differences.shape[1] // 5).values.mean(1)


# --------------------------------------------------------------------------------------------------- network

IMAGE = (3, 64, 64)  # channels, height, width: of every picture that is read, learnt and drawn


def zero(layer):
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def conv(c_in, c_out, size):
    return nn.Conv2d(c_in, c_out, size, padding=size // 2)


def norm(channels):
    groups = min(32, channels // 4)
    if channels < 4 or channels % 2 or channels % groups:
        raise ValueError(f"{channels} channels are below 4, odd or not divisible by {groups} (GroupNorm)")
    return nn.GroupNorm(groups, channels, eps=1e-5)


class Block(nn.Module):
    """Residual block that an embedding scales and shifts; resample: None, "down", "up"; attention last."""

    def __init__(self, c_in, c_out, c_emb, dropout, resample=None, attention=False):
        super().__init__()
        self.resample, self.attention = resample, attention
        self.resize = {"down": nn.AvgPool2d(2), "up": nn.Upsample(None, 2), None: nn.Identity()}[resample]
        self.norm1, self.conv1 = norm(c_in), conv(c_in, c_out, 3)
        self.emb = nn.Linear(c_emb, 2 * c_out)
        self.norm2, self.conv2 = norm(c_out), zero(conv(c_out, c_out, 3))
        self.dropout = nn.Dropout(dropout)
        self.skip = conv(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        if attention:
            if c_out > 64 and c_out % (c_out // 64):
                raise ValueError(f"{c_out} channels do not divide into {c_out // 64} heads of attention")
            self.norm3, self.qkv = norm(c_out), conv(c_out, 3 * c_out, 1)
            self.proj = zero(conv(c_out, c_out, 1))

    def forward(self, x, emb):
        a = self.conv1(self.resize(F.silu(self.norm1(x))))
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, 1)
        a = self.conv2(self.dropout(F.silu(self.norm2(a) * (1 + scale) + shift)))
        x = a + self.skip(self.resize(x))
        if not self.attention:
            return x
        qkv = self.qkv(self.norm3(x)).flatten(2).mT  # [B, H W, 3 C], to C // 64 heads, at least one
        q, k, v = qkv.unflatten(2, (3, max(1, x.shape[1] // 64), -1)).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mT.reshape_as(x)
        return x + self.proj(a)


class UNet(nn.Module):
    """ADM UNet (Dhariwal & Nichol 2021) of `classes` classes with `heads` velocity heads.

    image: (C, H, W); attention: the heights H of the levels that have it, like the bottom; skip_phi: phi of
    the skips, which weigh 2 (1 - phi) at t = 0 and 2 phi at t = 1 (the paper's prior ShakeDrop). ValueError
    for sizes that do not fit together.
    """

    def __init__(self, image, channels, multipliers, blocks, attention, dropout, classes, heads=1,
                 skip_phi=0.75):
        super().__init__()
        self.config = dict(image=image, channels=channels, multipliers=multipliers, blocks=blocks,
                           attention=attention, dropout=dropout, classes=classes, heads=heads,
                           skip_phi=skip_phi)
        sizes = [image[1] // 2 ** level for level in range(len(multipliers))]
        if any(size % 2 ** (len(multipliers) - 1) for size in image[1:]):
            raise ValueError(f"{image[1]}x{image[2]} pixels cannot be halved {len(multipliers) - 1} times")
        if not set(attention) <= set(sizes):
            raise ValueError(f"there is no attention at {attention}: the levels have the sizes {sizes}")
        self.channels, self.skip_phi, self.bf16, self.head = channels, skip_phi, False, heads
        c, emb = channels, 4 * channels
        self.embed = nn.Sequential(nn.Linear(c, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.embed_class = nn.Embedding(classes, emb)
        self.first, skips = conv(image[0], c, 3), [c]
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        for level, multiplier in enumerate(multipliers):
            if level:
                self.encoder.append(Block(c, c, emb, dropout, "down"))
                skips.append(c)
            for _ in range(blocks):
                attends = sizes[level] in attention
                self.encoder.append(Block(c, channels * multiplier, emb, dropout, None, attends))
                c = channels * multiplier
                skips.append(c)
        self.bottom = nn.ModuleList([Block(c, c, emb, dropout, None, True), Block(c, c, emb, dropout)])
        for level, multiplier in reversed(list(enumerate(multipliers))):
            if level < len(multipliers) - 1:
                self.decoder.append(Block(c, c, emb, dropout, "up"))
            for _ in range(blocks + 1):
                attends = sizes[level] in attention
                self.decoder.append(Block(c + skips.pop(), channels * multiplier, emb, dropout, None,
                                          attends))
                c = channels * multiplier
        self.heads = nn.ModuleList(nn.Sequential(norm(c), nn.SiLU(), zero(conv(c, image[0], 3)))
                                   for _ in range(heads))

    def forward(self, x, t, labels, heads=slice(None)):
        """x [B, C, H, W], t [B], labels [B], or [B / k] for k batches of the same classes one after the other
        -> these heads (all by default), of x's type [heads, B, C, H, W]."""
        half = self.channels // 2  # of the embedding of t, which is not scaled, as in the released code
        angle = t[:, None] * 10_000 ** (-torch.arange(half, dtype=t.dtype, device=t.device) / half)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 knows t in steps of 0.004
            emb = self.embed(torch.cat([angle.cos(), angle.sin()], 1))
        emb = F.silu(emb + self.embed_class(labels.repeat(len(x) // len(labels))))
        p = (t * (1 - 2 * self.skip_phi) + self.skip_phi).view(-1, 1, 1, 1)
        with torch.autocast(x.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            skips = [a := self.first(x)]
            for block in self.encoder:
                skips.append(a := block(a, emb))
            for block in self.bottom:
                a = block(a, emb)
            for block in self.decoder:
                if block.resample != "up":  # p is float32: without the casts all that follows would be, too
                    a = torch.cat([(2 * p * a).to(a.dtype), (2 * (1 - p) * skips.pop()).to(a.dtype)], 1)
                a = block(a, emb)
            return torch.stack([head(a).to(x.dtype) for head in self.heads[heads]])

    def first_head(self, x, t, labels):
        """v_1, which makes slopes and targets: x [B, C, H, W], t [B], labels [B] -> [B, C, H, W]."""
        return self(x, t, labels, slice(0, 1))[0]

    def sampling_velocity(self, x, t, labels):
        """The head that samples follow, the last unless choose() was called; as first_head()."""
        return self(x, t, labels, slice(self.head - 1, self.head))[0]

    def choose(self, head):
        """Let samples follow this head, 1 to k; None is the last. ValueError if there is no such head."""
        if head and head > len(self.heads):
            raise ValueError(f"there is no head {head}, as the network has {len(self.heads)}")
        self.head = head or len(self.heads)


def load_model(path, head=None):
    """The network in a model file of this script, in evaluation mode; samples follow `head`, if given.

    InputError if the file is damaged, makes images of another size, or has no such head.
    """
    remedy = "give a model.pt that this script has written"
    saved = common.load_pt(path, ["model", "args", "images_seen"], remedy)
    with common.reading(path, remedy):
        if tuple(saved["args"]["image"]) != IMAGE:
            raise ValueError(f"it makes images {tuple(saved['args']['image'])}, not {IMAGE}")
        network = UNet(**saved["args"])
        network.load_state_dict(saved["model"])  # also from half precision
        network.choose(head)
    network.source, network.images_seen = path, saved["images_seen"]
    return network.eval().requires_grad_(False)


def begin_from(source, heads, dropout):
    """A network with `heads` heads and the weights of `source`; the last head stands in for missing ones."""
    network = UNet(**source.config | dict(heads=heads, dropout=dropout))
    network.load_state_dict(source.state_dict(), strict=False)  # heads that one of them lacks are skipped
    for head in network.heads[len(source.heads):]:
        head.load_state_dict(source.heads[-1].state_dict())
    return network


def prepare(network, args, device):
    """Move a network to the device, in the memory layout and the precision that are fast there."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    network.bf16 = args.amp == "on" or (args.amp == "auto" and has_bf16)
    return network.to(device, memory_format=torch.channels_last)


def compile_network(network, args, device):
    """torch.compile in place, which leaves the names of the weights as they are."""
    newer = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)  # as Triton needs
    if args.compile == "on" or (args.compile == "auto" and newer):
        torch._dynamo.config.cache_size_limit = 64  # networks, batch sizes and heads share one forward()
        torch._inductor.config.force_layout_optimization = True  # concatenations would end channels_last
        network.compile(dynamic=False)


# -------------------------------------------------------------------------------------------------- training

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them
LOG_EVERY = 100  # iterations to a row of metrics.csv

common.SILENT = RANK > 0  # progress is shown by rank 0


def say(text):
    if RANK == 0:
        tqdm.write(text)  # above a progress bar
        sys.stdout.flush()


def start(name):
    """Join the other ranks, if there are any; return this rank's device: `name`, or a GPU if there is one."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if WORLD > 1 and name.startswith("cuda:"):
        raise InputError(f"--device {name} is one GPU for all ranks; --device cuda gives each its own")
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} cannot be used here: {common.first_line(error)}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # all batches have one shape: look for the fastest kernels once
    torch.set_float32_matmul_precision("high")  # TF32 where float32 is left
    if WORLD > 1:  # rank 0 may read data for hours; when a rank fails, torchrun ends the others
        backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backends, timeout=timedelta(hours=12))
    return device


def all_reduce(tensor):
    """Sum a tensor over the ranks, in place, and return it."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


@contextmanager
def rank_zero_first():
    """Rank 0 runs the block before the others, which then find what it has fetched."""
    if RANK > 0:
        all_reduce(torch.zeros(1))
    try:
        yield
    finally:
        if RANK == 0:
            all_reduce(torch.zeros(1))


@contextmanager
def noting_signals():
    """Yields a list to which Ctrl-C, SIGTERM and SIGHUP add their numbers; a second Ctrl-C interrupts."""
    noted, before = [], {}

    def note(number, frame):
        noted.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP, nohup ignores it
        if number and signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if noted:  # during the last checkpoint
        signal.raise_signal(noted[0])


def lock(run):
    """Make the run folder. While the returned file is open, no other training can start there."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = open(run / ".lock", "w")
    except OSError as error:
        raise InputError(f"--run-dir {run} cannot be written ({error})") from error
    try:
        import fcntl  # which Windows has not
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another process trains in {run}; --model and another --run-dir judge what it has "
                         "saved, and the ranks of one training are started with torchrun") from None
    except (ImportError, OSError):  # some network file systems have no locks
        pass
    for left in run.glob(".*.pt.*"):  # of a save that a kill cut short
        left.unlink()
    return file


# What random draws are for: a part of generator()'s key, so that no two purposes share their numbers
SAMPLES, BATCH, NOISE, DROPOUT, PAIRS, PAIR_BATCH, PAIR_DROPOUT, LABELS, IMAGES, PAIR_LABELS = range(1, 11)


def generator(device, *key):
    """A generator whose draws depend on the integers in `key` alone, so that resuming needs no state."""
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def normal(n, device, *key):
    """Standard normal noise [n, C, H, W] that depends on `key` alone."""
    return torch.randn(n, *IMAGE, device=device, generator=generator(device, *key))


class CatchUp(nn.Module):
    """The flow's training: a module that holds the network.

    To change the loss, edit catch_up_loss() or, where its terms are weighed, forward(). To log a term of your
    own, add its name to `columns` and its mean to the list that forward() returns, in the same place. A new
    flag that changes the training belongs in DEFINES, so that a run cannot go on with another value.
    """

    name, model = "", "model.pt"  # what the names of its files begin with; the file of its weights
    columns = ("loss", "catchup", "truth", "wavelet")
    average = None  # the first head of the network's EMA, which fit() sets if uses_average

    def __init__(self, args, device, data):
        super().__init__()
        self.args, self.device, self.data = args, device, data
        path, done = Path(args.run_dir) / "checkpoint.pt", iterations_done(args)
        if done < args.iterations:
            classes = len(data.classes)
        else:  # it is finished, and may be judged by images of other classes, or without any
            saved = torch.load(path, "cpu", mmap=True, weights_only=True)
            classes = len(saved["module"]["network.embed_class.weight"])
        self.reader, self.ahead, self.shown = ThreadPoolExecutor(1), {}, grid_labels(args, classes)
        self.iterations, self.warmup = args.iterations, min(args.warmup, args.iterations // 10)
        self.lr = args.lr
        self.uses_average = args.target != "online"
        self.definition = {name: getattr(args, name) for name in DEFINES}
        if data is not None:  # a finished training needs none
            self.definition["data"] = data.sha256[:12]
        if args.loss_ramp:
            self.definition["iterations"] = args.iterations
        source = self.teacher = None
        file = args.teacher or args.init
        if done < args.iterations and args.one_step and [*Path(args.run_dir).glob("one_step*.pt")]:
            raise InputError(f"{args.run_dir} has a student of the model as it was: train the model on with "
                             "--no-one-step, or move the one_step files away for a new student")
        torch.manual_seed(args.seed)
        try:
            if (args.init and not done) or (args.teacher and done < args.iterations):  # else not needed
                kind = "teacher" if args.teacher else "init"
                with common.reading(f"--{kind} {file}", "the training needs it"):
                    self.definition[kind] = common.sha256(file)
                source = load_model(file)
                if source.config["classes"] != classes:
                    raise InputError(f"{file} knows {source.config['classes']} classes, not {classes}")
                network = begin_from(source, max(1, args.rk_order), args.dropout)
            else:
                network = UNet(IMAGE, args.channels, args.multipliers, args.blocks, args.attention,
                               args.dropout, classes, max(1, args.rk_order), args.skip_phi)
            network.choose(args.head)
        except ValueError as error:
            raise InputError(f"--channels, --multipliers, --attention or --head: {error}") from error
        self.network = network
        if args.teacher and source is not None:
            self.teacher = source.first_head  # a method; a module would be trained and saved with this one
        for part in filter(None, (network, source)):
            compile_network(prepare(part, args, device), args, device)

    def gather(self, i):
        """This rank's images and labels of batch i, which is drawn with replacement, read off the disk."""
        n, draws = self.args.batch_size, generator("cpu", self.args.seed, IMAGES, i)
        index = torch.randint(len(self.data.images), (n,), generator=draws)
        index = index[RANK * n // WORLD:(RANK + 1) * n // WORLD]
        x = self.data.images.numpy()[index.numpy()]  # torch's threads would be in the way of the training's
        return torch.from_numpy(x), self.data.labels[index]

    def draw(self, i):
        """This rank's part of batch i; a function of --seed and i alone."""
        args, n = self.args, self.args.batch_size
        batch = (self.ahead.pop(i, None) or self.reader.submit(self.gather, i)).result()
        self.ahead[i + 1] = self.reader.submit(self.gather, i + 1)  # read while the device is busy
        own = slice(RANK * n // WORLD, (RANK + 1) * n // WORLD)
        options = dict(size=(n,), device=self.device, generator=generator(self.device, args.seed, BATCH, i))
        noise = normal(n, self.device, args.seed, NOISE, i)
        t, r = EPS + (1 - EPS) * torch.rand(**options), torch.rand(**options)
        h = step_size(args.step_rule, t, args.intervals, r)
        torch.manual_seed(generator("cpu", args.seed, DROPOUT, i, RANK).initial_seed())
        if self.device.type == "cuda":
            batch = [part.pin_memory() for part in batch]  # so that the host need not wait for the copy
        x, labels = (part.to(self.device, non_blocking=True) for part in batch)
        x = common.to_float(x)
        if args.flip:
            x = torch.where(torch.rand(**options)[own].view(-1, 1, 1, 1) < 0.5, x.flip(3), x)
        return x, noise[own], t[own], h[own], i / args.iterations, labels

    def forward(self, x, noise, t, h, share, labels):
        """x, noise [B, C, H, W]; t, h, labels [B]; share = i/I. The loss, and the means to log."""
        args, landings = self.args, []

        def told(velocity):
            return partial(velocity, labels=labels)

        def network(x_t, t):
            v = self.network(x_t, t, labels)
            landings.append(noise - v[-1])  # as if v led all the way from noise to data
            return v

        if self.teacher is not None:
            catchup = distillation_loss(network, told(self.teacher), told(self.average), x, noise, t, h,
                                        args.target)
            truth = wavelet = torch.zeros_like(t)
        else:
            catchup, truth = catch_up_loss(network, x, noise, t, h, args.rk_order,
                                           told(self.network.first_head),
                                           None if self.average is None else told(self.average))
            wavelet = wavelet_loss(landings[0], x)
        w_1, w_2 = (2 * share, 2 * (1 - share)) if args.loss_ramp else (1, 1)
        loss = (w_1 * catchup + w_2 * truth + args.wavelet_weight * wavelet).mean()
        return loss, [loss, catchup.mean(), truth.mean(), wavelet.mean()]

    def picture(self, average):
        """Samples to look at, a row for each class, uint8 [n, C, H, W]."""
        return sample(average, self.shown, self.args.solver, self.args.steps[-1], self.args, self.device)[0]


def iterations_done(args):
    """The iteration of the run's checkpoint; 0: there is none."""
    path = Path(args.run_dir) / "checkpoint.pt"
    if not path.exists():
        return 0
    with common.reading(path, "move it and model.pt away to train anew"):
        return torch.load(path, "cpu", mmap=True, weights_only=True)["iteration"]


def resume(stage, average, optimizer, run):
    """Load a stage's checkpoint, if there is one. Returns its iteration and the rows of its log."""
    path, first, rows = run / f"{stage.name}checkpoint.pt", 0, []
    remedy = f"move it and {stage.model} away to train anew"
    if path.exists():
        saved = common.load_pt(path, ["module", "average", "optimizer", "iteration", "warmup", "rows",
                                      "definition"], remedy)
        first, rows, adam = saved["iteration"], saved["rows"], saved["optimizer"]["state"]
        if first > stage.iterations:
            raise InputError(f"{path} is at iteration {first}, past the {stage.iterations} asked for")
        if first < stage.iterations or stage.name:  # a finished flow may be judged against other images
            refuse_differences(path, saved["definition"], stage.definition)
        with common.reading(path, remedy):
            stage.load_state_dict(saved["module"])
            average.load_state_dict(saved["average"])
            for parameter, state in zip(stage.parameters(), adam.values()):
                for key in ("exp_avg", "exp_avg_sq"):  # fused Adam needs the parameter's memory layout
                    state[key] = torch.zeros_like(parameter).copy_(state[key])
            optimizer.load_state_dict(optimizer.state_dict() | {"state": adam})
        stage.warmup, stage.definition = saved["warmup"], saved["definition"]
    elif (run / stage.model).exists():
        raise InputError(f"{run / stage.model} has no {path.name} to go on from; --model evaluates it, "
                         "another --run-dir trains anew")
    if all_reduce(torch.tensor(first)) != WORLD * first:
        raise InputError(f"the ranks find different checkpoints in {run}; all nodes must see one folder")
    return first, rows


def save_model(average, path, images_seen):
    """Save the weights of the EMA for load_model(). No rank goes on before rank 0 has saved them."""
    if RANK == 0:
        common.save_pt(dict(model=average.state_dict(), args=average.config, images_seen=images_seen), path)
    average.source, average.images_seen = path, images_seen
    all_reduce(torch.zeros(1))


def save_log(stage, rows, run):
    """Write the rows of a log as metrics.csv, and draw what is above 0 in its columns as metrics.svg."""
    table = [list(rows[-1])] + [[row.get(name, "") for name in rows[-1]] for row in rows]
    text = "".join(",".join(map(str, cells)) + "\n" for cells in table)
    common.save_text(text, run / f"{stage.name}metrics.csv")
    lines = {name: [(row["images"], row[name]) for row in rows if row.get(name, 0) > 0]
             for name in stage.columns}
    lines = {name: line for name, line in lines.items() if line}
    common.save_text(common.line_chart(lines, "images seen", "mean"), run / f"{stage.name}metrics.svg")


def log_row(stage, args, lr, log, done, seconds):
    """A row of the log: means over the iterations since the last row; grad_norm is of the last iteration.

    log: what forward() returned for each part of these iterations. InputError if something is not finite.
    """
    means = (all_reduce(torch.stack(log).mean(0)) / WORLD).tolist()
    gradient = torch.stack([p.grad.norm() for p in stage.parameters()]).norm().item()
    weights = torch.stack([p.norm() for p in stage.parameters()]).norm().item()
    if not math.isfinite(sum(means) + weights):
        raise InputError(f"the loss or a weight is not finite at iteration {done}; the last checkpoint is "
                         "whole. Try a lower --lr in another --run-dir")
    speed = len(log) / args.accumulate * args.batch_size / seconds
    values = dict(zip(stage.columns, means)) | {"lr": lr, "grad_norm": gradient, "images_per_s": speed}
    return {"iteration": done, "images": done * args.batch_size} | {
        name: float(f"{value:.6g}") for name, value in values.items()}


def fit(stage, args, device):
    """Train a stage from its checkpoint, or the start, to its last iteration. Returns its network's EMA.

    It writes to --run-dir: config.json; checkpoint.pt, all that it needs to go on; the weights of the EMA;
    the log, metrics.csv and .svg; and a grid of samples with each checkpoint.
    """
    run = Path(args.run_dir)
    average = copy.deepcopy(stage.network).eval().requires_grad_(False)
    averaged, current = list(average.parameters()), list(stage.network.parameters())
    optimizer = torch.optim.Adam(stage.parameters(), stage.lr, fused=device.type in ("cpu", "cuda"))
    first, rows = resume(stage, average, optimizer, run)
    if first == stage.iterations:  # a kill may have come between the checkpoint and the weights
        save_model(average, run / stage.model, first * args.batch_size)
        return average
    if args.batch_size % (WORLD * args.accumulate):
        raise InputError(f"--batch-size {args.batch_size} is not divisible by {WORLD} ranks x --accumulate "
                         f"{args.accumulate}")
    if stage.data is not None and args.fid_samples:
        check_distance(args, device, stage.data)
    if stage.uses_average:
        compile_network(average, args, device)
        stage.average = average.first_head  # a method; a module would be trained and saved with the stage
    step = stage if WORLD == 1 else nn.parallel.DistributedDataParallel(stage, gradient_as_bucket_view=True)
    say(f"training {stage.model} in {run}: {sum(p.numel() for p in current):,} parameters, iterations "
        f"{first:,} to {stage.iterations:,} of {args.batch_size} images")
    log, shown, since = [], {}, time.time()
    every = args.evaluate_every if stage.data is not None else 0  # a student is judged at its end alone
    with lock(run) if RANK == 0 else nullcontext(), noting_signals() as signals:
        if RANK == 0:
            save_config(args, device)
        for i in progress(range(first, stage.iterations), "training", first, shown):
            lr = stage.lr * min(1, (i + 1) / max(1, stage.warmup))
            for group in optimizer.param_groups:
                group["lr"] = lr
            batch = [part.chunk(args.accumulate) if torch.is_tensor(part) else [part] * args.accumulate
                     for part in stage.draw(i)]
            optimizer.zero_grad()
            for j, part in enumerate(zip(*batch), 1):
                with step.no_sync() if WORLD > 1 and j < args.accumulate else nullcontext():
                    loss, means = step(*part)
                    (loss / args.accumulate).backward()
                log.append(torch.stack(means).detach())
            optimizer.step()
            decay = min(args.ema_decay, (1 + i) / (10 + i)) if i else 0.0  # the first weights are taken whole
            get_ema_multi_avg_fn(decay)(averaged, current, None)

            done, last = i + 1, i + 1 == stage.iterations
            stopping = all_reduce(torch.tensor(len(signals))).item() > 0  # it may have reached one rank alone
            evaluating = every and done % every == 0 and not last
            saving = stopping or evaluating or done % args.checkpoint_every == 0 or last
            if saving or done % LOG_EVERY == 0:
                rows.append(log_row(stage, args, lr, log, done, time.time() - since))
                shown.update({name: rows[-1][name] for name in ("loss", "images_per_s")})
                if RANK == 0:
                    save_log(stage, rows, run)
                log, since = [], time.time()
            if saving:
                if evaluating:  # before the checkpoint, so that a kill loses no file
                    save_model(average, run / f"model_{done:07}.pt", done * args.batch_size)
                if RANK == 0:
                    common.save_pt(dict(module=stage.state_dict(), average=average.state_dict(),
                                        optimizer=optimizer.state_dict(), iteration=done, warmup=stage.warmup,
                                        rows=rows, definition=stage.definition),
                                   run / f"{stage.name}checkpoint.pt")
                save_model(average, run / stage.model, done * args.batch_size)
                if stopping:
                    say(f"stopped; {run} keeps iteration {done}, and the same command goes on from there")
                    raise SystemExit(128 + (signals or [signal.SIGTERM])[0])
                try:
                    grid = stage.picture(average)
                    if RANK == 0:
                        common.save_grid(grid, run / f"{stage.name}samples_{done:06}.png")
                    if evaluating:
                        evaluate({"model": average}, args, device, stage.data)
                except InputError as error:
                    if WORLD > 1 and isinstance(error, common.WriteError):
                        raise  # it is rank 0's alone, and the others wait
                    say(f"the training goes on without a picture or a distance: {error}")
                since = time.time()
    return average


# -------------------------------------------------------------------------------------------- one-step stage


class OneStep(nn.Module):
    """The additional training, as a module of what it trains: a student that needs one step, z - v_1(z, 1).

    loss = |z - v_1(z, 1) - target|^2 + 0.1 |v_1(z, 1) - v_ema(z, 1)|^2, the weight being the released one. It
    has three parts of --one-step-iterations, one for each of the targets that one_step_pairs() makes.
    """

    name, model = "one_step_", "one_step.pt"
    columns = ("loss", "target", "ema")
    average = None  # v_ema, which fit() sets

    def __init__(self, args, device, teacher):
        super().__init__()
        self.args, self.device, self.data = args, device, None
        self.iterations, self.warmup, self.uses_average = 3 * args.one_step_iterations, 0, True
        self.lr = args.one_step_lr or args.lr
        self.definition = {name: getattr(args, name)
                           for name in (*DEFINES, "iterations", "one_step_iterations", "one_step_pairs",
                                        "one_step_lr")}
        self.classes = teacher.config["classes"]
        self.network = prepare(begin_from(teacher, heads=1, dropout=args.dropout), args, device)
        for part in (self.network, teacher):
            compile_network(part, args, device)
        self.teacher, self.pairs = teacher.first_head, None  # a method; see CatchUp

    def draw(self, i):
        """This rank's noise, targets and labels of iteration i."""
        if self.pairs is None:  # a finished student needs none
            self.pairs = one_step_pairs(self.args, self.teacher, self.classes, self.device)
        args, (noise, targets, labels) = self.args, self.pairs
        index = torch.randint(len(noise), (args.batch_size // WORLD,), device=self.device,
                              generator=generator(self.device, args.seed, PAIR_BATCH, i, RANK))
        torch.manual_seed(generator("cpu", args.seed, PAIR_DROPOUT, i, RANK).initial_seed())
        return noise[index], targets[index, i // args.one_step_iterations].float(), labels[index]

    def forward(self, z, target, labels):
        """z, target [B, C, H, W]; labels [B]. The loss, and the means to log."""
        ones = z.new_ones(len(z))
        v = self.network.first_head(z, ones, labels)
        to_target = F.mse_loss(z - v, target)
        to_average = F.mse_loss(v, self.average(z, ones, labels).detach())
        loss = to_target + 0.1 * to_average
        return loss, [loss, to_target, to_average]

    def picture(self, average):
        """Samples to look at, a row for each class, uint8 [n, C, H, W]."""
        return sample(average, grid_labels(self.args, self.classes), "euler", 1, self.args, self.device)[0]


@torch.no_grad()
def one_step_pairs(args, velocity, classes, device):
    """Noise [n, C, H, W]; x0_hat = x_t - t v at the 9th, 12th and 15th of 16 Euler steps from it, float16 [n,
    3, C, H, W]; and their classes [n], drawn uniformly. Each rank makes and keeps its own n."""
    noise, targets, n = [], [], math.ceil(args.one_step_pairs / WORLD)
    draws = generator("cpu", args.seed, PAIR_LABELS, RANK)
    labels = torch.randint(classes, (n,), generator=draws).to(device)
    padded = F.pad(labels, (0, -n % SAMPLE_BATCH))
    for i in progress(range(math.ceil(n / SAMPLE_BATCH)), "one-step targets"):
        noise.append(normal(min(n, SAMPLE_BATCH), device, args.seed, PAIRS, RANK, i))
        part = padded[i * SAMPLE_BATCH:][:len(noise[-1])]
        path = common.Watched(partial(velocity, labels=part))
        common.euler(path, noise[-1], 16)
        targets.append(torch.stack([path.x0_hats[j] for j in (8, 11, 14)], 1).half())
    return torch.cat(noise)[:n], torch.cat(targets)[:n], labels


# ----------------------------------------------------------------------------------- sampling and evaluation

SAMPLE_BATCH = 250  # images; noise is drawn by the batch, so samples do not depend on the number of ranks
FEATURES = {"inception": 2048, "classifier": 240}  # dimensions
CLASSIFIER_BATCHES = 200  # that a classifier of the data is trained on
CACHE = Path("data/cache")  # classifiers and statistics of real images, named by the images they come from


@torch.no_grad()
def sample(network, labels, solver, steps, args, device):
    """Draw a sample of each of `labels` [n], each rank its share of the batches. steps: NFE; dopri5 goes by
    --tolerance instead.

    Returns all of them, uint8 [n, C, H, W]; their mean NFE and straightness; and how every eighth of the
    first 64 came about, uint8 [points, 8, C, H, W]: x0_hats, then samples. InputError if they are not finite.
    """
    n, size = len(labels), min(len(labels), SAMPLE_BATCH)
    images, labels = torch.zeros(n, *IMAGE, dtype=torch.uint8, device=device), F.pad(labels, (0, -n % size))
    sums, shown = torch.zeros(3, device=device), slice(0, 64, 8)  # of batches, their NFE and straightness
    course = failed = None
    for i in progress(range(RANK, math.ceil(n / size), WORLD), f"sampling by {solver}"):
        z = normal(size, device, args.sample_seed, SAMPLES, i)
        velocity = partial(network.sampling_velocity, labels=labels[i * size:(i + 1) * size].to(device))
        path = common.Watched(velocity, shown)
        try:
            x = common.SOLVERS[solver](path, z, args.tolerance if solver == "dopri5" else steps)
        except InputError as error:  # raised below, where all ranks hear of it
            sums, failed = sums + math.nan, error
            break
        images[i * size:(i + 1) * size] = common.to_uint8(x)[:n - i * size]
        bend = path.straightness(z - x)
        sums += torch.stack([torch.ones_like(bend), torch.full_like(bend, path.nfe), bend])
        if i == 0:
            course = common.to_uint8(torch.stack([*path.x0_hats, x[shown]]))
    count, nfe, bend = all_reduce(sums).tolist()
    if not math.isfinite(bend):
        raise failed or InputError(f"samples of {solver} with {steps} steps are not finite: no picture, no "
                                   "distance")
    return all_reduce(images), nfe / count, bend / count, course  # the rows of other ranks are 0


def grid_labels(args, classes):
    """Eight of each of --classes (the first ten where unset), a row for each: int64 [8 * rows]."""
    rows = torch.tensor(args.classes or range(min(10, classes)))
    if rows.max() >= classes:
        raise InputError(f"--classes: {rows.max()} is not among the {classes} classes, 0 to {classes - 1}")
    return rows.repeat_interleave(8)


def drawn_labels(n, args, classes):
    """n classes, drawn uniformly: int64 [n]."""
    return torch.randint(classes, (n,), generator=generator("cpu", args.sample_seed, LABELS))


class Classifier(nn.Module):
    """A small convolutional classifier: x [B, C, H, W] -> pooled activations [B, 16 + ... + 128], logits."""

    def __init__(self, classes):
        super().__init__()
        widths = (IMAGE[0], 16, 32, 64, 128)
        self.stages = nn.ModuleList(nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU())
                                    for i, o in zip(widths, widths[1:]))
        self.out = nn.Linear(widths[-1], classes)

    def forward(self, x):
        pooled = []
        for stage in self.stages:
            x = F.max_pool2d(stage(x), 2)
            pooled.append(x.mean((2, 3)))
        return torch.cat(pooled, 1), self.out(pooled[-1])


def cached(path, keys, make):
    """The dict in a file. Where a rank lacks the file, all make() its content and rank 0 saves that."""
    if all_reduce(torch.tensor(int(path.exists()))) < WORLD:
        content = make()
        if RANK == 0:
            common.save_pt(content, path)
        all_reduce(torch.zeros(1))  # the others wait for rank 0
        if all_reduce(torch.tensor(int(path.exists()))) < WORLD:
            raise InputError(f"not all ranks see {path}: all nodes must work in one folder")
    return common.load_pt(path, keys, "remove it, and it is made again")


def classifier_features(data, device):
    """A function uint8 [B, C, H, W] -> features [B, 240], scaled by their deviation over the real images, and
    its name. The classifier is trained on them once (fixed seed, batches of 128) and kept in data/cache."""
    path = CACHE / f"classifier-{data.sha256[:12]}.pt"
    torch.manual_seed(0)
    network = Classifier(len(data.classes)).to(device, memory_format=torch.channels_last)  # faster

    def make():
        optimizer = torch.optim.Adam(network.parameters())
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=CLASSIFIER_BATCHES)
        for _ in progress(range(CLASSIFIER_BATCHES), "training the classifier that judges"):
            index = torch.randint(len(data.images), (128,))
            x, wanted = data.images[index].to(device), data.labels[index].to(device)
            F.cross_entropy(network(common.to_float(x))[1], wanted).backward()
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
        with torch.no_grad():
            network.eval()
            f = [network(common.to_float(part.to(device)))[0] for part in data.images.split(SAMPLE_BATCH)]
        return {"network": network.state_dict(), "scale": torch.cat(f).std(0).clamp(min=1e-3)}

    saved = cached(path, ["network", "scale"], make)
    network.load_state_dict(saved["network"])
    network, scale = network.eval(), saved["scale"].to(device)

    def features(images):
        return network(common.to_float(images.to(device)))[0] / scale

    return features, f"classifier-{common.sha256(path)[:8]}"


def inception_features(mode, device):
    """A function uint8 [B, C, H, W] -> clean-fid's Inception features [B, 2048], and its name."""
    path = CACHE / "inception-2015-12-05.pt"
    try:  # imported here: clean-fid needs a torchvision that fits torch
        from cleanfid import downloads_helper, inception_torchscript, resize
        with rank_zero_first():
            if not path.exists():  # its own download would leave half a file when it is cut short
                common.download([downloads_helper.inception_url], path)
        network = inception_torchscript.InceptionV3W(CACHE, download=False, resize_inside=mode != "clean")
    except (ImportError, RuntimeError) as error:
        raise InputError(f"clean-fid or {path} cannot be used ({common.first_line(error)}); install "
                         "clean-fid, or delete the file if it is cut short") from error
    network, resizer = network.to(device).eval(), resize.build_resizer(mode)

    def features(images):
        x = images.to(device).expand(-1, 3, -1, -1).float()
        if mode == "clean":  # resized one by one in Pillow; legacy_tensorflow does it in the network
            x = np.stack([resizer(image.numpy()).transpose(2, 0, 1) for image in x.permute(0, 2, 3, 1).cpu()])
            x = torch.from_numpy(x).to(device)
        return network(x)

    return features, f"inception-{mode}-{common.sha256(path)[:8]}"


def load_features(args, device, data):
    """The function of --features and its name. InputError if no distance can be computed with them."""
    if args.features == "classifier" and len(data.classes) < 2:
        raise InputError("--features classifier needs two classes of pictures; --fid-samples 0 does without")
    if not args.reference and len(data.images) < 2 * FEATURES[args.features]:
        raise InputError(f"{len(data.images)} real images are too few for the covariance of {args.features} "
                         f"features; --features classifier needs {2 * FEATURES['classifier']}")
    common.save(lambda file: None, CACHE / ".writable")  # InputError if it is not
    if args.features == "classifier":
        return classifier_features(data, device)
    return inception_features(args.fid_mode, device)


def check_distance(args, device, data):
    """Before a training: refuse flags that cannot be used; say if no distance can be computed."""
    if args.reference:
        common.load_moments(args.reference)
    try:
        load_features(args, device, data)
    except InputError as error:
        if args.features == "classifier":
            raise
        say(f"As it is, no distance can be computed: {error}. --features classifier needs no download, and "
            "--fid-samples 0 no distance. The training goes on; it can be judged at any later time.")


@torch.no_grad()
def agreement(images, wanted, data, device):
    """The share of images, uint8 [n, C, H, W], that the classifier of the data sorts into their class."""
    saved = common.load_pt(CACHE / f"classifier-{data.sha256[:12]}.pt", ["network"], "remove it")["network"]
    network = Classifier(len(saved["out.bias"])).to(device).eval()
    network.load_state_dict(saved)
    found = [network(common.to_float(part))[1].argmax(1).cpu() for part in images.split(SAMPLE_BATCH)]
    return (torch.cat(found) == wanted).float().mean().item()


@torch.no_grad()
def moments(features, images):
    """n, sum [D] and sum of products [D, D] of the images' features, float64. Those of parts add up."""
    totals = [0, 0, 0]
    for part in progress(images[RANK::WORLD].split(SAMPLE_BATCH), "features"):
        f = features(part)
        f = f.double() if f.device.type == "cuda" else f.cpu().double()
        found = [torch.ones_like(f[:, 0]).sum(), f.sum(0), f.T @ f]
        totals = [total + value for total, value in zip(totals, found)]
    return [all_reduce(total) for total in totals]


def gaussian(n, total, products):
    """Mean [D] and covariance [D, D] from moments()."""
    return total / n, (products - torch.outer(total, total) / n) / (n - 1)


def frechet_distance(mean_a, cov_a, mean_b, cov_b):
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2) (Heusel et al. 2017, section 3)."""
    mean_b, cov_b = mean_b.to(mean_a.device), cov_b.to(cov_a.device)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # S_a^1/2, and S_a^1/2 S_b S_a^1/2 is symmetric
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def reference(features, name, data, device):
    """What samples are compared with: mean and cov of the real images' features; floor, the distance between
    their halves; noise, the distance of pure noise. Kept in data/cache."""
    def make():
        halves = [moments(features, data.images[i::2]) for i in range(2)]
        mean, cov = gaussian(*(a + b for a, b in zip(*halves)))
        noise = common.to_uint8(normal(min(len(data.images), 5_000), device, 0))
        return {"mean": mean, "cov": cov,
                "floor": frechet_distance(*gaussian(*halves[0]), *gaussian(*halves[1])),
                "noise": frechet_distance(*gaussian(*moments(features, noise)), mean, cov)}

    return cached(CACHE / f"reference-{data.sha256[:12]}-{name}.pt", ["mean", "cov", "floor", "noise"], make)


def evaluate(networks, args, device, data):
    """Draw pictures of {"model": network, maybe "one-step": network} and compute their distances.

    Files in --run-dir: samples_*.png, trajectory.png, samples.npz, one_step_samples.npz, and results.jsonl,
    a line for each distance.
    """
    run, classes = Path(args.run_dir), networks["model"].config["classes"]
    # before all else, as a training may replace these files meanwhile
    digests = {weights: common.sha256(network.source) for weights, network in networks.items()}
    rows = [("model", args.solver, steps) for steps in (args.steps if args.solver != "dopri5" else [None])]
    if "one-step" in networks:
        rows += [row for row in (("model", "euler", 1), ("one-step", "euler", 1)) if row not in rows]
    for weights, solver, steps in rows:
        network = networks[weights]
        images, _, _, course = sample(network, grid_labels(args, classes), solver, steps, args, device)
        head = f"head{network.head}" if len(network.heads) > 1 else ""
        name = "_".join(str(part) for part in ("samples", weights, head, solver, steps) if part)
        if RANK == 0:
            common.save_grid(images, run / f"{name}.png")
            if weights == "model" and (steps or max(args.steps)) == max(args.steps):  # a row for each sample
                common.save_grid(course.transpose(0, 1).flatten(0, 1), run / "trajectory.png", len(course))
    for network in networks.values():  # not earlier, or batches of 64 would be compiled, too
        compile_network(network, args, device)
    if args.save_samples:
        wanted = drawn_labels(args.save_samples, args, classes)
        if args.classes:
            wanted = torch.tensor(args.classes).repeat(args.save_samples)[:args.save_samples]
        for weights, network in networks.items():
            name, solver, steps = "samples.npz", args.solver, args.steps[-1]
            if weights == "one-step":
                name, solver, steps = "one_step_samples.npz", "euler", 1
            images, *_ = sample(network, wanted, solver, steps, args, device)
            arrays = {"arr_0": images.permute(0, 2, 3, 1).cpu().numpy(), "arr_1": wanted.numpy()}
            if RANK == 0:
                common.save(lambda file, arrays=arrays: np.savez(file, **arrays), run / name)
    if not args.fid_samples:
        return
    features, name = load_features(args, device, data)
    if args.reference:
        mean, cov = common.load_moments(args.reference)
        real = {"mean": mean, "cov": cov, "floor": None, "noise": None}
        about, digest = Path(args.reference).name, common.sha256(args.reference)
    else:
        real, about, digest = reference(features, name, data, device), data.about, data.sha256[:12]
    figure = "FD (classifier)"
    if args.features == "inception":
        figure = "FID" if args.fid_samples >= 50_000 else f"FID-{args.fid_samples / 1000:g}k"
    seen = networks["model"].images_seen
    say(f"{figure} of {args.fid_samples:,} samples of random classes to {about}; lower is better. Features "
        f"{name}, EMA weights, seed {args.sample_seed}, {seen:,} images seen.\n"
        f"{'weights':10}{'head':6}{'solver':8}{'NFE':>6}{figure:>18}{'straightness':>14}{'right class':>13}")
    for label, value in (("half of the real images", real["floor"]), ("pure noise", real["noise"])):
        say(f"{label:30}{'not known' if value is None else f'{value:.3f}':>18}")
    for weights, solver, steps in rows:
        network = networks[weights]
        wanted, share = drawn_labels(args.fid_samples, args, classes), None
        images, nfe, bend, _ = sample(network, wanted, solver, steps, args, device)
        if args.features == "classifier" and classes == len(data.classes):
            share = agreement(images, wanted, data, device)
        value = frechet_distance(*gaussian(*moments(features, images)), real["mean"], real["cov"])
        bend = bend if nfe > 1 else None  # one step is straight by construction
        say(f"{weights:10}{network.head:<6}{solver:8}{nfe:6.4g}{value:18.3f}"
            f"{'' if bend is None else f'{bend:.5f}':>14}{'' if share is None else f'{share:.1%}':>13}")
        row = dict(figure=figure, n=args.fid_samples, features=name, reference=about, reference_sha256=digest,
                   seed=args.sample_seed, images_seen=seen, weights=f"{weights} EMA", head=network.head,
                   model_sha256=digests[weights], solver=solver, steps=steps, nfe=nfe,
                   tolerance=None if steps else args.tolerance, value=value, straightness=bend,
                   right_class=share, floor=real["floor"], noise=real["noise"], torch=torch.__version__,
                   device=str(device))
        if RANK == 0:
            with open(run / "results.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")


# ----------------------------------------------------------------------------------------------------- flags

PAPER = dict(  # the recipe of the paper, its released code and a released checkpoint (the iterations)
    run_dir="runs/imagenet64", channels=192, multipliers=[1, 2, 3, 4], blocks=3, attention=[32, 16, 8],
    dropout=0.1, iterations=500_000, batch_size=1_024, lr=4e-4, warmup=0, ema_decay=0.9999432189950708,
    flip=True, one_step_iterations=40_000)  # the one-step stage is our choice
QUICK = dict(
    run_dir="runs/imagenet64-quick", data="glyphs", channels=8, multipliers=[1, 2, 4, 8], blocks=1,
    attention=[16, 8], dropout=0.0, iterations=1_200, batch_size=16, lr=2e-3, ema_decay=0.995, flip=False,
    checkpoint_every=600, steps=[1, 4, 15], one_step=True, one_step_iterations=120, one_step_pairs=500,
    features="classifier", fid_samples=500, compile="off")
NETWORK = ("channels", "multipliers", "blocks", "attention", "skip_phi")  # which a model file holds, too
DEFINES = (*NETWORK, "rk_order", "step_rule", "intervals", "target", "loss_ramp", "wavelet_weight",
           "batch_size", "lr", "warmup", "ema_decay", "dropout", "flip", "seed")  # fixed in a run
OF_ONE_COMMAND = ("run_dir", "quick", "prepare", "model", "device")  # not in config.json
DATA_HELP = ("folder of ImageNet's unzipped 64x64 npz files, folder or .zip of pictures, or 'glyphs'; unset: "
             "what --cache holds")


def load_data(args):
    """common.Data of --data, its images left on the disk."""
    if args.data == "glyphs":
        return common.make_data(*common.drawn_digits(4_000, IMAGE), "drawn digits")
    if RANK > 0 and not (Path(args.cache) / "about.json").exists():  # rank 0 has just made it
        raise InputError(f"--cache {args.cache} is not on this node: share it, or run --prepare here first")
    return common.load_imagenet(args.data, args.cache, IMAGE)


def number(kind, accepts, words):
    """A type for argparse: int or float, refused with `words` where accepts(value) is false."""
    def parse(text):
        value = kind(text)
        if not accepts(value):  # nan is never accepted
            raise argparse.ArgumentTypeError(f"{text} must be {words}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def absolute(path):
    """A path as the run folder remembers it, so that the run goes on from any other folder."""
    if not path:
        raise argparse.ArgumentTypeError("the path is empty")
    return path if path == "glyphs" else os.path.abspath(path)


def refuse_differences(path, then, now):
    """InputError if flags {name: value} that `path` was made with are others now; those it lacks pass."""
    differ = [f"--{name.replace('_', '-')} {then[name]}, not {value}"
              for name, value in now.items() if name in then and then[name] != value]
    if differ:
        raise InputError(f"{path} was made with {'; '.join(differ)}. Leave out what differs to go on with "
                         "that run; anything else is another run, in another --run-dir")


def save_config(args, device):
    """config.json: the flags, which the run folder remembers, and the versions that a result depends on."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    about = dict(args={name: value for name, value in vars(args).items() if name not in OF_ONE_COMMAND},
                 script=Path(__file__).name, image=IMAGE, commit=commit, python=platform.python_version(),
                 torch=torch.__version__, numpy=np.__version__, device=f"{WORLD} x {device.type} {chip}")
    common.save_text(json.dumps(about, indent=1), Path(args.run_dir) / "config.json")


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def parse_args(argv=None):
    """The flags. Those given win over what the run folder remembers, that over what --quick, --teacher and
    --init imply, and that over the paper's recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False,
                                     usage=argparse.SUPPRESS)
    yes_no = argparse.BooleanOptionalAction
    count, natural = number(int, lambda n: n >= 1, "1 or more"), number(int, lambda n: n >= 0, "0 or more")
    positive = number(float, lambda x: 0 < x < math.inf, "above 0")
    weight = number(float, lambda x: 0 <= x < math.inf, "0 or more")
    share = number(float, lambda x: 0 <= x < 1, "from 0 to below 1")
    targets = ["online", "ema", "consistency", "progressive"]
    modes, switch = ["legacy_tensorflow", "clean"], ["auto", "on", "off"]

    flag = parser.add_argument_group("run").add_argument
    flag("--quick", action=yes_no, default=False, help="a tour on drawn digits with a small network")
    flag("--prepare", action=yes_no, default=False, help="read --data into --cache, and stop")
    flag("--run-dir", help="the run's folder, which remembers its flags; one with a checkpoint goes on")
    flag("--model", help="evaluate this model file and train nothing; --run-dir takes the results")
    flag("--device", help="cpu, cuda, cuda:1, mps (never tried); unset: cuda if there is one")

    flag = parser.add_argument_group("data (a run goes on with the same images only)").add_argument
    flag("--data", type=absolute, help=DATA_HELP)
    flag("--cache", type=absolute, default="data/imagenet64", help="where the pictures are kept once read")

    flag = parser.add_argument_group("machine (may change later)").add_argument
    flag("--amp", choices=switch, default="auto", help="bfloat16; auto: on GPUs that have it")
    flag("--compile", choices=switch, default="auto", help="torch.compile; auto: on GPUs since Volta (2017)")
    flag("--accumulate", type=count, default=1, help="parts a rank's batch is split into, to save memory")
    flag("--checkpoint-every", type=count, default=5_000, help="iterations; a sample grid comes with each")
    flag("--evaluate-every", type=natural, default=0, help="iterations; keeps model_NNNNNNN.pt; 0: never")

    flag = parser.add_argument_group("method (fixed when the run has begun)").add_argument
    flag("--rk-order", type=int, choices=range(4), default=1, help="k (RK12, RK23, RK34); 0: rectified flow")
    flag("--step-rule", choices=STEP_RULES, default="uniform",
         help="step h: uniform in (0, 1/N), the paper's; proportional t/N, better in our tests; constant 1/N")
    flag("--intervals", type=count, default=16, help="N of the step rule")
    flag("--target", choices=targets, default="online", help="y_j by network or EMA; the others: --teacher's")
    flag("--loss-ramp", action=yes_no, default=False,
         help="weights w_1 = 2 i/I, w_2 = 2 (1 - i/I) of the loss; fixes --iterations, too")
    flag("--wavelet-weight", type=weight, default=1.0, help="w_3, of differences in detail; 0 with --teacher")
    flag("--teacher", type=absolute, help="model file of the frozen teacher; the student begins as its v_1; "
         "implies --target consistency, --step-rule constant")
    flag("--init", type=absolute, help="model file whose weights begin the training; not read later")

    flag = parser.add_argument_group("training (fixed when the run has begun)").add_argument
    flag("--batch-size", type=count, help="images per iteration, over all ranks")
    flag("--lr", type=positive, help="Adam's learning rate")
    flag("--warmup", type=natural, help="iterations of linear warm-up, at most a tenth of --iterations")
    flag("--ema-decay", type=share, help="EMA decay per iteration, warmed up as (1 + i)/(10 + i)")
    flag("--dropout", type=share, help="probability, in every residual block")
    flag("--flip", action=yes_no, help="mirror every other image, at random")
    flag("--seed", type=natural, default=0, help="of weights and training draws")

    flag = parser.add_argument_group("network (fixed when the run has begun)").add_argument
    flag("--channels", type=count, help="c, the unit of width")
    flag("--multipliers", type=count, nargs="+", help="of c, one per level; levels halve the size")
    flag("--blocks", type=count, help="residual blocks per level")
    flag("--attention", type=count, nargs="*", help="sizes, in pixels, of the levels that have it")
    flag("--skip-phi", type=share, default=0.75, help="phi of the skips; 0.5: off")

    flag = parser.add_argument_group("budget").add_argument
    flag("--iterations", type=count, help="I; may grow when a run is continued")
    flag("--one-step", action=yes_no, default=False, help="then train a one-step student in three parts")
    flag("--one-step-iterations", type=count, help="of each part; fixed when the student has begun")
    flag("--one-step-pairs", type=count, default=50_000, help="noise draws it learns from; fixed likewise")
    flag("--one-step-lr", type=positive, help="its learning rate; unset: --lr, as released; fixed likewise")

    flag = parser.add_argument_group("evaluation (may change later)").add_argument
    flag("--steps", type=count, nargs="+", default=[15], help="network evaluations (NFE) an image")
    flag("--classes", type=natural, nargs="*",
         help="of the pictures and --save-samples; none: ten for pictures, else random")
    flag("--head", type=count, help="the velocity that samples follow, 1 to k; unset: the last")
    flag("--solver", choices=list(common.SOLVERS), default="euler", help="the paper's; ab2 measured better")
    flag("--tolerance", type=positive, default=1e-4, help="of dopri5, which ignores --steps")
    flag("--fid-samples", type=natural, default=50_000,
         help="number of samples; below 50,000 it is called FID-5k and so on; 0 skips the distance")
    flag("--fid-mode", choices=modes, default="legacy_tensorflow", help="clean-fid's; default: as in papers")
    flag("--reference", type=lambda path: path and absolute(path),
         help=".npz of mu and sigma (EDM's, ADM's) in place of the images; '': the images again")
    flag("--features", choices=list(FEATURES), default="inception", help="or a classifier's: no FID")
    flag("--sample-seed", type=natural, help="of the samples; unset: --seed")
    flag("--save-samples", type=natural, default=0, help="images for samples.npz at the last of --steps")

    parser.set_defaults(**PAPER)
    first = vars(parser.parse_args(argv))
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(first))))
    given = {name: value for name, value in given.items() if value is not None}
    implied = dict(QUICK) if first["quick"] else {}
    if first["teacher"]:
        implied |= dict(step_rule="constant", target="consistency")
    config = Path((first | implied | given)["run_dir"]) / "config.json"
    if config.exists() and not first["model"]:
        with common.reading(config, "move it away, and give the flags of the run again"):
            about = json.loads(config.read_text())
            remembered = {name: value for name, value in about["args"].items() if name in first}
            if about["image"] != list(IMAGE):
                raise InputError(f"{config.parent} is a run of {about['script']}, which makes other images")
        fixed = {*DEFINES, "init", "teacher"}
        if remembered.get("teacher") and (config.parent / "checkpoint.pt").exists():
            fixed.remove("teacher")  # its file may have moved; the checkpoint holds its sha256
        refuse_differences(config, remembered, {name: given[name] for name in given if name in fixed})
        gives = [f"--{name.replace('_', '-')} {value}" for name, value in remembered.items()
                 if name not in given and value != (first | implied)[name]]
        say(f"{config} gives {', '.join(gives) or 'nothing new'}")
        implied |= remembered
    elif file := first["teacher"] or first["init"]:
        known = load_model(file).config
        for name in NETWORK:
            if given.get(name, known[name]) != known[name]:
                parser.error(f"the network is that of {file}: leave out --{name.replace('_', '-')}")
            implied[name] = known[name]
    parser.set_defaults(**implied)
    args = parser.parse_args(argv)
    if args.sample_seed is None:
        args.sample_seed = args.seed
    if args.model and "run_dir" not in given:
        parser.error("--model needs --run-dir, the folder for its results")
    if args.teacher and (args.init or args.rk_order != 1 or args.loss_ramp or args.target == "online"):
        parser.error("a student of a --teacher has --rk-order 1 and another --target than online; it takes "
                     "no --init and no --loss-ramp")
    if not args.teacher and args.target in ("consistency", "progressive"):
        parser.error(f"--target {args.target} needs a --teacher")
    if 0 < args.fid_samples <= FEATURES[args.features]:
        parser.error(f"--fid-samples: the covariance of {FEATURES[args.features]} {args.features} features "
                     "needs more samples than that; 0 skips the distance")
    if args.reference and (args.features, args.fid_mode) != ("inception", "legacy_tensorflow"):
        parser.error("--reference needs the features of such files: inception, in legacy_tensorflow mode")
    return args


# ------------------------------------------------------------------------------------------------------ main


def main(argv=None):
    """The command line; returns the exit status, which is 2 after an InputError."""
    try:
        args = parse_args(argv)
        device, data = start(args.device), None
        if device.type == "cuda" and args.compile == "auto" and torch.cuda.get_device_capability() < (7, 0):
            say("This GPU is too old for torch.compile; the training is slower without it.")
        trains = not args.model and iterations_done(args) < args.iterations
        if trains or args.prepare or (args.fid_samples and not args.reference):
            with rank_zero_first():
                data = load_data(args)
            say(data.found())
        if args.prepare:
            return 0
        if args.model:
            networks = {"model": prepare(load_model(args.model, args.head), args, device)}
        else:
            networks = {"model": fit(CatchUp(args, device, data), args, device)}
            if args.one_step:
                networks["one-step"] = fit(OneStep(args, device, networks["model"]), args, device)
        evaluate(networks, args, device, data)
        say(f"All results are in {args.run_dir}; the pictures are samples_*.png.")
    except (InputError, torch.OutOfMemoryError) as error:
        remedy = "" if isinstance(error, InputError) else " In training, a larger --accumulate needs less."
        print(f"{Path(__file__).name}: error: {common.first_line(error)}{remedy}", file=sys.stderr)
        return 2
    if WORLD > 1:
        gc.collect()  # DDP's wrapper must go before its process group: one in five runs over gloo aborted
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    status = main()
    if WORLD > 1 and status:  # an orderly end would wait for the other ranks
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
