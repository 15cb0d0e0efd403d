"""Tests of what could be wrong: theoretical orders, closed forms, independent computations, kills midway.

    pytest                      everything, on a CPU, in a temporary folder, without network or data
    python test_cud.py          no tests: training as a script does it against the plain way, see the end
    python test_cud.py figure   no tests: draws assets/quality.svg from the README's table
"""
import ast
import copy
import difflib
import gc
import gzip
import io
import json
import math
import os
import pickle
import platform
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import xml.etree.ElementTree as ElementTree
import zipfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image
from scipy.integrate import solve_ivp
from scipy.linalg import sqrtm
from torch.testing import assert_close

import common
import cud_cifar10
import cud_imagenet64
import cud_mnist

HERE = Path(__file__).parent
REAL = HERE.parent / "shared/data"
SCRIPTS = [cud_mnist, cud_cifar10, cud_imagenet64]
TINY = shlex.split("--data glyphs --channels 8 --multipliers 1 2 --blocks 1 --batch-size 8 --fid-samples 0 "
                   "--steps 2")
QUICK = shlex.split("--quick --iterations 30 --multipliers 1 2 --one-step-iterations 4 --one-step-pairs 30")


class Payload:
    """A pickle that runs code."""

    def __reduce__(self):
        return os.mkdir, ("run_by_the_pickle",)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test runs in its own folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True, scope="session")
def small():
    """600 glyphs are plenty here, and a little training for their classifier."""
    full = common.glyphs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "glyphs", lambda n, shape, seed=0: full(min(n, 600), shape, seed))
        for script in SCRIPTS:
            patch.setattr(script, "CLASSIFIER_BATCHES", 60)
        yield


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


def slopes(errors):
    return np.diff(np.log2(errors)) * -1


X = torch.tensor([[0.3, -0.8], [1.1, 0.4], [-0.6, 0.9]], dtype=torch.float64)


@pytest.mark.parametrize("name, order", [("euler", 1), ("heun", 2), ("ab2", 2), ("ab3", 3)])
@pytest.mark.parametrize("t_start, t_end", [(1.0, 0.0), (0.0, 1.0)])
def test_solver_has_its_order_and_spends_its_steps(name, order, t_start, t_end):
    end, errors = exact(X, t_start, t_end), []
    for steps in (41, 81, 161):
        calls, path = [], []

        def velocity(x, t, calls=calls):
            calls.append(t)
            return field(x, t)
        x, nfe = common.SOLVERS[name](velocity, X, steps, t_start, t_end, trajectory=path)
        assert nfe == steps == len(calls)
        t, point, v = path[0]
        assert t == t_start and torch.equal(point, X) and torch.equal(v, field(X, calls[0]))
        for t, point, v in path:
            assert torch.equal(v, field(point, torch.full((3,), t, dtype=torch.float64)))
        errors.append((x - end).abs().max().item())
    assert slopes(errors)[-1] == pytest.approx(order, abs=0.15), errors


def test_one_step_of_every_solver_is_euler():
    for name in ("euler", "heun", "ab2", "ab3"):
        x, _ = common.SOLVERS[name](field, X, 1)
        assert_close(x, X - field(X, torch.ones(3, dtype=torch.float64)))


def test_dopri5_meets_its_tolerance_and_counts_evaluations():
    spent = []
    for tolerance in (1e-4, 1e-7, 1e-10):
        calls, path = [], []

        def velocity(x, t, calls=calls):
            calls.append(t)
            return field(x, t)
        x, nfe = common.dopri5(velocity, X, 15, 1.0, 0.0, tolerance, path)
        assert nfe == len(calls) and (x - exact(X, 1.0, 0.0)).abs().max() < 30 * tolerance
        times = [t for t, _, _ in path]
        assert times[0] == 1.0 and times == sorted(times, reverse=True)
        for t, point, v in path:
            assert_close(v, field(point, torch.full((3,), t, dtype=torch.float64)), rtol=1e-12, atol=1e-12)
        spent.append(nfe)
    assert spent[0] < spent[1] < spent[2]
    with pytest.raises(FloatingPointError):
        common.dopri5(lambda x, t: x * math.nan, X)


# ------------------------------------------------------------------------------------------- catch-up points


@pytest.mark.parametrize("points, order, theory", [
    ("published", 1, [2]), ("published", 2, [3, 2]), ("published", 3, [3, 2, 2]),
    ("dense", 1, [2]), ("dense", 2, [3, 3]), ("dense", 3, [3, 3, 4])])
def test_catch_up_points_have_their_local_order(points, order, theory):
    t, errors, seen = torch.full((3,), 0.9, dtype=torch.float64), [], []
    for h in (0.04, 0.02, 0.01, 0.005):
        where, when = cud_mnist.catch_up_points(field, X, t, 0 * t + h, field(X, t), order, points)
        assert torch.allclose(when, torch.stack([t - (j + 1) * h for j in range(order)]))
        errors.append([abs(where[j] - exact(X, 0.9, 0.9 - (j + 1) * h)).max().item() for j in range(order)])
    late = torch.full((3,), 0.01, dtype=torch.float64)  # the step passes the data: no time below EPS
    _, when = cud_mnist.catch_up_points(lambda x, t: seen.append(t) or field(x, t), X, late, late, X, order,
                                        points)
    assert all((times >= cud_mnist.EPS).all() for times in [*seen, when]) and when[-1, 0] == cud_mnist.EPS
    for j in range(order):
        slope = slopes([e[j] for e in errors]).mean()
        assert slope == pytest.approx(theory[j], abs=0.3), (j, slope)


# -------------------------------------------------------------------------------------------------- the loss

B_TABLE = {  # typed again from the paper and from the classical methods, not imported: [k][j - 1]
    "published": {1: [[1]], 2: [[.5, .5], [1, 1]],
                  3: [[5/12, 2/3, -1/12], [10/12, 4/3, -2/12], [15/12, 2, -3/12]]},
    "dense": {1: [[1]], 2: [[.5, .5], [0, 2]],
              3: [[1 - 3/4 + 1/6, 1 - 1/3, -1/4 + 1/6], [2 - 3 + 8/6, 4 - 8/3, -1 + 8/6], [3/4, 0, 9/4]]}}
A_TABLE = {"published": [[1], [1.75, .25]], "dense": [[1], [0, 2]]}


class Heads(nn.Module):
    """k heads v_j = tanh(A_j x + t b_j) on [B, 2, 1, 1], in float64."""

    def __init__(self, k):
        super().__init__()
        draw = torch.Generator().manual_seed(5)
        self.a = nn.Parameter(torch.randn(k, 2, 2, generator=draw, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(k, 2, generator=draw, dtype=torch.float64))

    def forward(self, x, t):
        flat = torch.einsum("kij,bj->kbi", self.a, x.flatten(1)) + t[None, :, None] * self.b[:, None]
        return flat.tanh()[..., None, None]


def loss_by_hand(heads, ema, x, z, t, h, order, points):
    """L_catchup and L_truth a sample, in NumPy, loop by loop."""
    def v(net, j, point, time):
        return np.tanh(net.a[j].detach().numpy() @ point + time * net.b[j].detach().numpy())
    catchup, truth, eps = [], [], 1e-5
    for x_i, z_i, t_i, h_i in zip(x.numpy().reshape(-1, 2), z.numpy().reshape(-1, 2), t.tolist(), h.tolist()):
        x_t, u = t_i * z_i + (1 - t_i) * x_i, z_i - x_i
        k = [v(heads, 0, x_t, t_i)]
        for i in range(1, order):
            point = x_t - h_i * sum(a * s for a, s in zip(A_TABLE[points][i - 1], k))
            k.append(v(heads, 0, point, max(eps, t_i - i * h_i)))
        c = w = 0.0
        for j in range(max(order, 1)):
            mine = v(heads, j, x_t, t_i)
            w += np.mean((mine - u) ** 2)
            if order:
                point = x_t - h_i * sum(b * s for b, s in zip(B_TABLE[points][order][j], k))
                y = u if t_i - order * h_i < eps else v(ema, 0, point, max(eps, t_i - (j + 1) * h_i))
                c += np.mean((mine - y) ** 2)
        catchup.append(c)
        truth.append(w)
    return np.array(catchup), np.array(truth)


def case():
    draw = torch.Generator().manual_seed(1)
    x, z = torch.randn(2, 6, 2, 1, 1, generator=draw, dtype=torch.float64)
    t = torch.tensor([0.9, 0.5, 0.3, 0.1, 0.05, 1e-5], dtype=torch.float64)  # two reach x at any order
    return x, z, t, torch.tensor([0.06, 0.01, 0.0625, 0.05, 0.06, 0.03], dtype=torch.float64)


@pytest.mark.parametrize("points", ["published", "dense"])
@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("target", ["online", "ema"])
def test_loss_equals_a_computation_by_hand(order, points, target):
    heads, ema = Heads(max(order, 1)), Heads(1)
    ema.a.data *= 0.7
    x, z, t, h = case()
    got = cud_mnist.catch_up_loss(heads, x, z, t, h, order, points,
                                  target=(lambda x, t: ema(x, t)[0]) if target == "ema" else None)
    by_hand = loss_by_hand(heads, ema if target == "ema" else heads, x, z, t, h, order, points)
    for mine, theirs in zip(got, by_hand):
        np.testing.assert_allclose(mine.detach().numpy(), theirs, rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_no_gradient_flows_through_a_target(order):
    heads = Heads(order)
    x, z, t, h = case()
    z.requires_grad_()
    sum(part.sum() for part in cud_mnist.catch_up_loss(heads, x, z, t, h, order)).backward()
    got = [heads.a.grad.clone(), heads.b.grad.clone(), z.grad.clone()]
    heads.zero_grad()
    z.grad = None
    with torch.no_grad():  # the targets as constants
        x_t = t.view(-1, 1, 1, 1) * z + (1 - t.view(-1, 1, 1, 1)) * x
        xs, ts = cud_mnist.catch_up_points(lambda x, t: heads(x, t)[0], x_t, t, h, heads(x_t, t)[0], order)
        y = torch.stack([heads(p, s)[0] for p, s in zip(xs, ts)])
        y[:, t - order * h < 1e-5] = (z - x)[t - order * h < 1e-5]
    x_t = t.view(-1, 1, 1, 1) * z + (1 - t.view(-1, 1, 1, 1)) * x
    v = heads(x_t, t)
    (((v - y) ** 2).sum() / 2 + ((v - (z - x)) ** 2).sum() / 2).backward()  # a sample has two dimensions
    for mine, theirs in zip(got, [heads.a.grad, heads.b.grad, z.grad]):
        assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_one_iteration_evaluates_what_the_order_needs(order):
    heads, calls = Heads(max(order, 1)), []

    def counted(kind, slot):
        def call(x, t):
            calls.append((kind, len(x), torch.is_grad_enabled()))
            return heads(x, t) if slot is None else heads(x, t)[slot]
        return call
    cud_mnist.catch_up_loss(counted("heads", None), *case(), order, velocity=counted("stage", 0),
                            target=counted("target", 0))
    assert calls == [("heads", 6, True), *[("stage", 6, False)] * (order - 1),
                     *[("target", 6 * order, False)] * (order > 0)]


def dummy(script, classes=1):
    """Data of one black image."""
    image, label = torch.zeros(1, *script.IMAGE, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    return common.Data(image, label, "", [str(i) for i in range(classes)], "0" * 64)


def dummy_samples(script):
    return script.Samples(torch.zeros(64, *script.IMAGE, dtype=torch.uint8), 1, 0, None)


@pytest.mark.parametrize("order", [0, 1, 3])
def test_the_loss_takes_any_shape_and_refuses_a_network_without_heads(order):
    x, z, t, h = case()
    heads = Heads(max(order, 1))
    flat = [part.flatten(1) for part in (x, z)]
    got = cud_mnist.catch_up_loss(lambda x, t: heads(x[..., None, None], t)[..., 0, 0], *flat, t, h, order)
    assert_close(got, cud_mnist.catch_up_loss(heads, x, z, t, h, order))
    with pytest.raises(ValueError, match=rf"\[{max(order, 1)}, 6, 2, 1, 1\]; it returned \[6, 2, 1, 1\]"):
        cud_mnist.catch_up_loss(lambda x, t: heads(x, t)[0], x, z, t, h, order)


def distillation_by_hand(student, teacher, ema, x, z, t, h, target):
    """The loss of each sample, in NumPy, one by one."""
    def v(net, point, time):
        return np.tanh(net.a[0].detach().numpy() @ point + time * net.b[0].detach().numpy())
    found = []
    for x_i, z_i, t_i, h_i in zip(x.numpy().reshape(-1, 2), z.numpy().reshape(-1, 2), t.tolist(), h.tolist()):
        h_i = min(h_i, (t_i - 1e-5) / (2 if target == "progressive" else 1))
        x_t = t_i * z_i + (1 - t_i) * x_i
        mine, slope = v(student, x_t, t_i), v(teacher, x_t, t_i)
        there, when = x_t - h_i * slope, max(1e-5, t_i - h_i)
        if target == "consistency":
            error = (x_t - t_i * mine) - (there - when * v(ema, there, when))
        elif target == "progressive":  # where two steps lead, as one step's slope
            end = there - h_i * v(teacher, there, when)
            error = mine - ((x_t - end) / (2 * h_i) if h_i > 1e-9 else slope)
        else:
            error = mine - v(ema, there, when)
        found.append(np.mean(error ** 2))
    return np.array(found)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("target", ["consistency", "progressive", "ema"])
def test_distillation_equals_a_computation_by_hand(script, target):
    student, teacher, ema = Heads(1), Heads(3), Heads(1)
    teacher.a.data *= 0.7
    ema.a.data *= 0.5
    x, z, _, h = case()
    t = torch.tensor([0.9, 0.5, 0.05, 1e-4, 5e-5, 1e-5], dtype=torch.float64)  # most steps pass the data
    first = [lambda x, t, network=network: network(x, t)[0] for network in (teacher, ema)]
    loss = script.distillation_loss(student, *first, x, z, t, h, target)
    by_hand = distillation_by_hand(student, teacher, ema, x, z, t, h, target)
    np.testing.assert_allclose(loss.detach().numpy(), by_hand, rtol=1e-9, atol=1e-18)
    loss.sum().backward()
    assert student.a.grad.abs().sum() > 0
    assert all(p.grad is None for net in (teacher, ema) for p in net.parameters())


@pytest.mark.parametrize("target", ["consistency", "progressive", "ema"])
def test_on_straight_paths_the_teacher_is_its_own_target(target):
    x, z, _, h = case()
    t = torch.tensor([1.0, 0.5, 0.05, 1e-3, 1e-4, 2e-5], dtype=torch.float64)

    def velocity(x, t):  # all paths are straight and end in 0.3: v = (x - 0.3) / t
        return (x - 0.3) / t.view(-1, 1, 1, 1)
    x_t = t.view(-1, 1, 1, 1) * z + (1 - t.view(-1, 1, 1, 1)) * x
    scale = velocity(x_t, t).square().flatten(1).mean(1)
    for factor, least, most in ((1.0, -1, 1e-18), (1.1, 1e-6, 1)):  # the student is the teacher, or is not
        def student(x, t, factor=factor):
            return factor * velocity(x, t)[None]
        loss = cud_mnist.distillation_loss(student, velocity, velocity, x, z, t, h, target)
        assert (loss > least * t ** 2 * scale).all() and (loss < most * scale).all()


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_method_s_section_runs_alone(script):
    text = Path(script.__file__).read_text()
    section = re.search(r"# -+ the method\n(.*?)\n# -+ network", text, re.S)[1].split("DB3 = ")[0]
    assert len(text.split("\n    return (v - y).square()")[0].splitlines()) < (
        180 if script is cud_imagenet64 else 150)
    alone, readme = {"torch": torch}, (HERE / "README.md").read_text()
    exec(section, alone)
    block = next(b for b in re.findall(r"```python\n(.*?)```", readme, re.S) if "catch_up_loss(" in b)
    block = block.replace("from cud_mnist import catch_up_loss\n", "")
    exec(block, alone)
    assert alone["x"].shape == alone["z"].shape and alone["x"].isfinite().all()


def small_args(*flags):
    return cud_mnist.parse_args([*TINY, *flags])


def small_unet(**options):
    return cud_mnist.UNet((1, 28, 28), 8, [1, 2], 1, attention=[], dropout=0.0, **options)


def test_learned_coupling_the_ramp_and_the_log():
    torch.manual_seed(0)
    network, encoder = small_unet(heads=2), small_unet(c_out=2, skip_phi=0.5)
    for p in [*network.heads.parameters(), *encoder.heads.parameters()]:  # away from the near-zero start
        nn.init.normal_(p, std=0.1)
    x, noise = torch.randn(2, 5, 1, 28, 28)
    t, h = torch.tensor([0.03, 0.3, 0.55, 0.8, 1.0]), torch.full((5,), 0.05)
    mu, log_var = encoder(x, torch.ones(5))[0].chunk(2, 1)
    q = torch.distributions.Normal(mu, (log_var / 2).exp())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).flatten(1).mean(1)
    catchup, truth = cud_mnist.catch_up_loss(network, x, mu + q.stddev * noise, t, h, 2)
    args = small_args("--rk-order", "2", "--loss-ramp", "--kl-weight", "7")
    loss, log = cud_mnist.CatchUp(network, encoder, None, args)(x, noise, t, h, 0.25)
    each = 0.5 * catchup + 1.5 * truth + 7 * kl
    assert_close(loss, each.mean())
    means = [part.mean() for part in (each, catchup, truth, kl, each[0], each[1], each[2], each[3:])]
    assert_close(log[0] / log[1], torch.stack(means).detach())
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.heads.parameters())


def test_step_rules():
    t, uniform = torch.tensor([0.2, 0.8]), torch.tensor([0.5, 0.25])
    rules = {rule: cud_mnist.step_size(rule, t, 16, uniform).tolist() for rule in cud_mnist.STEP_RULES}
    assert rules == {"uniform": pytest.approx([1/32, 1/64]), "proportional": pytest.approx([0.0125, 0.05]),
                     "constant": [1/16, 1/16]}


# -------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("script, one_head, further_head, encoder, recipe", [
    (cud_mnist, 2_155_201, 705, 2_155_778, (50_000, 256, 3e-4)),
    (cud_cifar10, 55_732_739, 7_427, 2_208_966, (500_000, 128, 2e-4))])
def test_defaults_are_the_paper_s(script, one_head, further_head, encoder, recipe, monkeypatch):
    args, sizes, fit = script.parse_args(["--rk-order", "2"]), [], []
    assert (args.iterations, args.batch_size, args.lr) == recipe
    assert (args.warmup, args.ema_decay, args.kl_weight, args.intervals) == (5_000, 0.9999, 20, 16)
    assert (args.skip_phi, args.one_step_iterations, args.target) == (0.75, 40_000, "online")
    assert getattr(args, "flip", False) == (script is cud_cifar10)  # a mirrored digit is no digit
    monkeypatch.setattr(script, "prepare", lambda network, *_: sizes.append(
        sum(p.numel() for p in network.parameters())) or network)
    monkeypatch.setattr(script, "fit", lambda *given: fit.append(given))
    with torch.device("meta"):
        script.train(args, torch.device("meta"), dummy(script))
    assert sizes == [one_head + further_head, encoder]
    assert (fit[0][0].iterations, fit[0][0].warmup) == (args.iterations, 5_000)


