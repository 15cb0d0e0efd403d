# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "numpy", "pillow", "clean-fid"]
# ///
"""Catch-Up Distillation (CUD) on ImageNet 64x64 by class: train a flow model once, sample it in few steps.

A flow model learns the velocity that carries noise to data. CUD also lets it catch up with itself: its output
at time t is pulled towards its own output a little further along its own trajectory, which a Runge-Kutta step
finds. The trajectories become straight, so few steps suffice. No teacher or second training is needed;
--teacher and --one-step offer them.

    x, z          data in [-1, 1] and noise, [B, C, H, W]
    t in [0, 1]   time: t = 0 is data, t = 1 is noise
    x_t           t z + (1 - t) x
    u             dx_t/dt = z - x, the true velocity
    v_1 .. v_k    the network's heads at (x_t, t); sampling integrates the last, or --head
    k             --rk-order: 1, 2, 3 are the paper's RK12, RK23, RK34; 0: rectified flow, v_1 without any y
    h             the step, drawn for each sample
    k_1 .. k_k    the Runge-Kutta slopes: k_i is v_1 at time t - (i - 1) h
    X_j           x_t - h sum_i b_i(j) k_i: the trajectory's point at time t - j h, j = 1 .. k
    y_j           v_1(X_j, t - j h) without gradient; u, for every j, where t - k h would pass the data

    loss = w_1 sum_j |v_j - y_j|^2  +  w_2 sum_j |v_j - u|^2  +  w_3 |detail(z - v_k) - detail(x)|_1
           catch up with itself        stay true to the data     the largest fifth of wavelet differences
    w_1 = w_2 = 1, but for --loss-ramp

The network is told the class of x; z is drawn without an encoder.

    python cud_imagenet64.py --quick                              a tour on a CPU in ten minutes, no download
    torchrun --nproc-per-node 8 cud_imagenet64.py --data FOLDER   the paper's recipe on eight GPUs: README
    python cud_imagenet64.py --classes 207 360                    evaluates that run; pictures of two classes

Measured (--quick: drawn digits, a small network, seed 0, one CPU thread; no FID): FD (classifier) is 338.5,
61.5 and 57.5 at 1, 4 and 15 Euler steps, 101.3 at one after the one-step stage; a classifier finds the digit
that was asked for in 74, 82, 77 and 77 % of them. On real pictures, or a GPU, the recipe was not run.

Paper: "Catch-Up Distillation: You Only Need to Train Once for Accelerated Sampling", arXiv 2305.10769.
"""
import argparse
import copy
import functools
import hashlib
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

import common
from common import (
    DEFINES,
    FORGOTTEN,
    MAY_CHANGE,
    InputError,
    all_reduce,
    ceil_div,
    number,
    progress,
    rank,
    world,
)

# ------------------------------------------------------------------------------------------------ the method

EPS = 1e-5  # training's earliest time: at t = 0 the data is reached, and no velocity is left to learn
STEP_RULES = ("uniform", "proportional", "constant")
INNER = {  # [points][i]: slope k_i is taken at x_t - h (a_1 k_1 + .. + a_(i-1) k_(i-1)), these are the a
    "published": {2: [1], 3: [7/4, 1/4]},
    "dense": {2: [1], 3: [0, 2]}}
WEIGHTS = {  # [points][k][j - 1]: b_1(j) .. b_k(j)
    "published": {  # the paper's, b(j) = j b(1): the first point has the method's order, the others have not
        1: [[1]],
        2: [[1/2, 1/2], [1, 1]],
        3: [[5/12, 2/3, -1/12], [10/12, 4/3, -2/12], [15/12, 2, -3/12]]},
    "dense": {  # over the span k h: Euler, explicit midpoint, Heun's third order with their dense output
        1: [[1]],
        2: [[1/2, 1/2], [0, 2]],
        3: [[5/12, 2/3, -1/12], [1/3, 4/3, 1/3], [3/4, 0, 9/4]]}}


def step_size(rule, t, n, uniform):
    """The step h [B] by one of the paper's STEP_RULES, from t [B], N and draws [B] of U(0, 1)."""
    if rule == "uniform":
        return uniform / n
    if rule == "proportional":
        return t / n
    return torch.full_like(t, 1 / n)


def align(t, x):
    """t [B] as [B, 1, ...], to be multiplied with x [B, ...]."""
    return t.view(-1, *[1] * (x.dim() - 1))


def mix(weights, slopes):
    return sum(weight * slope for weight, slope in zip(weights, slopes))


@torch.no_grad()
def catch_up_points(velocity, x_t, t, h, k_1, order=1, points="published"):
    """The next `order` points of the trajectory through x_t, by one Runge-Kutta step (paper, section 3).

    velocity: callable (x [B, ...], t [B]) -> [B, ...], called order - 1 times; k_1: its value at (x_t, t);
    h [B] >= 0. Returns X [order, B, ...], X[j - 1] at time t - j h, and these times [order, B], at least EPS.
    """
    h_x, slopes = align(h, x_t), [k_1]
    for i in range(2, order + 1):
        x = x_t - h_x * mix(INNER[points][i], slopes)
        slopes.append(velocity(x, (t - (i - 1) * h).clamp(min=EPS)))
    where = [x_t - h_x * mix(weights, slopes) for weights in WEIGHTS[points][order]]
    when = [(t - j * h).clamp(min=EPS) for j in range(1, order + 1)]
    return torch.stack(where), torch.stack(when)


def catch_up_loss(network, x, z, t, h, order=1, points="published", velocity=None, target=None):
    """L_catchup, L_truth, each [B]: squared errors, averaged over a sample's dimensions, summed over heads.

    network: callable (x_t [B, ...], t [B]) -> v_1 .. v_k [max(order, 1), B, ...]; x data, z noise [B, ...].
    velocity: makes the slopes, by default v_1 of `network`; target: makes the y_j, by default `velocity`.
    ValueError where the network's output has another shape.
    """
    def first_head(x, t):
        return network(x, t)[0]

    velocity = velocity or first_head
    x_t, u = align(t, x) * z + (1 - align(t, x)) * x, z - x
    v = network(x_t, t)  # the one evaluation with gradient
    if v.shape != (max(order, 1), *x.shape):
        raise ValueError(f"order {order} needs a network that returns its heads stacked, "
                         f"{[max(order, 1), *x.shape]}; it returned {list(v.shape)}")
    truth = (v - u).square().flatten(2).mean(2).sum(0)  # its gradient reaches an encoder through u as well
    if order == 0:
        return torch.zeros_like(truth), truth
    with torch.no_grad():  # the output moves towards the target, never the target towards the output
        where, when = catch_up_points(velocity, x_t, t, h, v[0], order, points)
        y = (target or velocity)(where.flatten(0, 1), when.flatten()).view_as(v)  # one batch of k B
        y = torch.where(align(t - order * h < EPS, x), u, y)
    return (v - y).square().flatten(2).mean(2).sum(0), truth


