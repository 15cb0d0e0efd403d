# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "numpy", "pillow", "clean-fid"]
# ///
"""Catch-Up Distillation (CUD) on CIFAR-10: train a flow model once, sample it in a handful of steps.

A flow model learns the velocity that carries noise to data. CUD also lets it catch up with itself: its output
at time t is pulled towards its own output a little further along its own trajectory, which a Runge-Kutta step
finds. The trajectories become straight, so few steps suffice, without a teacher or a second training.

    x, z          data in [-1, 1] and noise, [B, C, H, W]
    t in [0, 1]   time: t = 0 is data, t = 1 is noise
    x_t           t z + (1 - t) x
    u             dx_t/dt = z - x, the true velocity
    v_1 .. v_k    the network's heads at (x_t, t); k = --rk-order; sampling integrates v_1
    h             the step, drawn for each sample
    k_i           the Runge-Kutta stages: v_1 at time t - (i - 1) h
    X_j           x_t - h sum_i b_i(j) k_i: the trajectory's point at time t - j h, j = 1 .. k
    y_j           v_1(X_j, t - j h) without gradient; u where t - k h would pass the data

    loss = w_1 sum_j |v_j - y_j|^2  +  w_2 sum_j |v_j - u|^2  +  beta KL(z | x)
           catch up with itself        stay true to the data    where an encoder couples noise to data

    python cud_cifar10.py --quick                   a tour on a CPU in seven minutes, nothing downloaded
    python cud_cifar10.py --rk-order 3 --steps 15   the paper's recipe for CIFAR-10 (add --one-step: one step)
    python cud_cifar10.py --steps 1 2 4 8 15        evaluates the run in runs/cifar10 when it has ended

Measured (--quick: drawn digits, a small network, seed 0, two CPU cores, 6 min 38 s; no FID): FD (classifier)
is 45.2 at 15 Euler steps; at one step 452.2 before the one-step stage and 94.0 after. The paper's recipe: not
run.

Paper: "Catch-Up Distillation: You Only Need to Train Once for Accelerating Sampling", arXiv 2305.10769.
"""
import argparse
import copy
import hashlib
import json
import math
import os
import platform
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

import common
from common import InputError, all_reduce, number, progress, rank, world

# --------------------------------------------------------------------------------------------- configuration

IMAGE = (3, 32, 32)  # channels, height, width
EPS = 1e-5  # training stays this far from t = 0
LOG_EVERY = 100  # iterations to a row of metrics.csv
SAMPLE_BATCH = 500  # images; noise is drawn by the batch, so samples do not depend on the number of ranks
FEATURES = {"inception": 2048, "classifier": 224}  # dimensions
CLASSIFIER_BATCHES = 400  # that a classifier of the data is trained on
CACHE = Path("data/cache")  # reference statistics and classifiers, named by the images they come from
DATA = "data/cifar10"  # where the files are downloaded to
DATA_HELP = ("an official archive or its folder, a folder or .zip of 32x32 pictures (a folder a class), or "
             "'glyphs' (drawn digits); unset: downloaded to data/cifar10")
STATISTICS = "https://www.cs.cmu.edu/~clean-fid/stats/"  # clean-fid's precomputed ones
PAPER = dict(
    run_dir="runs/cifar10", coupling="learned", channels=128, multipliers=[2, 2, 2], blocks=4, dropout=0.13,
    iterations=500_000, batch_size=128, lr=2e-4, warmup=5_000, ema_decay=0.9999, flip=True,
    one_step_iterations=40_000)
QUICK = dict(
    run_dir="runs/cifar10-quick", data="glyphs", channels=8, multipliers=[1, 2, 4], blocks=1, dropout=0.0,
    iterations=1_200, batch_size=32, lr=2e-3, ema_decay=0.995, flip=False, checkpoint_every=600,
    steps=[1, 2, 4, 15], one_step=True, one_step_iterations=120, one_step_pairs=1_000, features="classifier",
    fid_samples=1_000)
NOT_TRAINING = set(  # flags that may change when a run is continued
    "quick run_dir device amp compile accumulate checkpoint_every steps solver tolerance fid_samples "
    "fid_mode features save_samples one_step one_step_iterations one_step_pairs iterations".split())


def load_data(args):
    """Images uint8 [N, C, H, W] and labels int64 [N], on the CPU."""
    return (common.glyphs(10_000, IMAGE) if args.data == "glyphs"
            else common.load_cifar10(args.data, args.split))


