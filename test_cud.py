"""Tests of what could be wrong: theoretical orders, closed forms, independent computations, kills midway.

    pytest                      everything, on a CPU, in a temporary folder, without network or data
    python test_cud.py SCRIPT   no tests: training as a script does it against the plain way, see the end
"""
import ast
import copy
import csv
import difflib
import functools
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from scipy.integrate import solve_ivp
from scipy.linalg import sqrtm
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import common
import cud_cifar10
import cud_imagenet64
import cud_mnist

HERE = Path(common.__file__).parent
REAL = HERE.parent / "shared/data"
RESULTS = HERE / "assets/results.md"
SCRIPTS = [cud_mnist, cud_cifar10, cud_imagenet64]
CPU = torch.device("cpu")
TINY = shlex.split("--data glyphs --channels 8 --multipliers 1 2 --blocks 1 --batch-size 8 --fid-samples 0 "
                   "--steps 2")
QUICK = shlex.split("--quick --iterations 30 --multipliers 1 2 --one-step-iterations 4 --one-step-pairs 30")


class Payload:
    """A pickle that runs code."""

    def __reduce__(self):
        return os.mkdir, ("run_by_the_pickle",)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test runs in its own folder, where no pickle may have run code."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "run_by_the_pickle").exists()


@pytest.fixture(autouse=True, scope="session")
def small():
    """600 drawn digits, drawn once, a little training for their classifier, and one thread are plenty."""
    torch.set_num_threads(1)  # as start() gives to its processes, or the last bits would differ
    draw = functools.cache(common.drawn_digits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "drawn_digits", lambda n, shape, seed=0: draw(min(n, 600), shape, seed))
        for script in SCRIPTS:
            patch.setattr(script, "CLASSIFIER_BATCHES", 30)
        yield


@pytest.fixture
def small_images(monkeypatch):
    """The scripts learn images of 16x16."""
    for script in SCRIPTS:
        monkeypatch.setattr(script, "IMAGE", (script.IMAGE[0], 16, 16))


def run(*flags, script=cud_mnist, capsys=None):
    """The script's main() in this process; returns the exit status and the lines on stderr."""
    if capsys:
        capsys.readouterr()
    try:
        status = script.main([*TINY, *flags])
    except SystemExit as left:  # argparse's, or a signal's
        status = left.code
    return status, capsys.readouterr().err.splitlines() if capsys else None


def small_args(*flags):
    return cud_mnist.parse_args([*TINY, *flags])


def small_unet(**options):
    return cud_mnist.UNet(cud_mnist.IMAGE, 8, [1, 2], 1, attention=[], dropout=0.0, **options)


def small_adm(classes=5, **options):
    torch.manual_seed(0)
    network = cud_imagenet64.UNet((3, 16, 16), 8, [1, 2], 1, [8], 0.0, classes, **options)
    for p in network.parameters():  # away from the zeros that it starts with
        nn.init.normal_(p, std=0.1)
    return network


def dummy(script, classes=1):
    """Data of one black image."""
    image, label = torch.zeros(1, *script.IMAGE, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    return common.Data(image, label, "", [str(i) for i in range(classes)], "0" * 64)


def files():
    """What the files here hold."""
    return {file: file.read_bytes() for file in Path().rglob("*") if file.is_file()}


def refused(call, *said):
    """call() raises an InputError of one line that says all of `said`, and changes no file."""
    before = files()
    with pytest.raises(common.InputError) as error:
        call()
    message = str(error.value)
    assert all(part in message for part in said) and "\n" not in message, message
    assert before == files()


def results(folder):
    """The rows of results.jsonl."""
    return [json.loads(line) for line in (Path(folder) / "results.jsonl").read_text().splitlines()]


def table(path):
    """The columns of a metrics.csv by name, lists of floats."""
    with open(path) as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def same(path, other):
    """Two files of torch.save hold the same tensors and values, but for the speed in their logs."""
    a, b = torch.load(path), torch.load(other)
    for part in (a, b):
        part["rows"] = [row | {"images_per_s": 0} for row in part.get("rows", [])]
    a, b = tree_leaves(a), tree_leaves(b)
    return len(a) == len(b) > 10 and all(
        torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(a, b))


KILL = "signal.raise_signal(signal.SIGKILL)"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SCRIPT = """import os, signal, sys, common, {0} as script
script.IMAGE, script.LOG_EVERY = {1}, 4
full, draw, at = common.drawn_digits, script.CatchUp.draw, {2}
common.drawn_digits = lambda n, shape: full(600, shape)
script.CatchUp.draw = lambda stage, i: (exec(at.get((script.RANK, i), "")), draw(stage, i))[1]
sys.exit(script.main(sys.argv[1:]))
"""


def start(*flags, launcher=(), script=cud_mnist, at=None, **variables):
    """The script in a process of its own, with a row of metrics.csv every 4 iterations.

    at: {(rank, i): a statement that this rank executes before iteration i}; variables: of its environment.
    """
    Path("go.py").write_text(SCRIPT.format(script.__name__, script.IMAGE, at or {}))
    env = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen([sys.executable, *launcher, "go.py", *TINY, *flags], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


# --------------------------------------------------------------------------------------------------- solvers


def field(x, t):
    """A nonlinear, time-dependent field in the plane; x [B, 2], t [B]."""
    a, b = x[:, 0], x[:, 1]
    return torch.stack([torch.sin(2 * b) + t * a, torch.cos(a) - a * b * t], 1)


def exact(x, t_start, t_end):
    """The same field, written again and integrated by SciPy to 1e-13; x [B, 2], t_start and t_end floats."""
    def f(t, y):
        return [np.sin(2 * y[1]) + t * y[0], np.cos(y[0]) - y[0] * y[1] * t]
    return torch.tensor(np.array([solve_ivp(f, (t_start, t_end), y, "DOP853", rtol=1e-13, atol=1e-13).y[:, -1]
                                  for y in x.numpy()]))


X = torch.tensor([[0.3, -0.8], [1.1, 0.4], [-0.6, 0.9]], dtype=torch.float64)
FIXED = {"euler": 1, "heun": 2, "ab2": 2, "ab3": 3}  # orders


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("numbers", [(41, 81, 161), (40, 80, 160)])
@pytest.mark.parametrize("t_start, t_end", [(1.0, 0.0), (0.0, 1.0)])
def test_solver_has_its_order_and_spends_its_steps(name, numbers, t_start, t_end):
    end, errors = exact(X, t_start, t_end), []
    for steps in numbers:
        path = common.Watched(field)
        errors.append((common.SOLVERS[name](path, X, steps, t_start, t_end) - end).abs().max().item())
        assert path.nfe == len(path.x0_hats) == steps
    assert np.log2(errors[1] / errors[2]) == pytest.approx(FIXED[name], abs=0.15), errors


def test_dopri5_meets_its_tolerance():
    spent = []
    for tolerance in (1e-4, 1e-7, 1e-10):
        path = common.Watched(field)
        end = common.dopri5(path, X, tolerance)
        assert (end - exact(X, 1.0, 0.0)).abs().max() < 30 * tolerance
        spent.append(path.nfe)
    assert spent[0] < spent[1] < spent[2]
    x = torch.randn(3, 2, 4, 5)
    assert_close(common.dopri5(lambda x, t: -x, x, 1e-6, 0.0, 1.0), x / math.e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("velocity, said", [
    (lambda x, t: 1e6 * (x - t.cos()[:, None]), "cannot meet --tolerance 0.0001 in 1,000 evaluations"),
    (lambda x, t: 9 / x, "--tolerance"),  # ends at x = 0
    (lambda x, t: torch.where(t[:, None] > 0.5, x, math.inf), "is not finite"),
    (lambda x, t: x * math.nan, "at t = 1.000000 is not finite")])
def test_dopri5_gives_up(velocity, said):
    path = common.Watched(velocity)
    refused(lambda: common.dopri5(path, X.abs(), 1e-4), "dopri5", said)
    assert path.nfe < 1_100 and (path.nfe >= 1_000 or "1,000" not in said)


# ------------------------------------------------------------------------------------------- catch-up points


@pytest.mark.parametrize("order, theory", [(1, [2]), (2, [3, 2]), (3, [3, 2, 2])])
def test_catch_up_points_have_their_local_order(order, theory):
    t, errors, seen = torch.full((3,), 0.9, dtype=torch.float64), [], []
    for h in (0.04, 0.02, 0.01, 0.005):
        points, times = cud_mnist.catch_up_points(field, X, t, 0 * t + h, field(X, t), order)
        assert torch.allclose(times, torch.stack([t - (j + 1) * h for j in range(order)]))
        errors.append([abs(points[j] - exact(X, 0.9, 0.9 - (j + 1) * h)).max().item() for j in range(order)])
    late = torch.full((3,), 0.01, dtype=torch.float64)  # the step passes the data: no time below EPS
    _, times = cud_mnist.catch_up_points(lambda x, t: seen.append(t) or field(x, t), X, late, late, X, order)
    assert all((when >= cud_mnist.EPS).all() for when in [*seen, times]) and times[-1, 0] == cud_mnist.EPS
    assert -np.diff(np.log2(errors), axis=0).mean(0) == pytest.approx(theory, abs=0.3)


# -------------------------------------------------------------------------------------------------- the loss

B_TABLE = {1: [[1]], 2: [[.5, .5], [1, 1]],  # typed again from the paper, not imported: [k][j - 1]
           3: [[5/12, 2/3, -1/12], [10/12, 4/3, -2/12], [15/12, 2, -3/12]]}
A_TABLE = [[1], [1.75, .25]]


class Heads(nn.Module):
    """k heads v_j = tanh(A_j x + t b_j) on [B, 2, 1, 1], in float64."""

    def __init__(self, k, scale=1.0):
        super().__init__()
        draw = torch.Generator().manual_seed(5)
        self.a = nn.Parameter(scale * torch.randn(k, 2, 2, generator=draw, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(k, 2, generator=draw, dtype=torch.float64))

    def forward(self, x, t):
        flat = torch.einsum("kij,bj->kbi", self.a, x.flatten(1)) + t[None, :, None] * self.b[:, None]
        return flat.tanh()[..., None, None]

    def first(self, x, t):
        return self(x, t)[0]

    def by_hand(self, j, point, time):
        """v_(j + 1) of one sample, in NumPy."""
        return np.tanh(self.a[j].detach().numpy() @ point + time * self.b[j].detach().numpy())


def case():
    draw = torch.Generator().manual_seed(1)
    x, z = torch.randn(2, 6, 2, 1, 1, generator=draw, dtype=torch.float64)
    t = torch.tensor([0.9, 0.5, 0.3, 0.1, 0.05, 1e-5], dtype=torch.float64)  # two reach x at any order
    return x, z, t, torch.tensor([0.06, 0.01, 0.0625, 0.05, 0.06, 0.03], dtype=torch.float64)


def between(x, z, t):
    return t.view(-1, 1, 1, 1) * z + (1 - t.view(-1, 1, 1, 1)) * x


def one_by_one(x, z, t, h):
    return zip(x.numpy().reshape(-1, 2), z.numpy().reshape(-1, 2), t.tolist(), h.tolist())


def loss_by_hand(heads, velocity, target, order):
    """L_catchup and L_truth a sample of case(), in NumPy, loop by loop."""
    found, eps = [], 1e-5
    for x_i, z_i, t_i, h_i in one_by_one(*case()):
        x_t, u = t_i * z_i + (1 - t_i) * x_i, z_i - x_i
        k = [heads.by_hand(0, x_t, t_i)]
        for i in range(1, order):
            point = x_t - h_i * sum(a * s for a, s in zip(A_TABLE[i - 1], k))
            k.append(velocity.by_hand(0, point, max(eps, t_i - i * h_i)))
        c = w = 0.0
        for j in range(max(order, 1)):
            mine = heads.by_hand(j, x_t, t_i)
            w += np.mean((mine - u) ** 2)
            if order:
                point = x_t - h_i * sum(b * s for b, s in zip(B_TABLE[order][j], k))
                y = target.by_hand(0, point, max(eps, t_i - (j + 1) * h_i))
                c += np.mean((mine - (u if t_i - order * h_i < eps else y)) ** 2)
        found.append([c, w])
    return np.transpose(found)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_loss_equals_a_computation_by_hand(order):
    heads, other, ema = Heads(max(order, 1)), Heads(1, 1.2), Heads(1, 0.7)
    for options, hands in (({}, (heads, heads)), ({"target": ema.first}, (heads, ema)),
                           ({"velocity": other.first}, (other, other)),
                           ({"velocity": other.first, "target": ema.first}, (other, ema))):
        got = torch.stack(cud_mnist.catch_up_loss(heads, *case(), order, **options)).detach()
        np.testing.assert_allclose(got.numpy(), loss_by_hand(heads, *hands, order), rtol=1e-12)
    with pytest.raises(ValueError, match=rf"\[6, 2, 1, 1\], not its heads \[{max(order, 1)}, 6, 2, 1, 1\]"):
        cud_mnist.catch_up_loss(heads.first, *case(), order)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_no_gradient_flows_through_a_target(order):
    heads = Heads(order)
    x, z, t, h = case()
    wanted = [heads.a, heads.b, z.requires_grad_()]
    catchup, truth = cud_mnist.catch_up_loss(heads, x, z, t, h, order)
    got = torch.autograd.grad((catchup + truth).sum(), wanted)
    x_t = between(x, z, t)
    with torch.no_grad():  # the targets as constants
        xs, ts = cud_mnist.catch_up_points(heads.first, x_t, t, h, heads.first(x_t, t), order)
        y = torch.stack([heads.first(p, s) for p, s in zip(xs, ts)])
        y[:, t - order * h < 1e-5] = (z - x)[t - order * h < 1e-5]
    v = heads(x_t, t)
    loss = ((v - y) ** 2).sum() / 2 + ((v - (z - x)) ** 2).sum() / 2  # a sample has two dimensions
    assert_close(got, torch.autograd.grad(loss, wanted), rtol=1e-12, atol=1e-12)


def distillation_by_hand(student, teacher, ema, rule, *batch):
    """The loss of each sample, in NumPy, one by one."""
    found = []
    for x_i, z_i, t_i, h_i in one_by_one(*batch):
        h_i = min(h_i, (t_i - 1e-5) / (2 if rule == "progressive" else 1))
        x_t = t_i * z_i + (1 - t_i) * x_i
        mine, slope = student.by_hand(0, x_t, t_i), teacher.by_hand(0, x_t, t_i)
        there, when = x_t - h_i * slope, max(1e-5, t_i - h_i)
        if rule == "consistency":
            error = (x_t - t_i * mine) - (there - when * ema.by_hand(0, there, when))
        elif rule == "progressive":  # where two steps lead, as one step's slope
            end = there - h_i * teacher.by_hand(0, there, when)
            error = mine - ((x_t - end) / (2 * h_i) if h_i > 1e-9 else slope)
        else:
            error = mine - ema.by_hand(0, there, when)
        found.append(np.mean(error ** 2))
    return np.array(found)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("rule", ["consistency", "progressive", "ema"])
def test_distillation_equals_a_computation_by_hand(script, rule):
    student, teacher, ema = Heads(1), Heads(3, 0.7), Heads(1, 0.5)
    x, z, _, h = case()
    t = torch.tensor([0.9, 0.5, 0.05, 1e-4, 5e-5, 1e-5], dtype=torch.float64)  # most steps pass the data
    loss = script.distillation_loss(student, teacher.first, ema.first, x, z, t, h, rule)
    by_hand = distillation_by_hand(student, teacher, ema, rule, x, z, t, h)
    np.testing.assert_allclose(loss.detach().numpy(), by_hand, rtol=1e-9, atol=1e-18)
    loss.sum().backward()
    assert student.a.grad.abs().sum() > 0
    assert all(p.grad is None for net in (teacher, ema) for p in net.parameters())


def stage_with(script, flags="", classes=1, **parts):
    """The script's CatchUp of these flags, on a black image, with other networks or callables in it."""
    args = script.parse_args([*TINY, "--attention", *shlex.split(flags)])
    stage = script.CatchUp(args, CPU, dummy(script, classes))
    for name, part in parts.items():
        setattr(stage, name, part)
    return stage


def test_learned_coupling_the_ramp_and_the_log():
    torch.manual_seed(0)
    network, encoder = small_unet(heads=2), small_unet(c_out=2, skip_phi=0.5)
    for part in (network, encoder):
        for p in part.heads.parameters():
            nn.init.normal_(p, std=0.1)  # away from the near-zero start
    x, noise = torch.randn(2, 5, 1, 28, 28)
    t, h = torch.tensor([0.03, 0.3, 0.55, 0.8, 1.0]), torch.full((5,), 0.05)
    mu, log_var = encoder(x, torch.ones(5))[0].chunk(2, 1)
    q = torch.distributions.Normal(mu, (log_var / 2).exp())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).flatten(1).mean(1)
    catchup, truth = cud_mnist.catch_up_loss(network, x, mu + q.stddev * noise, t, h, 2)
    stage = stage_with(cud_mnist, "--rk-order 2 --loss-ramp --kl-weight 7", network=network, encoder=encoder)
    loss, means = stage(x, noise, t, h, 0.25)
    each = 0.5 * catchup + 1.5 * truth + 7 * kl
    assert stage.columns == ("loss", "catchup", "truth", "kl") and loss is means[0]
    assert_close(means, [part.mean() for part in (each, catchup, truth, kl)])
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.heads.parameters())


# -------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("script, classes, sizes, recipe, ema, dropout, warmup", [
    (cud_mnist, 1, [2_155_201 + 705, 2_155_778], (50_000, 256, 3e-4), 0.9999, 0.13, 5_000),
    (cud_cifar10, 1, [55_732_739 + 7_427, 2_208_966], (500_000, 128, 2e-4), 0.9999, 0.13, 5_000),
    (cud_imagenet64, 1000, [295_899_267 + 5_571], (500_000, 1024, 4e-4), 0.9999432189950708, 0.1, 0)])