def distillation_loss(network, teacher, ema, x, z, t, h, rule):
    """The loss [B] of a one-head student of a frozen teacher: no truth, no encoder.

    teacher, ema: callables (x [B, ...], t [B]) -> velocity [B, ...]; X_1: one Euler step of the teacher.
    "consistency": x_t - t v lands where the EMA lands from X_1 (Song et al. 2023, eq. 7);
    "progressive": v is the teacher's mean slope over two such steps (Salimans & Ho 2022);
    "ema": v is the EMA's velocity at X_1 (what the released code calls consistency distillation).
    Steps are shortened to end at EPS, so that u never replaces a target.
    """
    h = torch.minimum(h, (t - EPS) / (2 if rule == "progressive" else 1))
    x_t = align(t, x) * z + (1 - align(t, x)) * x
    v = network(x_t, t)[0]
    with torch.no_grad():
        k_1 = teacher(x_t, t)
        where, when = catch_up_points(teacher, x_t, t, h, k_1)
        y = (teacher if rule == "progressive" else ema)(where[0], when[0])
    if rule == "progressive":
        y = (k_1 + y) / 2
    error = v - y
    if rule == "consistency":
        error = x_t - align(t, x) * v - (where[0] - align(when[0], x) * y)
    return error.square().flatten(1).mean(1)


DB3 = (  # Daubechies' low-pass filter with three vanishing moments
    0.035226291882100656, -0.08544127388224149, -0.13501102001039084, 0.4598775021193313, 0.8068915093133388,
    0.3326705529509569)