def parse_args(argv=None):
    """The flags; InputError where one of them, or a combination, cannot be used."""
    parser = common.Parser(__doc__)
    count, share = number(int, 1), number(float, 0, below=1)

    flag = parser.add_argument_group("run").add_argument
    flag("--quick", action="store_true", help="drawn digits, small network and budget: all code in minutes")
    flag("--data", help=DATA_HELP)
    flag("--split", choices=["train", "test"], default="train", help="the part to train on and compare with")
    flag("--run-dir", help="the run's folder; one that holds a checkpoint is continued")
    flag("--device", help="cpu, cuda, cuda:1, mps (never tried); unset: a GPU if there is one")
    flag("--seed", type=number(int, 0), default=0, help="of weights, training draws and samples")
    flag("--checkpoint-every", type=count, default=5_000, help="iterations; a sample grid comes with each")

    flag = parser.add_argument_group("method").add_argument
    flag("--rk-order", type=int, choices=range(4), default=1, help="k (RK12, RK23, RK34); 0: rectified flow")
    flag("--rk-points", choices=list(POINTS), default="published",
         help="b(j): the paper's, or dense output, whose later points are more accurate at no cost")
    flag("--step-rule", choices=list(STEP_RULES), default="uniform",
         help="the step h: drawn from U(0, 1/N), or t/N, or 1/N")
    flag("--intervals", type=count, default=16, help="N of the step rule")
    flag("--target", choices=["online", "ema"], default="online",
         help="network that makes y_j: itself, dropout on (released code), or its EMA (the paper's figure)")
    flag("--loss-ramp", action="store_true", help="w_1 = 2 i/I, w_2 = 2 (1 - i/I) at iteration i; else 1")
    flag("--coupling", choices=["learned", "independent"], help="z from an encoder of x, or drawn without it")
    flag("--kl-weight", type=number(float, 0), default=20.0, help="beta: keeps the encoder's z near N(0, I)")
    flag("--skip-phi", type=number(float, above=0, below=1), default=0.75,
         help="phi: UNet skips weigh 2 (1 - phi) at t = 0 and 2 phi at t = 1; 0.5 turns that off")

    flag = parser.add_argument_group("training").add_argument
    flag("--iterations", type=count, help="I; may grow when a run is continued")
    flag("--batch-size", type=count, help="images an iteration, over all ranks")
    flag("--accumulate", type=count, default=1,
         help="split a rank's batch into this many parts, to save memory")
    flag("--lr", type=number(float, above=0), help="Adam's learning rate")
    flag("--warmup", type=number(int, 0), help="iterations of linear warm-up, at most a tenth of all")
    flag("--ema-decay", type=share, help="an iteration, at most (1 + i)/(10 + i), for the sake of short runs")
    flag("--dropout", type=share, help="probability, in every residual block")
    flag("--flip", action=argparse.BooleanOptionalAction, help="mirror every other image, at random")
    flag("--amp", choices=["auto", "on", "off"], default="auto", help="bfloat16; auto: on GPUs that have it")
    flag("--compile", choices=["auto", "on", "off"], default="auto", help="torch.compile; auto: on CUDA")

    flag = parser.add_argument_group("network").add_argument
    flag("--channels", type=number(int, 4), help="c, the unit of width")
    flag("--multipliers", type=count, nargs="+", help="of c, one a level; each further level halves the size")
    flag("--blocks", type=count, help="residual blocks a level")

    flag = parser.add_argument_group("evaluation").add_argument
    flag("--steps", type=count, nargs="+", default=[15], help="network evaluations (NFE) an image")
    flag("--solver", choices=list(common.SOLVERS), default="euler",
         help="the paper's euler; ab2 measured better (README); heun takes odd --steps")
    flag("--tolerance", type=number(float, above=0), default=1e-4, help="of dopri5, which ignores --steps")
    flag("--fid-samples", type=number(int, 0), default=50_000, help="images; fewer make no FID; 0: none")
    flag("--fid-mode", choices=["legacy_tensorflow", "clean"], default="legacy_tensorflow",
         help="of clean-fid; legacy_tensorflow compares with published figures")
    flag("--features", choices=list(FEATURES), default="inception",
         help="of the Frechet distance; a classifier of the data says more of digits and downloads nothing")
    flag("--save-samples", type=count, help="images to write to samples.npz, at the last of --steps")

    flag = parser.add_argument_group("one-step stage").add_argument
    flag("--one-step", action=argparse.BooleanOptionalAction, default=False, help="train a one-step student")
    flag("--one-step-iterations", type=count, help="in each of its three stages")
    flag("--one-step-pairs", type=count, default=50_000, help="noise draws that it learns from")

    parser.set_defaults(**PAPER)
    if parser.parse_args(argv).quick:
        parser.set_defaults(**QUICK)  # a flag given explicitly still wins
    args = parser.parse_args(argv)
    if args.solver == "heun" and any(steps % 2 == 0 for steps in args.steps):
        parser.error("--solver heun takes odd --steps: two evaluations an interval, one in the last")
    if 0 < args.fid_samples <= FEATURES[args.features]:
        parser.error(f"--fid-samples: the covariance of {FEATURES[args.features]} {args.features} features "
                     "needs more images than that (0: no distance)")
    if args.batch_size % (world() * args.accumulate):
        parser.error(f"--batch-size {args.batch_size} is not divisible by the {world()} ranks"
                     + f" x --accumulate {args.accumulate}" * (args.accumulate > 1))
    return args


# ------------------------------------------------------------------------------------------------ the method

# "stages": how stages 2 and 3 mix the slopes before them; "b": how the point at t - j h mixes all k of them.
POINTS = {
    "published": {
        "stages": [(1,), (7/4, 1/4)],
        "b": [lambda j: (j,), lambda j: (j/2, j/2), lambda j: (5*j/12, 2*j/3, -j/12)]},
    "dense": {  # over the span k h: Euler, explicit midpoint, Heun's third order; dense output inside
        "stages": [(1,), (0, 2)],
        "b": [lambda j: (j,), lambda j: (j - j**2/2, j**2/2),
              lambda j: (j - 3*j**2/4 + j**3/6, j**2 - j**3/3, j**3/6 - j**2/4)]}}
STEP_RULES = {  # h from t [B], N and uniform draws [B] (the paper's design space, continuous time)
    "uniform": lambda t, n, uniform: uniform / n,
    "proportional": lambda t, n, uniform: t / n,
    "constant": lambda t, n, uniform: torch.full_like(t, 1 / n)}