def test_time_embedding_and_skip_scaling():
    torch.manual_seed(0)
    t, x, seen = torch.tensor([0.0, 0.3, 1.0]), torch.randn(3, 1, 28, 28), {}
    plain = small_unet(skip_phi=0.5)
    scaled = small_unet(skip_phi=0.75)
    scaled.load_state_dict(plain.state_dict())
    for name, network in (("plain", plain), ("scaled", scaled)):
        network.embed.register_forward_pre_hook(lambda m, inputs: seen.update(embedding=inputs[0]))
        network.decoder[0].register_forward_pre_hook(lambda m, x, name=name: seen.update({name: x[0]}))
        network(x, t)
    half = len(seen["embedding"][0]) // 2
    for b, i in np.ndindex(3, half):  # sin first, frequencies from 1 down to 1e-4, t as it is
        angle = t[b].item() * 10_000 ** (-i / (half - 1))
        assert seen["embedding"][b, i].item() == pytest.approx(math.sin(angle), abs=1e-6)
        assert seen["embedding"][b, half + i].item() == pytest.approx(math.cos(angle), abs=1e-6)
    for b, p in enumerate([0.75, 0.3 * -0.5 + 0.75, 0.25]):  # 16 channels of h, then the skip's 16
        assert_close(seen["scaled"][b, :16], 2 * p * seen["plain"][b, :16])
        assert_close(seen["scaled"][b, 16:], 2 * (1 - p) * seen["plain"][b, 16:])


def test_attention_equals_its_definition():
    torch.manual_seed(0)
    block = cud_mnist.Block(8, 8, 16, 0.0, attention=True)
    nn.init.normal_(block.proj.weight)
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 16)
    got = block(x, emb)
    block.attention = False
    h = block(x, emb)
    q, k, v = block.qkv(block.norm3(h)).flatten(2).chunk(3, 1)  # [B, C, H W]
    weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / 8 ** 0.5, -1)
    mixed = torch.einsum("bij,bcj->bci", weights, v).view_as(h)
    assert_close(got, (h + block.proj(mixed)) / 2 ** 0.5)


def test_training_costs_4_6_8_forward_passes():
    counts = []
    for order in (1, 2, 3):
        module = cud_mnist.CatchUp(small_unet(heads=order), None, None, small_args("--rk-order", str(order)))
        x, t = torch.randn(2, 1, 28, 28), torch.tensor([0.5, 0.9])
        with cud_mnist.FlopCounterMode(display=False) as total:
            module(x, x, t, t / 16, 0.0)[0].backward()
        with cud_mnist.FlopCounterMode(display=False) as forward:
            module.network.velocity(x, t)
        counts.append(total.get_total_flops() / forward.get_total_flops())
    assert counts == pytest.approx([4, 6, 8], rel=0.03)


# ------------------------------------------------------------------------------------ the released code

RELEASED = json.loads((HERE / "assets/released.json").read_text())  # "how": how weights and draws are made


def laid_in(network, seed, shapes):
    """The network in float64, its parameters drawn in the order of RELEASED["how"]."""
    rng, parameters = np.random.RandomState(seed), []
    parts = [network.embed, getattr(network, "embed_class", None), network.first, network.encoder,
             network.bottom, network.decoder, network.heads]
    for layer in (layer for part in parts if part is not None for layer in part.modules()):
        for name, parameter in layer.named_parameters(recurse=False):
            parameters.append((parameter, isinstance(layer, nn.GroupNorm) and name == "weight"))
    assert [list(parameter.shape) for parameter, _ in parameters] == shapes
    for parameter, is_scale in parameters:
        parameter.data = torch.from_numpy(0.1 * rng.standard_normal(parameter.shape) + is_scale)
    return network


def released_ddpm(script, heads=3, **encoder):
    about = RELEASED["ddpm++"]
    network = script.UNet((1, 16, 16), 8, [2, 2], 1, [16], 0.0, heads=1 if encoder else 3, **encoder)
    shapes = about["encoder_parameter_shapes" if encoder else "parameter_shapes"]
    network = laid_in(network, 1 if encoder else 0, shapes)
    network.heads = network.heads[:heads]
    network.choose(None)
    return network


def released_adm(heads=3):
    network = cud_imagenet64.UNet((3, 16, 16), 128, [1, 1], 1, [8], 0.0, 10, heads=3)
    network = laid_in(network, 2, RELEASED["adm"]["parameter_shapes"])
    network.heads = network.heads[:heads]
    return network


def released_draws(about, script, rule="uniform"):
    rng, size = np.random.RandomState(7), (about["batch"], *about["image"])
    x, z = rng.uniform(-1, 1, size), rng.standard_normal(size)
    r, s = rng.uniform(0, 1, 4), rng.uniform(0, 1, 4)
    r[0], s[0] = 0.01, 0.9
    x, z, r, s = (torch.from_numpy(part) for part in (x, z, r, s))
    t = 1e-5 + (1 - 1e-5) * r
    return x, z, t, script.step_size(rule, t, 16, s)


def figures(x):
    mean, square = x.mean().item(), x.square().mean().item()
    return {"mean": mean, "mean_square": square, "first": x.flatten()[:4].tolist()}


def gradient_norm(network):
    return math.sqrt(sum(p.grad.square().sum() for p in network.parameters() if p.grad is not None))


def losses(module, batch, names):
    """What the script's own loss module gives for a batch, after its backward pass; and the total."""
    loss, log = module(*batch)
    loss.backward()
    means = dict(zip(module.columns, (log[0] / log[1]).tolist()))
    found = {name: means[name] for name in names}
    return found | {"gradient_norm": gradient_norm(module.network)}, loss.item()


def agree(got, expected, tolerance):
    """Every number of a part of the file, whatever its shape."""
    if isinstance(expected, (dict, list)):
        assert len(got) == len(expected)
        for key in expected if isinstance(expected, dict) else range(len(expected)):
            agree(got[key], expected[key], tolerance)
    else:
        assert got == pytest.approx(expected, rel=tolerance)


def ddpm_figures(script, part):
    """The script's figures for a part of RELEASED["ddpm++"], in its shape."""
    about = RELEASED["ddpm++"]
    x, z, t, h = released_draws(about, script)
    if part.startswith("loss"):
        learned, found = "learned" in part, {}
        for name in about[part]:
            order, rule = int(name[6]), "uniform" if learned else name[9:]
            encoder = released_ddpm(script, c_out=2, skip_phi=0.5) if learned else None
            args = script.parse_args([*TINY, "--rk-order", str(order)])
            module = script.CatchUp(released_ddpm(script, order), encoder, None, args)
            found[name], _ = losses(module, (*released_draws(about, script, rule), 0.0),
                                    ["catchup", "truth", *["kl"] * learned])
            if learned:
                found[name]["encoder_gradient_norm"] = gradient_norm(encoder)
        return found
    network = released_ddpm(script)
    if part == "one-step stage":
        path, found, network = [], {}, released_ddpm(script, 1)
        with torch.no_grad():
            common.euler(network.velocity, z, 16, trajectory=path)
        hats = {i: at - time * v for i, (time, at, v) in enumerate(path, 1)}
        found = {f"x0_hat at evaluation {i} of 16": figures(hats[i]) for i in (9, 12, 15)}
        loss, log = script.OneStep(network, lambda z, t: 0.9 * network.velocity(z, t))(z, hats[9])
        loss.backward()
        mse, to_ema = log[0, 1:].tolist()
        return found | {"loss for evaluation 9, v_ema = 0.9 v": dict(
            mse=mse, to_ema=to_ema, total=loss.item(), gradient_norm=gradient_norm(network))}
    with torch.no_grad():  # only numbers are wanted
        if part.startswith("v at"):
            x_t = t.view(-1, 1, 1, 1) * z + (1 - t.view(-1, 1, 1, 1)) * x
            return [figures(v) for v in network(x_t, t)]
        if part.startswith("samples"):
            found = {}
            for name in about[part]:
                network.choose(int(name[-1]))
                found[name] = figures(common.euler(network.sampled, z, int(name.split()[0]))[0])
            return found
        t = torch.tensor([3, 8, 12, 16], dtype=torch.float64) / 16  # progressive distillation
        x_t, h = t.view(-1, 1, 1, 1) * z + (1 - t.view(-1, 1, 1, 1)) * x, torch.full_like(t, 1 / 16)
        v = network.velocity(x_t, t)
        points, _ = script.catch_up_points(network.velocity, x_t, t, h, v, 2, "published")
        slope = (x_t - points[1]) / (2 / 16)
        mse = script.distillation_loss(lambda x, t: network(x, t)[:1], network.velocity, None, x, z, t, h,
                                       "progressive").mean().item()
        return {"teacher's mean slope over two steps": figures(slope), "mse": mse}


def adm_figures(part):
    """cud_imagenet64's figures for a part of RELEASED["adm"], in its shape."""
    about, labels, script = RELEASED["adm"], torch.arange(4), cud_imagenet64
    x, z, t, h = released_draws(about, script)
    if part.startswith("v at"):
        x_t = t.view(-1, 1, 1, 1) * z + (1 - t.view(-1, 1, 1, 1)) * x
        return [figures(v) for v in released_adm()(x_t, t, labels)]
    if part.startswith("samples"):
        network, found = released_adm(1), {}
        for name, solver, steps in (("4 Euler steps", "euler", 4), ("6 steps of AB2", "ab2", 6)):
            with torch.no_grad():
                end, _ = common.SOLVERS[solver](lambda x, t: network.velocity(x, t, labels), z, steps)
            found[name] = figures(end.clamp(-1, 1))
        return found
    found, weight = {}, "1" if part.startswith("wavelet") else "0"
    for order in (1, 2, 3) if weight == "0" else (1,):
        args = script.parse_args(["--data", "x", "--wavelet-weight", weight, "--rk-order", str(order)])
        module = script.CatchUp(released_adm(order), None, args)
        names = ["catchup", "truth"] if weight == "0" else ["wavelet"]
        got, total = losses(module, (x, z, t, h, 0.0, labels), names)
        found[f"order {order}, uniform"] = got if weight == "0" else got | {"total": total}
    return found if weight == "0" else found["order 1, uniform"]


@pytest.mark.parametrize("script", [cud_mnist, cud_cifar10])
@pytest.mark.parametrize("part", list(RELEASED["ddpm++"])[10:])
def test_released_ddpm(script, part):
    agree(ddpm_figures(script, part), RELEASED["ddpm++"][part], 1e-11)


@pytest.mark.parametrize("part", list(RELEASED["adm"])[11:])
def test_released_adm(part):
    agree(adm_figures(part), RELEASED["adm"][part], 1e-9 if part.startswith("wavelet") else 1e-11)


# ------------------------------------------------------------------------------------------------- distances


def test_frechet_distance_of_two_gaussians():
    rng = np.random.default_rng(0)
    sets, fits = [], []
    for shift in (0.0, 1.5):
        mix = rng.normal(size=(6, 6))
        sets.append(torch.tensor(rng.normal(size=(900, 6)) @ mix + shift, dtype=torch.float32))
        fits.append((sets[-1].double().numpy().mean(0), np.cov(sets[-1].double().numpy().T)))
    (mean_a, cov_a), (mean_b, cov_b) = fits
    closed = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    a, b = (cud_mnist.moments(lambda part: part, x) for x in sets)
    assert cud_mnist.frechet_distance(a, b) == pytest.approx(closed, rel=1e-9)
    assert cud_mnist.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    halves = [cud_mnist.moments(lambda part: part, half) for half in (sets[0][:400], sets[0][400:])]
    assert_close(halves[0].add(halves[1]), a)


def test_straightness_and_samples():
    class Growth:  # dx/dt = -2 x: ten Euler steps of -1/10 multiply by 1.2 each
        @staticmethod
        def sampled(x, t):
            return -2.0 * x
    args = small_args("--seed", "4")
    images, nfe, bend, x0_hats = cud_mnist.sample(Growth, 1000, "euler", 10, args, torch.device("cpu"))
    z = torch.cat([cud_mnist.normal(500, "cpu", 4, 1, i) for i in range(2)])
    assert nfe == 10 and (images.int() - common.to_uint8(z * 1.2 ** 10).int()).abs().max() <= 1  # rounding
    square = z.square().mean().item()
    path = 1.2 ** np.arange(10)
    assert bend == pytest.approx(square * np.mean((-2 * path - (1 - 1.2 ** 10)) ** 2), rel=0.01)
    assert torch.equal(x0_hats[0, :5], common.to_uint8(3 * cud_mnist.normal(500, "cpu", 4, 1, 1))[:5])


# ------------------------------------------------------------------------------------------------------ data


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_glyphs(shape):
    images, labels = common.glyphs(400, shape, seed=3)
    again, _ = common.glyphs(400, shape, seed=3)
    assert images.shape == (400, *shape) and images.dtype == torch.uint8 and torch.equal(images, again)
    assert labels.unique().tolist() == list(range(10)) and images.amax((1, 2, 3)).min() > 150
    dark = images[..., :1, :1].int()  # a corner, and the difference to it: white on black again
    images = ((images - dark).abs().sum(1, keepdim=True) / (images - dark).abs().sum(1, keepdim=True).amax(
        (1, 2, 3), keepdim=True) * 255).round()
    flat = images.flatten(1).float()
    means = torch.stack([flat[labels == d].mean(0) for d in range(10)])
    nearest = torch.cdist(flat, means).argmin(1)
    assert (nearest == labels).float().mean() > 0.8  # ten classes that the eye, and a mean, can tell apart
    edge = torch.cat([images[..., 0, :], images[..., -1, :], images[..., :, 0], images[..., :, -1]], -1)
    assert (edge > 0).float().mean() < 0.01  # no digit is cut off


def test_uint8_round_trip_and_grid():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(common.to_uint8(common.to_float(levels)), levels)
    assert common.to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
    images = torch.randint(0, 255, (5, 3, 4, 4), dtype=torch.uint8)
    common.save_grid(images, "grid.png", columns=3, zoom=1)
    pixels = np.asarray(Image.open("grid.png"))
    assert pixels.shape == (12, 18, 3)
    assert (pixels[7:11, 1:5] == images[3].permute(1, 2, 0).numpy()).all()  # the fourth begins the second row


def write_idx(folder, images, labels, monkeypatch):
    """MNIST's format for arrays of ours; their MD5 become the official ones."""
    import gzip
    Path(folder).mkdir()
    for name, array in (("t10k-images-idx3-ubyte.gz", images), ("t10k-labels-idx1-ubyte.gz", labels)):
        header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
        path = Path(folder) / name
        path.write_bytes(gzip.compress(header + array.tobytes()))
        monkeypatch.setitem(common.MNIST_MD5, name, common.md5(path))


def test_mnist_files(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (7, 28, 28), np.uint8)
    write_idx("mnist", images, np.arange(7, dtype=np.uint8), monkeypatch)
    got, classes = common.load_mnist("mnist", "test", (1, 28, 28))
    assert (got.numpy()[:, 0] == images).all() and classes.tolist() == list(range(7))


@pytest.mark.skipif(not REAL.exists(), reason="no real MNIST beside the project")
def test_real_mnist():
    images, labels = common.load_mnist(REAL / "mnist", "test", (1, 28, 28))
    assert images.shape == (10_000, 1, 28, 28) and labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert images.float().mean().item() == pytest.approx(33.79, abs=0.01)