def test_defaults_are_the_paper_s(script, classes, sizes, recipe, ema, dropout, warmup, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    assert f"(default: {recipe[0]})" in capsys.readouterr().out
    assert script.parse_args([]).rk_order == 1
    args = script.parse_args(["--rk-order", "2"])
    assert (args.iterations, args.batch_size, args.lr) == recipe
    assert (args.warmup, args.ema_decay, args.dropout) == (warmup, ema, dropout)
    assert (args.skip_phi, args.one_step_iterations, args.target) == (0.75, 40_000, "online")
    assert (args.step_rule, args.intervals, args.loss_ramp) == ("uniform", 16, False)
    assert getattr(args, "flip", False) == (script is not cud_mnist)  # a mirrored digit is no digit
    assert (args.wavelet_weight if script is cud_imagenet64 else args.kl_weight / 20) == 1
    monkeypatch.setattr(cud_imagenet64, "grid_labels", lambda *_: None)
    with torch.device("meta"):
        stage = script.CatchUp(args, torch.device("meta"), dummy(script, classes))
    assert [sum(p.numel() for p in part.parameters()) for part in stage.children()] == sizes
    assert (stage.iterations, stage.warmup) == (args.iterations, warmup)


def test_wavelet_details_and_loss():
    low = np.array(cud_imagenet64.DB3)
    high = np.array([(-1) ** (i + 1) * low[5 - i] for i in range(6)])
    for shift in range(3):  # orthonormal, and the high-pass filter is blind to parabolas: what makes it db3
        assert (low[2 * shift:] * low[:6 - 2 * shift]).sum() == pytest.approx(float(shift == 0), abs=1e-9)
        assert (np.arange(6) ** shift * high).sum() == pytest.approx(0, abs=1e-6)
    a, b = np.random.default_rng(0).uniform(-1, 1, (2, 2, 8, 7))
    bands = []
    for image in (a - b) / 2:  # every other value of the full convolution, zeros outside
        for f, g in ((low, high), (high, low), (high, high)):
            rows = np.apply_along_axis(np.convolve, 0, image, f)
            bands.append(np.apply_along_axis(np.convolve, 1, rows, g)[1::2, 1::2])
    x, y = (torch.from_numpy(part)[None] for part in (a, b))
    assert_close(cud_imagenet64.details((x - y) / 2), torch.tensor(np.array(bands)).view(1, 6, 6, 6))
    largest = np.sort(abs(np.array(bands)).ravel())[::-1][:43]  # a fifth of 216
    assert cud_imagenet64.wavelet_loss(x, y).tolist() == pytest.approx([largest.mean()], rel=1e-9)


@pytest.mark.parametrize("target", ["online", "ema", "consistency", "progressive", "ema of a teacher"])
def test_imagenet_loss_is_that_of_its_samples_by_class(target):
    network, average, teacher = small_adm(heads=2), small_adm(), small_adm()
    average.embed_class.weight.data += 1
    teacher.embed_class.weight.data += 2
    x, noise = torch.randn(2, 3, 3, 16, 16)
    batch = x, noise, torch.tensor([0.1, 0.5, 0.9]), torch.full((3,), 0.05), torch.tensor([0, 4, 2])
    stage = stage_with(cud_imagenet64, "--rk-order 2 --wavelet-weight 3 --loss-ramp", classes=5,
                       network=network, average=average.first_head if target != "online" else None)
    rule = target.split()[0]
    if target not in ("online", "ema"):
        stage.teacher, stage.args.target = teacher.first_head, rule
    loss, means = stage(*batch[:4], 0.25, batch[4])
    assert stage.columns == ("loss", "catchup", "truth", "wavelet") and loss is means[0]
    terms = []
    for x, noise, t, h, label in zip(*(part.split(1) for part in batch)):  # sample by sample
        told = [functools.partial(call, labels=label) for call in (network, teacher.first_head,
                                                                   average.first_head, network.first_head)]
        truth = wavelet = torch.zeros(1)
        if stage.teacher is not None:
            catchup = cud_imagenet64.distillation_loss(*told[:3], x, noise, t, h, rule)
        else:
            catchup, truth = cud_mnist.catch_up_loss(told[0], x, noise, t, h, 2,
                                                     target=told[2 if target == "ema" else 3])
            wavelet = cud_imagenet64.wavelet_loss(noise - told[0](between(x, noise, t), t)[1], x)
        terms.append(torch.stack([0.5 * catchup + 1.5 * truth + 3 * wavelet, catchup, truth, wavelet]))
    assert_close(torch.stack(means), torch.cat(terms, 1).mean(1), rtol=1e-4, atol=1e-5)


def test_importing_changes_nothing():
    state = ("[str(part) for part in (os.environ, sys.path, os.listdir(), warnings.filters, "
             "signal.getsignal(2), torch.initial_seed(), torch.get_float32_matmul_precision())]")
    text = (f"import os, signal, sys, warnings, torch.distributed, tqdm, PIL.ImageFont\nthen = {state}\n"
            f"import common, cud_mnist, cud_cifar10, cud_imagenet64\nprint(then == {state})")
    env = os.environ | {"PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1"}
    found = subprocess.run([sys.executable, "-c", text], env=env, capture_output=True, text=True)
    assert (found.stdout, found.stderr) == ("True\n", "")


def cut(module, first, last):
    """The text of a module between two lines that begin so."""
    return re.search(rf"^{first}.*?$(.*?)^{last}", Path(module.__file__).read_text(), re.S | re.M)[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_copied_parts_work_alone(script):
    alone, (x, z, t, h) = {"torch": torch}, case()
    exec(cut(script, "# -+ the method", "(?:DB3 = |# -+ network)"), alone)
    for rule, kind in zip(script.STEP_RULES, ("consistency", "progressive", "ema")):
        h, first = alone["step_size"](rule, t, 16, h), Heads(1).first
        loss = alone["distillation_loss"](Heads(1), first, first, x, z, t, h, kind)
        assert torch.equal(loss, script.distillation_loss(Heads(1), first, first, x, z, t, h, kind))
    parts = alone["catch_up_loss"](Heads(1), *case())
    exec(next(block for block in python_blocks("README.md") if "loss_at_order_1" in block), alone)
    assert_close(alone["loss_at_order_1"](Heads(1).first, *case()), sum(parts).mean())

    solvers = {"torch": torch}
    exec(cut(common, "# -+ solvers", "def dopri5"), solvers)
    for name in ("euler", "heun", "ab2", "ab3"):
        assert torch.equal(solvers[name](field, X, 5, 0.9, 0.2), common.SOLVERS[name](field, X, 5, 0.9, 0.2))

    alone = {"torch": torch, "nn": nn, "F": F, "math": math, "nullcontext": nullcontext}
    exec(cut(script, "# -+ network", "def load_model"), alone)
    options = dict(image=script.IMAGE, channels=8, multipliers=[1, 2], blocks=1, attention=[], dropout=0.0,
                   **({"classes": 3} if script is cud_imagenet64 else {}))
    inputs = torch.randn(2, *script.IMAGE), torch.rand(2), *[torch.tensor([0, 2])] * ("classes" in options)
    assert alone["UNet"](**options, heads=2)(*inputs).shape == (2, 2, *script.IMAGE)


@pytest.mark.parametrize("script", SCRIPTS)
def test_sizes_that_do_not_fit_are_named(script):
    c, h, w = script.IMAGE
    options = dict(image=script.IMAGE, channels=8, multipliers=[1, 2], blocks=1, attention=[], dropout=0.0)
    sizes = {"3 channels": dict(channels=3), "14 channels": dict(channels=14),
             "264 channels": dict(multipliers=[1, 33]), str([h, h // 2]): dict(attention=[h // 2 + 1]),
             f"{h}x{w} pixels": dict(multipliers=[1] * 8), "18x27 pixels": dict(image=(c, 18, 27))}
    if script is cud_imagenet64:  # 224 channels have groups, but not three heads
        options["classes"] = 3
        sizes["3 heads"] = dict(channels=224, multipliers=[1, 1])
    for said, size in sizes.items():
        with pytest.raises(ValueError, match=re.escape(said)) as error:
            script.UNet(**options | size)
        assert "--" not in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no head 3"):
        script.UNet(**options, heads=2).choose(3)
    refused(lambda: stage_with(script, "--channels 14"), "--channels, --multipliers", "14 channels")


# ----------------------------------------------------------------------------------------- the released code

RELEASED = json.loads((HERE / "assets/released.json").read_text())  # "how": how weights and draws are made
KINDS = {cud_mnist: "ddpm++", cud_cifar10: "ddpm++", cud_imagenet64: "adm"}


def released_network(script, heads=3, **encoder):
    """The script's network in float64 with the weights of RELEASED["how"] and the first so many heads."""
    shapes = RELEASED[KINDS[script]]["encoder_parameter_shapes" if encoder else "parameter_shapes"]
    if script is cud_imagenet64:
        network, seed = script.UNet((3, 16, 16), 128, [1, 1], 1, [8], 0.0, classes=10, heads=3), 2
    else:
        network = script.UNet((1, 16, 16), 8, [2, 2], 1, [16], 0.0, heads=1 if encoder else 3, **encoder)
        seed = 1 if encoder else 0
    order = ["embed", "embed_class", "first", "encoder", "bottom", "decoder", "heads"]
    named = sorted(network.named_parameters(), key=lambda pair: order.index(pair[0].split(".")[0]))
    assert [list(parameter.shape) for _, parameter in named] == shapes
    rng = np.random.RandomState(seed)
    for name, parameter in named:
        is_scale = name.endswith("weight") and parameter.dim() == 1  # of a norm
        parameter.data = torch.from_numpy(0.1 * rng.standard_normal(parameter.shape) + is_scale)
    network.heads = network.heads[:heads]
    return network


def released_draws(script, rule="uniform"):
    """x, z, t, h and, for ImageNet, labels."""
    about, rng = RELEASED[KINDS[script]], np.random.RandomState(7)
    size = (about["batch"], *about["image"])
    x, z = rng.uniform(-1, 1, size), rng.standard_normal(size)
    r, s = rng.uniform(0, 1, 4), rng.uniform(0, 1, 4)
    r[0], s[0] = 0.01, 0.9
    x, z, r, s = (torch.from_numpy(part) for part in (x, z, r, s))
    t = 1e-5 + (1 - 1e-5) * r
    return x, z, t, script.step_size(rule, t, 16, s), *[torch.arange(4)] * (script is cud_imagenet64)


def figures(x):
    mean, square = x.mean().item(), x.square().mean().item()
    return {"mean": mean, "mean_square": square, "first": x.flatten()[:4].tolist()}


def losses(stage, wanted, *batch):
    """Those wanted of a stage's means for a batch, and gradient norms after the backward pass."""
    loss, means = stage(*batch)
    loss.backward()
    found = {name: mean.item() for name, mean in zip(stage.columns, means)} | {"total": loss.item()}
    for name, part in stage.named_children():
        squares = sum(p.grad.square().sum() for p in part.parameters() if p.grad is not None)
        found["encoder_gradient_norm" if name == "encoder" else "gradient_norm"] = math.sqrt(squares)
    return {name: found[name] for name in wanted}


def released_loss(script, part, expected):
    """The figures of a part about CatchUp's loss."""
    found = {}
    for name, wanted in expected.items() if part.startswith("loss") else [("order 1, uniform", expected)]:
        weight = f" --wavelet-weight {int('wavelet' in wanted)}" if script is cud_imagenet64 else ""
        encoder = released_network(script, c_out=2, skip_phi=0.5) if "learned" in part else None
        stage = stage_with(script, f"--rk-order {name[6]}{weight}", encoder=encoder,
                           network=released_network(script, int(name[6])))
        x, z, t, h, *labels = released_draws(script, name[9:] or "uniform")
        found[name] = losses(stage, wanted, x, z, t, h, 0.0, *labels)
    return found if part.startswith("loss") else found[name]


def released_one_step(script, part, expected):
    z, network = released_draws(script)[1], released_network(script, 1)
    path = common.Watched(network.first_head)
    with torch.no_grad():
        common.euler(path, z, 16)
    stage = script.OneStep(script.parse_args(TINY), CPU, network)
    stage.network, stage.average = network, lambda z, t: 0.9 * network.first_head(z, t)
    stage.columns = ("total", "mse", "to_ema")
    *evaluations, last = expected
    found = {name: figures(path.x0_hats[int(name.split()[3]) - 1]) for name in evaluations}
    return found | {last: losses(stage, expected[last], z, path.x0_hats[8])}


@torch.no_grad()
def released_outputs(script, part, expected):
    """The figures of a part about velocities, samples or the progressive target."""
    x, z, t, h, *labels = released_draws(script)
    network = released_network(script)
    if part.startswith("v at"):
        return [figures(v) for v in network(between(x, z, t), t, *labels)]
    if part.startswith("progressive"):
        t, h = torch.tensor([3, 8, 12, 16], dtype=torch.float64) / 16, torch.full_like(t, 1 / 16)
        x_t, velocity = between(x, z, t), network.first_head
        points, _ = script.catch_up_points(velocity, x_t, t, h, velocity(x_t, t), 2)
        mse = script.distillation_loss(network, velocity, None, x, z, t, h, "progressive").mean().item()
        return {"teacher's mean slope over two steps": figures((x_t - points[1]) * 8), "mse": mse}
    found = {}
    for name in expected:
        network.choose(int(name[-1]) if "head" in name else 1)
        solver = common.ab2 if "AB2" in name else common.euler
        end = solver(lambda x, t: network.sampling_velocity(x, t, *labels), z, int(name.split()[0]))
        found[name] = figures(end.clamp(-1, 1) if labels else end)
    return found


@pytest.mark.parametrize("script, part", [
    (script, part) for script, kind in KINDS.items() for part, content in RELEASED[kind].items()
    if isinstance(content, dict) or part.startswith("v at")])
def test_released(script, part):
    expected = RELEASED[KINDS[script]][part]
    find = {"loss": released_loss, "wave": released_loss, "one-": released_one_step}
    got = find.get(part[:4], released_outputs)(script, part, expected)
    assert_close(got, expected, rtol=1e-9 if part.startswith("wavelet") else 1e-11, atol=0)


# ------------------------------------------------------------------------------------- samples and distances


def test_frechet_distance_of_two_gaussians(monkeypatch):
    rng = np.random.default_rng(0)
    sets = [rng.normal(size=(900, 6)) @ rng.normal(size=(6, 6)) + shift for shift in (0.0, 1.5)]
    (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(0), np.cov(x.T)) for x in sets)
    closed = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)

    def moments(x):
        return cud_mnist.moments(lambda part: part, torch.from_numpy(x))
    a, b = (cud_mnist.gaussian(*moments(x)) for x in sets)
    assert cud_mnist.frechet_distance(*a, *b) == pytest.approx(closed, rel=1e-9)
    assert cud_mnist.frechet_distance(*a, *a) == pytest.approx(0, abs=1e-9)
    monkeypatch.setattr(cud_mnist, "all_reduce", lambda tensor: tensor)
    whole, shares = moments(sets[0]), []
    monkeypatch.setattr(cud_mnist, "WORLD", 2)
    for rank in range(2):
        monkeypatch.setattr(cud_mnist, "RANK", rank)
        shares.append(moments(sets[0]))
    assert_close([sum(pair) for pair in zip(*shares)], whole)


def test_samples_and_their_straightness():
    growth = SimpleNamespace(sampling_velocity=lambda x, t: -2.0 * x)  # ten Euler steps multiply by 1.2 each
    images, nfe, bend, course = cud_mnist.sample(growth, 1000, "euler", 10, small_args("--seed", "4"), CPU)
    z = torch.cat([cud_mnist.normal(500, "cpu", 4, 1, i) for i in range(2)])
    assert nfe == 10 and (images.int() - common.to_uint8(z * 1.2 ** 10).int()).abs().max() <= 1  # rounding
    bends = (2 * 1.2 ** np.arange(10) + 1 - 1.2 ** 10) ** 2
    assert bend == pytest.approx(z.square().mean().item() * bends.mean(), rel=0.01)
    assert len(course) == 11 and torch.equal(course[0, :5], common.to_uint8(3 * z[:5]))
    assert torch.equal(course[-1], images[:8])


# ------------------------------------------------------------------------------------------------------ data


def test_uint8_round_trip_and_grid():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(common.to_uint8(common.to_float(levels)), levels)
    assert common.to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
    for channels in (1, 3):
        images = torch.randint(0, 255, (5, channels, 4, 4), dtype=torch.uint8)
        common.save_grid(images, "grid.png", columns=3, zoom=1)
        pixels = np.asarray(Image.open("grid.png")).reshape(12, 18, channels)
        assert (pixels[7:11, 1:5] == images[3].permute(1, 2, 0).numpy()).all()  # begins row two


def test_line_chart_puts_points_where_they_belong():
    chart = common.line_chart({"a": [(0, 10.0), (1, 100.0), (2, 1000.0)]}, "x", "y", x_names=[1, 4, 15])
    line = re.search(r'polyline points="([^"]+)', chart)[1].split()
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in line)
    assert x0 < x1 and y0 > y1  # up is larger
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    texts = re.findall(r'translate\(([\d.]+) ([\d.]+)\)[^>]*>([^<]+)', chart)
    assert [float(x) for x, _, words in texts if words in ("1", "4", "15")] == [x0, x1, x2]
    heights = [float(y) for _, y, words in texts if words in ("10", "100", "1,000")]
    assert heights == pytest.approx([y + 4 for y in (y0, y1, y2)])


def write_idx(folder, images, labels, name="t10k-{}-idx{}-ubyte", pack=bytes):
    """MNIST's format for arrays of ours; returns the MD5 of the unpacked files."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    sums = {}
    for what, array in (("images", images), ("labels", labels)):
        header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
        Path(folder, name.format(what, array.ndim)).write_bytes(pack(header + array.tobytes()))
        sums[f"t10k-{what}"] = hashlib.md5(header + array.tobytes()).hexdigest()
    return sums


def test_every_form_of_mnist_gives_the_same_arrays_or_one_line(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (7, 28, 28), np.uint8)
    labels = np.arange(7, dtype=np.uint8)
    sums = write_idx("packed", images, labels, "t10k-{}-idx{}-ubyte.gz", gzip.compress)
    write_idx("unpacked", images, labels)
    write_idx("dotted", images, labels, "t10k-{}.idx{}-ubyte")
    write_idx("torchvision/MNIST/raw", images, labels)
    for i, image in enumerate(images):
        Path(f"pictures/test/{i}").mkdir(parents=True)
        Image.fromarray(image).convert("RGB").save(f"pictures/test/{i}/x.bmp")
    mirror = Path("packed").resolve().as_uri() + "/"
    monkeypatch.setattr(common, "MNIST_MIRRORS", ["file:///nowhere/", mirror])
    with pytest.raises(common.InputError, match="data/mnist/t10k-images.*MD5 is not that of MNIST's"):
        common.load_mnist(None, "test", (1, 28, 28))
    shutil.rmtree("data")
    for official in (False, True):
        for path in ("packed", "unpacked", "dotted", "torchvision", "pictures", *[None] * 2 * official):
            data = common.load_mnist(path, "test", (1, 28, 28))
            assert data.images.dtype == torch.uint8 and np.array_equal(data.images, images[:, None])
            assert data.labels.tolist() == list(range(7))
            name = "images of MNIST" if official else f"images of {path}, whose idx files are not MNIST's"
            assert data.about == f"7 test {'pictures in pictures' if path == 'pictures' else name}"
        monkeypatch.setattr(common, "MNIST_MD5", sums)
    write_idx("large", np.zeros((2, 32, 32), np.uint8), labels[:2])
    refused(lambda: common.load_mnist("large", "test", (1, 28, 28)), "images [2, 1, 32, 32] and 2 labels")
    write_idx("uneven", images, labels[:6])
    refused(lambda: common.load_mnist("uneven", "test", (1, 28, 28)), "images [7, 1, 28, 28] and 6 labels")
    Path("dotted/t10k-labels.idx1-ubyte").unlink()
    refused(lambda: common.load_mnist("dotted", "test", (1, 28, 28)), "t10k-labels-idx1-ubyte.gz does not")
    path = Path("packed/t10k-images-idx3-ubyte.gz")
    path.write_bytes(path.read_bytes()[:-9])
    refused(lambda: common.load_mnist("packed", "test", (1, 28, 28)), str(path))


@pytest.fixture
def cifar(monkeypatch):
    """Five batches of four random images and a test batch of three, in every form that users have them."""
    class Python2(pickle._Pickler):  # wrote strings, which Python 3 reads as bytes
        dispatch = {**pickle._Pickler.dispatch, bytes: lambda self, value: self.write(
            pickle.BINSTRING + struct.pack("<i", len(value)) + value)}

    rng, made = np.random.default_rng(0), {}
    for folder in ("cifar-10-batches-py", "cifar-10-batches-bin", "pictures/train", "pictures/test"):
        Path(folder).mkdir(parents=True)
    for name, n in [*((f"data_batch_{i}", 4) for i in range(1, 6)), ("test_batch", 3)]:
        images, labels = rng.integers(0, 256, (n, 3, 32, 32), np.uint8), rng.integers(0, 3, n)
        made[name] = images, labels
        rows = np.concatenate([labels[:, None].astype(np.uint8), images.reshape(n, -1)], 1)
        Path(f"cifar-10-batches-bin/{name}.bin").write_bytes(rows.tobytes())
        file = io.BytesIO()
        Python2(file, protocol=2).dump({b"labels": labels.tolist(), b"data": images.reshape(n, -1)})
        old = file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        Path(f"cifar-10-batches-py/{name}").write_bytes(old)
        monkeypatch.setitem(common.CIFAR10_PICKLES_MD5, name, hashlib.md5(old).hexdigest())
        for i, (image, label) in enumerate(zip(images, labels)):
            folder = Path("pictures/test" if name == "test_batch" else "pictures/train") / f"class{label}"
            folder.mkdir(exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{name}_{i}.png")
    Path("pictures/my_batch_1.txt").write_bytes(b"a name like theirs")
    shutil.make_archive("cifar-10-binary", "gztar", ".", "cifar-10-batches-bin")
    shutil.make_archive("cifar-10-python", "gztar", ".", "cifar-10-batches-py")
    shutil.make_archive("pictures", "zip", ".", "pictures")
    content = Path("cifar-10-binary.tar.gz").read_bytes()
    monkeypatch.setattr(common, "CIFAR10_MD5", hashlib.md5(content).hexdigest())
    monkeypatch.setattr(common, "CIFAR10_MIRRORS", ["file:///nowhere/", Path().resolve().as_uri() + "/"])
    return made


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("path", [
    None, ".", "cifar-10-binary.tar.gz", "cifar-10-python.tar.gz", "cifar-10-batches-bin",
    "cifar-10-batches-py", "pictures.zip", "pictures"])
def test_every_form_of_cifar10_gives_the_same_arrays(path, split, cifar):
    names = sorted(name for name in cifar if name.startswith("data" if split == "train" else "test"))
    images, labels = (np.concatenate([cifar[name][part] for name in names]) for part in (0, 1))
    if str(path).startswith("pictures"):  # in the order of class and name
        order = sorted(range(len(labels)), key=lambda i: (labels[i], i))
        images, labels = images[order], labels[order]
    data = common.load_cifar10(path, split, (3, 32, 32))
    assert data.images.dtype == torch.uint8 and np.array_equal(data.images, images)
    assert data.labels.tolist() == labels.tolist()


def test_bad_cifar10_is_named(cifar):
    def bad(path, *said, shape=(3, 32, 32)):
        refused(lambda: common.load_cifar10(path, "train", shape), *said)

    bad("cifar-10-batches-bin", "has images [3, 32, 32], not [3, 64, 64]", shape=(3, 64, 64))
    for path in (Path("cifar-10-binary.tar.gz"), Path("cifar-10-python.tar.gz")):
        whole = path.read_bytes()
        flipped = bytearray(gzip.decompress(whole))
        flipped[flipped.index(cifar["data_batch_3"][0].tobytes()[:99])] ^= 1  # in a pixel
        for content in (gzip.compress(bytes(flipped))[:-8] + whole[-8:], whole[:len(whole) // 2]):
            path.write_bytes(content)  # with the checksum of what it was, and cut
            bad(path, str(path))
    Path("cifar-10-batches-py/data_batch_3").write_bytes(pickle.dumps({b"data": Payload(), b"labels": []}))
    bad("cifar-10-batches-py", "data_batch_3 in cifar-10-batches-py", "not the official file")
    batch = Path("cifar-10-batches-bin/data_batch_5.bin")
    for content in (b"\x0a" + batch.read_bytes()[1:], batch.read_bytes()[:-1], None):  # label 10; cut; none
        batch.write_bytes(content) if content else batch.unlink()
        bad(batch.parent, "data_batch_5 in cifar-10-batches-bin")
    bad(batch.parent, "it has no 'data_batch_5'")
    shutil.make_archive("mine", "tar", ".", "pictures")
    bad("mine.tar", "mine.tar", "a .zip that is whole")
    Path("empty").mkdir()
    bad("empty", "empty holds no train pictures")


@pytest.mark.parametrize("script", [cud_cifar10, cud_imagenet64])
def test_flips_mirror_every_other_image_and_change_nothing_else(script):
    labels, batches = torch.arange(40) % 10, []
    images = torch.randint(0, 256, (40, *script.IMAGE), dtype=torch.uint8)
    for flag in ("--flip", "--no-flip"):
        args = script.parse_args([*TINY, flag, *shlex.split("--batch-size 400 --attention 32")])
        batches.append(script.CatchUp(args, CPU, common.make_data(images, labels, "noise")).draw(3))
    flipped, plain = batches
    which = (plain[0][:, None] == common.to_float(images)).flatten(2).all(2)  # [400, 40]
    assert (which.sum(1) == 1).all()
    if len(plain) > 5:  # cud_imagenet64's labels
        assert torch.equal(labels[which.int().argmax(1)], plain[5]) and torch.equal(flipped[5], plain[5])
    mirrored = (flipped[0] == plain[0].flip(3)).flatten(1).all(1)
    assert torch.equal(flipped[0][~mirrored], plain[0][~mirrored]) and 150 < mirrored.sum() < 250
    assert all(torch.equal(a, b) for a, b in zip(flipped[1:4], plain[1:4]))


def test_download_tries_the_mirrors_and_leaves_no_half_file(tmp_path, monkeypatch):
    for name in ("good", "bad"):
        (tmp_path / name).write_text(name)
    missing, bad, good = ((tmp_path / name).as_uri() for name in ("missing", "bad", "good"))
    md5 = hashlib.md5(b"good").hexdigest()
    common.download([missing, bad, good], Path("data/file"), md5)
    assert Path("data/file").read_bytes() == b"good" and os.listdir("data") == ["file"]
    with pytest.raises(common.InputError, match="its MD5 is wrong.*put it there yourself"):
        common.download([bad], Path("data/other"), md5)
    half = common.urllib.response.addinfourl(io.BytesIO(b"go"), {"Content-Length": "4"}, "https://a.b/c")
    monkeypatch.setattr(common.urllib.request, "urlopen", lambda *_, **__: half)
    with pytest.raises(common.InputError, match="data/other is missing.*2 of 4 bytes came"):
        common.download(["https://a.b/c"], Path("data/other"))
    assert os.listdir("data") == ["file"]


@pytest.fixture
def imagenet():
    """Twelve random 64x64 images of four classes in each form that users have them."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (12, 3, 64, 64), np.uint8), np.arange(12) % 4
    Path("npz").mkdir()
    order = np.argsort(labels, kind="stable")  # pictures come by class and name
    for i, (image, label) in enumerate(zip(images, labels)):
        path = Path(f"pictures/train/n0{label}/{i:02}.PNG")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(path)
    shutil.make_archive("pictures", "zip", ".", "pictures")
    Image.new("RGB", (64, 64)).save("pictures/odd.txt", "PNG")  # no picture by its name
    np.savez("npz/train_data_batch_final.npz", x=1)  # no batch by its name
    for number, rows in ((2, order[:5]), (10, order[5:])):  # 10 comes after 2
        data, numbers = images[rows].reshape(-1, 12288), (labels[rows] + 1).tolist()
        np.savez(f"npz/train_data_batch_{number}.npz", data=data, labels=numbers)
    return images[order], labels[order]


def imagenet_data(data, cache="cache"):
    return common.load_imagenet(data, cache, (3, 64, 64))


@pytest.mark.parametrize("form", ["npz", "parts", "pictures", "pictures.zip"])
def test_every_form_of_imagenet_gives_the_same_arrays(form, imagenet, monkeypatch):
    if form == "parts":  # as unzipping leaves them
        for part, number in (("Imagenet64_train_part1_npz", 2), ("Imagenet64_train_part2_npz", 10)):
            Path("parts", part).mkdir(parents=True)
            shutil.copy(f"npz/train_data_batch_{number}.npz", f"parts/{part}")
        shutil.copy("npz/train_data_batch_2.npz", "parts")  # once more, which does not count
    for given in (form, form, None):  # read, then found, also without --data
        data = imagenet_data(given)
        assert np.array_equal(data.images, imagenet[0]) and data.labels.tolist() == imagenet[1].tolist()
        assert data.sha256 == common.make_data(*map(torch.from_numpy, imagenet), "").sha256
        said, classes = f"train pictures in {form}", ["n00", "n01", "n02", "n03"]
        said += "/pictures" if form == "pictures.zip" else ""  # which holds that folder
        if form in ("npz", "parts"):
            said = "images of 2 of ImageNet's 10 npz files, downsampled by their authors"
            classes = [f"label {number}" for number in range(1, 1001)]
        assert data.about == f"12 {said}" and data.classes == classes
        assert sorted(os.listdir("cache")) == ["about.json", "images.bin", "labels.npy"]
        data.images.zero_()  # changes the copy in memory, not the cache
    refused(lambda: imagenet_data("elsewhere"), "--cache cache holds", f"--data {form}; give that")
    refused(lambda: common.load_imagenet(None, "cache", (3, 8, 8)), "its images are [3, 64, 64], not [3, 8")
    read = common.read_pictures

    def read_twice(*given):
        Path("other/images.bin").unlink()
        Path("other/images.bin").touch()
        return read(*given)

    if form == "pictures":
        monkeypatch.setattr(common, "read_pictures", read_twice)
        with pytest.raises(common.InputError, match="another process reads pictures into --cache other"):
            imagenet_data(form, "other")
    if form == "npz":
        bad = Path("npz/train_data_batch_10.npz")
        bad.write_bytes(bad.read_bytes()[:-50])
        with pytest.raises(common.InputError, match="train_data_batch_10.npz cannot be used.*fetch it again"):
            imagenet_data(form, "other")
        for folder in ("python", "python/Imagenet64_train_part1"):
            Path(folder).mkdir()
            Path(folder, "train_data_batch_1").write_bytes(b"a pickle")
            refused(lambda: imagenet_data("python", "third"), "the edition for Python", "part1_npz.zip")
            Path(folder, "train_data_batch_1").unlink()


PLACES = {  # files: what --split train and test find, {class: names}, and how many files train leaves out
    "hidden": ("a/1.png b/2.png .ipynb_checkpoints/3.png a/.4.png __MACOSX/a/5.png b/@eaDir/6.png .git/7",
               {"a": "a/1.png", "b": "b/2.png"}, None, 0),
    "kaggle": ("train/1.png train/2.png test/3.png",
               {"all": "train/1.png train/2.png"}, {"all": "test/3.png"}, 0),
    "kaggle, unzipped": ("train/train/a/1.png train/train/b/2.png test/test/3.png",
                         {"a": "train/train/a/1.png", "b": "train/train/b/2.png"},
                         {"all": "test/test/3.png"}, 0),
    "another format": ("some/1.png others/2.gif", {"all": "some/1.png"}, None, 0),
    "splits": ("x/Training/a/1.jpg x/Training/b/2.jpg x/VAL/a/3.jpg x/Testing/b/4.jpg x/test/c/5.jpg y.txt",
               {"a": "x/Training/a/1.jpg", "b": "x/Training/b/2.jpg"},
               {"b": "x/Testing/b/4.jpg", "c": "x/test/c/5.jpg"}, 0),
    "validation": ("train/x/a/1.png train/x/b/2.png valid/a/3.png train.csv",
                   {"a": "train/x/a/1.png", "b": "train/x/b/2.png"}, {"all": "valid/a/3.png"}, 1),
    "one split": ("x/train/a/1.png x/train/b/2.png", {"a": "x/train/a/1.png", "b": "x/train/b/2.png"}, {}, 0),
    "deep": ("a/x/1.png a/y/z/2.png b/3.webp", {"a": "a/x/1.png a/y/z/2.png", "b": "b/3.webp"}, None, 0),
    "a class called train": ("train/1.png tram/2.png",
                             {"train": "train/1.png", "tram": "tram/2.png"}, None, 0),
    "splits and more": ("train/a/1.png test/a/2.png docs/3.png",
                        {"train": "train/a/1.png", "test": "test/a/2.png", "docs": "docs/3.png"}, None, 0),
    "beside": ("x/a/1.png x/b/2.bmp x/3.png x/a/4.tif", {"a": "x/a/1.png", "b": "x/b/2.bmp"}, None, 2),
    "below": ("a/train/1.png a/test/2.PNG b/Test/3.JPEG",
              {"a": "a/train/1.png a/test/2.PNG", "b": "b/Test/3.JPEG"}, None, 0)}


@pytest.mark.parametrize("form", ["folder", "zip", "zip made on Windows", "zip made by tar"])
@pytest.mark.parametrize("place", PLACES)
def test_classes_and_splits_are_found_by_the_rule(place, form):
    files, *expected, left_out = PLACES[place]
    path = ".hidden/x.zip" if "zip" in form else ".hidden/x"  # the folder itself may be anywhere
    os.mkdir(".hidden")
    for name in files.split():
        if "zip" in form:
            with zipfile.ZipFile(path, "a") as archive:
                name = f"./{name}" if "tar" in form else name
                archive.writestr(name.replace("/", "\\") if "Windows" in form else name, b"")
        else:
            Path(path, name).parent.mkdir(parents=True, exist_ok=True)
            Path(path, name).write_bytes(b"")
    for split, classes in zip(("train", "test"), expected):
        if classes == {}:
            refused(lambda: common.list_pictures(path, "test"), path, "holds no test pictures")
            continue
        found, read, skipped, about = common.list_pictures(path, split)
        wanted = {tuple(name.split("/")): label for label, names in (classes or expected[0]).items()
                  for name in names.split()}
        assert found == wanted and list(found) == sorted(wanted) and read(next(iter(found))) == b""
        assert len(skipped) == left_out or split == "test"
        shared = [folder for folder in ("x", "some") if files.startswith(f"{folder}/")]
        place = "/".join([Path(path).name, *shared])
        if expected[1] is None and (split == "test" or files.startswith("train/")):
            place += " (its folders are not splits alone, so all pictures are taken)"
        if "a/train/" in files:
            place += " (folders of splits below the classes are not used)"
        assert about == f"{f'{split} ' * (expected[1] is not None)}pictures in {place}"


def test_a_link_is_followed_and_a_circle_or_a_hidden_folder_is_not(monkeypatch):
    def scan(folder, scandir=os.scandir):
        assert not str(folder).endswith(".Trashes"), "which others may not read"
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", scan)
    os.makedirs("data/.Trashes")
    for name in ("data/a/1.png", "elsewhere/2.png"):
        Path(name).parent.mkdir(parents=True)
        Path(name).write_bytes(b"")
    os.symlink("../elsewhere", "data/b")
    os.symlink("../../data", "data/a/round")
    os.symlink("../data", "elsewhere/across")
    assert common.list_pictures("data", "train")[0] == {("a", "1.png"): "a", ("b", "2.png"): "b"}


def test_the_labels_of_dataset_json_are_read():
    def labels_of(content):
        Path("edm/dataset.json").write_text(json.dumps({"labels": content}))
        found, _, left_out, _ = common.list_pictures("edm", "train")
        return list(found.values()), left_out

    grey_pictures("edm/00000", 40)
    labels = [[f"00000/class{i % 2}/{i}.png", [7, 2, 0][i % 3]] for i in range(6)]
    assert labels_of(labels[1:]) == (
        [0, 2, 2, 7, 0], ["00000/class0/0.png (dataset.json has no label for it)"])
    assert labels_of(None) == ([0] * 6, [])
    wrong = [[["00000/class0/0.png", label]] for label in (0.5, [0, 1], -1, 10 ** 6)]
    for odd in (*wrong, [["00000\\class0\\0.png", 1]], 7):  # a name that is no picture's
        with pytest.raises(common.InputError, match="dataset.json in edm .* without it the folders are"):
            labels_of(odd)
    assert labels_of(labels) == ([7, 0, 2, 2, 7, 0], [])
    for data in (common.load_mnist("edm", "train", (1, 28, 28)),
                 common.load_imagenet("edm", "cache", (1, 28, 28))):
        assert data.labels.tolist() == [7, 0, 2, 2, 7, 0]
        assert data.found() == "6 pictures in edm/00000; 8 classes: 0, 1, 2, ..."


def test_a_photograph_stands_as_the_camera_was_held():
    pixels, exif = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8), Image.Exif()
    exif[0x112] = 6  # turn it clockwise
    Image.fromarray(pixels).save("turned.png", exif=exif)
    for kind in ("PNG", "WEBP"):  # damaged tags
        Image.fromarray(pixels).save("damaged", kind, exif=b"Exif\0\0garbage", lossless=True)
        assert (np.asarray(common.decode(Path("damaged").read_bytes(), (3, 40, 60))) == pixels).all()
    odd = struct.pack("<HHL4s", 0x100, 1, 1, b"\5")  # a width of one byte, which Pillow cannot write
    odd = b"II*\0" + struct.pack("<LH", 8, 2) + odd + struct.pack("<HHLHHL", 0x112, 3, 1, 6, 0, 0)
    Image.fromarray(pixels).save("odd.png", exif=b"Exif\0\0" + odd)
    for name in ("turned.png", "odd.png"):
        picture = common.decode(Path(name).read_bytes(), (3, 60, 40))
        assert (np.asarray(picture) == np.rot90(pixels, -1)).all()