@torch.no_grad()
def catch_up_points(velocity, x_t, t, h, k_1, order, points="published"):
    """The next `order` points of the trajectory through x_t, by one Runge-Kutta step.

    velocity: callable (x [B, ...], t [B]) -> [B, ...], called order - 1 times; k_1: its value at (x_t, t);
    h [B] >= 0. Returns X [order, B, ...], X[j - 1] at time t - j h, and these times [order, B], at least EPS.
    """
    def move(weights, slopes):
        return x_t - h.view(-1, *[1] * (x_t.dim() - 1)) * sum(w * k for w, k in zip(weights, slopes))

    slopes, method, steps = [k_1], POINTS[points], range(1, order + 1)
    for i in range(1, order):
        slopes.append(velocity(move(method["stages"][i - 1], slopes), (t - i * h).clamp(min=EPS)))
    return (torch.stack([move(method["b"][order - 1](j), slopes) for j in steps]),
            torch.stack([(t - j * h).clamp(min=EPS) for j in steps]))


def catch_up_loss(network, x, z, t, h, order=1, points="published", velocity=None, target=None):
    """L_catchup, L_truth, each [B]: squared errors, averaged over a sample's dimensions, summed over heads.

    network: callable (x_t [B, ...], t [B]) -> v_1 .. v_k [max(order, 1), B, ...]; x data, z noise [B, ...].
    velocity: makes the stages, by default v_1 of `network`; target: makes the y_j, by default `velocity`.
    """
    velocity = velocity or (lambda x, t: network(x, t)[0])
    expand = (-1, *[1] * (x.dim() - 1))
    x_t, u = t.view(expand) * z + (1 - t.view(expand)) * x, z - x
    v = network(x_t, t)  # the one evaluation with gradient
    truth = (v - u).square().flatten(2).mean(2).sum(0)  # its gradient reaches an encoder through u as well
    if order == 0:
        return torch.zeros_like(truth), truth
    with torch.no_grad():  # the output moves towards the target, never the target towards the output
        where, when = catch_up_points(velocity, x_t, t, h, v[0], order, points)
        y = (target or velocity)(where.flatten(0, 1), when.flatten()).view_as(v)  # one batch of k B
        y = torch.where((t - order * h < EPS).view(expand), u, y)
    return (v - y).square().flatten(2).mean(2).sum(0), truth


class CatchUp(nn.Module):
    """The training loss as a module of what it trains: the network and, for learned coupling, the encoder."""

    columns = "loss catchup truth kl loss_t_0_25 loss_t_25_50 loss_t_50_75 loss_t_75_100".split()

    def __init__(self, network, encoder, target, args):
        super().__init__()
        self.network, self.encoder, self.target, self.args = network, encoder, target, args

    def forward(self, x, noise, t, h, done):
        """x, noise [B, C, H, W]; t, h [B]; done i/I. Mean loss; sums and counts [2, columns] to log."""
        args, z, kl = self.args, noise, torch.zeros_like(t)
        if self.encoder is not None:  # learned coupling (arXiv 2301.12003)
            mu, log_var = self.encoder(x, torch.ones_like(t))[0].chunk(2, 1)
            z = mu + (log_var / 2).exp() * noise
            kl = (mu.square() + log_var.exp() - 1 - log_var).flatten(1).mean(1) / 2
        catchup, truth = catch_up_loss(self.network, x, z, t, h, args.rk_order, args.rk_points,
                                       self.network.velocity, self.target)
        w_1, w_2 = (2 * done, 2 * (1 - done)) if args.loss_ramp else (1, 1)
        loss = w_1 * catchup + w_2 * truth + args.kl_weight * kl
        with torch.no_grad():
            quarters = F.one_hot((4 * t).long().clamp(max=3), 4).to(t.dtype)  # [B, 4]
            sums = torch.cat([torch.stack([loss, catchup, truth, kl]).sum(1), loss @ quarters])
            counts = torch.cat([torch.full_like(sums[:4], len(t)), quarters.sum(0)])
        return loss.mean(), torch.stack([sums, counts])


# --------------------------------------------------------------------------------------------------- network