@pytest.fixture
def cifar(monkeypatch):
    """Five batches of four random images and a test batch of three, in every form that users have them."""
    def string(self, value):  # Python 2 wrote what Python 3 reads as bytes
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    class Python2(pickle._Pickler):
        dispatch = {**pickle._Pickler.dispatch, bytes: string}

    rng, made = np.random.default_rng(0), {}
    for folder in ("cifar-10-batches-py", "cifar-10-batches-bin", "pictures/train", "pictures/test"):
        Path(folder).mkdir(parents=True)
    for name, n in [*((f"data_batch_{i}", 4) for i in range(1, 6)), ("test_batch", 3)]:
        images, labels = rng.integers(0, 256, (n, 3, 32, 32), np.uint8), rng.integers(0, 3, n)
        made[name] = images, labels
        rows = np.concatenate([labels[:, None].astype(np.uint8), images.reshape(n, -1)], 1)
        Path(f"cifar-10-batches-bin/{name}.bin").write_bytes(rows.tobytes())
        content = {b"batch_label": b"x", b"labels": labels.tolist(), b"data": images.reshape(n, -1)}
        file = io.BytesIO()
        Python2(file, protocol=2).dump(content)
        old = file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        Path(f"cifar-10-batches-py/{name}").write_bytes(old)
        for i, (image, label) in enumerate(zip(images, labels)):
            folder = Path("pictures/test" if name == "test_batch" else "pictures/train") / f"class{label}"
            folder.mkdir(exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{name}_{i}.png")
    for kind in ("binary", "python"):
        with tarfile.open(f"cifar-10-{kind}.tar.gz", "w:gz") as archive:
            archive.add(f"cifar-10-batches-{kind[:3] if kind == 'binary' else 'py'}")
    with zipfile.ZipFile("pictures.zip", "w") as archive:
        for file in Path("pictures").rglob("*.png"):
            archive.write(file)
    Path("data/cifar10").mkdir(parents=True)
    shutil.copy("cifar-10-binary.tar.gz", "data/cifar10")  # downloaded earlier
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
    got, classes = common.load_cifar10(path, split, (3, 32, 32))
    assert got.dtype == torch.uint8 and np.array_equal(got, images) and classes.tolist() == labels.tolist()


def test_bad_cifar10_is_named(cifar):
    def refused(path, *said):
        before = {file: file.read_bytes() for file in Path().rglob("*") if file.is_file()}
        with pytest.raises(common.InputError) as error:
            common.load_cifar10(path, "train", (3, 32, 32))
        assert all(part in str(error.value) for part in said) and "\n" not in str(error.value), error.value
        assert before == {file: file.read_bytes() for file in Path().rglob("*") if file.is_file()}

    Path("cifar-10-batches-py/data_batch_3").write_bytes(pickle.dumps({b"data": Payload(), b"labels": []}))
    refused("cifar-10-batches-py", "data_batch_3", "asks for", "mkdir")
    assert not Path("run_by_the_pickle").exists()
    Path("cifar-10-batches-bin/data_batch_5.bin").unlink()
    refused("cifar-10-batches-bin", "data_batch_5 in cifar-10-batches-bin")
    whole = Path("cifar-10-binary.tar.gz").read_bytes()
    Path("cifar-10-binary.tar.gz").write_bytes(whole[:len(whole) // 2])
    refused("cifar-10-binary.tar.gz", "cifar-10-binary.tar.gz is damaged")
    Path("pictures/train/class0/._0.png").write_bytes(b"what macOS leaves")
    assert len(common.load_cifar10("pictures", "train", (3, 32, 32))[0]) == 20
    Path("classes/train").mkdir(parents=True)  # a class may have that name
    Path("classes/tram").mkdir()
    for file in ("classes/train/1.png", "classes/tram/2.png"):
        Image.new("RGB", (32, 32)).save(file)
    assert common.load_cifar10("classes", "train", (3, 32, 32))[1].tolist() == [0, 1]
    Image.new("RGB", (32, 31)).save("pictures/train/class0/odd.png")
    refused("pictures", "class0/odd.png", "32x31, not 32x32")
    Path("pictures/train/class0/odd.png").write_bytes(b"no picture")
    refused("pictures", "class0/odd.png", "cannot identify")
    Path("pictures.zip").write_bytes(Path("pictures.zip").read_bytes()[:-9])
    refused("pictures.zip", "pictures.zip is damaged", "a .zip that is whole")
    refused("nowhere", "nowhere")
    refused("data", "data holds no train pictures")


@pytest.mark.skipif(not REAL.exists(), reason="no real CIFAR-10 beside the project")
def test_real_cifar10():
    start = time.time()
    images, labels = common.load_cifar10(REAL / "cifar10-train-jpeg.zip", "train", (3, 32, 32))
    assert images.shape == (50_000, 3, 32, 32) and labels.bincount().tolist() == [5_000] * 10
    assert time.time() - start < 30
    mean = images.float().mean((0, 2, 3))  # of the official images: 125.3, 123.0, 113.9
    assert mean.tolist() == pytest.approx([125.3, 123.0, 113.9], abs=0.5)


@pytest.mark.parametrize("script", [cud_cifar10, cud_imagenet64])
def test_flips_mirror_every_other_image_and_change_nothing_else(script, monkeypatch):
    draws, labels = [], torch.arange(40) % 10
    monkeypatch.setattr(script, "fit", lambda stage, *_: draws.append(stage.draw))
    images = torch.randint(0, 256, (40, *script.IMAGE), dtype=torch.uint8)
    for flag in ("--flip", "--no-flip"):
        args = script.parse_args([*TINY, flag, *shlex.split("--batch-size 400 --attention 32")])
        script.train(args, torch.device("cpu"), common.describe(images, labels, "noise"))
    flipped, plain = (draw(3) for draw in draws)
    which = (plain[0][:, None] == common.to_float(images)).flatten(2).all(2)  # [400, 40]
    assert (which.sum(1) == 1).all()
    if script is cud_imagenet64:
        assert torch.equal(labels[which.int().argmax(1)], plain[5])
    mirrored = (flipped[0] == plain[0].flip(3)).flatten(1).all(1)
    assert torch.equal(flipped[0][~mirrored], plain[0][~mirrored]) and 150 < mirrored.sum() < 250
    assert all(torch.equal(a, b) for a, b in zip(flipped[1:4], plain[1:4]))


def test_clean_fid_s_statistics_of_cifar10(monkeypatch):
    rng, fetched = np.random.default_rng(0), []
    features = rng.normal(size=(900, 6)) @ rng.normal(size=(6, 2048)) + 1

    def download(urls, path):
        fetched.append(urls[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, mu=features.mean(0), sigma=np.cov(features.T))
    monkeypatch.setattr(common, "download", download)
    args = cud_cifar10.parse_args(["--split", "test"])
    known, digest = cud_cifar10.precomputed(args)
    path = next(Path("data/cache").glob("*.npz"))
    assert digest == common.sha256(path) == Path(f"{path}.sha256").read_text()
    computed = cud_cifar10.moments(lambda x: x, torch.tensor(features))
    assert_close(cud_cifar10.covariance(known), cud_cifar10.covariance(computed), rtol=1e-9, atol=1e-9)
    assert_close(known.sum / known.n, computed.sum / computed.n, rtol=1e-9, atol=1e-9)
    assert fetched == [cud_cifar10.STATISTICS + "cifar10_legacy_tensorflow_test_32.npz"]
    assert not cud_cifar10.precomputed(cud_cifar10.parse_args(["--data", "glyphs"]))
    monkeypatch.setattr(common, "download", lambda *_: (_ for _ in ()).throw(common.InputError("no network")))
    assert not cud_cifar10.precomputed(cud_cifar10.parse_args(["--fid-mode", "clean"]))
    path.write_bytes(path.read_bytes() + b"x")
    refused(lambda: cud_cifar10.precomputed(args), "is not what it was at its first use")


def test_download_tries_the_mirrors_and_leaves_no_half_file(tmp_path):
    (tmp_path / "good").write_bytes(b"good")
    (tmp_path / "bad").write_bytes(b"bad")
    missing, bad, good = ((tmp_path / name).as_uri() for name in ("missing", "bad", "good"))
    md5 = common.md5(tmp_path / "good")
    common.download([missing, bad, good], Path("data/file"), md5)
    assert Path("data/file").read_bytes() == b"good" and os.listdir("data") == ["file"]
    with pytest.raises(common.InputError, match="wrong MD5.*put it at"):
        common.download([bad], Path("data/other"), md5)
    assert os.listdir("data") == ["file"]


# ------------------------------------------------------------------------------------------------ whole runs


def run(*flags, capsys=None):
    """main() in this process; returns the exit status and the lines on stderr."""
    if capsys:
        capsys.readouterr()
    status = cud_mnist.main([*TINY, *flags])
    return status, capsys.readouterr().err.splitlines() if capsys else None


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """--quick, shortened; returns its folder."""
    folder, before = tmp_path_factory.mktemp("quick"), os.getcwd()
    os.chdir(folder)
    more = shlex.split("--steps 1 3 --fid-samples 300 --checkpoint-every 20")
    try:
        assert cud_mnist.main(QUICK + more) == 0
    finally:
        os.chdir(before)
    return folder


def test_quick_leaves_a_whole_run(quick, monkeypatch, capsys):
    monkeypatch.chdir(quick)
    folder = Path("runs/mnist-quick")
    names = ("config.json metrics.csv metrics.svg checkpoint.pt model.pt results.jsonl trajectory.png "
             "one_step.pt one_step_metrics.svg one_step_samples_000012.png samples_000020.png "
             "samples_000030.png samples_model_euler_3.png samples_one-step_euler_1.png")
    assert set(names.split()) <= set(os.listdir(folder))
    results = common.read_results(folder)
    rows = [("model EMA", 1), ("model EMA", 3), ("one-step EMA", 1)]
    assert [(r["weights"], r["steps"]) for r in results] == rows
    for r in results:
        assert r["figure"] == "FD (classifier)" and r["n"] == 300 and r["images_seen"] == 960
        assert 0 < r["floor"] < r["value"] < r["noise"] and r["features"].startswith("classifier-")
    assert results[0]["straightness"] < 1e-10 < results[1]["straightness"]  # one step is straight
    config = json.loads((folder / "config.json").read_text())
    assert config["args"]["iterations"] == 30 and config["torch"] == torch.__version__
    # finished: evaluated again with other flags, nothing trained, the same figures
    before = {name: (folder / name).read_bytes() for name in ("checkpoint.pt", "model.pt", "metrics.csv")}
    more = shlex.split("--steps 3 5 --solver heun --fid-samples 300 --save-samples 12 --checkpoint-every 7")
    assert cud_mnist.main(QUICK + more) == 0
    assert all((folder / name).read_bytes() == content for name, content in before.items())
    with np.load(folder / "samples.npz") as file:
        assert file["arr_0"].shape == (12, 28, 28, 1) and file["arr_0"].dtype == np.uint8
    again = common.read_results(folder)
    assert len(again) == 5 and results[1] in again  # three and two new ones: nothing doubled, nothing lost
    one_step = next(r for r in again if r["weights"] == "one-step EMA")
    assert one_step["value"] == pytest.approx(results[2]["value"])
    assert "heun" in capsys.readouterr().out
    more = shlex.split("--solver dopri5 --no-one-step --fid-samples 300 --tolerance 1e-2")
    assert cud_mnist.main(QUICK + more) == 0
    last = common.read_results(folder)[-1]
    assert last["solver"] == "dopri5" and last["nfe"] >= 8 and last["nfe"] % 6 == 2  # two to begin with


def test_quick_cifar10_is_continued_and_evaluated(capsys):
    flags = shlex.split("--fid-samples 300 --steps 1 3")
    assert cud_cifar10.main([*QUICK, "--iterations", "15", "--no-one-step", *flags]) == 0
    assert cud_cifar10.main([*QUICK, *flags, "--one-step", "--save-samples", "12"]) == 0
    out, folder = capsys.readouterr().out, Path("runs/cifar10-quick")
    assert "iterations 15 to 30" in out
    assert "against 600 drawn digits (their statistics computed here)" in out
    results = common.read_results(folder)
    assert [(r["weights"], r["steps"], r["images_seen"]) for r in results] == [
        *(("model EMA", steps, seen) for seen in (480, 960) for steps in (1, 3)), ("one-step EMA", 1, 960)]
    assert all(0 < r["floor"] < r["value"] < r["noise"] for r in results)
    with np.load(folder / "samples.npz") as file:
        assert file["arr_0"].shape == (12, 32, 32, 3) and file["arr_0"].dtype == np.uint8
    assert Image.open(folder / "samples_model_euler_3.png").mode == "RGB"


def test_a_run_folder_remembers_its_flags(capsys):
    folder = Path("runs/mnist")
    assert run("--iterations", "3", "--rk-order", "2", "--lr", "0.01", "--no-loss-ramp")[0] == 0
    config, checkpoint = ((folder / name).read_bytes() for name in ("config.json", "checkpoint.pt"))
    capsys.readouterr()
    assert cud_mnist.main(["--steps", "1", "3", "--solver", "heun"]) == 0  # runs/mnist is the default
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("from runs/mnist/config.json: "))
    for words in ("--rk-order 2", "--lr 0.01", "--data glyphs", "--multipliers 1 2"):
        assert words in line
    assert "--steps" not in line and "iterations 0 to" not in out
    assert (folder / "samples_model_head2_heun_3.png").exists()
    assert (config, checkpoint) == tuple((folder / n).read_bytes() for n in ("config.json", "checkpoint.pt"))
    for flags, message in (("--rk-order 1 --lr 0.01", "--rk-order (2 then, 1 now); leave"),
                           ("--rk-order 2 --seed 3 --attention 14", "--seed (0 then, 3 now), --attention")):
        assert cud_mnist.main(shlex.split(flags)) == 2
        assert message in capsys.readouterr().err
    assert cud_mnist.main(["--iterations", "5"]) == 0  # goes on, as it began
    assert "iterations 3 to 5" in capsys.readouterr().out
    now = json.loads((folder / "config.json").read_text())["args"]
    assert now == json.loads(config)["args"] | {"iterations": 5}
    (folder / "config.json").write_text('{"args": 3')
    assert cud_mnist.main(["--iterations", "5"]) == 2
    assert "runs/mnist/config.json is damaged" in capsys.readouterr().err


def grey_pictures(folder, shade, size=(28, 28)):
    for i in range(6):
        path = Path(folder) / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L" if i % 3 else "RGB", size, (shade + i,) * (1 if i % 3 else 3)).save(path)


def test_own_pictures_train_and_others_judge(capsys):
    grey_pictures("mine", 100)
    grey_pictures("others", 30)
    grey_pictures("large", 30, (32, 28))
    images, labels = common.load_mnist("mine", "train", (1, 28, 28))
    assert images[:, 0, 3, 3].tolist() == [100, 102, 104, 101, 103, 105]
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert run("--data", "mine", "--iterations", "2")[0] == 0
    assert run("--data", "others", "--iterations", "2")[0] == 0  # it is finished
    status, err = run("--data", "others", "--iterations", "3", capsys=capsys)
    assert status == 2 and re.search(r"is from other flags: --data \(\w+ then, \w+ now\)", err[0])
    assert run("--data", "mine", "--iterations", "3")[0] == 0
    shutil.move("mine", "moved")  # data is where it lies, not what the run is
    assert run("--data", "moved", "--iterations", "4")[0] == 0
    assert "--data large" not in run("--data", "large", "--iterations", "5", capsys=capsys)[1][0]
    assert "it is 32x28, not 28x28" in run("--data", "large", "--iterations", "5", capsys=capsys)[1][0]


def blank(*heads):
    """A network whose heads are constants."""
    network = small_unet(heads=len(heads))
    for head, value in zip(network.heads, heads):
        nn.init.zeros_(head[2].weight)
        nn.init.constant_(head[2].bias, value)
    return network


def test_the_head_that_samples_is_the_one_named(capsys):
    saved = {"model": blank(0.2, 0.4, 0.6).state_dict(), "args": blank(0, 0, 0).config, "images_seen": 7}
    torch.save(saved, "three.pt")
    flags = shlex.split("--model three.pt --data glyphs --fid-samples 0 --steps 4 --save-samples 8")
    z = cud_mnist.normal(8, "cpu", 0, 1, 0).permute(0, 2, 3, 1)
    for head, value in (("1", 0.2), ("2", 0.4), ("3", 0.6), (None, 0.6)):
        assert cud_mnist.main([*flags, *(["--head", head] if head else [])]) == 0
        samples = torch.from_numpy(np.load("runs/mnist/samples.npz")["arr_0"])
        assert (samples.int() - common.to_uint8(z - value).int()).abs().max() <= 1
        network = cud_mnist.load_model("three.pt", head=int(head) if head else None)
        x, t = torch.randn(2, 1, 28, 28), torch.rand(2)
        assert_close(network.sampled(x, t), torch.full_like(x, value))
        assert_close(network.velocity(x, t), torch.full_like(x, 0.2))
    assert len({Path(f"runs/mnist/samples_model_head{i}_euler_4.png").read_bytes() for i in (1, 2, 3)}) == 3
    assert cud_mnist.main([*flags, "--head", "4"]) == 2 and "--head 4: there are 3" in capsys.readouterr().err
    for heads, expected in ((1, [0.2]), (2, [0.2, 0.4]), (4, [0.2, 0.4, 0.6, 0.6])):
        begun = cud_mnist.begin_from(cud_mnist.load_model("three.pt"), heads, 0.1)
        assert begun(x, t).mean((1, 2, 3, 4)).tolist() == pytest.approx(expected)
        assert begun.config["heads"] == heads
    few = shlex.split("--iterations 2 --rk-order 2 --features classifier --fid-samples 230 --steps 1")
    assert run(*few)[0] == run(*few, "--head", "1")[0] == 0  # no flag of the training
    assert [row["head"] for row in common.read_results("runs/mnist")] == [2, 1]
    status, err = run(*few, "--head", "3", capsys=capsys)
    assert status == 2 and "--head 3: there are 2" in err[0]


def test_a_student_of_a_teacher(capsys):
    assert run(*shlex.split("--iterations 6 --rk-order 2 --coupling independent --run-dir teacher"))[0] == 0
    file = "teacher/model.pt"
    teacher = cud_mnist.load_model(file)
    x, t = torch.randn(2, 1, 28, 28), torch.rand(2)
    student = cud_mnist.begin_from(cud_mnist.load_model(file), 1, 0.0).eval()
    assert torch.equal(student.sampled(x, t), teacher.velocity(x, t))
    flags = ("--data", "glyphs", "--batch-size", "8", "--fid-samples", "0", "--steps", "2", "--teacher", file)
    for target in ("consistency", "progressive", "ema"):
        more = ("--target", target, "--run-dir")
        for iterations in ("3", "6"):
            assert cud_mnist.main([*flags, *more, target, "--iterations", iterations]) == 0
        assert cud_mnist.main([*flags, *more, f"{target}-whole", "--iterations", "6"]) == 0
        a, b = (torch.load(f"{name}/checkpoint.pt") for name in (target, f"{target}-whole"))
        assert all(torch.equal(x, y) for x, y in zip(leaves(a["module"]), leaves(b["module"])))
        assert a["definition"]["teacher"] == common.sha256(file)[:12] and a["definition"]["skip_phi"] == 0.75
        config = torch.load(f"{target}/model.pt")["args"]
        assert config["heads"] == 1 and config["multipliers"] == [1, 2]
        rows = common.read_table(f"{target}/metrics.csv")
        assert rows["truth"] == [0] * len(rows["truth"]) and rows["loss"] == rows["catchup"]
    args = cud_mnist.parse_args([*flags, "--run-dir", "new"])
    assert (args.step_rule, args.target, args.coupling, args.rk_order) == (
        "constant", "consistency", "independent", 1)
    for words, message in (("--rk-order 2", "--rk-order"), ("--target online", "--target online"),
                           ("--coupling learned", "--coupling"), ("--loss-ramp", "--loss-ramp"),
                           ("--init " + file, "--init"), ("--channels 16", "--channels (8 then, 16 now)"),
                           ("--skip-phi 0.5", "--skip-phi")):
        assert cud_mnist.main([*flags, *shlex.split(words), "--run-dir", "new"]) == 2
        assert message in capsys.readouterr().err
    assert run("--target", "progressive", capsys=capsys)[1][0].endswith("needs a --teacher")
    shutil.copy("consistency/model.pt", file)
    assert cud_mnist.main([*flags, "--run-dir", "ema", "--target", "ema", "--iterations", "9"]) == 2
    assert "--teacher (" in capsys.readouterr().err


def test_training_begins_with_a_model_file():
    assert run(*shlex.split("--iterations 6 --coupling independent --run-dir flow --rk-order 0"))[0] == 0
    flags = "--init flow/model.pt --rk-order 2 --lr 1e-9 --iterations 1 --run-dir on --data glyphs"
    assert cud_mnist.main(shlex.split(f"{flags} --batch-size 8 --fid-samples 0")) == 0
    x, t = torch.randn(2, 1, 28, 28), torch.rand(2)
    flow, on = (cud_mnist.load_model(f"{name}/model.pt") for name in ("flow", "on"))
    for v in on(x, t):  # both heads
        assert_close(v, flow.velocity(x, t), rtol=1e-4, atol=1e-6)
    assert common.read_table("on/metrics.csv")["truth"][0] > 0


@pytest.mark.parametrize("target", ["consistency", "progressive", "ema"])
def test_imagenet_students_are_told_the_class(target):
    args = cud_imagenet64.parse_args(["--data", "x"])
    args.target = target
    student, teacher, ema = small_adm(), small_adm(heads=2), small_adm()
    for i, network in enumerate((teacher, ema)):
        network.embed_class.weight.data += i + 1
    x, noise = torch.randn(2, 3, 3, 16, 16)
    t, h, labels = torch.tensor([0.1, 0.5, 0.9]), torch.full((3,), 1 / 16), torch.tensor([0, 4, 2])
    module = cud_imagenet64.CatchUp(student, ema.velocity, args, teacher.velocity)
    loss, log = module(x, noise, t, h, 0.5, labels)
    each = [cud_imagenet64.distillation_loss(
        lambda x, t, one=one: student(x, t, labels[one]), lambda x, t, one=one: teacher(x, t, labels[one])[0],
        lambda x, t, one=one: ema(x, t, labels[one])[0], x[one], noise[one], t[one], h[one], target)
        for one in (slice(i, i + 1) for i in range(3))]
    assert_close(loss, torch.cat(each).mean(), rtol=1e-4, atol=1e-5)
    assert log[0, 2:4].tolist() == [0, 0]  # neither truth nor wavelets


def test_a_model_file_is_evaluated_and_nothing_trained(capsys):
    few = shlex.split("--features classifier --fid-samples 230 --steps 1")
    assert run(*few, "--iterations", "6", "--evaluate-every", "2")[0] == 0
    rows = common.read_results("runs/mnist")
    assert [row["images_seen"] for row in rows] == [16, 32, 48]
    snapshot = Path("runs/mnist/model_0000002.pt")
    assert not Path("runs/mnist/model_0000006.pt").exists() and snapshot.exists()
    flags = ["--model", str(snapshot), "--run-dir", "judged", "--data", "glyphs"]
    for seed in ("0", "7"):
        assert cud_mnist.main([*flags, *few, "--sample-seed", seed]) == 0
    assert cud_mnist.main([*flags, *few]) == 0  # the same as seed 0: not counted twice
    first, second = common.read_results("judged")
    assert first["value"] == rows[0]["value"] != second["value"] and second["seed"] == 7
    assert first["model_sha256"] == common.sha256(snapshot)[:12] == rows[0]["model_sha256"]
    assert sorted(os.listdir("judged")) == ["results.jsonl", "samples_model_euler_1.png", "trajectory.png"]
    Path("runs/mnist/checkpoint.pt").unlink()
    Path("runs/mnist/checkpoint_previous.pt").unlink()
    before = Path("runs/mnist/model.pt").read_bytes()
    status, err = run("--iterations", "6", capsys=capsys)
    assert status == 2 and "model.pt has no checkpoint.pt to continue from" in err[0]
    assert Path("runs/mnist/model.pt").read_bytes() == before


def test_one_training_a_folder_and_no_result_is_lost(capsys):
    first = start(*LONG)
    metrics = Path("runs/mnist/metrics.csv")
    wait_for(first, lambda: metrics.exists() and len(table(metrics)) > 2)
    status, err = run("--iterations", "3", capsys=capsys)
    assert status == 2 and len(err) == 1 and "another process is at work in runs/mnist" in err[0]
    first.kill()
    first.wait()
    assert run("--iterations", "3")[0] == 0
    code = "import common\nfor i in range(300): common.add_result('.', dict(a={0}, b=i), dict(value='x'))"
    env = {**os.environ, "PYTHONPATH": str(HERE)}
    both = [subprocess.Popen([sys.executable, "-c", code.format(i)], env=env) for i in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    with open("results.jsonl", "a") as file:
        file.write("\n")  # as by one who took the other's line, half written, for cut by a kill
    common.add_result(".", {"a": 0, "b": 0}, {"value": "latest"})
    rows = common.read_results(".")
    assert len(rows) == 600 and [row["value"] for row in rows if row["a"] == row["b"] == 0] == ["latest"]


def test_a_signal_ends_an_evaluation_that_training_makes():
    slow = "import time; script.evaluate = lambda *_: time.sleep(90)"
    process = start("--iterations", "100", "--evaluate-every", "5", before=slow)
    wait_for(process, lambda: Path("runs/mnist/model_0000005.pt").exists())
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 143
    assert torch.load("runs/mnist/checkpoint.pt")["iteration"] == 5


def test_what_a_run_says_and_what_its_table_holds(monkeypatch, capsys):
    monkeypatch.setattr(cud_mnist, "LOG_EVERY", 8)
    monkeypatch.setattr(cud_mnist, "SPEAK_EVERY", 0)
    grid = common.save_grid
    monkeypatch.setattr(common, "save_grid", lambda *given, **more: (time.sleep(0.7), grid(*given, **more)))
    assert run("--iterations", "16", "--checkpoint-every", "2")[0] == 0
    out = capsys.readouterr().out
    assert re.search(r"iteration 8: loss [\d.]+, \d+ images/s, \d+ s left", out)
    commands = re.findall(r"^    python cud_mnist.py (.*)", out, re.M)
    assert len(commands) == 2 and all(cud_mnist.parse_args(shlex.split(words)) for words in commands)
    rows = common.read_table("runs/mnist/metrics.csv")
    assert min(rows["images_per_s"]) > 64 / 1.5  # three pictures of 0.7 s are not training
    lines = ElementTree.parse("runs/mnist/metrics.svg").getroot().iter("{http://www.w3.org/2000/svg}polyline")
    assert [len(line.get("points").split()) for line in lines][:3] == [2, 2, 2]


def test_the_gradient_s_norm(monkeypatch):
    monkeypatch.setattr(cud_mnist, "LOG_EVERY", 1)
    assert run("--iterations", "1", "--accumulate", "2")[0] == 0
    state = torch.load("runs/mnist/checkpoint.pt")["optimizer"]["state"]
    first = torch.cat([10 * part["exp_avg"].flatten() for part in state.values()])  # Adam keeps a tenth of it
    norms = common.read_table("runs/mnist/metrics.csv")["grad_norm"]
    assert norms == pytest.approx([first.norm().item()], rel=1e-4)


def test_line_chart_puts_points_where_they_belong():
    points = [(1, 10.0), (10, 100.0, 50.0), (100, 1000.0)]
    chart = ElementTree.fromstring(common.line_chart({"a": points}, "x", "y", x_ticks=[1, 10, 100]))
    line = next(chart.iter("{http://www.w3.org/2000/svg}polyline")).get("points")
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in line.split())
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert x0 < x1 and y0 > y1  # up is larger
    circles = chart.iter("{http://www.w3.org/2000/svg}circle")
    dots = [(float(circle.get("cx")), float(circle.get("cy"))) for circle in circles]
    assert dots == [(x0, y0), (x1, y1), (x2, y2)]


def test_attention_stands_at_the_sizes_named(capsys):
    network = cud_mnist.UNet((1, 28, 28), 8, [1, 2], 1, [14], 0.0)
    assert [block.attention for block in network.encoder] == [False, False, True]  # 28; half, 14
    assert [block.attention for block in network.decoder] == [False, True, False, False, False]
    status, err = run("--attention", "16", "--iterations", "1", capsys=capsys)
    assert status == 2 and "--attention [16]: the levels have the sizes [28, 14]" in err[0]


SMALL = shlex.split("--channels 4 --multipliers 1 2 --blocks 1 --batch-size 4 --iterations 2 --fid-samples 0")


def shortened(script, words):
    """A command's flags with a small network, a small budget and drawn digits."""
    flags = [*shlex.split(words.replace("FOLDER", "glyphs").replace("207 360", "2 3")), *SMALL]
    if script is cud_imagenet64:
        flags += ["--attention", "32"]
    if "--one-step" in flags or "--quick" in flags:
        flags += shlex.split("--one-step-iterations 1 --one-step-pairs 4")
    return [*flags, "--data", "glyphs"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_docstring_s_commands_work_one_after_the_other(script):
    text = script.__doc__.replace("torchrun --nproc-per-node 8", "python")
    commands = re.findall(rf"^    python {script.__name__}.py (.*?)   ", text, re.M)
    assert len(commands) == 3
    for words in commands:
        assert script.main(shortened(script, words)) == 0


def test_warm_up_ema_decay_and_log_rows(monkeypatch):
    decays, make = [], cud_mnist.get_ema_multi_avg_fn
    monkeypatch.setattr(cud_mnist, "get_ema_multi_avg_fn", lambda decay: decays.append(decay) or make(decay))
    monkeypatch.setattr(cud_mnist, "LOG_EVERY", 1)
    assert run("--iterations", "30", "--ema-decay", "0.6", "--lr", "0.01")[0] == 0
    rows = [row.split(",") for row in Path("runs/mnist/metrics.csv").read_text().splitlines()]
    assert [float(row[rows[0].index("lr")]) for row in rows[1:]] == pytest.approx(
        [0.01 / 3, 0.02 / 3] + [0.01] * 28)  # the paper's 5,000 iterations of warm-up, cut to a tenth of 30
    assert [row[:2] for row in rows[1:]] == [[str(i), str(8 * i)] for i in range(1, 31)]
    assert decays == pytest.approx([0.0] + [min(0.6, (1 + i) / (10 + i)) for i in range(1, 30)])


def test_one_step_pairs_and_loss():
    torch.manual_seed(0)
    args, network = small_args("--one-step-pairs", "7", "--seed", "2"), small_unet(heads=2).eval()
    nn.init.normal_(network.heads[0][2].weight, std=0.1)
    noise, targets = cud_mnist.one_step_pairs(args, network, torch.device("cpu"))
    assert noise.shape == (7, 1, 28, 28) and targets.shape == (7, 3, 1, 28, 28)
    x, hats = noise, []
    with torch.no_grad():
        for i in range(16):
            t = 1 - i / 16
            v = network(x, torch.full((7,), t))[0]
            hats.append(x - t * v)
            x = x - v / 16
        for j, evaluation in enumerate((9, 12, 15)):
            assert_close(targets[:, j].float(), hats[evaluation - 1], rtol=2e-3, atol=2e-3)
        module = cud_mnist.OneStep(network, lambda z, t: 0.5 * z)
        loss, log = module(noise, targets[:, 0].float())
        v = network(noise, torch.ones(7))[0]
        assert_close(loss, ((noise - v - targets[:, 0]) ** 2).mean() + 0.1 * ((v - noise / 2) ** 2).mean())


SCRIPT = "import sys, common, {0} as script; script.LOG_EVERY = 4; full = common.glyphs; " \
         "common.glyphs = lambda n, shape: full(600, shape); {1}; " \
         "common.run_main(lambda: script.main(sys.argv[1:]))"
EXACT = shlex.split("--rk-order 3 --coupling learned --dropout 0.3 --target ema --iterations 26 "
                    "--checkpoint-every 9 --one-step --one-step-iterations 9 --one-step-pairs 20")


def start(*flags, launcher=(), script="cud_mnist", before="pass", **variables):
    """The script in a process of its own, with 600 glyphs and a row of metrics.csv every 4 iterations.
    before: a statement that it runs first; variables: of its environment."""
    Path("go.py").write_text(SCRIPT.format(script, before))
    env = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen([sys.executable, *launcher, "go.py", *TINY, *flags], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def start_two(*flags, own=((), ()), **options):
    """Two ranks as a scheduler starts them, without torchrun, which would end one after the other; own: flags
    of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    return [start(*flags, *own[i], **both, RANK=str(i), LOCAL_RANK=str(i), **options) for i in range(2)]


def wait_for(process, condition, seconds=120):
    limit = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.time() < limit
        time.sleep(0.002)


def table(path):
    """A metrics.csv without the two columns of speed."""
    return [row.split(",")[:-2] for row in Path(path).read_text().splitlines()]


def leaves(tree):
    """The tensors and values in nested dicts and lists."""
    if isinstance(tree, (dict, list, tuple)):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves(branch)
    else:
        yield tree


def test_a_run_killed_and_continued_equals_one_never_stopped():
    whole = start(*EXACT, "--run-dir", "whole")
    assert whole.wait() == 0, whole.communicate()
    killed = start(*EXACT, "--run-dir", "killed")  # kill -9 between the checkpoints of iterations 9 and 18
    metrics, one_step = Path("killed/metrics.csv"), Path("killed/one_step_metrics.csv")
    wait_for(killed, lambda: metrics.exists() and len(table(metrics)) > 3)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert torch.load("killed/checkpoint.pt")["iteration"] == 9 and len(table(metrics)) > 3
    asked = start(*EXACT, "--run-dir", "killed")  # then SIGTERM in the one-step stage: saved, and status 143
    wait_for(asked, lambda: one_step.exists() and len(table(one_step)) > 3)
    asked.send_signal(signal.SIGTERM)
    out, err = asked.communicate()
    assert asked.returncode == 143 and "one_step_checkpoint.pt keeps iteration" in out, (out, err)
    assert 12 <= torch.load("killed/one_step_checkpoint.pt")["iteration"] < 27
    last = start(*EXACT, "--run-dir", "killed")
    assert last.wait() == 0, last.communicate()
    for name, rows in (("metrics.csv", 7), ("one_step_metrics.csv", 7)):
        assert table(f"killed/{name}") == table(f"whole/{name}") and len(table(f"whole/{name}")) == 1 + rows
    for name in ("checkpoint.pt", "one_step_checkpoint.pt", "model.pt", "one_step.pt"):
        a, b = torch.load(f"whole/{name}"), torch.load(f"killed/{name}")
        a, b = (list(leaves(part | {"token": 0})) for part in (a, b))  # drawn at each save
        assert len(a) == len(b) > 50
        assert all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(a, b)), name


def test_two_ranks_equal_one():
    flags = shlex.split("--rk-order 2 --dropout 0 --solver ab2 --lr 3e-3 --ema-decay 0.9")
    assert start(*flags, "--iterations", "40", "--run-dir", "one").wait() == 0
    before = torch.load("one/checkpoint.pt")["optimizer"]["state"]
    shutil.copytree("one", "two")  # one more iteration, from weights that have left their near-zero start
    flags += ["--iterations", "41", "--save-samples", "70"]
    assert start(*flags, "--run-dir", "one").wait() == 0
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    two = start(*flags, "--run-dir", "two", launcher=launcher)
    out, err = two.communicate()
    assert two.returncode == 0 and out.count("network parameters") == 1, (out, err)  # rank 0 alone speaks
    rows = [[float(cell or 0) for cell in table(f"{name}/metrics.csv")[-1]] for name in ("one", "two")]
    np.testing.assert_allclose(*rows, rtol=1e-4)  # an empty cell: no t in that quarter
    a, b = (torch.load(f"{name}/checkpoint.pt")["optimizer"]["state"] for name in ("one", "two"))
    for i in a:
        g, h = (10 * x[i]["exp_avg"] - 9 * before[i]["exp_avg"] for x in (a, b))  # the last gradient
        assert (g - h).abs().max() <= 1e-3 * g.abs().max() + 1e-6, i
    x, y = (np.load(f"{name}/samples.npz")["arr_0"].astype(int) for name in ("one", "two"))
    assert abs(x - y).max() <= 2 and x.std() > 10


LONG = ("--iterations", "100000", "--checkpoint-every", "100000")


def test_a_rank_that_dies_or_fails_alone_ends_the_others():
    one, two = start_two(*LONG)
    metrics = Path("runs/mnist/metrics.csv")
    wait_for(one, lambda: metrics.exists() and len(table(metrics)) > 2)
    two.kill()
    out, err = one.communicate(timeout=120)
    assert one.returncode not in (0, 143), (out, err)
    one, two = start_two(*LONG, "--run-dir", "other", own=((), ("--device", "mps")))
    out, err = two.communicate(timeout=120)
    assert two.returncode == 2 and "cud_mnist.py: error: rank 1: --device mps is not to be had here" in err
    assert one.wait(timeout=120) not in (0, 143)
    one, two = start_two("--rk-order", "7")
    (_, err), (_, silent) = one.communicate(timeout=120), two.communicate(timeout=120)
    assert one.returncode == two.returncode == 2 and "--rk-order" in err and "error" not in silent


def test_ranks_that_are_signalled_twice_save_once_and_wait_for_it():
    slow = "save = common.save_pt; common.save_pt = lambda *of: (time.sleep(1.5), save(*of))"
    one, two = start_two(*LONG, before=f"import time; {slow}")
    metrics, checkpoint = Path("runs/mnist/metrics.csv"), Path("runs/mnist/checkpoint.pt")
    wait_for(one, lambda: metrics.exists() and len(table(metrics)) > 2)
    for _ in range(3):
        for process in (one, two):
            process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
    two.communicate(timeout=60)
    assert checkpoint.exists() and two.returncode == 143
    out, err = one.communicate(timeout=60)
    assert one.returncode == 143, (out, err)
    assert out.count("stopped; runs/mnist/checkpoint.pt keeps iteration") == 1, out
    assert torch.load(checkpoint)["iteration"] > 4
    hasty = start(*LONG, "--run-dir", "hasty", before=f"import time; {slow.replace('1.5', '60')}")
    metrics = Path("hasty/metrics.csv")
    wait_for(hasty, lambda: metrics.exists() and len(table(metrics)) > 2)
    for _ in range(2):  # a second Ctrl-C does not wait for the file
        hasty.send_signal(signal.SIGINT)
        time.sleep(0.5)
    assert hasty.wait(timeout=20) == 130 and not Path("hasty/checkpoint.pt").exists()


def test_torchrun_that_is_stopped_leaves_a_checkpoint_and_a_long_run_says_how_long():
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    process = start(*LONG, "--iterations", "100000000", launcher=launcher)
    metrics = Path("runs/mnist/metrics.csv")
    wait_for(process, lambda: metrics.exists() and len(table(metrics)) > 7)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and out.count("checkpoint.pt keeps iteration") == 1, (out, err)
    assert torch.load("runs/mnist/checkpoint.pt")["iteration"] > 20
    assert re.search(r"at this speed [\d.]+ days remain .* a GPU is meant for this, or --quick", out), out


def test_inception_features_end_to_end(monkeypatch, capsys):
    monkeypatch.setattr(common, "download", lambda urls, path: (_ for _ in ()).throw(
        common.InputError(f"cannot download {urls[0]}; put it at {path} yourself")))
    flags = ("--iterations", "2", "--fid-samples", "2100")
    weights = Path("data/cache/inception-2015-12-05.pt")
    status, err = run(*flags, capsys=capsys)
    assert status == 2 and len(err) == 1 and weights.name in err[0] and "evaluates later" in err[0]
    assert Path("runs/mnist/samples_model_euler_2.png").exists() and Path("runs/mnist/model.pt").exists()
    weights.parent.mkdir(parents=True, exist_ok=True)
    weights.write_bytes(b"PK cut short")
    status, err = run(*flags, capsys=capsys)
    assert status == 2 and "cut short" in err[0]

    network = stand_in_inception()
    full = common.glyphs
    monkeypatch.setattr(common, "glyphs", lambda *args: tuple(torch.cat([part] * 7) for part in full(*args)))
    assert run(*flags, "--run-dir", "again")[0] == 0
    row = common.read_results("again")[0]
    digest = common.sha256(weights)
    assert row["figure"] == "FID-2.1k" and row["features"] == f"inception-legacy_tensorflow-{digest[:8]}"
    assert row["value"] > row["floor"] and Path(f"{weights}.sha256").read_text() == digest
    reference = torch.load(next(Path("data/cache").glob("moments-*")))
    images = full(600, (1, 28, 28))[0].repeat(7, 3, 1, 1).float()
    np.testing.assert_allclose(reference["sum"] / 4200, network(images).mean(0).detach(), rtol=1e-4)
    features, name = cud_mnist.inception_features("clean", torch.device("cpu"))
    big = [Image.fromarray(image[0].numpy()).resize((299, 299), Image.BICUBIC) for image in images[:2]]
    big = torch.tensor(np.stack(big)).clip(0, 255).unsqueeze(1).expand(-1, 3, -1, -1)
    expected = network.layers((big - 128) / 128)
    assert_close(features(images[:2, :1].byte()), expected, rtol=1e-4, atol=1e-5)

    class Planted(nn.Module):  # another one in its place is not even loaded
        def forward(self, x):
            return x
    torch.jit.script(Planted()).save(weights)
    monkeypatch.setattr(torch.jit, "load", lambda *_: pytest.fail("it was loaded"))
    status, err = run(*flags, "--run-dir", "again", capsys=capsys)
    assert status == 2 and len(err) == 1 and "is not what it was at its first use" in err[0], err
    assert len(common.read_results("again")) == 1


# ------------------------------------------------------------------------------------------------- ImageNet


def test_imagenet_defaults_are_the_paper_s(monkeypatch):
    args, sizes, fit = cud_imagenet64.parse_args(["--data", "x"]), [], []
    assert (args.iterations, args.batch_size, args.lr, args.warmup) == (500_000, 1024, 4e-4, 0)
    assert (args.ema_decay, args.dropout, args.flip) == (0.9999432189950708, 0.1, True)
    assert (args.wavelet_weight, args.skip_phi, args.rk_order) == (1, 0.75, 1)
    monkeypatch.setattr(cud_imagenet64, "prepare", lambda network, *_: sizes.append(
        sum(p.numel() for p in network.parameters())) or network)
    monkeypatch.setattr(cud_imagenet64, "fit", lambda *given: fit.append(given))
    monkeypatch.setattr(cud_imagenet64, "grid_labels", lambda *_: None)
    with torch.device("meta"):
        cud_imagenet64.train(args, torch.device("meta"), dummy(cud_imagenet64, 1000))
    assert sizes == [295_899_267] and (fit[0][0].iterations, fit[0][0].warmup) == (500_000, 0)


def small_adm(classes=5, **options):
    torch.manual_seed(0)
    network = cud_imagenet64.UNet((3, 16, 16), 8, [1, 2], 1, [8], 0.0, classes, **options)
    for p in network.parameters():  # away from the zeros that it starts with
        nn.init.normal_(p, std=0.1)
    return network


def test_a_class_changes_the_output_of_its_own_images_alone():
    network, x, t = small_adm(heads=2), torch.randn(4, 3, 16, 16), torch.rand(4)
    a, b = (network(x, t, torch.tensor(labels)) for labels in ([1, 2, 3, 4], [1, 0, 3, 4]))
    same = (a == b).flatten(2).all(2)
    assert same.tolist() == [[True, False, True, True]] * 2
    twice = network(torch.cat([x, 2 * x]), torch.cat([t, t / 2]), torch.tensor([1, 2, 3, 4]), slice(0, 1))[0]
    assert_close(twice[:4], a[0])
    assert_close(twice[4:], network.velocity(2 * x, t / 2, torch.tensor([1, 2, 3, 4])))


def test_adm_block_equals_its_definition():
    torch.manual_seed(0)
    block = cud_imagenet64.Block(64, 128, 16, 0.0, attention=True)
    for p in block.parameters():
        nn.init.normal_(p, std=0.1)
    x, emb = torch.randn(2, 64, 4, 4), torch.randn(2, 16)
    scale, shift = block.emb(emb).view(2, 2, 128, 1, 1).unbind(1)
    h = nn.functional.group_norm(block.conv1(nn.functional.silu(block.norm1(x))), 32)
    h = (h * block.norm2.weight[:, None, None] + block.norm2.bias[:, None, None]) * (1 + scale) + shift
    h = block.skip(x) + block.conv2(nn.functional.silu(h))
    q, k, v = block.qkv(block.norm3(h)).view(2, 3, 2, 64, 16).unbind(1)  # [B, heads, 64, H W]
    weights = torch.softmax(torch.einsum("bhci,bhcj->bhij", q, k) / 8, -1)
    mixed = torch.einsum("bhij,bhcj->bhci", weights, v).reshape(2, 128, 4, 4)
    assert_close(block(x, emb), h + block.proj(mixed), rtol=1e-4, atol=1e-4)


def test_adm_time_embedding():
    network, seen = small_adm(), []
    network.embed.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network(torch.randn(2, 3, 16, 16), torch.tensor([0.3, 1.0]), torch.tensor([0, 1]))
    for b, t in enumerate((0.3, 1.0)):  # cos first, frequencies from 1 down, t as it is
        angles = [t * 10_000 ** (-i / 4) for i in range(4)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        assert seen[0][b].tolist() == pytest.approx(expected, abs=1e-6)


def test_wavelet_details_and_loss():
    low = np.array(cud_imagenet64.DB3)
    high = np.array([(-1) ** (i + 1) * low[5 - i] for i in range(6)])
    for shift in range(3):  # orthonormal, and the high-pass filter is blind to parabolas: what makes it db3
        assert (low[2 * shift:] * low[:6 - 2 * shift]).sum() == pytest.approx(float(shift == 0), abs=1e-9)
        assert (np.arange(6) ** shift * high).sum() == pytest.approx(0, abs=1e-6)
    a, b = np.random.default_rng(0).uniform(-1, 1, (2, 2, 8, 7))
    bands = []
    for image in (a - b) / 2:
        rows = []
        for f, g in ((low, high), (high, low), (high, high)):
            out = np.zeros((6, 6))  # (8 + 5) // 2, (7 + 5) // 2
            for y, x, i, j in np.ndindex(6, 6, 6, 6):  # every other value of a convolution, zeros outside
                u, v = 2 * y + 1 - i, 2 * x + 1 - j
                if 0 <= u < 8 and 0 <= v < 7:
                    out[y, x] += f[i] * g[j] * image[u, v]
            rows.append(out)
        bands.append(rows)
    x, y = (torch.tensor(part, dtype=torch.float32)[None] for part in (a, b))
    got = cud_imagenet64.details((x - y) / 2)
    expected = torch.tensor(np.array(bands), dtype=torch.float32).view(1, 6, 6, 6)
    assert_close(got, expected, rtol=1e-4, atol=1e-5)
    largest = np.sort(abs(np.array(bands)).ravel())[::-1][:43]  # a fifth of 216
    assert cud_imagenet64.wavelet_loss(x, y).tolist() == pytest.approx([largest.mean()], rel=1e-4)


def test_imagenet_loss_is_the_sum_of_its_terms():
    args = cud_imagenet64.parse_args(shlex.split("--data x --rk-order 2 --wavelet-weight 3"))
    network, ema, labels = small_adm(heads=2), small_adm(), torch.tensor([0, 4, 2])
    x, noise = torch.randn(2, 3, 3, 16, 16)
    t, h = torch.tensor([0.1, 0.5, 0.9]), torch.full((3,), 0.05)
    loss, log = cud_imagenet64.CatchUp(network, ema.velocity, args)(x, noise, t, h, 0.5, labels)

    def each(i):
        """The loss of sample i by itself."""
        one, label = slice(i, i + 1), labels[i:i + 1]
        catchup, truth = cud_mnist.catch_up_loss(
            lambda x, t: network(x, t, label), x[one], noise[one], t[one], h[one], 2,
            target=lambda x, t: ema.velocity(x, t, label))
        v = network(t[i] * noise[one] + (1 - t[i]) * x[one], t[one], label)
        return catchup, truth, cud_imagenet64.wavelet_loss(noise[one] - v[1], x[one])  # the last head
    terms = torch.cat([torch.stack(each(i)) for i in range(3)], 1)
    assert_close(log[0, 1:4] / log[1, 1:4], terms.mean(1), rtol=1e-4, atol=1e-5)
    assert_close(loss, (terms[0] + terms[1] + 3 * terms[2]).mean(), rtol=1e-4, atol=1e-5)


@pytest.fixture
def imagenet():
    """Twelve random 64x64 images of four classes in each form that users have them."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (12, 3, 64, 64), np.uint8), np.arange(12) % 4
    for folder in ("npz", "npz-zips"):
        Path(folder).mkdir()
    order = np.argsort(labels, kind="stable")  # pictures come by class and name
    with zipfile.ZipFile("pictures.zip", "w") as archive:
        for i, (image, label) in enumerate(zip(images, labels)):
            path = Path(f"pictures/train/n0{label}/{i:02}.PNG")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(path)
            archive.write(path)
    Image.new("RGB", (64, 64)).save("pictures/odd.txt", "PNG")  # no picture by its name
    for part, (number, rows) in enumerate(((2, order[:5]), (10, order[5:])), 1):  # 10 comes after 2
        path = Path(f"npz/train_data_batch_{number}.npz")
        np.savez(path, data=images[rows].reshape(-1, 12288), labels=(labels[rows] + 1).tolist())
        with zipfile.ZipFile(f"npz-zips/Imagenet64_train_part{part}_npz.zip", "w") as archive:
            archive.write(path, f"some/{path.name}")
    return images[order], labels[order]


@pytest.mark.parametrize("form", ["npz", "npz-zips", "pictures", "pictures.zip"])
def test_every_form_of_imagenet_gives_the_same_arrays(form, imagenet, capsys):
    args = cud_imagenet64.parse_args(["--data", form, "--cache", "cache"])
    for _ in range(2):  # read, then found
        data = cud_imagenet64.load_data(args)
        assert np.array_equal(data.images, imagenet[0]) and data.labels.tolist() == imagenet[1].tolist()
        assert data.sha256 == common.describe(*map(torch.from_numpy, imagenet), "").sha256
    said = "npz images, downsampled by their authors" if "npz" in form else "pictures, box-halved and bicubic"
    assert data.about == f"12 {said} in {form}"
    assert f"12 {said}, 0 skipped; 4 classes: 0 " in capsys.readouterr().out
    assert data.classes == (list("1234") if "npz" in form else ["n00", "n01", "n02", "n03"])
    assert np.load("cache/images.npy").shape == (12, 3, 64, 64)
    bad = next(Path(form).glob("*"), None) if "npz" in form else None
    if bad:
        bad.write_bytes(bad.read_bytes()[:-50])
        with pytest.raises(common.InputError, match=f"{bad.name} is damaged or something else"):
            cud_imagenet64.load_data(cud_imagenet64.parse_args(["--data", form, "--cache", "other"]))
        assert os.listdir("other") == [".lock"]
    with pytest.raises(common.InputError, match="--cache cache holds .*give another"):
        cud_imagenet64.load_data(cud_imagenet64.parse_args(["--data", "elsewhere", "--cache", "cache"]))
    before = cud_imagenet64.load_data(cud_imagenet64.parse_args(["--cache", "cache"]))  # without --data
    assert before.sha256 == data.sha256
    args = cud_imagenet64.parse_args(["--data", form, "--cache", "cache", "--prepare"])
    if bad:  # it was cut short above
        with pytest.raises(common.InputError, match=r"has changed since it was read: .*'bytes': \d+"):
            cud_imagenet64.load_data(args)
    else:
        assert cud_imagenet64.load_data(args).sha256 == data.sha256


def test_pictures_are_halved_and_cropped():
    pixels = np.random.default_rng(0).integers(0, 256, (256, 320, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    halved = pixels.astype(float)
    for _ in range(2):  # rows and columns one after the other, each rounded half up to 8 bits
        halved = np.floor((halved[:, ::2] + halved[:, 1::2]) / 2 + 0.5)
        halved = np.floor((halved[::2] + halved[1::2]) / 2 + 0.5)
    expected = halved[:, 8:72].transpose(2, 0, 1)  # 64 x 80: the middle
    assert (common.shrink(file.getvalue(), (3, 64, 64)) == expected).all()
    small = io.BytesIO()
    Image.new("L", (40, 100), 77).save(small, "PNG")  # enlarged
    assert (common.shrink(small.getvalue(), (3, 64, 64)) == 77).all()


def test_bad_pictures_are_named_counted_and_skipped(imagenet, monkeypatch, capsys):
    noise = np.random.default_rng(1).integers(0, 256, (90, 90, 3), np.uint8)
    Image.fromarray(noise).save("pictures/train/n01/cut.jpg")
    whole = Path("pictures/train/n01/cut.jpg").read_bytes()
    Path("pictures/train/n01/cut.jpg").write_bytes(whole[:len(whole) // 2])
    Image.fromarray(noise).resize((400, 300)).save("pictures/train/n02/bomb.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    args = cud_imagenet64.parse_args(["--data", "pictures", "--cache", "cache"])
    images, labels, *_ = cud_imagenet64.load_data(args)
    assert np.array_equal(images, imagenet[0]) and labels.tolist() == imagenet[1].tolist()
    out = capsys.readouterr().out
    assert "12 pictures" in out and "2 skipped" in out
    assert "skipped train/n01/cut.jpg: image file is truncated" in out
    assert "skipped train/n02/bomb.jpg: 400x300 pixels are refused" in out
    for path in Path("pictures").rglob("*.PNG"):
        path.unlink()
    args.cache = "none"
    with pytest.raises(common.InputError, match="none of the pictures in .* can be used, as train/n0"):
        cud_imagenet64.load_data(args)
    assert os.listdir("none") == [".lock"]


def test_a_preparation_killed_and_started_again_gives_the_same_file():
    for i in range(40):
        path = Path(f"pictures/class{i % 3}/{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (70, 80), (i, 2 * i, 3 * i)).save(path)
    code = "import sys, time, common, cud_imagenet64 as script; shrink = common.shrink; " \
           "common.shrink = lambda *given: time.sleep(0.2) or shrink(*given); sys.exit(script.main())"
    command = [sys.executable, "-c", code, *shlex.split("--data pictures --prepare --cache killed")]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(HERE)})
    wait_for(process, lambda: list(Path().glob("killed/.images.npy.*")))
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = sorted(path.name[:12] for path in Path("killed").iterdir())  # none passes for whole
    assert left == [".images.npy.", ".lock"]
    for cache in ("killed", "whole"):
        assert cud_imagenet64.main(["--data", "pictures", "--prepare", "--cache", cache]) == 0
        assert sorted(os.listdir(cache)) == [".lock", "about.json", "images.npy", "labels.npy"]
    for name in ("images.npy", "labels.npy", "about.json"):
        assert Path("killed", name).read_bytes() == Path("whole", name).read_bytes()
    assert np.load("whole/images.npy").shape == (40, 3, 64, 64) and not Path("runs").exists()


@pytest.mark.skipif(not REAL.exists(), reason="no real ImageNet pictures beside the project")
def test_real_imagenet_pictures():
    args = cud_imagenet64.parse_args(["--data", str(REAL / "imagenet-sample")])
    images, labels, _, classes, _ = cud_imagenet64.load_data(args)
    assert images.shape == (41, 3, 64, 64)
    assert len(classes) == int(labels.max()) + 1 and classes[0] == "n01440764"
    assert 100 < images.float().mean() < 140


ADM = shlex.split("--data glyphs --channels 8 --multipliers 1 2 --attention 32 --blocks 1 --batch-size 4 "
                  "--dropout 0 --no-flip --lr 3e-3 --ema-decay 0.9 --fid-samples 0 --steps 2")


def test_accumulation_and_two_ranks_equal_one(capsys):
    flags = [*ADM, *shlex.split("--rk-order 2 --iterations 8 --save-samples 12")]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    runs = {"one": ("1", ()), "parts": ("2", ()), "ranks": ("2", launcher)}
    for name, (parts, launched) in runs.items():
        process = start(*flags, "--run-dir", name, "--accumulate", parts, launcher=launched,
                        script="cud_imagenet64")
        assert process.wait() == 0, process.communicate()
    rows, samples, gradients = {}, {}, {}
    for name in runs:
        rows[name] = [[float(cell or 0) for cell in row] for row in table(f"{name}/metrics.csv")[1:]]
        samples[name] = np.load(f"{name}/samples.npz")["arr_0"].astype(int)
        state = torch.load(f"{name}/checkpoint.pt")["optimizer"]["state"]
        gradients[name] = torch.cat([part["exp_avg"].flatten() for part in state.values()])
    for name in ("parts", "ranks"):
        np.testing.assert_allclose(rows[name], rows["one"], rtol=1e-3)
        size = gradients["one"].abs().max().item()
        assert_close(gradients[name], gradients["one"], rtol=1e-2, atol=1e-3 * size)
        assert abs(samples[name] - samples["one"]).max() <= 2 and samples["one"].std() > 10


def test_quick_imagenet_is_continued_evaluated_and_sampled_by_class(monkeypatch, capsys):
    monkeypatch.setattr(cud_imagenet64, "SAMPLE_BATCH", 60)  # several batches
    flags = shlex.split("--quick --channels 4 --multipliers 1 2 --attention 32 --batch-size 4 --steps 1 2 "
                        "--fid-samples 250 --one-step-iterations 2 --one-step-pairs 70")
    assert cud_imagenet64.main([*flags, "--iterations", "4"]) == 0
    assert cud_imagenet64.main([*flags, "--iterations", "8", "--no-one-step"]) == 0
    out, folder = capsys.readouterr().out, Path("runs/imagenet64-quick")
    assert "iterations 4 to 8" in out and "right class" in out
    assert "250 samples of drawn classes against 600 drawn digits" in out
    assert Image.open(folder / "samples_model_euler_2.png").size == (8 * 132, 10 * 132)
    results = common.read_results(folder)
    one_step = [r for r in results if r["weights"] == "one-step EMA"]
    assert [(r["steps"], r["images_seen"]) for r in one_step] == [(1, 16)]  # a student keeps its teacher
    assert [(r["steps"], r["images_seen"]) for r in results if r not in one_step] == [
        (1, 16), (2, 16), (1, 32), (2, 32)]
    assert all(0 < r["floor"] < r["value"] and 0 <= r["right_class"] <= 1 for r in results)
    more = shlex.split("--iterations 8 --fid-samples 0 --run-dir whole --no-one-step")
    assert cud_imagenet64.main([*flags, *more]) == 0
    a, b = (list(leaves(torch.load(f"{name}/checkpoint.pt")["module"])) for name in (folder, "whole"))
    assert len(a) > 50 and all(torch.equal(x, y) for x, y in zip(a, b))  # what was read ahead was right
    more = shlex.split("--iterations 8 --fid-samples 0 --classes 7 3 --save-samples 9 --no-one-step")
    assert cud_imagenet64.main([*flags, *more]) == 0
    with np.load(folder / "samples.npz") as file:
        assert file["arr_0"].shape == (9, 64, 64, 3) and file["arr_1"].tolist() == [7, 3, 7, 3, 7, 3, 7, 3, 7]
    assert Image.open(folder / "samples_model_euler_2.png").size == (8 * 132, 2 * 132)
    assert cud_imagenet64.main([*flags, "--iterations", "8", "--no-one-step", "--classes", "7", "10"]) == 2
    assert "--classes: 10 is not among the 10 classes, 0 to 9" in capsys.readouterr().err


def test_one_step_pairs_keep_their_class(monkeypatch):
    monkeypatch.setattr(cud_imagenet64, "SAMPLE_BATCH", 3)
    monkeypatch.setattr(cud_imagenet64, "IMAGE", (3, 16, 16))
    teacher = small_adm()
    args = cud_imagenet64.parse_args(["--data", "x", "--one-step-pairs", "8"])
    noise, targets, labels = cud_imagenet64.one_step_pairs(args, teacher, torch.device("cpu"))
    assert noise.shape == (8, 3, 16, 16) and targets.shape == (8, 3, 3, 16, 16) and len(labels.unique()) > 1
    path = []
    with torch.no_grad():
        common.euler(lambda x, t: teacher.velocity(x, t, labels), noise, 16, trajectory=path)
    for j, evaluation in enumerate((9, 12, 15)):
        t, x, v = path[evaluation - 1]
        assert_close(targets[:, j].float(), x - t * v, rtol=2e-3, atol=2e-3)
    z, target, told = noise[:2], targets[:2, 0].float(), labels[:2]
    module = cud_imagenet64.OneStep(teacher, lambda z, t, labels: labels.view(-1, 1, 1, 1) * z)
    loss, _ = module(z, target, told)
    v = teacher.velocity(z, torch.ones(2), told)
    slow = ((v - told.view(-1, 1, 1, 1) * z) ** 2).mean()
    assert_close(loss, ((z - v - target) ** 2).mean() + 0.1 * slow, rtol=1e-4, atol=1e-5)


def test_an_imagenet_student_killed_and_continued_equals_one_never_stopped():
    flags = shlex.split("--channels 4 --multipliers 1 2 --attention 32 --batch-size 4 --iterations 2 "
                        "--dropout 0.2 --one-step --one-step-iterations 12 --one-step-pairs 9 "
                        "--checkpoint-every 5")
    assert start(*flags, "--run-dir", "whole", script="cud_imagenet64").wait() == 0
    killed = start(*flags, "--run-dir", "killed", script="cud_imagenet64")
    rows = Path("killed/one_step_metrics.csv")
    wait_for(killed, lambda: rows.exists() and len(table(rows)) > 4)
    killed.kill()
    killed.wait()
    assert torch.load("killed/one_step_checkpoint.pt")["iteration"] in (10, 15)
    assert start(*flags, "--run-dir", "killed", script="cud_imagenet64").wait() == 0
    a, b = (torch.load(f"{name}/one_step_checkpoint.pt") | {"token": 0} for name in ("whole", "killed"))
    a, b = list(leaves(a)), list(leaves(b))
    assert len(a) == len(b) > 50
    assert all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(a, b))


def stand_in_inception():
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
    return torch.jit.load(path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_published_statistics_are_the_reference_without_any_images(script, monkeypatch, capsys):
    network, rng = stand_in_inception(), np.random.default_rng(0)
    mean, scale = rng.normal(size=2048), rng.uniform(0.5, 2, 2048)
    pictures = np.array([Payload()], object)  # never read
    np.savez("published.npz", mu=mean, sigma=np.diag(scale), arr_0=pictures)
    small = [*SMALL, "--data", "glyphs", *(["--attention", "32"] if script is cud_imagenet64 else [])]
    assert script.main([*small, "--run-dir", "run"]) == 0
    monkeypatch.setattr(script, "load_data", lambda args: pytest.fail("no images are needed"))
    more = shlex.split("--reference published.npz --fid-samples 2100 --steps 1 --save-samples 2100")
    assert script.main([*small, "--model", "run/model.pt", "--run-dir", "judged", *more]) == 0
    out = capsys.readouterr().out
    assert "against published.npz; inception-legacy_tensorflow-" in out and "not known" in out
    row = common.read_results("judged")[0]
    assert row["reference_sha256"] == common.sha256("published.npz")[:12] and row["floor"] is None
    assert not Path("run_by_the_pickle").exists()
    if script is not cud_imagenet64:  # the saved samples are those that were judged
        images = torch.from_numpy(np.load("judged/samples.npz")["arr_0"]).permute(0, 3, 1, 2)
        f = network(images.expand(-1, 3, -1, -1).float()).detach().double().numpy()
        cov, root = np.cov(f.T), np.diag(np.sqrt(scale))
        cross = np.sqrt(np.linalg.eigvalsh(root @ cov @ root).clip(0)).sum()
        closed = ((f.mean(0) - mean) ** 2).sum() + np.trace(cov) + scale.sum() - 2 * cross
        assert row["value"] == pytest.approx(closed, rel=1e-6)


@pytest.mark.parametrize("arrays, message", [
    ({"mu": np.zeros(2048)}, "no item named"),
    ({"mu": np.zeros(5), "sigma": np.eye(5)}, "are not of 2048 features"),
    ({"mu": np.full(2048, np.nan), "sigma": np.eye(2048)}, "not finite"),
    ({"mu": np.zeros(2048), "sigma": -np.eye(2048)}, "no positive trace"),
    ({"mu": np.zeros(2048), "sigma": np.eye(2048) + np.eye(2048, k=1)}, "not symmetric"),
    ({"mu": np.array([Payload()], object), "sigma": np.eye(2048)}, "allow_pickle=False")])
def test_statistics_that_cannot_be_are_refused(arrays, message):
    np.savez("bad.npz", **arrays)
    with pytest.raises(common.InputError, match=message):
        common.load_moments("bad.npz")
    assert not Path("run_by_the_pickle").exists()
    Path("worse.npz").write_bytes(Path("bad.npz").read_bytes()[:300])
    with pytest.raises(common.InputError, match="worse.npz is damaged .*give an .npz with mu and sigma"):
        common.load_moments("worse.npz")


def test_a_reference_needs_the_features_that_it_was_made_with(capsys):
    for words in ("--features classifier", "--fid-mode clean"):
        status, err = run("--reference", "x.npz", *words.split(), capsys=capsys)
        assert status == 2 and "--reference: such statistics are of inception" in err[0]


def test_labels_reach_the_samples_of_every_batch(monkeypatch):
    class Colour:  # dx/dt = z - label / 10: one Euler step ends there
        @staticmethod
        def sampled(x, t, labels):
            return x - labels.view(-1, 1, 1, 1) / 10
    monkeypatch.setattr(cud_imagenet64, "SAMPLE_BATCH", 4)
    args, labels = cud_imagenet64.parse_args(["--data", "x"]), torch.arange(10)
    images, *_ = cud_imagenet64.sample(Colour, labels, "euler", 1, args, torch.device("cpu"))
    expected = common.to_uint8(labels / 10).view(10, 1, 1, 1).int()
    assert images.shape == (10, 3, 64, 64) and (images - expected).abs().max() <= 1  # 12 from class to class
    assert cud_imagenet64.grid_labels(args, 3).tolist() == [0] * 8 + [1] * 8 + [2] * 8  # a row a class
    drawn = cud_imagenet64.drawn_labels(5_000, args, 10).bincount()
    assert len(drawn) == 10 and drawn.min() > 400


def test_the_classifier_agrees_with_the_classes_of_real_images():
    data, cpu = common.describe(*common.glyphs(600, (3, 64, 64)), "drawn digits"), torch.device("cpu")
    cud_imagenet64.classifier_features(data, cpu)
    assert cud_imagenet64.agreement(data.images, data.labels, data, cpu) > 0.95
    assert cud_imagenet64.agreement(data.images, (data.labels + 1) % 10, data, cpu) < 0.05


def test_a_node_without_the_cache_says_so(imagenet, monkeypatch):
    monkeypatch.setattr(common, "rank", lambda: 3)
    args = cud_imagenet64.parse_args(["--data", "pictures", "--cache", "cache"])
    with pytest.raises(common.InputError, match="cache is not on this node.*--prepare"):
        cud_imagenet64.load_data(args)
    assert not Path("cache").exists()


def test_missing_imagenet_says_what_to_fetch(capsys):
    assert cud_imagenet64.main([]) == 2
    err = capsys.readouterr().err
    for part in ("image-net.org", "Imagenet64_train_part1_npz.zip", "train/n01440764/*.JPEG"):
        assert part in err
    assert cud_imagenet64.main(["--data", "nowhere"]) == 2 and not list(Path().iterdir())
    assert "nowhere does not exist" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("flags, message", [
    ("--rk-order 4", "--rk-order"), ("--rk-points fine", "--rk-points"), ("--steps 0", "--steps"),
    ("--steps x", "--steps"), ("--solver heun --steps 3 4", "heun takes odd"), ("--solver rk4", "--solver"),
    ("--fid-samples 2048", "needs more images"),
    ("--fid-samples 224 --features classifier", "needs more images"), ("--skip-phi 0", "--skip-phi"),
    ("--skip-phi 1", "--skip-phi"), ("--batch-size 0", "--batch-size"), ("--lr 0", "--lr"),
    ("--lr nan", "--lr"), ("--ema-decay 1", "--ema-decay"), ("--dropout 1", "--dropout"),
    ("--iterations 0", "--iterations"), ("--intervals 0", "--intervals"), ("--kl-weight -1", "--kl-weight"),
    ("--tolerance 0", "--tolerance"), ("--seed -1", "--seed"), ("--split val", "--split"),
    ("--order 2", "--order"), ("--checkpoint-every 0", "--checkpoint-every"),
    ("--multipliers 1 2 2 2", "cannot be halved"), ("--channels 36 --multipliers 2 2", "--channels"),
    ("--channels 9", "--channels"), ("--device gpu", "--device gpu"),
    ("--data nowhere", "t10k-images-idx3-ubyte.gz is missing"), ("--run-dir taken", "taken"),
    ("--features classifier --fid-samples 300 --run-dir x/../taken/x", "taken"),
    ("--steps 1" + "0" * 400, "--steps"), ("--steps 1" + "0" * 9_000, "--steps"), ("--lr 1e400", "--lr"),
    (f"--seed {2 ** 64}", "--seed"), (f"--sample-seed {2 ** 64}", "--sample-seed"),
    ("--tolerance 1e-300", "--tolerance"), ("--blocks 1000000", "--blocks"),
    ("--channels 1000000", "--channels"),
    ("--batch-size 10000000000", "--batch-size"), ("--kl-weight inf", "--kl-weight")])
def test_bad_flags_get_one_line(flags, message, capsys):
    Path("taken").write_text("a file where a folder should be")
    last = "--iterations" if "--iterations" not in flags else "--lr"
    status, err = run("--split", "test", *shlex.split(flags), last, "1", capsys=capsys)
    assert status == 2 and len(err) == 1, err
    assert err[0].startswith("cud_mnist.py: error: ") and message in err[0], err
    assert not list(Path().rglob("*.*")) and Path("taken").read_text()


def test_bad_data_gets_one_line(monkeypatch, capsys):
    write_idx("mnist", np.zeros((9, 28, 28), np.uint8), np.zeros(9, np.uint8), monkeypatch)
    path = Path("mnist/t10k-images-idx3-ubyte.gz")
    path.write_bytes(path.read_bytes()[:-7])
    status, err = run("--data", "mnist", "--split", "test", capsys=capsys)
    assert status == 2 and len(err) == 1 and str(path) in err[0] and "wrong MD5" in err[0]


def test_ranks_must_divide_the_batch(monkeypatch):
    monkeypatch.setattr(cud_mnist, "world", lambda: 3)
    with pytest.raises(common.InputError, match="--batch-size 8 is not divisible by the 3 ranks"):
        small_args()


def test_bad_checkpoints_are_refused_and_left_alone(capsys):
    path = Path("runs/mnist/checkpoint.pt")
    assert run("--iterations", "2")[0] == 0
    good = path.read_bytes()

    def refused(message, *flags):
        before = {file: file.read_bytes() for file in path.parent.iterdir()}
        status, err = run("--iterations", "4", *flags, capsys=capsys)
        assert status == 2 and len(err) == 1 and message in err[0], err
        assert before == {file: file.read_bytes() for file in path.parent.iterdir()}

    refused("--rk-order (1 then, 2 now), --lr (0.0003 then, 0.1 now)", "--rk-order", "2", "--lr", "0.1")
    assert run("--iterations", "1", capsys=capsys)[1][0].endswith("is at iteration 2, past --iterations 1")
    path.write_bytes(good[:len(good) // 2])
    refused("checkpoint.pt is damaged or something else")
    torch.save({"state": 1}, path)
    refused("it has no module")
    saved = torch.load(path.with_name("model.pt"))
    torch.save({"module": saved["model"], "ema": {}, "optimizer": {}, "iteration": 1,
                "totals": torch.zeros(2, 8), "definition": {}, "token": 1}, path)
    refused("checkpoint.pt is damaged or something else (KeyError")
    path.write_bytes(pickle.dumps(Payload()))
    refused("checkpoint.pt is damaged or something else")
    torch.save({"module": Payload()}, path)
    refused("checkpoint.pt is damaged or something else")
    assert not Path("run_by_the_pickle").exists()
    path.write_bytes(good)
    assert run("--iterations", "4")[0] == 0  # may grow
    assert [row[0] for row in table("runs/mnist/metrics.csv")] == ["iteration", "2", "4"]


def test_a_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(monkeypatch, capsys):
    forward, calls = cud_mnist.CatchUp.forward, []

    def failing(self, *batch):
        loss, log = forward(self, *batch)
        calls.append(0)
        return loss * (math.nan if len(calls) == 8 else 1), log  # call 1 counts FLOPs: iteration 7
    monkeypatch.setattr(cud_mnist.CatchUp, "forward", failing)
    status, err = run("--iterations", "20", "--checkpoint-every", "5", capsys=capsys)
    assert status == 2 and len(err) == 1
    assert "not finite at iteration 7" in err[0] and "keeps iteration 5" in err[0]
    proposed = cud_mnist.parse_args(shlex.split(err[0].split("python cud_mnist.py ")[1]))  # works as typed
    was = small_args("--iterations", "20", "--checkpoint-every", "5")
    assert proposed.lr == was.lr / 2 and proposed.run_dir != was.run_dir
    assert proposed.config == was.config | {"lr": was.lr / 2}
    assert torch.load("runs/mnist/checkpoint.pt")["iteration"] == 5
    assert all(value.isfinite().all() for value in torch.load("runs/mnist/model.pt")["model"].values())


# ------------------------------------------------------------------------- hostile, damaged and lying files


def refused(call, *said):
    """`call` ends in one InputError that says all this in one line; no file is new, gone or changed."""
    def files():
        found = (path for path in Path().rglob("*") if path.is_file() and path.name != ".lock")
        return {path: path.read_bytes() for path in found}
    before = files()
    with pytest.raises(common.InputError) as error:
        call()
    words = str(error.value)
    assert all(part in words for part in said) and "\n" not in words, words
    assert files() == before and not Path("run_by_the_pickle").exists()


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp"])
def test_a_picture_of_another_format_is_not_opened(suffix, capsys):
    tiff, palette = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (64, 64)).save(tiff, "TIFF")
    Image.new("P", (64, 64)).save(palette, "GIF")
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n(run) (w) file closefile\n"
    for content in (program, tiff.getvalue(), palette.getvalue()):
        path = Path(f"train/a/odd.{suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        refused(lambda: common.load_pictures(".", "train", (3, 64, 64)), path.name, "cannot identify image")
    Image.new("RGB", (64, 64)).save("train/a/good.png")
    data = common.load_imagenet(".", "cache", (3, 64, 64))
    assert len(data.images) == 1 and f"odd.{suffix}: cannot identify" in capsys.readouterr().out


def test_pictures_that_lie_about_their_size_or_lose_bits():
    def picture(image, **options):
        file = io.BytesIO()
        image.save(file, "PNG", **options)
        return file.getvalue()
    tall = picture(Image.new("RGB", (1, 65_535)))
    assert len(tall) < 1_000
    deep = picture(Image.fromarray(np.full((64, 64), 40_000, np.uint16)))
    huge = bytearray(picture(Image.new("L", (64, 64))))
    huge[16:24] = struct.pack(">II", 100_000, 100_000)
    huge[29:33] = struct.pack(">I", zipfile.crc32(bytes(huge[12:29])))
    started = time.time()
    for content, words in ((tall, "1x65535 is too narrow"), (deep, "more than 8 bits"),
                           (bytes(huge), "exceeds limit|pixels are refused")):
        for decode, more in ((common.shrink, (3, 64, 64)), (common.decode, "L")):
            with pytest.raises((ValueError, Image.DecompressionBombError), match=words):
                decode(content, more)
    assert time.time() < started + 2  # 65535 x 1 took four seconds and 2.6 GB
    narrow = np.random.default_rng(0).integers(0, 256, (3_000, 64, 3), np.uint8)  # narrow, but a photograph
    assert common.shrink(picture(Image.fromarray(narrow)), (3, 64, 64)).shape == (3, 64, 64)


@pytest.mark.parametrize("load", [
    lambda path: common.load_mnist(path, "train", (1, 28, 28)),
    lambda path: common.load_cifar10(path, "train", (3, 32, 32)),
    lambda path: common.load_imagenet(path, "cache", (3, 64, 64)), common.load_moments,
    lambda path: common.load_pt(path, ["model"]), cud_mnist.load_model, common.read_table])
@pytest.mark.parametrize("kind", ["pipe", "device", "garbage", "empty", "missing"])
def test_what_is_no_file_or_no_such_file_is_refused_at_once(load, kind):
    path = "thing.zip"
    if kind == "pipe":
        os.mkfifo(path)  # reading it would wait for ever
    elif kind == "device":
        path = "/dev/zero"
    elif kind != "missing":
        Path(path).write_bytes(b"" if kind == "empty" else os.urandom(5_000))
    refused(lambda: load(path), path)


def test_a_pipe_among_the_pictures_is_named():
    Path("a").mkdir()
    os.mkfifo("a/pipe.png")
    refused(lambda: common.load_pictures(".", "train", (3, 32, 32)), "a/pipe.png", "no regular file")


@pytest.mark.parametrize("kind", ["bomb", "bzip2", "encrypted", "method", "damaged"])
def test_members_of_a_zip_that_cannot_be_had(kind, monkeypatch, capsys):
    monkeypatch.setattr(common, "PICTURE_BYTES", 100_000)
    good = io.BytesIO()
    Image.new("RGB", (64, 64)).save(good, "PNG")
    with zipfile.ZipFile("a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/good.png", good.getvalue())
        method = zipfile.ZIP_BZIP2 if kind == "bzip2" else None  # unpacked in one go, whatever is asked for
        archive.writestr("b/odd.png", bytes(10_000_000) if kind == "bomb" else good.getvalue(), method)
    content = bytearray(Path("a.zip").read_bytes())
    local, central = content.rindex(b"PK\x03\x04"), content.rindex(b"PK\x01\x02")
    if kind == "encrypted":
        content[local + 6] |= 1
        content[central + 8] |= 1
    elif kind == "method":  # which is not known
        content[local + 8] = content[central + 10] = 77
    elif kind == "damaged":
        content[local + 60] ^= 0xff
    Path("a.zip").write_bytes(content)
    refused(lambda: common.load_pictures("a.zip", "train", (3, 64, 64)), "b/odd.png in a.zip")
    assert common.load_imagenet("a.zip", "cache", (3, 64, 64)).labels.tolist() == [0]  # skipped, and named
    assert "skipped b/odd.png: " in capsys.readouterr().out


def pickled_batch(data, labels):
    file = io.BytesIO()
    pickle.Pickler(file, 3).dump({b"data": data, b"labels": labels})
    return file.getvalue()


FOUR = np.zeros((4, 3072), np.uint8)


@pytest.mark.parametrize("batch", [
    pickled_batch(np.array([[None] * 3072] * 4, object), [0] * 4), pickled_batch(FOUR.astype(float), [0] * 4),
    pickled_batch(FOUR.astype(np.int8), [0] * 4), pickled_batch(FOUR, [0] * 3), pickled_batch(FOUR, [10] * 4),
    pickled_batch(FOUR, [0, 1, 2, 300]), pickled_batch(np.asfortranarray(FOUR), [0] * 4),
    pickled_batch(b"x", [0]), pickled_batch(FOUR, 10 ** 12), pickled_batch(np.uint8(1), [0]),
    # raw bytes as an array of objects would be pointers; too few would be followed by what lay there
    pickled_batch(FOUR, [0] * 4).replace(b"u1", b"O8"),
    pickled_batch(FOUR, [0] * 5).replace(b"K\x04M\x00\x0c", b"K\x05M\x00\x0c"),
    b"\x80\x02Nr\xff\xff\xff\x7f."])  # for whose memo the unpickler in C would take 16 GB
def test_cifar10_s_pickles_build_nothing(cifar, batch):
    path = Path("cifar-10-batches-py/data_batch_2")
    path.write_bytes(batch)
    refused(lambda: common.load_cifar10(path.parent, "train", (3, 32, 32)), f"{path.name} in {path.parent}")


def test_cifar10_s_archives_lie(cifar, monkeypatch):
    def load():
        return common.load_cifar10(path, "train", (3, 32, 32))
    path = Path("cifar-10-binary.tar.gz")
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-6] ^= 1  # of the checksum, which tarfile does not read
    path.write_bytes(flipped)
    refused(load, str(path), "CRC")
    path.write_bytes(gzip.compress(bytes(500_000_000), 1))  # in two megabytes
    refused(load, str(path))
    path.write_bytes(gzip.compress(gzip.decompress(whole) + bytes(450_000_000), 1))
    refused(load, str(path), "unpacks to more")
    path.write_bytes(whole)
    batch = Path("cifar-10-batches-bin/data_batch_1.bin")
    batch.write_bytes(b"\x0a" + batch.read_bytes()[1:])
    refused(lambda: common.load_cifar10(batch.parent, "train", (3, 32, 32)), batch.stem, "labels above 9")
    with open(batch, "wb") as file:
        file.truncate(50_000_000)  # a sparse file
    refused(lambda: common.load_cifar10(batch.parent, "train", (3, 32, 32)), str(batch.parent), "limit")


@pytest.mark.parametrize("data, labels", [
    (np.zeros((4, 12288), np.float32), [1] * 4), (np.zeros((4, 12288), np.int64), [1] * 4),
    (np.full((4, 12288), "x"), [1] * 4), (np.zeros((4, 64, 64, 3), np.uint8), [1] * 4),
    (np.zeros((4, 12288), np.uint8), [1] * 3), (np.zeros((4, 12288), np.uint8), [0] * 4),
    (np.zeros((4, 12288), np.uint8), [1001] * 4), (np.zeros((4, 12288), np.uint8), [1.5] * 4),
    (np.zeros((4, 12288), np.uint8), [[1]] * 4), (np.zeros((4, 12288), np.uint8), ["a"] * 4),
    (np.zeros((4, 3072), np.uint8), [1] * 16), (np.array([Payload()], object), [1])])
def test_npz_data_of_another_kind_is_not_written(data, labels):
    Path("npz").mkdir()
    np.savez("npz/train_data_batch_1.npz", data=np.zeros((2, 12288), np.uint8), labels=[1, 1000])
    np.savez("npz/train_data_batch_2.npz", data=data, labels=labels)
    np.savez("npz/train_data_batch_final.npz", x=1)  # no batch by its name
    refused(lambda: common.load_imagenet("npz", "cache", (3, 64, 64)), "train_data_batch_2.npz", "fetch it")
    np.savez("npz/train_data_batch_2.npz", data=np.ones((3, 3, 64, 64), np.uint8), labels=np.int16([1, 2, 3]))
    assert common.load_imagenet("npz", "cache", (3, 64, 64)).labels.tolist() == [0, 999, 0, 1, 2]


@pytest.mark.parametrize("name, content", [
    ("images.npy", b""), ("images.npy", b"\x93NUMPY"), ("labels.npy", np.zeros(11, np.int64)),
    ("images.npy", np.zeros((12, 3, 64, 64), np.float32)),
    ("images.npy", np.zeros((12, 64, 64, 3), np.uint8)),
    ("labels.npy", np.arange(12)), ("labels.npy", np.full(12, -1)), ("labels.npy", np.zeros(12, np.int32)),
    ("labels.npy", np.array([None] * 12, object)), ("about.json", b""), ("about.json", b"[]"),
    ("about.json", b'{"data": 1}'), ("about.json", b"\xff\xfe\x00"), ("images.npy", "cut")])
def test_a_cache_that_is_damaged_is_not_trained_on(name, content, imagenet):
    common.load_imagenet("pictures", "cache", (3, 64, 64))
    path = Path("cache", name)
    if isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        path.write_bytes(path.read_bytes()[:-1] if content == "cut" else content)
    refused(lambda: common.load_imagenet(None, "cache", (3, 64, 64)), "--cache cache", "remove it")


def test_names_that_are_no_text(capsys):
    """A preparation with such names used to end after all reading."""
    for folder in (b"class\xff", b"new\nline", "\N{DEGREE SIGN}".encode()):
        os.makedirs(b"data/" + folder)
        Image.new("RGB", (64, 64)).save(f"data/{os.fsdecode(folder)}/good.png")
        with open(b"data/" + folder + b"/bad\xfe\n.png", "wb") as file:
            file.write(b"x")
    code = "import common, cud_imagenet64; common.run_main(cud_imagenet64.main)"
    env = {**os.environ, "PYTHONPATH": str(HERE), "PYTHONIOENCODING": "ascii"}
    for _ in range(2):
        command = [sys.executable, "-c", code, *shlex.split("--data data --prepare --cache cache")]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
    assert r"0 class\udcff, 1 new\nline, 2 \xb0" in done.stdout and len(done.stdout.splitlines()) == 1
    assert len(json.loads(Path("cache/about.json").read_text())["skipped"]) == 3


def nested(depth):
    """A list of a few bytes in a pickle, of 2 ** depth when it is printed."""
    found = []
    for _ in range(depth):
        found = [found, found]
    return found


def spoil(path, change):
    saved = torch.load(path)
    change(saved)
    torch.save(saved, path)


def entry(saved):
    return saved["optimizer"]["state"][0]


@pytest.mark.parametrize("change", [
    # Adam's fused step would read and write beyond such tensors
    lambda saved: entry(saved).update(exp_avg=torch.zeros(1)),
    lambda saved: entry(saved).update(exp_avg_sq=torch.zeros(0)),
    lambda saved: entry(saved).update(step=torch.zeros(2)),
    lambda saved: entry(saved).update(step=3), lambda saved: entry(saved).pop("step"),
    lambda saved: entry(saved).update(exp_avg=entry(saved)["exp_avg"].to_sparse()),
    lambda saved: entry(saved).update(exp_avg=entry(saved)["exp_avg"].long()),
    lambda saved: entry(saved).update(exp_avg=entry(saved)["exp_avg"] * math.nan),
    lambda saved: saved["optimizer"]["state"].pop(1), lambda saved: saved.update(optimizer=[]),
    lambda saved: saved.update(iteration=1.5), lambda saved: saved.update(iteration="2"),
    lambda saved: saved.update(iteration=True), lambda saved: saved.update(token=None),
    lambda saved: saved.update(totals=torch.zeros(2, 3)), lambda saved: saved.update(totals=0),
    lambda saved: saved.update(definition=None), lambda saved: saved.update(module=torch.zeros(3)),
    lambda saved: saved["definition"].update(lr=nested(26)), lambda saved: saved.update(token=2 ** 63),
    lambda saved: saved.update(token=nested(26)),
    lambda saved: saved["module"].popitem(), lambda saved: saved["module"].update(x=torch.zeros(1)),
    lambda saved: saved["ema"].update({next(iter(saved["ema"])): torch.zeros(1)}),
    lambda saved: next(iter(saved["ema"].values())).fill_(math.inf)])
def test_a_checkpoint_s_parts_are_checked_before_they_are_used(change):
    assert run("--iterations", "2")[0] == 0
    path = Path("runs/mnist/checkpoint.pt")
    spoil(path, change)
    args = small_args("--iterations", "4")
    refused(lambda: cud_mnist.train(args, torch.device("cpu"), cud_mnist.load_data(args)), str(path))


def test_strides_and_groups_of_a_saved_optimizer_are_not_taken_over():
    assert run("--iterations", "2", "--run-dir", "plain")[0] == 0
    shutil.copytree("plain", "odd")

    def change(saved):
        state = entry(saved)
        state["exp_avg"] = state["exp_avg"].mT.contiguous().mT if state["exp_avg"].dim() == 2 else \
            state["exp_avg"].flip(0).flip(0).T.contiguous().permute(*range(state["exp_avg"].dim())[::-1])
        saved["optimizer"]["param_groups"] = [{"params": [], "lr": 1e9}]
    spoil("odd/checkpoint.pt", change)
    for folder in ("plain", "odd"):
        assert run("--iterations", "4", "--run-dir", folder)[0] == 0
    a, b = (torch.load(f"{folder}/model.pt")["model"] for folder in ("plain", "odd"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_flipped_bit_in_a_checkpoint_is_found(capsys):
    assert run("--iterations", "3", "--checkpoint-every", "1")[0] == 0
    path, previous = Path("runs/mnist/checkpoint.pt"), Path("runs/mnist/checkpoint_previous.pt")
    good = path.read_bytes()
    assert torch.load(previous)["iteration"] == 2 and torch.load(path)["iteration"] == 3
    rng, found = np.random.default_rng(0), 0
    expected = list(leaves(torch.load(path)))
    for offset in rng.integers(0, len(good), 40):
        content = bytearray(good)
        content[offset] ^= 1 << rng.integers(8)
        path.write_bytes(content)
        try:
            got = list(leaves(common.load_pt(path, ["module"])))
            assert all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(got, expected))
        except common.InputError:  # a bit between the members changes nothing
            found += 1
    assert found >= 35
    with zipfile.ZipFile("small.pt", "w", zipfile.ZIP_DEFLATED) as small:
        archive = zipfile.ZipFile(io.BytesIO(good))
        for name in archive.namelist():
            small.writestr(name, archive.read(name))
    refused(lambda: common.load_pt("small.pt", ["module"]), "small.pt", "compresses nothing")
    path.write_bytes(good[:-100])
    status, err = run("--iterations", "5", capsys=capsys)
    assert status == 2 and f"{path} is damaged" in err[0] and f"go on from {previous.name}" in err[0]
    path.rename("elsewhere.pt")  # as it says
    assert run("--iterations", "5")[0] == 0
    assert "iterations 2 to 5" in capsys.readouterr().out
    assert [row[0] for row in table("runs/mnist/metrics.csv")] == ["iteration", "5"]


def test_a_model_file_in_half_precision_and_one_that_cannot_be(capsys):
    assert run("--iterations", "2")[0] == 0
    path = Path("runs/mnist/model.pt")
    good, x = path.read_bytes(), torch.randn(2, 1, 28, 28)
    whole = cud_mnist.load_model(path)
    spoil(path, lambda saved: saved.update(model={key: w.half() for key, w in saved["model"].items()}))
    half = cud_mnist.load_model(path)
    assert next(half.parameters()).dtype == torch.float32
    assert_close(half.velocity(x, torch.ones(2)), whole.velocity(x, torch.ones(2)), rtol=1e-2, atol=1e-3)
    for change, words in (
            (lambda saved: next(iter(saved["model"].values())).fill_(math.nan), "not finite"),
            (lambda saved: saved["model"].popitem(), "other parts"),
            (lambda saved: saved["args"].update(blocks=10 ** 12), "blocks"),
            (lambda saved: saved["args"].update(heads=4_000), "heads"),
            (lambda saved: saved["args"].update(skip_phi="x"), "skip_phi"),
            (lambda saved: saved["args"].update(image=nested(26)), "image"),
            (lambda saved: saved["args"].update(image=[3, 32, 32]), "images [3, 32, 32]"),
            (lambda saved: saved["args"].update(colour=1), "colour"),
            (lambda saved: saved.update(args=None), "args"),
            (lambda saved: saved.update(model=[1]), "other parts"),
            (lambda saved: saved.update(images_seen="many"), "many")):
        path.write_bytes(good)
        spoil(path, change)
        refused(lambda: cud_mnist.load_model(path), str(path), words if words != "args" else "model.pt")
        for flag in ("--model", "--teacher", "--init"):
            status, err = run(flag, str(path), "--run-dir", "new", capsys=capsys)
            assert status == 2 and len(err) == 1 and "model.pt" in err[0], err


def test_what_is_not_finite_gets_no_distance_and_is_not_saved(monkeypatch, capsys):
    args, network = small_args(), small_unet()
    network.heads[0][2].bias.data.fill_(1e38)  # finite weights, samples that are not
    with pytest.raises(FloatingPointError, match="not finite; no pictures, no distance"):
        cud_mnist.sample(network, 20, "euler", 5, args, torch.device("cpu"))
    update = cud_mnist.Training.update

    def overflowing(self, i):  # the last step of all: no loss is left to show it
        update(self, i)
        if i == 5:
            self.trained[3].data.flatten()[0] = math.inf
    monkeypatch.setattr(cud_mnist.Training, "update", overflowing)
    status, err = run("--iterations", "6", "--checkpoint-every", "4", capsys=capsys)
    assert status == 2 and len(err) == 1 and "loss or weights are not finite" in err[0]
    assert "checkpoint.pt keeps iteration 4" in err[0]
    assert torch.load("runs/mnist/checkpoint.pt")["iteration"] == 4


@pytest.mark.parametrize("damage, message", [
    (lambda text: text + "3,24,0.", None), (lambda text: text + "\0" * 400, None),
    (lambda text: text + "\n\n", None),
    (lambda text: text[:-1] + "\0\0\n", None),
    (lambda text: text.replace("\n2,", "\n\0\0002,"), "metrics.csv"),
    (lambda text: "garbage", None), (lambda text: "garbage\n1,2\n", "metrics.csv"),
    (lambda text: text.replace("loss", "lass", 1), "its columns are"),
    (lambda text: text.replace("\n2,", "\ntwo,"), "row two,"),
    (lambda text: re.sub("\n2,16,.*?,", "\n2,0,inf,", text), None)])
def test_a_damaged_table(damage, message, monkeypatch, capsys):
    monkeypatch.setattr(cud_mnist, "LOG_EVERY", 2)
    assert run("--iterations", "6")[0] == 0
    path = Path("runs/mnist/metrics.csv")
    path.write_text(damage(path.read_text()))
    status, err = run("--iterations", "8", capsys=capsys)
    if message is None and damage("") != "garbage":
        numbers = [row[0] for row in table(path)]
        assert status == 0 and numbers[0] == "iteration" and numbers[-1] == "8" and "4" in numbers
    else:
        assert status == 2 and len(err) == 1 and (message or "metrics.csv") in err[0]


@pytest.mark.parametrize("content", [
    b"", b"[]", b'{"args": 3}', b'{"args": {"rk_order": "x"}}', b"\xff\xff", b'{"args": {"lr": NaN}}',
    b'{"args": {"multipliers": {"a": 1}}}', b"\0" * 99, b'{"args": {"attention": ["-h"]}}',
    b'{"args": {"multipliers": ["1", "--run-dir", "x"]}}'])
def test_a_damaged_config_names_itself(content):
    assert run("--iterations", "1")[0] == 0
    path = Path("runs/mnist/config.json")
    path.write_bytes(content)
    refused(lambda: cud_mnist.parse_args([*TINY, "--iterations", "2"]), str(path))


def test_damaged_results_and_caches_name_themselves(capsys):
    flags = shlex.split("--iterations 2 --features classifier --fid-samples 300")
    assert run(*flags)[0] == 0
    for path in Path("data/cache").glob("*.pt"):
        good = path.read_bytes()
        for change in (lambda saved: saved.popitem(), lambda saved: saved.update(x=1), lambda saved: next(
                leaf for leaf in leaves(saved) if torch.is_tensor(leaf) and leaf.dim()).fill_(math.nan)):
            path.write_bytes(good)
            spoil(path, change)
            status, err = run(*flags, capsys=capsys)
            assert status == 2 and path.name in err[0] and "remove it, and it is made again" in err[0], err
        path.unlink()
        assert run(*flags)[0] == 0
        assert path.exists()
    with open("runs/mnist/results.jsonl", "a") as file:
        file.write('{"key": ')
    common.add_result("runs/mnist", {"a": 1}, {})  # not glued to what a kill has cut
    assert Path("runs/mnist/results.jsonl").read_text().endswith('{"key": \n{"key": {"a": 1}}\n')
    refused(lambda: common.read_results("runs/mnist"), "results.jsonl", "damaged line")


def test_a_classifier_is_one_of_images_and_labels():
    images, labels = common.glyphs(600, (1, 28, 28))
    names = [cud_mnist.classifier_features(common.describe(images, of, "digits"), torch.device("cpu"))[1]
             for of in (labels, labels.flip(0), labels)]
    assert names[0] == names[2] != names[1]


# ----------------------------------------------------------------------------- stopping, sharing, leftovers


def test_a_closed_terminal_saves_and_nohup_goes_on():
    metrics = Path("runs/mnist/metrics.csv")
    heard = "import time, signal; signal.signal(1, signal.SIG_DFL)"  # also under nohup
    first = start(*LONG, before=heard)
    wait_for(first, lambda: metrics.exists() and len(table(metrics)) > 2)
    first.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    first.send_signal(signal.SIGTERM)  # torchrun sends it after a hangup
    out, _ = first.communicate(timeout=60)
    assert first.returncode == 129 and out.count("stopped; runs/mnist/checkpoint.pt keeps iteration") == 1
    went = torch.load("runs/mnist/checkpoint.pt")["iteration"]
    nohup = "import signal; signal.signal(1, signal.SIG_IGN)"
    second = start(*LONG, "--iterations", str(went + 60), before=nohup)
    wait_for(second, lambda: len(table(metrics)) > went // 4 + 3)
    second.send_signal(signal.SIGHUP)
    assert second.wait(timeout=120) == 0


def test_a_signal_outside_the_training_says_what_is_kept():
    wait = "(open('waiting', 'w').close(), time.sleep(60))"
    for part, number, words in (("load_data", signal.SIGTERM, "nothing is saved yet"),
                                ("evaluate", signal.SIGINT, "keeps iteration 2"),
                                ("evaluate", signal.SIGHUP, "keeps iteration 2")):
        heard = "import time, signal; signal.signal(1, signal.SIG_DFL)"  # also under nohup
        process = start("--iterations", "2", before=f"{heard}; script.{part} = lambda *_: {wait}")
        wait_for(process, Path("waiting").exists)
        Path("waiting").unlink()
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
        assert process.returncode == 128 + number and not err, (out, err)
        assert f"{words}; the same command goes on" in out


def test_closed_streams_do_not_end_a_training():
    Path("go.py").write_text(SCRIPT.format("cud_mnist", "script.SPEAK_EVERY = 0"))
    env = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    line = shlex.join([sys.executable, "go.py", *TINY, "--iterations", "30"])
    for number, streams in enumerate(("| head -n 1", "2>&-", "<&- >&- 2>&-")):
        command = f"{line} --run-dir {number} {streams}"
        subprocess.run(["bash", "-c", command], env=env, check=True, capture_output=True, timeout=120)
        assert torch.load(f"{number}/checkpoint.pt")["iteration"] == 30
        assert [row[0] for row in table(f"{number}/metrics.csv")][-1] == "30"
        assert (Path(str(number)) / "samples_model_euler_2.png").exists()


def test_ranks_whose_folders_differ_say_so():
    for folder in ("one", "two"):
        assert start("--iterations", "4", "--run-dir", folder).wait() == 0
    for other in ("two", "none"):  # equal, but of another save; and not there at all
        own = (("--run-dir", "one"), ("--run-dir", other))
        both = start_two("--iterations", "8", own=own)
        out = [process.communicate(timeout=120) for process in both]
        assert [process.returncode for process in both] == [2, 2], out
        assert out[0][1].count("ranks find different checkpoints in one") == 1 and not out[1][1], out
        assert len(out[0][1].splitlines()) == 1 and torch.load("one/checkpoint.pt")["iteration"] == 4


def test_workers_end_when_torchrun_is_killed():
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    process = start(*LONG, launcher=launcher, before="import os; open(f'pid{os.getpid()}', 'w')")
    metrics = Path("runs/mnist/metrics.csv")
    wait_for(process, lambda: metrics.exists() and len(table(metrics)) > 2)
    workers = [int(path.name[3:]) for path in Path().glob("pid*")]
    process.kill()

    def alive(pid):
        try:  # one that nobody waits for stays as a zombie in some containers
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except OSError:
            return False
    limit = time.time() + 45
    while any(alive(pid) for pid in workers):
        assert time.time() < limit
        time.sleep(0.1)
    assert len(workers) == 2 and torch.load("runs/mnist/checkpoint.pt")["iteration"] > 4


def test_two_preparations_at_once_leave_one_cache():
    for i in range(20):
        Path("pictures/a").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (70, 80), (i, i, i)).save(f"pictures/a/{i:02}.png")
    code = "import time, common, cud_imagenet64 as script; shrink = common.shrink; " \
           "common.shrink = lambda *given: time.sleep(2) or shrink(*given); common.run_main(script.main)"
    command = [sys.executable, "-c", code, *shlex.split("--data pictures --prepare --cache cache")]
    options = dict(env={**os.environ, "PYTHONPATH": str(HERE)}, text=True, stderr=subprocess.PIPE)
    first = subprocess.Popen(command, **options)
    wait_for(first, Path("cache/.lock").exists)
    second = subprocess.Popen(command, **options)
    err = second.communicate(timeout=60)[1]
    assert second.returncode == 2 and len(err.splitlines()) == 1, err
    assert "another process is at work in cache" in err
    assert first.wait(timeout=60) == 0 and np.load("cache/images.npy").shape == (20, 3, 64, 64)


def test_leftovers_of_killed_processes_of_this_host_are_swept(capsys):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host, folder = platform.node().replace(".", "-"), Path("runs/mnist")
    folder.mkdir(parents=True)
    left, others = folder / f".checkpoint.pt.{host}.{gone.pid}", [
        folder / f".checkpoint.pt.{host}.{os.getppid()}", folder / f".checkpoint.pt.another.{gone.pid}",
        folder / f".mine.{host}.txt", folder / f".mine.{host}.{10 ** 20}"]
    for path in (left, *others):
        path.write_bytes(b"half a file")
    assert run("--iterations", "1")[0] == 0
    assert not left.exists() and all(path.exists() for path in others)


def test_what_a_kill_left_out_is_made_when_the_run_goes_on():
    assert run("--iterations", "4")[0] == 0
    grid, model = Path("runs/mnist/samples_000004.png"), Path("runs/mnist/model.pt")
    pixels, weights = np.asarray(Image.open(grid)), torch.load(model)["model"]
    for iterations in ("4", "6"):
        grid.unlink()
        model.unlink()
        assert run("--iterations", iterations)[0] == 0
        assert (np.asarray(Image.open(grid)) == pixels).all() and model.exists()
        if iterations == "4":
            assert all(torch.equal(value, weights[key]) for key, value in torch.load(model)["model"].items())


def test_an_unexpected_error_keeps_its_traceback_and_says_what_is_kept():
    process = start("--iterations", "2", before="script.evaluate = lambda *_: 1 / 0")
    out, err = process.communicate()
    assert process.returncode == 1 and "ZeroDivisionError" in err and "Traceback" in err
    last = "runs/mnist/checkpoint.pt keeps iteration 2; the same command goes on from there"
    assert err.splitlines()[-1] == last


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB."),
    MemoryError("Unable to allocate 8 TiB"), "allocator", RuntimeError("other")])
def test_lack_of_memory_says_what_helps(error, monkeypatch, capsys):
    def fail(*_):
        if error == "allocator":
            torch.empty(10 ** 15)
        raise error
    monkeypatch.setattr(cud_mnist, "evaluate", fail)
    if isinstance(error, RuntimeError) and str(error) == "other":
        with pytest.raises(RuntimeError, match="other"):
            run("--iterations", "1")
        return
    status, err = run("--iterations", "1", capsys=capsys)
    assert status == 2 and len(err) == 1
    for words in ("out of memory", "checkpoint.pt keeps iteration 1", "--accumulate", "--batch-size needs"):
        assert words in err[0]


def test_an_evaluation_keeps_no_path(monkeypatch):
    args, alive = small_args(), []

    class Straight:
        @staticmethod
        def sampled(x, t):
            tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
            alive.append(sum(tensor.shape == x.shape for tensor in tensors))
            return x.clone()
    cud_mnist.sample(Straight, 300, "euler", 20, args, torch.device("cpu"))
    assert len(alive) == 20 and alive[-1] == alive[2]


def test_the_environment_of_half_a_launcher(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    status, err = run(capsys=capsys)
    assert status == 2 and "LOCAL_RANK is set without RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT" in err[0]
    for name, value in dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="x").items():
        monkeypatch.setenv(name, value)
    for local in ("1", "abc"):
        monkeypatch.setenv("LOCAL_RANK", local)
        status, err = run(capsys=capsys)
        assert status == 2 and len(err) == 1 and "cannot join the other ranks" in err[0]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_compilation_without_a_compiler(device, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    refused(lambda: common.check_compiler(torch.device(device)), "torch.compile needs a compiler", "off")
    if device == "cpu":
        status, err = run("--compile", "on", "--iterations", "1", capsys=capsys)
        assert status == 2 and len(err) == 1 and "torch.compile needs a compiler" in err[0]


def test_adm_s_heads_must_divide(capsys):
    flags = shlex.split("--channels 132 --multipliers 1 1 --attention 32 --data glyphs --batch-size 2")
    assert cud_imagenet64.main(flags) == 2
    assert "--channels, --multipliers: 132" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- GPUs


@pytest.mark.parametrize("name, local, ranks, expected", [
    (None, 0, 1, 0), ("cuda", 0, 1, 0), ("cuda:1", 0, 1, 1), (None, 3, 4, 3), ("cuda", 3, 4, 3),
    ("cuda:1", 0, 4, "one GPU for all ranks"), ("cuda:x", 0, 1, "--device cuda:x is not to be had"),
    ("xpu", 0, 1, "--device xpu is not known"), ("cpu", 0, 1, None)])
def test_each_process_gets_its_gpu(name, local, ranks, expected, monkeypatch):
    current, zeros = [], torch.zeros
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", current.append, raising=False)  # under the real check
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None: zeros(*size))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    for key, value in (("LOCAL_RANK", local), ("LOCAL_WORLD_SIZE", ranks)):
        monkeypatch.setenv(key, str(value))
    if isinstance(expected, str):
        with pytest.raises(common.InputError, match=expected):
            common.pick_device(name)
        assert current == []
    elif expected is None:
        assert common.pick_device(name) == torch.device("cpu") and current == []
    else:
        assert common.pick_device(name) == torch.device("cuda", expected) and current == [expected]


@pytest.mark.parametrize("cuda, served", [(True, {"cpu": "gloo", "cuda": "nccl"}), (False, {"cpu": "gloo"})])
def test_the_ranks_reduce_on_every_device_there_is(cuda, served, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *given, **_: asked.append(given))
    common.start_ranks()
    assert not asked  # without torchrun
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    common.start_ranks()
    backend = torch.distributed.Backend(asked[0][0])
    backends = torch.distributed.distributed_c10d.BackendConfig(backend).get_device_backend_map()
    assert served.items() <= backends.items() and ("cuda" in served or "nccl" not in backends.values())


def test_skip_scaling_keeps_bfloat16():
    network, kinds = small_unet(), []
    network.amp = True
    for block in network.decoder:
        block.register_forward_pre_hook(lambda module, inputs: kinds.append(inputs[0].dtype))
    v = network(torch.randn(2, 1, 28, 28), torch.tensor([0.3, 0.9]))
    assert set(kinds) == {torch.bfloat16} and v.dtype == torch.float32


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@gpu
@pytest.mark.parametrize("script", SCRIPTS)
def test_gpu_quick(script):
    few = "--quick --iterations 30 --fid-samples 300 --steps 1 3 --checkpoint-every 20"
    few += " --one-step-iterations 4 --one-step-pairs 30"
    assert script.main(shlex.split(few)) == 0
    rows = common.read_results(script.QUICK["run_dir"])
    assert rows and all(row["device"] == "cuda:0" for row in rows)
    assert all(row["floor"] < row["value"] < row["noise"] for row in rows)


@gpu
def test_gpu_compiled_bfloat16_trains_as_eager_float32():
    flags = shlex.split("--quick --iterations 50 --no-one-step --fid-samples 0 --rk-order 2")
    for name, more in (("fast", "--amp on --compile on"), ("plain", "--amp off --compile off")):
        assert cud_mnist.main([*flags, *more.split(), "--run-dir", name]) == 0
    fast, plain = (table(f"{name}/metrics.csv")[-1][2:6] for name in ("fast", "plain"))
    # the same draws; bfloat16 keeps 8 bits: within 0.4 % a value, and the losses are means over 1,600 images
    np.testing.assert_allclose(np.float64(fast), np.float64(plain), rtol=0.03, atol=1e-3)


class Guarded:
    """A progress bar that forbids waiting for the GPU, but in the first three iterations and the last."""

    disable = False

    def __init__(self, todo, *_, **__):
        self.todo = todo

    def __iter__(self):
        for i in self.todo:
            torch.cuda.set_sync_debug_mode("error" if 2 < i < len(self.todo) - 1 else "default")
            yield i
        torch.cuda.set_sync_debug_mode("default")

    def set_postfix(self, **_):
        pass


@gpu
@pytest.mark.parametrize("script", SCRIPTS)
def test_gpu_iterations_do_not_wait(script, monkeypatch):
    monkeypatch.setattr(script, "progress", Guarded)
    monkeypatch.setattr(script, "sample", lambda *_: dummy_samples(script))
    monkeypatch.setattr(script, "evaluate", lambda *_: None)
    more = shlex.split("--iterations 20 --rk-order 2 --target ema --attention 32")
    assert script.main([*TINY, *more[:8 if script is cud_imagenet64 else 6]]) == 0


@gpu
def test_gpu_run_killed_and_continued():
    flags = ("--iterations", "24", "--checkpoint-every", "9", "--rk-order", "2")
    assert start(*flags, "--run-dir", "whole").wait() == 0
    killed, metrics = start(*flags, "--run-dir", "killed"), Path("killed/metrics.csv")
    wait_for(killed, lambda: Path("killed/checkpoint.pt").exists() and len(table(metrics)) > 3, seconds=300)
    killed.kill()
    killed.wait()
    assert start(*flags, "--run-dir", "killed").wait() == 0
    whole, again = (np.array(table(f"{name}/metrics.csv")[1:])[:, :5] for name in ("whole", "killed"))
    np.testing.assert_allclose(np.float64(again), np.float64(whole), rtol=0.02)  # atomic sums differ


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_gpu_torchrun_over_nccl():
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    flags = ("--iterations", "12", "--dropout", "0", "--amp", "off")
    assert start(*flags, "--run-dir", "one", CUDA_VISIBLE_DEVICES="0").wait() == 0
    assert start(*flags, "--run-dir", "two", launcher=launcher).wait() == 0
    one, two = ([float(cell or 0) for cell in table(f"{name}/metrics.csv")[-1]] for name in ("one", "two"))
    np.testing.assert_allclose(two, one, rtol=0.01)


@gpu
@pytest.mark.parametrize("script", [cud_mnist, cud_cifar10])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_gpu_memory_is_as_readme_says(script, order):
    row = re.search(rf"\| `{script.__name__}.py`.* \| 1 \|(.*)\|", (HERE / "README.md").read_text())[1]
    estimate = float(row.split("|")[order - 1])
    flags = f"--data glyphs --iterations 6 --fid-samples 0 --rk-order {order}"
    code = f"import torch, {script.__name__} as script; script.evaluate = lambda *_: None; " \
           "script.sample = lambda *_: script.Samples(torch.zeros(64, *script.IMAGE).byte(), 1, 0, None); " \
           f"script.main('{flags}'.split()); print(torch.cuda.max_memory_allocated() / 2 ** 30)"
    process = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(HERE)},
                             check=True, capture_output=True, text=True)
    assert float(process.stdout.split()[-1]) < 1.25 * estimate + 1.5


# ------------------------------------------------------------------------------------ one text, three scripts


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


CONFIGURATION = {"docstring", "IMAGE", "DATA_HELP", "PAPER", "QUICK", "load_data"}
ADDED_TO = {"parse_args", "train", "evaluate"}


def test_cifar10_differs_from_mnist_in_what_it_must_alone():
    mnist, cifar = statements(cud_mnist), statements(cud_cifar10)
    assert [name for name in cifar if name in mnist] == list(mnist)  # in the same order
    assert cifar.keys() - mnist.keys() == {"STATISTICS", "precomputed"}
    assert {name for name in mnist if mnist[name] != cifar[name]} == CONFIGURATION | ADDED_TO
    for name in ADDED_TO:
        assert not [line for line in difflib.ndiff(mnist[name], cifar[name]) if line.startswith("- ")], name
    assert sum(line[0] in "+-" for line in difflib.ndiff(*(
        Path(script.__file__).read_text().splitlines() for script in (cud_mnist, cud_cifar10)))) < 80


def test_imagenet_differs_from_cifar10_in_what_it_must_alone():
    cifar, imagenet = statements(cud_cifar10), statements(cud_imagenet64)
    both = [name for name in cifar if name in imagenet]
    assert [name for name in imagenet if name in cifar] == both
    assert {name for name in both if cifar[name] != imagenet[name]} == CONFIGURATION | {
        "SAMPLE_BATCH", "FEATURES", "implied", "parse_args", "CatchUp", "conv", "norm", "Block", "UNet",
        "sample", "Classifier", "classifier_features", "evaluate", "train", "OneStep", "one_step_pairs",
        "train_one_step", "main"}
    assert {name for name in cifar.keys() - imagenet.keys() if not name.startswith(("import", "from"))} \
        == {"init", "STATISTICS", "precomputed"}
    assert sum(line[0] in "+-" for line in difflib.ndiff(*(
        Path(script.__file__).read_text().splitlines() for script in (cud_cifar10, cud_imagenet64)))) < 400


# ---------------------------------------------------------------------------------------------------- README


def readme_commands(of_results):
    """(script, flags) of the README's bash blocks, in order, loops and variables expanded by bash."""
    blocks = re.findall(r"```bash\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    blocks = [block for block in blocks if " cud_" in block and ("small=" in block) == of_results]
    show = 'python() { printf "%q " "$@"; echo; }; torchrun() { python "$@"; }; pip() { :; }\n'
    command = ["bash", "-euc", show + "\n".join(blocks)]
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        found = re.search(r"(cud_\w+)\.py(.*)", line)
        yield sys.modules[found[1]], shlex.split(found[2])


def test_readme_commands_work_one_after_the_other():
    counts = dict.fromkeys(SCRIPTS, 0)
    for script, flags in readme_commands(of_results=False):
        for i, word in enumerate(flags):
            flags[i] = "glyphs" if word.startswith("path/to") else {"207": "2", "360": "3"}.get(word, word)
        flags = shortened(script, shlex.join(flags))
        assert script.parse_args(flags) and script.main([*flags, "--steps", "1"]) == 0, flags
        counts[script] += 1
    assert min(counts.values()) >= 5 and len(list(Path("runs").glob("*/model.pt"))) > 10


def test_readme_results_commands_parse_and_its_python_runs(quick, monkeypatch):
    teacher = str(quick / "runs/mnist-quick/model.pt")
    parsed = [script.parse_args([teacher if "model.pt" in word else word for word in flags])
              for script, flags in readme_commands(of_results=True)]
    assert len(parsed) > 30
    text = (HERE / "README.md").read_text()
    rows = re.findall(r"\| `(--run-dir [^`]*)`", text)
    folders = {cud_cifar10.parse_args(row.split()).run_dir for row in rows}
    assert len(folders) == len(rows) - 1 > 10  # one for each, and one-step goes on in RK12's
    monkeypatch.chdir(quick)
    monkeypatch.syspath_prepend(str(HERE))
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block.replace('"assets/', f'"{HERE}/assets/'), "README.md", "exec"), {})


@pytest.mark.parametrize("name, solver, steps", [("rk12", common.ab2, 5), ("one_step", common.euler, 1)])
def test_the_weights_in_assets_make_digits(name, solver, steps):
    network = cud_mnist.load_model(HERE / f"assets/mnist_{name}.pt")
    z = torch.randn(64, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    images = common.to_uint8(solver(network.sampled, z, steps)[0])
    assert 28 < images.float().mean() < 40  # MNIST: 33.8
    assert 0.7 < (images < 20).float().mean() < 0.9 and (images > 200).float().mean() > 0.05


def test_readme_figure_is_drawn_from_its_table():
    text = (HERE / "README.md").read_text()
    assert (HERE / "assets/quality.svg").read_text() == figure(text)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_explained(script):
    command, env = [sys.executable, script.__file__, "--help"], {**os.environ, "COLUMNS": "300"}
    text = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    entries = [" ".join(entry.split("\n\n")[0].split()) for entry in re.split(r"\n  (?=--|-h)", text)[1:]]
    flags = re.findall(r"flag\(\"(--[a-z-]+)\"", Path(script.__file__).read_text())
    assert len(flags) == len(entries) - 1 > 35
    for flag, entry in zip(flags, entries[1:]):
        form = rf"{flag}(, --no{flag[1:]})?( \{{.*?\}}| [A-Z_]+( \[[A-Z_]+ \.\.\.\])?)? "
        said = re.sub(r"\(default: .*?\)$", "", re.sub(form, "", entry, count=1))
        assert entry.startswith(flag) and len(re.findall(r"[a-zA-Z]{2,}", said)) >= 3, entry
    assert f"(default: {script.PAPER['iterations']})" in text
    assert not list(Path().iterdir())  # importing and helping write nothing


# --------------------------------------------------------------------------------------------------- figure


def figure(text):
    """An SVG of quality against NFE: the rows of the README's table that follow its header of step counts."""
    table = re.search(r"\| method \|.*?\n\n", text, re.S)[0].replace("`", "").strip()
    head, _, *rows = ([cell.strip(" *") for cell in row.split("|")[1:-1]] for row in table.split("\n"))
    steps, lines = [int(cell) for cell in head if cell.isdigit()], {}
    for name, *cells in rows:
        figures = [re.findall(r"[\d.]+", cell.replace(",", "")) for cell in cells]
        lines[name] = [(n, *map(float, figure)) for n, figure in zip(steps, figures) if figure]
    return common.line_chart(lines, "network evaluations an image (NFE), Euler",
                             "FD (classifier), lower is better", x_ticks=steps)


# ------------------------------------------------------------------------------------------------ benchmark
#
#   python test_cud.py SCRIPT [--iterations 20] [its other flags], for example
#   python test_cud.py cud_mnist --rk-order 1 --batch-size 64 --coupling independent
#
# trains the script's network on drawn digits, its way and the plain way: eager, PyTorch's default precision,
# NCHW, every stage and target a full forward pass of its own, k_1 computed again, the EMA parameter by
# parameter, a DataLoader with workers; then samples with both. Prints images/s; start-up is left out.


def plain_step(network, encoder, conditions, x, args):
    """The loss of images x [B, C, H, W] in [-1, 1]; conditions: what the network wants beside x_t and t."""
    expand, k = (-1, 1, 1, 1), args.rk_order
    t, h = torch.rand(len(x), device=x.device), torch.rand(len(x), device=x.device) / args.intervals
    z = torch.randn_like(x)
    loss = 0
    if encoder is not None:
        mu, log_var = encoder(x, torch.ones_like(t))[0].chunk(2, 1)
        z = mu + (log_var / 2).exp() * z
        loss = args.kl_weight * (mu.square() + log_var.exp() - 1 - log_var).mean() / 2
    x_t, u = t.view(expand) * z + (1 - t.view(expand)) * x, z - x
    v = network(x_t, t, *conditions)
    loss = loss + sum((v[j] - u).square().mean() for j in range(len(v)))
    with torch.no_grad():
        slopes = [network(x_t, t, *conditions)[0]] if k else []
        for i in range(1, k):
            there = x_t - h.view(expand) * sum(a * s for a, s in zip(A_TABLE["published"][i - 1], slopes))
            slopes.append(network(there, (t - i * h).clamp(min=1e-5), *conditions)[0])
    for j in range(k):
        with torch.no_grad():
            there = x_t - h.view(expand) * sum(b * s for b, s in zip(B_TABLE["published"][k][j], slopes))
            y = network(there, (t - (j + 1) * h).clamp(min=1e-5), *conditions)[0]
            y = torch.where((t - k * h < 1e-5).view(expand), u, y)
        loss = loss + (v[j] - y).square().mean()
    if len(conditions):
        loss = loss + cud_imagenet64.wavelet_loss(z - v[-1], x).mean()
    return loss


def networks(script, args, device, data, plainly):
    """The network, and the encoder or None, as the script's train() builds them."""
    torch.set_float32_matmul_precision("highest" if plainly else "high")
    made, prepare = [], script.prepare
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "prepare", lambda network, *more: made.append(
            network.to(device) if plainly else prepare(network, *more)) or network)
        patch.setattr(script, "fit", lambda *_: None)
        script.train(args, device, data)
    return (*made, None)[:2]


def plain_training(script, args, device, data, iterations, warm_up=3):
    """Images a second."""
    network, encoder = networks(script, args, device, data, plainly=True)
    ema = copy.deepcopy(network)
    trained = [p for part in (network, encoder) if part is not None for p in part.parameters()]
    optimizer = torch.optim.Adam(trained, args.lr)
    pairs = torch.utils.data.TensorDataset(data.images, data.labels)
    loader = torch.utils.data.DataLoader(pairs, args.batch_size, shuffle=True, num_workers=2, drop_last=True)
    batches = (batch for _ in range(iterations) for batch in loader)
    for i in range(iterations + warm_up):
        if i == warm_up:
            synchronize(device)
            start = time.time()
        x, label = (part.to(device) for part in next(batches))
        conditions = (label,) if script is cud_imagenet64 else ()
        plain_step(network, encoder, conditions, x.float() / 127.5 - 1, args).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for mine, its in zip(ema.parameters(), network.parameters()):
                mine.mul_(args.ema_decay).add_((1 - args.ema_decay) * its)
    synchronize(device)
    return iterations * args.batch_size / (time.time() - start)


def scripted_training(script, flags, iterations):
    """Images and TFLOP a second, from metrics.csv: the last of three rows, each of `iterations`."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "LOG_EVERY", iterations)
        patch.setattr(script, "evaluate", lambda *_: None)
        patch.setattr(script, "sample", lambda *_: dummy_samples(script))
        more = ["--iterations", str(3 * iterations), "--run-dir", folder, "--fid-samples", "0"]
        assert script.main([*flags, *more]) == 0
        rows = [row.split(",") for row in (Path(folder) / "metrics.csv").read_text().splitlines()]
        return [float(rows[-1][rows[0].index(name)]) for name in ("images_per_s", "model_tflop_per_s")]


def sampling(script, args, device, data, plainly):
    """Images a second at the last of --steps, the second time round."""
    network = networks(script, args, device, data, plainly)[0].eval()
    if not plainly and device.type == "cuda":
        network.compile(dynamic=False)
    n = 4 * script.SAMPLE_BATCH if device.type == "cuda" else 64
    wanted = torch.arange(n) % 10 if script is cud_imagenet64 else n
    for _ in range(2):
        synchronize(device)
        start = time.time()
        script.sample(network, wanted, "euler", args.steps[-1], args, device)
        synchronize(device)
    return n / (time.time() - start)


def matrix_rate(device):
    """TFLOP a second of a bfloat16 matrix product, the second time round."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    for _ in range(2):
        synchronize(device)
        start = time.time()
        for _ in range(20):
            a @ a
        synchronize(device)
    return 20 * 2 * n ** 3 / 1e12 / (time.time() - start)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(name, flags, plainly):
    """Both rates of one way, in a process of its own as a user's would be: {"training": images/s, ...}."""
    script = sys.modules[name]
    args = script.parse_args(flags)
    iterations = args.iterations if "--iterations" in flags else 20  # a row of metrics.csv; three are made
    data = script.load_data(args)
    if plainly:  # pick_device sets what PyTorch leaves unset
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        found = {"training": plain_training(script, args, device, data, iterations)}
    else:
        device = common.pick_device(args.device)
        training, flops = scripted_training(script, flags, iterations)
        found = {"training": training, "flops": flops, "rate": matrix_rate(device),
                 "about": f"{iterations} iterations; {common.versions(device)}"}
    return found | {"sampling": sampling(script, args, device, data, plainly)}


if __name__ == "__main__" and sys.argv[1:] == ["figure"]:
    (HERE / "assets/quality.svg").write_text(figure((HERE / "README.md").read_text()))
elif __name__ == "__main__":
    name, *flags = sys.argv[1:] or ["cud_mnist", *shlex.split("--batch-size 64 --coupling independent")]
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        plain, scripted = (processes.submit(measure, name, ["--data", "glyphs", *flags], plainly).result()
                           for plainly in (True, False))
    print(f"{name} {' '.join(flags)}; {scripted['about']}\n"
          f"training at {scripted['flops']:.3g} TFLOP/s, {scripted['flops'] / scripted['rate']:.1%} of a "
          f"bfloat16 matrix product's {scripted['rate']:.3g}")
    for work in ("training", "sampling"):
        print(f"{work}: {scripted[work]:.1f} images/s, the plain way {plain[work]:.1f}, "
              f"ratio {scripted[work] / plain[work]:.2f}")