def test_the_line_about_the_data_is_one_line_of_letters():
    images, labels, classes = torch.zeros(1, 1, 2, 2), torch.zeros(1), ["caf\udce9\r"]
    data = common.make_data(images, labels, "pictures", classes, ["Icon\n (odd)"])
    assert data.found() == "1 pictures; 1 classes: 0 caf??; 1 files left out: Icon? (odd)"
    Path("data/caf\udce9").mkdir(parents=True)
    Path("data/caf\udce9/1.png").write_bytes(b"")
    assert common.list_pictures("data", "train")[3] == "pictures in data/caf?"  # an evaluation prints it, too
    write_idx("caf\udce9", np.zeros((1, 28, 28), np.uint8), np.zeros(1, np.uint8))
    about = common.load_mnist("caf\udce9", "test", (1, 28, 28)).about
    assert about == "1 test images of caf?, whose idx files are not MNIST's"
    Path("caf\udce9/test_batch.bin").write_bytes(bytes(3073))
    assert common.load_cifar10("caf\udce9", "test", (3, 32, 32)).about == "1 test images of CIFAR-10, in caf?"


def test_pictures_are_halved_and_cropped():
    pixels = np.random.default_rng(0).integers(0, 256, (256, 320, 3), np.uint8)
    halved = pixels.astype(float)
    for _ in range(2):  # rows and columns one after the other, each rounded half up to 8 bits
        halved = np.floor((halved[:, ::2] + halved[:, 1::2]) / 2 + 0.5)
        halved = np.floor((halved[::2] + halved[1::2]) / 2 + 0.5)
    expected = halved[:, 8:72].transpose(2, 0, 1)  # 64 x 80: the middle
    assert (common.resize_and_crop(Image.fromarray(pixels), (3, 64, 64)) == expected).all()
    wide = common.resize_and_crop(Image.fromarray(pixels), (3, 64, 80))  # another shape: all of it
    assert (wide == halved.transpose(2, 0, 1)).all()