def init(layer, gain=1.0):
    nn.init.xavier_uniform_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def conv(c_in, c_out, size, gain=1.0):
    return init(nn.Conv2d(c_in, c_out, size, padding=size // 2), gain)


def norm(channels):
    groups = min(32, channels // 4)
    if channels % 2 or channels % groups:
        raise InputError(f"--channels, --multipliers: {channels} channels do not divide into {groups} groups")
    return nn.GroupNorm(groups, channels, eps=1e-6)


class Block(nn.Module):
    """Residual block told the time by an embedding; resample: None, "down", "up"; one-head attention last."""

    def __init__(self, c_in, c_out, c_emb, dropout, resample=None, attention=False):
        super().__init__()
        self.resize = {"down": nn.AvgPool2d(2), "up": nn.Upsample(None, 2), None: nn.Identity()}[resample]
        self.norm1, self.conv1, self.emb = norm(c_in), conv(c_in, c_out, 3), init(nn.Linear(c_emb, c_out))
        self.norm2, self.conv2, self.dropout = norm(c_out), conv(c_out, c_out, 3, 1e-5), nn.Dropout(dropout)
        self.skip = conv(c_in, c_out, 1) if resample or c_in != c_out else nn.Identity()
        self.attention = attention
        if attention:
            self.norm3, self.qkv = norm(c_out), conv(c_out, 3 * c_out, 1, math.sqrt(0.2))
            self.proj = conv(c_out, c_out, 1, 1e-5)

    def forward(self, x, emb):
        h = self.conv1(self.resize(F.silu(self.norm1(x)))) + self.emb(emb)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        x = (h + self.skip(self.resize(x))) * math.sqrt(0.5)
        if not self.attention:
            return x
        q, k, v = self.qkv(self.norm3(x)).flatten(2).mT.unsqueeze(1).chunk(3, -1)  # [B, 1, H W, C]
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1).mT.reshape_as(x)
        return (x + self.proj(h)) * math.sqrt(0.5)


class UNet(nn.Module):
    """DDPM++ UNet (Song et al. 2021, as configured by Karras et al. 2022) with `heads` velocity heads.

    image: (C, H, W); c_out: channels of a head, C by default; skip_phi: phi of the time-dependent skips.
    """

    def __init__(self, image, channels, multipliers, blocks, dropout, heads=1, skip_phi=0.75, c_out=None):
        self.config = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        super().__init__()
        if image[1] % 2 ** (len(multipliers) - 1):
            raise InputError(f"--multipliers: {image[1]} px cannot be halved {len(multipliers) - 1} times")
        self.channels, self.skip_phi, self.amp = channels, skip_phi, False
        c, emb, size = channels, 4 * channels, image[1]
        self.embed = nn.Sequential(init(nn.Linear(c, emb)), nn.SiLU(), init(nn.Linear(emb, emb)), nn.SiLU())
        self.first, skips = conv(image[0], c, 3), [c]
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        for level, multiplier in enumerate(multipliers):
            if level:
                size //= 2
                self.encoder.append(Block(c, c, emb, dropout, "down"))
                skips.append(c)
            for _ in range(blocks):
                self.encoder.append(Block(c, channels * multiplier, emb, dropout, attention=size == 16))
                c = channels * multiplier
                skips.append(c)
        self.bottom = nn.ModuleList([Block(c, c, emb, dropout, attention=True), Block(c, c, emb, dropout)])
        for level, multiplier in reversed(list(enumerate(multipliers))):
            if level < len(multipliers) - 1:
                size *= 2
                self.decoder.append(Block(c, c, emb, dropout, "up"))
            for i in range(blocks + 1):
                self.decoder.append(Block(c + skips.pop(), channels * multiplier, emb, dropout,
                                          attention=size == 16 and i == blocks))
                c = channels * multiplier
        self.heads = nn.ModuleList(nn.Sequential(norm(c), nn.SiLU(), conv(c, c_out or image[0], 3, 1e-5))
                                   for _ in range(heads))

    def forward(self, x, t, heads=None):
        """x [B, C, H, W], t [B] -> the first `heads` heads (or all), of x's type [heads, B, c_out, H, W]."""
        half = self.channels // 2
        angle = t[:, None] * 10_000 ** (-torch.arange(half, dtype=t.dtype, device=t.device) / (half - 1))
        emb = self.embed(torch.cat([angle.sin(), angle.cos()], 1))  # float32: bfloat16 resolves t to 0.004
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
                up = isinstance(block.resize, nn.Upsample)
                if not up:  # p is float32: without the casts so would be all that follows
                    h = torch.cat([(2 * p * h).to(h.dtype), (2 * (1 - p) * skips.pop()).to(h.dtype)], 1)
                h = block(h, emb)
            return torch.stack([head(h).to(x.dtype) for head in self.heads[:heads]])

    def velocity(self, x, t):
        """v_1 alone, what sampling integrates: x [B, C, H, W], t [B] -> [B, C, H, W]."""
        return self(x, t, heads=1)[0]


def load_model(path, device="cpu"):
    """The network that a run has saved, in evaluation mode."""
    saved = common.load_pt(path, ["model", "args"])
    network = UNet(**saved["args"])
    network.load_state_dict(saved["model"])
    return network.to(device).eval().requires_grad_(False)


# -------------------------------------------------------------------------------------- sampling and figures


def seed_of(*key):
    """A 32-bit seed from non-negative integers (CPU generators use no more bits)."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def generator(device, *key):
    return torch.Generator(device).manual_seed(seed_of(*key))


def normal(n, device, *key):
    """Standard normal noise [n, C, H, W], a function of `key` alone."""
    return torch.randn(n, *IMAGE, device=device, generator=generator(device, *key))


@torch.no_grad()
def sample(network, n, solver, steps, args, device):
    """Integrate n draws of N(0, I). Returns images uint8 [n, C, H, W], mean NFE, straightness (mean squared
    deviation of v from x_1 - x_0 along the path) and, for this rank's last batch, x0_hat at the points of the
    path and its end, uint8 [points + 1, B, C, H, W]."""
    size, images = min(n, SAMPLE_BATCH), torch.zeros(n, *IMAGE, dtype=torch.uint8, device=device)
    sums, x0_hats = torch.zeros(3, device=device), None
    for i in progress(range(rank(), -(-n // size), world()), f"{solver} {steps}, batches of {size}"):
        z, path = normal(size, device, args.seed, 1, i), []
        x, nfe = common.SOLVERS[solver](network.velocity, z, steps, tolerance=args.tolerance, trajectory=path)
        images[i * size:(i + 1) * size] = common.to_uint8(x)[:n - i * size]
        bend = torch.stack([(v - (z - x)).square().mean() for _, _, v in path]).mean()
        sums += torch.stack([torch.ones_like(bend), torch.full_like(bend, nfe), bend])
        x0_hats = common.to_uint8(torch.stack([x_t - t * v for t, x_t, v in path] + [x]))
    count, nfe, bend = all_reduce(sums).tolist()
    return all_reduce(images), nfe / count, bend / count, x0_hats  # each rank filled its own rows of zeros


class Classifier(nn.Module):
    """A small convolutional classifier: x [B, C, H, W] -> pooled activations [B, 32 + 64 + 128], logits."""

    def __init__(self, classes):
        super().__init__()
        widths = (IMAGE[0], 32, 64, 128)
        self.stages = nn.ModuleList(nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU())
                                    for i, o in zip(widths, widths[1:]))
        self.out = nn.Linear(widths[-1], classes)

    def forward(self, x):
        pooled = []
        for stage in self.stages:
            x = F.max_pool2d(stage(x), 2)
            pooled.append(x.mean((2, 3)))
        return torch.cat(pooled, 1), self.out(pooled[-1])


def classifier_features(images, labels, device, key):
    """A function uint8 [B, C, H, W] -> features [B, 224], in units of their deviation over the images, and
    its name. The classifier is trained on these images once (fixed seed, batches of 128) and cached."""
    torch.manual_seed(0)
    network = Classifier(int(labels.max()) + 1).to(device)

    def make():
        optimizer = torch.optim.Adam(network.parameters(), 2e-3)
        for _ in progress(range(CLASSIFIER_BATCHES), "classifier"):
            index = torch.randint(len(images), (128,)).to(images.device)
            x, wanted = images[index].to(device), labels[index].to(device)
            F.cross_entropy(network(common.to_float(x))[1], wanted).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            network.eval()
            f = [network(common.to_float(part.to(device)))[0] for part in images.split(SAMPLE_BATCH)]
        return {"network": network.state_dict(), "scale": torch.cat(f).std(0).clamp(min=1e-3)}

    saved = common.cached(CACHE / f"classifier-{key}.pt", make)
    network.eval().load_state_dict(saved["network"])
    digest = hashlib.sha256(b"".join(v.numpy().tobytes() for v in saved["network"].values())).hexdigest()
    scale = saved["scale"].to(device)
    return lambda part: network(common.to_float(part.to(device)))[0] / scale, f"classifier-{digest[:8]}"


def inception_features(mode, device):
    """A function uint8 [B, C, H, W] -> clean-fid's Inception features [B, 2048], and its name."""
    path = Path("." if platform.system() == "Windows" else "/tmp") / "inception-2015-12-05.pt"  # clean-fid's
    try:  # imported here: clean-fid needs a torchvision that matches torch
        from cleanfid import downloads_helper, features, resize
        with common.rank_zero_first():
            if not path.exists():  # its own download would leave half a file when cut short
                common.download([downloads_helper.inception_url], path)
        network = features.build_feature_extractor(mode, device, use_dataparallel=False)
    except (ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"clean-fid cannot load {path} ({reason}); delete it if it was cut short") from None
    resizer = resize.build_resizer(mode)

    def extract(images):
        x = images.to(device).expand(-1, 3, -1, -1).float()
        if mode == "clean":  # resized image by image in Pillow; legacy_tensorflow resizes inside the network
            x = np.stack([resizer(image.numpy()).transpose(2, 0, 1) for image in x.permute(0, 2, 3, 1).cpu()])
            x = torch.from_numpy(x).to(device)
        return network(x)
    return extract, f"inception-{mode}"


@torch.no_grad()
def moments(features, images):
    """Sum of [f 1]^T [f 1] over the images, float64 [D + 1, D + 1]: products, sums and count. They add up."""
    total = torch.zeros(())
    for part in progress(images[rank()::world()].split(SAMPLE_BATCH), "features"):
        f = F.pad(features(part), (0, 1), value=1.0).cpu().double()
        total = total + f.T @ f
    return all_reduce(total)


def frechet_distance(a, b):
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2) of two `moments` (Heusel et al. 2017, sec. 3)."""
    def mean_and_covariance(m):
        n, mean = m[-1, -1], m[-1, :-1] / m[-1, -1]
        return mean, (m[:-1, :-1] - n * torch.outer(mean, mean)) / (n - 1)
    (mean_a, cov_a), (mean_b, cov_b) = mean_and_covariance(a), mean_and_covariance(b)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # S_a^1/2, and S_a^1/2 S_b S_a^1/2 is symmetric
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def reference(features, name, images, key, device):
    """`moments` of the real images and two figures to read others by: the distance between their halves
    (floor) and that of pure noise. Cached by the images' content (key) and the extractor."""
    def make():
        a, b = (moments(features, images[i::2]) for i in range(2))
        noise = moments(features, common.to_uint8(normal(min(len(images), 5_000), device, 0)))
        return {"moments": a + b, "floor": frechet_distance(a, b), "noise": frechet_distance(noise, a + b)}

    if len(images) < 2 * FEATURES[name.split("-")[0]]:
        raise InputError(f"{len(images)} real images are too few for the covariance of {name} features")
    return common.cached(CACHE / f"reference-{key}-{name}.pt", make)


def precomputed(args, n):
    """clean-fid's statistics of CIFAR-10's n images; nothing for other data, or where they cannot be had."""
    path = CACHE / f"cifar10_{args.fid_mode}_{args.split}_32.npz"
    if args.data is not None or args.features != "inception":
        return {}
    try:
        with common.rank_zero_first():
            if not path.exists():
                common.download([STATISTICS + path.name], path)
        with np.load(path) as file:
            mean, covariance = F.pad(torch.tensor(file["mu"]), (0, 1), value=1.0), torch.tensor(file["sigma"])
    except (InputError, OSError, ValueError, KeyError):
        return {}
    return {"moments": n * torch.outer(mean, mean) + (n - 1) * F.pad(covariance, (0, 1, 0, 1)),
            "source": "clean-fid's precomputed statistics"}


def evaluate(args, networks, images, labels, device):
    """Pictures, samples.npz, table of Frechet distances; networks: {"model": EMA, maybe "one-step": EMA}."""
    run = Path(args.run_dir)
    plan = [("model", args.solver, steps) for steps in ([None] if args.solver == "dopri5" else args.steps)]
    if args.one_step:
        plan += [row for row in [("model", "euler", 1), ("one-step", "euler", 1)] if row not in plan]
    for weights, solver, steps in plan:  # pictures first: whatever happens to the figures, they are there
        grid, _, _, x0_hats = sample(networks[weights], 64, solver, steps, args, device)
        common.save_grid(grid, run / f"samples_{weights}_{solver}{steps or ''}.png")
        if rank() == 0 and (weights, steps or max(args.steps)) == ("model", max(args.steps)):
            rows = x0_hats[:, :8].transpose(0, 1).flatten(0, 1)  # a sample a row
            common.save_grid(rows, run / "trajectory.png", columns=len(x0_hats))
    if args.save_samples:
        part = sample(networks["model"], args.save_samples, args.solver, args.steps[-1], args, device)[0]
        common.save(lambda file: np.savez(file, part.permute(0, 2, 3, 1).cpu().numpy()), run / "samples.npz")
    if not args.fid_samples:
        return common.say(f"pictures are in {run}; no distance, as --fid-samples is 0")
    try:
        key = hashlib.sha256(images.cpu().numpy()).hexdigest()[:12]
        features, name = (classifier_features(images, labels, device, key) if args.features == "classifier"
                          else inception_features(args.fid_mode, device))
        real = reference(features, name, images, key, device) | {"source": "their statistics computed here"}
        real |= precomputed(args, len(images))
    except InputError as error:
        raise InputError(f"no distance: {error}. The training and the pictures in {run} are safe, and the "
                         "same command evaluates later") from None
    n, seen = args.fid_samples, args.iterations * args.batch_size
    fid = "FID" if n >= 50_000 else f"FID-{n / 1000:g}k"
    figure = fid if args.features == "inception" else "FD (classifier)"
    data = f"{len(images):,} {args.split} images of {args.data or DATA} ({real['source']})"
    common.say(f"{figure}: {n:,} samples against {data}; {name}; EMA weights; seed {args.seed}; {seen:,} "
               f"images seen\n{'weights':10}{'solver':8}{'NFE':>6}{figure:>18}{'straightness':>14}\n"
               f"{'real images, halved':24}{real['floor']:18.3f}\n{'pure noise':24}{real['noise']:18.3f}")
    results = json.loads((run / "results.json").read_text()) if (run / "results.json").exists() else []
    for weights, solver, steps in plan:
        part, nfe, straightness, _ = sample(networks[weights], n, solver, steps, args, device)
        value = frechet_distance(moments(features, part), real["moments"])
        common.say(f"{weights:10}{solver:8}{nfe:6.4g}{value:18.3f}{straightness:14.5f}")
        row = dict(figure=figure, weights=f"{weights} EMA", solver=solver, steps=steps, n=n, features=name,
                   tolerance=None if steps else args.tolerance, reference=data, reference_sha256=key,
                   seed=args.seed, images_seen=seen)
        results = [old for old in results if any(old.get(k) != row[k] for k in row)]  # measured anew
        results.append(dict(row, value=value, nfe=nfe, straightness=straightness, floor=real["floor"],
                            noise=real["noise"], torch=torch.__version__, device=str(device)))
        common.save_json(results, run / "results.json")


# -------------------------------------------------------------------------------------------------- training


def resume(path, parts, iterations, definition):
    """Load a checkpoint into `parts` {name: module or optimizer}; returns its iteration and sums to log."""
    saved = common.load_pt(path, [*parts, "iteration", "totals", "definition"])
    differ = [f"--{key.replace('_', '-')} ({saved['definition'].get(key)} then, {value} now)"
              for key, value in definition.items() if saved["definition"].get(key) != value]
    if differ:
        raise InputError(f"{path} is from other flags: {', '.join(differ)}; give those, another "
                         "--run-dir, or move the file away to train anew")
    if saved["iteration"] > iterations:
        raise InputError(f"{path} is at iteration {saved['iteration']}, past --iterations {iterations}")
    try:
        for key, part in parts.items():
            part.load_state_dict(saved[key])
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError(f"{path} holds another network: {str(error).splitlines()[0]}") from None
    return saved["iteration"], saved["totals"]


def fit(args, device, prefix, module, ema, draw, iterations, warmup, definition, pictures):
    """Train `module` to `iterations`, from its checkpoint where there is one: the loop of both stages.

    module(*draw(i)): the loss of iteration i and what to log of it; module.network: what `ema` follows;
    definition: the flags that a checkpoint must agree with; pictures(network): uint8 images of the grid.
    """
    run, name = Path(args.run_dir), f"{prefix or 'cud_'}training"
    path, table = run / f"{prefix}checkpoint.pt", run / f"{prefix}metrics.csv"
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], args.lr,
                                 fused=device.type in ("cpu", "cuda"))
    parts = {"module": module, "ema": ema, "optimizer": optimizer}
    start, totals = resume(path, parts, iterations, definition) if path.exists() else (0, torch.zeros(()))
    totals = torch.zeros(2, len(module.columns), device=device) + totals.to(device)  # since the last row
    if start < iterations:
        one = [part[:1] if torch.is_tensor(part) else part for part in draw(start)]
        with FlopCounterMode(display=False) as counter:  # before compilation, which hides the operations
            module(*one)[0].backward()
        optimizer.zero_grad()
        flops = counter.get_total_flops()  # an image
        common.say(f"{name}, iterations {start} to {iterations}: {flops * args.batch_size / 1e9:,.1f} GFLOP "
                   f"each; {sum(p.numel() for p in module.network.parameters()):,} network parameters, "
                   f"{sum(p.numel() for p in module.parameters() if p.requires_grad):,} trained in all")
    if args.compile == "on" or (args.compile == "auto" and device.type == "cuda"):
        torch._dynamo.config.recompile_limit = 64  # networks, batch sizes and numbers of heads share forward
        for part in filter(None, (module.network, ema, getattr(module, "encoder", None))):
            part.compile(dynamic=False)
    if start == iterations:
        return
    if rank() == 0:
        common.save_json({"args": vars(args), **common.versions(device)}, run / "config.json")
        rows = table.read_text().splitlines(keepends=True)[1:] if start and table.exists() else []
        rows = [row for row in rows if int(row.split(",")[0]) <= start]  # later ones will be written again
        header = f"iteration,images,{','.join(module.columns)},lr,images_per_s,model_tflop_per_s\n"
        common.save(lambda file: file.write("".join([header, *rows]).encode()), table)
    step = module
    if world() > 1:
        step = nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)
    averaged, current = list(ema.parameters()), list(module.network.parameters())
    never = torch.iinfo(torch.int64).max
    first_bad, kept = torch.full((), never, device=device), start  # first iteration with a non-finite loss
    since = began = time.time()
    images_since, todo = 0, range(start, iterations)
    with common.signals() as came, progress(todo, name, initial=start, total=iterations) as bar:
        for i in bar:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1, (i + 1) / max(1, warmup))
            batch = (part.chunk(args.accumulate) if torch.is_tensor(part) else [part] * args.accumulate
                     for part in draw(i))
            for j, piece in enumerate(zip(*batch), 1):
                with step.no_sync() if world() > 1 and j < args.accumulate else nullcontext():
                    loss, log = step(*piece)
                    (loss / args.accumulate).backward()
                totals += log
                first_bad = torch.where(loss.isfinite(), first_bad, first_bad.clamp(max=i + 1))  # no GPU sync
            optimizer.step()
            optimizer.zero_grad()
            began = time.time() if i == start else began  # the first iteration compiles
            decay = min(args.ema_decay, (1 + i) / (10 + i)) if i else 0.0  # the first weights are taken whole
            get_ema_multi_avg_fn(decay)(averaged, current, None)
            images_since += args.batch_size

            stopping = int(all_reduce(torch.tensor(max(came, default=0)), dist.ReduceOp.MAX))  # on the CPU
            logging = (i + 1) % LOG_EVERY == 0 or i + 1 == iterations
            saving = stopping or (i + 1) % args.checkpoint_every == 0 or i + 1 == iterations
            if (logging or saving) and (bad := int(all_reduce(first_bad.clone(), dist.ReduceOp.MIN))) < never:
                raise InputError(f"the loss is not finite at iteration {bad} of {name}; " + (
                    f"{path} keeps iteration {kept}" if kept else "no checkpoint yet") + "; lower --lr?")
            if logging:
                sums, counts = all_reduce(totals).tolist()
                means = [f"{s / c:.6g}" if c else "" for s, c in zip(sums, counts)]
                speed = images_since / (time.time() - since)
                if rank() == 0:
                    with open(table, "a") as file:
                        print(i + 1, (i + 1) * args.batch_size, *means, group["lr"], f"{speed:.1f}",
                              f"{speed * flops / 1e12:.4g}", sep=",", file=file)
                bar.set_postfix(loss=means[0], images_per_s=f"{speed:.0f}")
                totals.zero_()
                since, images_since = time.time(), 0
            if saving:
                common.save_pt({"model": ema.state_dict(), "args": module.network.config},
                               run / f"{prefix.removesuffix('_') or 'model'}.pt")
                kept = i + 1
                common.save_pt({key: part.state_dict() for key, part in parts.items()} | dict(
                    iteration=kept, definition=definition, totals=all_reduce(totals.clone()) / world()), path)
            if device.type == "cpu" and i == start + 20:
                left = (time.time() - began) / 20 * (iterations - i - 1)
                common.say(f"at this speed {common.duration(left)} remain to the last iteration"
                           + "; a GPU is meant for this, or --quick" * (left > 86_400))
            if stopping:
                all_reduce(torch.zeros(1))  # the others wait until rank 0 has saved
                common.say(f"stopped and saved at iteration {i + 1}; the same command continues")
                raise SystemExit(128 + stopping)
            if saving:
                common.save_grid(pictures(ema), run / f"{prefix}samples_{i + 1:06}.png")