@functools.cache
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
    if channels % 2 or channels % groups:
        raise InputError(f"--channels, --multipliers: {channels} channels do not divide into {groups} groups")
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
                raise InputError(f"--channels, --multipliers: {c_out} do not divide into {c_out // 64} heads")
            self.norm3, self.qkv = norm(c_out), conv(c_out, 3 * c_out, 1)
            self.proj = zero(conv(c_out, c_out, 1))

    def forward(self, x, emb):
        h = self.conv1(self.resize(F.silu(self.norm1(x))))
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, 1)
        h = self.conv2(self.dropout(F.silu(self.norm2(h) * (1 + scale) + shift)))
        x = h + self.skip(self.resize(x))
        if not self.attention:
            return x
        qkv = self.qkv(self.norm3(x)).flatten(2).mT  # [B, H W, 3 C], to heads of 64 channels or one of all
        q, k, v = qkv.unflatten(2, (3, max(1, x.shape[1] // 64), -1)).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mT.reshape_as(x)
        return x + self.proj(h)


class UNet(nn.Module):
    """ADM UNet (Dhariwal & Nichol 2021) of `classes` classes with `heads` velocity heads.

    image: (C, H, W); attention: the sizes H that have it beside the bottom; skip_phi: phi of the skips, which
    weigh 2 (1 - phi) at t = 0 and 2 phi at t = 1 (the paper's prior ShakeDrop).
    """

    def __init__(self, image, channels, multipliers, blocks, attention, dropout, classes, heads=1,
                 skip_phi=0.75):
        self.config = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        super().__init__()
        sizes = [image[1] // 2 ** level for level in range(len(multipliers))]
        if image[1] % 2 ** (len(multipliers) - 1):
            raise InputError(f"--multipliers: {image[1]} px cannot be halved {len(multipliers) - 1} times")
        if not set(attention) <= set(sizes):
            raise InputError(f"--attention {attention}: the levels have the sizes {sizes}")
        self.channels, self.skip_phi, self.amp, self.head = channels, skip_phi, False, heads
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
                self.encoder.append(Block(c, channels * multiplier, emb, dropout, None,
                                          sizes[level] in attention))
                c = channels * multiplier
                skips.append(c)
        self.bottom = nn.ModuleList([Block(c, c, emb, dropout, None, True), Block(c, c, emb, dropout)])
        for level, multiplier in reversed(list(enumerate(multipliers))):
            if level < len(multipliers) - 1:
                self.decoder.append(Block(c, c, emb, dropout, "up"))
            for _ in range(blocks + 1):
                self.decoder.append(Block(c + skips.pop(), channels * multiplier, emb, dropout, None,
                                          sizes[level] in attention))
                c = channels * multiplier
        self.heads = nn.ModuleList(nn.Sequential(norm(c), nn.SiLU(), zero(conv(c, image[0], 3)))
                                   for _ in range(heads))

    def forward(self, x, t, labels, heads=slice(None)):
        """x [B, C, H, W], t [B], labels [B], or [B / k] for k batches of the same classes one after the other
        -> these heads (all by default), of x's type [heads, B, C, H, W]."""
        half = self.channels // 2
        angle = t[:, None] * 10_000 ** (-torch.arange(half, dtype=t.dtype, device=t.device) / half)
        emb = self.embed(torch.cat([angle.cos(), angle.sin()], 1))  # float32: bfloat16 resolves t to 0.004
        emb = F.silu(emb + self.embed_class(labels.repeat(len(x) // len(labels))))
        p = (t * (1 - 2 * self.skip_phi) + self.skip_phi).view(-1, 1, 1, 1)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp):
            h = self.first(x)
            skips = [h]
            for block in self.encoder:
                h = block(h, emb)
                skips.append(h)
            for block in self.bottom:
                h = block(h, emb)
            for block in self.decoder:
                if block.resample != "up":  # p is float32: without the casts so would be all that follows
                    h = torch.cat([(2 * p * h).to(h.dtype), (2 * (1 - p) * skips.pop()).to(h.dtype)], 1)
                h = block(h, emb)
            return torch.stack([head(h).to(x.dtype) for head in self.heads[heads]])

    def velocity(self, x, t, labels):
        """v_1, which makes stages and targets: x [B, C, H, W], t [B], labels [B] -> [B, C, H, W]."""
        return self(x, t, labels, slice(0, 1))[0]

    def sampled(self, x, t, labels):
        """The chosen head's velocity, which sampling integrates; as velocity()."""
        return self(x, t, labels, slice(self.head - 1, self.head))[0]

    def choose(self, head):
        """Let v_head sample, by default the last. InputError where there is none."""
        if head and head > len(self.heads):
            raise InputError(f"--head {head}: there are {len(self.heads)}")
        self.head = head or len(self.heads)


def load_model(path, device="cpu", head=None):
    """The network that a run has saved, in evaluation mode, without gradients; head samples, by default the
    last. InputError where the file is damaged, of other images, or its weights are not finite."""
    remedy = "give a model.pt that this script has written"
    saved = common.load_pt(path, ["model", "args", "images_seen"], remedy)
    with common.reading(path, remedy):
        config = common.plain(saved["args"], most=4_096, texts=False)
        if tuple(config["image"]) != IMAGE:
            raise ValueError(f"it makes images {config['image']}, not {IMAGE}")
        if max(config["blocks"], config["heads"]) > len(saved["model"]):
            raise ValueError("its blocks or heads are more than its tensors")
        network = UNet(**config)
        common.restore(network.state_dict(), saved["model"], "model")  # from half precision, too
        network.source, network.images_seen = path, int(saved["images_seen"])
    network.choose(head)
    return network.to(device).eval().requires_grad_(False)


def begin_from(saved, heads, dropout):
    """A network with `heads` heads that begins with the weights of another one, whose last head stands in for
    those that it lacks."""
    network = UNet(**saved.config | dict(heads=heads, dropout=dropout))
    weights = saved.state_dict()
    for name in network.state_dict().keys() - weights.keys():
        head, part = name.removeprefix("heads.").split(".", 1)
        weights[name] = weights[f"heads.{len(saved.heads) - 1}.{part}"]
    network.load_state_dict({name: weights[name] for name in network.state_dict()})
    return network


def prepare(network, args, device):
    """Move a network to the device, in the layout and the precision that are fast there."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    network.amp = args.amp == "on" or (args.amp == "auto" and has_bf16)
    return network.to(device, memory_format=torch.channels_last)


def compile_networks(networks, args, device):
    """torch.compile in place, which leaves the names of the weights as they are."""
    if args.compile == "on" or (args.compile == "auto" and device.type == "cuda"):
        common.check_compiler(device)
        torch._dynamo.config.recompile_limit = 64  # networks, batch sizes and numbers of heads share forward
        for network in networks:
            network.compile(dynamic=False)


# -------------------------------------------------------------------------------------------------- training

LOG_EVERY = 100  # iterations to a row of metrics.csv
SPEAK_EVERY = 30  # seconds, at least, between lines on the progress where there is no terminal


def normal(n, device, *key):
    """Standard normal noise [n, C, H, W], a function of `key` alone."""
    return torch.randn(n, *IMAGE, device=device, generator=common.generator(device, *key))


class CatchUp(nn.Module):
    """The training loss as a module of what it trains, the network."""

    columns = "loss catchup truth wavelet loss_t_0_25 loss_t_25_50 loss_t_50_75 loss_t_75_100".split()

    def __init__(self, network, target, args, teacher=None):
        super().__init__()
        self.network, self.args = network, args
        self.target, self.teacher = target, teacher  # velocities

    def forward(self, x, noise, t, h, done, labels):
        """x, noise [B, C, H, W]; t, h, labels [B]; done i/I. Mean loss; sums, counts [2, columns] to log."""
        args, landings = self.args, []

        def told(velocity):
            return functools.partial(velocity, labels=labels)

        def network(x_t, t):
            v = self.network(x_t, t, labels)
            landings.append(noise - v[-1])  # as if v led all the way from noise to data
            return v

        if self.teacher:
            catchup = distillation_loss(network, told(self.teacher), told(self.target), x, noise, t, h,
                                        args.target)
            truth = wavelet = torch.zeros_like(t)
        else:
            catchup, truth = catch_up_loss(network, x, noise, t, h, args.rk_order, args.rk_points,
                                           told(self.network.velocity),
                                           told(self.target or self.network.velocity))
            wavelet = wavelet_loss(landings[0], x)
        w_1, w_2 = (2 * done, 2 * (1 - done)) if args.loss_ramp else (1, 1)
        loss = w_1 * catchup + w_2 * truth + args.wavelet_weight * wavelet
        with torch.no_grad():
            quarters = F.one_hot((4 * t).long().clamp(max=3), 4).to(t.dtype)  # [B, 4]
            sums = torch.cat([torch.stack([loss, catchup, truth, wavelet]).sum(1), loss @ quarters])
            counts = torch.cat([torch.full_like(sums[:4], len(t)), quarters.sum(0)])
        return loss.mean(), torch.stack([sums, counts])


@dataclass
class Stage:
    """A training as fit() sees it: the main one, or the one-step stage after it."""

    name: str  # "" or "one_step_": begins the names of its files
    loss: nn.Module  # loss(*draw(i)): the mean loss, and what to log of it; loss.network learns
    ema: nn.Module  # the running average of loss.network, which samples
    networks: list  # to compile
    draw: Callable  # i -> this rank's batch of iteration i, from (seed, i) alone: resuming needs no state
    iterations: int
    warmup: int  # iterations in which the learning rate rises
    definition: dict  # flags, by name, on which a checkpoint must agree
    pictures: Callable  # network -> uint8 [n, C, H, W] to look at
    evaluate: Callable | None = None  # network -> None, for --evaluate-every


class Training:
    """A stage under way: what continues it, and what it tells."""

    def __init__(self, stage, args, device):
        self.stage, self.args, self.device = stage, args, device
        self.run, self.name = Path(args.run_dir), stage.name.rstrip("_") or "model"
        self.checkpoint = self.run / f"{stage.name}checkpoint.pt"
        self.previous = self.run / f"{stage.name}checkpoint_previous.pt"
        self.model = self.run / f"{self.name}.pt"
        self.table = self.run / f"{stage.name}metrics.csv"
        self.trained = list(stage.loss.parameters())
        self.optimizer = torch.optim.Adam(self.trained, args.lr, fused=device.type in ("cpu", "cuda"))
        self.parts = {"module": stage.loss, "ema": stage.ema, "optimizer": self.optimizer}
        self.totals = torch.zeros(2, len(stage.loss.columns), device=device)  # sums, counts for the next row
        self.never = torch.iinfo(torch.int64).max
        self.first_bad = torch.full((), self.never, device=device)  # first iteration with a non-finite loss
        found = [path for path in (self.checkpoint, self.previous) if path.exists()]
        self.start, token = self.resume(found[0]) if found else (0, 0)
        common.refuse_other_checkpoints(self.run, self.start, token)
        stage.ema.source, stage.ema.images_seen = self.model, self.start * args.batch_size
        if not self.start and self.model.exists():
            raise InputError(f"{self.model} has no {self.checkpoint.name} to continue from: --model "
                             f"{self.model} evaluates it, another --run-dir trains anew")

    def resume(self, path):
        """Load a checkpoint: its iteration, and the number that tells it from others."""
        remedy = "move it away to start anew"
        if path == self.checkpoint and self.previous.exists():
            remedy = f"move it away to go on from {self.previous.name}"
        saved = common.load_pt(path, [*self.parts, "iteration", "token", "totals", "definition"], remedy)
        with common.reading(path, remedy):
            iteration, token = (common.restore(0, saved[key], key) for key in ("iteration", "token"))
            now = dict(self.stage.definition)
            if iteration == self.stage.iterations:
                now.pop("data", None)  # other images may judge a finished run
            common.refuse_differences(path, common.plain(saved["definition"]), now)
            if not 0 <= token < 2**32:
                raise ValueError("its token")
            if not 0 < iteration <= self.stage.iterations:
                raise InputError(f"{path} is at iteration {iteration}, past --iterations "
                                 f"{self.stage.iterations}")
            common.restore_optimizer(self.optimizer, saved["optimizer"])  # first: it makes a step
            for key in ("module", "ema"):
                common.restore(self.parts[key].state_dict(), saved[key], key)
            self.totals += common.restore(torch.zeros_like(self.totals), saved["totals"], "totals")
        common.state.kept = f"{path} keeps iteration {iteration}"
        return iteration, token

    def begin(self):
        """Say what comes, compile, and let the ranks share the gradients."""
        args, stage = self.args, self.stage
        one = [part[:1] if torch.is_tensor(part) else part for part in stage.draw(self.start)]
        with FlopCounterMode(display=False) as counter:  # before compilation, which hides the operations
            stage.loss(*one)[0].backward()
        self.optimizer.zero_grad()
        self.flops = counter.get_total_flops()  # an image
        common.say(f"{self.name} training, iterations {self.start} to {stage.iterations}: "
                   f"{self.flops * args.batch_size / 1e9:,.1f} GFLOP each; "
                   f"{sum(p.numel() for p in stage.loss.network.parameters()):,} network parameters, "
                   f"{sum(p.numel() for p in self.trained):,} trained in all")
        compile_networks(stage.networks, args, self.device)
        self.step = stage.loss
        if world() > 1:
            self.step = nn.parallel.DistributedDataParallel(self.step, gradient_as_bucket_view=True)
        self.averaged, self.current = list(stage.ema.parameters()), list(stage.loss.network.parameters())
        columns = ["iteration", "images", *stage.loss.columns, "lr", "grad_norm", "images_per_s",
                   "model_tflop_per_s"]
        common.start_table(self.table, columns, self.start)
        common.save_json({"args": args.config, **common.versions(self.device)}, self.run / "config.json")
        self.since = self.began = self.spoke = time.time()
        self.images = 0  # since the last row

    def update(self, i):
        """One iteration: gradients in --accumulate parts, Adam, the running average."""
        args = self.args
        for group in self.optimizer.param_groups:
            group["lr"] = args.lr * min(1, (i + 1) / max(1, self.stage.warmup))
        batch = [part.chunk(args.accumulate) if torch.is_tensor(part) else [part] * args.accumulate
                 for part in self.stage.draw(i)]
        self.optimizer.zero_grad()
        for j, part in enumerate(zip(*batch), 1):
            with self.step.no_sync() if world() > 1 and j < args.accumulate else nullcontext():
                loss, log = self.step(*part)
                (loss / args.accumulate).backward()
            self.totals += log
            self.first_bad = torch.where(loss.isfinite(), self.first_bad, self.first_bad.clamp(max=i + 1))
        self.optimizer.step()
        decay = min(args.ema_decay, (1 + i) / (10 + i)) if i else 0.0  # the first weights are taken whole
        get_ema_multi_avg_fn(decay)(self.averaged, self.current, None)
        self.images += args.batch_size

    def check(self, done):
        """InputError where a loss or a weight is not finite: nothing is saved over the last checkpoint."""
        if not math.isfinite(float(nn.utils.get_total_norm([*self.trained, *self.averaged]))):
            self.first_bad.clamp_(max=done)
        bad = int(all_reduce(self.first_bad.clone(), dist.ReduceOp.MIN))
        if bad < self.never:
            other = common.command(self.args, lr=self.args.lr / 2, run_dir=f"{self.run}-lower-lr")
            raise InputError(f"loss or weights are not finite at iteration {bad} of {self.name} training; "
                             f"{common.state.kept}. Another learning rate is another run: {other}")

    def log(self, done, bar):
        """A row of metrics.csv; its loss and speed beside the bar or, where none is shown, as a line."""
        sums, counts = all_reduce(self.totals).tolist()
        means = [f"{s / c:.6g}" if c else "" for s, c in zip(sums, counts)]
        norm = float(nn.utils.get_total_norm([p.grad for p in self.trained]))
        speed = self.images / (time.time() - self.since)
        common.add_row(self.table, [
            done, done * self.args.batch_size, *means, self.optimizer.param_groups[0]["lr"], f"{norm:.6g}",
            f"{speed:.1f}", f"{speed * self.flops / 1e12:.4g}"])
        bar.set_postfix(loss=means[0], images_per_s=f"{speed:.0f}")
        left = common.duration((self.stage.iterations - done) * self.args.batch_size / speed)
        if bar.disable and time.time() > self.spoke + SPEAK_EVERY:
            common.say(f"iteration {done:,}: loss {means[0]}, {speed:.0f} images/s, {left} left")
            self.spoke = time.time()
        self.totals.zero_()
        self.since, self.images = time.time(), 0

    def estimate(self, done):
        """On a CPU, after twenty iterations: how long it will take."""
        if done == self.start + 1:
            self.began = time.time()  # the first one compiles
        elif done == self.start + 21 and self.device.type == "cpu":
            left = (time.time() - self.began) / 20 * (self.stage.iterations - done)
            common.say(f"at this speed {common.duration(left)} remain to the last iteration"
                       + "; a GPU is meant for this, or --quick" * (left > 86_400))

    def save_model(self, path, done):
        """The average's weights, for load_model."""
        ema, seen = self.stage.ema, done * self.args.batch_size
        common.save_pt({"model": ema.state_dict(), "args": ema.config, "images_seen": seen}, path)
        ema.source, ema.images_seen = path, seen
        all_reduce(torch.zeros(1))  # no rank goes on, or ends, before rank 0 has saved

    def save(self, done):
        """The checkpoint for continuing, metrics.svg for looking, the weights for sampling."""
        state = {key: part.state_dict() for key, part in self.parts.items()}
        token = int.from_bytes(os.urandom(4), "big")
        common.save_pt(state | dict(iteration=done, token=token, definition=self.stage.definition,
                                    totals=all_reduce(self.totals.clone()) / world()),
                       self.checkpoint, self.previous)
        common.state.kept = f"{self.checkpoint} keeps iteration {done}"
        common.chart_table(self.table, self.stage.loss.columns, self.table.with_suffix(".svg"))
        self.save_model(self.model, done)

    def grid(self, done):
        """The sample grid of an iteration."""
        path = self.run / f"{self.stage.name}samples_{done:06}.png"
        try:
            common.save_grid(self.stage.pictures(self.stage.ema), path)
        except FloatingPointError as error:  # the training goes on without
            common.say(str(error))

    def complete(self):
        """Make what a kill after the checkpoint left out, or somebody has deleted since."""
        wanted = (self.model, self.run / f"{self.stage.name}samples_{self.start:06}.png")
        missing = torch.tensor([int(not path.exists()) for path in wanted])
        no_model, no_grid = all_reduce(missing).tolist()
        if no_model:
            self.save_model(self.model, self.start)
        if no_grid:
            self.grid(self.start)


def fit(stage, args, device):
    """Train a stage to its last iteration, from its checkpoint where there is one."""
    training = Training(stage, args, device)
    if training.start == stage.iterations:
        compile_networks([stage.ema], args, device)
        return training.complete()
    advice = f"--model {training.model} evaluates what it has saved"
    with common.locked(args.run_dir, advice), common.signals() as stop:
        training.begin()
        if training.start:
            training.complete()
        todo = range(training.start, stage.iterations)
        bar = progress(todo, "training", initial=training.start, total=stage.iterations)
        for i in bar:
            training.update(i)
            done, last = i + 1, i + 1 == stage.iterations
            stopping = int(all_reduce(torch.tensor(stop.number), dist.ReduceOp.MAX))  # on the CPU: no wait
            logging = last or done % LOG_EVERY == 0
            evaluating = stage.evaluate and args.evaluate_every and done % args.evaluate_every == 0
            saving = stopping or last or evaluating or done % args.checkpoint_every == 0
            training.estimate(done)
            if logging or saving:
                training.check(done)
            if logging:
                training.log(done, bar)
            if saving:
                began = time.time()
                training.save(done)
                if stopping:
                    raise SystemExit(128 + stopping)
                stop.at_once = True  # what follows can be done again
                training.grid(done)
                if evaluating and not last:
                    training.save_model(training.run / f"model_{done:07}.pt", done)
                    stage.evaluate(stage.ema)
                stop.at_once = False
                training.since += time.time() - began  # a row's speed is that of training alone


def train(args, device, data):
    """The main training; returns the average of the network."""
    torch.manual_seed(args.seed)
    shape = dict(image=IMAGE, multipliers=args.multipliers, attention=args.attention, dropout=args.dropout)
    heads, known = max(1, args.rk_order), {"data": data.sha256[:12]}
    if file := args.teacher or args.init:
        source = load_model(file)
        network = begin_from(source, heads, args.dropout)
        known["teacher" if args.teacher else "init"] = common.sha256(file)[:12]
        if network.config["classes"] != len(data.classes):
            raise InputError(f"{file} has {network.config['classes']} classes, the data {len(data.classes)}")
    else:
        network = UNet(**shape, channels=args.channels, blocks=args.blocks, classes=len(data.classes),
                       heads=heads, skip_phi=args.skip_phi)
    network = prepare(network, args, device)
    network.choose(args.head)
    teacher = prepare(source, args, device) if args.teacher else None
    ema = copy.deepcopy(network).eval().requires_grad_(False)
    target = None if args.target == "online" else ema.velocity
    own = slice(rank() * args.batch_size // world(), (rank() + 1) * args.batch_size // world())
    reader, ahead, shown = ThreadPoolExecutor(1), {}, grid_labels(args, len(data.classes))

    def gather(i):
        """This rank's images and labels of batch i, which is drawn with replacement, off the disk."""
        draws = common.generator("cpu", args.seed, 9, i)
        index = torch.randint(len(data.images), (args.batch_size,), generator=draws)[own]
        x = data.images.numpy()[index.numpy()]  # torch's own threads would get into the way of the training's
        return torch.from_numpy(x), data.labels[index]

    def draw(i):
        """This rank's part of batch i."""
        batch = (ahead.pop(i, None) or reader.submit(gather, i)).result()
        ahead[i + 1] = reader.submit(gather, i + 1)  # read while the device is busy with this one
        draws = common.generator(device, args.seed, 2, i)
        options = dict(size=(args.batch_size,), device=device, generator=draws)
        noise = normal(args.batch_size, device, args.seed, 3, i)
        t, uniform = EPS + (1 - EPS) * torch.rand(**options), torch.rand(**options)
        h = step_size(args.step_rule, t, args.intervals, uniform)
        torch.manual_seed(common.seed_of(args.seed, 4, i, rank()))  # dropout
        if device.type == "cuda":
            batch = [part.pin_memory() for part in batch]  # so that the host need not wait for the copy
        x, label = (part.to(device, non_blocking=True) for part in batch)
        x = common.to_float(x)
        if args.flip:
            x = torch.where(torch.rand(**options)[own].view(-1, 1, 1, 1) < 0.5, x.flip(3), x)
        return x, noise[own], t[own], h[own], i / args.iterations, label

    def pictures(network):
        return sample(network, shown, args.solver, args.steps[-1], args, device).images

    def judge(network):
        try:
            evaluate(args, device, data, {"model": network})
        except (InputError, FloatingPointError) as error:  # the training goes on without
            common.say(str(error))

    loss = CatchUp(network, target, args, teacher and teacher.velocity)
    stage = Stage(name="", loss=loss, ema=ema,
                  networks=[part for part in (network, ema, teacher) if part], draw=draw,
                  iterations=args.iterations, warmup=min(args.warmup, args.iterations // 10),
                  definition=args.definition | known, pictures=pictures, evaluate=judge)
    fit(stage, args, device)
    return ema


# -------------------------------------------------------------------------------------------- one-step stage


class OneStep(nn.Module):
    """The additional training's loss: one step, z - v_1(z, 1), learns what many steps make of the noise z."""

    columns = ("loss", "target", "ema")

    def __init__(self, network, slow):
        super().__init__()
        self.network, self.slow = network, slow  # slow: the velocity of the network's EMA

    def forward(self, z, target, labels):
        """z, target [B, C, H, W]; labels [B]. The mean loss; sums and counts [2, columns] to log."""
        ones = z.new_ones(len(z))
        v = self.network.velocity(z, ones, labels)
        parts = [F.mse_loss(z - v, target), F.mse_loss(v, self.slow(z, ones, labels).detach())]
        loss = parts[0] + 0.1 * parts[1]
        return loss, torch.stack([torch.stack([loss, *parts]).detach(), z.new_ones(3)])


@torch.no_grad()
def one_step_pairs(args, teacher, device):
    """Noise [n, C, H, W]; x0_hat at the 9th, 12th and 15th of 16 Euler steps, float16 [n, 3, C, H, W]; their
    classes [n], drawn uniformly."""
    noise, targets, n = [], [], ceil_div(args.one_step_pairs, world())  # each rank makes and keeps its own
    draws = common.generator("cpu", args.seed, 10, rank())
    labels = torch.randint(teacher.config["classes"], (n,), generator=draws).to(device)
    padded = F.pad(labels, (0, -n % SAMPLE_BATCH))
    for i in progress(range(ceil_div(n, SAMPLE_BATCH)), "one-step targets"):
        path = []
        noise.append(normal(min(n, SAMPLE_BATCH), device, args.seed, 5, rank(), i))
        part = padded[i * SAMPLE_BATCH:][:len(noise[-1])]
        velocity = functools.partial(teacher.velocity, labels=part)  # v_1, which the student has
        common.euler(velocity, noise[-1], 16, trajectory=path)
        x0_hats = [x - t * v for t, x, v in (path[8], path[11], path[14])]
        targets.append(torch.stack(x0_hats, 1).half())
    return torch.cat(noise)[:n], torch.cat(targets)[:n], labels


def train_one_step(args, device, teacher):
    """The additional training in three stages, one for each target; returns the average of the student."""
    shown = grid_labels(args, teacher.config["classes"])
    student = prepare(begin_from(teacher, heads=1, dropout=args.dropout), args, device)
    ema = copy.deepcopy(student).eval().requires_grad_(False)
    pairs = []

    def draw(i):
        if not pairs:  # made when first asked for: a finished student needs none
            pairs.extend(one_step_pairs(args, teacher, device))
        index = torch.randint(len(pairs[0]), (args.batch_size // world(),), device=device,
                              generator=common.generator(device, args.seed, 6, i, rank()))
        torch.manual_seed(common.seed_of(args.seed, 7, i, rank()))  # dropout
        return pairs[0][index], pairs[1][index, i // args.one_step_iterations].float(), pairs[2][index]

    def pictures(network):
        return sample(network, shown, "euler", 1, args, device).images

    more = {key: getattr(args, key) for key in ("iterations", "one_step_iterations", "one_step_pairs")}
    stage = Stage(name="one_step_", loss=OneStep(student, ema.velocity), ema=ema,
                  networks=[student, ema], draw=draw, iterations=3 * args.one_step_iterations, warmup=0,
                  definition=args.definition | more, pictures=pictures)
    fit(stage, args, device)
    return ema


# ----------------------------------------------------------------------------------- sampling and evaluation

SAMPLE_BATCH = 250  # images; noise is drawn by the batch, so samples do not depend on the number of ranks
FEATURES = {"inception": 2048, "classifier": 240}  # dimensions
CLASSIFIER_BATCHES = 400  # that a classifier of the data is trained on
CACHE = Path("data/cache")  # reference statistics and classifiers, named by the images they come from


class Samples(NamedTuple):
    images: torch.Tensor  # uint8 [n, C, H, W]
    nfe: float  # network evaluations an image; the mean over batches, which dopri5 treats differently
    straightness: float  # mean squared deviation of v from x_1 - x_0 along the paths; 0: they are straight
    x0_hats: torch.Tensor  # uint8 [points + 1, 8, C, H, W]: where each point of some samples' paths leads


@torch.no_grad()
def sample(network, labels, solver, steps, args, device):
    """Integrate n draws of N(0, I) from t = 1 to t = 0, of the classes `labels` [n], each rank its share of
    the batches: Samples."""
    n, size = len(labels), min(len(labels), SAMPLE_BATCH)
    images, labels = torch.zeros(n, *IMAGE, dtype=torch.uint8, device=device), F.pad(labels, (0, -n % size))
    sums, x0_hats = torch.zeros(3, device=device), None  # of batches, their NFE and straightness
    for i in progress(range(rank(), ceil_div(n, size), world()), f"{solver} {steps}, batches of {size}"):
        z, path = normal(size, device, args.sample_seed, 1, i), common.Course(slice(0, 64, 8))
        velocity = functools.partial(network.sampled, labels=labels[i * size:(i + 1) * size].to(device))
        x, nfe = common.SOLVERS[solver](velocity, z, steps, tolerance=args.tolerance, trajectory=path)
        images[i * size:(i + 1) * size] = common.to_uint8(x)[:n - i * size]
        bend = path.bend(z - x)
        sums += torch.stack([torch.ones_like(bend), torch.full_like(bend, nfe), bend])
        x0_hats = torch.stack([*path.x_hats, common.to_uint8(x[path.shown])])
    count, nfe, bend = all_reduce(sums).tolist()
    if not math.isfinite(bend):
        raise FloatingPointError(f"{solver}, {steps} steps: samples are not finite; no pictures, no distance")
    return Samples(all_reduce(images), nfe / count, bend / count, x0_hats)  # the rows of other ranks are 0


def grid_labels(args, classes):
    """Eight of each of --classes (the first ten where unset), a row a class: int64 [8 rows]."""
    rows = torch.tensor(args.classes or range(min(10, classes)))
    if rows.max() >= classes:
        raise InputError(f"--classes: {rows.max()} is not among the {classes} classes, 0 to {classes - 1}")
    return rows.repeat_interleave(8)


def drawn_labels(n, args, classes):
    """n classes, drawn uniformly: int64 [n]."""
    return torch.randint(classes, (n,), generator=common.generator("cpu", args.sample_seed, 8))


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


def classifier_features(data, device):
    """A function uint8 [B, C, H, W] -> features [B, 240], in units of their deviation over the images, and
    its name. The classifier is trained on the data once (fixed seed, batches of 128) and cached."""
    torch.manual_seed(0)
    network = Classifier(len(data.classes)).to(device)

    def make():
        optimizer = torch.optim.Adam(network.parameters(), 2e-3)
        for _ in progress(range(CLASSIFIER_BATCHES), "classifier"):
            index = torch.randint(len(data.images), (128,))
            x, wanted = data.images[index].to(device), data.labels[index].to(device)
            F.cross_entropy(network(common.to_float(x))[1], wanted).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            network.eval()
            f = [network(common.to_float(part.to(device)))[0] for part in data.images.split(SAMPLE_BATCH)]
        return {"network": network.state_dict(), "scale": torch.cat(f).std(0).clamp(min=1e-3)}

    scale = torch.zeros(FEATURES["classifier"], device=device)
    common.cached(CACHE / f"classifier-{data.sha256[:12]}.pt",
                  {"network": network.state_dict(), "scale": scale}, make)
    weights = [value.cpu().numpy().tobytes() for value in network.eval().state_dict().values()]
    digest = hashlib.sha256(b"".join(weights)).hexdigest()

    def features(images):
        return network(common.to_float(images.to(device)))[0] / scale

    return features, f"classifier-{digest[:8]}"


def inception_features(mode, device):
    """A function uint8 [B, C, H, W] -> clean-fid's Inception features [B, 2048], and its name."""
    path = CACHE / "inception-2015-12-05.pt"
    try:  # imported here: clean-fid needs a torchvision that matches torch
        from cleanfid import downloads_helper, inception_torchscript, resize
        with common.rank_zero_first():
            if not path.exists():  # its own download would leave half a file when cut short
                common.download([downloads_helper.inception_url], path)
        with common.as_noted(path) as digest:
            network = inception_torchscript.InceptionV3W(CACHE, download=False, resize_inside=mode != "clean")
    except (ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"clean-fid cannot load {path} ({reason}); delete it if it was cut short") from None
    network, resizer = network.to(device).eval(), resize.build_resizer(mode)

    def features(images):
        x = images.to(device).expand(-1, 3, -1, -1).float()
        if mode == "clean":  # resized image by image in Pillow; legacy_tensorflow resizes inside the network
            x = np.stack([resizer(image.numpy()).transpose(2, 0, 1) for image in x.permute(0, 2, 3, 1).cpu()])
            x = torch.from_numpy(x).to(device)
        return network(x)

    return features, f"inception-{mode}-{digest[:8]}"


class Moments(NamedTuple):
    """What a Frechet distance needs to know of features f [n, D]; moments of parts add up. float64."""

    n: torch.Tensor
    sum: torch.Tensor  # [D]
    products: torch.Tensor  # sum of f f^T, [D, D]

    def add(self, other):
        return Moments(*(mine + its for mine, its in zip(self, other)))


@torch.no_grad()
def moments(features, images):
    """The Moments of the images' features, each rank taking its share of the images."""
    total = None
    for part in progress(images[rank()::world()].split(SAMPLE_BATCH), "features"):
        f = features(part).cpu().double()
        found = Moments(torch.tensor(float(len(f)), dtype=f.dtype), f.sum(0), f.T @ f)
        total = total.add(found) if total else found
    return Moments(*(all_reduce(value) for value in total))


def frechet_distance(a, b):
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2) of two Moments (Heusel et al. 2017, section 3)."""
    (mean_a, cov_a), (mean_b, cov_b) = ((m.sum / m.n, covariance(m)) for m in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # S_a^1/2, and S_a^1/2 S_b S_a^1/2 is symmetric
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def covariance(m):
    return (m.products - torch.outer(m.sum, m.sum) / m.n) / (m.n - 1)


def moments_of(path):
    """Moments with the mean and covariance of a statistics file; of how many images does not matter."""
    mean, cov = common.load_moments(path)
    n = torch.tensor(2.0, dtype=mean.dtype)
    return Moments(n, n * mean, (n - 1) * cov + n * torch.outer(mean, mean))


class Reference(NamedTuple):
    moments: Moments  # of the real images
    about: str
    sha256: str
    floor: float | None = None  # the distance between their halves: no model can be expected to go below it
    noise: float | None = None  # the distance of pure noise


def reference(features, name, data, device):
    """The Reference that samples are compared with, cached by the data's content and the extractor's name."""
    def make():
        halves = [moments(features, data.images[i::2]) for i in range(2)]
        whole = halves[0].add(halves[1])
        noise = common.to_uint8(normal(min(len(data.images), 5_000), device, 0))
        return whole._asdict() | {"floor": frechet_distance(*halves),
                                  "noise": frechet_distance(moments(features, noise), whole)}

    size = FEATURES[name.split("-")[0]]
    if len(data.images) < 2 * size:
        raise InputError(f"{len(data.images)} real images are too few for the covariance of {name} features")
    zeros = Moments(*(torch.zeros(shape, dtype=torch.float64) for shape in ((), size, (size, size))))
    saved = common.cached(CACHE / f"moments-{data.sha256[:12]}-{name}.pt",
                          zeros._asdict() | dict(floor=0.0, noise=0.0), make)
    known = Moments(*(saved[key] for key in Moments._fields))
    known = known._replace(n=torch.full_like(known.n, len(data.images)))
    about = f"{data.about} (their statistics computed here)"
    return Reference(known, about, data.sha256, saved["floor"], saved["noise"])


@torch.no_grad()
def agreement(images, wanted, data, device):
    """The share of images, uint8 [n, C, H, W], that the classifier of the data sorts into their class."""
    saved = common.load_pt(CACHE / f"classifier-{data.sha256[:12]}.pt", ["network"])["network"]
    network = Classifier(len(saved["out.bias"])).to(device).eval()
    network.load_state_dict(saved)
    found = [network(common.to_float(part))[1].argmax(1).cpu() for part in images.split(SAMPLE_BATCH)]
    return (torch.cat(found) == wanted).float().mean().item()


def plan(args, networks):
    """What is drawn and judged: (weights, solver, steps), steps None for dopri5."""
    steps = [None] if args.solver == "dopri5" else args.steps
    rows = [("model", args.solver, n) for n in steps]
    if "one-step" in networks:
        rows += [row for row in (("model", "euler", 1), ("one-step", "euler", 1)) if row not in rows]
    return rows


def evaluate(args, device, data, networks):
    """Pictures, samples.npz and Frechet distances of {"model": network, maybe "one-step": network}."""
    run, classes = Path(args.run_dir), networks["model"].config["classes"]
    for weights, solver, steps in plan(args, networks):  # first: they stay, whatever happens to the figures
        network = networks[weights]
        drawn = sample(network, grid_labels(args, classes), solver, steps, args, device)
        head = f"head{network.head}" * (len(network.heads) > 1)
        name = "_".join(str(part) for part in ("samples", weights, head, solver, steps) if part)
        common.save_grid(drawn.images, run / f"{name}.png")
        if rank() == 0 and weights == "model" and (steps or max(args.steps)) == max(args.steps):
            rows = drawn.x0_hats.transpose(0, 1).flatten(0, 1)  # a sample a row
            common.save_grid(rows, run / "trajectory.png", columns=len(drawn.x0_hats))
    if args.save_samples:
        wanted = drawn_labels(args.save_samples, args, classes)
        if args.classes is not None:
            wanted = torch.tensor(args.classes).repeat(args.save_samples)[:args.save_samples]
        drawn = sample(networks["model"], wanted, args.solver, args.steps[-1], args, device)
        common.save_npz(run / "samples.npz", arr_0=drawn.images.permute(0, 2, 3, 1), arr_1=wanted)
    if not args.fid_samples:
        return common.say(f"pictures are in {run}; no distance, as --fid-samples is 0")
    try:
        features, name = (classifier_features(data, device) if args.features == "classifier"
                          else inception_features(args.fid_mode, device))
        if args.reference:
            real = Reference(moments_of(args.reference), args.reference, common.sha256(args.reference))
        else:
            real = reference(features, name, data, device)
    except InputError as error:
        raise InputError(f"no distance: {error}. The training and the pictures in {run} are safe, and the "
                         "same command evaluates later") from None
    figure = "FD (classifier)"
    if args.features == "inception":
        figure = "FID" if args.fid_samples >= 50_000 else f"FID-{args.fid_samples / 1000:g}k"
    seen = networks["model"].images_seen
    same = dict(figure=figure, n=args.fid_samples, features=name, reference=real.about,
                reference_sha256=real.sha256[:12], seed=args.sample_seed, images_seen=seen)
    common.say(f"{figure}: {same['n']:,} samples of drawn classes against {same['reference']}; {name}; EMA "
               f"weights; seed {same['seed']}; {seen:,} images seen. A distance to the real images: lower is "
               "better\n"
               "(NFE: network evaluations an image. Real images, halved: the distance between two halves)\n"
               f"{'weights':10}{'head':6}{'solver':8}{'NFE':>6}{figure:>18}{'straightness':>14}"
               f"{'right class':>13}")
    for known, value in (("real images, halved", real.floor), ("pure noise", real.noise)):
        common.say(f"{known:30}" + ("       not known" if value is None else f"{value:18.3f}"))
    files = {weights: common.sha256(network.source)[:12] for weights, network in networks.items()}
    for weights, solver, steps in plan(args, networks):
        wanted = drawn_labels(args.fid_samples, args, classes)
        drawn = sample(networks[weights], wanted, solver, steps, args, device)
        value = frechet_distance(moments(features, drawn.images), real.moments)
        network, share = networks[weights], None
        if args.features == "classifier":
            share = agreement(drawn.images, wanted, data, device)
        common.say(f"{weights:10}{network.head:<6}{solver:8}{drawn.nfe:6.4g}{value:18.3f}{drawn.straightness:14.5f}"
                   + (f"{share:13.1%}" if share is not None else ""))
        common.add_result(run, same | dict(
            weights=f"{weights} EMA", model_sha256=files[weights], head=network.head,
            solver=solver, steps=steps, tolerance=None if steps else args.tolerance), dict(
            value=value, nfe=drawn.nfe, straightness=drawn.straightness, floor=real.floor, noise=real.noise,
            right_class=share, torch=torch.__version__, device=str(device)))


# ----------------------------------------------------------------------------------------------------- flags

PAPER = dict(
    run_dir="runs/imagenet64", channels=192, multipliers=[1, 2, 3, 4], blocks=3, attention=[32, 16, 8],
    dropout=0.1, iterations=500_000, batch_size=1_024, lr=4e-4, warmup=0, ema_decay=0.9999432189950708,
    flip=True, one_step_iterations=40_000)
QUICK = dict(
    run_dir="runs/imagenet64-quick", data="glyphs", channels=8, multipliers=[1, 2, 4, 8], blocks=1,
    attention=[16, 8], dropout=0.0, iterations=1_200, batch_size=16, lr=2e-3, ema_decay=0.995, flip=False,
    checkpoint_every=600, steps=[1, 4, 15], one_step=True, one_step_iterations=120, one_step_pairs=500,
    features="classifier", fid_samples=500)
DATA_HELP = ("folder of ImageNet's 64x64 npz files or their zips, folder or .zip of pictures, or 'glyphs'; "
             "unset: what --cache holds")


def load_data(args):
    """common.Data of --data, its images left on the disk."""
    if args.data == "glyphs":
        return common.describe(*common.glyphs(4_000, IMAGE), "drawn digits")
    return common.load_imagenet(args.data, args.cache, IMAGE, args.prepare)


def implied(given):
    """Defaults that the flags given bring along: --quick its own, a model file those of its network."""
    found = dict(QUICK) if given.get("quick") else {}
    if given.get("teacher"):
        found |= dict(step_rule="constant", target="consistency")
    if file := given.get("teacher") or given.get("init"):
        config = load_model(file).config
        shape = ("channels", "multipliers", "blocks", "attention", "skip_phi")
        found |= {name: config[name] for name in shape}
        common.refuse_differences(file, config, {name: given[name] for name in shape if name in given})
    return found


def parse_args(argv=None):
    """The flags, those that the run folder remembers included; InputError where one cannot be used."""
    parser = common.Parser(__doc__, __file__)
    yes_no, share = argparse.BooleanOptionalAction, number(float, 0, 0.9999999)
    natural, count, small = number(int, 0, 2**32), number(int, 1, 10**9), number(int, 1, 64)
    points, features = list(WEIGHTS), list(FEATURES)
    targets = ["online", "ema", "consistency", "progressive"]
    modes = ["legacy_tensorflow", "clean"]

    flag = parser.flags("run", FORGOTTEN)
    flag("--quick", action=yes_no, default=False, help="drawn digits, a small network: all code in minutes")
    flag("--run-dir", help="the run's folder, which remembers its flags; one that holds a checkpoint goes on")
    flag("--model", help="evaluate this model file; train nothing; the results go to --run-dir")
    flag("--prepare", action=yes_no, default=False, help="read --data into --cache, or check it, and stop")
    flag("--device", help="cpu, cuda, cuda:1, mps (never tried); unset: a GPU if there is one")

    flag = parser.flags("data and machine", MAY_CHANGE)
    flag("--data", help=DATA_HELP)
    flag("--cache", default="data/imagenet64", help="where they are kept once read, 12 kB an image")
    flag("--amp", choices=["auto", "on", "off"], default="auto", help="bfloat16; auto: on GPUs that have it")
    flag("--compile", choices=["auto", "on", "off"], default="auto", help="torch.compile; auto: on CUDA")
    flag("--accumulate", type=count, default=1, help="parts a rank's batch is split into, to save memory")
    flag("--checkpoint-every", type=count, default=5_000, help="iterations; a sample grid comes with each")
    flag("--evaluate-every", type=count, help="iterations; keeps model_NNNNNNN.pt; unset: at the end alone")

    flag = parser.flags("method", DEFINES)
    flag("--rk-order", type=int, choices=range(4), default=1, help="k (RK12, RK23, RK34); 0: rectified flow")
    flag("--rk-points", choices=points, default="published", help="b(j): the paper's, or more accurate ones")
    flag("--step-rule", choices=STEP_RULES, default="uniform", help="h: below 1/N; t/N measured better; 1/N")
    flag("--intervals", type=count, default=16, help="N of the step rule")
    flag("--target", choices=targets, default="online", help="y_j by the network or its EMA; or --teacher's")
    flag("--loss-ramp", action=yes_no, default=False, help="weigh the loss by w_1 = 2 i/I, w_2 = 2 (1 - i/I)")
    flag("--wavelet-weight", type=number(float, 0, 1e6), default=1.0, help="w_3, of differences in detail")

    flag = parser.flags("beginning from another model", MAY_CHANGE)
    flag("--teacher", help="model file that makes the slopes, frozen; the student begins as its v_1")
    flag("--init", help="model file whose weights the training begins with")

    flag = parser.flags("training", DEFINES)
    flag("--batch-size", type=count, help="images an iteration, over all ranks")
    flag("--lr", type=number(float, 1e-12, 10), help="Adam's learning rate")
    flag("--warmup", type=natural, help="iterations of linear warm-up, at most a tenth of all")
    flag("--ema-decay", type=share, help="an iteration, at most (1 + i)/(10 + i), for the sake of short runs")
    flag("--dropout", type=share, help="probability, in every residual block")
    flag("--flip", action=yes_no, help="mirror every other image, at random")
    flag("--seed", type=natural, default=0, help="of weights and training draws")

    flag = parser.flags("network", DEFINES)
    flag("--channels", type=number(int, 4, 2048), help="c, the unit of width")
    flag("--multipliers", type=small, nargs="+", help="of c, one a level; each further level halves the size")
    flag("--blocks", type=small, help="residual blocks a level")
    flag("--attention", type=count, nargs="*", help="sizes, in pixels, of the levels that have it")
    flag("--skip-phi", type=number(float, 0.001, 0.999), default=0.75, help="phi of the skips; 0.5: off")

    flag = parser.flags("budget", MAY_CHANGE)
    flag("--iterations", type=count, help="I; may grow when a run is continued")
    flag("--one-step", action=yes_no, default=False, help="then train a one-step student in three stages")
    flag("--one-step-iterations", type=count, help="in each of the three")
    flag("--one-step-pairs", type=count, default=50_000, help="noise draws that the student learns from")

    flag = parser.flags("evaluation", MAY_CHANGE)
    flag("--steps", type=count, nargs="+", default=[15], help="network evaluations (NFE) an image")
    flag("--head", type=count, help="the velocity that sampling integrates, 1 to k; unset: the last")
    flag("--solver", choices=list(common.SOLVERS), default="euler", help="the paper's; ab2 measured better")
    flag("--tolerance", type=number(float, 1e-12, 1), default=1e-4, help="of dopri5, which ignores --steps")
    flag("--fid-samples", type=natural, default=50_000, help="images; fewer make no FID; 0: none")
    flag("--fid-mode", choices=modes, default="legacy_tensorflow", help="of clean-fid; as published figures")
    flag("--reference", help=".npz of mu and sigma (EDM's, ADM's) to compare with, instead of the images")
    flag("--features", choices=features, default="inception", help="or of a classifier of the data: no FID")
    flag("--sample-seed", type=natural, help="of the samples; unset: --seed")
    flag("--classes", type=natural, nargs="+", help="of pictures and samples.npz; unset: all sorts")
    flag("--save-samples", type=count, help="images to write to samples.npz, at the last of --steps")

    parser.set_defaults(**PAPER)
    args = parser.read(argv, implied)
    if args.sample_seed is None:
        args.sample_seed = args.seed
    if args.solver == "heun" and any(steps % 2 == 0 for steps in args.steps):
        parser.error("--solver heun takes odd --steps: two evaluations an interval, one in the last")
    for refused, words in ((args.init, "--init: a student begins as its teacher"),
                           (args.rk_order != 1, "--rk-order: a student has one head, order 1"),
                           (args.target == "online", "--target online: a target is wanted"),
                           (args.loss_ramp, "--loss-ramp: there is no truth to weigh")):
        if args.teacher and refused:
            parser.error(f"with --teacher not {words}")
    if not args.teacher and args.target in ("consistency", "progressive"):
        parser.error(f"--target {args.target} needs a --teacher")
    if 0 < args.fid_samples <= FEATURES[args.features]:
        parser.error(f"--fid-samples: the covariance of {FEATURES[args.features]} {args.features} features "
                     "needs more images than that (0: no distance)")
    if args.reference and (args.features, args.fid_mode) != ("inception", "legacy_tensorflow"):
        parser.error("--reference: such statistics are of inception features in legacy_tensorflow mode")
    if args.batch_size % (world() * args.accumulate):
        parser.error(f"--batch-size {args.batch_size} is not divisible by the {world()} ranks"
                     + f" x --accumulate {args.accumulate}" * (args.accumulate > 1))
    return args


# ------------------------------------------------------------------------------------------------------ main


def main(argv=None):
    """The command line; returns the exit status."""
    try:
        common.start_ranks()
        args = parse_args(argv)
        device, run = common.pick_device(args.device), Path(args.run_dir)
        with common.rank_zero_first():
            data = None if args.model and args.reference else load_data(args)
        if args.prepare:
            return 0
        run.mkdir(parents=True, exist_ok=True)
        if args.model:
            networks = {"model": prepare(load_model(args.model, head=args.head), args, device)}
            compile_networks(networks.values(), args, device)
        else:
            networks = {"model": train(args, device, data)}
            if args.one_step:
                networks["one-step"] = train_one_step(args, device, networks["model"])
        evaluate(args, device, data, networks)
        common.say(f"Pictures (samples_*.png) and results.jsonl are in {run}.")
        if not args.model:
            again = common.command(args, seed=args.seed + 1, run_dir=f"{run}-seed-{args.seed + 1}")
            common.say("The losses are in metrics.svg there. Next, maybe another solver, another seed:\n"
                       f"    python {args.script} --run-dir {run} --solver ab2 --steps 3 5 9\n    {again}")
        return 0
    except (InputError, OSError, FloatingPointError, MemoryError, RuntimeError) as error:
        return common.explain(error, __file__)


if __name__ == "__main__":
    common.run_main(main)