@pytest.mark.parametrize("script", SCRIPTS)
def test_photographs_of_any_size_are_resized(script):
    """The large ones are plain in each half, so that a right crop is known: the middle, half of each."""
    os.makedirs("photos/cat")
    os.makedirs("photos/dog")
    photo = np.zeros((256, 500, 3), np.uint8)
    photo[:, 250:] = 200
    Image.fromarray(photo).save("photos/cat/wide.png")
    Image.fromarray(photo.transpose(1, 0, 2)).save("photos/dog/high.bmp")
    opaque = Image.new("RGBA", (64, 64), (9, 9, 9, 255))
    opaque.save("photos/dog/opaque.png")
    opaque.save("photos/dog/opaque_too.png")  # so this size is the most common
    data = script.load_data(script.parse_args(["--data", "photos"]))
    channels, height, width = script.IMAGE
    wide, high, *plain = data.images.float()
    half = torch.zeros(height, width)
    half[:, width // 2:] = 200
    assert data.labels.tolist() == [0, 1, 1, 1] and (torch.stack(plain) == 9).all()
    for got, expected in ((wide, half), (high, half.T)):
        error = (got - expected).abs()
        assert error.max() <= 200 and error.mean() < 4 and got.shape == (channels, height, width)
    found = f"4 pictures in photos, resized (box, bicubic) from {'500x256' if height == 64 else '64x64'}"
    assert data.found() == f"{found} and others; 2 classes: 0 cat, 1 dog"


RANDOM_PICTURE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (90, 90, 3), np.uint8))