def prepare(network, args, device):
    """Move a network to the device, in the layout and the precision that are fast there."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    network.amp = args.amp == "on" or (args.amp == "auto" and has_bf16)
    return network.to(device, memory_format=torch.channels_last)


def train(args, device, images):
    """The one training session; returns the EMA of the network."""
    torch.manual_seed(args.seed)
    shape = dict(image=IMAGE, multipliers=args.multipliers, dropout=args.dropout)
    network = prepare(UNet(**shape, channels=args.channels, blocks=args.blocks, heads=max(1, args.rk_order),
                           skip_phi=args.skip_phi), args, device)
    encoder = prepare(UNet(**shape, channels=min(32, args.channels), blocks=min(2, args.blocks), skip_phi=0.5,
                           c_out=2 * IMAGE[0]), args, device) if args.coupling == "learned" else None
    ema = copy.deepcopy(network).eval().requires_grad_(False)
    module = CatchUp(network, encoder, ema.velocity if args.target == "ema" else None, args)
    own = slice(rank() * args.batch_size // world(), (rank() + 1) * args.batch_size // world())

    def draw(i):
        """This rank's part of batch i, with replacement, from (seed, i) alone: resuming needs no state."""
        options = dict(size=(args.batch_size,), device=device, generator=generator(device, args.seed, 2, i))
        index, noise = torch.randint(len(images), **options), normal(args.batch_size, device, args.seed, 3, i)
        t, uniform = EPS + (1 - EPS) * torch.rand(**options), torch.rand(**options)
        h = STEP_RULES[args.step_rule](t, args.intervals, uniform)
        torch.manual_seed(seed_of(args.seed, 4, i, rank()))  # dropout
        x = common.to_float(images[index[own]])
        if args.flip:
            x = torch.where(torch.rand(**options)[own].view(-1, 1, 1, 1) < 0.5, x.flip(3), x)
        return x, noise[own], t[own], h[own], i / args.iterations

    fit(args, device, "", module, ema, draw, args.iterations, min(args.warmup, args.iterations // 10),
        {k: v for k, v in vars(args).items() if k not in NOT_TRAINING},
        lambda network: sample(network, 64, args.solver, args.steps[-1], args, device)[0])
    return ema


# -------------------------------------------------------------------------------------------- one-step stage


class OneStep(nn.Module):
    """The additional training's loss: one step, z - v(z, 1), learns what many steps make of the noise z."""

    columns = ("loss", "target", "ema")

    def __init__(self, network, slow):
        super().__init__()
        self.network, self.slow = network, slow  # slow: the velocity of the network's EMA

    def forward(self, z, target):
        """z, target [B, C, H, W]. The mean loss; sums and counts [2, columns] to log."""
        ones = z.new_ones(len(z))
        v = self.network.velocity(z, ones)
        parts = [F.mse_loss(z - v, target), F.mse_loss(v, self.slow(z, ones).detach())]
        loss = parts[0] + 0.1 * parts[1]
        return loss, torch.stack([torch.stack([loss, *parts]).detach(), z.new_ones(3)])


@torch.no_grad()
def one_step_pairs(args, teacher, device):
    """Noise [n, C, H, W], and x0_hat at the 9th, 12th and 15th of 16 Euler steps, float16 [n, 3, C, H, W]."""
    noise, targets, n = [], [], -(-args.one_step_pairs // world())  # each rank makes and keeps its own
    for i in progress(range(-(-n // SAMPLE_BATCH)), "one-step targets"):
        path = []
        noise.append(normal(min(n, SAMPLE_BATCH), device, args.seed, 5, rank(), i))
        common.euler(teacher.velocity, noise[-1], 16, trajectory=path)
        targets.append(torch.stack([x - t * v for t, x, v in (path[8], path[11], path[14])], 1).half())
    return torch.cat(noise)[:n], torch.cat(targets)[:n]


def train_one_step(args, device, teacher):
    """The additional training in three stages, one for each target; returns the EMA of the student."""
    student = prepare(UNet(**teacher.config), args, device)
    student.load_state_dict(teacher.state_dict())
    student.heads[1:].requires_grad_(False)
    ema = copy.deepcopy(student).eval().requires_grad_(False)
    pairs = []

    def draw(i):
        if not pairs:  # made when first asked for: a finished student needs none
            pairs.extend(one_step_pairs(args, teacher, device))
        index = torch.randint(len(pairs[0]), (args.batch_size // world(),), device=device,
                              generator=generator(device, args.seed, 6, i, rank()))
        torch.manual_seed(seed_of(args.seed, 7, i, rank()))  # dropout
        return pairs[0][index], pairs[1][index, i // args.one_step_iterations].float()

    keys = vars(args).keys() - NOT_TRAINING | {"iterations", "one_step_iterations", "one_step_pairs"}
    fit(args, device, "one_step_", OneStep(student, ema.velocity), ema, draw,
        3 * args.one_step_iterations, 0, {key: getattr(args, key) for key in sorted(keys)},
        lambda network: sample(network, 64, "euler", 1, args, device)[0])
    return ema


# ------------------------------------------------------------------------------------------------------ main


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
        raise common.RankError(f"--device {name} is not to be had here ({reason})") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # shapes are fixed: the fastest convolution is looked for once
    elif device.type == "cpu":
        common.keep_freed_memory()
    else:
        common.say(f"on {device.type} this has never been run: please report what happens")
    torch.set_float32_matmul_precision("high")  # TF32 where float32 is left
    return device


def main(argv=None):
    """The command line; returns the exit status."""
    try:
        common.start_ranks()
        args = parse_args(argv)
        device = pick_device(args.device)
        with common.rank_zero_first():
            images, labels = load_data(args)
        images, labels = images.to(device), labels.to(device)
        Path(args.run_dir).mkdir(parents=True, exist_ok=True)
        networks = {"model": train(args, device, images)}
        if args.one_step:
            networks["one-step"] = train_one_step(args, device, networks["model"])
        evaluate(args, networks, images, labels, device)
        return 0
    except (InputError, OSError, FloatingPointError) as error:
        return common.explain(error, __file__)
    except KeyboardInterrupt:  # while training, Ctrl-C is caught earlier and saves
        return 130


if __name__ == "__main__":
    common.run_main(main)