def picture_bytes(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_bad_pictures_are_named_counted_and_left_out(imagenet, monkeypatch):
    """They are cut short, too large or small, transparent, deep, or of a format that is not opened."""
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n(run) (w) file closefile\n"
    deep = Image.fromarray(np.full((64, 64), 40_000, np.uint16))
    bad = {"bomb.png": (picture_bytes(Image.new("L", (600, 400))), "Image size (240000 pixels)"),
           "cut.jpg": (picture_bytes(RANDOM_PICTURE, "JPEG")[:2_000], "image file is truncated"),
           "deep.png": (picture_bytes(deep), "more than 8 bits"),
           "empty.webp": (b"", "not PNG, JPEG, BMP or WEBP"),
           "gif.png": (picture_bytes(RANDOM_PICTURE, "GIF"), "not PNG, JPEG, BMP or WEBP"),
           "ink.png": (picture_bytes(Image.new("LA", (64, 64), (0, 0))), "transparent"),
           "palette.png": (picture_bytes(Image.new("P", (64, 64)), transparency=0), "transparent"),
           "program.bmp": (program, "not PNG, JPEG, BMP or WEBP"),
           "small.png": (picture_bytes(Image.new("L", (64, 20))), "it is 64x20, smaller than 64x64"),
           "tiff.jpg": (picture_bytes(RANDOM_PICTURE, "TIFF"), "not PNG, JPEG, BMP or WEBP")}
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    os.remove("pictures/odd.txt")
    os.mkdir("pictures/train/m")  # a class without a picture, which shifts no number
    for name, (content, _) in bad.items():
        Path("pictures/train/m", name).write_bytes(content)
    again = common.load_cifar10("pictures", "train", (3, 64, 64))
    for data in (imagenet_data("pictures"), imagenet_data(None), again):
        assert np.array_equal(data.images, imagenet[0]) and data.labels.tolist() == imagenet[1].tolist()
        assert data.classes == ["n00", "n01", "n02", "n03"]
        assert "; 10 files left out: train/m/bomb.png (Image" in data.found() and "\n" not in data.found()
        for line, (name, (_, words)) in zip(data.left_out, bad.items(), strict=True):
            assert line.startswith(f"train/m/{name} (") and words in line
    with monkeypatch.context() as patch, pytest.raises(MemoryError):  # it leaves no good picture out
        patch.setattr(common, "decode", lambda *_: np.empty(10 ** 17))
        common.load_cifar10("pictures", "train", (3, 64, 64))
    shutil.copytree("pictures/train/m", "worse/m")
    refused(lambda: common.load_mnist("worse", "train", (1, 28, 28)), "none of the pictures in worse", "bomb")


@pytest.mark.parametrize("kind", ["encrypted", "damaged", "short"])
def test_members_of_a_zip_that_cannot_be_had(kind):
    with zipfile.ZipFile("a.zip", "w") as archive:
        archive.writestr("a/good.png", picture_bytes(RANDOM_PICTURE))
        archive.writestr("b/odd.png", picture_bytes(RANDOM_PICTURE))
    content = bytearray(Path("a.zip").read_bytes())
    central = content.rindex(b"PK\x01\x02")
    if kind == "encrypted":
        content[central + 8] |= 1
    elif kind == "damaged":
        content[content.rindex(b"PK\x03\x04") + 60] ^= 0xff
    else:  # the file ends before the member does; Python's error has no words
        content[central + 20:central + 28] = struct.pack("<II", 90_000, 90_000)
    Path("a.zip").write_bytes(content)
    data = common.load_pictures("a.zip", "train", (3, 90, 90))
    assert data.classes == ["a"] and data.left_out[0].startswith("b/odd.png (")


@pytest.mark.parametrize("stop", range(1, 5))
def test_a_preparation_killed_and_started_again_gives_the_same_cache(stop, imagenet, monkeypatch):
    def counted(function):
        def call(*given, **options):
            calls.append(function.__name__)
            if len(calls) == stop:
                raise KeyboardInterrupt
            return function(*given, **options)
        return call

    calls = []
    with monkeypatch.context() as patch:
        for module, name in ((np, "load"), (np, "save"), (os, "replace")):
            patch.setattr(module, name, counted(getattr(module, name)))
        with pytest.raises(KeyboardInterrupt):
            imagenet_data("npz", "killed")
    assert calls == ["load", "load", "save", "replace"][:stop]
    assert not Path("killed/about.json").exists()  # nothing passes for whole
    for cache in ("killed", "whole"):
        assert cud_imagenet64.main(["--data", "npz", "--prepare", "--cache", cache]) == 0
    for name in ("images.bin", "labels.npy", "about.json"):
        assert Path("killed", name).read_bytes() == Path("whole", name).read_bytes()
    assert Path("whole/images.bin").read_bytes() == imagenet[0].tobytes() and not Path("runs").exists()


@pytest.mark.parametrize("data, labels", [
    (np.zeros((4, 12288), np.float32), [1] * 4), (np.zeros((4, 12288), np.int64), [1] * 4),
    (np.zeros((4, 64, 64, 3), np.uint8), [1] * 4), (np.zeros((4, 3072), np.uint8), [1] * 4),
    (np.zeros((4, 12288), np.uint8), [1] * 3), (np.zeros((4, 12288), np.uint8), [0] * 4),
    (np.zeros((4, 12288), np.uint8), [1001] * 4), (np.zeros((4, 12288), np.uint8), [[1]] * 4),
    (np.array([Payload()], object), [1])])
def test_npz_data_of_another_kind_is_not_written(data, labels):
    Path("npz").mkdir()
    np.savez("npz/train_data_batch_1.npz", data=np.zeros((2, 12288), np.uint8), labels=[1, 1000])
    np.savez("npz/train_data_batch_2.npz", data=data, labels=labels)
    with pytest.raises(common.InputError, match="npz/train_data_batch_2.npz cannot be .* fetch it again"):
        imagenet_data("npz")
    np.savez("npz/train_data_batch_2.npz", data=np.ones((3, 12288), np.uint8), labels=np.int16([1, 2, 3]))
    assert imagenet_data("npz").labels.tolist() == [0, 999, 0, 1, 2]


@pytest.mark.parametrize("name, content", [
    ("images.bin", b""), ("images.bin", "cut"), ("images.bin", None), ("labels.npy", np.zeros(11, np.int64)),
    ("labels.npy", np.array([None] * 12, object)), ("labels.npy", "cut"), ("labels.npy", None),
    ("about.json", b""), ("about.json", b"[]"), ("about.json", b'{"data": 1}'), ("about.json", b"\xff\xfe")])
def test_a_cache_that_is_damaged_is_not_trained_on(name, content, imagenet):
    imagenet_data("pictures")
    path = Path("cache", name)
    if content is None:
        path.unlink()
    elif isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        path.write_bytes(path.read_bytes()[:-1] if content == "cut" else content)
    refused(lambda: imagenet_data(None), "--cache cache", "remove it")


@pytest.mark.skipif(not REAL.exists(), reason="no real data beside the project")
def test_real_data():
    data = common.load_mnist(REAL / "mnist", "test", (1, 28, 28))
    assert data.images.shape == (10_000, 1, 28, 28) and data.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert data.images.float().mean().item() == pytest.approx(33.79, abs=0.01)
    assert data.about == "10,000 test images of MNIST"
    data = common.load_cifar10(REAL / "cifar10-train-jpeg.zip", "train", (3, 32, 32))
    assert data.images.shape == (50_000, 3, 32, 32) and data.labels.bincount().tolist() == [5_000] * 10
    assert data.images.float().mean((0, 2, 3)).tolist() == pytest.approx([125.3, 123.0, 113.9], abs=0.5)
    data = imagenet_data(str(REAL / "imagenet-sample"))
    assert data.images.shape == (41, 3, 64, 64) and 100 < data.images.float().mean() < 140
    assert len(data.classes) == int(data.labels.max()) + 1 and data.classes[0] == "n01440764"


def test_missing_imagenet_says_what_to_fetch(monkeypatch, capsys):
    assert cud_imagenet64.main([]) == 2
    err = capsys.readouterr().err
    assert all(part in err for part in ("image-net.org", "Imagenet64_train_part1_npz.zip",
                                        "Imagenet64_train_part2_npz.zip", "train/n01440764/*.JPEG"))
    monkeypatch.setattr(cud_imagenet64, "RANK", 3)  # on a node that has no cache
    args = cud_imagenet64.parse_args([])
    refused(lambda: cud_imagenet64.load_data(args), "is not on this node", "--prepare")


@contextmanager
def full_disk(size):
    """No file can grow beyond so many bytes."""
    resource = pytest.importorskip("resource")  # not on Windows
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def interrupted(file):
    """A write that a user interrupts, while another process reads."""
    file.write(b"half of it")
    file.flush()
    assert Path("run/file").read_bytes() == b"old"
    raise KeyboardInterrupt


@pytest.mark.parametrize("write, error", [
    (interrupted, KeyboardInterrupt), (lambda file: np.savez(file, a=np.eye(200)), common.InputError),
    (lambda file: torch.save({"a": torch.randn(40_000), "b": torch.ones(9)}, file), common.InputError),
    (lambda file: RANDOM_PICTURE.save(file, "PNG"), common.InputError)])
def test_an_interrupt_or_a_full_disk_costs_neither_the_old_file_nor_the_message(write, error):
    common.save(lambda file: file.write(b"old"), "run/file")
    with full_disk(3_000), pytest.raises(error) as raised:
        common.save(write, "run/file")
    assert write is interrupted or "run/file cannot be written (" in str(raised.value)
    assert os.listdir("run") == ["file"] and Path("run/file").read_bytes() == b"old"
    refused(lambda: common.save(write, "run/file/x"), "run/file/x cannot be written")  # a file, no folder


def test_a_flipped_bit_in_a_saved_file_is_found():
    content = {"module": {"w": torch.randn(2_000), "b": torch.arange(300)}, "iteration": 7}
    common.save_pt(content, "x.pt")
    good, found, rng = Path("x.pt").read_bytes(), 0, np.random.default_rng(0)
    for offset in rng.integers(0, len(good), 40):
        damaged = bytearray(good)
        damaged[offset] ^= 1 << rng.integers(8)
        Path("x.pt").write_bytes(damaged)
        try:
            assert_close(common.load_pt("x.pt", ["module"], "give another"), content, rtol=0, atol=0)
        except common.InputError as error:  # a bit between the members changes nothing
            found += "x.pt cannot be used" in str(error) and "give another" in str(error)
    assert found >= 35
    Path("x.pt").write_bytes(good)
    refused(lambda: common.load_pt("x.pt", ["rows", "module", "average"], "give another"),
            "x.pt", "it has no rows, average", "give another")
    torch.save({"module": Payload()}, "x.pt")
    refused(lambda: common.load_pt("x.pt", ["module"], "give another"), "x.pt", "give another")


@pytest.mark.parametrize("load", [
    lambda path: common.load_mnist(path, "train", (1, 28, 28)),
    lambda path: common.load_cifar10(path, "train", (3, 32, 32)),
    lambda path: common.load_imagenet(path, "cache", (3, 64, 64)), common.load_moments,
    lambda path: common.load_pt(path, ["model"], "give another"), cud_mnist.load_model])
@pytest.mark.parametrize("kind", ["garbage", "empty", "missing", "folder"])
def test_what_is_no_such_file_is_refused(load, kind):
    if kind == "folder":
        Path("thing.zip").mkdir()
    elif kind != "missing":
        Path("thing.zip").write_bytes(b"" if kind == "empty" else bytes(range(256)) * 20)
    refused(lambda: load("thing.zip"), "thing.zip")


# ------------------------------------------------------------------------------------------------ whole runs

JUDGED = shlex.split("--features classifier --fid-samples 230 --steps 1")
MNIST = Path("runs/mnist")


def iteration(path):
    return torch.load(path)["iteration"]


def spoil(path, change):
    """Let change(content) alter what a file of torch.save holds."""
    saved = torch.load(path)
    change(saved)
    torch.save(saved, path)


def before_draw(monkeypatch, act, stage=cud_mnist.CatchUp):
    """Call act(i) before iteration i of a training."""
    draw = stage.draw
    monkeypatch.setattr(stage, "draw", lambda self, i: (act(i), draw(self, i))[1])


def left_alone(capsys, said, *flags):
    """A run with these flags is refused in one line that says this, and changes no file."""
    before = files()
    status, err = run(*flags, capsys=capsys)
    assert status == 2 and len(err) == 1 and said in err[0] and before == files(), err


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """--quick, shortened; returns its folder and the words that it printed."""
    folder, words = tmp_path_factory.mktemp("quick"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "stdout", words)
        more = shlex.split("--steps 1 3 --fid-samples 300 --checkpoint-every 20")
        assert cud_mnist.main([*QUICK, *more]) == 0
    return folder, words.getvalue()


def test_quick_leaves_a_whole_run_and_says_little(quick, monkeypatch):
    monkeypatch.chdir(quick[0])
    folder = Path("runs/mnist-quick")
    names = (".lock config.json metrics.csv metrics.svg checkpoint.pt model.pt results.jsonl trajectory.png "
             "one_step_checkpoint.pt one_step.pt one_step_metrics.csv one_step_metrics.svg "
             "one_step_samples_000012.png samples_000020.png samples_000030.png samples_model_euler_1.png "
             "samples_model_euler_3.png samples_one-step_euler_1.png")
    assert set(names.split()) == set(os.listdir(folder))  # nothing half written is left
    first = results(folder)
    judge = f"classifier-{common.sha256(next(Path('data/cache').glob('classifier-*')))[:8]}"
    for row, (weights, steps, file) in zip(first, (
            ("model", 1, "model.pt"), ("model", 3, "model.pt"), ("one-step", 1, "one_step.pt")), strict=True):
        assert row.items() >= dict(figure="FD (classifier)", n=300, images_seen=960, steps=steps, nfe=steps,
                                   head=1, seed=0, features=judge, weights=f"{weights} EMA",
                                   model_sha256=common.sha256(folder / file)).items()
        assert 0 < row["floor"] < row["value"] < row["noise"] and f"{row['value']:.3f}" in quick[1]
        assert (row["straightness"] is None) == (steps == 1)  # one step is straight
    lines = quick[1].splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 160, quick[1]
    # The run is finished: other flags evaluate it again, train nothing and find the same figures.
    before = {file: file.read_bytes() for file in folder.iterdir() if file.suffix in (".pt", ".csv", ".json")}
    for more in ("--steps 3 4 --solver heun --fid-samples 300 --save-samples 12 --checkpoint-every 7",
                 "--solver dopri5 --no-one-step --fid-samples 300 --tolerance 1e-2"):
        assert cud_mnist.main([*QUICK, *shlex.split(more)]) == 0
    assert all(file.read_bytes() == content for file, content in before.items())
    with np.load(folder / "samples.npz") as file:
        assert file["arr_0"].shape == (12, 28, 28, 1) and file["arr_0"].dtype == np.uint8
    again = results(folder)
    assert len(again) == 8 and again[:3] == first and again[5:7] == [first[0], first[2]]
    assert [(row["solver"], row["nfe"]) for row in again[3:5]] == [("heun", 3), ("heun", 4)]
    assert again[7]["solver"] == "dopri5" and again[7]["steps"] is None and again[7]["tolerance"] == 0.01
    assert again[7]["nfe"] >= 8 and again[7]["nfe"] % 6 == 2  # two evaluations to begin with, then six a step


def test_given_flags_win_over_the_folder_s_over_quick_s_over_the_paper_s(quick, monkeypatch, capsys):
    def flags(words, *names):
        args = cud_mnist.parse_args(shlex.split(words))
        return [getattr(args, name) for name in names]

    assert flags("", "channels", "lr", "steps", "data") == [32, 3e-4, [15], None]  # the paper's
    assert flags("--quick --channels 12", "channels", "lr", "iterations") == [12, 8e-3, 600]
    monkeypatch.chdir(quick[0])
    assert flags("--quick", "steps", "iterations", "multipliers", "fid_samples") == [[1, 3], 30, [1, 2], 300]
    said = capsys.readouterr().out  # one line about what --quick does not give
    assert said.count("\n") == 1 and "--iterations 30" in said and "--lr" not in said
    words = "--run-dir runs/mnist-quick --steps 5"
    assert flags(words, "steps", "iterations", "lr", "data", "quick") == [[5], 30, 8e-3, "glyphs", False]
    assert flags("--quick --model x.pt --run-dir y", "iterations") == [600]  # that is no run of the folder


def test_a_run_folder_remembers_its_flags(monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        before_draw(patch, lambda i: 1 / i)
        run("--iterations", "3", "--rk-order", "2", "--lr", "0.01", "--no-loss-ramp")
    config, checkpoint = MNIST / "config.json", MNIST / "checkpoint.pt"
    assert config.exists() and not checkpoint.exists()  # known from the first iteration on
    capsys.readouterr()
    assert cud_mnist.main([]) == 0  # runs/mnist is the default
    out = capsys.readouterr().out
    for words in ("json gives", "--rk-order 2", "--lr 0.01", "--data glyphs", "--multipliers [1, 2]"):
        assert words in out.splitlines()[0]
    assert "iterations 0 to 3" in out and (MNIST / "samples_model_head2_euler_2.png").exists()
    before = [config.read_bytes(), checkpoint.read_bytes()]
    judged = f"--model {MNIST}/model.pt --run-dir {MNIST} --data glyphs --fid-samples 0"
    assert cud_mnist.main(shlex.split(judged)) == 0 and "training" not in capsys.readouterr().out
    assert before == [config.read_bytes(), checkpoint.read_bytes()]  # no evaluation writes them
    for flags, said in (("--rk-order 1 --lr 0.01", "--rk-order 2, not 1"), ("--seed 3", "--seed 0, not 3"),
                        ("--attention 14 --iterations 9", "--attention [], not [14]"),
                        ("--teacher x.pt --iterations 9", "--teacher None, not /")):
        left_alone(capsys, said, *shlex.split(flags))
    assert cud_mnist.main(["--iterations", "5"]) == 0  # goes on, as it began
    assert "iterations 3 to 5" in capsys.readouterr().out
    assert json.loads(config.read_text())["args"] == json.loads(before[0])["args"] | {"iterations": 5}
    of_another = ["--run-dir", str(MNIST)]
    refused(lambda: cud_cifar10.parse_args(of_another), "cud_mnist.py, which makes other images")
    for content in (b"", b"[]", b'{"args": 3}', b'{"args": {"lr": 1}', b"\xff\xff", b'{"args": {}}'):
        config.write_bytes(content)  # damaged, or of an older version
        refused(lambda: small_args("--iterations", "2"), str(config), "move it away")


def test_the_same_seeds_give_the_same_weights_as_ever(monkeypatch):
    monkeypatch.setattr(cud_mnist, "LOG_EVERY", 2)
    flags = "--rk-order 3 --dropout 0.3 --target ema --one-step --one-step-iterations 3 --one-step-pairs 20"
    assert run(*shlex.split(flags), "--iterations", "6")[0] == 0
    # The figures are those of commit 9d12aeb.
    for file, column, values, rel in (
            ("metrics.csv", "loss", [6.09769, 5.93917, 5.6696], 1e-3),
            ("metrics.csv", "grad_norm", [25.7658, 26.2917, 23.7438], 1e-3),
            ("one_step_metrics.csv", "target", [1.687e-5, 1.265e-5, 6.917e-6, 8.953e-6, 5.337e-6], 0.02)):
        assert table(MNIST / file)[column] == pytest.approx(values, rel=rel)


def grey_pictures(folder, shade, n=6, classes=2, size=28):
    for i in range(n):
        path = Path(folder) / f"class{i % classes}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (size, size), shade + i % 99).save(path)


def test_a_run_goes_on_from_another_folder_and_with_moved_data_but_not_with_others(monkeypatch, capsys):
    grey_pictures("here/data", 100, n=450)
    grey_pictures("others", 30)
    monkeypatch.chdir("here")
    assert run(*shlex.split("--data data --run-dir run --iterations 2"))[0] == 0
    assert "450 pictures in data; 2 classes: 0 class0, 1 class1\n" in capsys.readouterr().out
    monkeypatch.chdir("..")
    assert cud_mnist.main(shlex.split("--run-dir here/run --iterations 3")) == 0
    then, now = (common.load_mnist(at, "train", (1, 28, 28)).sha256[:12] for at in ("here/data", "others"))
    others = shlex.split("--run-dir here/run --data others --iterations 4")
    left_alone(capsys, f"--data {then}, not {now}", *others)
    shutil.move("here/data", "moved")  # the pictures define the run, and their place does not
    assert cud_mnist.main(shlex.split("--run-dir here/run --steps 3")) == 0  # it is finished: no data needed
    assert cud_mnist.main(shlex.split("--run-dir here/run --iterations 4")) == 2
    assert f"{Path('here/data').resolve()} does not exist" in capsys.readouterr().err
    judged = "--data moved --iterations 4 --features classifier --fid-samples 300"
    assert cud_mnist.main(shlex.split(f"--run-dir here/run {judged}")) == 0
    assert iteration("here/run/checkpoint.pt") == 4
    assert results("here/run")[0]["reference"] == "450 pictures in moved"


@pytest.mark.parametrize("script", SCRIPTS)
def test_pictures_alone_need_no_data(script, monkeypatch):
    assert run("--attention", "--run-dir", "run", "--iterations", "1", script=script)[0] == 0
    monkeypatch.setattr(script, "load_data", lambda args: pytest.fail("data were read"))
    assert script.main(["--run-dir", "run", "--steps", "3"]) == 0
    assert script.main(shlex.split("--model run/model.pt --run-dir judged --steps 3 --fid-samples 0")) == 0
    for folder in ("run", "judged"):
        assert Path(folder, "samples_model_euler_3.png").exists()


def test_a_student_belongs_to_the_model_it_has_learnt_from(capsys):
    one = ("--one-step", "--one-step-iterations", "1", "--one-step-lr", "0.05", "--one-step-pairs")
    assert run(*one, "9", "--iterations", "2", "--no-one-step", "--ema-decay", "0")[0] == 0
    assert run(*one, "4")[0] == 0  # free until the student has begun
    left_alone(capsys, "--one-step-pairs 4, not 5", *one, "5")
    for words in ("--no-one-step", "one_step files"):
        left_alone(capsys, words, "--iterations", "4")  # the folder remembers --one-step
    assert run("--save-samples", "5", "--steps", "3")[0] == 0
    z = cud_mnist.normal(5, "cpu", 0, cud_mnist.SAMPLES, 0)
    for name, network in (("samples", "model"), ("one_step_samples", "one_step")):
        velocity = cud_mnist.load_model(MNIST / f"{network}.pt").sampling_velocity
        x = common.euler(velocity, z, 3 if network == "model" else 1)
        expected = common.to_uint8(x).permute(0, 2, 3, 1)
        got = torch.from_numpy(np.load(MNIST / f"{name}.npz")["arr_0"])
        assert (got.int() - expected.int()).abs().max() <= 1 and got.shape == (5, 28, 28, 1)
    assert run("--no-one-step", "--iterations", "4")[0] == 0
    left_alone(capsys, "--iterations 2, not 4", "--one-step")
    for file in MNIST.glob("one_step*"):
        file.unlink()
    assert run("--one-step")[0] == 0 and iteration(MNIST / "one_step_checkpoint.pt") == 3


@pytest.mark.parametrize("outer", [torch.bfloat16, torch.float16, None])
@pytest.mark.parametrize("labels", [(), (torch.tensor([1, 3]),)])
def test_autocast_outside_or_bf16_inside_is_followed_but_for_the_time(labels, outer):
    network, kinds = small_adm() if labels else small_unet().eval(), {}
    for name, module in (("time", network.embed[-1]), ("picture", network.bottom[0].conv1)):
        module.register_forward_hook(lambda m, inputs, output, name=name: kinds.update({name: output.dtype}))
    network.decoder[0].register_forward_pre_hook(lambda m, inputs: kinds.update(skips=inputs[0].dtype))
    x, t = torch.randn(2, 3 if labels else 1, *[16 if labels else 28] * 2), torch.tensor([0.5, 0.501])
    expected = network(x, t, *labels)
    network.bf16 = outer is None
    with torch.autocast("cpu", outer) if outer else nullcontext():
        v = network(x, t, *labels)
    low = outer or torch.bfloat16
    assert kinds == {"time": torch.float32, "picture": low, "skips": low} and v.dtype == torch.float32
    assert (v - expected).abs().mean() < 0.05 * expected.abs().mean()


def save_blank(path, *heads):
    """A model file of a network whose heads are these constants."""
    network = small_unet(heads=len(heads))
    for head, value in zip(network.heads, heads):
        nn.init.zeros_(head[2].weight)
        nn.init.constant_(head[2].bias, value)
    torch.save({"model": network.state_dict(), "args": network.config, "images_seen": 7}, path)


def test_the_head_that_samples_is_the_one_named(small_images, capsys):
    save_blank("three.pt", 0.2, 0.4, 0.6)
    flags = shlex.split(f"--model three.pt --run-dir {MNIST} --fid-samples 0 --steps 4 --save-samples 8")
    z = cud_mnist.normal(8, "cpu", 0, cud_mnist.SAMPLES, 0).permute(0, 2, 3, 1)
    x, t = torch.randn(2, *cud_mnist.IMAGE), torch.rand(2)
    for head, value in (("1", 0.2), ("2", 0.4), ("3", 0.6), (None, 0.6)):
        assert cud_mnist.main([*flags, *(["--head", head] if head else [])]) == 0
        samples = torch.from_numpy(np.load(MNIST / "samples.npz")["arr_0"])
        assert (samples.int() - common.to_uint8(z - value).int()).abs().max() <= 1
        network = cud_mnist.load_model("three.pt", head=int(head) if head else None)
        assert_close(network.first_head(x, t), torch.full_like(x, 0.2))
    assert len({(MNIST / f"samples_model_head{i}_euler_4.png").read_bytes() for i in (1, 2, 3)}) == 3
    left_alone(capsys, "there is no head 4", *flags, "--head", "4")
    for heads, expected in ((1, [0.2]), (2, [0.2, 0.4]), (4, [0.2, 0.4, 0.6, 0.6])):
        begun = cud_mnist.begin_from(cud_mnist.load_model("three.pt"), heads, 0.1)
        assert begun(x, t).mean((1, 2, 3, 4)).tolist() == pytest.approx(expected)
    more = ("--iterations", "2", "--rk-order", "2", *JUDGED)
    assert run(*more)[0] == run(*more, "--head", "1")[0] == 0  # --head is no flag of the training
    assert [row["head"] for row in results(MNIST)] == [2, 1]
    left_alone(capsys, "--head: there is no head 3", *more, "--head", "3")
    save_blank("large.pt", 1e38)  # its weights are finite
    left_alone(capsys, "samples of euler with 5 steps are not finite: no picture, no distance", "--model",
               "large.pt", "--run-dir", ".", "--steps", "5", *JUDGED[:4])


def test_a_student_of_a_teacher(capsys):
    assert run(*shlex.split("--iterations 6 --rk-order 2 --coupling independent --run-dir teacher"))[0] == 0
    file, digest = "teacher/model.pt", common.sha256("teacher/model.pt")
    flags = ("--data", "glyphs", "--batch-size", "8", "--fid-samples", "0", "--steps", "2", "--teacher", file)
    for target in ("consistency", "progressive", "ema"):
        assert cud_mnist.main([*flags, "--target", target, "--run-dir", target, "--iterations", "3"]) == 0
        definition = torch.load(f"{target}/checkpoint.pt")["definition"]
        assert definition["teacher"] == digest and definition["skip_phi"] == 0.75
        assert torch.load(f"{target}/model.pt")["args"]["heads"] == 1
        rows = table(f"{target}/metrics.csv")
        assert rows["truth"] == [0] and rows["loss"] == rows["catchup"]
    args = cud_mnist.parse_args([*flags, "--run-dir", "new"])
    assert [args.step_rule, args.target, args.coupling] == ["constant", "consistency", "independent"]
    for words in ("--rk-order 2", "--target online", "--coupling learned", "--loss-ramp", f"--init {file}",
                  "--channels 16", "--skip-phi 0.5"):
        left_alone(capsys, words.split()[0], "--teacher", file, *shlex.split(words), "--run-dir", "new")
    left_alone(capsys, "needs a --teacher", "--target", "progressive")
    shutil.copy("consistency/model.pt", file)
    assert cud_mnist.main([*flags, "--run-dir", "ema", "--target", "ema", "--iterations", "9"]) == 2
    assert f"--teacher {digest}, not {common.sha256(file)}" in capsys.readouterr().err
    shutil.rmtree("teacher")
    assert cud_mnist.main(["--run-dir", "ema", "--iterations", "9"]) == 2
    assert f"--teacher {Path(file).resolve()} cannot be used (" in capsys.readouterr().err
    # a finished student is evaluated without it
    assert cud_mnist.main(["--run-dir", "ema", "--steps", "3"]) == 0


def test_training_begins_with_a_model_file_which_is_read_once(capsys):
    assert run(*shlex.split("--iterations 6 --coupling independent --run-dir flow --rk-order 0"))[0] == 0
    flags = shlex.split("--init flow/model.pt --rk-order 2 --lr 1e-9 --run-dir on --data glyphs --steps 2 "
                        "--batch-size 8 --fid-samples 0")
    assert cud_mnist.main([*flags, "--iterations", "1"]) == 0
    x, t = torch.randn(2, 1, 28, 28), torch.rand(2)
    flow, on = (cud_mnist.load_model(f"{name}/model.pt") for name in ("flow", "on"))
    for v in on(x, t):  # both heads
        assert_close(v, flow.first_head(x, t), rtol=1e-4, atol=1e-6)
    assert table("on/metrics.csv")["truth"][0] > 0
    digest = common.sha256("flow/model.pt")
    shutil.rmtree("flow")
    for more in ([*flags, "--iterations", "3"], ["--iterations", "4"], ["--steps", "3"]):
        assert cud_mnist.main([*more, "--run-dir", "on"]) == 0
    assert Path("on/samples_model_head2_euler_3.png").exists() and iteration("on/checkpoint.pt") == 4
    assert torch.load("on/checkpoint.pt")["definition"]["init"] == digest
    shutil.copy("on/model.pt", "other.pt")
    said = f"--init {Path('flow/model.pt').resolve()}, not {Path('other.pt').resolve()}"
    left_alone(capsys, said, "--run-dir", "on", "--init", "other.pt", "--iterations", "5")


def test_a_model_file_is_evaluated_and_nothing_trained(small_images, monkeypatch, capsys):
    assert run(*JUDGED, "--iterations", "4", "--evaluate-every", "2")[0] == 0
    rows = results(MNIST)
    assert [row["images_seen"] for row in rows] == [16, 32]
    snapshot = MNIST / "model_0000002.pt"
    assert not (MNIST / "model_0000004.pt").exists() and snapshot.exists()
    flags = ["--model", str(snapshot), "--run-dir", "judged", "--data", "glyphs", *JUDGED]
    for seed in ("0", "7"):
        assert cud_mnist.main([*flags, "--sample-seed", seed]) == 0
    first, second = results("judged")
    assert first["value"] == rows[0]["value"] != second["value"] and second["seed"] == 7
    assert first["model_sha256"] == common.sha256(snapshot) == rows[0]["model_sha256"]
    assert sorted(os.listdir("judged")) == ["results.jsonl", "samples_model_euler_1.png", "trajectory.png"]
    grid = common.save_grid  # meanwhile the training saves another model
    monkeypatch.setattr(common, "save_grid", lambda *given: (grid(*given), shutil.copy("old.pt", snapshot)))
    shutil.copy(MNIST / "model.pt", "old.pt")
    assert cud_mnist.main(flags) == 0 and results("judged")[2]["model_sha256"] == first["model_sha256"]
    (MNIST / "checkpoint.pt").unlink()
    left_alone(capsys, "model.pt has no checkpoint.pt to go on from; --model evaluates", "--iterations", "6")


def test_warm_up_ema_decay_and_log_rows(monkeypatch):
    decays, make = [], cud_mnist.get_ema_multi_avg_fn
    monkeypatch.setattr(cud_mnist, "get_ema_multi_avg_fn", lambda decay: decays.append(decay) or make(decay))
    monkeypatch.setattr(cud_mnist, "LOG_EVERY", 1)
    flags = ("--ema-decay", "0.6", "--lr", "0.01")
    student = shlex.split("--one-step --one-step-iterations 1 --one-step-pairs 4 --one-step-lr 0.003")
    assert run("--iterations", "30", *flags, *student)[0] == 0
    assert table(MNIST / "one_step_metrics.csv")["lr"] == [0.003] * 3
    rows = table(MNIST / "metrics.csv")
    warm = [0.01 / 3, 0.02 / 3]  # the paper's 5,000 iterations of warm-up, cut to a tenth of 30
    assert rows["lr"] == pytest.approx(warm + [0.01] * 28, rel=1e-5)
    assert rows["iteration"] == list(range(1, 31)) and rows["images"] == list(range(8, 248, 8))
    assert decays[:30] == pytest.approx([0.0] + [min(0.6, (1 + i) / (10 + i)) for i in range(1, 30)])
    before_draw(monkeypatch, lambda i: signal.raise_signal(signal.SIGTERM) if i == 32 else None)
    assert run("--iterations", "1000", "--no-one-step", *flags)[0] == 143
    assert table(MNIST / "metrics.csv")["lr"] == pytest.approx(warm + [0.01] * 31, rel=1e-5)  # no new warm-up


@pytest.mark.parametrize("script", [cud_mnist, cud_imagenet64])
@torch.no_grad()
def test_one_step_pairs_and_loss(script, small_images, monkeypatch):
    """Pairs, by class where there are classes, against Euler's method by hand, and the loss of two."""
    monkeypatch.setattr(script, "SAMPLE_BATCH", 3)
    args = script.parse_args([*TINY, "--one-step-pairs", "8", "--attention"])
    if script is cud_mnist:
        network, classes = script.UNet(script.IMAGE, 8, [1, 2], 1, [], 0.0, heads=2).eval(), ()
        nn.init.normal_(network.heads[0][2].weight, std=0.1)
    else:
        network, classes = small_adm(), (5,)
        network.heads[0][2].weight.data *= 20  # or the targets would hardly differ
    noise, targets, *told = script.one_step_pairs(args, network.first_head, *classes, CPU)
    assert targets.shape == (8, 3, *script.IMAGE) and all(len(labels.unique()) > 1 for labels in told)
    x, hats = noise, []
    for i in range(16):
        t = 1 - i / 16
        v = network(x, torch.full((len(x),), t), *told)[0]
        hats.append(x - t * v)
        x = x - v / 16
    for j, evaluation in enumerate((9, 12, 15)):
        assert_close(targets[:, j].float(), hats[evaluation - 1], rtol=2e-3, atol=2e-3)
    module = script.OneStep(args, CPU, network).eval()
    module.average = lambda z, t, *labels: z * (labels[0].view(-1, 1, 1, 1) if labels else 0.5)
    z, target, told = noise[:2], targets[:2, 0].float(), [labels[:2] for labels in told]
    loss, means = module(z, target, *told)
    v = network(z, torch.ones(2), *told)[0]
    near, slow = ((z - v - target) ** 2).mean(), ((v - module.average(z, 1, *told)) ** 2).mean()
    assert_close(torch.stack([loss, *means]), torch.stack([near + 0.1 * slow] * 2 + [near, slow]), rtol=1e-4,
                 atol=1e-5)


# ------------------------------------------------------------- killed, signalled, accumulated, on two ranks

@pytest.mark.parametrize("script, more", [
    (cud_mnist, "--coupling learned --target ema"), (cud_imagenet64, "--attention 8")])
def test_a_run_killed_and_continued_equals_one_never_stopped(script, more, small_images, monkeypatch):
    monkeypatch.setattr(script, "LOG_EVERY", 4)
    flags = shlex.split(f"--rk-order 3 --dropout 0.3 --iterations 20 --checkpoint-every 9 --one-step {more} "
                        "--one-step-iterations 6 --one-step-pairs 20")
    killed = start(*flags, "--run-dir", "killed", script=script, at={(0, 14): KILL})
    assert run(*flags, "--run-dir", "whole", script=script)[0] == 0
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL and iteration("killed/checkpoint.pt") == 9
    assert table("killed/metrics.csv")["iteration"] == [4, 8, 9, 12]
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):  # then in the one-step stage
        before_draw(patch, lambda i: signal.raise_signal(signal.SIGTERM) if i == 13 else None, script.OneStep)
        script.main(["--run-dir", "killed"])
    assert iteration("killed/one_step_checkpoint.pt") == 14
    assert run(*flags, "--run-dir", "killed", script=script)[0] == 0
    for folder in ("whole", "killed"):  # the stop added a row
        spoil(f"{folder}/one_step_checkpoint.pt", lambda saved: saved.pop("rows"))
    for name in ("checkpoint.pt", "one_step_checkpoint.pt", "model.pt", "one_step.pt"):
        assert same(f"whole/{name}", f"killed/{name}"), name


@pytest.mark.parametrize("name, status", [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_a_signal_saves_a_second_ctrl_c_interrupts_and_nohup_goes_on(name, status, monkeypatch, capsys):
    number, sent = getattr(signal, name), []
    before_draw(monkeypatch, lambda i: [signal.raise_signal(each) for each in sent if i == 1])
    before = signal.signal(number, lambda *_: pytest.fail("the handler of before was called"))
    heard = signal.getsignal(number)
    try:
        sent[:] = [number]
        assert run("--iterations", "9")[0] == status and signal.getsignal(number) is heard
        assert iteration(MNIST / "checkpoint.pt") == 2
        assert "stopped; runs/mnist keeps iteration 2" in capsys.readouterr().out
        sent[:] = [number, signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            run("--iterations", "9", "--run-dir", "hasty")
        assert not Path("hasty/checkpoint.pt").exists() and signal.getsignal(number) is heard
        sent.clear()
        late = []
        signal.signal(number, lambda *_: late.append(name))
        with monkeypatch.context() as patch:  # one during the last picture reaches the handler of before
            patch.setattr(cud_mnist.CatchUp, "picture", lambda *_: signal.raise_signal(number))
            patch.setattr(common, "save_grid", lambda *_: None)
            assert run("--iterations", "1", "--run-dir", "late", "--steps", "1")[0] == 0 and late == [name]
        if name == "SIGHUP":
            signal.signal(number, signal.SIG_IGN)  # as nohup does
            sent[:] = [number]
            assert run("--iterations", "9", "--run-dir", "nohup")[0] == 0
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("script, more", [
    (cud_mnist, "--iterations 40 --solver ab2"), (cud_imagenet64, "--iterations 16 --attention 8 --no-flip")])
def test_accumulation_and_two_ranks_equal_one(script, more, small_images, monkeypatch):
    monkeypatch.setattr(script, "LOG_EVERY", 4)
    flags = shlex.split(f"--rk-order 2 --dropout 0 --lr 3e-3 --ema-decay 0.9 {more}")
    assert run(*flags, "--run-dir", "1", script=script)[0] == 0
    for name in ("2", "ranks"):  # one more iteration, from weights that have left their near-zero start
        shutil.copytree("1", name)
    end = int(flags[flags.index("--iterations") + 1]) + 1
    flags += ["--iterations", str(end), "--save-samples", "70"]
    process = start(*flags, "--run-dir", "ranks", "--accumulate", "2", script=script, launcher=TORCHRUN)
    for parts in ("1", "2"):
        assert run(*flags, "--run-dir", parts, "--accumulate", parts, script=script)[0] == 0
    out, err = process.communicate()
    assert process.returncode == 0 and out.count(f"iterations {end - 1} to {end}") == 1, (out, err)
    rows, moments, samples = {}, {}, {}
    for name in ("1", "2", "ranks"):
        rows[name] = table(f"{name}/metrics.csv") | {"images_per_s": []}
        states = torch.load(f"{name}/checkpoint.pt")["optimizer"]["state"].values()
        moments[name] = [state["exp_avg"] for state in states]  # a tenth of each is the last gradient
        samples[name] = np.load(f"{name}/samples.npz")["arr_0"].astype(int)
    for name in ("2", "ranks"):
        for column in rows["1"]:
            np.testing.assert_allclose(rows[name][column], rows["1"][column], rtol=1e-4, err_msg=column)
        for g, h in zip(moments["1"], moments[name]):
            assert (g - h).abs().max() <= 1e-4 * g.abs().max() + 1e-7
        assert abs(samples[name] - samples["1"]).max() <= 2 and samples["1"].std() > 10


def test_a_signal_to_one_rank_or_to_torchrun_saves_once():
    flags = ("--iterations", "100", "--checkpoint-every", "100")
    for first, at, last in ((0, (1, 12), 13), (13, (0, 25), 40)):
        number = "os.getpid()" if first == 0 else "os.getppid()"  # the second rank's own, or torchrun's
        process = start(*flags, launcher=TORCHRUN, at={at: f"os.kill({number}, signal.SIGTERM)"})
        out, err = process.communicate(timeout=120)
        stopped = iteration(MNIST / "checkpoint.pt")
        assert process.returncode == 1 and f"iterations {first} to 100" in out, (out, err)
        assert out.count(f"stopped; runs/mnist keeps iteration {stopped}") == 1, (out, err)
        assert at[1] <= stopped <= last


def test_a_solver_that_fails_on_one_rank_stops_no_other():
    flags, fail = "--iterations 2 --checkpoint-every 1", "def fail(*_): raise common.InputError('no end')"
    at = {(0, 0): f"exec({fail!r}, globals()); common.SOLVERS['euler'] = fail"}  # all pictures are rank 0's
    out, err = start(*flags.split(), launcher=TORCHRUN, at=at).communicate(timeout=120)
    assert out.count("goes on without a picture or a distance: no end") == 2, (out, err)
    assert iteration(MNIST / "checkpoint.pt") == 2 and "error: no end" in err
    (MNIST / "samples_000003.png").mkdir()  # rank 0 alone fails to write; the others would wait for hours
    process = start("--iterations", "9", "--evaluate-every", "3", launcher=TORCHRUN)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "samples_000003.png cannot be written" in err, (out, err)
    assert iteration(MNIST / "checkpoint.pt") == 3


def test_what_a_kill_or_a_full_disk_leaves_goes_on(monkeypatch, capsys):
    checkpoint, model = MNIST / "checkpoint.pt", MNIST / "model.pt"
    assert run("--iterations", "4", "--run-dir", "whole", "--checkpoint-every", "2")[0] == 0
    with monkeypatch.context() as patch:  # a kill while the model of iteration 2 is judged leaves its file
        patch.setattr(cud_mnist.CatchUp, "picture", lambda *_: sys.exit(9))
        assert run("--iterations", "4", "--evaluate-every", "2")[0] == 9
    assert iteration(checkpoint) == 2 and (MNIST / "model_0000002.pt").exists()
    weights = torch.load(model)["model"]
    model.unlink()  # as a kill between the two leaves it
    assert run("--iterations", "2")[0] == 0
    assert all(torch.equal(value, weights[key]) for key, value in torch.load(model)["model"].items())
    before = checkpoint.read_bytes(), set(os.listdir(MNIST))
    assert model.stat().st_size < 400_000 < len(before[0])
    (MNIST / ".checkpoint.pt.123").touch()  # as a kill in the middle of a save leaves it
    with full_disk(400_000):
        status, err = run("--iterations", "4", capsys=capsys)
    assert status == 2 and len(err) == 1 and f"{checkpoint} cannot be written" in err[0]
    assert before == (checkpoint.read_bytes(), set(os.listdir(MNIST)))  # no half file is left
    assert run("--iterations", "4")[0] == 0
    assert same(checkpoint, "whole/checkpoint.pt")


def test_an_unexpected_error_keeps_its_traceback_and_lack_of_memory_says_what_helps(monkeypatch, capsys):
    def fail(*_):
        raise error
    monkeypatch.setattr(cud_mnist, "evaluate", fail)
    error = ZeroDivisionError("other")
    with pytest.raises(ZeroDivisionError, match="other"):
        run("--iterations", "1")
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nMore lines follow.")
    for lack in (MemoryError(), error):
        with pytest.raises(type(lack)), common.reading("a good file", "remove it"):
            raise lack
    for said in ("out of memory. Tried to allocate 20 GiB.", "--accumulate"):
        left_alone(capsys, said, "--iterations", "1")


# ------------------------------------------------------------------------------------------ judging samples


def stand_in_inception(monkeypatch):
    """Random features with the interface of the TorchScript Inception, where its weights are looked for."""
    class StandIn(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 2048), nn.ReLU())

        def forward(self, x, return_features: bool = True):
            return self.layers(x / 128 - 1)
    path = Path("data/cache/inception-2015-12-05.pt")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.jit.script(StandIn()).save(path)
    for script in SCRIPTS:  # the number that 600 digits and a few hundred samples are enough for
        monkeypatch.setitem(script.FEATURES, "inception", 200)
    return torch.jit.load(path)


@pytest.mark.parametrize("lacking, said", [
    ("weights", "no network"), ("images", "600 real images are too few"), ("cache", "cannot be written"),
    ("whole weights", "inception-2015-12-05.pt")])
def test_a_distance_that_will_not_be_had_is_known_before_the_training(lacking, said, monkeypatch, capsys):
    def no_download(urls, path, md5=None):
        raise common.InputError(f"{path} is missing and cannot be fetched ({urls[0]}: no network)")

    monkeypatch.setattr(common, "download", no_download)
    monkeypatch.setitem(cud_mnist.FEATURES, "inception", 200 if lacking != "images" else 400)
    before_draw(monkeypatch, lambda i: print(f"iteration {i}"))
    cache = Path("data/cache")
    if lacking == "cache":
        cache.parent.mkdir()
        cache.write_text("a file where a folder should be")
    if lacking == "whole weights":
        cache.mkdir(parents=True)
        (cache / "inception-2015-12-05.pt").write_bytes(b"PK cut short")
    status, _ = run("--fid-samples", "500", "--iterations", "2")
    out, err = capsys.readouterr()
    lines = out.splitlines()
    told = [line for line in lines if said in line]
    assert len(told) == 1 and "--fid-samples" in told[0] and "--features classifier" in told[0], out
    assert lines.index(told[0]) < lines.index("iteration 0")
    assert status == 2 and len(err.splitlines()) == 1 and said in err  # the end says it again
    assert iteration(MNIST / "checkpoint.pt") == 2 and (MNIST / "model.pt").exists()
    assert (MNIST / "samples_model_euler_2.png").exists() and not (MNIST / "results.jsonl").exists()


def test_a_rank_that_is_ready_first_waits_until_the_cache_is_written(monkeypatch):
    made = []

    def rank_0(tensor):  # it saves before it comes to the sum that follows what it made
        if made:
            common.save_pt({"a": 1}, "x.pt")
        return 2 * tensor

    for name, value in (("RANK", 1), ("WORLD", 2), ("all_reduce", rank_0)):
        monkeypatch.setattr(cud_mnist, name, value)
    assert cud_mnist.cached(Path("x.pt"), ["a"], lambda: made.append({"a": 1})) == {"a": 1}
    monkeypatch.setattr(cud_mnist, "all_reduce", lambda tensor: tensor)  # the other rank sees no file
    with pytest.raises(common.InputError, match="not all ranks see x.pt"):
        cud_mnist.cached(Path("x.pt"), ["a"], lambda: {"a": 1})


def test_what_was_named_and_cannot_be_used_is_refused_before_the_training(monkeypatch, capsys):
    grey_pictures("alike", 0, n=450, classes=1)
    assert run("--iterations", "1", "--data", "alike", "--run-dir", "finished")[0] == 0
    status, err = run(*JUDGED, "--data", "alike", "--run-dir", "finished", "--iterations", "1", capsys=capsys)
    assert status == 2 and "needs two classes" in err[0] and not Path("finished/results.jsonl").exists()
    before_draw(monkeypatch, lambda i: pytest.fail("it was trained"))
    Path("taken").write_text("a file where a folder should be")
    flags, mu, eye = ("--iterations", "2", "--fid-samples", "2100"), np.zeros(2048), np.eye(2048)
    for arrays in (dict(mu=mu), dict(mu=np.zeros(5), sigma=np.eye(5)), dict(mu=mu, sigma=eye * np.nan),
                   dict(mu=mu * np.nan, sigma=eye), dict(mu=np.array([Payload()]), sigma=eye)):
        np.savez("bad.npz", **arrays)
        said = f"--reference {Path('bad.npz').resolve()} cannot be used"
        left_alone(capsys, said, *flags, "--reference", "bad.npz")
    np.savez("bad.npz", mu=mu)
    refused(lambda: common.load_moments("bad.npz"), "bad.npz cannot be used ('sigma is not a file in")
    left_alone(capsys, "--features classifier needs two classes", *flags, *JUDGED, "--data", "alike")
    left_alone(capsys, "--run-dir taken cannot be written", "--iterations", "2", "--run-dir", "taken")


def test_inception_features_end_to_end(monkeypatch):
    network, images = stand_in_inception(monkeypatch), common.drawn_digits(600, (1, 28, 28))[0]
    assert run("--iterations", "2", "--fid-samples", "300")[0] == 0
    row, digest = results(MNIST)[0], common.sha256("data/cache/inception-2015-12-05.pt")[:8]
    assert row["figure"] == "FID-0.3k" and row["features"] == f"inception-legacy_tensorflow-{digest}"
    assert row["value"] > row["floor"]
    saved = torch.load(next(Path("data/cache").glob("reference-*")))
    f = network(images.expand(-1, 3, -1, -1).float()).detach().double().numpy()
    np.testing.assert_allclose(saved["mean"], f.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(saved["cov"], np.cov(f.T), rtol=1e-3, atol=1e-5)
    features, name = cud_mnist.inception_features("clean", CPU)
    assert name == f"inception-clean-{digest}"
    big = [Image.fromarray(image) for image in images[:2, 0].float().numpy()]
    big = np.stack([image.resize((299, 299), Image.Resampling.BICUBIC) for image in big])
    big = torch.tensor(big).clip(0, 255).unsqueeze(1).expand(-1, 3, -1, -1)
    assert_close(features(images[:2]), network.layers((big - 128) / 128), rtol=1e-4, atol=1e-5)


def test_quick_imagenet_is_continued_evaluated_and_sampled_by_class(small_images, monkeypatch, capsys):
    monkeypatch.setattr(cud_imagenet64, "SAMPLE_BATCH", 60)  # several batches
    flags = shlex.split("--quick --channels 4 --multipliers 1 2 --attention 8 --batch-size 4 --steps 1 2 "
                        "--fid-samples 250 --one-step-iterations 2 --one-step-pairs 70")

    def main(more):
        return cud_imagenet64.main([*flags, *shlex.split(more)])

    assert main("--iterations 4") == main("--iterations 8 --no-one-step") == 0
    out, folder = capsys.readouterr().out, Path("runs/imagenet64-quick")
    assert "iterations 4 to 8" in out and "right class" in out
    assert "250 samples of random classes to 600 drawn digits" in out
    picture = folder / "samples_model_euler_2.png"
    assert Image.open(picture).size == (8 * 36, 10 * 36) and Image.open(picture).mode == "RGB"
    rows = results(folder)
    assert [(row["weights"], row["steps"], row["images_seen"]) for row in rows] == [
        ("model EMA", 1, 16), ("model EMA", 2, 16), ("one-step EMA", 1, 16), ("model EMA", 1, 32),
        ("model EMA", 2, 32)]
    assert all(0 < row["floor"] < row["value"] and 0 <= row["right_class"] <= 1 for row in rows)
    data = common.make_data(*common.drawn_digits(600, (3, 16, 16)), "drawn digits")
    assert cud_imagenet64.agreement(data.images, data.labels, data, CPU) > 0.95
    assert cud_imagenet64.agreement(data.images, (data.labels + 1) % 10, data, CPU) < 0.05
    grey_pictures("two", 0, n=480)  # the run is finished, and may be judged by pictures of other classes
    assert main("--iterations 8 --no-one-step --data two") == 0
    last = results(folder)[-1]  # the classifier of two classes cannot say which of ten a sample has
    assert last["reference"].startswith("480 pictures in two") and last["right_class"] is None
    (folder / "model.pt").unlink()  # as a kill between the checkpoint and the weights leaves it
    assert main("--iterations 8 --fid-samples 0 --classes 7 3 --save-samples 9 --no-one-step") == 0
    with np.load(folder / "samples.npz") as file:
        assert file["arr_0"].shape == (9, 16, 16, 3) and file["arr_1"].tolist() == [7, 3, 7, 3, 7, 3, 7, 3, 7]
    assert Image.open(picture).size == (8 * 36, 2 * 36)
    assert main("--iterations 8 --no-one-step --classes 7 10") == 2
    assert "--classes: 10 is not among the 10 classes, 0 to 9" in capsys.readouterr().err


@pytest.mark.parametrize("script", [cud_mnist, cud_imagenet64])
def test_published_statistics_are_the_reference_without_any_images(script, small_images, monkeypatch, capsys):
    network, rng = stand_in_inception(monkeypatch), np.random.default_rng(0)
    mean, scale = rng.normal(size=2048), rng.uniform(0.5, 2, 2048)
    np.savez("published.npz", mu=mean, sigma=np.diag(scale), arr_0=np.array([Payload()], object))  # not read
    flags = ["--iterations", "2", *(["--attention", "8"] if script is cud_imagenet64 else [])]
    assert run(*flags, "--run-dir", "run", "--reference", "published.npz", script=script)[0] == 0
    assert not script.parse_args(["--run-dir", "run", "--reference", ""]).reference  # it can be taken back
    monkeypatch.setattr(script, "load_data", lambda args: pytest.fail("no images are needed"))
    flags += shlex.split("--model run/model.pt --reference published.npz --fid-samples 300")
    flags += ["--save-samples", "300"]
    assert run(*flags, "--run-dir", "judged", script=script)[0] == 0
    out, row = capsys.readouterr().out, results("judged")[0]
    assert "to published.npz; lower is better" in out and "not known" in out
    assert row["features"].startswith("inception-legacy_tensorflow-") and row["floor"] is None
    assert row["reference_sha256"] == common.sha256("published.npz")
    images = torch.from_numpy(np.load("judged/samples.npz")["arr_0"]).permute(0, 3, 1, 2)
    assert images.shape == (300, *script.IMAGE) and images.dtype == torch.uint8
    f = network(images.expand(-1, 3, -1, -1).float()).detach().double().numpy()  # those that were judged
    cov, root = np.cov(f.T), np.diag(np.sqrt(scale))
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov @ root).clip(0)).sum()
    closed = ((f.mean(0) - mean) ** 2).sum() + np.trace(cov) + scale.sum() - 2 * cross
    assert row["value"] == pytest.approx(closed, rel=1e-6)


def test_labels_reach_the_samples_of_every_batch(monkeypatch):
    colour = SimpleNamespace(sampling_velocity=lambda x, t, labels: x - labels.view(-1, 1, 1, 1) / 10)
    monkeypatch.setattr(cud_imagenet64, "SAMPLE_BATCH", 4)
    args, labels = cud_imagenet64.parse_args(["--data", "x"]), torch.arange(10)
    images, *_, course = cud_imagenet64.sample(colour, labels, "euler", 1, args, CPU)  # ends at label / 10
    expected = common.to_uint8(labels / 10).view(10, 1, 1, 1).int()
    assert course.shape == (2, 1, 3, 64, 64) and (course[-1].int() - expected[0]).abs().max() <= 1
    assert images.shape == (10, 3, 64, 64) and (images - expected).abs().max() <= 1  # 12 from class to class
    assert cud_imagenet64.grid_labels(args, 3).tolist() == [0] * 8 + [1] * 8 + [2] * 8  # a row a class
    drawn = cud_imagenet64.drawn_labels(5_000, args, 10).bincount()
    assert len(drawn) == 10 and drawn.min() > 400


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("flags, message", [
    *((words, words.split()[0]) for words in (
        "--rk-order 4", "--rk-points fine", "--order 2", "--steps 0", "--steps x", "--solver rk4", "--head 0",
        "--fid-samples 2048", "--fid-samples 224 --features classifier", "--skip-phi 1", "--batch-size 0",
        "--lr 0", "--lr nan", "--lr 1e400", "--kl-weight -1", "--kl-weight inf", "--ema-decay 1",
        "--dropout 1", "--iterations 0", "--intervals 0", "--tolerance 0", "--seed -1", "--split val",
        "--checkpoint-every 0", "--channels 36 --multipliers 2 2", "--channels 9", "--device gpu",
        "--reference x --features classifier", "--reference x --fid-mode clean", "--run-dir taken")),
    ("--data ''", "--data: the path is empty"),
    ("--accumulate 3", "--batch-size 8 is not divisible by 1 ranks x --accumulate 3"),
    ("--attention 16", "no attention at [16]: the levels have the sizes [28, 14]"),
    ("--multipliers 1 2 2 2", "--multipliers, --attention or --head: 28x28 pixels cannot be halved 3 times"),
    ("--data nowhere", "nowhere does not exist"), ("--model x", "--model needs --run-dir"),
    *((f"--{flag} no.pt --run-dir run", "no.pt does not exist") for flag in ("init", "teacher", "model"))])
def test_bad_flags_get_one_line(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cud_mnist.py"])
    Path("taken").write_text("a file where a folder should be")
    last = "--iterations" if "--iterations" not in flags else "--lr"
    status, err = run("--split", "test", *shlex.split(flags), last, "1", capsys=capsys)
    assert status == 2 and len(err) == 1, err
    assert err[0].startswith("cud_mnist.py: error: ") and message in err[0], err
    assert os.listdir() == ["taken"] and Path("taken").read_text()


def test_ranks_divide_the_batch_and_find_one_checkpoint(monkeypatch, capsys):
    assert run("--iterations", "2")[0] == 0
    monkeypatch.setattr(cud_mnist, "all_reduce", lambda tensor: tensor + 1)  # one that another rank has not
    left_alone(capsys, "the ranks find different checkpoints in runs/mnist", "--iterations", "4")
    monkeypatch.setattr(cud_mnist, "WORLD", 3)
    monkeypatch.setattr(cud_mnist, "start", lambda device: CPU)
    monkeypatch.setattr(cud_mnist, "all_reduce", lambda tensor: 3 * tensor)
    left_alone(capsys, "--batch-size 8 is not divisible by 3 ranks", "--iterations", "4")
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    assert run("--iterations", "2")[0] == 0  # a finished run may be judged by any number


def test_a_second_training_and_bad_checkpoints_are_refused_and_left_alone(capsys):
    path = MNIST / "checkpoint.pt"
    with cud_mnist.lock(MNIST):
        for said in ("another process trains in runs/mnist", "torchrun"):
            left_alone(capsys, said, "--iterations", "2")
    assert run("--iterations", "2")[0] == 0
    with cud_mnist.lock(MNIST):
        assert run("--iterations", "2", "--steps", "1")[0] == 0  # an evaluation needs no lock
    good, saved = path.read_bytes(), torch.load(path)
    left_alone(capsys, "is at iteration 2, past the 1 asked for", "--iterations", "1")
    ramp = ("--loss-ramp", "--run-dir", "ramp", "--iterations")
    assert run(*ramp, "2")[0] == 0
    left_alone(capsys, "--iterations 2, not 4", *ramp, "4")
    older = {name: value for name, value in saved.items() if name not in ("average", "warmup", "rows")}
    other, bad = saved | {"module": small_unet().state_dict()}, {"module": Payload()}
    for content, said in ((older, "it has no average, warmup, rows"), (other, ""), (bad, "")):
        torch.save(content, path)
        left_alone(capsys, f"{path} cannot be used ({said}", "--iterations", "4")
    for content in (good[:len(good) // 2], b"", pickle.dumps(Payload())):
        path.write_bytes(content)
        left_alone(capsys, f"{path} cannot be used (", "--iterations", "4")


def test_a_model_file_in_half_precision_and_files_that_are_none(capsys):
    assert run("--iterations", "2")[0] == 0
    path, x = MNIST / "model.pt", torch.randn(2, 1, 28, 28)
    good, whole = path.read_bytes(), cud_mnist.load_model(path)
    spoil(path, lambda saved: saved.update(model={key: w.half() for key, w in saved["model"].items()}))
    half = cud_mnist.load_model(path)
    assert next(half.parameters()).dtype == torch.float32
    assert_close(half.first_head(x, torch.ones(2)), whole.first_head(x, torch.ones(2)), rtol=1e-2, atol=1e-3)
    for change in (lambda saved: saved["model"].popitem(), lambda saved: saved["args"].update(colour=1),
                   lambda saved: saved["args"].update(image=[3, 32, 32]), lambda saved: saved.pop("args"),
                   lambda saved: saved.update(model=Payload())):
        path.write_bytes(good)
        spoil(path, change)
        for flag in ("--model", "--teacher", "--init"):
            left_alone(capsys, f"{path} cannot be used (", flag, str(path), "--run-dir", "new")


@pytest.mark.parametrize("what", ["loss", "weight"])
def test_what_is_not_finite_is_not_saved(what, monkeypatch, capsys):
    forward, steps, step = cud_mnist.CatchUp.forward, [], torch.optim.Adam.step

    def failing_forward(self, *batch):
        loss, means = forward(self, *batch)
        bad = math.nan if what == "loss" and len(steps) == 6 else 1
        return loss * bad, [means[0] * bad, *means[1:]]

    def failing_step(self):
        step(self)
        steps.append(0)
        if what == "weight" and len(steps) == 10:  # the last step: no loss is left to show it
            self.param_groups[0]["params"][3].data.view(-1)[0] = math.inf

    monkeypatch.setattr(cud_mnist.CatchUp, "forward", failing_forward)
    monkeypatch.setattr(torch.optim.Adam, "step", failing_step)
    status, err = run("--iterations", "10", "--checkpoint-every", "5", capsys=capsys)
    assert status == 2 and len(err) == 1 and "not finite at iteration 10" in err[0] and "--lr" in err[0]
    assert iteration(MNIST / "checkpoint.pt") == 5
    assert all(value.isfinite().all() for value in torch.load(MNIST / "model.pt")["model"].values())


def test_damaged_caches_name_themselves(quick, capsys):
    shutil.copytree(quick[0], ".", dirs_exist_ok=True)
    flags = shlex.split("--quick --batch-size 32 --fid-samples 300 --steps 1 --no-one-step")
    assert run(*flags)[0] == 0
    for path in Path("data/cache").glob("*.pt"):
        content = torch.load(path)
        content.popitem()
        for damaged in (content, {"network": Payload()}):
            torch.save(damaged, path)
            left_alone(capsys, f"{path} cannot be used", *flags)
        assert "remove it, and it is made again" in run(*flags, capsys=capsys)[1][0]
        path.unlink()
        assert run(*flags)[0] == 0
    first, *_, last = results("runs/mnist-quick")
    assert first["value"] == pytest.approx(last["value"])


# ----------------------------------------------------------------------------------------------------- GPUs


@pytest.mark.parametrize("name, local, expected", [
    (None, 0, "cuda:0"), ("cuda:1", 0, "cuda:1"), ("cuda", 3, "cuda:3"), ("cpu", 3, "cpu")])
def test_each_process_gets_its_gpu(name, local, expected, monkeypatch):
    current, zeros = [], torch.zeros
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(str(device)))
    monkeypatch.setattr(torch, "zeros", lambda *size, device: zeros(*size))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setenv("LOCAL_RANK", str(local))
    assert cud_mnist.start(name) == torch.device(expected)
    assert current == ([] if expected == "cpu" else [expected])


@pytest.mark.parametrize("choice, kind, has_bf16, age, expected", [
    ("auto", "cuda", True, (8, 0), (1, True)), ("auto", "cuda", False, (7, 0), (1, False)),
    ("auto", "cuda", False, (6, 1), (0, False)), ("on", "cuda", False, (6, 1), (1, True)),
    ("auto", "cpu", True, None, (0, False)), ("on", "cpu", False, None, (1, True)),
    ("off", "cuda", True, (8, 0), (0, False))])
def test_auto_is_fast_where_the_device_can_do_it(choice, kind, has_bf16, age, expected, monkeypatch):
    network, args, compiled = small_unet(), small_args("--compile", choice, "--amp", choice), []
    monkeypatch.setattr(nn.Module, "compile", lambda *_, **__: compiled.append(1))
    monkeypatch.setattr(nn.Module, "to", lambda self, *_, **__: self)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: age)
    cud_mnist.compile_network(cud_mnist.prepare(network, args, torch.device(kind)), args, torch.device(kind))
    assert (len(compiled), network.bf16) == expected


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def same_logs(one, other, tolerance):
    one, other = (table(f"{name}/metrics.csv") for name in (one, other))
    for name in ("iteration", *cud_mnist.CatchUp.columns):
        np.testing.assert_allclose(one[name][-1], other[name][-1], rtol=tolerance, atol=1e-3)


@gpu
@pytest.mark.parametrize("script", SCRIPTS)
def test_gpu_quick(script):
    few = "--quick --iterations 30 --fid-samples 300 --steps 1 3 --checkpoint-every 20"
    assert script.main(shlex.split(few + " --one-step-iterations 4 --one-step-pairs 30")) == 0
    rows = results(script.QUICK["run_dir"])
    assert rows and all(row["device"] == "cuda:0" for row in rows)
    assert all(row["floor"] < row["value"] < row["noise"] for row in rows)


@gpu
def test_gpu_compiled_bfloat16_trains_as_eager_float32():
    flags = shlex.split("--quick --iterations 50 --no-one-step --fid-samples 0 --rk-order 2")
    assert cud_mnist.main([*flags, *"--amp on --compile on --run-dir fast".split()]) == 0
    assert cud_mnist.main([*flags, *"--amp off --compile off --run-dir plain".split()]) == 0
    # the same draws; bfloat16 keeps 8 bits: within 0.4 % a value, and the losses are means over 1,600 images
    same_logs("fast", "plain", 0.03)


def guarded(items, *_):
    """A progress() that forbids waiting for the GPU, but in the first three iterations and the last."""
    try:
        for i in items:
            torch.cuda.set_sync_debug_mode("error" if 2 < i < len(items) - 1 else "default")
            yield i
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.parametrize("script", SCRIPTS)
def test_gpu_iterations_do_not_wait(script, monkeypatch):
    monkeypatch.setattr(script, "progress", guarded)
    monkeypatch.setattr(script, "sample", lambda *_: [torch.zeros(64, *script.IMAGE).byte()])
    monkeypatch.setattr(script, "evaluate", lambda *_: None)
    more = shlex.split("--iterations 20 --rk-order 2 --target ema --attention 32")
    assert script.main([*TINY, *more[:8 if script is cud_imagenet64 else 6]]) == 0


@gpu
def test_gpu_run_killed_and_continued():
    flags = ("--iterations", "24", "--checkpoint-every", "9", "--rk-order", "2", "--compile", "off")
    assert start(*flags, "--run-dir", "whole").wait() == 0
    assert start(*flags, "--run-dir", "killed", at={(0, 14): KILL}).wait() == -signal.SIGKILL
    assert start(*flags, "--run-dir", "killed").wait() == 0
    same_logs("killed", "whole", 0.02)  # atomic sums differ


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_gpu_torchrun_over_nccl():
    flags = ("--iterations", "12", "--dropout", "0", "--amp", "off")
    assert start(*flags, "--run-dir", "one", CUDA_VISIBLE_DEVICES="0").wait() == 0
    assert start(*flags, "--run-dir", "two", launcher=TORCHRUN).wait() == 0
    same_logs("two", "one", 0.01)


# ------------------------------------------------------------------------------------ one text, three scripts

MUST = set("docstring IMAGE DATA_HELP PAPER QUICK DEFINES load_data CatchUp parse_args".split())
CLASSES = set("SAMPLE_BATCH FEATURES OF_ONE_COMMAND conv norm Block UNet OneStep one_step_pairs sample "
              "Classifier classifier_features evaluate main".split())  # what classes change
NEW = set("DB3 detail_filters details wavelet_loss zero grid_labels drawn_labels agreement".split())
FORK = "The three scripts are one text. If your fork edits one of them alone, delete this test."


def statements(script):
    """The script's top-level statements by name, or first line, with the comments and blank lines above."""
    text, end, found = Path(script.__file__).read_text(), 0, {}
    lines = text.splitlines()
    for node in ast.parse(text).body:
        target = getattr(node, "targets", [node])[0]
        name = getattr(target, "name", getattr(target, "id", lines[node.lineno - 1] if end else "docstring"))
        found[name] = lines[end:node.end_lineno]
        end = node.end_lineno
    return found


@pytest.mark.parametrize("one, other, gone, new, differ, most", [
    (cud_mnist, cud_cifar10, set(), set(), MUST, 60),
    (cud_cifar10, cud_imagenet64, {"init"}, NEW, MUST | CLASSES, 400)])
def test_scripts_differ_in_what_they_must_alone(one, other, gone, new, differ, most):
    a, b = statements(one), statements(other)
    both = [name for name in b if name in a]
    assert both == [name for name in a if name in b], FORK  # in the same order
    assert {name for name in a.keys() - b.keys() if name.isidentifier()} == gone, FORK
    assert {name for name in b.keys() - a.keys() if name.isidentifier()} == new, FORK
    assert {name for name in both if a[name] != b[name]} == differ, FORK
    for name in ("CatchUp", "parse_args") if other is cud_cifar10 else ():  # there it only adds lines
        assert not [line for line in difflib.ndiff(a[name], b[name]) if line.startswith("- ")], FORK
    texts = [Path(script.__file__).read_text().splitlines() for script in (one, other)]
    assert sum(line[0] in "+-" for line in difflib.ndiff(*texts)) < most, FORK


@pytest.mark.parametrize("script, most", [(cud_mnist, 150), (cud_cifar10, 150), (cud_imagenet64, 180)])
def test_the_method_comes_first(script, most):
    text = Path(script.__file__).read_text()
    lines = re.search(r"(.*)\n\n\n# -+ network", text, re.S)[1].count("\n")
    assert lines < most, "Who reads the method should not have to read far. In a fork, delete this test."


# ---------------------------------------------------------------------------------------------------- README


def python_blocks(name):
    return re.findall(r"```python\n(.*?)```", (HERE / name).read_text(), re.S)


def readme_bash(of_results):
    """The blocks of commands in README.md and results.md: those of the results, or the others."""
    text = (HERE / "README.md").read_text() + RESULTS.read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    return "\n".join(block for block in blocks if " cud_" in block and ("small=" in block) == of_results)


def commands(text):
    """(script, flags) of the commands in a text for bash, loops and variables expanded by bash."""
    show = 'python() { printf "%q " "$@"; echo; }; torchrun() { python "$@"; }; pip() { :; }; cp() { :; }\n'
    command = ["bash", "-euc", show + text]
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        found = re.search(r"(cud_\w+)\.py(.*)", line)
        yield sys.modules[found[1]], shlex.split(found[2])


@pytest.mark.parametrize("of", ["README", *SCRIPTS])
def test_commands_work_one_after_the_other(of, small_images, monkeypatch):
    """Those of the README; the three of a docstring."""
    monkeypatch.setattr(common, "save_grid", lambda *_: None)  # which would take half of the time
    few = "--data glyphs --channels 4 --multipliers 1 2 --blocks 1 --batch-size 4 --iterations 2 --steps 1"
    few += " --fid-samples 0 --one-step-iterations 1 --one-step-pairs 4"
    text = readme_bash(of_results=False)
    if of in SCRIPTS:
        text = "\n".join(re.findall(r"^    (\w.*?\.py .*?)   ", of.__doc__, re.M))
    ran = []
    for script, flags in commands(text):
        flags = [{"207": "2", "360": "3"}.get(word, word) for word in flags] + few.split()  # the later count
        flags += "--attention 8".split() if script is cud_imagenet64 else []
        assert script.parse_args(flags) and script.main(flags) == 0, flags
        ran.append(script)
    assert ran == [of] * 3 or min(ran.count(script) for script in SCRIPTS) >= 4


def test_readme_results_commands_parse(quick):
    teacher = str(quick[0] / "runs/mnist-quick/model.pt")
    parsed = [script.parse_args([teacher if "model.pt" in word else word for word in flags])
              for script, flags in commands(readme_bash(of_results=True))]
    assert len(parsed) > 30
    rows = re.findall(r"\| `(--run-dir [^`]*)`", RESULTS.read_text())
    folders = {cud_cifar10.parse_args(row.split()).run_dir for row in rows}
    assert len(folders) == len(rows) - 1 >= 10  # one for each, and one-step goes on in RK12's


def test_readme_python_blocks_run(quick, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(HERE))
    for run in ("mnist", "short-0", "short-stage-0"):
        shutil.copytree(quick[0] / "runs/mnist-quick", f"runs/{run}")
    np.savez("runs/mnist/samples.npz", arr_0=np.zeros((3, 28, 28, 1), np.uint8))
    with open("runs/short-0/results.jsonl", "a") as file:  # judged once more
        file.write(json.dumps(results("runs/short-0")[0] | {"value": 7}) + "\n")
    for part in ("train", "t10k"):
        name = part + "-{}-idx{}-ubyte"
        write_idx("path/to/mnist", np.zeros((3, 28, 28), np.uint8), np.zeros(3, np.uint8), name)
    blocks = python_blocks("README.md") + python_blocks("assets/results.md")
    for block in blocks:
        exec(compile(block.replace('"assets/', f'"{HERE}/assets/'), "README.md", "exec"), {})
    assert len(blocks) == 7 and all(Path(f"runs/{name}.png").exists() for name in ("samples", "nearest"))
    out = capsys.readouterr().out
    table = [line for line in out.splitlines() if line.startswith("| ")]
    assert len(table) > 10 and set(table) <= set(RESULTS.read_text().splitlines())
    assert Path("quality.svg").read_text() == (HERE / "assets/quality.svg").read_text()
    assert float(re.search(r"^4 steps mean distance from the circle (\S+)$", out, re.M)[1]) < 0.25
    figures = {}
    for row, weights in (("short", "model EMA"), ("short-stage", "one-step EMA")):
        figures |= {(row, "0", line["solver"], str(line["steps"] or "")): f"{line['value']:.3f}"
                    for line in results(f"runs/{row}-0") if line["weights"] == weights}
    gathered = {(row, seed, solver, steps): fd for row, seed, _, _, solver, steps, fd, _
                in csv.reader(open("rows.csv")) if row.startswith("short")}
    assert gathered == figures and "7.000" in gathered.values()
    assert Image.open("00002.png").size == (28, 28)


def test_readmes_tables_are_the_means_of_the_rows():
    rows = "rf rk12 default rk12-proportional rk34-proportional cd pd4 pd2 rf-stage rk12-stage".split()
    columns = [("euler", 1), ("euler", 4), ("euler", 15), ("ab2", 3), ("ab2", 5)]
    found = {}
    for line in csv.DictReader((HERE / "assets/rows.csv").open()):
        found.setdefault((line["row"], line["solver"], int(line["nfe"])), []).append(float(line["fd"]))
    mean = {key: sum(values) / len(values) for key, values in found.items() if "-long" not in key[0]}
    tables = re.findall(r"\n\| (?:method|network ev).*\n.*\n((?:\|.*\n)+)", (HERE / "README.md").read_text())
    best, methods = ([[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
                     for table in tables)
    for row, (_, *cells, _) in zip(rows, methods, strict=True):
        means = [mean.get((row, *column)) for column in columns]
        assert cells == ["" if m is None else format(m, ",.0f" if m >= 1000 else ".1f") for m in means], row
    for nfe, *_, fd in best:
        assert float(fd) == round(min(m for (*_, n), m in mean.items() if n == int(nfe)), 1), nfe


@pytest.mark.parametrize("name, solver, steps", [("rk34", common.euler, 4), ("one_step", common.euler, 1)])
def test_the_weights_in_assets_make_digits(name, solver, steps):
    network = cud_mnist.load_model(HERE / f"assets/mnist_{name}.pt")
    z = torch.randn(64, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    images = common.to_uint8(solver(network.sampling_velocity, z, steps))
    assert 28 < images.float().mean() < 40  # MNIST: 33.8
    assert 0.7 < (images < 20).float().mean() < 0.9 and (images > 200).float().mean() > 0.05


# ------------------------------------------------------------------------------------------------ benchmark
#
#   python test_cud.py SCRIPT FLAGS [--profile], for example
#   python test_cud.py cud_mnist --batch-size 64 --coupling independent --iterations 20
#
# trains on drawn digits (--data for others) by the script's own fit(), and the plain way: eager, PyTorch's
# default precision, NCHW, every stage and target a full forward pass of its own, k_1 computed again, the EMA
# parameter by parameter, a DataLoader with workers; then samples with both. --iterations N are those timed,
# after four that are not. --profile: also where the time of the script's way goes.


def plain_loss(script, args, network, encoder, x, noise, t, h, done, *labels):
    """The loss of a batch that stage.draw() has made, by full forward passes alone."""
    k, z, loss, align = args.rk_order, noise, 0, functools.partial(script.align, x=x)
    if encoder is not None:
        mu, log_var = encoder(x, torch.ones_like(t))[0].chunk(2, 1)
        z = mu + (log_var / 2).exp() * noise
        loss = args.kl_weight * (mu.square() + log_var.exp() - 1 - log_var).mean() / 2
    x_t, u, slopes = align(t) * z + (1 - align(t)) * x, z - x, []

    @torch.no_grad()
    def first_head(weights, j):
        there = x_t - align(h) * sum(weight * slope for weight, slope in zip(weights, slopes))
        return network(there, (t - j * h).clamp(min=script.EPS), *labels)[0]

    v = network(x_t, t, *labels)
    loss = loss + sum(F.mse_loss(head, u) for head in v)
    for i in range(k):
        slopes.append(first_head(script.RK_A[i + 1] if i else [], i))
    for j in range(k):
        y = torch.where(align(t - k * h < script.EPS), u, first_head(script.RK_B[k][j], j + 1))
        loss = loss + F.mse_loss(v[j], y)
    return loss + args.wavelet_weight * script.wavelet_loss(z - v[-1], x).mean() if labels else loss


@pytest.mark.parametrize("script, order", [*((cud_mnist, k) for k in range(4)), (cud_imagenet64, 2)])
def test_the_plain_way_has_the_same_loss(script, order):
    flags = ["--rk-order", str(order), "--dropout", "0", "--intervals", "2", "--attention"]
    args = script.parse_args([*TINY, *flags, *(["32"] if script is cud_imagenet64 else [])])
    stage = script.CatchUp(args, CPU, common.make_data(*common.drawn_digits(50, script.IMAGE), ""))
    for p in stage.double().parameters():  # away from the zeros that some start with
        nn.init.normal_(p, std=0.2)
    x, noise, t, h, done, *labels = stage.draw(0)
    batch = x.double(), noise.double(), t.double(), h.double(), done, *labels
    plain = plain_loss(script, args, stage.network, getattr(stage, "encoder", None), *batch)
    assert_close(plain, stage(*batch)[0])


def by_the_script(script, args, device, data, timed):
    """Trains for the iterations `timed`. Returns what to sample with; a stage and its loss in eager mode."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "progress", lambda *_: timed)
        average = script.fit(script.CatchUp(args, device, data), args, device)
    script.compile_network(average, args, device)
    args.compile = "off"
    eager = script.CatchUp(args, device, data)
    eager.average = eager.network.first_head
    return average, eager, lambda *batch: eager(*batch)[0]


def plainly(script, args, device, data, timed):
    """The same the plain way."""
    args.compile = "off"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "prepare", lambda network, *_: network.to(device))
        stage = script.CatchUp(args, device, data)
    network, ema = stage.network, copy.deepcopy(stage.network).eval()
    loss = functools.partial(plain_loss, script, args, network, getattr(stage, "encoder", None))
    optimizer = torch.optim.Adam(stage.parameters(), args.lr)
    pairs = torch.utils.data.TensorDataset(data.images, data.labels)
    loader = torch.utils.data.DataLoader(pairs, args.batch_size, shuffle=True, num_workers=2, drop_last=True)
    batches = (batch for _ in range(10 ** 9) for batch in loader)
    for _ in timed:
        x, labels = (part.to(device) for part in next(batches))
        x, t, h = x.float() / 127.5 - 1, *torch.rand(2, len(x), device=device)
        told = [labels] if script is cud_imagenet64 else []
        loss(x, torch.randn_like(x), t, h / args.intervals, 0, *told).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for mine, its in zip(ema.parameters(), network.parameters()):
                mine.mul_(args.ema_decay).add_((1 - args.ema_decay) * its)
    return ema, stage, loss


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.time()


def stopwatch(began, found, n, device, profiling):
    """Yields iterations: the first, three more, n that are timed, five that are profiled. Fills `found`."""
    yield 0
    found["first step, s"] = now(device) - began
    yield from range(1, 4)
    began = now(device)
    yield from range(4, 4 + n)
    ms = found["ms an iteration"] = 1e3 * (now(device) - began) / n
    if device.type == "cuda":
        found["peak memory, GiB"] = torch.cuda.max_memory_allocated(device) / 2 ** 30
    if profiling:
        with torch.profiler.profile() as profile:
            yield from range(4 + n, 9 + n)
            now(device)
        time_of = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        rows = [row for row in profile.key_averages() if row.device_type.name.lower() == device.type
                and not getattr(row, "is_user_annotation", False)]
        rows = sorted(((getattr(row, time_of) / 5e3, row.count / 5, row.key) for row in rows), reverse=True)
        busy, count = sum(row[0] for row in rows) / ms, sum(row[1] for row in rows)
        found["profile"] = [f"{count:.0f} kernels an iteration (on a CPU: operators); the device is busy for "
                            f"{busy:.1%} of the time; the longest, in ms, and how many:",
                            *(f"{ms:10.3f} {count:6.0f}  {name:.120}" for ms, count, name in rows[:10])]


def seconds(work, device):
    """How long work() takes, the second time."""
    work()
    began = now(device)
    work()
    return now(device) - began


def measure(name, flags, way, profiling):
    """What training and sampling by one way take: {name: value}."""
    script, found = sys.modules[name], {}
    args = script.parse_args(["--data", "glyphs", "--iterations", "20", *flags, "--fid-samples", "0"])
    n, args.iterations, args.checkpoint_every = args.iterations, 10 ** 9, 10 ** 9
    data = script.load_data(args)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if way is by_the_script:
        device = script.start(args.device)
    timed = stopwatch(time.time(), found, n, device, profiling)
    network, stage, loss = way(script, args, device, data, timed)
    found["images/s"] = 1e3 * args.batch_size / found["ms an iteration"]
    with FlopCounterMode(display=False) as counter:
        loss(*(part[:1] if torch.is_tensor(part) else part for part in stage.draw(0))).backward()
    found["TFLOP/s"] = counter.get_total_flops() / 1e12 * found["images/s"]
    if device.type == "cuda":
        a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        rate = 20 * 2 * 8192 ** 3 / 1e12 / seconds(lambda: [a @ a for _ in range(20)], device)
        found["of a bf16 product's TFLOP/s, %"] = 100 * found["TFLOP/s"] / rate
        found["a bf16 matrix product, TFLOP/s"] = rate
    n = script.SAMPLE_BATCH if device.type == "cuda" else 32
    wanted = torch.arange(n) % len(data.classes) if script is cud_imagenet64 else n
    took = seconds(lambda: script.sample(network, wanted, "euler", 5, args, device), device)
    return found | {"sampling, evaluations/s": 5 * n / took}


if __name__ == "__main__":
    name, *flags = [word for word in sys.argv[1:] if word != "--profile"]
    found = []
    for way, profiling in ((by_the_script, "--profile" in sys.argv), (plainly, False)):  # a process for each
        with tempfile.TemporaryDirectory() as run, ProcessPoolExecutor(1, get_context("spawn")) as processes:
            try:
                more = [*flags, "--run-dir", run]
                found.append(processes.submit(measure, name, more, way, profiling).result())
            except torch.OutOfMemoryError:  # the plain way needs more
                found.append({})
    chip = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    print(f"{name} {' '.join(flags)}; torch {torch.__version__}, {chip}\n{'':32}script   plain way   ratio")
    profile = found[0].pop("profile", [])
    for key, value in found[0].items():
        other = found[1].get(key, math.nan)
        print(f"{key:30}{value:9.4g}{other:12.4g}{value / other:8.2f}")
    print("\n".join(profile))
